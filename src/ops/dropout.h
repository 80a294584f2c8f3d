// Dropout. y, x: (count).

#include "hash.h"

static void dropout(float* y, const float* x, int64_t count, uint32_t seed, float p) {
    #pragma omp parallel for
    for (int64_t i = 0; i < count; i++) y[i] = x[i] * keep_scale(i, seed, p);
}
