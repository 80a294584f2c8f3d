// Tiles of matrix products: a few rows of A times some columns of B, with the sums in registers.
//
// A and B consist of words of 32 bits. A word holds GROUP numbers of the dimension K that is summed
// over: one float, two bfloat16s, two 16-bit integers or four bytes. So all kinds of numbers have
// the same loops, and differ in how a word of A times a vector of words of B is added to the sums.

#include <cstdint>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "vectors.h"

namespace gemm {

#ifdef __AVX512F__
const int W = 16, MR = 12;  // numbers in a vector register, rows of a tile
#else
const int W = 8, MR = 6;
#endif
const int NR = 2 * W;  // columns of a tile
typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t IntVec __attribute__((vector_size(W * 4)));

template <class V> static inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V> static inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }

struct Float32 {
    typedef float Word;
    typedef Vec Words, Sums;
    static const int GROUP = 1;
    static inline Sums add(Sums sums, Word a, Words b) { return sums + a * b; }
};

// Pairs of integers of 16 bits; exact.
struct Int16 {
    typedef int32_t Word;
    typedef IntVec Words, Sums;
    static const int GROUP = 2;
    static inline Sums add(Sums sums, Word a, Words b) {
#if defined(__AVX512BW__)
        return sums + (IntVec)_mm512_madd_epi16(_mm512_set1_epi32(a), (__m512i)b);
#elif defined(__AVX2__)
        return sums + (IntVec)_mm256_madd_epi16(_mm256_set1_epi32(a), (__m256i)b);
#else
        return sums + (int16_t)a * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
    }
};

// Four bytes, those of A from 0 to 255, those of B from -128 to 127; exact.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct Int8 {
    typedef int32_t Word;
    typedef IntVec Words, Sums;
    static const int GROUP = 4;
    static inline Sums add(Sums sums, Word a, Words b) {
#ifdef __AVX512VNNI__
        return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(a), (__m512i)b);
#else
        return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sums, _mm256_set1_epi32(a), (__m256i)b);
#endif
    }
};
#else
typedef Int16 Int8;  // the bytes are widened first
#endif

// Pairs of bfloat16s, added up in float32.
#ifdef __AVX512BF16__
struct BFloat16 {
    typedef int32_t Word;
    typedef IntVec Words;
    typedef Vec Sums;
    static const int GROUP = 2;
    static inline Sums add(Sums sums, Word a, Words b) {
        return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    }
};
#else
typedef Float32 BFloat16;  // the numbers are widened first
#endif

// float32 in tile registers: a number is the sum of three bfloat16s, its terms, and a pair of
// numbers is three words. Of the nine products of terms, the three smallest are left out, since
// they are less than float32's rounding.
struct Terms {
    typedef int32_t Word;
    static const int GROUP = 2, COUNT = 3;
};

// Rows of words in `panels` panels of `width` words: row r has its word k at start[place(r, k)].
template <class Word> struct Rows {
    const Word* start;
    int64_t ld;
    int width, panels;
    int64_t jump;
    int64_t place(int r, int k) const { return k / width * jump + r * ld + k % width; }
    int words() const { return width * panels; }
    // The rows from r on, of each the `count` words from word k on.
    Rows from(int r, int k, int count) const {
        const int part = std::min(width, count);
        return {start + place(r, k), ld, part, count / part, jump};
    }
    Rows from(int r) const { return from(r, 0, words()); }
};

// c (R, H W) += a (R, K) b (K, H W) in words, or c = a b if `fresh`; rows of b and c are NR and ldc
// apart. Prefetches from `ahead` on, `pace` words in each step.
template <class T, int R, int H>
static void tile(Rows<typename T::Word> a, const typename T::Word* b, float* c, int64_t ldc,
        bool fresh, const float* ahead, int pace) {
    typedef typename T::Sums Sums;
    typedef typename T::Words Words;
    Sums sums[R][H];
    for (int r = 0; r < R; r++)
        for (int h = 0; h < H; h++) sums[r][h] = Sums{};
    for (int panel = 0; panel < a.panels; panel++, a.start += a.jump)
        for (int k = 0; k < a.width; k++, b += NR, ahead += pace) {
            Words words[H];
            for (int h = 0; h < H; h++) words[h] = load<Words>(b + h * W);
            __builtin_prefetch(ahead);
            #pragma GCC unroll 12
            for (int r = 0; r < R; r++)
                for (int h = 0; h < H; h++)
                    sums[r][h] = T::add(sums[r][h], a.start[r * a.ld + k], words[h]);
        }
    for (int r = 0; r < R; r++)
        for (int h = 0; h < H; h++) {
            float* to = c + r * ldc + h * W;
            store(to, fresh ? sums[r][h] : load<Sums>(to) + sums[r][h]);
        }
}

// tile<T, rows, H>(arguments ...), where rows is from 1 to R.
template <class T, int R, int H, class... Arguments>
static void tile_of(int rows, Arguments... arguments) {
    if (rows == R) return tile<T, R, H>(arguments...);
    tile_of<T, (R > 1 ? R - 1 : R), H>(rows, arguments...);
}

// Intel's tile registers ("AMX") hold 16 rows of 16 words. At most seven of the eight are in use:
// where another thread runs on the same core, the processor has few more for renaming, and products
// take longer the more of them are in use. 0 to 3 are sums, 4 and 5 rows of a, 6 columns of b.
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
struct TileRegisters {
    static const bool COMPILED = true;
    struct alignas(64) Configuration {
        uint8_t palette = 1, reserved[15] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    // Linux gives them to a process that asks for them, with arch_prctl(ARCH_REQ_XCOMP_PERM).
    static bool usable() {
        static const bool given = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
        return given;
    }
    static void begin() {
        Configuration configuration;
        __asm__ volatile("" : : "r"(&configuration) : "memory");  // or GCC leaves its stores out
        _tile_loadconfig(&configuration);
    }
    static void end() { _tile_release(); }
    // 32 rows times the left or right columns of b, or 16 rows times both, the right ones in 5.
    static void add_left(BFloat16) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
    }
    static void add_right(BFloat16) {
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
    }
    static void add_both(BFloat16) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 5);
    }
    static void add_left(Int8) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(2, 5, 6);
    }
    static void add_right(Int8) {
        _tile_dpbusd(1, 4, 6);
        _tile_dpbusd(3, 5, 6);
    }
    static void add_both(Int8) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 5);
    }
    static void add_left(Float32) {}
    static void add_right(Float32) {}
    static void add_both(Float32) {}

    // c (rows, NR) += a (rows, K) b (K, NR), of which each 32 numbers of K are three panels of a
    // and three times 16 rows of b, one for each term; rows is at most 16. The sums begin with 0,
    // which rounds less. 0 and 1 are sums, 4 to 6 the terms of a, 7 one of b.
    static void tile_of_terms(int rows, Rows<int32_t> a, const int32_t* b, float* c, int64_t ldc,
            bool half, bool fresh, const float* ahead, int pace, int64_t stride) {
        alignas(64) float sums[16 * NR];
        __asm__ volatile("" : : : "memory");  // GCC does not know what tiles read
        _tile_zero(0);
        _tile_zero(1);
        for (int panel = 0; panel < a.panels; panel += 3, a.start += 3 * a.jump, ahead += stride) {
            _tile_loadd(4, a.start, 64);
            _tile_loadd(5, a.start + a.jump, 64);
            _tile_loadd(6, a.start + 2 * a.jump, 64);
            for (int i = 0; i < pace; i++) __builtin_prefetch(ahead + i * 16, 0, 2);
            _tile_loadd(7, b, NR * 4);
            _tile_dpbf16ps(0, 4, 7);
            _tile_dpbf16ps(0, 5, 7);
            _tile_dpbf16ps(0, 6, 7);
            _tile_loadd(7, b + 16 * NR, NR * 4);
            _tile_dpbf16ps(0, 4, 7);
            _tile_dpbf16ps(0, 5, 7);
            _tile_loadd(7, b + 32 * NR, NR * 4);
            _tile_dpbf16ps(0, 4, 7);
            if (!half) {
                _tile_loadd(7, b + W, NR * 4);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(1, 5, 7);
                _tile_dpbf16ps(1, 6, 7);
                _tile_loadd(7, b + 16 * NR + W, NR * 4);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(1, 5, 7);
                _tile_loadd(7, b + 32 * NR + W, NR * 4);
                _tile_dpbf16ps(1, 4, 7);
            }
            b += 48 * NR;
        }
        _tile_stored(0, sums, NR * 4);
        _tile_stored(1, sums + W, NR * 4);
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < (half ? W : NR); w += W) {
                const Vec sum = load<Vec>(sums + r * NR + w);
                float* to = c + r * ldc + w;
                store(to, fresh ? sum : load<Vec>(to) + sum);
            }
    }

    // c (rows, NR) += a (rows, K) b (K, NR) in words, as tile() does; if `half`, only the first W
    // columns of c. rows is at most 16 or, if BOTH, 32, but as many of a as fill tiles are read;
    // a.width is a multiple of 16. Prefetches `pace` lines from `ahead` on in each step of 16
    // words, whose places are `stride` words apart, and the lines of a fresh c before they are
    // written.
    template <class T, bool BOTH>
    static void tile(int rows, Rows<typename T::Word> a, const typename T::Word* b, float* c,
            int64_t ldc, bool half, bool fresh, const float* ahead, int pace, int64_t stride) {
        alignas(64) float part[32 * NR];
        const bool whole = rows == 32;
        const int lines = fresh && whole ? (32 * 16 + a.words() - 1) / a.words() : 0;  // in a step
        float* to = whole ? c : part;
        const int64_t ld = whole ? ldc : NR;
        if (!fresh && !whole)
            for (int r = 0; r < rows; r++) std::memcpy(part + r * NR, c + r * ldc, NR * 4);
        __asm__ volatile("" : : : "memory");  // GCC does not know what tiles read
        if (fresh) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, to, ld * 4);
            _tile_loadd(1, to + W, ld * 4);
            _tile_loadd(2, to + 16 * ld, ld * 4);
            _tile_loadd(3, to + 16 * ld + W, ld * 4);
        }
        int line = 0;
        for (int panel = 0; panel < a.panels; panel++, a.start += a.jump)
            for (int k = 0; k < a.width; k += 16, b += 16 * NR, ahead += stride) {
                _tile_loadd(6, b, NR * 4);
                if (BOTH) {
                    _tile_loadd(4, a.start + k, a.ld * 4);
                    _tile_loadd(5, a.start + 16 * a.ld + k, a.ld * 4);
                    add_left(T());
                    if (!half) {
                        _tile_loadd(6, b + W, NR * 4);
                        add_right(T());
                    }
                } else {
                    _tile_loadd(5, b + W, NR * 4);
                    _tile_loadd(4, a.start + k, a.ld * 4);
                    add_both(T());
                }
                for (int i = 0; i < pace; i++) __builtin_prefetch(ahead + i * 16, 0, 2);
                for (int i = 0; BOTH && i < lines && line < 32; i++, line++) {
                    __builtin_prefetch(c + line * ldc, 1);
                    __builtin_prefetch(c + line * ldc + W, 1);
                }
            }
        _tile_stored(0, to, ld * 4);
        if (!half) _tile_stored(1, to + W, ld * 4);
        if (BOTH) _tile_stored(2, to + 16 * ld, ld * 4);
        if (BOTH && !half) _tile_stored(3, to + 16 * ld + W, ld * 4);
        if (!whole)
            for (int r = 0; r < rows; r++)
                std::memcpy(c + r * ldc, part + r * NR, (half ? W : NR) * 4);
    }
};
#else
struct TileRegisters {
    static const bool COMPILED = false;
    static bool usable() { return false; }
    static void begin() {}
    static void end() {}
    template <class T, bool BOTH>
    static void tile(int, Rows<typename T::Word>, const typename T::Word*, float*, int64_t, bool,
            bool, const float*, int, int64_t) {}
    static void tile_of_terms(int, Rows<int32_t>, const int32_t*, float*, int64_t, bool, bool,
            const float*, int, int64_t) {}
};
#endif

}  // namespace gemm
