// Dropout. y, x: (rows, columns); starts, seeds: (parts), the first row of each part and the seed
// of its mask; starts[0] is 0. On a GPU, one block computes one row.

#include "device.h"

// The mask of dropout at position i: 0 with probability p, else 1 / (1 - p). It is a hash of i and
// seed (Wellons' "lowbias32", 2018), so that it is the same on every device.
DEVICE float keep_scale(uint32_t i, uint32_t seed, float p) {
    uint32_t h = i * 0x9E3779B9u ^ seed;
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    h ^= h >> 16;
    return (h >> 8) * (1.f / 16777216.f) < p ? 0.f : 1.f / (1.f - p);
}

KERNEL void dropout(float* y, const float* x, const int* starts, const int* seeds, int rows,
        int columns, int parts, float p) {
    FOR_ROWS (n, rows) {
        int part = 0;
        while (part + 1 < parts && starts[part + 1] <= n) part++;
        const uint32_t first = (uint32_t)(n - starts[part]) * columns, seed = seeds[part];
        const int64_t at = (int64_t)n * columns;
        FOR_COLUMNS (c, columns) y[at + c] = x[at + c] * keep_scale(first + c, seed, p);
    }
}
