"""Operators for which Jittor's own are too slow on the CPU, forward and backward.

On the CPU, Jittor runs element-wise loops, reductions and batched matrix products on one thread and
in several passes over memory. Each operator here is one parallel pass in C++. Its ``plain_`` twin,
made of Jittor's own operators, is its reference in the tests and what runs on CUDA.

All operators but linear and pack_weight have CUDA kernels as well; the environment variable
``OPS_CUDA=kernels`` makes them run in place of the plain twins (``OPS_CUDA=plain`` is the default).
The kernels have not run on a GPU yet: nvcc compiles them, and the tests run their text on the CPU,
where a GPU's threads are emulated. On a machine with a GPU, tests/test_cuda.py runs them there.
dropout has no plain twin and runs its kernel on CUDA, because its mask must be the same on every
device. All tensors are float32, except indices (int32).
"""

from ops.adamw_update import adamw_update, plain_adamw_update
from ops.beam_attention import beam_attention, plain_beam_attention
from ops.bias_gelu import bias_gelu, plain_bias_gelu
from ops.causal_attention import MASKED, causal_attention, plain_causal_attention, plain_softmax
from ops.cross_entropy import cross_entropy, plain_cross_entropy
from ops.dropout import dropout
from ops.layer_norm import layer_norm, plain_layer_norm
from ops.linear import linear, pack_weight, plain_linear
from ops.lora_up import lora_up, plain_lora_up
from ops.top_log_probs import plain_top_log_probs, top_log_probs

__all__ = ["MASKED", "adamw_update", "beam_attention", "bias_gelu", "causal_attention",
           "cross_entropy", "dropout", "layer_norm", "linear", "lora_up", "pack_weight",
           "plain_adamw_update", "plain_beam_attention", "plain_bias_gelu",
           "plain_causal_attention", "plain_cross_entropy", "plain_layer_norm", "plain_linear",
           "plain_lora_up", "plain_softmax", "plain_top_log_probs", "top_log_probs"]
