// Dropout. y, x: (count). On a GPU, one thread computes one number.

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

KERNEL void dropout(float* y, const float* x, int64_t count, uint32_t seed, float p) {
    FOR_EACH (i, count) y[i] = x[i] * keep_scale(i, seed, p);
}
