// What the CUDA kernels share: reductions over the threads of a block, by a tree in shared memory.
// The order of additions is fixed, so results are reproducible bit for bit.

#include <cstdint>
#include <stdexcept>

const int THREADS = 256;  // of a block, at most; a power of two
const int COLUMNS = 32;   // adjacent columns of a matrix, whose rows one block sums

// How many blocks of `each` it takes for `count`.
static inline int blocks_for(int64_t count, int each = THREADS) {
    return (count + each - 1) / each;
}

// combine() of the x of all threads with the same index modulo `columns`; all threads return it.
template <class T, class Combine>
__device__ static T reduce(T x, Combine combine, int columns = 1) {
    __shared__ T shared[THREADS];
    const int t = threadIdx.x;
    __syncthreads();  // the reduction before this one has been read
    shared[t] = x;
    for (int half = blockDim.x / 2; half >= columns; half /= 2) {
        __syncthreads();
        if (t < half) shared[t] = combine(shared[t], shared[t + half]);
    }
    __syncthreads();
    return shared[t % columns];
}

__device__ static float sum_of(float x, int columns = 1) {
    return reduce(x, [](float a, float b) { return a + b; }, columns);
}
__device__ static float max_of(float x) {
    return reduce(x, [](float a, float b) { return fmaxf(a, b); });
}
