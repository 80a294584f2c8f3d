// LoRA's second product, added to a linear layer's output, and its gradients.
// z, y, dz: (rows, columns); bias: (columns); low, dlow: (rows, groups, rank); lora_B, dB:
// (groups, width, rank); first: (groups), the first column of each group's projection in y.

#include <algorithm>
#include <cstdint>
#include <vector>

// A matrix (columns, rows) from (rows, columns). All loops below run along the width, of which
// there is more than of the rank; they need lora_B transposed, (rank, groups, width).
static std::vector<float> transposed(const float* from, int64_t rows, int64_t columns) {
    std::vector<float> to(rows * columns);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) to[j * rows + i] = from[i * columns + j];
    return to;
}

static void lora_up(float* z, const float* y, const float* bias, const float* low,
        const float* lora_B, const int* first, int rows, int columns, int groups, int rank,
        int width, float scaling) {
    const auto up = transposed(lora_B, groups * width, rank);
    #pragma omp parallel for
    for (int n = 0; n < rows; n++) {
        float* zn = z + (int64_t)n * columns;
        for (int c = 0; c < columns; c++) zn[c] = y[(int64_t)n * columns + c] + bias[c];
        for (int group = 0; group < groups; group++)
            for (int r = 0; r < rank; r++) {
                const float scaled = low[((int64_t)n * groups + group) * rank + r] * scaling;
                const float* row = up.data() + ((int64_t)r * groups + group) * width;
                float* part = zn + first[group];
                for (int c = 0; c < width; c++) part[c] += scaled * row[c];
            }
    }
}

static void grad_lora_up_low(float* dlow, const float* dz, const float* lora_B, const int* first,
        int rows, int columns, int groups, int rank, int width, float scaling) {
    const auto up = transposed(lora_B, groups * width, rank);
    #pragma omp parallel for
    for (int n = 0; n < rows; n++)
        for (int group = 0; group < groups; group++)
            for (int r = 0; r < rank; r++) {
                const float* g = dz + (int64_t)n * columns + first[group];
                const float* row = up.data() + ((int64_t)r * groups + group) * width;
                float sum = 0;
                for (int c = 0; c < width; c++) sum += g[c] * row[c];
                dlow[((int64_t)n * groups + group) * rank + r] = sum * scaling;
            }
}

static void grad_lora_up_B(float* dB, const float* dz, const float* low, const int* first, int rows,
        int columns, int groups, int rank, int width, float scaling) {
    const int piece = 256, pieces = (width + piece - 1) / piece;
    #pragma omp parallel for
    for (int item = 0; item < groups * pieces; item++) {
        const int group = item / pieces, from = item % pieces * piece;
        const int count = std::min(piece, width - from);
        std::vector<float> sums(rank * count);  // (rank, count)
        for (int n = 0; n < rows; n++)
            for (int r = 0; r < rank; r++) {
                const float* g = dz + (int64_t)n * columns + first[group] + from;
                const float scaled = low[((int64_t)n * groups + group) * rank + r] * scaling;
                for (int c = 0; c < count; c++) sums[r * count + c] += scaled * g[c];
            }
        float* up = dB + ((int64_t)group * width + from) * rank;
        for (int c = 0; c < count; c++)
            for (int r = 0; r < rank; r++) up[c * rank + r] = sums[r * count + c];
    }
}
