"""GPT-2 (Radford et al., 2019) with LoRA on its attention, by default on the query and value.

Sequences are packed: there is no batch axis and no padding, the tokens of all sequences stand one
behind the other. Shapes in comments: N tokens, M of them wanted, B samples, T tokens of a padded
sample, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Callable, Sequence

import jittor as jt
import numpy as np
from jittor import nn

import lora
import ops
from config import GPT2Config, LoRAConfig
from dataset import Sample

# (layer's number, qkv (N, 3, H, D)) -> (N, H, D): mixes the values of tokens that belong together
Attend = Callable[[int, jt.Var], jt.Var]


class LayerNorm(nn.Module):
    def __init__(self, n_embd: int, epsilon: float):
        self.weight = jt.ones(n_embd)
        self.bias = jt.zeros(n_embd)
        self.epsilon = epsilon

    def execute(self, x):  # (N, C)
        return ops.layer_norm(x, self.weight, self.bias, self.epsilon)


class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as in GPT-2's checkpoints."""

    def __init__(self, n_in: int, n_out: int):
        self.weight = jt.init.gauss((n_in, n_out), mean=0.0, std=0.02)
        self.bias = jt.zeros(n_out)

    def execute(self, x, residual):  # (N, n_in), (N, n_out) -> (N, n_out)
        return ops.linear(x, self.weight, self.bias, residual)

    def gelu(self, x):  # (N, n_in) -> GELU of the layer's output (N, n_out)
        return ops.bias_gelu(ops.linear(x, self.weight), self.bias)


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        self.n_head = config.n_head
        self.c_attn = lora.MergedLinear(
            config.n_embd, 3 * config.n_embd, r=lora_config.r, lora_alpha=lora_config.alpha,
            lora_dropout=lora_config.dropout, enable_lora=lora_config.enable)
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

    def execute(self, x, residual):  # (N, C), (N, C)
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


class PackedEmbedding(nn.Module):
    """An embedding whose matrix (rows, C) is packed, and not trained."""

    def __init__(self, weight: ops.PackedWeight):
        self.weight = weight

    def execute(self, ids):  # (N,) int32 -> (N, C)
        return ops.packed_columns(self.weight, ids)


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

        Only ``attend`` knows which of the N tokens belong together. With ``rows``, the last layer
        computes the keys and values of all tokens, but everything after them for ``rows`` alone.
        """
        x = self.wte(input_ids) + self.wpe(positions)  # (N, C)
        last = len(self.h) - 1
        for index, block in enumerate(self.h):
            x = block(x, partial(attend, index), rows if index == last else None)
        return self.ln_f(x)


def matrix_layers(model: nn.Module) -> list[Conv1D | lora.MergedLinear]:
    """The layers with a matrix (n_in, n_out) that LoRA leaves as it is."""
    return [layer for layer in model.modules() if isinstance(layer, (Conv1D, lora.MergedLinear))]


class GPT2LMModel(nn.Module):
    """GPT-2 with its language-model head, which is the token embedding itself.

    Parameter names are those of the original experiment's checkpoints
    (``transformer.h.0.attn.c_attn.lora_A`` ...).
    """

    def __init__(self, config: GPT2Config, lora_config: LoRAConfig | None = None):
        self.config, self.lora_config = config, lora_config or LoRAConfig()
        self.transformer = GPT2Model(config, self.lora_config)
        self.lora_biases: list[str] = []  # names of those that belong to the LoRA, see checkpoint
        self.order: list[str] = []  # of the weights' names, once some of them are packed
        self.packed: dict[str, ops.PackedWeight] = {}  # by the names that they had as parameters

    def enable_lora(self, enable: tuple[bool, bool, bool]) -> None:
        """Puts LoRA on these of query, key and value in all layers, with new matrices."""
        self.lora_config = replace(self.lora_config, enable=enable)
        for block in self.transformer.h:
            block.attn.c_attn.enable(enable)

    def pack(self, precision: str, many_rows: bool = True) -> None:
        """Brings the matrices, which are not trained, into the order that is fastest.

        They stop being parameters. ``precision`` is float32 or bf16, in which they are rounded to
        bfloat16 and multiplied as :func:`ops.linear` says; ``many_rows`` as :func:`ops.pack_weight`
        has it. Meanwhile, the memory of one matrix more is needed.
        """
        wte, names = self.transformer.wte, {id(p): name for name, p in self.named_parameters()}
        self.order = list(names.values())
        for layer in [wte, *matrix_layers(self)]:
            name, weight = names[id(layer.weight)], layer.weight
            layer.weight = self.packed[name] = ops.pack_weight(
                weight, layer is wte, precision, many_rows)
            layer.weight.words.sync()  # then the original is not used any more
            jt.gc()  # Jittor would keep its memory, too small by 64 bytes for the next in float32
        self.transformer.wte = PackedEmbedding(wte.weight)

    def weights(self) -> dict[str, jt.Var | ops.PackedWeight]:
        """All weights, packed or not, by name, in the order of :meth:`named_parameters`."""
        weights = {**dict(self.named_parameters()), **self.packed}
        return {name: weights[name] for name in self.order} if self.packed else weights

    def logits(self, hidden: jt.Var) -> jt.Var:
        """Hidden states (M, C) -> (M, V)."""
        return ops.linear(hidden, self.transformer.wte.weight, transposed=True)

    def loss(self, input_ids: np.ndarray, target: np.ndarray, mask: np.ndarray,
             label_smooth: float = 0.0, parts: int = 1) -> jt.Var:
        """The masked mean cross entropy of each of ``parts`` equal batches, (parts,) in nats.

        input_ids, target (B, T) integers; mask (B, T) is 1 where the target counts, else 0. The
        batches, of B / parts samples each, follow one another; the divisor of a batch is
        sum(mask) + 0.0001 as in the original.
        """
        # A causal model does not see tokens to the right: those behind a sample's last counted
        # target change nothing, and logits are needed only where a target counts.
        ends = mask.shape[1] - np.argmax(mask[:, ::-1] != 0, axis=1)  # (B,)
        lengths = np.where(mask.any(axis=1), ends, 1)  # at least one token, for valid shapes
        kept = np.arange(mask.shape[1]) < lengths[:, None]  # (B, T)
        input_ids, target, counted = input_ids[kept], target[kept], mask[kept]  # (N,) each
        positions = np.concatenate([np.arange(length) for length in lengths])  # (N,)
        starts = np.cumsum([0, *lengths])[:-1:len(lengths) // parts]  # (parts,)
        rows = np.flatnonzero(counted) if counted.any() else np.zeros(1, np.int64)  # (M,)
        for block in self.transformer.h:
            block.attn.c_attn.dropout_starts = starts
        losses = self._losses(
            input_ids, positions,
            lambda layer, qkv: ops.causal_attention(qkv, list(lengths)), rows, target[rows],
            label_smooth)  # (M,)
        part = np.searchsorted(starts, rows, side="right") - 1  # (M,), the batch of each row
        weights = (part == np.arange(parts)[:, None]) * counted[rows]  # (parts, M)
        divisors = mask.reshape((parts, -1)).sum(axis=1) + 0.0001  # (parts,)
        # Jittor adds up one by one, which in float32 would lose digits.
        sums = (losses * float32(weights)).float64().sum(dim=1)  # (parts,)
        return (sums / float32(divisors).float64()).float32()

    def completion_losses(self, samples: Sequence[Sample]) -> np.ndarray:
        """The summed cross entropy of each of B samples' completions, (B,) float64 in nats.

        Neither a context nor a completion is empty. The tokens of a context that adjacent samples
        share pass the model once; there are no gradients.
        """
        ids: list[int] = []  # (N,), of a context, of its completions, of the next context
        positions: list[int] = []  # (N,)
        lengths: list[int] = []  # of each sequence: a context, or a completion but its last token
        prefixes: list[tuple[int, int]] = []  # the rows of a completion's context
        rows: list[int] = []  # (M,), where each token of a completion is predicted
        target: list[int] = []  # (M,)

        def append(tokens: Sequence[int], position: int, prefix: tuple[int, int]) -> None:
            ids.extend(tokens)
            positions.extend(range(position, position + len(tokens)))
            lengths.append(len(tokens))
            prefixes.append(prefix)

        for context, sharing in itertools.groupby(samples, key=lambda sample: sample[0]):
            first, begin = len(ids), len(ids) + len(context)
            append(context, 0, (0, 0))
            for _, completion in sharing:
                rows += [begin - 1, *range(len(ids), len(ids) + len(completion) - 1)]
                target += completion
                if len(completion) > 1:
                    append(completion[:-1], len(context), (first, begin))
        losses = self._losses(
            ids, positions, lambda layer, qkv: ops.causal_attention(qkv, lengths, prefixes), rows,
            target)  # (M,)
        ends = np.cumsum([len(completion) for _, completion in samples])  # (B,)
        return np.add.reduceat(losses.numpy().astype(np.float64), [0, *ends[:-1]])

    def _losses(self, input_ids, positions, attend: Attend, rows, target,
                label_smooth: float = 0.0) -> jt.Var:
        """The cross entropy of the ``target`` (M,) behind each of the ``rows`` (M,) -> (M,)."""
        hidden = self.transformer(int32(input_ids), int32(positions), attend, int32(rows))  # (M, C)
        return ops.cross_entropy(self.logits(hidden), int32(target), label_smooth)


def float32(array) -> jt.Var:
    """Numbers as a jt.Var of float32."""
    return ops.upload(np.asarray(array, dtype=np.float32))


def int32(array) -> jt.Var:
    """Integers as a jt.Var of int32."""
    return ops.upload(np.asarray(array, dtype=np.int32))
