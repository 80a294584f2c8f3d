"""The floating-point operations that a micro-batch of LoRA training needs, whoever computes it.

Counted are the multiplications and additions of matrix products, 2 K for each of the M x N
results; what is done element by element (GELU, softmax, LayerNorm, dropout, AdamW) is not, nor is
anything computed twice. And only what the result depends on:

- no padding, and no token behind a sample's last target;
- logits only of positions that have a target;
- attention looks left: position i has i + 1 keys;
- the last layer's keys and values serve all positions, its query and all behind it only those
  that have a target;
- frozen weights need no gradient, and below the first layer's LoRA matrices nothing does: not
  its key, not its input.

Names: C = n_embd, V = vocab_size, r = LoRA's rank; LoRA is on query and value.
"""

from __future__ import annotations

import numpy as np

from shared import GPT2Config


def micro_batch(mask: np.ndarray, config: GPT2Config, r: int) -> int:
    """FLOPs of the forward and backward pass of a batch; ``mask`` (B, T) is 1 at its targets."""
    return sum(_sample(np.flatnonzero(row), config, r) for row in mask if row.any())


def _sample(targets: np.ndarray, config: GPT2Config, r: int) -> int:
    """Of one sample, whose ``targets`` are the positions that have one, rising."""
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
    """Of one block: keys and values of ``tokens``, ``pairs`` of query and key, ``rows`` beyond."""
    square = 2 * width * width  # one row times a C x C matrix
    thin = 2 * width * r  # one row times a C x r matrix
    qkv = (rows + 2 * tokens) * square
    rest = rows * (1 + 8) * square  # attention's projection, and an MLP 4 C wide
    lora = (rows + tokens) * thin  # one of LoRA's products, on query and value
    attend = 2 * pairs * width  # one of attention's products
    forward = qkv + rest + 2 * lora + 2 * attend
    # LoRA: gradients of B, of A and of what is between. Attention: of value, weights, query.
    backward = rest + 3 * lora + 3 * attend
    if not first:  # of the input through W and through A, of the key
        backward += qkv + lora + attend
    return forward + backward


def matmul(m: int, k: int, n: int) -> int:
    """FLOPs of an (m, k) x (k, n) product."""
    return 2 * m * k * n
