// See cross_entropy.h. One block computes one row.

#include "block.cuh"

__global__ static void cross_entropy(float* loss, float* log_sum, const float* logits,
        const int* target, int rows, int vocab, float smooth) {
    const int n = blockIdx.x;
    const float* x = logits + (int64_t)n * vocab;
    float high = -1e30f, sum = 0, exp_sum = 0;
    for (int v = threadIdx.x; v < vocab; v += THREADS) {
        high = fmaxf(high, x[v]);
        sum += x[v];
    }
    high = max_of(high);
    sum = sum_of(sum);
    for (int v = threadIdx.x; v < vocab; v += THREADS) exp_sum += expf(x[v] - high);
    const float lse = high + logf(sum_of(exp_sum));
    if (threadIdx.x) return;
    loss[n] = lse - (1 - smooth) * x[target[n]] - smooth * sum / vocab;
    log_sum[n] = lse;
}

__global__ static void grad_cross_entropy(float* dlogits, const float* logits, const int* target,
        const float* log_sum, const float* dloss, int rows, int vocab, float smooth) {
    const int n = blockIdx.x;
    const float *x = logits + (int64_t)n * vocab, lse = log_sum[n], g = dloss[n];
    float* dx = dlogits + (int64_t)n * vocab;
    for (int v = threadIdx.x; v < vocab; v += THREADS)
        dx[v] = g * (expf(x[v] - lse) - smooth / vocab - (v == target[n] ? 1 - smooth : 0));
}
