// Vectors of 8 numbers; softmax, and sums over the depth of a head in vectors. Without these, the
// compiler vectorises across heads or positions, whose numbers are not adjacent in memory.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float Eight __attribute__((vector_size(32)));
typedef int Places __attribute__((vector_size(32)));
static inline Eight eight(const float* p) {
    Eight v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline float inner(const float* a, const float* b, int D) {
    Eight sums = {};
    int d = 0;
    for (; d + 8 <= D; d += 8) sums += eight(a + d) * eight(b + d);
    sums += __builtin_shuffle(sums, Places{4, 5, 6, 7, 4, 5, 6, 7});
    sums += __builtin_shuffle(sums, Places{2, 3, 2, 3, 2, 3, 2, 3});
    float sum = sums[0] + sums[1];
    for (; d < D; d++) sum += a[d] * b[d];
    return sum;
}

typedef std::array<const float*, 4> Quartet;

// scores[i] = scale * inner product of a (D) and b[i] + at (D); a is read once for all four.
static inline void inner_four(
        float* scores, const float* a, const Quartet& b, int at, int D, float scale) {
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

// to (D) += sum over i of weights[i * stride] * rows (count, D)[i], 64 columns at a time in
// registers.
template <int D>
static inline void add_rows(
        float* to, const float* weights, int stride, const float* rows, int count) {
    constexpr int WIDTH = D % 64 == 0 ? 64 : 8;
    for (int d = 0; d + 8 <= D; d += WIDTH) {
        Eight sums[WIDTH / 8];
        for (int c = 0; c < WIDTH / 8; c++) sums[c] = eight(to + d + 8 * c);
        for (int i = 0; i < count; i++)
            for (int c = 0; c < WIDTH / 8; c++)
                sums[c] += weights[(int64_t)i * stride] * eight(rows + (int64_t)i * D + d + 8 * c);
        std::memcpy(to + d, sums, sizeof sums);
    }
    for (int d = D / 8 * 8; d < D; d++)
        for (int i = 0; i < count; i++)
            to[d] += weights[(int64_t)i * stride] * rows[(int64_t)i * D + d];
}

// products[i] = scale * inner product of a (D) and rows (count, D)[i].
template <int D>
static inline void inner_rows(
        float* products, const float* a, const float* rows, int count, float scale) {
    int i = 0;
    for (; i + 4 <= count; i += 4, rows += 4 * D)
        inner_four(products + i, a, {rows, rows + D, rows + 2 * D, rows + 3 * D}, 0, D, scale);
    for (; i < count; i++, rows += D) products[i] = inner(a, rows, D) * scale;
}

// Softmax of n numbers in place; returns the log of the sum of exp(w).
static inline float softmax(float* w, int n) {
    float high = -1e30f, sum = 0;
    for (int j = 0; j < n; j++) high = std::max(high, w[j]);
    for (int j = 0; j < n; j++) sum += w[j] = std::exp(w[j] - high);
    for (int j = 0; j < n; j++) w[j] /= sum;
    return high + std::log(sum);
}
