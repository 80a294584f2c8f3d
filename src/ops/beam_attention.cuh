// Attention of one new token per row. Row r attends to the tokens spans[r, 0] to spans[r, 1] - 1 of
// its query, then to its ancestors and to itself.
// y: (rows, heads, D); store: (capacity, widest, 2, heads, D), keys and values of generated tokens,
// changed in place; qkv: (rows, 3, heads, D) of the new tokens; prefix: (P, 3, heads, D) of the
// queries' tokens; spans: (rows, 2); ancestors: (steps, rows), for each step a row of the store,
// which in the last step is the row itself.

#include "attend.cuh"

// Copies the keys and values of the new tokens to `newest` (rows, 2, C), one block for each row.
__global__ static void store_kernel(float* newest, const float* qkv, int C) {
    const float* from = qkv + ((int64_t)blockIdx.x * 3 + 1) * C;
    float* to = newest + (int64_t)blockIdx.x * 2 * C;
    for (int c = threadIdx.x; c < 2 * C; c += THREADS) to[c] = from[c];
}

struct Keys {  // of one head of one row: those of its query's tokens, then of its ancestors
    const float *prefix, *store;  // the head's first key in each
    const int* ancestors;         // the row's first
    int seen, widest, rows, C;    // seen: number of the query's tokens
    __device__ const float* operator()(int j) const {
        if (j < seen) return prefix + (int64_t)j * 3 * C;
        j -= seen;
        return store + ((int64_t)j * widest + ancestors[(int64_t)j * rows]) * 2 * C;
    }
};

// One block computes one head of one row.
__global__ static void beam_attention_kernel(float* y, const float* store, const float* qkv,
                                             const float* prefix, const int* spans,
                                             const int* ancestors, int rows, int heads, int widest,
                                             int steps, int D) {
    const int row = blockIdx.x, h = blockIdx.y, C = heads * D;
    const int begin = spans[2 * row], seen = spans[2 * row + 1] - begin;
    const float* first = prefix + ((int64_t)begin * 3 + 1) * C + h * D;
    const Keys keys = {first, store + h * D, ancestors + row, seen, widest, rows, C};
    attend(y + (int64_t)row * C + h * D, qkv + (int64_t)row * 3 * C + h * D, keys, seen + steps, C,
           D);
}

template <int D>
static void beam_attention(float* y, float* store, const float* qkv, const float* prefix,
                           const int* spans, const int* ancestors, int rows, int heads, int widest,
                           int steps) {
    const int C = heads * D;
    store_kernel<<<rows, THREADS>>>(store + (int64_t)(steps - 1) * widest * 2 * C, qkv, C);
    beam_attention_kernel<<<dim3(rows, heads), ATTENTION_THREADS>>>(
        y, store, qkv, prefix, spans, ancestors, rows, heads, widest, steps, D);
}
