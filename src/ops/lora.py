"""LoRA's way up, from rank r back to the width of the enabled projections, and its dropout."""

from __future__ import annotations

import jittor as jt
import numpy as np

from ops.native import run, wants_plain

# Columns are what there are many of: all loops run along them, over lora_B transposed.
_HEADER = r"""
    static std::vector<float> transposed(const float* from, int64_t rows, int64_t columns) {
        std::vector<float> to(rows * columns);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < columns; j++) to[j * rows + i] = from[i * columns + j];
        return to;
    }
"""
# in0: y (N, out), in1: bias (out), in2: low (N, r * groups), in3: lora_B (width * groups, r),
# in4: for each group the first column of its projection
_LORA_UP = r"""
    const int C = in0_shape1, R = in3_shape1, groups = in4_shape0, width = in3_shape0 / groups;
    const auto up = transposed(in3_p, in3_shape0, R);  // (r, width * groups)
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++) {
        float* out = out0_p + (int64)n * C;
        for (int c = 0; c < C; c++) out[c] = in0_p[(int64)n * C + c] + in1_p[c];
        for (int group = 0; group < groups; group++)
            for (int r = 0; r < R; r++) {
                const float low = in2_p[((int64)n * groups + group) * R + r] * scaling;
                const float* row = up.data() + ((int64)r * groups + group) * width;
                float* part = out + in4_p[group];
                for (int c = 0; c < width; c++) part[c] += low * row[c];
            }
    }
"""
# in0: gradient (N, out), in1: low, in2: lora_B, in3: columns
_GRAD_LOW = r"""
    const int C = in0_shape1, R = in2_shape1, groups = in3_shape0, width = in2_shape0 / groups;
    const auto up = transposed(in2_p, in2_shape0, R);
    #pragma omp parallel for
    for (int n = 0; n < in0_shape0; n++)
        for (int group = 0; group < groups; group++)
            for (int r = 0; r < R; r++) {
                const float* g = in0_p + (int64)n * C + in3_p[group];
                const float* row = up.data() + ((int64)r * groups + group) * width;
                float sum = 0;
                for (int c = 0; c < width; c++) sum += g[c] * row[c];
                out0_p[((int64)n * groups + group) * R + r] = sum * scaling;
            }
"""
_GRAD_B = r"""
    const int C = in0_shape1, R = in2_shape1, groups = in3_shape0, width = in2_shape0 / groups;
    const int piece = 256, pieces = (width + piece - 1) / piece;
    #pragma omp parallel for
    for (int item = 0; item < groups * pieces; item++) {
        const int group = item / pieces, from = item % pieces * piece;
        const int count = std::min(piece, width - from);
        std::vector<float> sums(R * count);  // (r, count)
        for (int n = 0; n < in0_shape0; n++)
            for (int r = 0; r < R; r++) {
                const float* g = in0_p + (int64)n * C + in3_p[group] + from;
                const float low = in1_p[((int64)n * groups + group) * R + r] * scaling;
                for (int c = 0; c < count; c++) sums[r * count + c] += low * g[c];
            }
        float* up = out0_p + ((int64)group * width + from) * R;
        for (int c = 0; c < count; c++)
            for (int r = 0; r < R; r++) up[c * R + r] = sums[r * count + c];
    }
"""
# Inputs as above. Forward a thread for each number; the gradient of low a block for each row,
# that of lora_B a block for each 32 columns and each r, 8 threads a column.
_KERNELS = r"""
    __global__ static void up(const float* y, const float* bias, const float* low, const float* B,
                              const int* columns, int64_t count, int C, int R, int groups,
                              int width, float scaling, float* out) {
        const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, n = i / C;
        if (i >= count) return;
        const int c = i % C;
        float sum = 0;
        for (int group = 0; group < groups; group++) {
            const int column = c - columns[group];
            if (column < 0 || column >= width) continue;
            for (int r = 0; r < R; r++)
                sum += low[(n * groups + group) * R + r] * B[(group * width + column) * R + r];
        }
        out[i] = y[i] + bias[c] + sum * scaling;
    }
    __global__ static void grad_of_low(const float* grad, const float* B, const int* columns,
                                       int C, int R, int groups, int width, float scaling,
                                       float* grad_low) {
        const int64_t n = blockIdx.x;
        for (int item = 0; item < groups * R; item++) {
            const int group = item / R, r = item % R;
            const float* g = grad + n * C + columns[group];
            float sum = 0;
            for (int c = threadIdx.x; c < width; c += THREADS)
                sum += g[c] * B[(group * width + c) * R + r];
            sum = sum_of(sum);
            if (threadIdx.x == 0) grad_low[n * groups * R + item] = sum * scaling;
        }
    }
    __global__ static void grad_of_B(const float* grad, const float* low, const int* columns,
                                     int N, int C, int R, int groups, int width, float scaling,
                                     float* grad_B) {
        const int row = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;  // of B
        const int group = row / width, r = blockIdx.y;
        const bool real = group < groups;
        const int c = real ? columns[group] + row % width : 0;
        float sum = 0;
        for (int64_t n = threadIdx.x / COLUMNS; n < N && real; n += THREADS / COLUMNS)
            sum += low[(n * groups + group) * R + r] * grad[n * C + c];
        sum = sum_of(sum, COLUMNS);
        if (threadIdx.x < COLUMNS && real) grad_B[row * R + r] = sum * scaling;
    }
"""
_CUDA = (_KERNELS, r"""
    const int groups = in4_shape0;
    up<<<blocks_for(in0->num), THREADS>>>(
        in0_p, in1_p, in2_p, in3_p, in4_p, in0->num, in0_shape1, in3_shape1, groups,
        in3_shape0 / groups, scaling, out0_p);
""")
_GRAD_LOW_CUDA = (_KERNELS, r"""
    const int groups = in3_shape0;
    grad_of_low<<<in0_shape0, THREADS>>>(in0_p, in2_p, in3_p, in0_shape1, in2_shape1, groups,
                                         in2_shape0 / groups, scaling, out0_p);
""")
_GRAD_B_CUDA = (_KERNELS, r"""
    const int groups = in3_shape0;
    const dim3 grid((in2_shape0 + COLUMNS - 1) / COLUMNS, in2_shape1);
    grad_of_B<<<grid, THREADS>>>(in0_p, in1_p, in3_p, in0_shape0, in0_shape1, in2_shape1, groups,
                                 in2_shape0 / groups, scaling, out0_p);
""")


class _LoRAUp(jt.Function):
    def execute(self, y, bias, low, lora_B, scaling, columns):
        columns = jt.array(np.int32(columns))
        self.saved = [low, lora_B, columns], scaling
        return run(y.shape, [y, bias, low, lora_B, columns], _LORA_UP, _HEADER,
                   _CUDA, scaling=float(scaling))

    def grad(self, grad):
        inputs, scaling = self.saved
        grad_low, grad_B = (run(inputs[i].shape, [grad, *inputs], source, _HEADER, cuda,
                                scaling=float(scaling))
                            for i, (source, cuda) in enumerate(((_GRAD_LOW, _GRAD_LOW_CUDA),
                                                                (_GRAD_B, _GRAD_B_CUDA))))
        return grad, grad.sum(dim=0), grad_low, grad_B, None, None


def lora_up(y: jt.Var, bias: jt.Var, low: jt.Var, lora_B: jt.Var, scaling: float,
            columns: list[int]) -> jt.Var:
    """y (N, out) + bias (out,) + scaling * low lora_B^T in the columns of the enabled projections.

    low (N, r * groups), lora_B (width * groups, r); group g adds its (N, width) from columns[g] on.
    """
    if wants_plain():
        return plain_lora_up(y, bias, low, lora_B, scaling, columns)
    return _LoRAUp.apply(y, bias, low, lora_B, scaling, columns)


def plain_lora_up(y: jt.Var, bias: jt.Var, low: jt.Var, lora_B: jt.Var, scaling: float,
                  columns: list[int]) -> jt.Var:
    """:func:`lora_up` in Jittor's own operators."""
    rank, width = lora_B.shape[1], lora_B.shape[0] // len(columns)
    parts, end = [], 0
    for group, column in enumerate(columns):
        if column > end:
            parts.append(jt.zeros((y.shape[0], column - end)))
        own = low[:, group * rank:(group + 1) * rank]  # (N, r)
        parts.append(jt.nn.matmul_transpose(own, lora_B[group * width:(group + 1) * width]))
        end = column + width
    if end < y.shape[1]:
        parts.append(jt.zeros((y.shape[0], y.shape[1] - end)))
    return y + bias + jt.concat(parts, dim=1) * scaling


_KEEP = r"""
    static inline __attribute__((always_inline)) QUALIFIER
    float keep_scale(uint32_t i, uint32_t seed, float p) {
        uint32_t h = i * 0x9E3779B9u ^ seed;  // mixed by Wellons' "lowbias32" (2018)
        h ^= h >> 16; h *= 0x7FEB352Du; h ^= h >> 15; h *= 0x846CA68Bu; h ^= h >> 16;
        return (h >> 8) * (1.f / 16777216.f) < p ? 0.f : 1.f / (1.f - p);
    }
"""
_DROPOUT_CPU = r"""
    #pragma omp parallel for
    for (int64 i = 0; i < in0->num; i++) out0_p[i] = in0_p[i] * keep_scale(i, seed, p);
"""
_DROPOUT_CUDA = (_KEEP.replace("QUALIFIER", "__device__") + r"""
    __global__ static void dropout(const float* x, int64_t count, uint32_t seed, float p,
                                   float* y) {
        const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
        if (i < count) y[i] = x[i] * keep_scale(i, seed, p);
    }
""", r"""
    dropout<<<blocks_for(in0->num), THREADS>>>(in0_p, in0->num, seed, p, out0_p);
""")


class _Dropout(jt.Function):
    def execute(self, x, p, seed):
        self.settings = {"p": float(p), "seed": seed}
        return self._masked(x)

    def grad(self, grad):
        return self._masked(grad), None, None

    def _masked(self, x):
        return run(x.shape, [x], _DROPOUT_CPU, _KEEP.replace("QUALIFIER", ""),
                   _DROPOUT_CUDA, **self.settings)


def dropout(x: jt.Var, p: float, seed: int) -> jt.Var:
    """Zeroes each element of x (N, C) with probability p and scales the rest by 1 / (1 - p).

    The mask is a function of ``seed`` (int32 >= 0) and the element's position alone, the same on
    every device.
    """
    return _Dropout.apply(x, p, seed)
