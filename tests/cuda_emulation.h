// The part of CUDA that our kernels use, emulated on the CPU. Blocks run one after the other. The
// threads of a block are coroutines that switch at __syncthreads(), in a new random order each
// time, so a kernel in which a barrier is missing most often gives wrong results.

#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define __CUDACC__
#define __global__
#define __device__
#define __shared__ static

struct dim3 {
    int x, y, z;
    dim3(int x = 1, int y = 1, int z = 1) : x(x), y(y), z(z) {}
};
static dim3 gridDim, blockDim, blockIdx, threadIdx;
using std::max;
using std::min;

typedef int cudaError_t;
static inline cudaError_t cudaGetLastError() { return 0; }
static inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct Coroutine {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    bool done;
};
static std::vector<Coroutine> coroutines;
static ucontext_t scheduler;
static std::function<void()> kernel_call;

static inline void __syncthreads() { swapcontext(&coroutines[threadIdx.x].context, &scheduler); }

static void run_thread() {
    kernel_call();
    coroutines[threadIdx.x].done = true;
}

static void run_block(int threads) {
    static std::mt19937 random;
    coroutines.resize(std::max<size_t>(coroutines.size(), threads));
    for (int t = 0; t < threads; t++) {
        Coroutine& thread = coroutines[t];
        thread.done = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, run_thread, 0);
    }
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    for (int done = 0; done < threads;) {
        std::shuffle(order.begin(), order.end(), random);
        done = 0;
        for (int t : order) {
            threadIdx.x = t;
            swapcontext(&scheduler, &coroutines[t].context);
            done += coroutines[t].done;
        }
        if (done && done < threads) throw std::runtime_error("some threads skip a barrier");
    }
}

// kernel<<<grid, threads>>>(arguments ...)
template <class Kernel, class... Arguments>
static void launch(dim3 grid, int threads, Kernel kernel, Arguments... arguments) {
    gridDim = grid;
    blockDim = dim3(threads);
    kernel_call = [=] { kernel(arguments...); };
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) run_block(threads);
}
