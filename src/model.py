"""GPT-2 (Radford et al., 2019) with LoRA on the query and value of its attention.

Shapes in comments: B samples, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

from functools import partial
from typing import Callable

import jittor as jt
import numpy as np
from jittor import nn

import loralib as lora
import ops
from config import GPT2Config, LoRAConfig

Attend = Callable[[int, jt.Var], jt.Var]


class LayerNorm(nn.Module):
    def __init__(self, n_embd: int, epsilon: float):
        self.weight = jt.ones(n_embd)
        self.bias = jt.zeros(n_embd)
        self.epsilon = epsilon

    def execute(self, x):  # (N, C)
        return ops.layer_norm(x, self.weight, self.bias, self.epsilon)


class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as GPT-2's checkpoints hold it."""

    def __init__(self, n_in: int, n_out: int):
        self.weight = jt.init.gauss((n_in, n_out), mean=0.0, std=0.02)
        self.bias = jt.zeros(n_out)

    def execute(self, x, residual):  # (N, n_in), (N, n_out) -> (N, n_out)
        return ops.linear(x, self.weight, self.bias, residual)

    def gelu(self, x):  # (N, n_in) -> GELU of the layer (N, n_out)
        return ops.bias_gelu(ops.linear(x, self.weight), self.bias)


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        self.n_head = config.n_head
        self.c_attn = lora.MergedLinear(
            config.n_embd, 3 * config.n_embd, r=lora_config.r, lora_alpha=lora_config.alpha,
            lora_dropout=lora_config.dropout, enable_lora=(True, False, True))
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def execute(self, x, attend, residual, rows=None):  # (N, C), function, (N, C), (M,)
        qkv = self.c_attn(x).reshape((x.shape[0], 3, self.n_head, -1))  # (N, 3, H, D)
        mixed = attend(qkv).reshape(x.shape)  # (N, C)
        if rows is not None:
            mixed, residual = mixed[rows], residual[rows]  # (M, C)
        return self.c_proj(mixed, residual)


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        self.c_fc = Conv1D(config.n_embd, 4 * config.n_embd)
        self.c_proj = Conv1D(4 * config.n_embd, config.n_embd)

    def execute(self, x, residual):
        return self.c_proj(self.c_fc.gelu(x), residual)


class Block(nn.Module):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, lora_config)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def execute(self, x, attend, rows=None):  # (N, C) -> (N, C), or (M, C) of the M rows
        x = self.attn(self.ln_1(x), attend, x, rows)
        return self.mlp(self.ln_2(x), residual=x)


class GPT2Model(nn.Module):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.wte.weight = jt.init.gauss(self.wte.weight.shape, mean=0.0, std=0.02)
        self.wpe.weight = jt.init.gauss(self.wpe.weight.shape, mean=0.0, std=0.02)
        self.h = nn.ModuleList([Block(config, lora_config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def execute(self, input_ids, positions, attend: Attend, rows=None):
        """input_ids, positions (N,) int32 -> hidden states (N, C), or only those of ``rows`` (M,).

        ``attend(layer, qkv)`` mixes the values: qkv (N, 3, H, D) -> (N, H, D). Only it knows which
        of the N tokens belong together. In the last layer nothing but keys and values is wanted
        of the other rows.
        """
        x = self.wte(input_ids) + self.wpe(positions)  # (N, C)
        last = len(self.h) - 1
        for index, block in enumerate(self.h):
            x = block(x, partial(attend, index), rows if index == last else None)
        return self.ln_f(x)


class GPT2LMModel(nn.Module):
    """GPT-2 with its language-model head, which is the token embedding itself.

    Parameter names are those of the original experiment's checkpoints
    (``transformer.h.0.attn.c_attn.lora_A`` ...).
    """

    def __init__(self, config: GPT2Config, lora_config: LoRAConfig | None = None):
        self.config, self.lora_config = config, lora_config or LoRAConfig()
        self.transformer = GPT2Model(config, self.lora_config)
        self.head = None  # the token embedding once more, if pack_weights was called

    def logits(self, hidden):  # (N, C) -> (N, V)
        weight = self.transformer.wte.weight if self.head is None else self.head
        return ops.linear(hidden, weight, transposed=True)

    def loss(self, input_ids: np.ndarray, target: np.ndarray, mask: np.ndarray,
             label_smooth: float = 0.0) -> jt.Var:
        """The masked mean cross entropy of a batch, a scalar.

        input_ids, target (B, T) integers; mask (B, T) of 0 and 1 says which targets count. The
        divisor is sum(mask) + 0.0001 as in the original.
        """
        # No causal model looks right: what stands behind a sample's last target that counts
        # changes nothing, and neither do logits of positions that do not count.
        ends = mask.shape[1] - np.argmax(mask[:, ::-1] != 0, axis=1)  # (B,)
        lengths = np.where(mask.any(axis=1), ends, 1)  # a row at least, so that shapes stay valid
        kept = np.arange(mask.shape[1]) < lengths[:, None]  # (B, T)
        input_ids, target, mask = input_ids[kept], target[kept], mask[kept]  # (N,) each
        positions = np.concatenate([np.arange(length) for length in lengths])
        rows = np.flatnonzero(mask) if mask.any() else np.zeros(1, np.int64)  # (M,)
        hidden = self.transformer(
            _int32(input_ids), _int32(positions),
            lambda layer, qkv: ops.causal_attention(qkv, lengths), _int32(rows))  # (M, C)
        logits = self.logits(hidden)  # (M, V)
        losses = ops.cross_entropy(logits, _int32(target[rows]), label_smooth)  # (M,)
        weights = mask[rows].astype(np.float32)  # (M,)
        return (losses * jt.array(weights)).sum() / float(mask.sum() + 0.0001)

    def pack_weights(self) -> None:
        """Brings the weights into the order in which few rows are multiplied fastest.

        For generating text on the CPU: from here on they can be neither trained nor saved.
        """
        if jt.flags.use_cuda:
            return
        for layer in self.modules():
            if isinstance(layer, (Conv1D, lora.MergedLinear)):
                layer.weight = ops.pack_weight(layer.weight)
        self.head = ops.pack_weight(self.transformer.wte.weight, transposed=True)

    def start(self, query: np.ndarray, query_len: np.ndarray, capacity: int,
              beams: int) -> tuple[jt.Var, KeyValueCache]:
        """Runs B queries: query (B, Q) padded on the right, query_len (B,) their lengths >= 1.

        Returns the logits (B, V) at each one's last token, and a cache to go on with for at most
        ``capacity`` steps of at most ``beams`` rows a query.
        """
        kept = np.arange(query.shape[1]) < np.asarray(query_len)[:, None]  # (B, Q)
        cache = KeyValueCache(self.config.n_layer, query_len, capacity, beams)
        hidden = self.transformer(_int32(query[kept]), _int32(np.nonzero(kept)[1]), cache.read,
                                  _int32(cache.spans[:, 1] - 1))  # (B, C)
        return self.logits(hidden), cache

    def step(self, token_ids: np.ndarray, origin: np.ndarray, cache: KeyValueCache) -> jt.Var:
        """One more token for each of R beams: token_ids (R,) -> logits (R, V).

        Row i goes on from row origin[i] of the call before, be it a step or the start. Rows that
        nobody goes on from are gone.
        Fetch the logits before the next step, see ops.beam_attention.
        """
        cache.advance(np.asarray(origin))
        hidden = self.transformer(_int32(np.ravel(token_ids)), _int32(cache.positions),
                                  cache.attend)
        return self.logits(hidden)


class KeyValueCache:
    """Keys and values of what was read: of a query once, of generated tokens a row (a beam).

    Nothing moves when beams are reordered or given up: each row keeps the list of rows it
    descends from.
    """

    def __init__(self, n_layer: int, query_len: np.ndarray, capacity: int, beams: int):
        ends = np.cumsum(query_len)
        self.query_len, self.capacity, self.widest = query_len, capacity, beams * len(ends)
        self.spans = np.stack([ends - query_len, ends], axis=1)  # (R, 2): a row's query in prefix
        self.ancestors = np.zeros((0, len(self.spans)), np.int32)  # (t, R): rows of the steps
        # Of each layer: query, key and value of the queries' tokens (P, 3, H, D); keys and values
        # of generated tokens, see ops.beam_attention.
        self.prefixes, self.stores = [None] * n_layer, [None] * n_layer

    @property
    def positions(self) -> np.ndarray:
        """The position of each row's newest token (R,), the query's first token being 0."""
        return self.spans[:, 1] - self.spans[:, 0] + len(self.ancestors) - 1

    def advance(self, origin: np.ndarray) -> None:
        """Begins a step whose row i goes on from row origin[i]."""
        rows = np.arange(len(origin), dtype=np.int32)[None]
        self.ancestors = np.concatenate([self.ancestors[:, origin], rows])
        self.spans = self.spans[origin]
        self.ancestors_var, self.spans_var = _int32(self.ancestors), _int32(self.spans)

    def read(self, layer: int, qkv: jt.Var) -> jt.Var:
        """The queries, one behind the other: qkv (P, 3, H, D) -> (P, H, D)."""
        self.prefixes[layer] = qkv
        return ops.causal_attention(qkv, self.query_len)

    def attend(self, layer: int, qkv: jt.Var) -> jt.Var:
        """One new token for each row: qkv (R, 3, H, D) -> (R, H, D)."""
        mixed, self.stores[layer] = ops.beam_attention(
            qkv, self.prefixes[layer], self.spans_var, self.stores[layer], self.ancestors_var,
            self.capacity, self.widest)
        return mixed


def _int32(array: np.ndarray) -> jt.Var:
    return jt.array(np.ascontiguousarray(array, dtype=np.int32))
