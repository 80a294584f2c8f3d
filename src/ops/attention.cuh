// Attention of one query on CUDA: a block works on a head of a token. A value stands C = H * D
// numbers behind its key.

const int ATTENTION_THREADS = 64;  // as many as a head is deep, and about as many as keys

__device__ static float inner(const float* a, const float* b, int D) {
    float sum = 0;
    for (int d = 0; d < D; d++) sum += a[d] * b[d];
    return sum;
}
// y becomes the mixture of n values, each weighted by what q thinks of its key; returns the
// log of the sum of exponents. Keys come by pieces of a block's threads, and what was summed
// so far shrinks where a larger score comes (Milakov & Gimelshein, 2018).
template <class Keys>
__device__ static float attend(const float* q, Keys key, int n, int C, int D, float* y) {
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
        weights[t] = weight;  // the piece before has been read: max_of waited for all threads
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
