// What a kernel uses, on the CPU. The emulated nvcc includes it before a source, and makes each
// launch a call of launch() below.
//
// Blocks run one after the other. The threads of a block start in a random order. A thread that
// comes to __syncthreads() is left as a coroutine until all have come there; then they go on, in
// another random order. So a kernel in which a barrier is missing most often gives wrong results.

#pragma once
#include <csetjmp>
#include <ucontext.h>
#include <algorithm>
#include <math.h>  // names also outside of std
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "emulation_bits.h"

#define __shared__ static

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
const int warpSize = 32;

using std::max;
using std::min;

static inline int __float_as_int(float x) { return emulation_bits<int>(x); }
static inline float __int_as_float(int x) { return emulation_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return emulation_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return emulation_bits<double>(x); }

// Threads never run at the same time.
template <class T, class U> static inline T atomicAdd(T* p, U x) {
    T old = *p;
    *p = old + (T)x;
    return old;
}
template <class T, class U> static inline T atomicMax(T* p, U x) {
    T old = *p;
    if (old < (T)x) *p = (T)x;
    return old;
}
template <class T, class U> static inline T atomicMin(T* p, U x) {
    T old = *p;
    if ((T)x < old) *p = (T)x;
    return old;
}
template <class T, class U> static inline T atomicAnd(T* p, U x) {
    T old = *p;
    *p = old & (T)x;
    return old;
}
template <class T, class U> static inline T atomicOr(T* p, U x) {
    T old = *p;
    *p = old | (T)x;
    return old;
}
template <class T, class U> static inline T atomicXor(T* p, U x) {
    T old = *p;
    *p = old ^ (T)x;
    return old;
}
template <class T, class U, class V> static inline T atomicCAS(T* p, U expected, V x) {
    T old = *p;
    if (old == (T)expected) *p = (T)x;
    return old;
}

namespace emulation {

// Inline variables are the same ones in all libraries of a process.
struct Coroutine {
    ucontext_t start;
    jmp_buf place;  // where it goes on
    std::unique_ptr<char[]> stack;
};
inline std::vector<std::unique_ptr<Coroutine>> coroutines;
inline Coroutine* current;
inline std::vector<std::pair<int, Coroutine*>> waiting;  // threads at a barrier
inline jmp_buf scheduler;
inline std::mt19937 shuffler;
inline std::vector<int> order;  // of the block's threads
inline size_t started;          // so many of them
inline void (*kernel_body)(const void*);
inline const void* kernel_context;

inline void place_thread(int t) {
    threadIdx.x = t % blockDim.x;
    threadIdx.y = t / blockDim.x % blockDim.y;
    threadIdx.z = t / (blockDim.x * blockDim.y);
}

inline int thread_number() {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

// Runs threads one after the other, until one waits at a barrier or all have started.
inline void run_threads() {
    while (true) {
        while (started < order.size()) {
            place_thread(order[started++]);
            kernel_body(kernel_context);
        }
        _longjmp(scheduler, 1);
    }
}

// Runs a coroutine up to a barrier or the end of run_threads().
inline void resume(Coroutine* coroutine, bool from_start) {
    current = coroutine;
    if (_setjmp(scheduler)) return;
    if (from_start) setcontext(&coroutine->start);
    _longjmp(coroutine->place, 1);
}

inline void run_block(size_t threads) {
    order.resize(threads);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), shuffler);
    started = 0;
    for (size_t used = 0; started < threads; used++) {
        if (used == coroutines.size()) {
            const size_t bytes = 64 << 10;
            coroutines.emplace_back(new Coroutine);
            Coroutine& fresh = *coroutines.back();
            fresh.stack.reset(new char[bytes]);
            getcontext(&fresh.start);
            fresh.start.uc_stack.ss_sp = fresh.stack.get();
            fresh.start.uc_stack.ss_size = bytes;
            makecontext(&fresh.start, run_threads, 0);
        }
        resume(coroutines[used].get(), true);
    }
    while (!waiting.empty()) {
        if (waiting.size() < threads) {
            std::fprintf(stderr, "emulated CUDA: some threads skip a barrier\n");
            std::abort();
        }
        auto now = std::move(waiting);
        waiting.clear();
        std::shuffle(now.begin(), now.end(), shuffler);
        for (auto& [thread, coroutine] : now) {
            place_thread(thread);
            resume(coroutine, false);
        }
    }
}

template <class T> inline void collect(std::vector<const void*>& pointers, const T& argument) {
    if constexpr (std::is_pointer<T>::value) pointers.push_back(argument);
}

template <class Kernel> struct Launch {
    const char* name;
    Kernel kernel;
    dim3 grid, block;

    template <class... Arguments> void operator()(Arguments... arguments) const {
        std::vector<const void*> pointers;
        (collect(pointers, arguments), ...);
        if (!emulation_enter(name, grid, block, pointers.data(), pointers.size())) return;
        const auto call = [&] { kernel(arguments...); };
        kernel_body = [](const void* context) { (*(const decltype(call)*)context)(); };
        kernel_context = &call;
        gridDim = grid;
        blockDim = block;
        for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
            for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
                for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++)
                    run_block(block.x * block.y * block.z);
        emulation_leave();
    }
};

template <class Kernel>
Launch<Kernel> launch(const char* name, Kernel kernel, dim3 grid, dim3 block) {
    return {name, kernel, grid, block};
}

}  // namespace emulation

static inline void __syncthreads() {
    using namespace emulation;
    waiting.emplace_back(thread_number(), current);
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}
