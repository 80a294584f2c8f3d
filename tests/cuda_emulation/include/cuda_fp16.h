// float16 exists only so that Jittor's headers compile: no model of ours uses it.

#pragma once
#include <cstdlib>
#include "emulation_bits.h"

struct __half_raw {
    uint16_t x;
};
struct __half {
    uint16_t bits;
    __half() = default;
    __half(const __half_raw& raw) : bits(raw.x) {}
    __half(float) { std::abort(); }
    operator float() const { std::abort(); }
    operator __half_raw() const { return {bits}; }
};
typedef __half half;
static inline float __half2float(__half x) { return x; }
static inline __half __float2half(float x) { return x; }
static inline int __hisinf(__half) { std::abort(); }
static inline __half __hmax(__half a, __half b) { return a < b ? b : a; }
static inline __half __hmin(__half a, __half b) { return b < a ? b : a; }
static inline uint16_t __half_as_ushort(__half x) { return x.bits; }
static inline __half __ushort_as_half(uint16_t bits) { return emulation_bits<__half>(bits); }
