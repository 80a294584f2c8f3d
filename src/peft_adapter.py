"""PEFT's adapters (github.com/huggingface/peft): reading, merging, our LoRA from them and back.

An adapter is a folder: adapter_config.json says what kind it is, adapter_model.safetensors (or
.bin) holds its matrices. PEFT puts LoRA beside any layer and on the whole of it, so that ``c_attn``
has one A (R, C) and one B (3C, R) for query, key and value. Ours has an A (r, C) and a B (C, r) for
each third that is enabled. Ours in PEFT's form has the rank G r, G being the number of thirds:

        A (G r, C) unchanged,   B (3C, G r) = | B_q  0  |     and alpha' = G alpha, so that the
                                              |  0   0  |     scale alpha' / (G r) = alpha / r
                                              |  0  B_v |     stays what it is

Tensors are read by their names and shapes; ``target_modules`` and the like only say how PEFT made
them. What a merge changes is computed in float64 and rounded once. Only NumPy is needed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import regex

import weight_files
from config import GPT2Config
from runtime.errors import InputError
from weight_names import EMBEDDING, HEAD_NAMES, parameter_name
from weights import Weights, lora_form, write_safetensors

CONFIG, *MODELS = weight_files.ADAPTER  # the files of matrices are in PEFT's order
PREFIX = "base_model.model."
MERGE = ("merge it into the base first: python src/gpt2_export.py --format hf --init_checkpoint "
         "BASE --lora_checkpoint {} --output_dir NEW")

# Keys of the configuration that change no result, or whose effect is in the tensors or read below.
KNOWN_KEYS = frozenset("""
    peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode r
    target_modules exclude_modules layers_to_transform layers_pattern modules_to_save bias
    lora_alpha lora_dropout lora_bias fan_in_fan_out init_lora_weights rank_pattern alpha_pattern
    use_rslora use_dora eva_config runtime_config megatron_core ensure_weight_tying
    qalora_group_size enable_lora merge_weights""".split())
# Initial matrices that leave the base as it is; others subtract theirs from the base's weights.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
REASONS = {
    "alora_invocation_tokens": "an activated LoRA (alora_invocation_tokens); it cannot be merged",
    "trainable_token_indices": "trainable_token_indices is set; not supported",
}
LORA_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
                      r"lora_magnitude_vector)(?:\.default)?(?:\.(weight|bias))?")
LAYER = re.compile(r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
POSITIONS = "transformer.wpe"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
README = """\
---
{base_model}library_name: peft
pipeline_tag: text-generation
tags:
- lora
- transformers
{tag}---

# LoRA for GPT-2

Trained with LoRA + GPT-2 + Jittor{trained}: rank {r}, alpha {alpha:g},
dropout {dropout:g}, on the {thirds} of the attention.
PEFT has one LoRA for query, key and value together; as such its rank is {R}, its lora_alpha {L:g}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "DIR")  # this folder
```

A prompt is a context and `<|endoftext|>`, as in `name : Blue Spice | Type : pub<|endoftext|>`. The
answer begins with a blank. Generation ends at token 50256, `<|endoftext|>`, or 628, an empty line.
"""


@dataclass
class LowRank:
    """LoRA beside a matrix W (in, out), which becomes W + alpha / R (B A)^T."""

    A: np.ndarray  # (R, in)
    B: np.ndarray  # (out, R)
    alpha: float
    bias: np.ndarray | None = None  # (out,) of lora_bias: the layer's bias gets alpha / R of it
    magnitude: np.ndarray | None = None  # (out,) of DoRA: the norms of the result's columns

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass
class Adapter:
    """What an adapter changes: matrices by layer, and parameters that it replaces, by our names."""

    path: str
    layers: dict[str, LowRank]
    replaced: Weights
    dropout: float = 0.0  # on LoRA's input, for those who train on


@dataclass
class OurLoRA:
    """LoRA as our model has it: ``weights`` by parameter name, biases of loralib among them."""

    r: int
    alpha: float
    enable: tuple[bool, bool, bool]
    weights: Weights


def folder_of(path: str | os.PathLike) -> Path | None:
    """The adapter's folder if ``path`` is one or the file of matrices in one, else None."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    is_one = path.is_dir() or path.name in MODELS
    return folder if is_one and (folder / CONFIG).is_file() else None


def read(path: str | os.PathLike) -> Adapter:
    """The adapter in a folder, or in the folder of the file of matrices ``path``.

    Raises InputError that says why, if it is damaged, or if its result cannot be computed here.
    """
    folder = folder_of(path)
    if folder is None:
        raise InputError(f"{path}: no folder of a PEFT adapter; it would hold {CONFIG}")
    config = _read_config(folder)
    file = next((folder / name for name in MODELS if (folder / name).exists()), None)
    if file is None:
        raise InputError(f"{folder}: holds {CONFIG}, but neither {' nor '.join(MODELS)}; save the "
                         "adapter again")
    parts: dict[str, Weights] = {}
    replaced: Weights = {}
    for key, value in weight_files.read(file).items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
            raise InputError(f"{file}: {key} is no tensor of numbers; save the adapter again")
        if not key.startswith(PREFIX):
            raise InputError(f"{file}: {key} does not begin with {PREFIX}, so PEFT would not load "
                             "it; save the adapter with PEFT's save_pretrained")
        if not np.isfinite(value).all():
            raise InputError(f"{file}: {key} is not finite; train it again")
        match = LORA_KEY.fullmatch(key[len(PREFIX):])
        if match:
            layer = parameter_name(f"{match[1]}.weight")[:-len(".weight")]
            part = f"{match[2]}.bias" if match[3] == "bias" else match[2]
            target, name = parts.setdefault(layer, {}), part.replace("embedding_", "")
        else:
            name = key[len(PREFIX):]
            for wrapper in (".base_layer.", ".modules_to_save.default.", ".modules_to_save."):
                name = name.replace(wrapper, ".")
            target, name = replaced, parameter_name(name)
        if name in target:
            raise InputError(f"{file}: holds {key} under two names; remove one of them")
        target[name] = value
    if not parts:
        raise InputError(f"{file}: holds no LoRA matrices; save the adapter again")
    dropout = config.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise InputError(f"{folder / CONFIG}: lora_dropout is no number in [0, 1)")
    return Adapter(str(folder), {layer: _layer(folder, config, layer, tensors)
                                 for layer, tensors in parts.items()}, replaced, dropout)


def _read_config(folder: Path) -> dict:
    config = weight_files.read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder}: an adapter of type {kind}; only LORA can be read")
    init = config.get("init_lora_weights", True)
    if isinstance(init, (list, dict)) or init not in PLAIN_INITS:
        raise InputError(f"{folder}: init_lora_weights is {init}, whose base differs from GPT-2's; "
                         "convert it in PEFT first (path_initial_model_for_weight_conversion)")
    for key in sorted(config.keys() - KNOWN_KEYS):
        if config[key] not in (None, False, [], {}, ""):
            reason = REASONS.get(key, f"{CONFIG} sets {key}, which is not known here")
            raise InputError(f"{folder}: {reason}")
    return config


def _layer(folder: Path, config: dict, layer: str, tensors: Weights) -> LowRank:
    """The layer's matrices, their shapes checked against each other."""
    if layer == EMBEDDING[:-len(".weight")] or layer == "lm_head":
        raise _untied(folder, f"LoRA on {layer}")
    if not LAYER.fullmatch(layer) and (layer != POSITIONS or config.get("use_dora")):
        raise InputError(f"{folder}: LoRA on {layer}, which is not supported")
    A, B = tensors.get("lora_A"), tensors.get("lora_B")
    if A is None or B is None:
        raise InputError(f"{folder}: {layer} has lora_{'B' if A is None else 'A'} without "
                         f"lora_{'A' if A is None else 'B'}; save the adapter again")
    bias, magnitude = tensors.get("lora_B.bias"), tensors.get("lora_magnitude_vector")
    for key, tensor in (("lora_bias", bias), ("use_dora", magnitude)):
        if bool(config.get(key)) != (tensor is not None):
            raise InputError(f"{folder}: {key} is {bool(config.get(key))}, which does not fit the "
                             f"matrices of {layer}; save the adapter again")
    alpha, enable = _alpha(folder, config, layer), config.get("enable_lora")
    if enable:  # PEFT up to 0.2: as in loralib
        try:
            enable = tuple(map(bool, enable))
            B = B.reshape(len(B), -1)  # it was a convolution's, (G C, r, 1)
            if len(A) != sum(enable) * B.shape[1]:
                raise ValueError
            A, B, groups = _wide(A, B, enable)
        except (TypeError, ValueError):
            raise InputError(f"{folder}: the matrices of {layer} do not fit enable_lora {enable}"
                             ) from None
        alpha *= groups
    outputs = [("lora_B", B, 2), ("lora_B.bias", bias, 1), ("lora_magnitude_vector", magnitude, 1)]
    if A.ndim != 2 or any(t is not None and t.ndim != ndim for _, t, ndim in outputs) \
            or not A.size or A.shape[0] != B.shape[1] \
            or any(t is not None and len(t) != len(B) for _, t, _ in outputs):
        shapes = [f"{name} {t.shape}" for name, t, _ in [("lora_A", A, 2), *outputs]
                  if t is not None]
        raise InputError(f"{folder}: {layer} has {', '.join(shapes)}, which do not fit each other")
    if config.get("use_rslora"):  # its scale is alpha / sqrt(R)
        alpha *= math.sqrt(A.shape[0])
    return LowRank(A, B, alpha, bias, magnitude)


def _alpha(folder: Path, config: dict, layer: str) -> float:
    """lora_alpha of a layer; PEFT's default is 8."""
    alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    try:
        if not isinstance(patterns, dict):
            raise ValueError
        # The patterns come from a file, and some take years: with re there is no limit.
        key = next((k for k in patterns if regex.match(rf"(.*\.)?({k})$", layer, timeout=1)), None)
        alpha = alpha if key is None else patterns[key]
        if isinstance(alpha, bool) or not math.isfinite(alpha):
            raise ValueError
    except (TypeError, ValueError, OverflowError, TimeoutError, regex.error):
        raise InputError(f"{folder / CONFIG}: lora_alpha or alpha_pattern does not give a number "
                         f"for {layer}") from None
    return float(alpha)


def _untied(folder: object, what: str) -> InputError:
    return InputError(f"{folder}: {what} unties the output head from the token embedding; GPT-2 "
                      "here ties them")


def merge(adapter: Adapter, base: Weights) -> Weights:
    """The base with the adapter in it: W (in, out) becomes W + alpha / R (B A)^T, in float64.

    With DoRA (Liu et al., 2024, arXiv:2402.09353) each column of the sum gets its magnitude as its
    norm. ``base`` stays as it is; arrays that do not change are shared. Raises InputError where the
    adapter does not fit.
    """
    require_fit(adapter, base)
    merged = {**base, **{name: value.astype(np.float32) for name, value in adapter.replaced.items()
                         if name not in HEAD_NAMES}}
    for layer, low in adapter.layers.items():
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        W = merged[weight].astype(np.float64)  # (in, out)
        W += low.scale * (low.B.astype(np.float64) @ low.A.astype(np.float64)).T
        if low.magnitude is not None:
            W *= low.magnitude / np.linalg.norm(W, axis=0)
        merged[weight] = W.astype(np.float32)
        if low.bias is not None:
            total = merged[bias].astype(np.float64) + low.scale * low.bias.astype(np.float64)
            merged[bias] = total.astype(np.float32)
    return merged


def require_fit(adapter: Adapter, base: Weights) -> None:
    """Raises InputError if the adapter is of another model, or unties the head from the base's."""
    changed: dict[str, tuple[int, ...]] = {
        f"{layer}.weight": (low.A.shape[1], low.B.shape[0])
        for layer, low in adapter.layers.items()}
    for name, value in adapter.replaced.items():
        changed[EMBEDDING if name in HEAD_NAMES else name] = value.shape
    for name, shape in changed.items():
        if name not in base or base[name].shape != shape:
            is_in = f"has {base[name].shape}" if name in base else "does not have it"
            raise InputError(f"{adapter.path}: is for {name} {shape}, the base {is_in}; is it of "
                             "another model?")
    for name in {EMBEDDING, *HEAD_NAMES} & adapter.replaced.keys():
        if not np.array_equal(adapter.replaced[name].astype(np.float32), base[EMBEDDING]):
            raise _untied(adapter.path, f"another {name}")


def as_lora(adapter: Adapter, config: GPT2Config) -> OurLoRA:
    """The adapter as LoRA of our model, with the same function; lora_A (G r, C), lora_B (G C, r).

    If it does nothing to the key, its LoRA is on query and value; with the rank R / 2 if the halves
    of A serve one of them each, as :func:`write` writes it. Layers that it leaves out get zeros.
    Raises InputError for what only :func:`merge` can do, or if it does not fit ``config``.
    """
    lora = in_its_layers(adapter)
    C, groups = config.n_embd, sum(lora.enable)
    pair = {"lora_A": (groups * lora.r, C), "lora_B": (groups * C, lora.r)}
    shapes = {f"transformer.h.{n}.attn.c_attn.{name}": shape
              for n in range(config.n_layer) for name, shape in pair.items()}
    for name, w in lora.weights.items():
        if shapes.get(name) != w.shape:
            raise InputError(f"{adapter.path}: {name} is {w.shape} here, the model has "
                             f"{config.n_layer} layers of {C} numbers; does --model_card fit?")
    return replace(lora, weights={name: lora.weights.get(name, np.zeros(shape, np.float32))
                                  for name, shape in shapes.items()})


def in_its_layers(adapter: Adapter) -> OurLoRA:
    """:func:`as_lora` for the layers that the adapter has, whatever the model."""
    for name in adapter.replaced:
        if name == EMBEDDING or name in HEAD_NAMES:
            raise _untied(adapter.path, f"another {name}")
        raise _merge_first(adapter, f"also holds {name}")
    for layer, low in adapter.layers.items():
        if not layer.endswith(".attn.c_attn"):
            raise _merge_first(adapter, f"has LoRA on {layer}, which here is on c_attn alone")
        if low.magnitude is not None or low.bias is not None:
            raise _merge_first(adapter, "uses DoRA or lora_bias")
    lows = list(adapter.layers.values())
    C, R = lows[0].A.shape[1], max(low.rank for low in lows)
    if any((low.A.shape[1], low.B.shape[0]) != (C, 3 * C) for low in lows):
        raise InputError(f"{adapter.path}: its matrices are not of (R, C) and (3 C, R) with the "
                         "same C in all layers; it is of another model")
    top = max(lows, key=lambda low: abs(low.scale))
    A = np.zeros((len(lows), R, C), np.float32)
    B = np.zeros((len(lows), 3, C, R), np.float32)
    for n, low in enumerate(lows):  # lower ranks are filled up, lower scales put into B
        part = low.scale / abs(top.scale) if top.scale else 1.0
        A[n, :low.rank] = low.A
        B[n, :, :, :low.rank] = (low.B * np.float64(part)).reshape(3, C, low.rank)
    enable, r, half = (True, True, True), R, R // 2
    if B.any() and not B[:, 1].any():
        enable = (True, False, True)
        if R % 2 == 0 and not B[:, 0, :, half:].any() and not B[:, 2, :, :half].any():
            r = half
    thirds = np.flatnonzero(enable)
    if r == half:
        A_parts, B_parts = [A[:, :r], A[:, r:]], [B[:, 0, :, :r], B[:, 2, :, r:]]
    else:  # one A serves all
        A_parts, B_parts = [A] * len(thirds), [B[:, third] for third in thirds]
    weights = {}
    for n, name in enumerate(adapter.layers):
        weights[f"{name}.lora_A"] = np.concatenate([part[n] for part in A_parts])
        weights[f"{name}.lora_B"] = np.concatenate([part[n] for part in B_parts])
    return OurLoRA(r, abs(top.alpha) * (r / top.rank), enable, weights)


def _merge_first(adapter: Adapter, what: str) -> InputError:
    return InputError(f"{adapter.path}: {what}; {MERGE.format(shlex.quote(adapter.path))}")


def our_lora(lora: Weights, alpha: float, path: str | os.PathLike) -> OurLoRA:
    """LoRA from the weights of a file, see weights.lora_part. Raises InputError if it is none."""
    form = lora_form(lora)
    if form is None:
        raise InputError(f"{path}: its LoRA is not on query and value, nor on query, key and value")
    r, enable = form
    for name, w in lora.items():
        match = re.fullmatch(r"transformer\.h\.\d+\.attn\.c_attn\.lora_([AB])", name)
        columns = {"A": (sum(enable) * r, None), "B": (None, r)}
        if "lora_" in name and (not match or w.ndim != 2 or any(
                wanted not in (None, size) for size, wanted in zip(w.shape, columns[match[1]]))
                or name[:-1] + "AB".replace(match[1], "") not in lora):
            raise InputError(f"{path}: {name} {w.shape} is no LoRA of rank {r} like the others")
    return OurLoRA(r, alpha, enable, lora)


def from_lora(lora: OurLoRA, path: str | os.PathLike) -> Adapter:
    """Our LoRA in PEFT's form, see the head of this file; layers whose LoRA is zero are left out.

    Where all thirds have the same A in each layer, it is stored once, and the rank is r.
    """
    pairs = {name[:-len(".lora_A")]: (A, lora.weights[name[:-1] + "B"])
             for name, A in lora.weights.items() if name.endswith(".lora_A")}
    once = all(np.array_equal(A, np.tile(A[:lora.r], (sum(lora.enable), 1)))
               for A, _ in pairs.values())
    layers = {}
    for layer, (A, B) in pairs.items():
        A, B, times = _wide(A, B, lora.enable, once)
        if A.any() or B.any():
            layers[layer] = LowRank(A, B, times * lora.alpha)
    return Adapter(str(path), layers, {n: w for n, w in lora.weights.items() if "lora_" not in n})


def _wide(A: np.ndarray, B: np.ndarray, enable: tuple[bool, ...],
          once: bool = False) -> tuple[np.ndarray, np.ndarray, int]:
    """A (G r, C), B (G C, r) of the enabled thirds in PEFT's form, and how often r is its rank.

    With ``once``, the thirds' A are the same.
    """
    groups, r = sum(enable), B.shape[1]
    times = 1 if once else groups
    parts = B.reshape(groups, -1, r)  # (G, C, r)
    wide = np.zeros((len(enable), parts.shape[1], times * r), B.dtype)
    for group, third in enumerate(np.flatnonzero(enable)):
        first = 0 if once else group * r
        wide[third, :, first:first + r] = parts[group]
    return A[:times * r], wide.reshape(-1, times * r), times


def write(folder: Path, lora: OurLoRA, dropout: float, trained: str,
          base_model: str | None) -> None:
    """Writes our LoRA as an adapter: adapter_config.json, adapter_model.safetensors, README.md.

    ``trained`` says how long and on what, or is empty; ``base_model`` is the base's name on the Hub
    or its folder. Raises InputError if all is zero.
    """
    adapter = from_lora(lora, folder)
    if not adapter.layers:
        raise InputError("this LoRA is zero in every layer; there is nothing to export")
    low = next(iter(adapter.layers.values()))
    everywhere = 2 * len(adapter.layers) == sum("lora_" in name for name in lora.weights)
    only_lora = all(name.endswith("c_attn.bias") for name in adapter.replaced)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "inference_mode": True, "r": low.rank,
        "lora_alpha": int(low.alpha) if low.alpha == int(low.alpha) else low.alpha,
        "lora_dropout": dropout, "fan_in_fan_out": True,
        "target_modules": ["c_attn"] if everywhere else sorted(adapter.layers),
        "bias": "none" if not adapter.replaced else "lora_only" if only_lora else "all"}
    tensors = {}
    for layer, low in adapter.layers.items():
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = low.A
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = low.B
    for name, value in adapter.replaced.items():
        layer = name[:-len(".bias")]
        wrapped = f"{layer}.base_layer.bias" if layer in adapter.layers else name
        tensors[PREFIX + wrapped] = value
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="ascii")
    write_safetensors(folder / MODELS[0], tensors)

    # A model card that names a local folder as its base cannot be uploaded to the Hub.
    hub = base_model if base_model and HUB_ID.fullmatch(base_model) \
        and not Path(base_model).exists() else None
    (folder / "README.md").write_text(README.format(
        base_model=f"base_model: {hub}\n" if hub else "",
        tag=f'- "base_model:adapter:{hub}"\n' if hub else "", base=hub or "BASE",
        trained=f" for {trained}" if trained else "", dropout=dropout,
        r=lora.r, alpha=lora.alpha, R=low.rank, L=low.alpha, thirds=thirds(lora.enable)), "utf-8")


def thirds(enable: tuple[bool, ...]) -> str:
    """The enabled projections in words."""
    names = [name for name, enabled in zip(("query", "key", "value"), enable) if enabled]
    return ", ".join(names[:-1]) + " and " + names[-1]
