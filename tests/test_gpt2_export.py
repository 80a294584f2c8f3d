"""The export: opened by transformers, PEFT, CTranslate2 and loralib; whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from conftest import run_main
from test_peft_adapter import IDS, TINY, logits, with_lora

import gpt2_export
from config import GPT2Config
from peft_adapter import OurLoRA
from runtime import torch_file
from runtime.errors import InputError
from runtime.folders import exported


@pytest.fixture(autouse=True)
def tiny_card(monkeypatch):
    monkeypatch.setitem(gpt2_export.MODEL_CARDS, "gpt2.nano", TINY)


def export(kind, init, output, *flags, lora=None):
    """Runs the script; returns (exit code, stderr)."""
    return run_main(gpt2_export.main, [
        "--format", kind, "--init_checkpoint", init, "--output_dir", output,
        *(["--lora_checkpoint", lora] if lora else []), *flags])


def random_weights(seed=0, config=TINY):
    import hf_export

    random = np.random.default_rng(seed)
    return {name: random.normal(name.endswith("ln_1.weight"), 0.2, shape).astype(np.float32)
            for name, shape in hf_export.shapes(config).items()}


def random_lora(seed=1, r=3, enable=(True, False, True), alpha=5.0):
    random, groups = np.random.default_rng(seed), sum(enable)
    return OurLoRA(r, alpha, enable, {
        f"transformer.h.{n}.attn.c_attn.lora_{part}": random.normal(0, 0.3, shape)
        .astype(np.float32) for n in range(TINY.n_layer)
        for part, shape in (("A", (groups * r, TINY.n_embd)), ("B", (groups * TINY.n_embd, r)))})


@pytest.fixture
def base(tmp_path):
    torch_file.save(tmp_path / "base.pt", {"model_state_dict": random_weights()})
    return tmp_path / "base.pt"


@pytest.fixture
def lora(tmp_path):
    torch_file.save(tmp_path / "model.5.pt", {"model_state_dict": random_lora().weights})
    return tmp_path / "model.5.pt"


@pytest.fixture
def whole(tmp_path):
    """As the last checkpoint of a training: base, LoRA and the head."""
    weights = {**random_weights(), **random_lora().weights}
    weights["lm_head.decoder.weight"] = weights["transformer.wte.weight"]
    torch_file.save(tmp_path / "model.9.pt", {"model_state_dict": weights})
    return tmp_path / "model.9.pt"


WANTED = logits(with_lora(random_lora(), random_weights()), IDS)
BASE = logits(random_weights(), IDS)


def opened(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def test_hf_is_the_merged_model(base, lora, whole, tmp_path):
    for n, flags in enumerate(([base, tmp_path / "0", "--lora_alpha", 5],
                               [whole, tmp_path / "1", "--lora_alpha", 5, "--lora_dim", 3])):
        code, said = export("hf", *flags, lora=None if n else lora)
        assert code == 0, said
        weights = opened(tmp_path / str(n))
        assert weights.keys() == random_weights().keys()
        assert np.abs(logits(weights, IDS) - WANTED).max() < 1e-5
    assert np.abs(BASE - WANTED).max() > 0.1
    assert (tmp_path / "0/model.safetensors").read_bytes() == \
        (tmp_path / "1/model.safetensors").read_bytes()
    config = json.loads((tmp_path / "0/config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 24 and config["n_head"] == 4
    assert config["vocab_size"] == 61 and config["tie_word_embeddings"] is True


def test_hf_of_a_base_alone(base, tmp_path):
    assert export("hf", base, tmp_path / "out")[0] == 0
    found = opened(tmp_path / "out")
    assert all(np.array_equal(found[name], a) for name, a in random_weights().items())


@pytest.mark.slow
def test_transformers_opens_it(base, lora, tmp_path, torch_side):
    assert export("hf", base, tmp_path / "out", "--lora_alpha", 5, lora=lora)[0] == 0
    found = torch_side("folder_logits", {"ids": IDS}, base=str(tmp_path / "out"))["logits"]
    assert np.abs(found - WANTED).max() < 1e-5 < 0.1 < np.abs(found - BASE).max()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("peft"),
                    reason="no PEFT; pip install -r requirement-bench.txt")
def test_peft_opens_it(base, whole, tmp_path, torch_side):
    assert export("hf", base, tmp_path / "base")[0] == 0
    code, said = export("peft", whole, tmp_path / "out", "--lora_alpha", 5, "--base_model",
                        tmp_path / "base")
    assert code == 0, said
    for model in (tmp_path / "base", tmp_path / "out"):  # the adapter names its base
        found = torch_side("folder_logits", {"ids": IDS}, base=str(model), adapter=str(
            tmp_path / "out") if model.name == "base" else None)["logits"]
        assert np.abs(found - WANTED).max() < 1e-5 < 0.1 < np.abs(found - BASE).max()


def test_model_card_names_only_a_base_of_the_hub(base, lora, tmp_path):
    for number, name in enumerate(("openai-community/gpt2", base.parent, "../gpt2", None)):
        folder = tmp_path / f"out{number}"
        assert export("peft", base, folder, "--lora_alpha", 5,
                      *(["--base_model", name] if name else []), lora=lora)[0] == 0
        text = (folder / "README.md").read_text()
        front = text.split("---\n")[1]
        assert ("base_model: openai-community/gpt2\n" in front) == (number == 0)
        assert ("base_model:" in front) == (number == 0) and "library_name: peft\n" in front
        assert "rank 3, alpha 5,\ndropout 0, on the query and value" in text
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == (str(name) if name else None)


def test_loralib_is_a_file_of_matrices(base, whole, lora, tmp_path, torch_side):
    assert export("loralib", whole, tmp_path / "out", "--lora_alpha", 5)[0] == 0
    found = torch_side("load", path=str(tmp_path / "out/lora.pt"))
    assert found.keys() == {"about", *(f"model_state_dict/{name}" for name in
                                       random_lora().weights)}
    for name, a in random_lora().weights.items():
        assert np.array_equal(found[f"model_state_dict/{name}"], a)
    code, said = export("hf", base, tmp_path / "a", lora=tmp_path / "out/lora.pt")
    assert code == 0, said  # it says its alpha
    assert export("hf", base, tmp_path / "b", "--lora_alpha", 5, lora=lora)[0] == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == \
        (tmp_path / "b/model.safetensors").read_bytes()


def test_an_adapter_goes_through_all_formats(base, lora, tmp_path):
    """lora.pt -> adapter -> lora.pt: the same bytes; the adapter merged: the same model."""
    adapter = tmp_path / "adapter"
    assert export("peft", base, adapter, "--lora_alpha", 5, "--lora_dropout", 0.2, lora=lora
                  )[0] == 0
    assert export("peft", base, tmp_path / "again", lora=adapter)[0] == 0
    for folder in (adapter, tmp_path / "again"):
        assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == 0.2
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == \
        (adapter / "adapter_model.safetensors").read_bytes()
    assert export("loralib", base, tmp_path / "file", lora=adapter)[0] == 0
    back = torch_file.load(tmp_path / "file/lora.pt")["model_state_dict"]
    assert all(np.array_equal(back[name], a) for name, a in random_lora().weights.items())
    assert export("hf", base, tmp_path / "hf", lora=adapter)[0] == 0
    assert np.abs(logits(opened(tmp_path / "hf"), IDS) - WANTED).max() < 1e-5


def test_biases_of_loralib(base, tmp_path):
    """bias="all" of loralib: the biases replace the base's."""
    lora = random_lora()
    for name in ("attn.c_attn", "mlp.c_fc"):
        lora.weights[f"transformer.h.1.{name}.bias"] = np.full(
            random_weights()[f"transformer.h.1.{name}.bias"].shape, 0.7, np.float32)
    torch_file.save(tmp_path / "lora.pt", {"model_state_dict": lora.weights})
    code, said = export("hf", base, tmp_path / "out", "--lora_alpha", 5, lora=tmp_path / "lora.pt")
    assert code == 0, said
    found = logits(opened(tmp_path / "out"), IDS)
    wanted = logits(with_lora(lora, random_weights()), IDS)
    assert np.abs(found - wanted).max() < 1e-5 < 0.1 < np.abs(found - WANTED).max()


def test_files_are_readable_as_new_ones_are(base, whole, tmp_path):
    (tmp_path / "plain").write_text("")
    for kind in ("hf", "peft", "loralib"):
        assert export(kind, whole, tmp_path / kind, "--lora_alpha", 5)[0] == 0
        record = json.loads((tmp_path / kind / "export.json").read_text())
        assert record["format"] == kind
        assert record["files"] == sorted(os.listdir(tmp_path / kind))
        for name in record["files"]:
            assert (tmp_path / kind / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_folder_of_something_else_stays(whole, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    flags = ["--lora_alpha", 5]
    code, said = export("hf", whole, other, *flags)
    assert code == 1 and "holds config.json, so it is not replaced" in said
    assert os.listdir(other) == ["config.json"]
    assert export("hf", whole, tmp_path / "hf", *flags)[0] == 0
    code, said = export("peft", whole, tmp_path / "hf", *flags)
    assert code == 1 and "so it is not replaced" in said
    (tmp_path / "hf/notes.txt").write_text("mine")
    code, said = export("hf", whole, tmp_path / "hf", *flags)
    assert code == 1 and "holds notes.txt" in said and len(said.splitlines()) == 1
    (tmp_path / "file").write_text("")
    assert "is no folder" in export("hf", whole, tmp_path / "file", *flags)[1]


def test_an_export_replaces_an_earlier_one(whole, base, tmp_path):
    (tmp_path / "out").mkdir()  # an empty folder is replaced, too
    assert export("hf", whole, tmp_path / "out", "--lora_alpha", 5)[0] == 0
    first = (tmp_path / "out/model.safetensors").read_bytes()
    assert export("hf", whole, tmp_path / "out", "--lora_alpha", 6)[0] == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() != first
    assert export("hf", whole, tmp_path / "out", "--lora_alpha", 5)[0] == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == first


def test_an_error_leaves_the_earlier_export(whole, tmp_path):
    assert export("hf", whole, tmp_path / "out", "--lora_alpha", 5)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert export("hf", whole, tmp_path / "out")[0] == 1  # alpha is missing
    with pytest.raises(ZeroDivisionError), exported(tmp_path / "out", "hf") as folder:
        (folder / "config.json").write_text("half of")
        raise ZeroDivisionError
    with pytest.raises(InputError, match="cannot be written: No space left"), \
            exported(tmp_path / "out", "hf") as folder:
        raise OSError(28, "No space left on device")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_killed_export_leaves_nothing_for_long(root, tmp_path):
    """What a killed process has left is removed by the next; what a running one writes is not."""
    script = ("import sys, time; sys.path.insert(0, 'src'); from runtime.folders import exported\n"
              f"with exported({str(tmp_path / 'out')!r}, 'hf'):\n"
              "    print('in', flush=True)\n    time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"in\n"
    with exported(tmp_path / "out", "hf"):
        assert len(list(tmp_path.glob(".out.*.part"))) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(list(tmp_path.glob(".out.*.part"))) == 1
    with exported(tmp_path / "out", "hf"):
        assert len(list(tmp_path.glob(".out.*.part"))) == 1
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / ".out.mine.part").mkdir()  # a name that no export has
    with exported(tmp_path / "out", "hf"):
        pass
    assert (tmp_path / ".out.mine.part").is_dir()


@pytest.mark.parametrize("kind, flags, reason", [
    ("hf", ["--lora_alpha", 5, "--lora_dim", 4], "model.9.pt: its LoRA has rank 3, not 4"),
    ("hf", [], "model.9.pt: does not say its alpha; give the --lora_alpha"),
    ("hf", ["--lora_alpha", 5, "--model_card", "gpt2.sm"], "does --model_card fit?"),
    ("hf", ["--lora_alpha", 5, "--lora_checkpoint", "{}/none"], "none: no such file"),
    ("peft", ["--lora_alpha", 5, "--lora_checkpoint", "{}/base.pt"], "holds no LoRA matrices"),
    ("peft", ["--lora_alpha", 5, "--lora_checkpoint", "{}/wide.pt"], "is for transformer.h.0"),
])
def test_wrong_inputs(whole, base, tmp_path, kind, flags, reason):
    wide = {name: np.repeat(a, 2, 1) if name.endswith("A") else np.repeat(a, 2, 0)
            for name, a in random_lora().weights.items()}
    torch_file.save(tmp_path / "wide.pt", {"model_state_dict": wide})
    code, said = export(kind, whole, tmp_path / "out",
                        *(str(flag).format(tmp_path) for flag in flags))
    assert code == 1 and reason in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_a_checkpoint_says_of_itself(tmp_path):
    """Its alpha, rank, dropout and dimensions; a flag that contradicts it is an error."""
    import about
    from config import LoRAConfig

    config = GPT2Config(2, 32, 8, 61, 24)  # of no card: eight heads
    weights = {**random_weights(), **random_lora().weights}
    torch_file.save(tmp_path / "model.9.pt", {
        "model_state_dict": weights,
        "about": about.describe(config, LoRAConfig(3, 5.0, 0.25), "e2e", 9)})
    whole = tmp_path / "model.9.pt"
    assert export("hf", whole, tmp_path / "hf")[0] == 0
    wanted = logits(with_lora(random_lora(), random_weights()), IDS, n_head=8)
    assert np.abs(logits(opened(tmp_path / "hf"), IDS, n_head=8) - wanted).max() < 1e-5
    assert json.loads((tmp_path / "hf/config.json").read_text())["n_head"] == 8
    assert export("peft", whole, tmp_path / "peft")[0] == 0
    adapter = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (6, 10, 0.25)
    for flags, reason in ((["--lora_alpha", 4], "--lora_alpha 5"), (["--lora_dim", 4], "--lora_dim"
                          " 3"), (["--model_card", "gpt2.nano"], "not gpt2.nano")):
        code, said = export("hf", whole, tmp_path / "no", *flags)
        assert code == 1 and reason in said and len(said.splitlines()) == 1
        assert not (tmp_path / "no").exists()

    # the folder again as a base, which says its heads, with the adapter in it
    assert export("hf", tmp_path / "hf", tmp_path / "twice", lora=tmp_path / "peft")[0] == 0
    assert json.loads((tmp_path / "twice/config.json").read_text())["n_head"] == 8
    once, twice = opened(tmp_path / "hf"), opened(tmp_path / "twice")
    name = "transformer.h.0.attn.c_attn.weight"
    assert np.allclose(twice[name] - once[name], once[name] - random_weights()[name], atol=1e-6)


def test_what_can_only_be_merged(base, tmp_path):
    """LoRA on another layer: hf merges it, peft and loralib name the remedy."""
    random, adapter = np.random.default_rng(0), tmp_path / "adapter"
    adapter.mkdir()
    key = "base_model.model.transformer.h.0.mlp.c_fc.lora_{}.weight"
    matrices = {key.format("A"): random.normal(size=(2, 32)).astype(np.float32),
                key.format("B"): random.normal(size=(128, 2)).astype(np.float32)}
    safetensors.numpy.save_file(matrices, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 3}')
    assert export("hf", base, tmp_path / "out", lora=adapter)[0] == 0
    name = "transformer.h.0.mlp.c_fc.weight"
    change = opened(tmp_path / "out")[name] - random_weights()[name]
    A, B = matrices.values()
    assert np.allclose(change, 1.5 * (B @ A).T, atol=1e-5)
    for kind in ("peft", "loralib"):
        code, said = export(kind, base, tmp_path / "no", lora=adapter)
        assert code == 1 and "src/gpt2_export.py --format hf" in said and "c_fc" in said
    for flags in (["--lora_dim", 2], ["--lora_alpha", 3]):
        code, said = export("hf", base, tmp_path / "no", *flags, lora=adapter)
        assert code == 1 and "says its rank and alpha itself" in said


def test_no_lora(base, lora, tmp_path):
    for kind, *flags in (["peft"], ["loralib"], ["hf", "--lora_alpha", 5], ["hf", "--lora_dim", 3]):
        code, said = export(kind, base, tmp_path / "out", *flags)
        assert code == 1 and "base.pt: holds no LoRA matrices" in said
    code, said = export("hf", lora, tmp_path / "out", "--lora_alpha", 5)
    assert code == 1 and "model.5.pt: holds no transformer.wte.weight" in said


def test_incomplete_base(tmp_path):
    weights = random_weights()
    del weights["transformer.h.1.mlp.c_fc.bias"]
    torch_file.save(tmp_path / "base.pt", {"model_state_dict": weights})
    code, said = export("hf", tmp_path / "base.pt", tmp_path / "out")
    assert code == 1 and "h.1.mlp.c_fc.bias is missing, in gpt2.nano it is (128,)" in said


@pytest.mark.parametrize("flags", [
    ["--format", "gguf"], ["--format", "hf", "--base_model", "x/y"],
    ["--format", "hf", "--lora_dropout", "0.1"], ["--format", "peft", "--vocab", "vocab"],
    ["--format", "hf", "--lora_dim", "0"],
    ["--format", "hf", "--lora_alpha", "-1"], ["--format", "hf", "--output_dir", "."]])
def test_wrong_flags(flags, base, monkeypatch):
    monkeypatch.chdir(base.parent)
    code, said = run_main(gpt2_export.main, ["--init_checkpoint", base, "--output_dir", "out",
                                             *flags])
    assert code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1


def test_it_starts_without_jittor(root, base, lora, tmp_path):
    script = ("import sys; sys.modules['jittor'] = None; sys.path.insert(0, 'src')\n"
              "import config, gpt2_export\n"
              "config.MODEL_CARDS['gpt2.nano'] = config.GPT2Config(2, 32, 4, 61, 24)\n"
              "gpt2_export.main()")
    done = subprocess.run([sys.executable, "-c", script, "--format", "hf", "--init_checkpoint",
                           base, "--lora_checkpoint", lora, "--lora_alpha", "5", "--output_dir",
                           tmp_path / "out"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.abs(logits(opened(tmp_path / "out"), IDS) - WANTED).max() < 1e-5


TEXTS = ["name : Blue Spice | Type : pub", " The Wrestlers, it's 20 £ ...", "naïve café\n\n  中文",
         "🎉", "\t a  b   c\r\n'll 'VE don't", ""]


@pytest.fixture(scope="module")
def nano(tmp_path_factory, vocab):
    """(folder, weights) of an exported model with GPT-2's vocabulary."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("nano")
    config = replace(TINY, vocab_size=50257)
    torch_file.save(folder / "base.pt", {"model_state_dict": random_weights(config=config)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpt2_export.MODEL_CARDS, "gpt2.nano", config)
        code, said = export("hf", folder / "base.pt", folder / "out", "--vocab", vocab)
        assert code == 0, said
    return folder / "out", random_weights(config=config)


def test_generation_ends_as_in_the_experiment(nano):
    generation = json.loads((nano[0] / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 50256, "eos_token_id": [50256, 628]}


@pytest.mark.slow
def test_tokenizer(nano, vocab, torch_side):
    from encoder import get_encoder

    encoder = get_encoder(vocab)
    found = torch_side("tokenize", folder=str(nano[0]), texts=[*TEXTS, "a<|endoftext|>"])
    assert len(found) == 3 * (len(TEXTS) + 1)
    for way in ("slow", "fast", "alone"):
        for n, text in enumerate(TEXTS):
            assert found[f"{way} {n}"].tolist() == encoder.encode(text), (way, text)
        assert found[f"{way} {len(TEXTS)}"].tolist() == [64, 50256]


CONVERT = """
import sys, json
import ctranslate2, numpy as np
from ctranslate2.converters import TransformersConverter
source, target, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
TransformersConverter(source).convert(target)
vocabulary = json.load(open(target + "/vocabulary.json"))
generator = ctranslate2.Generator(target, intra_threads=1)
tokens = [[vocabulary[i] for i in row] for row in ids]
np.save(target + "/logits.npy", np.array(generator.forward_batch(tokens).to_device(
    ctranslate2.Device.cpu)))
"""


@pytest.mark.slow
def test_ctranslate2_opens_it(nano, tmp_path):
    for package in ("ctranslate2", "transformers"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"no {package}; pip install -r requirement-bench.txt")
    folder, weights = nano
    done = subprocess.run([sys.executable, "-c", CONVERT, folder, tmp_path / "ct2",
                           json.dumps(IDS.tolist())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "ct2/logits.npy")
    wanted = logits(weights, IDS)
    assert np.abs(found[..., :50257] - wanted).max() < 5e-5 and np.abs(wanted).max() > 1
