// Causal self-attention over whole sequences, and its gradient.
// qkv, dqkv: (tokens, 3, heads, D), the query, key and value of each token; starts:
// (sequences + 1), the first token of each sequence, then tokens; y, dy: (tokens, heads, D);
// log_sums: (tokens, heads), the log of the sum of exp(scores).
// One block computes one head of one token.

#include "attend.cuh"

__device__ static int sequence_of(int token, const int* starts) {
    int b = 0;
    while (starts[b + 1] <= token) b++;
    return b;
}

struct Keys {  // of one head of one sequence
    const float* first;
    int stride;
    __device__ const float* operator()(int j) const { return first + (int64_t)j * stride; }
};

__global__ static void causal_attention_kernel(float* y, float* log_sums, const float* qkv,
                                               const int* starts, int heads, int D) {
    const int i = blockIdx.x, h = blockIdx.y, C = heads * D;
    const int first = starts[sequence_of(i, starts)];
    const float* q = qkv + (int64_t)i * 3 * C + h * D;
    const Keys keys = {qkv + ((int64_t)first * 3 + 1) * C + h * D, 3 * C};
    const float lse = attend(y + (int64_t)i * C + h * D, q, keys, i - first + 1, C, D);
    if (threadIdx.x == 0) log_sums[(int64_t)i * heads + h] = lse;
}

template <int D>
static void causal_attention(float* y, float* log_sums, const float* qkv, const int* starts,
                             int tokens, int sequences, int heads) {
    causal_attention_kernel<<<dim3(tokens, heads), ATTENTION_THREADS>>>(y, log_sums, qkv, starts,
                                                                        heads, D);
}

struct Slope {
    float p, g;  // a probability, the gradient of its score
};

struct Head {  // pointers to the head's numbers of token 0
    const float *qkv, *y, *log_sums, *dy;
    int heads, D;
    __device__ const float* part(int64_t token, int which) const {
        return qkv + (token * 3 + which) * heads * D;
    }
    // Of the score of query i with key j; see causal_attention.h for the equation.
    __device__ Slope slope(int64_t i, int64_t j) const {
        const float scale = 1 / sqrtf((float)D), *dyi = dy + i * heads * D;
        const float mean = inner(dyi, y + i * heads * D, D);
        const float p = expf(inner(part(i, 0), part(j, 1), D) * scale - log_sums[i * heads]);
        return {p, p * (inner(dyi, part(j, 2), D) - mean) * scale};
    }
};

// dq (D) of a token, summed over the keys of tokens first to token.
__device__ static void differentiate_query(float* dq, const Head& head, int token, int first,
                                           Slope* slopes) {
    const int t = threadIdx.x;
    for (int begin = first; begin <= token; begin += ATTENTION_THREADS) {
        const int count = min(ATTENTION_THREADS, token + 1 - begin);
        __syncthreads();  // the slopes of the last step have been read
        if (t < count) slopes[t] = head.slope(token, begin + t);
        __syncthreads();
        for (int d = t; d < head.D; d += ATTENTION_THREADS)
            for (int j = 0; j < count; j++) dq[d] += slopes[j].g * head.part(begin + j, 1)[d];
    }
}

// dk and dv (D) of a token, summed over the queries of tokens token to end - 1.
__device__ static void differentiate_key(float* dk, float* dv, const Head& head, int token, int end,
                                         Slope* slopes) {
    const int t = threadIdx.x;
    for (int begin = token; begin < end; begin += ATTENTION_THREADS) {
        const int count = min(ATTENTION_THREADS, end - begin);
        __syncthreads();  // the slopes of the last step have been read
        if (t < count) slopes[t] = head.slope(begin + t, token);
        __syncthreads();
        for (int d = t; d < head.D; d += ATTENTION_THREADS)
            for (int i = 0; i < count; i++) {
                dk[d] += slopes[i].g * head.part(begin + i, 0)[d];
                dv[d] += slopes[i].p * head.dy[(int64_t)(begin + i) * head.heads * head.D + d];
            }
    }
}

__global__ static void grad_causal_attention_kernel(float* dqkv, const float* qkv,
                                                    const int* starts, const float* y,
                                                    const float* log_sums, const float* dy,
                                                    int heads, int D) {
    __shared__ Slope slopes[ATTENTION_THREADS];
    const int token = blockIdx.x, h = blockIdx.y, C = heads * D;
    const int b = sequence_of(token, starts);
    const Head head = {qkv + h * D, y + h * D, log_sums + h, dy + h * D, heads, D};
    float* dq = dqkv + (int64_t)token * 3 * C + h * D;
    float *dk = dq + C, *dv = dk + C;
    for (int d = threadIdx.x; d < D; d += ATTENTION_THREADS) dq[d] = dk[d] = dv[d] = 0;
    differentiate_query(dq, head, token, starts[b], slopes);
    differentiate_key(dk, dv, head, token, starts[b + 1], slopes);
}

template <int D>
static void grad_causal_attention(float* dqkv, const float* qkv, const int* starts, const float* y,
                                  const float* log_sums, const float* dy, int tokens, int sequences,
                                  int heads) {
    grad_causal_attention_kernel<<<dim3(tokens, heads), ATTENTION_THREADS>>>(
        dqkv, qkv, starts, y, log_sums, dy, heads, D);
}
