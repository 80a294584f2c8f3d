// Linear layers. y, residual, dy: (rows, n_out); x, dx: (rows, n_in); bias: (n_out); bias and
// residual may be nullptr. weight: (n_in, n_out), its transpose or packed, see gemm::Layout.

#include <type_traits>

#include "gemm.h"

// The numbers of a weight. Those of a packed one begin with a line of the cache.
template <gemm::Layout layout>
static typename gemm::Form<layout>::Stored* numbers_of(const void* weight) {
    auto* place = (typename gemm::Form<layout>::Stored*)weight;
    return layout >= gemm::PACKED ? gemm::line_from(place) : place;
}

// The words of the rows of x, 0 beyond n_in. Tile registers read rows until they are full.
template <gemm::Layout layout> static gemm::Rows<int32_t> row_words(int rows, int words) {
    static std::vector<int32_t> memory;
    const int64_t padded = (rows + 31) / 32 * 32;
    const int32_t* start = gemm::keep(memory, padded * words);
    if (gemm::in_registers<layout>()) return {start, 16, 16, words / 16, padded * 16};
    return {start, words, words, 1, 0};
}

template <gemm::Layout layout>
static gemm::Rows<float> words_of_rows(gemm::Float32, const float* x, int, int n_in, float*) {
    return {x, n_in, n_in, 1, 0};
}

#ifdef __AVX512BF16__
template <gemm::Layout layout>
static gemm::Rows<int32_t> words_of_rows(
        gemm::BFloat16, const float* x, int rows, int n_in, float*) {
    const auto to = row_words<layout>(rows, gemm::words_of<2>(n_in));
    #pragma omp parallel for
    for (int m = 0; m < rows; m++)
        for (int k = 0; k < to.words(); k += to.width) {
            const int count = std::max(0, std::min(2 * to.width, n_in - 2 * k));
            int32_t* place = (int32_t*)to.start + to.place(m, k);
            gemm::join_pairs(x + (int64_t)m * n_in + 2 * k, count, place);
            std::fill(place + (count + 1) / 2, place + to.width, 0);
        }
    return to;
}
#endif

template <gemm::Layout layout>
static gemm::Rows<int32_t> words_of_rows(gemm::Terms, const float* x, int rows, int n_in, float*) {
    const auto to = row_words<layout>(rows, (n_in + 31) / 32 * 16 * gemm::Terms::COUNT);
    #pragma omp parallel for
    for (int m = 0; m < rows; m++)
        gemm::divide_row(x + (int64_t)m * n_in, n_in, (int32_t*)to.start + to.place(m, 0), to.jump);
    return to;
}

// Integers from 1 to 255: x / scale + 128.
template <gemm::Layout layout, class Integers>
static gemm::Rows<int32_t> words_of_rows(
        Integers, const float* x, int rows, int n_in, float* scales) {
    typedef typename std::conditional<Integers::GROUP == 4, uint8_t, uint16_t>::type Number;
    const int group = Integers::GROUP;
    const auto to = row_words<layout>(rows, gemm::words_of<4>(n_in) * 4 / group);
    #pragma omp parallel for
    for (int m = 0; m < rows; m++) {
        const float* from = x + (int64_t)m * n_in;
        float high = 0;
        for (int k = 0; k < n_in; k++) high = std::max(high, std::abs(from[k]));
        const float scale = scales[m] = gemm::scale_of(high);
        for (int k = 0; k < to.words(); k += to.width) {
            const int count = std::max(0, std::min(group * to.width, n_in - group * k));
            Number* place = (Number*)(to.start + to.place(m, k));
            for (int i = 0; i < count; i++)
                place[i] = gemm::quantised(from[group * k + i], scale) + 128;
            std::fill(place + count, place + group * to.width, 0);
        }
    }
    return to;
}

template <gemm::Layout layout>
static void linear(float* y, const float* x, const void* weight, const float* bias,
        const float* residual, int rows, int n_out, int n_in) {
    // Dividing the weight into terms takes as long as is gained with about a hundred rows. The
    // gradient gains more, beside a product with the transpose that is slower.
    if (gemm::in_terms<layout>() && (rows < 128 || !gemm::in_registers<layout>()))
        return linear<gemm::PACKED>(y, x, weight, bias, residual, rows, n_out, n_in);
    typedef gemm::Form<layout> Form;
    const auto* stored = numbers_of<layout>(weight);
    std::vector<float> row_scales(rows);
    const auto words = words_of_rows<layout>(typename Form::T(), x, rows, n_in, row_scales.data());
    const int64_t padded = (n_out + gemm::NR - 1) / gemm::NR * gemm::NR;
    const float* scales = (const float*)stored + padded * gemm::words_of<Form::GROUP>(n_in);
    const int32_t* sums = (const int32_t*)scales + padded;
    gemm::multiply<layout>(
            rows, n_out, n_in, words, stored, y, [&](int m, int n, int count, float* row) {
                if (layout == gemm::PACKED_INT8)
                    for (int i = 0; i < count; i++) {
                        int32_t sum;
                        std::memcpy(&sum, row + i, 4);
                        row[i] = (sum - 128 * sums[n + i]) * (row_scales[m] * scales[n + i]);
                    }
                if (bias && residual)
                    for (int i = 0; i < count; i++)
                        row[i] += bias[n + i] + residual[(int64_t)m * n_out + n + i];
                else if (bias)
                    for (int i = 0; i < count; i++) row[i] += bias[n + i];
                else if (residual)
                    for (int i = 0; i < count; i++) row[i] += residual[(int64_t)m * n_out + n + i];
            });
}

template <gemm::Layout layout>
static void grad_linear_x(
        float* dx, const float* dy, const void* weight, int rows, int n_out, int n_in) {
    if (gemm::in_terms<layout>() && (rows < 32 || !gemm::in_registers<layout>()))
        return grad_linear_x<gemm::PACKED>(dx, dy, weight, rows, n_out, n_in);
    gemm::multiply_transposed<layout>(rows, n_out, n_in, dy, numbers_of<layout>(weight), dx);
}

template <gemm::Layout layout, gemm::Layout packed>
static void pack_weight(void* to, const float* weight, int n_out, int n_in) {
    gemm::pack<layout, packed>(n_out, n_in, weight, numbers_of<packed>(to));
}

// The columns of a packed weight that `which` numbers, as rows: y (rows, n_in).
static float number(gemm::Form<gemm::PACKED>, const float* words, int n_in, int k, int n) {
    return words[((int64_t)n / gemm::NR * n_in + k) * gemm::NR + n % gemm::NR];
}
static float number(
        gemm::Form<gemm::PACKED_BFLOAT16>, const int32_t* words, int n_in, int k, int n) {
    const int64_t row = (int64_t)n / gemm::NR * gemm::words_of<2>(n_in) + k / 2;
    const uint32_t word = words[row * gemm::NR + n % gemm::NR];
    const uint32_t high = k % 2 ? word >> 16 << 16 : word << 16;
    float x;
    std::memcpy(&x, &high, 4);
    return x;
}
template <gemm::Layout packed>
static void packed_columns(float* y, const void* weight, const int* which, int rows, int n_in) {
    const auto* words = numbers_of<packed>(weight);
    #pragma omp parallel for
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < n_in; k++)
            y[(int64_t)i * n_in + k] = number(gemm::Form<packed>(), words, n_in, k, which[i]);
}
