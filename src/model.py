"""GPT-2 (Radford et al., 2019) with LoRA on the query and value of its attention.

Shapes in comments: B samples, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math

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
        elif layer_cache.query_keys is None:
            layer_cache.keep_query(qkv)
            mixed = ops.causal_attention(qkv)
        else:
            mixed = layer_cache.attend(qkv)
        return self.c_proj(mixed.reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        self.c_fc = Conv1D(config.n_embd, 4 * config.n_embd)
        self.c_proj = Conv1D(4 * config.n_embd, config.n_embd)

    def execute(self, x):
        return self.c_proj(ops.gelu(self.c_fc(x)))


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

    def __init__(self, config: GPT2Config, lora_config: LoRAConfig = LoRAConfig()):
        self.config, self.lora_config = config, lora_config
        self.transformer = GPT2Model(config, lora_config)

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

    def start(self, query: np.ndarray, query_len: np.ndarray) -> tuple[jt.Var, KeyValueCache]:
        """Runs B queries: query (B, Q) padded on the right, query_len (B,) their lengths >= 1.

        Returns the logits (B, V) at each one's last token, and a cache to go on with.
        """
        cache = KeyValueCache(self.config.n_layer, query_len)
        positions = np.broadcast_to(np.arange(query.shape[1]), query.shape)
        hidden = self.transformer(_int32(query), _int32(positions), cache)  # (B * Q, C)
        last = np.arange(len(query)) * query.shape[1] + query_len - 1  # (B,)
        return self.logits(hidden[_int32(last)]), cache

    def step(self, token_ids: np.ndarray, cache: KeyValueCache) -> jt.Var:
        """One more token for each beam: token_ids (B, beams) -> logits (B * beams, V)."""
        batch, beams = token_ids.shape
        positions = np.repeat(cache.query_len + cache.generated, beams).reshape(batch, beams)
        cache.generated += 1
        hidden = self.transformer(_int32(token_ids), _int32(positions), cache)
        return self.logits(hidden)


class KeyValueCache:
    """Keys and values of what was read: a sample's query once, generated tokens for each beam.

    ``query_len`` (B,) int, ``generated`` the number of tokens generated so far.
    """

    def __init__(self, n_layer: int, query_len: np.ndarray):
        self.query_len, self.generated = np.asarray(query_len), 0
        self.layers = [LayerCache(self.query_len) for _ in range(n_layer)]

    def reorder(self, beam_idx: np.ndarray) -> None:
        """Lets row i of B * beams go on from row beam_idx[i]; the queries are shared and stay."""
        if not self.generated:
            return
        order = _int32(beam_idx)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[order], layer.values[order]


class LayerCache:
    """One layer's share of a KeyValueCache."""

    def __init__(self, query_len: np.ndarray):
        self.query_len = query_len
        self.query_keys = self.query_values = None  # (B, H, Q, D)
        self.keys = self.values = None  # (B * beams, H, t, D)

    def keep_query(self, qkv: jt.Var) -> None:  # (B, Q, 3, H, D)
        self.query_keys = qkv[:, :, 1].transpose(0, 2, 1, 3)
        self.query_values = qkv[:, :, 2].transpose(0, 2, 1, 3)

    def attend(self, qkv: jt.Var) -> jt.Var:
        """One new token for each beam: qkv (B, beams, 3, H, D) -> (B, beams, H, D)."""
        batch, beams, _, heads, depth = qkv.shape
        q, k, v = (qkv[:, :, i].reshape((batch * beams, heads, 1, depth)) for i in range(3))
        q = q / math.sqrt(depth)
        if self.keys is not None:
            k, v = jt.concat([self.keys, k], dim=2), jt.concat([self.values, v], dim=2)
        self.keys, self.values = k, v  # (B * beams, H, t, D)

        # All beams of a sample look at the one copy of its query ...
        shared = q.reshape((batch, beams, heads, depth)).transpose(0, 2, 1, 3)  # (B, H, beams, D)
        on_query = jt.matmul(shared, self.query_keys.transpose(0, 1, 3, 2))  # (B, H, beams, Q)
        real = jt.array(np.arange(on_query.shape[3]) < self.query_len[:, None])  # (B, Q)
        real = real.broadcast(on_query.shape, dims=[1, 2])
        on_query = jt.ternary(real, on_query, jt.full(on_query.shape, ops.MASKED))
        # ... and each at the tokens it has generated itself.
        on_beam = jt.matmul(q, k.transpose(0, 1, 3, 2))  # (B * beams, H, 1, t)
        on_beam = on_beam.reshape((batch, beams, heads, -1)).transpose(0, 2, 1, 3)
        weights = ops.plain_softmax(jt.concat([on_query, on_beam], dim=3))  # (B, H, beams, Q + t)

        split = on_query.shape[3]
        mixed = jt.matmul(weights[:, :, :, :split], self.query_values)  # (B, H, beams, D)
        on_beam = weights[:, :, :, split:].transpose(0, 2, 1, 3)  # (B, beams, H, t)
        own = jt.matmul(on_beam.reshape((batch * beams, heads, 1, -1)), v)  # (B * beams, H, 1, D)
        return mixed.transpose(0, 2, 1, 3) + own.reshape((batch, beams, heads, depth))


def _int32(array: np.ndarray) -> jt.Var:
    return jt.array(np.ascontiguousarray(array, dtype=np.int32))
