// Attention of one query on CUDA. One block computes one head of one token.

#include "device.h"

const int ATTENTION_THREADS = 64;  // a usual depth of a head, and a usual number of keys

__device__ static float inner(const float* a, const float* b, int D) {
    float sum = 0;
    for (int d = 0; d < D; d++) sum += a[d] * b[d];
    return sum;
}

// y (D) becomes the sum of n values (D) weighted by softmax(q key / sqrt(D)); returns the log of
// the sum of exp(scores). key(j) is a pointer to the j-th key (D); its value is C numbers further.
// Each step takes as many keys as a block has threads, and scales the sums so far when a larger
// score comes (Milakov & Gimelshein, 2018).
template <class Keys>
__device__ static float attend(float* y, const float* q, Keys key, int n, int C, int D) {
    __shared__ float weights[ATTENTION_THREADS];
    const int t = threadIdx.x;
    const float scale = 1 / sqrtf((float)D);
    float high = -1e30f, sum = 0;
    for (int d = t; d < D; d += ATTENTION_THREADS) y[d] = 0;
    for (int begin = 0; begin < n; begin += ATTENTION_THREADS) {
        const int count = min(ATTENTION_THREADS, n - begin);
        const float score = t < count ? inner(q, key(begin + t), D) * scale : -1e30f;
        const float higher = fmaxf(high, max_of(score)), shrink = expf(high - higher);
        const float weight = t < count ? expf(score - higher) : 0;
        weights[t] = weight;  // the weights of the last step have been read: max_of is a barrier
        sum = sum * shrink + sum_of(weight);
        high = higher;
        for (int d = t; d < D; d += ATTENTION_THREADS) {
            float mixed = y[d] * shrink;
            for (int j = 0; j < count; j++) mixed += weights[j] * key(begin + j)[C + d];
            y[d] = mixed;
        }
    }
    for (int d = t; d < D; d += ATTENTION_THREADS) y[d] /= sum;
    return high + logf(sum);
}
