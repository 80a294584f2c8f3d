"""Hugging Face folders, shards, and files that are no weights, against transformers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import about
import hf_config
import weight_files
from config import GPT2Config, card_of, config_of
from runtime.errors import InputError

DIMS = {"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 61, "n_positions": 40}
IDS = np.random.default_rng(0).integers(0, 61, (2, 9))


@pytest.fixture(scope="module")
def folders(torch_side, tmp_path_factory):
    """Folders of one model, by the form of its weights, and transformers' logits."""
    top, logits = tmp_path_factory.mktemp("folders"), None
    for name, options in (("safetensors", {}), ("bin", {"safe_serialization": False}),
                          ("safetensors shards", {"max_shard_size": "20KB"}),
                          ("bin shards", {"max_shard_size": "20KB", "safe_serialization": False})):
        logits = torch_side("save_pretrained", {"input_ids": IDS}, path=str(top / name), dims=DIMS,
                            **options)["logits"]
    return top, logits


def logits_of(jittor, config: GPT2Config, path, ids=IDS):
    import checkpoint
    from generator import Generator
    from model import GPT2LMModel

    model = GPT2LMModel(config)
    checkpoint.load(model, str(path))
    generator, rows = Generator(model), []
    for length in range(1, ids.shape[1] + 1):
        logits, _ = generator.start(ids[:, :length], np.full(len(ids), length), 1, 1)
        rows.append(logits.numpy())
    return np.stack(rows, axis=1)  # (B, T, V)


@pytest.mark.parametrize("name", ["safetensors", "bin", "safetensors shards", "bin shards"])
def test_folders_of_transformers(jittor, folders, name):
    folder, logits = folders[0] / name, folders[1]
    forms = {path.name for path in folder.iterdir()}
    assert ("shards" in name) == any("-of-" in form for form in forms)
    config = about.read(folder).config
    assert config == GPT2Config(**DIMS) and np.abs(logits).max() > 2
    paths = [folder, weight_files.locate(folder)]
    for path in paths:
        assert np.abs(logits_of(jittor, config, path) - logits).max() < 5e-5
        assert about.read(path) == about.About(folder / "config.json", config)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"n_layer": 6}, {"n_embd": 100, "n_head": 4}, {"n_embd": 128, "n_head": 1},
    {"n_head": 24}, {"vocab_size": 64}, {"n_positions": 12}, {"layer_norm_epsilon": 0.01}])
def test_any_dimensions_run(jittor, torch_side, tmp_path, change):
    """Among them odd and large heads; each also needs its own number of heads and epsilon."""
    logits = torch_side("save_pretrained", {"input_ids": IDS}, path=str(tmp_path),
                        dims={**DIMS, **change})["logits"]
    config = about.read(tmp_path).config
    assert config == GPT2Config(**{**DIMS, **change})
    assert np.abs(logits_of(jittor, config, tmp_path) - logits).max() < 5e-5


def test_the_tiny_base(jittor, shared):
    """Logits of the shared base, in float64, by NumPy and PyTorch."""
    folder = shared / "expected/interop"
    config = about.read(folder / "base").config
    assert config == GPT2Config(2, 32, 4, 61, 24)
    ids = np.array(json.loads((folder / "expected.json").read_text())["ids"])
    with np.load(folder / "logits.npz") as expected:
        truth = expected["base"]  # (B, V), of the last position
    logits = logits_of(jittor, config, folder / "base", ids)[:, -1]
    assert np.abs(logits - truth).max() < 5e-5 < np.abs(truth).max()


def test_the_order_in_a_folder(folders, tmp_path):
    both = shutil.copytree(folders[0] / "bin shards", tmp_path / "both")
    assert weight_files.locate(both).name == "pytorch_model.bin.index.json"
    for name in ("bin", "safetensors shards", "safetensors"):
        shutil.copytree(folders[0] / name, both, dirs_exist_ok=True)
        assert weight_files.locate(both) == both / {
            "bin": "pytorch_model.bin", "safetensors": "model.safetensors",
            "safetensors shards": "model.safetensors.index.json"}[name]


def error_of(read, *arguments) -> str:
    with pytest.raises(InputError) as error:
        read(*arguments)
    assert ";" in str(error.value)
    return str(error.value)


def test_wrong_shards(folders, tmp_path):
    good = folders[0] / "safetensors shards"
    shards = sorted(path.name for path in good.glob("model-*"))
    index = json.loads((good / "model.safetensors.index.json").read_text())

    def changed(weight_map):
        folder = shutil.copytree(good, tmp_path / "wrong", dirs_exist_ok=True)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    names = index["weight_map"]
    name = next(name for name, shard in names.items() if shard == shards[0])
    folder = changed({**names, name: shards[1]})
    assert (f"{folder / shards[1]}: lacks {name}, which model.safetensors.index.json says is there"
            in error_of(weight_files.read, folder))
    folder = changed({**names, "x": shards[0]})
    assert "lacks x, which" in error_of(weight_files.read, folder)
    shutil.copy(folder / shards[0], folder / "copy.safetensors")
    assert ", which another shard holds, too" in error_of(
        weight_files.read, changed({**names, name: "copy.safetensors"}))
    for wrong in ({}, None, {"x": "../model.safetensors"}, {"x": "/etc/passwd"}, {"x": 1}):
        assert "no \"weight_map\" of files in its own folder" in error_of(
            weight_files.read, changed(wrong))
    folder = changed(names)
    (folder / shards[1]).unlink()
    assert f"{folder / shards[1]}: no such file" in error_of(weight_files.read, folder)
    assert (f"{good / shards[0]}: one of {len(shards)} shards; give the folder or "
            "model.safetensors.index.json" in error_of(weight_files.read, good / shards[0]))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"


@pytest.mark.parametrize("content, message", [
    (POINTER, "a Git LFS pointer, not the file itself; run: git lfs pull"),
    (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page, not the file itself; "),
    (b'{"error": "Repository not found"}', "a JSON text, no weights; ")])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pkl"])
def test_files_that_are_no_weights(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for read in (weight_files.read, about.read):
        assert f"{tmp_path / name}: {message}" in error_of(read, tmp_path / name)
    if name != "model.pkl":
        assert message in error_of(weight_files.read, tmp_path)


def test_a_config_that_is_none(tmp_path):
    (tmp_path / "model.pkl").write_bytes(b"")
    for content, message in ((POINTER, "a Git LFS pointer"), (b"<html>", "a web page"),
                             (b"[1]", "no JSON object; fetch"), (b"{", "no JSON object"),
                             (b"[" * 100_000, "no JSON object"), (b"\xff", "no JSON object")):
        (tmp_path / "config.json").write_bytes(content)
        assert f"{tmp_path / 'config.json'}: {message}" in error_of(about.read,
                                                                    tmp_path / "model.pkl")


def test_folders_without_weights(tmp_path):
    remedies = {"adapter_config.json": "a PEFT adapter, not a whole model; give its base as --init_"
                                       "checkpoint and this folder as --lora_checkpoint",
                "model.200.pt": f"give one of its files, e.g. {tmp_path / 'model.200.pt'}",
                "tf_model.h5": "tf_model.h5 is of another program, save it with transformers",
                "README.md": "bash download_pretrained_checkpoints.sh"}
    for name, remedy in remedies.items():
        (tmp_path / name).touch()
        assert remedy in error_of(weight_files.read, tmp_path)
        (tmp_path / name).unlink()


def test_digests_cover_all_files(folders, tmp_path):
    for name in ("safetensors", "bin shards"):
        folder = shutil.copytree(folders[0] / name, tmp_path / name)
        digests = {weight_files.digest(folder)}
        assert weight_files.digest(folders[0] / name) in digests
        changed = [path for path in sorted(folder.iterdir()) if path.suffix != ".md"
                   and path.name != "generation_config.json"]
        for path in changed:
            path.write_bytes(path.read_bytes() + b" ")
            digests.add(weight_files.digest(folder))
        assert len(digests) == len(changed) + 1
    file = folders[0] / "bin/pytorch_model.bin"
    assert weight_files.digest(file) != weight_files.digest(file.parent)


def test_the_digest_of_an_adapters_file_covers_its_configuration(tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    before = weight_files.digest(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    assert weight_files.digest(tmp_path / "adapter_model.safetensors") != before


@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "model.fp32.bin.index.json"])
def test_the_digest_of_an_index_covers_its_own_shards(folders, tmp_path, name):
    folder = shutil.copytree(folders[0] / "bin shards", tmp_path / "both")
    shutil.copy(folders[0] / "safetensors/model.safetensors", folder)  # a folder's first choice
    index = (folder / "pytorch_model.bin.index.json").rename(folder / name)
    before = weight_files.digest(index)
    shard = next(folder.glob("*-of-*.bin"))
    shard.write_bytes(shard.read_bytes() + b" ")
    assert weight_files.digest(index) != before


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llama"}, "model_type is llama, only gpt2 can run here"),
    ({"activation_function": "gelu"}, "activation_function is gelu, only gelu_new can run here"),
    ({"scale_attn_weights": False}, "scale_attn_weights is false, only true can run here"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true, only"),
    ({"add_cross_attention": True}, "add_cross_attention is true, only false can run here"),
    ({"n_inner": 95}, "n_inner is 95, only 4 n_embd can run here, which is 96"),
    ({"n_head": 5}, "n_embd is 24, no multiple of n_head 5"),
    ({"n_head": 0}, "n_head is 0, no dimension"), ({"n_layer": "2"}, "n_layer is 2, no dimension"),
    ({"n_layer": True}, "n_layer is True, no"), ({"vocab_size": 1e300}, "vocab_size is 1e+300, no"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0, not above 0"),
    ({"layer_norm_epsilon": [1]}, "layer_norm_epsilon is [1], not above 0")])
def test_configs_that_cannot_run(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**DIMS, **change}))
    assert f"{path}: {message}" in error_of(hf_config.read, path)


def test_configs_that_can(tmp_path):
    path = tmp_path / "config.json"
    for change in ({"n_inner": None}, {"n_inner": 96}, {"reorder_and_upcast_attn": True},
                   {"unknown": {}}, {"tie_word_embeddings": True}):
        path.write_text(json.dumps({**DIMS, **change}))
        assert hf_config.read(path) == GPT2Config(**DIMS)
    path.write_text("{}")
    assert card_of(hf_config.read(path)) == "gpt2.sm"  # transformers' defaults
    path.write_text(json.dumps({"num_attention_heads": 4, "hidden_size": 16}))
    assert hf_config.read(path) == GPT2Config(12, 16, 4)
    with pytest.raises(ValueError, match="n_head is -1"):
        config_of({**DIMS, "n_head": -1})
