// Single-precision matrix products for few rows and large weights, on all cores.
//
//     C (M, N) = A (M, K) B,   then finish(m, n, count, row) on every finished piece of C
//
// GotoBLAS' method (Goto and van de Geijn, 2008) without the packing of A, which has only tens of
// rows. B's columns are divided into panels of NR, and each thread takes a few panels at a time. It
// packs KC x NR numbers of B (16 KB, half of a first-level cache), and multiplies all rows of A by
// them in tiles of at most MR x NR numbers of C that stay in registers. Where B is packed already,
// a block has more rows: the processor fetches them from the second-level cache, and C is read and
// written less often.

#include <cstdint>
#include <omp.h>

#include "vectors.h"

namespace gemm {

#ifdef __AVX512F__
const int W = 16, MR = 12;  // numbers in a vector register, rows of a tile
#else
const int W = 8, MR = 6;
#endif
const int NR = 2 * W, KC = 4096 / NR, PACKED_KC = 1024;
// Rows of A are divided into blocks that stay in a second-level cache of 512 KB: whole rows if they
// have at most DOWN columns, else as many columns at a time as a block of B has rows.
const int DOWN = 1024;
typedef float Vec __attribute__((vector_size(W * sizeof(float))));

static inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// c (R, NR) += a (R, kc) b (kc, NR), or c = a b if `fresh`; b is contiguous, rows of a and c are
// lda and ldc apart. Prefetches memory from `ahead` on, `pace` numbers in each step.
template <int R>
static void tile(const float* a, int64_t lda, const float* b, int kc, float* c, int64_t ldc,
        bool fresh, const float* ahead, int pace) {
    Vec sum[R][2];
    for (int r = 0; r < R; r++)
        for (int h = 0; h < 2; h++) sum[r][h] = fresh ? Vec{} : load(c + r * ldc + h * W);
    for (int k = 0; k < kc; k++) {
        Vec b0 = load(b + k * NR), b1 = load(b + k * NR + W);
        __builtin_prefetch(ahead + k * pace);
        #pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            Vec x = Vec{} + a[r * lda + k];
            sum[r][0] += x * b0;
            sum[r][1] += x * b1;
        }
    }
    for (int r = 0; r < R; r++)
        for (int h = 0; h < 2; h++) store(c + r * ldc + h * W, sum[r][h]);
}

// tile<rows>(arguments ...), where rows is from 1 to R.
template <int R, class... Arguments> static void tile_of(int rows, Arguments... arguments) {
    if (rows == R) return tile<R>(arguments...);
    tile_of<(R > 1 ? R - 1 : R)>(rows, arguments...);
}

// Reads eight rows of eight numbers, ld apart, and writes their transpose, with rows NR apart.
static inline void transpose8(const float* from, int64_t ld, float* to) {
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
        std::memcpy(to + i * NR, &low, 32);
        std::memcpy(to + (i + 4) * NR, &high, 32);
    }
}

// How B lies in memory: (K, N), its transpose (N, K), or as pack() left it.
enum Layout { ROWS, COLUMNS, PACKED };

// B's rows k to k + kc - 1, columns n to n + cols - 1 as a block (kc, NR); missing columns are 0.
template <Layout layout>
static void pack_block(const float* b, int64_t ld, int k, int kc, int n, int cols, float* to) {
    if (cols < NR) std::fill_n(to, kc * NR, 0.f);
    if (layout == ROWS) {
        for (int i = 0; i < kc; i++) {
            const float* from = b + (int64_t)(k + i) * ld + n;
            if (cols == NR)
                std::memcpy(to + i * NR, from, NR * sizeof(float));  // a few vectors, not a call
            else
                std::copy_n(from, cols, to + i * NR);
        }
        return;
    }
    for (int j = 0; j < cols; j += 8) {
        const int count = std::min(8, cols - j);
        const float* from = b + (int64_t)(n + j) * ld + k;
        int i = 0;
        if (count == 8)
            for (; i + 8 <= kc; i += 8) transpose8(from + i, ld, to + i * NR + j);
        for (; i < kc; i++)
            for (int c = 0; c < count; c++) to[i * NR + j + c] = from[c * ld + i];
    }
}

// All rows of a times one block of B. The rows are divided evenly among the tiles: 46 rows are 6
// tiles of 6 and 2 of 5, not 7 of 6 and one of 4. Prefetches the next block, which is contiguous
// (stride 0), or `lines` pieces of `line` numbers, `stride` apart.
static inline void all_rows(int M, const float* a, int64_t lda, const float* b, int kc, float* c,
        int64_t ldc, bool fresh, const float* next, int64_t stride, int lines, int line) {
    const int tiles = (M + MR - 1) / MR;
    for (int t = 0, m = 0, end, l = 0; t < tiles; t++, m = end) {
        end = (int64_t)M * (t + 1) / tiles;
        for (; stride && l < (int64_t)lines * (t + 1) / tiles; l++)
            for (int i = 0; i < line; i += 16) __builtin_prefetch(next + l * stride + i);
        const float* ahead = stride ? b : next + (int64_t)t * kc * NR / tiles;
        tile_of<MR>(end - m, a + m * lda, lda, b, kc, c + m * ldc, ldc, fresh, ahead,
                stride ? 0 : NR / tiles);
    }
}

// C (M, N) = A (M, K) B. finish(m, n, count, row) may change row[0 .. count), which are
// C[m, n .. n + count), once they are sums over all of K; each is finished once.
template <Layout layout, class Finish>
static void multiply(int M, int N, int K, const float* A, const float* B, float* C, Finish finish) {
    // For each block of A's rows, all of B is read, which takes less time if B is packed.
    const int MB = layout == PACKED ? 96 : 128, depth = layout == PACKED ? PACKED_KC : KC;
    const int panels = (N + NR - 1) / NR, blocks = (M + MB - 1) / MB;
    const int64_t ld = layout == ROWS ? N : K;
    #pragma omp parallel
    {
        alignas(64) float block[layout == PACKED ? 1 : KC * NR];
        alignas(64) float edge[MB * NR];  // C's last columns, full width

        // Adds A's columns times B's rows k to k + depth - 1 to C's rows m0 to m1 - 1 in `panel`.
        const auto step = [&](int m0, int m1, int panel, int k, bool down) {
            const int kc = std::min(depth, K - k), n = panel * NR, cols = std::min(NR, N - n);
            const float* a = A + (int64_t)m0 * K + k;
            float* c = cols < NR ? edge : C + (int64_t)m0 * N + n;
            const int64_t ldc = cols < NR ? NR : N;
            const float *b = block, *next;
            if (layout == PACKED) {
                b = B + ((int64_t)panel * K + k) * NR;
                next = b + (int64_t)(down ? kc : K) * NR;
            } else {
                pack_block<layout>(B, ld, k, kc, n, cols, block);
                const bool below = down && k + kc < K;  // the next block's place
                const int next_k = below ? k + kc : down ? 0 : k, next_n = below ? n : n + NR;
                next = B + (layout == ROWS ? next_k * ld + next_n : next_n * ld + next_k);
            }
            all_rows(m1 - m0, a, K, b, kc, c, ldc, k == 0, next, layout == PACKED ? 0 : ld,
                    layout == ROWS ? kc : NR, layout == ROWS ? NR : kc);
            if (k + kc < K) return;
            for (int m = m0; m < m1; m++) {
                float* row = C + (int64_t)m * N + n;
                if (cols < NR) std::copy_n(c + (m - m0) * ldc, cols, row);
                finish(m, n, cols, row);
            }
        };
        // Threads take a few panels at a time, because other processes may slow one of them down.
        // The next block of rows finds these panels in the cache.
        const int group = std::max(1, std::min(8, panels / (4 * omp_get_num_threads())));
        #pragma omp for schedule(dynamic) nowait
        for (int first = 0; first < panels; first += group) {
            const int last = std::min(panels, first + group);
            for (int i = 0; i < blocks; i++) {
                const int m0 = (int64_t)M * i / blocks, m1 = (int64_t)M * (i + 1) / blocks;
                if (K <= DOWN)
                    for (int panel = first; panel < last; panel++)
                        for (int k = 0; k < K; k += depth) step(m0, m1, panel, k, true);
                else
                    for (int k = 0; k < K; k += depth)
                        for (int panel = first; panel < last; panel++)
                            step(m0, m1, panel, k, false);
            }
        }
    }
}

// B in the layout PACKED; `to` holds K * N numbers, N rounded up to a multiple of NR.
template <Layout layout> static void pack(int N, int K, const float* B, float* to) {
    const int panels = (N + NR - 1) / NR, ld = layout == ROWS ? N : K;
    #pragma omp parallel for
    for (int panel = 0; panel < panels; panel++)
        for (int k = 0; k < K; k += KC) {
            const int kc = std::min(KC, K - k), n = panel * NR;
            pack_block<layout>(
                    B, ld, k, kc, n, std::min(NR, N - n), to + ((int64_t)panel * K + k) * NR);
        }
}

}  // namespace gemm
