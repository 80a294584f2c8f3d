"""Operators that Jittor's own are too slow for on the CPU, forward and backward.

There Jittor runs element-wise loops, reductions and batched matrix products on one thread and in
several passes over memory. Each operator here is one parallel pass in C++. The ``plain_`` twin
beside each, made of Jittor's own operators, is the reference in tests, and what is used on CUDA.

Each but linear and pack_weight has CUDA kernels, too, which the environment variable
``OPS_CUDA=kernels`` turns on (``OPS_CUDA=plain``, the default, leaves them off). nvcc compiles
them, and tests run their text on the CPU with a GPU's threads emulated, but no GPU has run them
yet: tests/test_cuda.py does where there is one. dropout, the same mask on every device, is always
our own. All tensors are float32.
"""

from ops.adamw import adamw_update, plain_adamw_update
from ops.attention import MASKED, causal_attention, plain_causal_attention, plain_softmax
from ops.beam_attention import beam_attention, plain_beam_attention
from ops.gelu import bias_gelu, plain_bias_gelu
from ops.layer_norm import layer_norm, plain_layer_norm
from ops.linear import linear, pack_weight, plain_linear
from ops.lora import dropout, lora_up, plain_lora_up
from ops.loss import cross_entropy, plain_cross_entropy
from ops.top import plain_top_log_probs, top_log_probs

__all__ = ["MASKED", "adamw_update", "beam_attention", "bias_gelu", "causal_attention",
           "cross_entropy", "dropout", "layer_norm", "linear", "lora_up", "pack_weight",
           "plain_adamw_update", "plain_beam_attention", "plain_bias_gelu",
           "plain_causal_attention", "plain_cross_entropy", "plain_layer_norm", "plain_linear",
           "plain_lora_up", "plain_softmax", "plain_top_log_probs", "top_log_probs"]
