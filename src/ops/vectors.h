// Vectors of 8 numbers; softmax, and sums over the depth of a head in vectors. Without these, the
// compiler vectorises across heads or positions, whose numbers are not adjacent in memory.

#include <algorithm>
#include <cmath>
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

static inline void add_scaled(float* to, float weight, const float* from, int D) {
    int d = 0;
    for (; d + 8 <= D; d += 8) {
        Eight sum = eight(to + d) + weight * eight(from + d);
        std::memcpy(to + d, &sum, sizeof sum);
    }
    for (; d < D; d++) to[d] += weight * from[d];
}

// Softmax of n numbers in place; returns the log of the sum of exp(w).
static inline float softmax(float* w, int n) {
    float high = -1e30f, sum = 0;
    for (int j = 0; j < n; j++) high = std::max(high, w[j]);
    for (int j = 0; j < n; j++) sum += w[j] = std::exp(w[j] - high);
    for (int j = 0; j < n; j++) w[j] /= sum;
    return high + std::log(sum);
}
