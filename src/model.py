"""GPT-2 (Radford et al., 2019) with LoRA on the query and value of its attention.

Shapes in comments: B samples, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import jittor as jt
import numpy as np
from jittor import nn

import loralib as lora
import ops
from config import GPT2Config, LoRAConfig


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

    def execute(self, x):  # (N, n_in) -> (N, n_out)
        return jt.matmul(x, self.weight) + self.bias

    def gelu(self, x):  # the same, then GELU
        return ops.bias_gelu(jt.matmul(x, self.weight), self.bias)


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        self.n_head = config.n_head
        self.c_attn = lora.MergedLinear(
            config.n_embd, 3 * config.n_embd, r=lora_config.r, lora_alpha=lora_config.alpha,
            lora_dropout=lora_config.dropout, enable_lora=(True, False, True))
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def execute(self, x, batch: int, layer_cache: LayerCache | None):  # x (B * T, C)
        qkv = self.c_attn(x).reshape((batch, -1, 3, self.n_head, x.shape[1] // self.n_head))
        if layer_cache is None:
            mixed = ops.causal_attention(qkv)  # (B, T, H, D)
        elif layer_cache.prefix is None:
            layer_cache.prefix = qkv
            mixed = ops.causal_attention(qkv)
        else:
            mixed = layer_cache.attend(qkv)
        return self.c_proj(mixed.reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        self.c_fc = Conv1D(config.n_embd, 4 * config.n_embd)
        self.c_proj = Conv1D(4 * config.n_embd, config.n_embd)

    def execute(self, x):
        return self.c_proj(self.c_fc.gelu(x))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, lora_config)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def execute(self, x, batch: int, layer_cache: LayerCache | None):  # (B * T, C)
        x = x + self.attn(self.ln_1(x), batch, layer_cache)
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.wte.weight = jt.init.gauss(self.wte.weight.shape, mean=0.0, std=0.02)
        self.wpe.weight = jt.init.gauss(self.wpe.weight.shape, mean=0.0, std=0.02)
        self.h = nn.ModuleList([Block(config, lora_config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def execute(self, input_ids, positions, cache: KeyValueCache | None = None):
        """input_ids, positions (B, T) int32 -> hidden states (B * T, C)."""
        # Rows of all samples stand below each other: matrix products on the CPU are 2-D.
        x = self.wte(input_ids.reshape(-1)) + self.wpe(positions.reshape(-1))  # (B * T, C)
        for index, block in enumerate(self.h):
            x = block(x, input_ids.shape[0], cache.layers[index] if cache else None)
        return self.ln_f(x)


class GPT2LMModel(nn.Module):
    """GPT-2 with its language-model head, which is the token embedding itself.

    Parameter names are those of the original experiment's checkpoints
    (``transformer.h.0.attn.c_attn.lora_A`` ...).
    """

    def __init__(self, config: GPT2Config, lora_config: LoRAConfig | None = None):
        self.config, self.lora_config = config, lora_config or LoRAConfig()
        self.transformer = GPT2Model(config, self.lora_config)

    def logits(self, hidden):  # (N, C) -> (N, V)
        return nn.matmul_transpose(hidden, self.transformer.wte.weight)

    def loss(self, input_ids: np.ndarray, target: np.ndarray, mask: np.ndarray,
             label_smooth: float = 0.0) -> jt.Var:
        """The masked mean cross entropy of a batch, a scalar.

        input_ids, target (B, T) integers; mask (B, T) of 0 and 1 says which targets count. The
        divisor is sum(mask) + 0.0001 as in the original.
        """
        # No causal model looks right: columns past the last one that counts change nothing, and
        # neither do logits of positions that do not count.
        counted = np.flatnonzero(mask.any(axis=0))
        width = counted[-1] + 1 if counted.size else 1
        input_ids, target, mask = input_ids[:, :width], target[:, :width], mask[:, :width]
        rows = np.flatnonzero(mask)
        if not rows.size:
            rows = np.zeros(1, np.int64)  # one row of weight 0, so that shapes stay valid
        positions = np.broadcast_to(np.arange(width), input_ids.shape)
        hidden = self.transformer(_int32(input_ids), _int32(positions))  # (B * T, C)
        logits = self.logits(hidden[_int32(rows)])  # (N, V)
        losses = ops.cross_entropy(logits, _int32(target.ravel()[rows]), label_smooth)  # (N,)
        weights = mask.ravel()[rows].astype(np.float32)  # (N,)
        return (losses * jt.array(weights)).sum() / float(mask.sum() + 0.0001)

    def start(self, query: np.ndarray, query_len: np.ndarray,
              capacity: int) -> tuple[jt.Var, KeyValueCache]:
        """Runs B queries: query (B, Q) padded on the right, query_len (B,) their lengths >= 1.

        Returns the logits (B, V) at each one's last token, and a cache to go on with for at most
        ``capacity`` steps.
        """
        cache = KeyValueCache(self.config.n_layer, query_len, capacity)
        positions = np.broadcast_to(np.arange(query.shape[1]), query.shape)
        hidden = self.transformer(_int32(query), _int32(positions), cache)  # (B * Q, C)
        last = np.arange(len(query)) * query.shape[1] + query_len - 1  # (B,)
        return self.logits(hidden[_int32(last)]), cache

    def step(self, token_ids: np.ndarray, origin: np.ndarray, cache: KeyValueCache) -> jt.Var:
        """One more token for each of K beams: token_ids (B, K) -> logits (B * K, V).

        Row i of the B * K goes on from row origin[i] of the step before (at the first: ignored).
        Fetch the logits before the next step, see ops.beam_attention.
        """
        positions = np.repeat(cache.query_len + cache.generated, token_ids.shape[1])
        cache.advance(np.asarray(origin), token_ids.size)
        hidden = self.transformer(_int32(token_ids), _int32(positions.reshape(token_ids.shape)),
                                  cache)
        return self.logits(hidden)


class KeyValueCache:
    """Keys and values of what was read: of a sample's query once, of generated tokens a beam.

    Nothing moves when beams are reordered: each keeps the list of rows it descends from.
    """

    def __init__(self, n_layer: int, query_len: np.ndarray, capacity: int):
        self.query_len, self.capacity = np.asarray(query_len), capacity
        self.ancestors = np.zeros((0, 0), np.int32)  # (t, B * K): rows of the steps so far
        self.layers = [LayerCache(self) for _ in range(n_layer)]
        self.query_len_var = _int32(self.query_len)

    @property
    def generated(self) -> int:
        """The number of steps so far."""
        return len(self.ancestors)

    def advance(self, origin: np.ndarray, rows: int) -> None:
        """Begins a step whose row i goes on from row origin[i]."""
        past = self.ancestors[:, origin] if self.generated else np.zeros((0, rows), np.int32)
        self.ancestors = np.concatenate([past, np.arange(rows, dtype=np.int32)[None]])
        self.ancestors_var = _int32(self.ancestors)


class LayerCache:
    """One layer's share of a KeyValueCache."""

    def __init__(self, cache: KeyValueCache):
        self.cache = cache
        self.prefix = None  # (B, Q, 3, H, D): query, key and value of the queries
        self.store = None  # keys and values of generated tokens, see ops.beam_attention

    def attend(self, qkv: jt.Var) -> jt.Var:
        """One new token for each beam: qkv (B, K, 3, H, D) -> (B, K, H, D)."""
        mixed, self.store = ops.beam_attention(
            qkv, self.prefix, self.cache.query_len_var, self.store, self.cache.ancestors_var,
            self.cache.capacity)
        return mixed


def _int32(array: np.ndarray) -> jt.Var:
    return jt.array(np.ascontiguousarray(array, dtype=np.int32))
