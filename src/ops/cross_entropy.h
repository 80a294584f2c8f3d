// Cross entropy with label smoothing, and its gradient. logits, dlogits: (rows, vocab); target,
// loss, dloss, log_sum: (rows), the last being the log of the sum of exp(logits).

#include <algorithm>
#include <cmath>
#include <cstdint>

static void cross_entropy(float* loss, float* log_sum, const float* logits, const int* target,
        int rows, int vocab, float smooth) {
    #pragma omp parallel for
    for (int n = 0; n < rows; n++) {
        const float* x = logits + (int64_t)n * vocab;
        float high = x[0], exp_sum = 0, sum = 0;
        for (int v = 0; v < vocab; v++) {
            high = std::max(high, x[v]);
            sum += x[v];
        }
        for (int v = 0; v < vocab; v++) exp_sum += std::exp(x[v] - high);
        float lse = high + std::log(exp_sum);
        loss[n] = lse - (1 - smooth) * x[target[n]] - smooth * sum / vocab;
        log_sum[n] = lse;
    }
}

static void grad_cross_entropy(float* dlogits, const float* logits, const int* target,
        const float* log_sum, const float* dloss, int rows, int vocab, float smooth) {
    #pragma omp parallel for
    for (int n = 0; n < rows; n++) {
        const float* x = logits + (int64_t)n * vocab;
        float* dx = dlogits + (int64_t)n * vocab;
        float lse = log_sum[n], g = dloss[n], share = smooth / vocab;
        for (int v = 0; v < vocab; v++) dx[v] = g * (std::exp(x[v] - lse) - share);
        dx[target[n]] -= g * (1 - smooth);
    }
}
