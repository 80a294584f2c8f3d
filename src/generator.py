"""A GPT-2 that can only generate: its weights are in the order that is fastest for few rows.

Shapes in comments: B queries, P their tokens in all, R rows (live beams), t steps, H = n_head,
D = n_embd / H, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

import copy

import jittor as jt
import numpy as np

import ops
from lora import MergedLinear
from model import GPT2LMModel, int32, matrix_layers


class Generator:
    """Continues token sequences step by step, with a key/value cache.

    It does not change the model that it is made from. It copies the matrices in packed order and
    shares the rest; jt.Vars are computed at first use, so if the caller drops the model before
    that, each original is freed as soon as it is packed.
    """

    def __init__(self, model: GPT2LMModel, precision: str = "float32"):
        """``precision`` of the products with the matrices: float32, bf16 or int8.

        The matrices of a model that is packed already are shared, in their own precision.
        """
        def packed(weight, transposed=False):
            if isinstance(weight, ops.PackedWeight):
                return weight
            return ops.pack_weight(weight, transposed, precision)

        self.config = model.config
        self._head = model.transformer.wte.weight  # (V, C), or packed
        weights = {id(p): p for p in model.parameters()}  # what the copy below holds instead
        for layer in matrix_layers(model):
            weights[id(layer.weight)] = packed(layer.weight)
            # oneDNN's sums depend on the number of rows, gemm.h's do not: a query's result is the
            # same, bit for bit, whichever others are searched beside it.
            if isinstance(layer, MergedLinear) and layer.r:
                weights[id(layer.lora_A)] = ops.pack_weight(layer.lora_A, transposed=True)
        weights[id(self._head)] = self._head  # the embedding that tokens are read from
        self._head = packed(self._head, transposed=True)
        self._transformer = copy.deepcopy(model.transformer, weights)
        for module in self._transformer.modules():
            module.is_train = False  # no dropout; eval() would freeze the weights of `model`, too

    def start(self, query: np.ndarray, query_len: np.ndarray, capacity: int,
              beams: int) -> tuple[jt.Var, KeyValueCache]:
        """Reads B queries: query (B, Q) padded on the right, query_len (B,) their lengths >= 1.

        Returns the logits (B, V) at each query's last token, and a cache for at most ``capacity``
        steps of at most ``beams`` rows a query.
        """
        kept = np.arange(query.shape[1]) < np.asarray(query_len)[:, None]  # (B, Q)
        cache = KeyValueCache(self.config.n_layer, query_len, capacity, beams)
        hidden = self._transformer(int32(query[kept]), int32(np.nonzero(kept)[1]), cache.read,
                                   int32(cache.spans[:, 1] - 1))  # (B, C)
        return self._logits(hidden, cache), cache

    def step(self, token_ids: np.ndarray, origin: np.ndarray, cache: KeyValueCache) -> jt.Var:
        """One more token for each of R rows: token_ids (R,) -> logits (R, V).

        Row i continues row origin[i] of the call before, which was a step or the start. Rows that
        are not continued are dropped.
        """
        cache.advance(np.asarray(origin))
        hidden = self._transformer(int32(np.ravel(token_ids)), int32(cache.positions),
                                   cache.attend)  # (R, C)
        return self._logits(hidden, cache)

    def _logits(self, hidden: jt.Var, cache: KeyValueCache) -> jt.Var:
        cache.logits = ops.linear(hidden, self._head, transposed=True)
        return cache.logits


class KeyValueCache:
    """Keys and values: of each query once, of generated tokens one for each row and step.

    Nothing is copied when rows change places or are dropped: each row keeps the list of the rows
    that it continues.
    """

    def __init__(self, n_layer: int, query_len: np.ndarray, capacity: int, beams: int):
        ends = np.cumsum(query_len)
        self.query_len, self.longest = query_len, int(max(query_len))
        self.capacity, self.widest = capacity, beams * len(ends)
        self.spans = np.stack([ends - query_len, ends], axis=1)  # (R, 2): a row's query in prefix
        self.ancestors = np.zeros((0, len(self.spans)), np.int32)  # (t, R): rows of the steps
        # Of each layer: query, key and value of the queries' tokens (P, 3, H, D); keys and values
        # of generated tokens, see ops.beam_attention.
        self.prefixes: list = [None] * n_layer
        self.stores: list = [None] * n_layer
        self.logits: jt.Var  # of the newest step

    @property
    def positions(self) -> np.ndarray:
        """The position of each row's newest token (R,); the query's first token has 0."""
        return self.spans[:, 1] - self.spans[:, 0] + len(self.ancestors) - 1

    def advance(self, origin: np.ndarray) -> None:
        """Begins a step whose row i continues row origin[i]."""
        # The next step writes into the stores that the step before reads, and jt.Vars are lazy.
        self.logits.sync()
        rows = np.arange(len(origin), dtype=np.int32)[None]  # (1, R)
        self.ancestors = np.concatenate([self.ancestors[:, origin], rows])
        self.spans = self.spans[origin]
        self.ancestors_var, self.spans_var = int32(self.ancestors), int32(self.spans)

    def read(self, layer: int, qkv: jt.Var) -> jt.Var:
        """Attention within the queries, one behind the other: qkv (P, 3, H, D) -> (P, H, D)."""
        self.prefixes[layer] = qkv
        return ops.causal_attention(qkv, list(self.query_len))

    def attend(self, layer: int, qkv: jt.Var) -> jt.Var:
        """Attention of one new token a row: qkv (R, 3, H, D) -> (R, H, D)."""
        mixed, self.stores[layer] = ops.beam_attention(
            qkv, self.prefixes[layer], self.spans_var, self.stores[layer], self.ancestors_var,
            self.capacity, self.widest, self.longest)
        return mixed
