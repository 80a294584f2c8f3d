"""What a checkpoint says about itself, and the flags that follow from it."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict

import numpy as np
import pytest
import safetensors.numpy

import about
import model_flags
from config import MODEL_CARDS, GPT2Config, LoRAConfig
from runtime import torch_file
from runtime.errors import InputError

TINY = GPT2Config(2, 8, 2, 97, 32)
NANO = MODEL_CARDS["gpt2.nano"]


@pytest.fixture
def write(tmp_path):
    """Writes a checkpoint with this entry; returns its path."""
    def save(name, config=NANO, r=4, alpha=32, entry=None, settings=None):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = (about.describe(config, LoRAConfig(r, alpha, 0.1), "e2e", 200) if entry is None
                else entry if isinstance(entry, str) else json.dumps(entry))
        if settings:
            text = json.dumps({"settings": settings, "counters": {}})
        if path.suffix == ".safetensors":
            safetensors.numpy.save_file({"x": np.zeros(1)}, path, {"about": text, "format": "pt"})
        else:
            torch_file.save(path, {"model_state_dict": {"x": np.zeros(1, np.float32)},
                                   "about": text})
        return path
    return save


@pytest.fixture
def said():
    return []


@pytest.fixture
def complete(said, monkeypatch):
    """Flags in, (model_card, lora_dim, lora_alpha, dimensions) out; log lines go to ``said``."""
    monkeypatch.setattr(model_flags, "log", said.append)

    def run(init=None, lora=None, card=None, r=None, alpha=None):
        args = Namespace(init_checkpoint=init and str(init), lora_checkpoint=lora and str(lora),
                         model_card=card, lora_dim=r, lora_alpha=alpha)
        config = model_flags.complete(args, "gpt2.sm")
        return args.model_card, args.lora_dim, args.lora_alpha, config
    return run


def test_the_entry(write):
    entry = json.loads(about.describe(TINY, LoRAConfig(3, 27.5, 0.25), "e2e", 7))
    assert entry == {"version": 1, "model_card": "auto", "config": asdict(TINY), "lora_dim": 3,
                     "lora_alpha": 27.5, "lora_dropout": 0.25, "data": "e2e", "step": 7}
    entry = json.loads(about.describe(NANO, LoRAConfig(4, 32), "e2e", 7))
    assert entry["model_card"] == "gpt2.nano" and str(entry["lora_alpha"]) == "32"
    for name in ("model.7.pt", "model.safetensors"):
        path = write(name, TINY, 3, 27.5)
        assert about.read(path) == about.About(
            path, TINY, 3, 27.5, 0.1, "200 micro-batches on e2e")
        folder = write(f"folder/{name}", TINY, 3, 27.5).parent
    assert about.read(folder).config == TINY


def test_a_whole_model_beside_an_adapter(write, complete, shared, tmp_path):
    """As --init_checkpoint, a folder of both is the model, as --lora_checkpoint the adapter."""
    adapter = shared / "expected/interop/ours_exported"
    if not adapter.is_dir():
        pytest.skip("no expected/interop in the reference data")
    both = write("both/model.safetensors", NANO, 0, 128).parent
    for file in adapter.iterdir():
        (both / file.name).write_bytes(file.read_bytes())
    assert complete(both, None)[:3] == ("gpt2.nano", 0, 128)
    assert complete(both, both)[:3] == ("gpt2.nano", 3, 7.0)


def test_flags_that_are_not_given_are_the_files(complete, write, said):
    path = write("model.200.pt", alpha=27.5)
    assert complete(path) == complete(path, card="auto") == ("gpt2.nano", 4, 27.5, NANO)
    assert said == [f"{path}: taken from it: --model_card gpt2.nano, --lora_dim 4, --lora_alpha "
                    "27.5"] * 2
    said.clear()
    assert complete(path, None, "gpt2.nano", 4, 27.5) == ("gpt2.nano", 4, 27.5, NANO)
    assert said == []
    assert complete(path, r=4)[2] == 27.5
    assert said == [f"{path}: taken from it: --model_card gpt2.nano, --lora_alpha 27.5"]


def test_a_model_that_is_no_card(complete, write, said):
    path = write("model.200.pt", TINY)
    words = ("n_layer 2, n_embd 8, n_head 2, vocab_size 97, n_positions 32, layer_norm_epsilon "
             "1e-05")
    assert complete(path) == (words, 4, 32, TINY)
    assert f"--model_card {words}, " in said[0]


@pytest.mark.parametrize("flags, message", [
    ({"alpha": 128}, "trained with --lora_alpha 32, not 128; leave the flag out"),
    ({"alpha": 32.5}, "trained with --lora_alpha 32, not 32.5; leave the flag out"),
    ({"r": 8}, "trained with --lora_dim 4, not 8; leave the flag out"),
    ({"card": "gpt2.sm"}, "trained with --model_card gpt2.nano, not gpt2.sm; leave the flag out")])
def test_contradictions(complete, write, flags, message):
    path, base = write("model.200.pt"), write("base.pt", r=0)
    for files in ((path, None), (base, path), (path, path)):
        with pytest.raises(InputError) as error:
            complete(*files, **flags)
        named = base if "card" in flags and files[0] == base else path
        assert str(error.value) == f"{named}: {message}"


def test_a_base_for_a_new_lora_and_the_base_alone(complete, write):
    base, whole = write("base.pt", r=0, alpha=128), write("model.200.pt")
    assert complete(base) == ("gpt2.nano", 0, 128, NANO)
    assert complete(base, r=4, alpha=32) == ("gpt2.nano", 4, 32, NANO)
    assert complete(base, r=4) == ("gpt2.nano", 4, 128, NANO)
    assert complete(base, r=0, alpha=32) == ("gpt2.nano", 0, 32, NANO)
    assert complete(base, whole) == ("gpt2.nano", 4, 32, NANO)
    # as before, checkpoint.load has the last word
    assert complete(whole, r=0, alpha=16) == ("gpt2.nano", 0, 16, NANO)


def test_lora_of_another_base(complete, write):
    base, other = write("base.pt", r=0), write("model.200.pt", TINY)
    with pytest.raises(InputError, match=r"model.200.pt: trained on another base than .*base.pt: "
                                         "n_layer is 2, but 4 in that; give its own"):
        complete(base, other)


def test_files_that_say_nothing(complete, write, tmp_path):
    nothing = ("gpt2.sm", 0, 128, MODEL_CARDS["gpt2.sm"])
    torch_file.save(tmp_path / "old.pt", {"model_state_dict": {}})
    assert complete() == complete(tmp_path / "old.pt") == nothing
    assert complete(tmp_path / "old.pt", r=8, alpha=1.5, card="gpt2.lg")[:3] == ("gpt2.lg", 8, 1.5)
    good = json.loads(about.describe(NANO, LoRAConfig(4, 32), "e2e", 7))
    for entry in ("a model", "[" * 9000, [], 1, {}, {"version": 1}, {**good, "version": "1"},
                  {**good, "lora_dim": "4"}, {**good, "lora_dim": -4}, {**good, "lora_alpha": [1]},
                  {**good, "lora_alpha": float("nan")}, {**good, "lora_alpha": float("inf")},
                  {**good, "config": {**good["config"], "n_head": 3}}, {**good, "config": None}):
        assert complete(write("odd.pt", entry=entry)) == nothing
    assert complete(write("odd.pt"), write("odd.safetensors", entry="{"))[:3] == (
        "gpt2.nano", 0, 128)
    with pytest.raises(InputError, match="odd.pt: of a newer version of this program; update"):
        complete(write("odd.pt", entry={**good, "version": 2}))


def test_the_state_of_a_run(complete, write):
    settings = {"model_card": "gpt2.nano", "lora_dim": 4, "lora_alpha": 32, "lr": 0.1}
    path = write("resume.9.pt", settings=settings)
    assert complete(path) == ("gpt2.nano", 4, 32, NANO)
    with pytest.raises(InputError, match="trained with --lora_alpha 32, not 16"):
        complete(None, path, alpha=16)


def test_a_config_beside_the_weights(complete, tmp_path, said):
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    safetensors.numpy.save_file({"x": np.zeros(1)}, file)
    config.write_text(json.dumps({**asdict(NANO), "n_head": 8}))
    for path in (tmp_path, file):
        assert complete(path)[3] == complete(path, card="auto")[3] == GPT2Config(4, 128, 8)
        with pytest.raises(InputError) as error:
            complete(path, card="gpt2.nano")
        assert str(error.value) == (
            f"{config}: n_head is 8, but 4 in gpt2.nano; leave --model_card out, or this file is "
            "not of these weights")
    config.write_text(json.dumps(asdict(NANO)))
    said.clear()
    assert complete(tmp_path) == ("gpt2.nano", 0, 128, NANO)
    assert said == [f"{config}: taken from it: --model_card gpt2.nano"]
    assert complete(tmp_path, card="gpt2.nano", r=4, alpha=32) == ("gpt2.nano", 4, 32, NANO)


def test_an_entry_counts_more_than_a_config_beside_it(complete, write, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(asdict(TINY)))
    assert complete(write("model.200.pt"))[3] == NANO


def test_auto_needs_a_file_that_knows(complete, tmp_path):
    torch_file.save(tmp_path / "old.pt", {"model_state_dict": {}})
    with pytest.raises(InputError, match="old.pt: neither this file nor a config.json beside it "
                                         "says the model's dimensions; name them by --model_card"):
        complete(tmp_path / "old.pt", card="auto")
    with pytest.raises(InputError, match="none.pt: no such file; "):
        complete(tmp_path / "none.pt")
