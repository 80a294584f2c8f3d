// Cross entropy with label smoothing, and its gradient. logits, dlogits: (rows, vocab); target,
// loss, dloss, log_sum: (rows), the last being the log of the sum of exp(logits). On a GPU, one
// block computes one row.

#include "device.h"

KERNEL void cross_entropy(float* loss, float* log_sum, const float* logits, const int* target,
        int rows, int vocab, float smooth) {
    FOR_ROWS (n, rows) {
        const float* x = logits + (int64_t)n * vocab;
        float high = x[0], exp_sum = 0, sum = 0;
        FOR_COLUMNS (v, vocab) {
            high = max(high, x[v]);
            sum += x[v];
        }
        high = max_of(high);
        sum = sum_of(sum);
        FOR_COLUMNS (v, vocab) exp_sum += std::exp(x[v] - high);
        const float lse = high + std::log(sum_of(exp_sum));
        if (FIRST_THREAD) {
            loss[n] = lse - (1 - smooth) * x[target[n]] - smooth * sum / vocab;
            log_sum[n] = lse;
        }
    }
}

KERNEL void grad_cross_entropy(float* dlogits, const float* logits, const int* target,
        const float* log_sum, const float* dloss, int rows, int vocab, float smooth) {
    FOR_ROWS (n, rows) {
        const float* x = logits + (int64_t)n * vocab;
        float* dx = dlogits + (int64_t)n * vocab;
        float lse = log_sum[n], g = dloss[n], share = smooth / vocab;
        FOR_COLUMNS (v, vocab) dx[v] = g * (std::exp(x[v] - lse) - share);
        SYNC;  // of the number that is changed next
        if (FIRST_THREAD) dx[target[n]] -= g * (1 - smooth);
    }
}
