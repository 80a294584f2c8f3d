"""Operators for which Jittor's own are too slow on the CPU, forward and backward.

On the CPU, Jittor runs element-wise loops, reductions and batched matrix products on one thread and
in several passes over memory. Each operator here is one parallel pass in C++. Its ``plain_`` twin,
made of Jittor's own operators, is its reference in the tests and what runs on CUDA.

All operators but those of linear have CUDA kernels as well, which run in place of the plain
twins if the environment variable OPS_CUDA is ``kernels`` (default: ``plain``). No GPU has run them
yet: nvcc compiles them, and the tests run their text on the CPU under an emulation. dropout has no
plain twin, because its mask must be the same on every device. All tensors are float32, except
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
from ops.top_log_probs import plain_log_probs, plain_top_log_probs, top_log_probs
