"""GPT-2 and LoRA by hand in PyTorch, as a good engineer writes them for this task and no other.

Training: no padding, logits of targets only, and the micro-batches of an update computed as one.
Beam search: LoRA merged, keys and values in a cache of constant size, so that one step of constant
shapes is compiled. bf16: frozen matrices and their products in bf16, the rest in float32. Label
smoothing, dropout and the rules of the search are the experiment's.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving import serve
from torch_side import TorchSide, batches, merged, torch_model, torch_optim

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
LOW = -1e30  # of logits and keys that do not count


class Side(TorchSide):
    packages = ("torch", "transformers")

    def load(self, card: str, base: str, lora: str | None, r: int, alpha: int,
             lora_dropout: float = 0.0, precision: str = "float32",
             compiled: bool = False) -> None:
        self.files = {"card": card, "base": base, "lora": lora, "r": r, "alpha": alpha}
        self.dropout, self.dtype, self.compiled = lora_dropout, DTYPES[precision], compiled
        self.searcher = None

    def start_training(self, data: str, *, batch_size: int, seq_len: int, grad_acc: int,
                       label_smooth: float, lr: float, warmup_step: int, max_step: int,
                       weight_decay: float, beta2: float, seed: int) -> None:
        self.batches = batches(data, batch_size, seq_len, seed)
        self.net = TrainingNet(self.files, self.dropout, self.dtype, self.compiled)
        self.net.to(self.device)
        self.optimizer = torch_optim.AdamW(
            [{"params": list(self.net.parameters()), "weight_decay": weight_decay}], lr,
            (0.9, beta2), 1e-6, weight_decay)
        self.schedule = torch_optim.make_schedule("linear", lr, max_step, warmup_step,
                                                  optimizer=self.optimizer)
        self.grad_acc, self.label_smooth = grad_acc, label_smooth

    def train(self, steps: int) -> dict:
        """The next micro-batches: each has its share of its update's time, and its loss."""
        times, losses = [], []
        for _ in range(steps // self.grad_acc):
            started = time.perf_counter()
            losses += self.update()
            self.synchronize()
            took = (time.perf_counter() - started) * 1000
            times += [took / self.grad_acc] * self.grad_acc
        return {"ms": times, "loss": losses}

    def update(self) -> list[float]:
        """All micro-batches of an update as one batch; returns the loss of each."""
        many = [next(self.batches) for _ in range(self.grad_acc)]
        *tensors, weights, samples, longest = pack(many)
        losses = self.net(*(x.to(self.device) for x in tensors), samples, longest,
                          self.label_smooth)  # (M,)
        losses = weights.to(self.device) @ losses  # (micro-batches,)
        losses.mean().backward()
        for _ in many[1:]:
            self.schedule.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return losses.tolist()

    @torch.no_grad()
    def search(self, queries: list[list[int]], batch_size: int, beam: int, eval_len: int,
               length_penalty: float, no_repeat_ngram_size: int, eos: list[int]) -> dict:
        if self.searcher is None:
            self.searcher = Searcher(merged(**self.files).to(self.device), self.dtype,
                                     self.compiled, beam)
        started = time.perf_counter()
        found = []
        for first in range(0, len(queries), batch_size):
            found += self.searcher.search(queries[first:first + batch_size], eval_len,
                                          length_penalty, no_repeat_ngram_size, set(eos))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "ids": [ids + [0] * (eval_len - len(ids)) for ids in found]}


def pack(many: list[dict[str, Tensor]]) -> tuple:
    """The samples of several micro-batches one behind the other, without padding.

    Returns input_ids (N,) and positions (N,); padded (N,), where each row is if S samples are
    padded to the longest, in (S * T); rows (M,) with a target, and their targets (M,);
    weights (micro-batches, M), with which losses of targets become those of micro-batches; S; T.
    """
    inputs, targets, masks = (torch.cat([batch[name] for batch in many])
                              for name in ("input", "target", "mask"))  # (S, seq_len)
    masks, places = masks.bool(), torch.arange(inputs.shape[1])
    lengths = torch.stack([m.nonzero().max() + 1 if m.any() else torch.tensor(1) for m in masks])
    kept, longest = places < lengths[:, None], int(lengths.max())
    of_batch = torch.arange(len(many)).repeat_interleave(len(inputs) // len(many))  # (S,)
    weights = F.one_hot(of_batch[:, None].expand_as(masks)[masks], len(many)).T.float()
    weights /= weights.sum(1, keepdim=True) + 1e-4
    return (inputs[kept], places.expand_as(kept)[kept],
            kept[:, :longest].flatten().nonzero()[:, 0], masks[kept].nonzero()[:, 0],
            targets[masks], weights, len(inputs), longest)


class TrainingNet(nn.Module):
    """GPT-2, frozen, with LoRA on query and value: see :func:`pack` for the arguments."""

    def __init__(self, files: dict, dropout: float, dtype: torch.dtype, compiled: bool):
        super().__init__()
        model = torch_model.build(files["card"], files["r"], files["alpha"])
        torch_model.load_weights(model, files["base"])
        if files["lora"]:
            torch_model.load_lora(model, files["lora"])
        self.heads, self.scale = model.config.n_head, files["alpha"] / files["r"]
        self.dropout = dropout
        self.frozen, self.lora_A, self.lora_B = [], nn.ParameterList(), nn.ParameterList()
        for block in model.transformer.h:
            self.lora_A.append(block.attn.c_attn.lora_A)  # (2 r, C)
            self.lora_B.append(block.attn.c_attn.lora_B)  # (2 C, r)
            products = [[layer.weight.to(dtype), layer.bias.to(dtype)] for layer in (
                block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
            self.frozen.append([*block.ln_1.parameters(), *products[0], *products[1],
                                *block.ln_2.parameters(), *products[2], *products[3]])
        transformer = model.transformer
        self.wte, self.wpe = transformer.wte.weight.to(dtype), transformer.wpe.weight
        self.ln_f = list(transformer.ln_f.parameters())
        functions = (self.attend, self.project, self.losses)
        # A layer and not the whole net: all layers share the compiled code.
        self.functions = [torch.compile(function, dynamic=True) if compiled else function
                          for function in functions]

    def _apply(self, move, recurse=True):
        """Moves the frozen tensors, too, which are no parameters."""
        self.frozen = [[move(x) for x in layer] for layer in self.frozen]
        self.wte, self.wpe, *self.ln_f = map(move, (self.wte, self.wpe, *self.ln_f))
        return super()._apply(move, recurse)

    def forward(self, ids: Tensor, positions: Tensor, padded: Tensor, rows: Tensor,
                targets: Tensor, samples: int, longest: int, label_smooth: float) -> Tensor:
        attend, project, losses = self.functions
        x = self.wte[ids].float() + self.wpe[positions]  # (N, C)
        for number, (frozen, a, b) in enumerate(zip(self.frozen, self.lora_A, self.lora_B)):
            mixed = attend(x, a, b, padded, samples, longest, *frozen[:4])
            if number == len(self.frozen) - 1:
                mixed, x = mixed.index_select(0, rows), x.index_select(0, rows)
            x = project(mixed, x, *frozen[4:])
        return losses(x, targets, self.wte, *self.ln_f, label_smooth)

    def attend(self, x, lora_A, lora_B, padded, samples: int, longest: int, gain, bias, c_attn,
               c_attn_bias):
        rank, width, dtype = lora_B.shape[1], x.shape[1], c_attn.dtype
        x = F.layer_norm(x, (width,), gain, bias, 1e-5)
        qkv = torch.addmm(c_attn_bias, x.to(dtype), c_attn)  # (N, 3 C)
        low = F.linear(F.dropout(x, self.dropout), lora_A) * self.scale  # (N, 2 r)
        query, key, value = qkv.split(width, 1)
        query = query + F.linear(low[:, :rank], lora_B[:width]).to(dtype)
        value = value + F.linear(low[:, rank:], lora_B[width:]).to(dtype)
        query, key, value = (
            y.new_zeros(samples * longest, width).index_copy(0, padded, y)
            .view(samples, longest, self.heads, -1).transpose(1, 2)
            for y in (query, key, value))  # (S, H, T, D)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(-1, width).index_select(0, padded)  # (N, C)

    def project(self, mixed, x, c_proj, c_proj_bias, gain, bias, c_fc, c_fc_bias, out, out_bias):
        x = x + torch.addmm(c_proj_bias, mixed, c_proj)
        y = F.layer_norm(x, (x.shape[1],), gain, bias, 1e-5).to(c_fc.dtype)
        y = F.gelu(torch.addmm(c_fc_bias, y, c_fc), approximate="tanh")
        return x + torch.addmm(out_bias, y, out)

    def losses(self, x, targets, wte, gain, bias, label_smooth: float):
        x = F.layer_norm(x, (x.shape[1],), gain, bias, 1e-5)
        logits = F.linear(x.to(wte.dtype), wte).float()  # (M, V)
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smooth)


class SearchNet(nn.Module):
    """GPT-2 that reads a context, or one more token for each of R rows. T: size of the cache."""

    def __init__(self, model, dtype: torch.dtype):
        super().__init__()
        config = model.config
        self.heads, self.width, self.dtype = config.n_head, config.n_embd, dtype
        self.wte, self.wpe = model.transformer.wte.weight, model.transformer.wpe.weight
        self.ln_f, self.layers = model.transformer.ln_f, nn.ModuleList()
        for block in model.transformer.h:
            self.layers.append(nn.ModuleDict({"ln_1": block.ln_1, "ln_2": block.ln_2, **{
                name: linear(conv.weight.T, conv.bias, dtype) for name, conv in (
                    ("qkv", block.attn.c_attn), ("proj", block.attn.c_proj),
                    ("fc", block.mlp.c_fc), ("out", block.mlp.c_proj))}}))
        self.head = linear(self.wte, None, dtype)

    def forward(self, ids, positions, origin, keys, values, mask, slot):
        """ids, positions (R,): row i continues row origin[i]. keys, values: of each layer
        (R, H, T, D), to which those of ``slot`` (1,) are added; mask (1, 1, 1 or R, T).
        Returns logits (R, V), keys, values."""
        x = self.wte[ids] + self.wpe[positions]
        fresh_keys, fresh_values = [], []
        for layer, key, value in zip(self.layers, keys, values):
            query, k, v = self.project(layer, x).unflatten(1, (3, self.heads, 1, -1)).unbind(1)
            key = key.index_select(0, origin).index_copy(2, slot, k)
            value = value.index_select(0, origin).index_copy(2, slot, v)
            fresh_keys.append(key)
            fresh_values.append(value)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            x = self.rest(layer, x, mixed.flatten(1))
        return self.logits(x), fresh_keys, fresh_values

    def read(self, ids):
        """A context (Q,): logits of its last token (1, V), keys and values (1, H, Q, D)."""
        x = self.wte[ids] + self.wpe[:len(ids)]
        keys, values = [], []
        for layer in self.layers:
            qkv = self.project(layer, x).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
            query, key, value = qkv[:, None]  # (1, H, Q, D)
            keys.append(key)
            values.append(value)
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = self.rest(layer, x, mixed[0].transpose(0, 1).flatten(1))
        return self.logits(x[-1:]), keys, values

    def project(self, layer, x):
        return layer["qkv"](layer["ln_1"](x).to(self.dtype))

    def rest(self, layer, x, mixed):
        x = x + layer["proj"](mixed)
        y = layer["fc"](layer["ln_2"](x).to(self.dtype))
        return x + layer["out"](F.gelu(y, approximate="tanh"))

    def logits(self, x):
        return self.head(self.ln_f(x).to(self.dtype)).float()


def linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device)
    layer.weight.data = weight.data.contiguous().to(dtype)
    if bias is not None:
        layer.bias.data = bias.data.to(dtype)
    return layer


class Searcher:
    """Beam search for several contexts at the same time; all have ``beam`` rows until the end."""

    def __init__(self, model, dtype: torch.dtype, compiled: bool, beam: int):
        self.net, self.beam, self.step = SearchNet(model, dtype).eval(), beam, None
        self.device = self.net.wte.device
        self.step = self.net
        if compiled:
            import torch._inductor.config as inductor

            inductor.freezing = True  # weights become constants in the order of oneDNN's kernels
            self.step = torch.compile(self.net, dynamic=False)

    def search(self, queries: list[list[int]], eval_len: int, length_penalty: float,
               no_repeat_ngram_size: int, eos: set[int]) -> list[list[int]]:
        """The best sequence of each context, with the token that ends it."""
        beam, longest = self.beam, max(map(len, queries))
        logits, keys, values, mask = self.start(queries, longest, eval_len)
        done = [(LOW, [])] * len(queries)  # score, tokens
        live = [[(0.0, [], n * beam)] for n in range(len(queries))]  # score, tokens, row
        for length in range(1, eval_len + 1):
            for _, tokens, row in (each for beams in live for each in beams):
                logits[row, repeats(tokens, no_repeat_ngram_size)] = LOW
            scores, candidates = (x.cpu().numpy() for x in
                                  torch.log_softmax(logits, 1).topk(beam))
            ids, positions, origin = (np.zeros(len(queries) * beam, np.int64) for _ in range(3))
            for n, beams in enumerate(live):
                found = sorted(((score + scores[row, j], tokens, row, candidates[row, j])
                                for score, tokens, row in beams for j in range(beam)),
                               key=lambda each: -each[0])[:beam]
                live[n] = []
                for score, tokens, row, token in found:
                    tokens = [*tokens, int(token)]
                    if length == eval_len or token in eos:
                        done[n] = max(done[n], (score / length ** length_penalty, tokens))
                    else:
                        live[n].append((score, tokens, row))
                # A score only falls, and eval_len is the most favourable length.
                live[n] = [each for each in live[n]
                           if each[0] / eval_len ** length_penalty > done[n][0]]
                for at, (score, tokens, row) in enumerate(live[n], n * beam):
                    ids[at], origin[at] = tokens[-1], row
                    positions[at] = len(queries[n]) + length - 1
                    live[n][at - n * beam] = (score, tokens, at)
            if not any(live):
                break
            slot = longest + length - 1
            mask[..., slot] = 0
            logits, keys, values = self.step(
                *(torch.from_numpy(x).to(self.device) for x in (ids, positions, origin)),
                keys, values, mask, torch.tensor([slot], device=self.device))
            logits = logits.clone()  # the next step may write to the same memory
        return [tokens for _, tokens in done]

    def start(self, queries: list[list[int]], longest: int, eval_len: int):
        """Logits (R, V), keys and values (R, H, T, D), mask; contexts end at slot ``longest``."""
        net, rows = self.net, len(queries) * self.beam
        slots = -(-(longest + eval_len) // 64) * 64  # the same for all contexts of E2E
        shape = (rows, net.heads, slots, net.width // net.heads)
        keys, values = ([torch.zeros(shape, dtype=net.dtype, device=self.device)
                         for _ in net.layers] for _ in range(2))
        mask = torch.full((rows, 1, 1, shape[2]), LOW, dtype=net.dtype, device=self.device)
        logits = torch.empty(rows, len(net.wte), device=self.device)
        for n, query in enumerate(queries):
            its = slice(n * self.beam, (n + 1) * self.beam)
            past = slice(longest - len(query), longest)
            logits[its], *read = net.read(torch.tensor(query, device=self.device))
            for cache, layers in zip((keys, values), read):
                for stored, new in zip(cache, layers):
                    stored[its, :, past] = new
            mask[its, :, :, past] = 0
        return logits, keys, values, mask


def repeats(tokens: list[int], size: int) -> list[int]:
    """The tokens that would repeat a sequence of ``size`` tokens; none if ``size`` is 0."""
    if not 0 < size <= len(tokens) + 1:
        return []
    last = tokens[len(tokens) - size + 1:]
    return [tokens[n + size - 1] for n in range(len(tokens) - size + 1)
            if tokens[n:n + size - 1] == last]


if __name__ == "__main__":
    serve(Side())
