// Attention of one new token per row. Row r attends to the tokens spans[r, 0] to spans[r, 1] - 1 of
// its query, then to its ancestors and to itself.
// y: (rows, heads, D); store: (capacity, widest, 2, heads, D), keys and values of generated tokens,
// changed in place; qkv: (rows, 3, heads, D) of the new tokens; prefix: (P, 3, heads, D) of the
// queries' tokens; spans: (rows, 2); ancestors: (steps, rows), for each step a row of the store,
// which in the last step is the row itself.

#include <cstdint>
#include <vector>

#include "vectors.h"

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
    std::vector<int> blocks = {0};
    for (int row = 1; row < rows; row++)
        if (row - blocks.back() == 4 || spans[2 * row] != spans[2 * blocks.back()])
            blocks.push_back(row);
    blocks.push_back(rows);
    return blocks;
}

template <int D>
static void beam_attention(float* y, float* store, const float* qkv, const float* prefix,
        const int* spans, const int* ancestors, int rows, int heads, int widest, int steps) {
    const int C = heads * D;
    const float scale = 1 / std::sqrt((float)D);
    const std::vector<int> blocks = blocks_of(spans, rows);
    #pragma omp parallel for schedule(dynamic)
    for (int block = 0; block < (int)blocks.size() - 1; block++) {
        const int from = blocks[block], to = blocks[block + 1], begin = spans[2 * from];
        const int seen = spans[2 * from + 1] - begin, keys = seen + steps;
        const int padded = (keys + 3) / 4 * 4;
        std::vector<float> numbers((int64_t)(to - from) * heads * padded);
        float* const weights = numbers.data();  // (rows, heads, padded)
        // [=], because numbers captured by reference are read again after each write to memory.
        const auto stored = [=](int step, int row) {
            return store + ((int64_t)step * widest + row) * 2 * C;
        };
        // Keys (heads, D) are taken four at a time; to make their number a multiple of 4, the last
        // one is repeated, with a weight of 0. The value of each is C numbers further.
        const auto for_each_four = [=](auto use) {
            for (int j = 0; j < keys; j += 4)
                for (int row = from; row < to; row++) {
                    Quartet four;
                    for (int i = 0; i < 4; i++) {
                        const int key = std::min(j + i, keys - 1), step = key - seen;
                        four[i] = step < 0 ? prefix + ((int64_t)(begin + key) * 3 + 1) * C
                                           : stored(step, ancestors[(int64_t)step * rows + row]);
                    }
                    float* w = weights + (int64_t)(row - from) * heads * padded + j;
                    for (int h = 0; h < heads; h++) use(row, h, w + h * padded, four);
                }
        };
        // In this step no other block reads these rows of the store.
        for (int row = from; row < to; row++)
            std::copy_n(qkv + ((int64_t)row * 3 + 1) * C, 2 * C, stored(steps - 1, row));
        for_each_four([=](int row, int h, float* scores, const Quartet& four) {
            inner_four(scores, qkv + (int64_t)row * 3 * C + h * D, four, h * D, D, scale);
        });
        for (float* w = weights; w < weights + numbers.size(); w += padded) {
            softmax(w, keys);
            std::fill(w + keys, w + padded, 0.f);
        }
        std::fill(y + (int64_t)from * C, y + (int64_t)to * C, 0.f);
        for_each_four([=](int row, int h, const float* w, const Quartet& four) {
            add_four(y + (int64_t)row * C + h * D, w, four, C + h * D, D);
        });
    }
}
