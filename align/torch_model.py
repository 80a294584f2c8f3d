"""GPT-2 with LoRA, made of transformers' model and loralib's layer.

Hu et al., 2021, LoRA (arXiv:2106.09685): the fused query/key/value projection of every layer gets
a low-rank update on its query and value thirds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import loralib
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from common import InputError, replacing

CARDS = {
    "gpt2.sm": dict(n_layer=12, n_embd=768, n_head=12),
    "gpt2.md": dict(n_layer=24, n_embd=1024, n_head=16),
    "gpt2.lg": dict(n_layer=36, n_embd=1280, n_head=20),
    "gpt2.nano": dict(n_layer=4, n_embd=128, n_head=4),
}
TIED = ("lm_head.weight", "lm_head.decoder.weight")  # the output embedding: wte under other names
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # constants in older files, not weights


def build(card: str | Mapping[str, int], lora_dim: int = 0, lora_alpha: int = 128,
          lora_dropout: float = 0.0) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2, float32 on the CPU, whose ``model(ids).logits`` is (B, T, V).

    ``card`` is a key of :data:`CARDS`, or GPT2Config's own arguments for another size, e.g.
    ``dict(n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=64)``. With ``lora_dim`` > 0
    only ``lora_*`` is trainable; 0 means no LoRA, and every weight is trainable.
    """
    dims = CARDS[card] if isinstance(card, str) else card
    config = GPT2Config(**dims, activation_function="gelu_new", layer_norm_epsilon=1e-5,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
                        attn_implementation="eager")
    model = GPT2LMHeadModel(config)
    width = config.n_embd
    for block in model.transformer.h:
        block.attn.c_attn = loralib.MergedLinear(
            width, 3 * width, r=lora_dim, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
            enable_lora=[True, False, True], fan_in_fan_out=True, merge_weights=False)
        nn.init.normal_(block.attn.c_attn.weight, std=config.initializer_range)
        nn.init.zeros_(block.attn.c_attn.bias)
    if lora_dim > 0:
        loralib.mark_only_lora_as_trainable(model)
    return model


def with_bf16_products(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Changes the float32 ``model`` to compute matrix products in bfloat16, by autocast.

    Weights, residual stream, LayerNorm and the logits that come out stay in float32.
    """
    forward = model.forward

    def autocast(*args, **kwargs):
        with torch.autocast(model.device.type, torch.bfloat16):
            output = forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = autocast
    return model


def loss(logits: Tensor, target: Tensor, mask: Tensor, label_smooth: float = 0.0) -> Tensor:
    """Mean loss of the masked positions in nats, a scalar.

    logits (B, T, V), target (B, T) int64, mask (B, T) of 0 and 1. The small number in the
    denominator is the original's: a batch without any trained token has loss 0.
    """
    log_probs = F.log_softmax(logits, dim=-1)
    per_token = -log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)  # (B, T)
    if label_smooth > 0.0001:
        uniform = -log_probs.mean(dim=-1)
        per_token = (1.0 - label_smooth) * per_token + label_smooth * uniform
    return (per_token * mask).sum() / (mask.sum() + 0.0001)


def load_weights(model: GPT2LMHeadModel, path: str | os.PathLike) -> None:
    """Fills the model from a whole checkpoint: GPT-2 as published, or one of this experiment.

    With a base without LoRA, ``lora_*`` keeps its initial values. Raises InputError for a file that
    cannot be read or holds LoRA weights only, and for missing, unexpected or misshapen weights.
    """
    weights = _read(path)
    if weights and all("lora_" in name for name in weights):
        raise InputError(f"{path}: holds LoRA weights only; give their base as --init_checkpoint "
                         "and this file as --lora_checkpoint")
    with_lora = any("lora_" in name for name in weights)
    _copy(model, weights, path, lambda name: with_lora or "lora_" not in name)


def load_lora(model: GPT2LMHeadModel, path: str | os.PathLike) -> None:
    """Fills the model's ``lora_*`` from a checkpoint, not its other weights; errors as above."""
    weights = {name: value for name, value in _read(path).items() if "lora_" in name}
    if not weights:
        raise InputError(f"{path}: holds no LoRA weights; give it as --init_checkpoint instead")
    _copy(model, weights, path, lambda name: "lora_" in name)


def save_weights(model: GPT2LMHeadModel, path: str | os.PathLike, lora_only: bool = False) -> None:
    """Writes ``{"model_state_dict": ...}`` with the original program's names, by torch.save."""
    weights = loralib.lora_state_dict(model) if lora_only else model.state_dict()
    weights = {name.replace("lm_head.weight", "lm_head.decoder.weight"): value.contiguous()
               for name, value in weights.items()}
    with replacing(path) as file:
        torch.save({"model_state_dict": weights}, file)


def _read(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights of a .safetensors or torch file by the names of GPT2Model (``h.0.ln_1.bias``)."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path of the checkpoint") from None
    except Exception:  # a damaged or hostile file can cause any exception
        raise InputError(f"{path}: damaged, or not a checkpoint of weights alone, by torch or "
                         "safetensors; fetch or write it again") from None
    if isinstance(weights, dict):
        weights = weights.get("model_state_dict", weights)
    if not isinstance(weights, dict) or not all(torch.is_tensor(v) for v in weights.values()):
        raise InputError(f"{path}: holds no table of weights; give a GPT-2 checkpoint")
    weights = {_canonical(name): value for name, value in weights.items()}
    weights = {name: value for name, value in weights.items() if not MASK_BUFFER.fullmatch(name)}
    for name in TIED:
        head = weights.pop(name, None)
        if head is not None and not torch.equal(head, weights.get("wte.weight", head)):
            raise InputError(f"{path}: {name} differs from the token embedding; GPT-2 ties the two")
    return weights


def _canonical(name: str) -> str:
    """One name for a weight, whichever program wrote the file."""
    name = name.removeprefix("module.").removeprefix("transformer.")
    for short, full in ((".g", ".weight"), (".w", ".weight"), (".b", ".bias")):
        if name.endswith(short):  # the names in TensorFlow's GPT-2
            name = name[: -len(short)] + full
    return name


def _copy(model: GPT2LMHeadModel, weights: dict[str, Tensor], path, wanted) -> None:
    """Copies ``weights`` into the ``wanted`` parameters; names and shapes must match exactly."""
    parameters = {_canonical(name): p for name, p in model.named_parameters()}
    missing = [name for name in parameters if wanted(name) and name not in weights]
    unexpected = [name for name in weights if name not in parameters]
    misshapen = [f"{name} is {tuple(value.shape)}, not {tuple(parameters[name].shape)}"
                 for name, value in weights.items()
                 if name in parameters and value.shape != parameters[name].shape]
    faults = [f"{fault} {len(names)} ({', '.join(names[:4])}{' ...' if names[4:] else ''})"
              for fault, names in (("missing", missing), ("unexpected", unexpected),
                                   ("misshapen", misshapen)) if names]
    if faults:
        raise InputError(f"{path}: does not fit the model: weights {'; '.join(faults)}; check "
                         "--model_card and --lora_dim")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
