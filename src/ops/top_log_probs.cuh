// See top_log_probs.h. One block computes one row and reads it k + 1 times, once for each pick and
// once for the sum.

#include "device.h"

const float LOW = -1e30f;  // the logit of an excluded token; fast math does not allow infinity

struct Pick {
    float value;
    int token;
};
__device__ static bool precedes(Pick a, Pick b) {
    return a.value > b.value || (a.value == b.value && a.token < b.token);
}

// The largest number of x (vocab) that comes after `last`; all threads return it.
__device__ static Pick next_pick(const float* x, int vocab, Pick last) {
    Pick best = {2 * LOW, vocab};
    for (int v = threadIdx.x; v < vocab; v += THREADS) {
        const Pick pick = {x[v], v};
        if (precedes(last, pick) && precedes(pick, best)) best = pick;
    }
    return reduce(best, [](Pick a, Pick b) { return precedes(a, b) ? a : b; });
}

// Puts a pick among the `count` ones before it, in the order of tokens.
__device__ static void insert(float* values, int* tokens, int count, int token, float value) {
    int place = count;
    for (; place && tokens[place - 1] > token; place--) {
        tokens[place] = tokens[place - 1];
        values[place] = values[place - 1];
    }
    tokens[place] = token;
    values[place] = value;
}

__global__ static void top_log_probs(float* values, int* tokens, float* logits,
        const int* positions, int rows, int vocab, int k, int seen, int changed, float penalty) {
    const int n = blockIdx.x;
    for (int i = threadIdx.x; i < seen; i += THREADS) {
        float& x = logits[positions[i]];
        if (positions[i] / vocab == n) x = x < 0 ? x * penalty : x / penalty;
    }
    __syncthreads();
    for (int i = seen + threadIdx.x; i < changed; i += THREADS)
        if (positions[i] / vocab == n) logits[positions[i]] = LOW;
    __syncthreads();
    const float* x = logits + (int64_t)n * vocab;
    Pick last = {-2 * LOW, -1};
    float log_sum = 0;
    for (int found = 0; found < k; found++) {
        last = next_pick(x, vocab, last);
        if (found == 0) {
            float sum = 0;
            for (int v = threadIdx.x; v < vocab; v += THREADS) sum += expf(x[v] - last.value);
            log_sum = logf(sum_of(sum)) + last.value;
        }
        const float value = last.value == LOW ? LOW : last.value - log_sum;
        if (threadIdx.x == 0)
            insert(values + (int64_t)n * k, tokens + (int64_t)n * k, found, last.token, value);
    }
}
