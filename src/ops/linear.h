// Linear layers. y, residual, dy: (rows, n_out); x, dx: (rows, n_in); bias: (n_out); bias and
// residual may be nullptr. weight: (n_in, n_out), its transpose or packed, see gemm::Layout.

#include <type_traits>

#include "gemm.h"

// Memory for the words of rows, and for as many rows more as fill tile registers. It stays for the
// next call; Jittor runs one operator at a time.
static int32_t* row_words(int rows, int words) {
    static std::vector<int32_t> memory;
    memory.resize(((int64_t)rows + 31) / 32 * 32 * words);
    return memory.data();
}

// The rows of x in words, 0 beyond n_in.
static const float* words_of_rows(gemm::Float32, const float* x, int rows, int n_in, float*) {
    return x;
}

#ifdef __AVX512BF16__
static const int32_t* words_of_rows(gemm::BFloat16, const float* x, int rows, int n_in, float*) {
    const int words = gemm::words_of<2>(n_in);
    int32_t* to = row_words(rows, words);
    #pragma omp parallel for
    for (int m = 0; m < rows; m++) {
        const float* from = x + (int64_t)m * n_in;
        int32_t* row = to + (int64_t)m * words;
        for (int k = 0; k < n_in / 2; k++)
            row[k] = gemm::bfloat16_pair(from[2 * k], from[2 * k + 1]);
        if (n_in % 2) row[n_in / 2] = gemm::bfloat16_pair(from[n_in - 1], 0);
        std::fill(row + (n_in + 1) / 2, row + words, 0);
    }
    return to;
}
#endif

// Integers from 1 to 255: x / scale + 128.
template <class Integers>
static const int32_t* words_of_rows(Integers, const float* x, int rows, int n_in, float* scales) {
    typedef typename std::conditional<Integers::GROUP == 4, uint8_t, uint16_t>::type Number;
    const int words = gemm::words_of<4>(n_in) * 4 / Integers::GROUP;
    int32_t* to = row_words(rows, words);
    #pragma omp parallel for
    for (int m = 0; m < rows; m++) {
        const float* from = x + (int64_t)m * n_in;
        Number* row = (Number*)(to + (int64_t)m * words);
        float high = 0;
        for (int k = 0; k < n_in; k++) high = std::max(high, std::abs(from[k]));
        const float scale = scales[m] = gemm::scale_of(high);
        for (int k = 0; k < n_in; k++) row[k] = gemm::quantised(from[k], scale) + 128;
        std::fill(row + n_in, row + words * Integers::GROUP, 0);
    }
    return to;
}

template <gemm::Layout layout>
static void linear(float* y, const float* x, const void* weight, const float* bias,
        const float* residual, int rows, int n_out, int n_in) {
    typedef gemm::Form<layout> Form;
    const auto* stored = (const typename Form::Stored*)weight;
    std::vector<float> row_scales(rows);
    const auto* words = words_of_rows(typename Form::T(), x, rows, n_in, row_scales.data());
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
    gemm::multiply_transposed<layout>(
            rows, n_out, n_in, dy, (const typename gemm::Form<layout>::Stored*)weight, dx);
}

template <gemm::Layout layout, gemm::Layout packed>
static void pack_weight(void* to, const float* weight, int n_out, int n_in) {
    gemm::pack<layout, packed>(n_out, n_in, weight, (typename gemm::Form<packed>::Stored*)to);
}

// The columns of a packed weight that `which` numbers, as rows: y (rows, n_in).
static float number(const float* words, int n_in, int k, int n) {
    return words[((int64_t)n / gemm::NR * n_in + k) * gemm::NR + n % gemm::NR];
}
static float number(const int32_t* words, int n_in, int k, int n) {
    const int64_t row = (int64_t)n / gemm::NR * gemm::words_of<2>(n_in) + k / 2;
    const uint32_t word = words[row * gemm::NR + n % gemm::NR];
    const uint32_t high = k % 2 ? word >> 16 << 16 : word << 16;
    float x;
    std::memcpy(&x, &high, 4);
    return x;
}
template <class Word>
static void packed_columns(float* y, const Word* weight, const int* which, int rows, int n_in) {
    #pragma omp parallel for
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < n_in; k++) y[(int64_t)i * n_in + k] = number(weight, n_in, k, which[i]);
}
