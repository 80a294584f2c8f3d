// The k largest log-probabilities of each row, in the order of their tokens. values, tokens:
// (rows, k); logits: (rows, vocab), changed in place; positions: (changed), row * vocab + token of
// the `seen` logits to penalise, then of those to exclude.

#include "block.cuh"

const float LOW = -1e30f;  // the logit of an excluded token; fast math does not allow infinity

// One thread changes one logit.
__global__ static void penalise_kernel(float* logits, const int* positions, int count,
                                       float penalty) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    const float x = logits[positions[i]];
    logits[positions[i]] = x < 0 ? x * penalty : x / penalty;
}

// One thread changes one logit.
__global__ static void exclude_kernel(float* logits, const int* positions, int count) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < count) logits[positions[i]] = LOW;
}

struct Pick {
    float value;
    int token;
};
__device__ static bool precedes(Pick a, Pick b) {
    return a.value > b.value || (a.value == b.value && a.token < b.token);
}
struct First {
    __device__ Pick operator()(Pick a, Pick b) const { return precedes(a, b) ? a : b; }
};

// The largest number of x (vocab) that comes after `last`; all threads return it.
__device__ static Pick next_pick(const float* x, int vocab, Pick last) {
    Pick best = {2 * LOW, vocab};
    for (int v = threadIdx.x; v < vocab; v += THREADS) {
        const Pick pick = {x[v], v};
        if (precedes(last, pick) && precedes(pick, best)) best = pick;
    }
    return reduce(best, First());
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

// One block computes one row and reads it k + 1 times, once for each pick and once for the sum.
__global__ static void top_log_probs_kernel(float* values, int* tokens, const float* logits,
                                            int vocab, int k) {
    const float* x = logits + (int64_t)blockIdx.x * vocab;
    values += (int64_t)blockIdx.x * k;
    tokens += (int64_t)blockIdx.x * k;
    Pick last = {-2 * LOW, -1};
    float log_sum = 0;
    for (int found = 0; found < k; found++) {
        last = next_pick(x, vocab, last);
        if (found == 0) {
            float sum = 0;
            for (int v = threadIdx.x; v < vocab; v += THREADS) sum += expf(x[v] - last.value);
            log_sum = logf(sum_of(sum)) + last.value;
        }
        if (threadIdx.x == 0)
            insert(values, tokens, found, last.token,
                   last.value == LOW ? LOW : last.value - log_sum);
    }
}

static void top_log_probs(float* values, int* tokens, float* logits, const int* positions, int rows,
                          int vocab, int k, int seen, int changed, float penalty) {
    if (seen > 0) penalise_kernel<<<blocks_for(seen), THREADS>>>(logits, positions, seen, penalty);
    const int rest = changed - seen;
    if (rest > 0) exclude_kernel<<<blocks_for(rest), THREADS>>>(logits, positions + seen, rest);
    top_log_probs_kernel<<<rows, THREADS>>>(values, tokens, logits, vocab, k);
}
