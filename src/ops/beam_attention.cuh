// See beam_attention.h. One block computes one head of one row.

#include "attend.cuh"

template <int D>
__global__ static void beam_attention(float* y, float* store, const float* qkv, const float* prefix,
        const int* spans, const int* ancestors, int rows, int heads, int widest, int steps) {
    const int row = blockIdx.x, h = blockIdx.y, C = heads * D;
    const int begin = spans[2 * row], seen = spans[2 * row + 1] - begin;
    // The head's part of the row's query, of the first keys, and of a key that the store holds.
    const float* q = qkv + (int64_t)row * 3 * C + h * D;
    const float* first = prefix + ((int64_t)begin * 3 + 1) * C + h * D;
    const auto stored = [=](int step, int of) {
        return store + ((int64_t)step * widest + of) * 2 * C + h * D;
    };
    float* newest = stored(steps - 1, row);
    for (int d = threadIdx.x; d < D; d += ATTENTION_THREADS) {
        newest[d] = q[C + d];
        newest[C + d] = q[2 * C + d];
    }
    __syncthreads();  // in this step no other block reads this part of the store
    const auto key = [=](int j) -> const float* {
        if (j < seen) return first + (int64_t)j * 3 * C;
        return stored(j - seen, ancestors[(int64_t)(j - seen) * rows + row]);
    };
    attend(y + (int64_t)row * C + h * D, q, key, seen + steps, C, D);
}
