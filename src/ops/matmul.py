"""Products of two matrices by the library of the device: oneDNN on the CPU, cuBLAS on CUDA.

Jittor's own ``matmul`` is a loop, which its tuner replaces by the same library call. But its tuner
runs in several compiler threads at once, and each of them changes the lists of users that the
product's inputs keep. If two products share an input, that ends one start in some hundred in a
segmentation fault. A library call that is made here has nothing to be tuned.
"""

import jittor as jt


def matmul(a: jt.Var, b: jt.Var, transpose_a: bool = False, transpose_b: bool = False) -> jt.Var:
    """a b, where a (N, K) and b (K, M) are given as they are or transposed; float32 -> (N, M)."""
    return _MatMul.apply(a, b, transpose_a, transpose_b)


class _MatMul(jt.Function):
    def execute(self, a, b, transpose_a, transpose_b):
        self.saved = a, b, transpose_a, transpose_b
        return _product(a, b, transpose_a, transpose_b)

    def grad(self, dy):
        a, b, transpose_a, transpose_b = self.saved
        da = (_product(b, dy, transpose_b, True) if transpose_a else
              _product(dy, b, False, not transpose_b))
        db = (_product(dy, a, True, transpose_a) if transpose_b else
              _product(a, dy, not transpose_a, False))
        return da, db, None, None


def _product(a: jt.Var, b: jt.Var, transpose_a: bool, transpose_b: bool) -> jt.Var:
    external = jt.compile_extern
    library, name = ((external.cublas_ops, "cublas_matmul") if jt.flags.use_cuda else
                     (external.mkl_ops, "mkl_matmul"))
    if library:
        return getattr(library, name)(a, b, transpose_a, transpose_b)
    return jt.matmul(a.transpose() if transpose_a else a, b.transpose() if transpose_b else b)
