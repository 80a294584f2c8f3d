"""A model as transformers stores it: a folder with its configuration, weights and tokenizer.

transformers 4 and 5 open it (``AutoModelForCausalLM``, ``AutoTokenizer``), and so do programs that
read its format, among them the converters of llama.cpp and CTranslate2. Only NumPy is needed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from config import GPT2Config
from encoder import END_OF_TEXT, get_encoder
from runtime.errors import InputError
from runtime.formats import read_json, read_lines
from weights import Weights, write_safetensors

VOCABULARY = 50257  # tokens of GPT-2's
LINE_BREAKS = 628  # the token of an empty line, which ends an answer in data/experiment.ini, too


def model_config(config: GPT2Config) -> dict:
    """The content of config.json."""
    end = VOCABULARY - 1 if config.vocab_size >= VOCABULARY else None
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        "vocab_size": config.vocab_size, "n_positions": config.n_positions,
        "n_ctx": config.n_positions,  # llama.cpp's converter asks for it
        "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head,
        "n_inner": None, "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layer_norm_epsilon, "tie_word_embeddings": True,
        "bos_token_id": end, "eos_token_id": end, "torch_dtype": "float32"}


def shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The names of the weights of a GPT-2 without LoRA, and their shapes."""
    C = config.n_embd
    linear = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C),
              "mlp.c_proj": (4 * C, C)}
    found: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, C),
                                         "wpe.weight": (config.n_positions, C)}
    for layer in range(config.n_layer):
        for name, shape in linear.items():
            found[f"h.{layer}.{name}.weight"] = shape
            found[f"h.{layer}.{name}.bias"] = shape[1:]
    for norm in [*(f"h.{n}.ln_{i}" for n in range(config.n_layer) for i in (1, 2)), "ln_f"]:
        found[f"{norm}.weight"] = found[f"{norm}.bias"] = (C,)
    return {f"transformer.{name}": shape for name, shape in found.items()}


def write_model(folder: Path, config: GPT2Config, weights: Weights) -> None:
    """Writes config.json, generation_config.json and model.safetensors.

    The head is tied to the embedding and therefore not stored.
    """
    model = model_config(config)
    _write_json(folder / "config.json", model)
    end = model["eos_token_id"]
    _write_json(folder / "generation_config.json", {
        "bos_token_id": end, "eos_token_id": end and [end, LINE_BREAKS]})
    write_safetensors(folder / "model.safetensors", weights)


def write_tokenizer(folder: Path, vocab: Path, n_positions: int) -> None:
    """Writes GPT-2's tokenizer from a folder of encoder.json and vocab.bpe.

    ``vocab.json`` and ``merges.txt`` are these files. ``tokenizer.json`` says the same to programs
    that use the package tokenizers alone. Raises InputError if the vocabulary is damaged.
    """
    get_encoder(vocab)  # checks both files
    try:
        shutil.copyfile(vocab / "encoder.json", folder / "vocab.json")
        shutil.copyfile(vocab / "vocab.bpe", folder / "merges.txt")
    except OSError as error:
        raise InputError(f"{vocab}: its files cannot be copied: {error.strerror}") from None
    tokens: Any = read_json(vocab / "encoder.json")
    lines = read_lines(vocab / "vocab.bpe")
    merges = lines[1:] if lines[0].startswith("#version") else lines
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    _write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": tokens[END_OF_TEXT], "content": END_OF_TEXT, "special": True,
                          "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False}],
        "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": {**byte_level, "trim_offsets": False}, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                  "byte_fallback": False, "vocab": tokens, "merges": merges}})
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": n_positions,
        "add_prefix_space": False, "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="ascii")
