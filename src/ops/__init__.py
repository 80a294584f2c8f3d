"""Operators for which Jittor's own are too slow on the CPU, forward and backward.

On the CPU, Jittor runs element-wise loops, reductions and batched matrix products on one thread and
in several passes over memory. Each operator here is one parallel pass in C++. Its ``plain_`` twin,
made of Jittor's own operators, is its reference in the tests.

All operators but those of linear, which cuBLAS multiplies, have CUDA kernels as well. If the
environment variable OPS_CUDA is ``plain``, the plain twins run on CUDA in their place (default:
``kernels``). No GPU has run either of them yet: nvcc compiles the kernels, and the tests run all on
the CPU with tests/cuda_emulation. Always a kernel are dropout, because its mask must be the same on
every device, and top_log_probs, because its plain twin is NumPy. All tensors are float32, except
indices (int32).
"""

from ops.adamw_update import adamw_update, plain_adamw_update
from ops.beam_attention import beam_attention, plain_beam_attention
from ops.bias_gelu import bias_gelu, plain_bias_gelu
from ops.causal_attention import MASKED, causal_attention, plain_causal_attention, plain_softmax
from ops.cross_entropy import cross_entropy, plain_cross_entropy
from ops.dropout import dropout
from ops.layer_norm import layer_norm, plain_layer_norm
from ops.linear import PackedWeight, linear, pack_weight, packed_columns, plain_linear
from ops.lora_up import lora_up, plain_lora_up
from ops.matmul import matmul
from ops.native import upload
from ops.top_log_probs import plain_log_probs, plain_top_log_probs, top_log_probs
