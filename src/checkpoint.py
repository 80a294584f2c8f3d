"""Fills a model from checkpoints and writes them."""

from __future__ import annotations

import os

import jittor as jt
import numpy as np

import lora
import peft_adapter
from model import GPT2LMModel
from runtime import torch_file
from runtime.errors import InputError
from weights import EMBEDDING, HEAD_NAMES, lora_form, lora_part, read_weights


def load(model: GPT2LMModel, init_checkpoint: str | None, lora_checkpoint: str | None = None,
         lora_required: bool = False) -> None:
    """Fills the model from a checkpoint of the base or of the whole model, then from one of LoRA.

    LoRA comes from a file or from the folder of a PEFT adapter; if it is on query, key and value,
    the model's is put there, too. If no file holds LoRA matrices, the model keeps its own; with
    ``lora_required`` that is an error. Raises InputError that lists missing, unexpected and
    misshapen weights, ten of each.
    """
    has_lora = False
    if init_checkpoint:
        weights = read_weights(init_checkpoint)
        has_lora = any("lora_" in name for name in weights)
        if len(lora_part(weights)) == len(weights):
            raise InputError(f"{init_checkpoint}: holds LoRA matrices only; give the base model as "
                             f"--init_checkpoint and this file as --lora_checkpoint")
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
        remedy = "does --model_card fit the file?"
        if any("lora_" in name for name in missing + unexpected + misshapen):
            remedy = "do --model_card and --lora_dim fit the file?"
        raise InputError(f"{path}: {'; '.join(faults)}; {remedy}")
    for name, p in parameters.items():
        if name in weights:  # popped, so that no second copy of the whole model is in memory
            p.assign(jt.array(np.ascontiguousarray(weights.pop(name))))


def _listed(names: list[str]) -> str:
    """The first ten of ``names``, at most 100 characters each, and the number of the others."""
    others = f" and {len(names) - 10} others" if len(names) > 10 else ""
    return ", ".join(name[:100] for name in names[:10]) + others


def save_model(model: GPT2LMModel, path: str | os.PathLike) -> None:
    """Writes the whole model under the original's names; ``torch.load`` opens the file."""
    state = {name: p.data for name, p in model.named_parameters()}  # views of Jittor's memory
    state[HEAD_NAMES[1]] = state[EMBEDDING]
    torch_file.save(path, {"model_state_dict": state})


def save_lora(model: GPT2LMModel, path: str | os.PathLike) -> None:
    """Writes the LoRA matrices alone; ``--lora_checkpoint`` reads them, beside their base.

    Biases that came with the matrices stay with them.
    """
    state = {name: p.numpy() for name, p in model.named_parameters() if name in model.lora_biases}
    state.update({name: p.numpy() for name, p in lora.lora_state_dict(model).items()})
    torch_file.save(path, {"model_state_dict": state})
