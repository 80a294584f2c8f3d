"""The floating-point operations that a micro-batch of LoRA training needs in any program.

The count is the multiplications and additions of matrix products, 2 K for each of the M x N
results. Element-wise operations (GELU, softmax, LayerNorm, dropout, AdamW) are not counted, and
nothing is counted twice. The count includes only what the result depends on:

- no padding, and no token after a sample's last target;
- logits only of positions that have a target;
- attention is causal: position i has i + 1 keys;
- the last layer needs keys and values of all positions, but the query and everything after it
  only of those that have a target;
- frozen weights need no gradient, and nothing below the first layer's LoRA matrices needs one:
  neither its key nor its input.

Names: C = n_embd, V = vocab_size, r = LoRA's rank; LoRA is on query and value.
"""

from __future__ import annotations

import numpy as np

from shared import GPT2Config


def micro_batch(mask: np.ndarray, config: GPT2Config, r: int) -> int:
    """FLOPs of the forward and backward pass of a batch; ``mask`` (B, T) is 1 at its targets."""
    return sum(_sample(np.flatnonzero(row), config, r) for row in mask if row.any())


def _sample(targets: np.ndarray, config: GPT2Config, r: int) -> int:
    """FLOPs of a sample; ``targets`` are the positions that have a target, in ascending order."""
    tokens = int(targets[-1]) + 1
    head = 2 * len(targets) * config.n_embd * config.vocab_size
    total = 2 * head  # the logits, and the gradient of their input
    for layer in range(config.n_layer):
        if layer < config.n_layer - 1:
            rows, pairs = tokens, tokens * (tokens + 1) // 2
        else:
            rows, pairs = len(targets), int((targets + 1).sum())
        total += _layer(tokens, rows, pairs, config.n_embd, r, first=layer == 0)
    return total


def _layer(tokens: int, rows: int, pairs: int, width: int, r: int, first: bool) -> int:
    """FLOPs of a layer: ``tokens`` keys and values, ``pairs`` in attention, ``rows`` otherwise."""
    square = 2 * width * width  # one row times a C x C matrix
    thin = 2 * width * r  # one row times a C x r matrix
    qkv = (rows + 2 * tokens) * square
    rest = rows * (1 + 8) * square  # attention's projection, and an MLP 4 C wide
    lora = (rows + tokens) * thin  # one of LoRA's products, on query and value
    attend = 2 * pairs * width  # one of attention's products
    forward = qkv + rest + 2 * lora + 2 * attend
    # LoRA: gradients of B, A and x A. Attention: gradients of value, weights and query.
    backward = rest + 3 * lora + 3 * attend
    if not first:  # gradients of the input (through W and A) and of the key
        backward += qkv + lora + attend
    return forward + backward


def matmul(m: int, k: int, n: int) -> int:
    """FLOPs of an (m, k) x (k, n) product."""
    return 2 * m * k * n
