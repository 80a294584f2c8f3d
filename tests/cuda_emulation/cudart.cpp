// CUDA's runtime, cuBLAS, cuRAND and the driver, as far as Jittor uses them, on the CPU. All is
// done at once, in the order of the calls: streams and events mean nothing.
//
// Device memory is an arena that can be accessed while a kernel runs or a copy is made, and at no
// other time: if code of the host reads or writes it, the process ends with a segmentation fault.
// A kernel's pointers have to be to device memory, and a copy's to the kinds of memory that it
// says. New device memory holds numbers that no result should contain.
//
// If EMULATION_REPORT names a file, a line of JSON is appended to it when the process ends: how
// many kernels were launched, synchronisations made, and copies to and from the device.
// EMULATION_TRACE=1 writes each of them to standard error.

#include <sys/mman.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "include/cublas_v2.h"
#include "include/cuda_bf16.h"
#include "include/curand.h"

namespace {

const size_t ARENA = 16ull << 30,
             PAGE = 4096;  // bytes of addresses; memory is used as it is touched
const int GARBAGE = 0x7f;  // as a float, 3.4e38

std::recursive_mutex mutex;
char* arena;
size_t used;                         // bytes of the arena that were ever allocated
std::multimap<size_t, char*> freed;  // by size
std::map<char*, size_t> allocated;
int inside;  // kernels and copies that run
cudaError_t last_error;
std::mt19937_64 random_engine;
const bool tracing = std::getenv("EMULATION_TRACE");

struct Counts {
    long launches, syncs, to_device, to_host, bytes_to_device, bytes_to_host;
} counts;

void write_report() {
    const char* path = std::getenv("EMULATION_REPORT");
    FILE* file = path ? std::fopen(path, "a") : nullptr;
    if (!file) return;
    std::fprintf(file,
            "{\"launches\": %ld, \"syncs\": %ld, \"to_device\": %ld, \"to_host\": %ld, "
            "\"bytes_to_device\": %ld, \"bytes_to_host\": %ld}\n",
            counts.launches, counts.syncs, counts.to_device, counts.to_host, counts.bytes_to_device,
            counts.bytes_to_host);
    std::fclose(file);
}

// The operating system calls what libraries register first at the very end.
const int registered = std::atexit(write_report);

[[noreturn]] void fail(const char* what, const char* where) {
    std::fprintf(stderr, "emulated CUDA: %s: %s\n", where, what);
    std::abort();
}

bool on_device(const void* p) { return arena && (char*)p >= arena && (char*)p < arena + ARENA; }

void begin_access() {
    mutex.lock();
    if (!inside++ && used) mprotect(arena, used, PROT_READ | PROT_WRITE);
}
void end_access() {
    if (!--inside && used) mprotect(arena, used, PROT_NONE);
    mutex.unlock();
}
struct Access {
    Access() { begin_access(); }
    ~Access() { end_access(); }
};

void count_launch(const char* name) {
    counts.launches++;
    if (tracing) std::fprintf(stderr, "emulated CUDA: launch of %s\n", name);
}

cudaError_t refuse(cudaError_t error) { return last_error = error; }

float number(const void* p, cudaDataType type, size_t i) {
    return type == CUDA_R_32F ? ((const float*)p)[i] : (float)((const __nv_bfloat16*)p)[i];
}

// c (m, n) = alpha a b + beta c, column-major.
void multiply(bool transpose_a, bool transpose_b, int m, int n, int k, float alpha, const void* a,
        int lda, const void* b, int ldb, float beta, void* c, int ldc, cudaDataType type) {
    std::vector<float> columns((size_t)m * k), column(m);  // columns of op(a)
    for (int l = 0; l < k; l++)
        for (int i = 0; i < m; i++)
            columns[(size_t)l * m + i] =
                    number(a, type, transpose_a ? l + (size_t)i * lda : i + (size_t)l * lda);
    for (int j = 0; j < n; j++) {
        std::fill(column.begin(), column.end(), 0.f);
        for (int l = 0; l < k; l++) {
            const float x =
                    number(b, type, transpose_b ? j + (size_t)l * ldb : l + (size_t)j * ldb);
            for (int i = 0; i < m; i++) column[i] += columns[(size_t)l * m + i] * x;
        }
        for (int i = 0; i < m; i++) {
            const size_t at = i + (size_t)j * ldc;
            const float x = alpha * column[i] + (beta ? beta * number(c, type, at) : 0);
            if (type == CUDA_R_32F)
                ((float*)c)[at] = x;
            else
                ((__nv_bfloat16*)c)[at] = x;
        }
    }
}

template <class T, class Distribution>
curandStatus_t draw(T* p, size_t n, Distribution distribution) {
    if (!on_device(p)) fail("the memory is not on the device", "curandGenerate");
    count_launch("curandGenerate");
    Access access;
    for (size_t i = 0; i < n; i++) p[i] = distribution(random_engine);
    return CURAND_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

// The emulation's own.

bool emulation_enter(
        const char* kernel, dim3 grid, dim3 block, const void* const* pointers, int n) {
    const size_t threads = (size_t)block.x * block.y * block.z;
    if (!threads || threads > 1024 || block.z > 64 || !grid.x || !grid.y || !grid.z ||
            grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        refuse(cudaErrorInvalidConfiguration);
        return false;
    }
    // Without device memory, a test runs a kernel on numbers of the host.
    for (int i = 0; i < n && arena; i++)
        if (pointers[i] && !on_device(pointers[i])) fail("a pointer to the host's memory", kernel);
    count_launch(kernel);
    begin_access();
    return true;
}
void emulation_leave() { end_access(); }
void emulation_counts(long* to) { std::memcpy(to, &counts, sizeof counts); }

// Runtime.

cudaError_t cudaMalloc(void** p, size_t n) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    if (!arena)
        arena = (char*)mmap(nullptr, ARENA, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    n = (n + PAGE - 1) / PAGE * PAGE;
    const auto found = freed.find(n);
    if (found != freed.end()) {
        *p = found->second;
        freed.erase(found);
    } else {
        if (used + n > ARENA) return refuse(cudaErrorMemoryAllocation);
        *p = arena + used;
        used += n;
    }
    allocated[(char*)*p] = n;
    Access access;
    std::memset(*p, GARBAGE, n);
    return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    const auto found = allocated.find((char*)p);
    if (found == allocated.end()) return p ? refuse(cudaErrorInvalidValue) : cudaSuccess;
    freed.emplace(found->second, found->first);
    allocated.erase(found);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t n) {
    *p = std::aligned_alloc(PAGE, (n + PAGE - 1) / PAGE * PAGE);
    return *p ? cudaSuccess : refuse(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* p) {
    std::free(p);
    return cudaSuccess;
}
cudaError_t cudaMallocManaged(void** p, size_t n, unsigned) { return cudaMallocHost(p, n); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
    const bool onto = on_device(to), off = on_device(from);
    if (kind != cudaMemcpyDefault &&
            kind != (onto ? off ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice
                            : off ? cudaMemcpyDeviceToHost
                                  : cudaMemcpyHostToHost))
        fail("the memory is not of the kind that the copy names", "cudaMemcpy");
    if (onto && off)
        count_launch("cudaMemcpy");
    else if (onto)
        counts.to_device++, counts.bytes_to_device += n;
    else if (off)
        counts.to_host++, counts.bytes_to_host += n;
    if (tracing && onto != off)
        std::fprintf(stderr, "emulated CUDA: %zu bytes to the %s\n", n, onto ? "device" : "host");
    Access access;
    std::memmove(to, from, n);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(
        void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, n, kind);
}
cudaError_t cudaMemset(void* p, int value, size_t n) {
    if (!on_device(p)) fail("the memory is not on the device", "cudaMemset");
    count_launch("cudaMemset");
    Access access;
    std::memset(p, value, n);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t) {
    return cudaMemset(p, value, n);
}
cudaError_t cudaDeviceSynchronize() {
    counts.syncs++;
    if (tracing) std::fprintf(stderr, "emulated CUDA: synchronisation\n");
    return cudaSuccess;
}
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {
            "an emulation on the CPU", ARENA, 8, 0, cudaComputeModeDefault, 1000, 8, 32, 1024};
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "cudaSuccess";
        case cudaErrorInvalidValue:
            return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation:
            return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidConfiguration:
            return "cudaErrorInvalidConfiguration";
    }
    return "unknown error";
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *free = ARENA - used;
    *total = ARENA;
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = nullptr;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = nullptr;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* argument) {
    function(argument);
    return cudaSuccess;
}

// cuBLAS, for float32 and bfloat16; sums are float32.

cublasStatus_t cublasCreate(cublasHandle_t* handle) {
    *handle = (cublasHandle_t)1;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t transpose_a,
        cublasOperation_t transpose_b, int m, int n, int k, const void* alpha, const void* a,
        cudaDataType type, int lda, long long stride_a, const void* b, cudaDataType type_b, int ldb,
        long long stride_b, const void* beta, void* c, cudaDataType type_c, int ldc,
        long long stride_c, int batch, cublasComputeType_t compute, cublasGemmAlgo_t) {
    if (type != type_b || type != type_c || (type != CUDA_R_32F && type != CUDA_R_16BF) ||
            compute != CUBLAS_COMPUTE_32F)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (m < 0 || n < 0 || k < 0 || batch < 0 || lda < std::max(1, transpose_a ? k : m) ||
            ldb < std::max(1, transpose_b ? n : k) || ldc < std::max(1, m))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (!on_device(a) || !on_device(b) || !on_device(c))
        fail("a matrix is not on the device", "cublasGemmEx");
    count_launch("cublasGemmEx");
    Access access;
    const size_t size = type == CUDA_R_32F ? 4 : 2;
    for (int i = 0; i < batch; i++)
        multiply(transpose_a, transpose_b, m, n, k, *(const float*)alpha,
                (const char*)a + i * stride_a * size, lda, (const char*)b + i * stride_b * size,
                ldb, *(const float*)beta, (char*)c + i * stride_c * size, ldc, type);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transpose_a,
        cublasOperation_t transpose_b, int m, int n, int k, const void* alpha, const void* a,
        cudaDataType type, int lda, const void* b, cudaDataType type_b, int ldb, const void* beta,
        void* c, cudaDataType type_c, int ldc, cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    return cublasGemmStridedBatchedEx(handle, transpose_a, transpose_b, m, n, k, alpha, a, type,
            lda, 0, b, type_b, ldb, 0, beta, c, type_c, ldc, 0, 1, compute, algo);
}

cublasStatus_t cublasSgemm(cublasHandle_t handle, cublasOperation_t transpose_a,
        cublasOperation_t transpose_b, int m, int n, int k, const float* alpha, const float* a,
        int lda, const float* b, int ldb, const float* beta, float* c, int ldc) {
    return cublasGemmEx(handle, transpose_a, transpose_b, m, n, k, alpha, a, CUDA_R_32F, lda, b,
            CUDA_R_32F, ldb, beta, c, CUDA_R_32F, ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

// cuRAND, with another generator.

curandStatus_t curandCreateGenerator(curandGenerator_t* generator, curandRngType_t) {
    *generator = (curandGenerator_t)1;
    return CURAND_STATUS_SUCCESS;
}
curandStatus_t curandDestroyGenerator(curandGenerator_t) { return CURAND_STATUS_SUCCESS; }
curandStatus_t curandSetPseudoRandomGeneratorSeed(curandGenerator_t, unsigned long long seed) {
    random_engine.seed(seed);
    return CURAND_STATUS_SUCCESS;
}
curandStatus_t curandGenerateUniform(curandGenerator_t, float* p, size_t n) {
    return draw(p, n, std::uniform_real_distribution<float>());
}
curandStatus_t curandGenerateUniformDouble(curandGenerator_t, double* p, size_t n) {
    return draw(p, n, std::uniform_real_distribution<double>());
}
curandStatus_t curandGenerateNormal(
        curandGenerator_t, float* p, size_t n, float mean, float deviation) {
    if (n % 2) return CURAND_STATUS_LENGTH_NOT_MULTIPLE;
    return draw(p, n, std::normal_distribution<float>(mean, deviation));
}
curandStatus_t curandGenerateNormalDouble(
        curandGenerator_t, double* p, size_t n, double mean, double deviation) {
    if (n % 2) return CURAND_STATUS_LENGTH_NOT_MULTIPLE;
    return draw(p, n, std::normal_distribution<double>(mean, deviation));
}

// The driver, as far as it is asked for a GPU: 12.4, and one of compute capability 8.0.

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 12040, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int which) { return *device = which, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    return *value = attribute == 75 ? 8 : 0, 0;  // the major and (76) the minor number
}

}  // extern "C"
