// The k largest log-probabilities of each row, in the order of their tokens. values, tokens:
// (rows, k); logits: (rows, vocab), changed in place; positions: (changed), row * vocab + token of
// the `seen` logits to penalise, then of those to exclude.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

const float LOW = -1e30f;  // the logit of an excluded token; -Ofast does not allow infinity
typedef std::pair<float, int> Pick;  // a logit, its token

// Inserts a pick into the best ones, largest first, and drops what is beyond the k-th.
static void insert(std::vector<Pick>& best, Pick pick, int k) {
    auto place = best.end();
    while (place != best.begin() && place[-1].first < pick.first) --place;
    best.insert(place, pick);
    if ((int)best.size() > k) best.pop_back();
}

// The k largest logits x (vocab) of a row, largest first, and the log of the sum of exp(x). One
// pass over memory: logits come by pieces, and the sum is scaled when a larger logit comes.
static std::vector<Pick> largest(const float* x, int vocab, int k, float& log_sum) {
    std::vector<Pick> best;
    float high = LOW, sum = 0, least = -2e30f;
    for (int begin = 0; begin < vocab; begin += 256) {
        const int end = std::min(begin + 256, vocab);
        float highest = LOW;
        for (int v = begin; v < end; v++) highest = std::max(highest, x[v]);
        if (highest > high) {
            sum *= std::exp(high - highest);
            high = highest;
        }
        for (int v = begin; v < end; v++) sum += std::exp(x[v] - high);
        if (highest <= least) continue;
        for (int v = begin; v < end; v++) {
            if (x[v] <= least) continue;
            insert(best, {x[v], v}, k);
            if ((int)best.size() == k) least = best.back().first;
        }
    }
    log_sum = std::log(sum) + high;
    return best;
}

static void top_log_probs(float* values, int* tokens, float* logits, const int* positions, int rows,
        int vocab, int k, int seen, int changed, float penalty) {
    for (int i = 0; i < seen; i++) {
        float& x = logits[positions[i]];
        x = x < 0 ? x * penalty : x / penalty;
    }
    for (int i = seen; i < changed; i++) logits[positions[i]] = LOW;
    #pragma omp parallel for
    for (int n = 0; n < rows; n++) {
        float log_sum;
        std::vector<Pick> best = largest(logits + (int64_t)n * vocab, vocab, k, log_sum);
        std::sort(best.begin(), best.end(), [](Pick a, Pick b) { return a.second < b.second; });
        for (int i = 0; i < k; i++) {
            values[n * k + i] = best[i].first == LOW ? LOW : best[i].first - log_sum;
            tokens[n * k + i] = best[i].second;
        }
    }
}
