// See causal_attention.h. One block computes one head of one token.

#include "attend.cuh"

__device__ static int sequence_of(int token, const int* starts) {
    int b = 0;
    while (starts[b + 1] <= token) b++;
    return b;
}

template <int D>
__global__ static void causal_attention(float* y, float* log_sums, const float* qkv,
        const int* starts, const int* prefixes, int tokens, int heads, int sequences) {
    const int i = blockIdx.x, h = blockIdx.y, C = heads * D;
    const int b = sequence_of(i, starts), first = starts[b];
    const int before = prefixes ? prefixes[2 * b] : 0;
    const int seen = prefixes ? prefixes[2 * b + 1] - before : 0;
    const float* queries = qkv + h * D;
    const auto key = [=](int j) {
        const int64_t token = j < seen ? before + j : first + j - seen;
        return queries + (token * 3 + 1) * C;
    };
    const float lse = attend(y + (int64_t)i * C + h * D, queries + (int64_t)i * 3 * C, key,
            seen + i - first + 1, C, D);
    if (threadIdx.x == 0) log_sums[(int64_t)i * heads + h] = lse;
}

struct Slope {
    float p, g;  // a probability, the gradient of its score
};

template <int D>
__global__ static void grad_causal_attention(float* dqkv, const float* qkv, const int* starts,
        const float* y, const float* log_sums, const float* dy, int tokens, int heads,
        int sequences) {
    __shared__ Slope slopes[ATTENTION_THREADS];
    const int t = threadIdx.x, token = blockIdx.x, h = blockIdx.y, C = heads * D;
    const int b = sequence_of(token, starts), end = starts[b + 1];
    // The head's part of a token's query (0), key (1) or value (2).
    const auto part = [=](int64_t i, int which) { return qkv + (i * 3 + which) * C + h * D; };
    // Of the score of query i with key j; see causal_attention.h for the equation.
    const auto slope = [=](int64_t i, int64_t j) {
        const float scale = 1 / sqrtf((float)D), *dyi = dy + i * C + h * D;
        const float mean = inner(dyi, y + i * C + h * D, D);
        const float p = expf(inner(part(i, 0), part(j, 1), D) * scale - log_sums[i * heads + h]);
        return Slope{p, p * (inner(dyi, part(j, 2), D) - mean) * scale};
    };
    float *dq = dqkv + (int64_t)token * 3 * C + h * D, *dk = dq + C, *dv = dk + C;
    for (int d = t; d < D; d += ATTENTION_THREADS) dq[d] = dk[d] = dv[d] = 0;
    for (int begin = starts[b]; begin < end; begin += ATTENTION_THREADS) {
        const int count = min(ATTENTION_THREADS, end - begin);
        __syncthreads();  // the slopes of the last step have been read
        if (t < count) slopes[t] = slope(max(token, begin + t), min(token, begin + t));
        __syncthreads();
        for (int d = t; d < D; d += ATTENTION_THREADS)
            for (int j = 0; j < count; j++) {
                const int64_t other = begin + j;
                if (other <= token) dq[d] += slopes[j].g * part(other, 1)[d];
                if (other < token) continue;
                dk[d] += slopes[j].g * part(other, 0)[d];
                dv[d] += slopes[j].p * dy[other * C + h * D + d];
            }
    }
}
