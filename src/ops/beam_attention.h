// Attention of one new token per row. Row r attends to the tokens spans[r, 0] to spans[r, 1] - 1 of
// its query, then to its ancestors and to itself.
// y: (rows, heads, D); store: (capacity, widest, 2, heads, D), keys and values of generated tokens,
// changed in place; qkv: (rows, 3, heads, D) of the new tokens; prefix: (P, 3, heads, D) of the
// queries' tokens; spans: (rows, 2); ancestors: (steps, rows), for each step a row of the store,
// which in the last step is the row itself.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

typedef std::array<const float*, 4> Quartet;

// scores[i] = scale * inner product of a (D) and b[i] + at (D); a is read once for all four.
static inline void inner_four(float* scores, const float* a, const Quartet& b, int at, int D,
                              float scale) {
    Eight sums[4] = {};
    int d = 0;
    for (; d + 8 <= D; d += 8) {
        const Eight x = eight(a + d);
        for (int i = 0; i < 4; i++) sums[i] += x * eight(b[i] + at + d);
    }
    Eight pairs[2];  // sums of two neighbours, of sums[0] and sums[1] in turn
    for (int i = 0; i < 2; i++) {
        const Eight even = sums[2 * i], odd = sums[2 * i + 1];
        pairs[i] = __builtin_shuffle(even, odd, Places{0, 8, 2, 10, 4, 12, 6, 14}) +
                   __builtin_shuffle(even, odd, Places{1, 9, 3, 11, 5, 13, 7, 15});
    }
    Eight all = __builtin_shuffle(pairs[0], pairs[1], Places{0, 1, 8, 9, 4, 5, 12, 13}) +
                __builtin_shuffle(pairs[0], pairs[1], Places{2, 3, 10, 11, 6, 7, 14, 15});
    all += __builtin_shuffle(all, Places{4, 5, 6, 7, 4, 5, 6, 7});
    for (int i = 0; i < 4; i++) {
        float sum = all[i];
        for (int rest = d; rest < D; rest++) sum += a[rest] * b[i][at + rest];
        scores[i] = sum * scale;
    }
}

// y (D) += sum over i of weights[i] * (from[i] + at) (D); y is written once for all four.
static inline void add_four(float* y, const float* weights, const Quartet& from, int at, int D) {
    int d = 0;
    for (; d + 8 <= D; d += 8) {
        Eight sum = eight(y + d);
        for (int i = 0; i < 4; i++) sum += weights[i] * eight(from[i] + at + d);
        std::memcpy(y + d, &sum, sizeof sum);
    }
    for (; d < D; d++)
        for (int i = 0; i < 4; i++) y[d] += weights[i] * from[i][at + d];
}

// The first row of each block, then rows. A block is at most 4 neighbouring rows of one query: its
// keys and values are read from memory once for all of them.
static std::vector<int> blocks_of(const int* spans, int rows) {
    std::vector<int> blocks;
    for (int row = 0; row < rows; row++)
        if (blocks.empty() || row - blocks.back() == 4 ||
            spans[2 * row] != spans[2 * blocks.back()])
            blocks.push_back(row);
    blocks.push_back(rows);
    return blocks;
}

// The rows from to to - 1, and where their keys are. Keys and values are taken four at a time; to
// make their number a multiple of 4, the last one is repeated, with a weight of 0.
template <int D>
struct Block {
    const float *prefix, *store;  // the first of the query's tokens, the store
    const int* ancestors;
    int rows, heads, widest, from, to;
    int seen, keys, padded;  // number of the query's tokens; of all keys; the latter rounded up

    // The keys (heads, D) first to first + 3 of a row; the value of each is heads * D further.
    Quartet quartet(int row, int first) const {
        const int C = heads * D;
        Quartet found;
        for (int i = 0; i < 4; i++) {
            const int j = std::min(first + i, keys - 1), step = j - seen;
            if (step < 0)
                found[i] = prefix + ((int64_t)j * 3 + 1) * C;
            else
                found[i] = store +
                           ((int64_t)step * widest + ancestors[(int64_t)step * rows + row]) * 2 * C;
        }
        return found;
    }
    // The place of a row's key j in weights (to - from, heads, padded).
    int64_t place(int row, int j) const { return (int64_t)(row - from) * heads * padded + j; }
};

template <int D>
static void compute_scores(float* weights, const float* qkv, const Block<D>& block) {
    const float scale = 1 / std::sqrt((float)D);
    for (int j = 0; j < block.keys; j += 4)
        for (int row = block.from; row < block.to; row++) {
            const Quartet keys = block.quartet(row, j);
            const float* q = qkv + (int64_t)row * 3 * block.heads * D;
            float* scores = weights + block.place(row, j);
            for (int h = 0; h < block.heads; h++)
                inner_four(scores + h * block.padded, q + h * D, keys, h * D, D, scale);
        }
}

// Softmax of the first n of `padded` numbers; the others become 0.
static void softmax(float* w, int n, int padded) {
    float high = -1e30f, sum = 0;
    for (int j = 0; j < n; j++) high = std::max(high, w[j]);
    for (int j = 0; j < n; j++) sum += w[j] = std::exp(w[j] - high);
    for (int j = 0; j < n; j++) w[j] /= sum;
    std::fill(w + n, w + padded, 0.f);
}

template <int D>
static void sum_values(float* y, const float* weights, const Block<D>& block) {
    const int C = block.heads * D;
    std::fill_n(y + (int64_t)block.from * C, (int64_t)(block.to - block.from) * C, 0.f);
    for (int j = 0; j < block.keys; j += 4)
        for (int row = block.from; row < block.to; row++) {
            const Quartet keys = block.quartet(row, j);
            const float* w = weights + block.place(row, j);
            for (int h = 0; h < block.heads; h++)
                add_four(y + (int64_t)row * C + h * D, w + h * block.padded, keys, C + h * D, D);
        }
}

template <int D>
static void beam_attention(float* y, float* store, const float* qkv, const float* prefix,
                           const int* spans, const int* ancestors, int rows, int heads, int widest,
                           int steps) {
    const int C = heads * D;
    float* newest = store + (int64_t)(steps - 1) * widest * 2 * C;
    const std::vector<int> blocks = blocks_of(spans, rows);
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < (int)blocks.size() - 1; i++) {
        const int from = blocks[i], to = blocks[i + 1];
        const int begin = spans[2 * from], seen = spans[2 * from + 1] - begin, keys = seen + steps;
        const int padded = (keys + 3) / 4 * 4;
        const Block<D> block = {prefix + (int64_t)begin * 3 * C,
                                store,
                                ancestors,
                                rows,
                                heads,
                                widest,
                                from,
                                to,
                                seen,
                                keys,
                                padded};
        std::vector<float> weights((int64_t)(to - from) * heads * padded);
        // In this step no other block reads these rows of the store.
        for (int row = from; row < to; row++)
            std::copy_n(qkv + ((int64_t)row * 3 + 1) * C, 2 * C, newest + (int64_t)row * 2 * C);
        compute_scores(weights.data(), qkv, block);
        for (int64_t head = 0; head < (int64_t)(to - from) * heads; head++)
            softmax(&weights[head * padded], keys, padded);
        sum_values(y, weights.data(), block);
    }
}
