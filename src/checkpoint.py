"""Fills a model from checkpoints, and writes them."""

from __future__ import annotations

import os
from typing import Any

import jittor as jt
import numpy as np

import lora
import peft_adapter
from model import GPT2LMModel
from runtime import torch_file
from runtime.errors import InputError
from weight_names import EMBEDDING, HEAD_NAMES
from weights import lora_form, lora_part, read_weights

LISTED = 3  # names in a message


def load(model: GPT2LMModel, init_checkpoint: str | None, lora_checkpoint: str | None = None,
         lora_required: bool = False) -> None:
    """Fills the model from a checkpoint of the base or of the whole model, then from one of LoRA.

    LoRA comes from a file or from the folder of a PEFT adapter; if it is on query, key and value,
    the model's is put there, too. If no file holds LoRA matrices, the model keeps its own; with
    ``lora_required`` that is an error. Raises InputError that lists missing, unexpected and
    misshapen weights, three of each.
    """
    has_lora = False
    if init_checkpoint:
        weights = read_weights(init_checkpoint)
        has_lora = any("lora_" in name for name in weights)
        if len(lora_part(weights)) == len(weights):
            raise InputError(f"{init_checkpoint}: holds LoRA matrices only; give the base model as "
                             f"--init_checkpoint and this file as --lora_checkpoint")
        if has_lora and not model.lora_config.r:
            raise InputError(f"{init_checkpoint}: holds LoRA matrices, for which --lora_dim 0 has "
                             "no place; give their rank, or the base without them")
        _enable_lora(model, weights)
        _fill(model, weights, init_checkpoint, optional="" if has_lora else "lora_")
    if lora_checkpoint:
        weights = _lora_weights(model, lora_checkpoint)
        model.lora_biases = [name for name in weights if "lora_" not in name]
        _enable_lora(model, weights)
        _fill(model, weights, lora_checkpoint, lora_only=True)
    elif lora_required and model.lora_config.r and not has_lora:
        raise InputError(f"{init_checkpoint}: holds no LoRA matrices; give them with "
                         "--lora_checkpoint, or --lora_dim 0 to use the base alone")


def _lora_weights(model: GPT2LMModel, path: str) -> dict[str, np.ndarray]:
    """The LoRA of a file of ours or of a PEFT adapter; raises InputError if it has none."""
    if not peft_adapter.folder_of(path):
        weights = lora_part(read_weights(path))
        if not weights:
            raise InputError(f"{path}: holds no LoRA matrices; give a model.STEP.pt of "
                             "src/gpt2_ft.py or the folder of a PEFT adapter")
        return weights
    found, wanted = peft_adapter.as_lora(peft_adapter.read(path), model.config), model.lora_config
    if (found.r, found.alpha) != (wanted.r, wanted.alpha):
        raise InputError(f"{path}: has --lora_dim {found.r} and --lora_alpha {found.alpha:g}, not "
                         f"{wanted.r} and {wanted.alpha:g}; leave these flags out")
    return found.weights


def _enable_lora(model: GPT2LMModel, weights: dict[str, np.ndarray]) -> None:
    """Puts the model's LoRA on the thirds that it is on in ``weights``."""
    form = lora_form(weights)
    if form and model.lora_config.r and form[1] != model.lora_config.enable:
        model.enable_lora(form[1])


def _fill(model: GPT2LMModel, weights: dict[str, np.ndarray], path: str, optional: str = "",
          lora_only: bool = False) -> None:
    parameters = {n: p for n, p in model.named_parameters()
                  if not lora_only or "lora_" in n or n in weights}
    missing = [n for n in parameters if n not in weights and not (optional and optional in n)]
    unexpected = [n for n in weights if n not in parameters]
    misshapen = [f"{n} {weights[n].shape} for {tuple(p.shape)}" for n, p in parameters.items()
                 if n in weights and tuple(p.shape) != weights[n].shape]
    faults = [f"{len(names)} {what}: {_listed(names)}" for what, names in
              (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if names]
    if faults:
        rows = weights[EMBEDDING].shape[0] if EMBEDDING in weights else 0
        if not missing and not unexpected and len(misshapen) == 1 and EMBEDDING in misshapen[0]:
            raise InputError(f"{path}: its vocabulary has {rows} tokens, that of --model_card "
                             f"{parameters[EMBEDDING].shape[0]}; for a resized vocabulary, keep "
                             "its config.json beside it and give --model_card auto")
        remedy = "does --model_card fit the file?"
        if any("lora_" in name for name in missing + unexpected + misshapen):
            remedy = "do --model_card and --lora_dim fit the file?"
        elif misshapen and all(tuple(parameters[name].shape) == weights[name].shape[::-1]
                               for name in parameters if name in weights
                               and tuple(parameters[name].shape) != weights[name].shape):
            remedy = "these are transposed, as nanoGPT's; store c_attn, c_fc and c_proj (in, out)"
        raise InputError(f"{path}: {'; '.join(faults)}; {remedy}")
    for name, p in parameters.items():
        if name in weights:  # popped, so that no second copy of the whole model is in memory
            p.assign(jt.array(np.ascontiguousarray(weights.pop(name))))


def _listed(names: list[str]) -> str:
    """The first three of ``names``, at most 100 characters each, and the number of the others."""
    others = f" and {len(names) - LISTED} others" if len(names) > LISTED else ""
    return ", ".join(name[:100] for name in names[:LISTED]) + others


def save_model(model: GPT2LMModel, path: str | os.PathLike, about: str | None = None) -> None:
    """Writes the whole model under the original's names; ``torch.load`` opens the file.

    ``about`` is what the file says about itself, see about.describe.
    """
    # Views of Jittor's memory; packed matrices become arrays one at a time, when they are written.
    state = {name: p.data if isinstance(p, jt.Var) else p for name, p in model.weights().items()}
    state[HEAD_NAMES[1]] = state[EMBEDDING]
    _save(path, state, about)


def save_lora(model: GPT2LMModel, path: str | os.PathLike, about: str | None = None) -> None:
    """Writes the LoRA matrices alone; ``--lora_checkpoint`` reads them, beside their base.

    Biases that came with the matrices stay with them.
    """
    state = {name: p.numpy() for name, p in model.named_parameters() if name in model.lora_biases}
    state.update({name: p.numpy() for name, p in lora.lora_state_dict(model).items()})
    _save(path, state, about)


def _save(path: str | os.PathLike, state: dict[str, Any], about: str | None) -> None:
    torch_file.save(path, {"model_state_dict": state, **({"about": about} if about else {})})
