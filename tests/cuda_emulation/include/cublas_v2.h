// The part of cuBLAS that Jittor uses. Matrices are column-major, as in Fortran.

#pragma once
#define CUBLAS_API_H_  // Jittor's helper_cuda.h looks at it
#include "cuda_runtime.h"

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_ARCH_MISMATCH = 8,
    CUBLAS_STATUS_MAPPING_ERROR = 11,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_INTERNAL_ERROR = 14,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
    CUBLAS_STATUS_LICENSE_ERROR = 16,
};
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_GEMM_DEFAULT_TENSOR_OP = 99 };
enum cublasComputeType_t {
    CUBLAS_COMPUTE_16F = 64,
    CUBLAS_COMPUTE_32F = 68,
    CUBLAS_COMPUTE_64F = 70,
    CUBLAS_COMPUTE_32F_FAST_16F = 74,
    CUBLAS_COMPUTE_32F_FAST_16BF = 75,
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77,
};
typedef struct Blas* cublasHandle_t;

extern "C" {
cublasStatus_t cublasCreate(cublasHandle_t*);
cublasStatus_t cublasDestroy(cublasHandle_t);
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t transpose_a,
        cublasOperation_t transpose_b, int m, int n, int k, const void* alpha, const void* a,
        cudaDataType, int lda, const void* b, cudaDataType, int ldb, const void* beta, void* c,
        cudaDataType, int ldc, cublasComputeType_t, cublasGemmAlgo_t);
cublasStatus_t cublasSgemm(cublasHandle_t, cublasOperation_t transpose_a,
        cublasOperation_t transpose_b, int m, int n, int k, const float* alpha, const float* a,
        int lda, const float* b, int ldb, const float* beta, float* c, int ldc);
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t transpose_a,
        cublasOperation_t transpose_b, int m, int n, int k, const void* alpha, const void* a,
        cudaDataType, int lda, long long stride_a, const void* b, cudaDataType, int ldb,
        long long stride_b, const void* beta, void* c, cudaDataType, int ldc, long long stride_c,
        int batch, cublasComputeType_t, cublasGemmAlgo_t);
}
