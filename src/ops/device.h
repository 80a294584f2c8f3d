// Lets one text of a kernel run on the CPU, where threads divide the rows, and on a GPU, where a
// block of threads computes a row:
//
//     KERNEL void NAME(...) {
//         FOR_ROWS(n, rows) {
//             float sum = 0;
//             FOR_COLUMNS(c, columns) sum += x[(int64_t)n * columns + c];
//             sum = sum_of(sum);              // of the block's threads; on the CPU sum itself
//             if (FIRST_THREAD) y[n] = sum;
//         }
//     }
//
// FOR_EACH divides numbers among all threads. Sums of a block go by a tree in shared memory, in a
// fixed order, so that results are reproducible bit for bit.
//
// Jittor puts its own definitions after the last #include: none may stand under a condition.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>

#ifdef __CUDACC__
const int THREADS = 256;  // of a block, at most; a power of two
const int COLUMNS = 32;   // adjacent columns of a matrix, whose rows one block sums
#define DEVICE __device__ static inline
#define KERNEL __global__ static
#define FOR_ROWS(n, rows) for (int n = blockIdx.x; n < rows; n += gridDim.x)
#define FOR_COLUMNS(c, columns) for (int c = threadIdx.x; c < columns; c += THREADS)
#define FOR_EACH(i, count)                                                   \
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; \
            i += (int64_t)gridDim.x * THREADS)
#define FIRST_THREAD (threadIdx.x == 0)
#define SYNC __syncthreads()

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

DEVICE float sum_of(float x, int columns = 1) {
    return reduce(x, [](float a, float b) { return a + b; }, columns);
}
DEVICE float max_of(float x) {
    return reduce(x, [](float a, float b) { return fmaxf(a, b); });
}
#else
#define DEVICE static inline
#define KERNEL static
#define FOR_ROWS(n, rows) _Pragma("omp parallel for") for (int n = 0; n < rows; n++)
#define FOR_COLUMNS(c, columns) for (int c = 0; c < columns; c++)
#define FOR_EACH(i, count) _Pragma("omp parallel for") for (int64_t i = 0; i < count; i++)
#define FIRST_THREAD true
#define SYNC
using std::max;  // CUDA has max and min of its own
using std::min;

DEVICE float sum_of(float x) { return x; }
DEVICE float max_of(float x) { return x; }
#endif
