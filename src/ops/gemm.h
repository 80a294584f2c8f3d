// Matrix products for few rows and large weights, on all cores.
//
//     C (M, N) = A (M, K) B,   then finish(m, n, count, row) on every finished piece of C
//
// GotoBLAS' method (Goto and van de Geijn, 2008) without the packing of A, which has only tens of
// rows. B's columns are divided into panels of NR, and each thread takes a few panels at a time. It
// packs KC x NR words of B (16 KB, half of a first-level cache), and multiplies all rows of A by
// them in tiles of at most MR x NR numbers of C that stay in registers. Where B is packed already,
// a block may have more rows, which the processor fetches from the second-level cache. Sums of more
// than KC or PACKED_KC products are added up from those of blocks, which rounds less.
//
// The same packed B also gives C (M, K) = A (M, N) B^T: as C^T = B A^T, where B has the part that A
// had before, and A^T, which is small, that of B.

#include <type_traits>
#include <vector>
#include <omp.h>

#include "tiles.h"

namespace gemm {

const int KC = 4096 / NR, PACKED_KC = 256;
// Rows of A are divided into blocks that stay in a second-level cache of 512 KB: whole rows if they
// have at most DOWN words, else as many words at a time as a block of B has rows.
const int DOWN = 1024;

// How B lies in memory: (K, N) or its transpose (N, K) in float32, or as pack() left it, in panels
// (panels, words of K, NR). PACKED_IN_TERMS is PACKED, whose products are computed by tile
// registers if there are any: many rows in less time, but few rows in more.
enum Layout { ROWS, COLUMNS, PACKED, PACKED_IN_TERMS, PACKED_BFLOAT16, PACKED_INT8 };

// The arithmetic of a layout, and how many numbers of K a word of B holds in memory. Where the
// processor cannot multiply such words, each becomes two words of fewer numbers.
template <Layout layout> struct Form {
    typedef Float32 T;
    typedef float Stored;
    static const int GROUP = 1;
};
template <> struct Form<PACKED_IN_TERMS> {
    typedef std::conditional<TileRegisters::COMPILED, Terms, Float32>::type T;
    typedef float Stored;
    static const int GROUP = 1;
};
template <> struct Form<PACKED_BFLOAT16> {
    typedef BFloat16 T;
    typedef int32_t Stored;
    static const int GROUP = 2;
};
template <> struct Form<PACKED_INT8> {
    typedef Int8 T;
    typedef int32_t Stored;
    static const int GROUP = 4;
};

// Whether each number of a layout is multiplied as three terms.
template <Layout layout> constexpr bool in_terms() {
    return Form<layout>::T::GROUP > Form<layout>::GROUP;
}

// Whether the products of a layout are computed in tile registers.
template <Layout layout> static bool in_registers() {
    typedef typename Form<layout>::T T;
    return T::GROUP > 1 && (in_terms<layout>() || T::GROUP == Form<layout>::GROUP) &&
           TileRegisters::usable();
}

// How many words K numbers are: of bfloat16s and bytes as many as fill tile registers.
template <int GROUP> static int words_of(int K) {
    return GROUP == 1 ? K : (K + 16 * GROUP - 1) / (16 * GROUP) * 16;
}

// The first address from `place` on at which a line of the cache begins: vectors and tile registers
// are loaded faster if they do not lie across two lines.
template <class Word> static inline Word* line_from(Word* place) {
    return (Word*)(((uintptr_t)place + 63) / 64 * 64);
}

// Memory for `count` words, which stays for the next call; Jittor runs one operator at a time.
template <class Word> static Word* keep(std::vector<Word>& memory, int64_t count) {
    if ((int64_t)memory.size() < count + 16) memory.resize(count + 16);
    return line_from(memory.data());
}

static inline int32_t bfloat16_pair(float low, float high) {
    uint32_t l, h;  // rounded to the nearest, ties to even
    std::memcpy(&l, &low, 4);
    std::memcpy(&h, &high, 4);
    l += 0x7fff + (l >> 16 & 1);
    h += 0x7fff + (h >> 16 & 1);
    return l >> 16 | (h & 0xffff0000);
}

// Reads eight rows of eight numbers, ld apart, and writes their transpose, with rows ld_to apart.
static inline void transpose8(const float* from, int64_t ld, float* to, int64_t ld_to) {
    Eight r[8], s[8];
    for (int i = 0; i < 8; i++) r[i] = eight(from + i * ld);
    for (int i = 0; i < 8; i += 2) {
        s[i] = __builtin_shuffle(r[i], r[i + 1], Places{0, 8, 2, 10, 4, 12, 6, 14});
        s[i + 1] = __builtin_shuffle(r[i], r[i + 1], Places{1, 9, 3, 11, 5, 13, 7, 15});
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            const Eight x = s[i + j], y = s[i + j + 2];
            r[i + j] = __builtin_shuffle(x, y, Places{0, 1, 8, 9, 4, 5, 12, 13});
            r[i + j + 2] = __builtin_shuffle(x, y, Places{2, 3, 10, 11, 6, 7, 14, 15});
        }
    for (int i = 0; i < 4; i++) {
        Eight low = __builtin_shuffle(r[i], r[i + 4], Places{0, 1, 2, 3, 8, 9, 10, 11});
        Eight high = __builtin_shuffle(r[i], r[i + 4], Places{4, 5, 6, 7, 12, 13, 14, 15});
        std::memcpy(to + i * ld_to, &low, 32);
        std::memcpy(to + (i + 4) * ld_to, &high, 32);
    }
}

// The transpose of (rows, columns), at most NR columns; rows of `to` are ld_to apart.
static inline void transpose(
        const float* from, int64_t ld, int rows, int columns, float* to, int64_t ld_to) {
    for (int i = 0; i < rows; i += 8)
        for (int j = 0; j < columns; j += 8) {
            if (i + 8 <= rows && j + 8 <= columns) {
                transpose8(from + i * ld + j, ld, to + j * ld_to + i, ld_to);
                continue;
            }
            for (int r = i; r < std::min(rows, i + 8); r++)
                for (int c = j; c < std::min(columns, j + 8); c++)
                    to[c * ld_to + r] = from[r * ld + c];
        }
}

// B's rows k to k + kc - 1, columns n to n + cols - 1 as a block (kc, NR); missing columns are 0.
template <Layout layout>
static void pack_block(const float* b, int64_t ld, int k, int kc, int n, int cols, float* to) {
    if (cols < NR) std::fill_n(to, kc * NR, 0.f);
    if (layout == COLUMNS) return transpose(b + (int64_t)n * ld + k, ld, cols, kc, to, NR);
    for (int i = 0; i < kc; i++) {
        const float* from = b + (int64_t)(k + i) * ld + n;
        if (cols == NR)
            std::memcpy(to + i * NR, from, NR * sizeof(float));  // a few vectors, not a call
        else
            std::copy_n(from, cols, to + i * NR);
    }
}

// Words of two bfloat16s or four bytes, each as two words: the first numbers of `count` words go to
// `low`, the others to `high`.
static inline void widen(const int32_t* from, int count, float* low, float* high) {
    for (int i = 0; i < count; i++) {
        const int32_t l = (uint32_t)from[i] << 16, h = from[i] & 0xffff0000;
        std::memcpy(low + i, &l, 4);
        std::memcpy(high + i, &h, 4);
    }
}
static inline void widen(const int32_t* from, int count, int32_t* low, int32_t* high) {
    for (int i = 0; i < count; i++) {
        const uint32_t word = from[i];
        low[i] = ((int32_t)(word << 24) >> 24 & 0xffff) | ((int32_t)(word << 16) >> 24 << 16);
        high[i] = ((int32_t)(word << 8) >> 24 & 0xffff) | ((int32_t)word >> 24 << 16);
    }
}

// `count` numbers as bfloat16s, two in a word; the second of the last is 0 if their count is odd.
static inline void join_pairs(const float* from, int count, int32_t* to) {
#ifdef __AVX512BF16__
    for (; count >= 32; count -= 32, from += 32, to += 16)
        store(to, _mm512_cvtne2ps_pbh(load<__m512>(from + 16), load<__m512>(from)));
#endif
    for (; count > 0; count -= 2, from += 2)
        *to++ = bfloat16_pair(from[0], count > 1 ? from[1] : 0);
}

typedef int16_t Halves __attribute__((vector_size(W * 4)));
typedef uint32_t UnsignedVec __attribute__((vector_size(W * 4)));

// The terms of the numbers in two vectors, in pairs as words: of both vectors' numbers in the same
// place if `rows`, else of neighbours. The words of the three terms are `stride` apart. The first
// term is rounded to the nearest; the others, which are cut off, are exact together.
static inline void divide(Vec first, Vec second, bool rows, int32_t* to, int64_t stride) {
    const IntVec upper = IntVec{} - 0x10000;  // the sixteen bits of a float that a bfloat16 keeps
    const auto pairs = [&](Vec a, Vec b) {
        if (rows) return (IntVec)((UnsignedVec)a >> 16) | ((IntVec)b & upper);
        Halves places;
        for (int i = 0; i < 2 * W; i++) places[i] = 2 * i + 1;
        return (IntVec)__builtin_shuffle((Halves)a, (Halves)b, places);
    };
    const Vec a = (Vec)(((IntVec)first + 0x8000) & upper);
    const Vec b = (Vec)(((IntVec)second + 0x8000) & upper);
    store(to, pairs(a, b));
    first -= a;
    second -= b;
    store(to + stride, pairs(first, second));
    first -= (Vec)((IntVec)first & upper);
    second -= (Vec)((IntVec)second & upper);
    store(to + 2 * stride, pairs(first, second));
}

// The terms of `count` neighbouring numbers, of each NR numbers W words of each term. The words of
// terms are `stride` apart, and those of the next NR numbers three times as much.
static inline void divide_row(const float* from, int count, int32_t* to, int64_t stride) {
    for (; count >= NR; count -= NR, from += NR, to += Terms::COUNT * stride)
        divide(load<Vec>(from), load<Vec>(from + W), false, to, stride);
    if (!count) return;
    float numbers[NR] = {};
    std::copy_n(from, count, numbers);
    divide(load<Vec>(numbers), load<Vec>(numbers + W), false, to, stride);
}

// NR words whose pairs are of two rows become these two rows, each of NR numbers.
static inline void split(const int32_t* from, float* to) { widen(from, NR, to, to + NR); }
static inline void split(const int32_t* from, int32_t* to) {
    const Halves left = load<Halves>(from), right = load<Halves>(from + W);
    Halves places;
    for (int i = 0; i < 2 * W; i++) places[i] = 2 * i;
    store(to, __builtin_shuffle(left, right, places));
    store(to + W, __builtin_shuffle(left, right, places + 1));
}

// `rows` of a packed panel as words that the processor multiplies.
template <class T, class Stored>
static void unpack(T, const Stored* from, int rows, typename T::Word* to) {
    for (int i = 0; i < rows; i++, from += NR, to += 2 * NR)
        widen((const int32_t*)from, NR, to, to + NR);
}
// For each 32 rows three times 16 rows of words, one for each term.
static inline void unpack(Terms, const float* from, int rows, int32_t* to) {
    if (rows % 32) std::fill_n(to + rows / 32 * 48 * NR, 48 * NR, 0);
    for (int k = 0; k < rows; k += 2)
        for (int w = 0; w < NR; w += W) {
            const float* low = from + k * NR + w;
            divide(load<Vec>(low), k + 1 < rows ? load<Vec>(low + NR) : Vec{}, true,
                    to + (k / 32 * 48 + k % 32 / 2) * NR + w, 16 * NR);
        }
}

// `rows` of a packed panel as rows of pairs of neighbours; the words of terms are `stride` apart.
template <class T, class Stored>
static void unpack_rows(T, const Stored* from, int rows, typename T::Word* to, int64_t) {
    for (int r = 0; r < rows; r += 2, from += NR, to += 2 * (NR / T::GROUP))
        split((const int32_t*)from, to);
}
static inline void unpack_rows(Terms, const float* from, int rows, int32_t* to, int64_t stride) {
    for (int r = 0; r < rows; r++, from += NR, to += W) divide_row(from, NR, to, stride);
}

// A piece of a row of A, at most NR numbers, as pairs; the words of terms are `stride` apart.
template <class T> static void pair_row(T, const float* from, int count, int32_t* to, int64_t) {
    join_pairs(from, count, to);
}
static inline void pair_row(Terms, const float* from, int count, int32_t* to, int64_t stride) {
    divide_row(from, count, to, stride);
}

// What is needed next: `lines` pieces of `line` words, `stride` apart.
struct Next {
    const void* start;
    int64_t stride;
    int lines, line;
    const float* at(int64_t word) const { return (const float*)start + word; }
    // How many lines of the cache a tile fetches in a step, if each of `tiles` has `steps`, and how
    // far apart the places of two steps are.
    int pace(int tiles, int steps) const {
        const int all = tiles * (lines == 1 ? steps : 1);
        return (line / 16 + all - 1) / all;
    }
    int64_t apart(int pace) const { return lines == 1 ? pace * 16 : stride; }
};

// c (M, NR) += a (M, K) b (K, NR) in words, or c = a b if `fresh`; if `half`, only the first W
// columns of c. The rows are divided evenly among the tiles: 46 rows are 6 tiles of 6 and 2 of 5,
// not 7 of 6 and one of 4. Prefetches what is next.
template <class T>
static void tiles(int M, Rows<typename T::Word> a, const typename T::Word* b, float* c, int64_t ldc,
        bool half, bool fresh, Next next) {
    const int count = (M + MR - 1) / MR;
    const bool whole = next.lines == 1;
    for (int t = 0, m = 0, end, l = 0; t < count; t++, m = end) {
        end = (int64_t)M * (t + 1) / count;
        for (; !whole && l < (int64_t)next.lines * (t + 1) / count; l++)
            for (int i = 0; i < next.line; i += 16)
                __builtin_prefetch(next.at(l * next.stride + i));
        const float* ahead = whole ? next.at((int64_t)t * next.line / count) : (const float*)b;
        const int pace = whole ? next.line / count / a.words() : 0;
        if (half)
            tile_of<T, MR, 1>(end - m, a.from(m), b, c + m * ldc, ldc, fresh, ahead, pace);
        else
            tile_of<T, MR, 2>(end - m, a.from(m), b, c + m * ldc, ldc, fresh, ahead, pace);
    }
}

// The same in tile registers, for words that are no floats.
template <class T>
static void register_tiles(int M, Rows<typename T::Word> a, const typename T::Word* b, float* c,
        int64_t ldc, bool half, bool fresh, Next next) {
    const int count = (M + 31) / 32, pace = next.pace(count, a.words() / 16);
    for (int t = 0; t < count; t++) {
        const int rows = std::min(32, M - t * 32);
        const auto tile = rows > 16 ? TileRegisters::tile<T, true> : TileRegisters::tile<T, false>;
        tile(rows, a.from(t * 32), b, c + (int64_t)t * 32 * ldc, ldc, half, fresh,
                next.at((int64_t)t * next.line / count), pace, next.apart(pace));
    }
}

// The tiles of any kind.
template <class T>
static void all_tiles(T, bool registers, int M, Rows<typename T::Word> a, const typename T::Word* b,
        float* c, int64_t ldc, bool half, bool fresh, Next next) {
    (registers ? register_tiles<T> : tiles<T>)(M, a, b, c, ldc, half, fresh, next);
}
static inline void all_tiles(Terms, bool, int M, Rows<int32_t> a, const int32_t* b, float* c,
        int64_t ldc, bool half, bool fresh, Next next) {
    const int count = (M + 15) / 16, pace = next.pace(count, a.panels / Terms::COUNT);
    for (int t = 0; t < count; t++)
        TileRegisters::tile_of_terms(std::min(16, M - t * 16), a.from(t * 16), b,
                c + (int64_t)t * 16 * ldc, ldc, half, fresh,
                next.at((int64_t)t * next.line / count), pace, next.apart(pace));
}

// C (M, N) = A B, where a has the words of A's rows. finish(m, n, count, row) may change
// row[0 .. count), which are C[m, n .. n + count), once they are sums over all of K; each is
// finished once. The sums of bytes are integers.
template <Layout layout, class Finish>
static void multiply(int M, int N, int K, Rows<typename Form<layout>::T::Word> a,
        const typename Form<layout>::Stored* B, float* C, Finish finish) {
    typedef Form<layout> F;
    typedef typename F::T T;
    typedef typename T::Word Word;
    constexpr bool packed = layout >= PACKED, in_place = packed && F::GROUP == T::GROUP;
    constexpr bool terms = in_terms<layout>();
    // Words for each row of a packed panel; of terms, 48 for 32 rows.
    constexpr int wider = terms ? 1 : F::GROUP / T::GROUP;
    const auto rows_of = [](int words) {
        return terms ? words / 48 * 32 : (words + wider - 1) / wider;
    };
    const int stored = words_of<F::GROUP>(K), words = a.words();
    const bool registers = in_registers<layout>();
    // For each block of A's rows, all of B is read, which takes less time if B is packed.
    const int MB = registers ? 256 : in_place ? 96 : 128, unit = registers ? 32 : 1;
    const int depth = terms ? 192 : registers ? words : in_place ? PACKED_KC : KC;
    const int panels = (N + NR - 1) / NR, blocks = (M + MB - 1) / MB;
    const auto row = [&](int block) {  // the first of a block
        return std::min<int64_t>(M, ((int64_t)M * block / blocks + unit - 1) / unit * unit);
    };
    const int64_t ld = layout == ROWS ? N : K;
    #pragma omp parallel
    {
        alignas(64) Word block[in_place ? 1 : std::max(terms ? 192 : 0, KC) * NR];
        alignas(64) float edge[256 * NR];  // C's last columns, full width
        if (registers) TileRegisters::begin();

        // Adds A's words times B's words k to k + depth - 1 to C's rows m0 to m1 - 1 in `panel`.
        const auto step = [&](int m0, int m1, int panel, int k, bool down) {
            const int kc = std::min(depth, words - k), n = panel * NR, cols = std::min(NR, N - n);
            const int above = rows_of(k), rows = std::min(stored, rows_of(k + kc)) - above;
            float* c = cols < NR ? edge : C + (int64_t)m0 * N + n;
            const int64_t ldc = cols < NR ? NR : N;
            const Word* b = block;
            Next next;
            if (packed) {
                const auto* from = B + ((int64_t)panel * stored + above) * NR;
                next = {from + (int64_t)(down ? rows : stored) * NR, 0, 1, rows * NR};
                if (in_place)
                    b = (const Word*)from;
                else
                    unpack(T(), from, rows, block);
            } else {
                pack_block<layout>((const float*)B, ld, k, kc, n, cols, (float*)block);
                const bool below = down && k + kc < K;  // the next block's place
                const int next_k = below ? k + kc : down ? 0 : k, next_n = below ? n : n + NR;
                next = {B + (layout == ROWS ? next_k * ld + next_n : next_n * ld + next_k), ld,
                        layout == ROWS ? kc : NR, layout == ROWS ? NR : kc};
            }
            all_tiles(T(), registers, m1 - m0, a.from(m0, k, kc), b, c, ldc, false, k == 0, next);
            if (k + kc < words) return;
            for (int m = m0; m < m1; m++) {
                float* row = C + (int64_t)m * N + n;
                if (cols < NR) std::copy_n(c + (m - m0) * ldc, cols, row);
                finish(m, n, cols, row);
            }
        };
        // Threads take a few panels at a time, because other processes may slow one of them down.
        // The next block of rows finds these panels in the cache.
        const int threads = omp_get_num_threads();
        const int shares = threads * std::max(4, (panels + 8 * threads - 1) / (8 * threads));
        #pragma omp for schedule(dynamic) nowait
        for (int share = 0; share < shares; share++) {
            const int first = (int64_t)panels * share / shares;
            const int last = (int64_t)panels * (share + 1) / shares;
            for (int i = 0; i < blocks; i++) {
                const int m0 = row(i), m1 = row(i + 1);
                if (words <= DOWN)
                    for (int panel = first; panel < last; panel++)
                        for (int k = 0; k < words; k += depth) step(m0, m1, panel, k, true);
                else
                    for (int k = 0; k < words; k += depth)
                        for (int panel = first; panel < last; panel++)
                            step(m0, m1, panel, k, false);
            }
        }
        if (registers) TileRegisters::end();
    }
}

// C (M, K) = A (M, N) B^T, B packed as floats or bfloat16s: C^T (K, M) = B A^T, where B has the
// part that A has in multiply(), and A^T that of B.
template <Layout layout>
static void multiply_transposed(
        int M, int N, int K, const float* A, const typename Form<layout>::Stored* B, float* C) {
    typedef Form<layout> F;
    typedef typename F::T T;
    typedef typename T::Word Word;
    constexpr bool in_place = F::GROUP == 1 && T::GROUP == 1;
    constexpr int terms = in_terms<layout>() ? Terms::COUNT : 1;
    const bool registers = in_registers<layout>();
    const int threads = omp_get_max_threads();
    const int MB = 256, CHUNK = registers && terms == 1 ? 32 : 4;  // rows of A, panels of B
    // Rows of B at a time: tile registers hold 16, and each thread takes some ranges.
    const int RANGE = std::max(32, std::min(96, K / (2 * threads) / 32 * 32));
    constexpr int width = NR / T::GROUP;  // words of a panel's row, for each term
    const int panels = (N + NR - 1) / NR;
    const int64_t stored = words_of<F::GROUP>(K), depth = (int64_t)panels * terms * width;
    // The words of A^T in panels (parts of the rows of A, depth, NR), 0 where there is no row.
    static std::vector<Word> memory;
    for (int m0 = 0; m0 < M; m0 += MB, A += (int64_t)MB * N, C += (int64_t)MB * K) {
        const int m = std::min(MB, M - m0), parts = (m + NR - 1) / NR;
        Word* turned = keep(memory, parts * depth * NR);
        #pragma omp parallel
        {
            static thread_local std::vector<float> sum_memory;
            static thread_local std::vector<Word> block_memory;
            float* sums = keep(sum_memory, parts * RANGE * NR);  // C^T (parts, RANGE, NR)
            Word* block = keep(block_memory, in_place ? 0 : RANGE * CHUNK * terms * width);
            alignas(64) int32_t pairs[2 * NR * NR];  // (terms, NR rows of A, width)
            #pragma omp for collapse(2)
            for (int part = 0; part < parts; part++)
                for (int panel = 0; panel < panels; panel++) {
                    const int n = panel * NR, cols = std::min(NR, N - n);
                    const int first = part * NR, rows = std::min(NR, m - first);
                    const float* from = A + (int64_t)first * N + n;
                    float* to = (float*)turned + part * depth * NR + panel * terms * width * NR;
                    if (cols < NR || rows < NR) std::fill_n(to, terms * width * NR, 0.f);
                    if (T::GROUP == 1) {
                        transpose(from, N, rows, cols, to, NR);
                        continue;
                    }
                    for (int r = 0; r < rows; r++)
                        pair_row(T(), from + (int64_t)r * N, cols, pairs + r * width, NR * width);
                    for (int term = 0; term < terms; term++)
                        transpose((const float*)pairs + term * NR * width, width, rows,
                                (cols + 1) / 2, to + term * width * NR, NR);
                }
            if (registers) TileRegisters::begin();
            #pragma omp for schedule(dynamic)
            for (int k = 0; k < K; k += RANGE) {
                const int rows = std::min(RANGE, K - k);
                for (int panel = 0; panel < panels; panel += CHUNK) {
                    const int count = std::min(CHUNK, panels - panel);
                    const auto* from = B + (panel * stored + k / F::GROUP) * NR;
                    Rows<Word> b = {(const Word*)from, NR, NR, count, stored * NR};
                    if (!in_place) {
                        b = {block, width, width, terms * count, RANGE * width};
                        for (int p = 0; p < count; p++)
                            unpack_rows(T(), from + p * stored * NR, rows,
                                    block + p * terms * RANGE * width, RANGE * width);
                    }
                    // Threads that are equally fast take ranges in turn.
                    const bool last = panel + CHUNK >= panels;
                    const auto* follows = last ? B + (k + threads * RANGE) / F::GROUP * NR
                                               : from + CHUNK * stored * NR;
                    const auto next = [&](int part) {  // a share of the next chunk
                        const int begin = rows / F::GROUP * part / parts;
                        return Next{follows + begin * NR, stored * NR, CHUNK,
                                (rows / F::GROUP * (part + 1) / parts - begin) * NR};
                    };
                    for (int part = 0; part < parts; part++)
                        all_tiles(T(), registers, rows, b,
                                turned + part * depth * NR + panel * terms * width * NR,
                                sums + part * RANGE * NR, NR, m - part * NR <= W, panel == 0,
                                next(part));
                }
                for (int part = 0; part < parts; part++)
                    transpose(sums + part * RANGE * NR, NR, rows, std::min(NR, m - part * NR),
                            C + (int64_t)part * NR * K + k, K);
            }
            if (registers) TileRegisters::end();
        }
    }
}

// x / scale as an integer of a byte, rounded to the nearest.
static inline int32_t quantised(float x, float scale) {
    return std::nearbyint(std::min(127.f, std::max(-127.f, x / scale)));
}
// What the largest of these absolute values is divided by to give 127.
static inline float scale_of(float high) { return high > 0 ? high / 127 : 1; }

// A panel (K, NR) in words. Of bytes also the columns' scales, by which the numbers were divided,
// and the sums of the columns.
static inline void encode(Form<PACKED>, const float* from, int K, float* to, float*, int32_t*) {
    std::copy_n(from, (int64_t)K * NR, to);
}
static inline void encode(
        Form<PACKED_BFLOAT16>, const float* from, int K, int32_t* to, float*, int32_t*) {
    std::fill_n(to, (int64_t)words_of<2>(K) * NR, 0);
    for (int k = 0; k < K; k += 2, from += 2 * NR, to += NR)
        for (int i = 0; i < NR; i++) to[i] = bfloat16_pair(from[i], k + 1 < K ? from[NR + i] : 0);
}
static inline void encode(
        Form<PACKED_INT8>, const float* from, int K, int32_t* to, float* scales, int32_t* sums) {
    std::fill_n(to, (int64_t)words_of<4>(K) * NR, 0);
    std::fill_n(scales, NR, 0.f);
    std::fill_n(sums, NR, 0);
    for (int k = 0; k < K; k++)
        for (int i = 0; i < NR; i++) scales[i] = std::max(scales[i], std::abs(from[k * NR + i]));
    for (int i = 0; i < NR; i++) scales[i] = scale_of(scales[i]);
    for (int k = 0; k < K; k++)
        for (int i = 0; i < NR; i++) {
            const int32_t byte = quantised(from[k * NR + i], scales[i]);
            to[k / 4 * NR + i] |= (byte & 0xff) << k % 4 * 8;
            sums[i] += byte;
        }
}

// B in a packed layout, from ROWS or COLUMNS; `to` holds as many words as N, rounded up to a
// multiple of NR, times words_of(K). Bytes are followed by the scales of the columns and their
// sums, each as many as N, rounded up likewise.
template <Layout layout, Layout packed>
static void pack(int N, int K, const float* B, typename Form<packed>::Stored* to) {
    const int panels = (N + NR - 1) / NR;
    const int64_t words = (int64_t)words_of<Form<packed>::GROUP>(K) * NR;
    #pragma omp parallel
    {
        std::vector<float> block((int64_t)K * NR);
        #pragma omp for
        for (int panel = 0; panel < panels; panel++) {
            const int n = panel * NR, cols = std::min(NR, N - n);
            pack_block<layout>(B, layout == ROWS ? N : K, 0, K, n, cols, block.data());
            encode(Form<packed>(), block.data(), K, to + panel * words,
                    (float*)to + panels * words + n, (int32_t*)to + panels * (words + NR) + n);
        }
    }
}

}  // namespace gemm
