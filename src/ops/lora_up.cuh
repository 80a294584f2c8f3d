// See lora_up.h.

#include "device.h"

// One thread computes one number of z.
__global__ static void lora_up(float* z, const float* y, const float* bias, const float* low,
        const float* lora_B, const int* first, int rows, int columns, int groups, int rank,
        int width, float scaling) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, n = i / columns;
    if (i >= (int64_t)rows * columns) return;
    const int c = i % columns;
    float sum = 0;
    for (int group = 0; group < groups; group++) {
        const int place = c - first[group];
        if (place < 0 || place >= width) continue;
        for (int r = 0; r < rank; r++)
            sum += low[(n * groups + group) * rank + r] *
                   lora_B[(group * width + place) * rank + r];
    }
    z[i] = y[i] + bias[c] + sum * scaling;
}

// One block computes one row of dlow.
__global__ static void grad_lora_up_low(float* dlow, const float* dz, const float* lora_B,
        const int* first, int rows, int columns, int groups, int rank, int width, float scaling) {
    const int64_t n = blockIdx.x;
    for (int item = 0; item < groups * rank; item++) {
        const int group = item / rank, r = item % rank;
        const float* g = dz + n * columns + first[group];
        float sum = 0;
        for (int c = threadIdx.x; c < width; c += THREADS)
            sum += g[c] * lora_B[(group * width + c) * rank + r];
        sum = sum_of(sum);
        if (threadIdx.x == 0) dlow[n * groups * rank + item] = sum * scaling;
    }
}

// One block computes 32 rows of dB for one r (blockIdx.y), with 8 threads a row.
__global__ static void grad_lora_up_B(float* dB, const float* dz, const float* low,
        const int* first, int rows, int columns, int groups, int rank, int width, float scaling) {
    const int row = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS, r = blockIdx.y;
    const int group = row / width;
    const bool exists = group < groups;
    const int c = exists ? first[group] + row % width : 0;
    float sum = 0;
    for (int64_t n = threadIdx.x / COLUMNS; n < rows && exists; n += THREADS / COLUMNS)
        sum += low[(n * groups + group) * rank + r] * dz[n * columns + c];
    sum = sum_of(sum, COLUMNS);
    if (threadIdx.x < COLUMNS && exists) dB[row * rank + r] = sum * scaling;
}
