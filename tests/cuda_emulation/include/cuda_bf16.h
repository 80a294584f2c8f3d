#pragma once
#include "cuda_fp16.h"

// bfloat16: the first half of a float32, rounded to nearest, to even between two.
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        const uint32_t all = emulation_bits<uint32_t>(x);
        bits = (all + 0x7fff + (all >> 16 & 1)) >> 16;
    }
    operator float() const { return emulation_bits<float>((uint32_t)bits << 16); }
};
static inline __nv_bfloat16 __hmax(__nv_bfloat16 a, __nv_bfloat16 b) { return a < b ? b : a; }
static inline __nv_bfloat16 __hmin(__nv_bfloat16 a, __nv_bfloat16 b) { return b < a ? b : a; }
static inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) {
    return emulation_bits<__nv_bfloat16>(bits);
}
