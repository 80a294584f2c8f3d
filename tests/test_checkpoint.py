"""Checkpoints with every naming of the weights, written by torch, safetensors and our code."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct

import numpy as np
import pytest
import safetensors.numpy
from conftest import weights_of
from test_torch_file import Hostile, cheap, hostile_legacy, hostile_zip, named, stored, tensor

from runtime.errors import InputError


@pytest.fixture(scope="module")
def checkpoint(jittor):
    import checkpoint

    return checkpoint


@pytest.fixture
def saved(torch_side, tmp_path):
    """Writes arrays with PyTorch or safetensors; returns the path."""
    def save(arrays, name="model.bin", **options):
        path = tmp_path / name
        operation = "save_safetensors" if path.suffix == ".safetensors" else "save"
        torch_side(operation, arrays, path=str(path), **options)
        return path
    return save


def filled(checkpoint, small_model, path, lora_path=None, seed=99, **options):
    """Loads the files into a model with other weights; returns its weights by name."""
    model = small_model(seed=seed, **options)
    checkpoint.load(model, str(path), lora_path and str(lora_path))
    return weights_of(model)


def same(ours, truth, tolerance=0.0):
    assert ours.keys() == truth.keys()
    for name in truth:
        assert ours[name].shape == truth[name].shape
        assert np.abs(ours[name] - truth[name]).max() <= tolerance, name


def base_of(model) -> dict[str, np.ndarray]:
    return {name: a for name, a in weights_of(model).items() if "lora_" not in name}


def hugging_face(weights):
    """Names as in the published GPT-2: no prefix, and each layer's causal mask as a buffer."""
    named = {name[len("transformer."):]: a for name, a in weights.items()}
    for layer in (0, 1):
        named[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 40, 40), np.float32))
        named[f"h.{layer}.attn.masked_bias"] = np.float32(-1e4).reshape(())
    return named


def with_head(weights, head="lm_head.weight"):
    return {**weights, head: weights["transformer.wte.weight"].copy()}


def tensorflow(weights):
    """Names with the endings of a conversion from TensorFlow: ln_1.g, c_attn.w, c_attn.b ..."""
    named = {}
    for name, a in weights.items():
        name = re.sub(r"(ln_\w+)\.weight$", r"\1.g", name)
        name = re.sub(r"(c_\w+)\.weight$", r"\1.w", name)
        named[re.sub(r"\.bias$", ".b", name)] = a
    assert {"transformer.h.0.ln_1.g", "transformer.h.1.mlp.c_fc.w",
            "transformer.h.0.attn.c_attn.b"} <= named.keys()
    return named


def tensorflow_published(weights):
    return {name[len("transformer."):]: a for name, a in tensorflow(weights).items()}


NAMINGS = {
    "ours": dict,
    "published": hugging_face,
    "published, with prefix and head": with_head,
    "original": lambda weights: with_head(weights, "lm_head.decoder.weight"),
    "tensorflow": tensorflow,
    "tensorflow, published": tensorflow_published,
    "parallel": lambda weights: {f"module.{name}": a for name, a in with_head(weights).items()},
    "head alone": lambda weights: {
        name.replace("transformer.wte", "lm_head"): a for name, a in weights.items()},
    "compiled, parallel": lambda weights: prefixed("_orig_mod.module.", hugging_face(weights)),
    "PEFT's, merged": lambda weights: prefixed("base_model.model.", with_head(weights)),
    "Lightning's": lambda weights: prefixed("model.", with_head(weights)),
    "nested": lambda weights: prefixed("module.base_model.model._orig_mod.model.", weights),
    "FSDP": lambda weights: {f"_fsdp_wrapped_module.{name}".replace(
        ".attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.attn."): a
        for name, a in with_head(weights).items()},
}


def prefixed(prefix, weights):
    return {prefix + name: a for name, a in weights.items()}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming(checkpoint, small_model, saved, naming):
    base = base_of(small_model(seed=1))
    path = saved(NAMINGS[naming](base), wrapped=naming == "original")
    same(filled(checkpoint, small_model, path, r=0), base)


@pytest.mark.parametrize("name, options", [
    ("model.bin", {}), ("model.pt", {"zipped": False}), ("model.safetensors", {})])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_format(checkpoint, small_model, saved, name, options, dtype):
    base = base_of(small_model(seed=1))
    path = saved(hugging_face(base), name, dtype=dtype, **options)
    tolerance = {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    same(filled(checkpoint, small_model, path, r=0), base, tolerance)


@pytest.mark.parametrize("tables", [["state_dict"], ["model"], ["net"], ["module"],
                                    ["model_state_dict"], ["model", "state_dict"]])
@pytest.mark.parametrize("name", ["run.pt", "run.pkl"])
def test_tables_of_weights_with_other_things_beside(checkpoint, small_model, jittor, tmp_path,
                                                    tables, name):
    base = base_of(small_model(seed=1))
    content = {name: jittor.array(a) for name, a in with_head(base).items()}
    for table in tables:
        content = {"epoch": 3, "losses": [0.5, 0.25], table: content, "best": np.float64(0.5),
                   "optimizer": {"state": {0: {"exp_avg": np.zeros(3, np.float32)}}}}
    path = tmp_path / name
    path.write_bytes(pickle.dumps(content, 4))
    same(filled(checkpoint, small_model, path, r=0), base)
    jittor.save(content, str(tmp_path / "jittor.pkl"))
    same(filled(checkpoint, small_model, tmp_path / "jittor.pkl", r=0), base)


def test_base_without_lora_leaves_the_models_own(checkpoint, small_model, saved):
    base = base_of(small_model(seed=1))
    untouched = weights_of(small_model(seed=99))
    ours = filled(checkpoint, small_model, saved(hugging_face(base)), seed=99)
    same(ours, {name: base.get(name, a) for name, a in untouched.items()})
    assert len(ours) == len(base) + 4


def test_model_and_lora_files_of_our_own(checkpoint, small_model, torch_side, tmp_path):
    model = small_model(seed=1)
    weights = weights_of(model)
    whole, lora = tmp_path / "model.9.pt", tmp_path / "model.5.pt"
    checkpoint.save_model(model, whole)
    checkpoint.save_lora(model, lora)

    opened = torch_side("load", path=str(whole))
    named = {f"model_state_dict/{name}": a for name, a in weights.items()}
    same(opened, {**named, "model_state_dict/lm_head.decoder.weight":
                  weights["transformer.wte.weight"]})
    opened = torch_side("load", path=str(lora))
    same(opened, {name: a for name, a in named.items() if "lora_" in name})

    same(filled(checkpoint, small_model, whole), weights)
    other = weights_of(small_model(seed=2))
    base = tmp_path / "base.pt"
    checkpoint.save_model(small_model(seed=2, r=0), base)
    base_weights = base_of(small_model(seed=2, r=0))
    ours = filled(checkpoint, small_model, base, lora)
    same(ours, {name: weights[name] if "lora_" in name else base_weights[name] for name in other})
    # if --lora_checkpoint is a whole model, only its LoRA matrices are loaded
    same(filled(checkpoint, small_model, base, whole), ours)


def test_equal_models_give_equal_files(checkpoint, small_model, tmp_path):
    for folder in ("a", "b"):
        checkpoint.save_model(small_model(seed=1), tmp_path / folder / "model.1.pt")
    assert (tmp_path / "a/model.1.pt").read_bytes() == (tmp_path / "b/model.1.pt").read_bytes()


@pytest.fixture
def refused(checkpoint, small_model):
    """Loads files that must be refused; returns the message. The model must not change."""
    def load(path, lora_path=None, lora_required=False, **options):
        model = small_model(seed=3, **options)
        before = weights_of(model)
        with pytest.raises(InputError) as error:
            checkpoint.load(model, str(path), lora_path and str(lora_path), lora_required)
        message = str(error.value)
        assert "\n" not in message and ";" in message
        same(weights_of(model), before)
        return message
    return load


def test_all_that_is_wrong_in_one_message(refused, saved, small_model):
    base = base_of(small_model(seed=1))
    del base["transformer.ln_f.bias"], base["transformer.h.1.mlp.c_fc.weight"]
    base["transformer.h.0.attn.c_attn.bias"] = np.zeros(71, np.float32)
    base["transformer.h.2.ln_1.weight"] = np.zeros(24, np.float32)
    path = saved(base)
    message = refused(path, r=0)
    assert message.startswith(f"{path}: ")
    assert re.search("2 missing: .*h.1.mlp.c_fc.weight, .*ln_f.bias", message)
    assert "1 unexpected: transformer.h.2.ln_1.weight" in message
    assert re.search(r"1 misshapen: transformer.h.0.attn.c_attn.bias \(71,\) for \(72,\)", message)
    assert "--model_card" in message


@pytest.mark.parametrize("card", [{"n_layer": 3}, {"n_layer": 1}, {"n_embd": 30}])
def test_wrong_card(refused, saved, small_model, card):
    message = refused(saved(base_of(small_model(seed=1))), r=0, **card)
    assert "--model_card" in message and "--lora_dim" not in message


@pytest.mark.parametrize("r", [0, 4])
def test_wrong_rank(checkpoint, refused, small_model, tmp_path, r):
    checkpoint.save_model(small_model(seed=1, r=3), tmp_path / "model.1.pt")
    assert "--lora_dim" in refused(tmp_path / "model.1.pt", r=r)
    if r:
        checkpoint.save_model(small_model(seed=1, r=0), tmp_path / "base.pt")
        checkpoint.save_lora(small_model(seed=1, r=3), tmp_path / "lora.pt")
        model = small_model(seed=3, r=r)
        with pytest.raises(InputError, match=r"lora.pt: 4 misshapen.*--lora_dim"):
            checkpoint.load(model, str(tmp_path / "base.pt"), str(tmp_path / "lora.pt"))


def test_lora_file_as_base_and_base_as_lora(checkpoint, refused, small_model, tmp_path):
    base, lora = tmp_path / "base.pt", tmp_path / "lora.pt"
    checkpoint.save_lora(small_model(seed=1), lora)
    checkpoint.save_model(small_model(seed=3, r=0), base)
    message = refused(lora)
    assert str(lora) in message and "--lora_checkpoint" in message
    with pytest.raises(InputError, match="base.pt: holds no LoRA matrices; "):
        checkpoint.load(small_model(seed=3), str(base), str(base))
    with pytest.raises(InputError, match="--lora_checkpoint, or --lora_dim 0"):
        checkpoint.load(small_model(seed=3), str(base), lora_required=True)
    checkpoint.load(small_model(seed=3), str(base), str(lora), lora_required=True)
    checkpoint.load(small_model(seed=3, r=0), str(base), lora_required=True)
    checkpoint.save_model(small_model(seed=1), base)
    with pytest.raises(InputError, match="base.pt: holds LoRA matrices, for which --lora_dim 0"):
        checkpoint.load(small_model(seed=3, r=0), str(base))


def test_untied_head(refused, saved, small_model):
    weights = with_head(base_of(small_model(seed=1)))
    weights["lm_head.weight"][0, 0] += 1
    assert "output head differs" in refused(saved(weights), r=0)


@pytest.mark.parametrize("number, dtype", [
    (np.nan, "float32"), (np.inf, "float32"), (-np.inf, "float32"), (1e300, "float64")])
def test_numbers_that_are_not_finite(refused, saved, small_model, number, dtype):
    base = {name: a.astype(np.float64) for name, a in base_of(small_model(seed=1)).items()}
    base["transformer.h.0.mlp.c_fc.bias"][[3, 5]] = number
    base["transformer.h.1.ln_1.bias"][0] = np.nan
    assert ("2 of 96 numbers of transformer.h.0.mlp.c_fc.bias are NaN or infinite; "
            in refused(saved(base, dtype=dtype), r=0))


def test_a_float64_head_is_tied_to_its_embedding(checkpoint, small_model, saved):
    base = base_of(small_model(seed=1))
    weights = {name: a.astype(np.float64) * (1 + 1e-12) for name, a in with_head(base).items()}
    same(filled(checkpoint, small_model, saved(weights, dtype="float64"), r=0), base, 1e-6)


@pytest.mark.parametrize("rows", [62, 60, 64])
def test_a_resized_vocabulary(refused, saved, small_model, rows):
    base = base_of(small_model(seed=1))
    base["transformer.wte.weight"] = np.zeros((rows, 24), np.float32)
    message = refused(saved(base), r=0)
    assert (f"its vocabulary has {rows} tokens, that of --model_card 61; for a resized vocabulary, "
            "keep its config.json beside it and give --model_card auto" in message)


def test_transposed_matrices(refused, saved, small_model):
    nano = {f"_orig_mod.{name}": a.T if re.search(r"c_\w+\.weight", name) else a
            for name, a in with_head(base_of(small_model(seed=1))).items()}
    message = refused(saved(nano, wrapped=True), r=0)
    assert "these are transposed, as nanoGPT's" in message and "6 misshapen" in message


def test_models_and_adapters_of_peft(refused, saved, small_model):
    base = base_of(small_model(seed=1))
    name = "base_model.model.transformer.h.0.attn.c_attn"
    adapter = {f"{name}.lora_A.weight": np.zeros((3, 24), np.float32),
               f"{name}.lora_B.weight": np.zeros((72, 3), np.float32)}
    assert "a PEFT adapter, not a whole model" in refused(saved(adapter))
    whole = {**prefixed("base_model.model.", base), **adapter,
             f"{name}.base_layer.bias": np.zeros(72, np.float32)}
    assert f"{name}.lora_A.weight, of a PEFT model that is not merged" in refused(saved(whole))


def test_missing_damaged_and_other_files(refused, saved, small_model, tmp_path):
    assert "download_pretrained_checkpoints.sh" in refused(tmp_path / "none.bin")
    assert "a folder without model.safetensors or pytorch_model.bin; GPT-2's" in refused(tmp_path)
    base = base_of(small_model(seed=1))
    for name in ("model.bin", "model.safetensors"):
        path = saved(base, name)
        whole = path.read_bytes()
        for size in (0, 10, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            message = refused(path)
            assert str(path) in message and "fetch or save it again" in message
    path = saved({"weight": np.zeros(2, np.float32)}, "model.safetensors", dtype="float8_e5m2")
    assert "weight is of type F8_E5M2" in refused(path)
    for number, content in enumerate(([1, 2], {}, {"a": "text"}, {1: 2})):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(hostile_zip(pickle.dumps(content, 2)))
        assert "no named weights" in refused(path)


def safetensors_bytes(tensors: dict, data: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors file with this header; ``length`` replaces the stated size of the header."""
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
                         for name, (dtype, shape, offsets) in tensors.items()}).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def test_safetensors_itself_refuses_what_is_no_table_of_its_data(checkpoint, tmp_path):
    """Our reader relies on the header checks of the library, whose version is pinned."""
    path = tmp_path / "model.safetensors"
    good = {"wte.weight": ("F32", [2, 2], [0, 16]), "b": ("F32", [1], [16, 20])}
    path.write_bytes(safetensors_bytes(good, b"\0" * 20))
    weights = checkpoint.read_weights(path)
    assert {name: array.shape for name, array in weights.items()} == {
        "transformer.wte.weight": (2, 2), "b": (1,)}
    bad = {
        "overlap": safetensors_bytes({**good, "b": ("F32", [1], [12, 16])}, b"\0" * 16),
        "gap": safetensors_bytes({**good, "b": ("F32", [1], [20, 24])}, b"\0" * 24),
        "size": safetensors_bytes({**good, "b": ("F32", [2], [16, 20])}, b"\0" * 20),
        "overflow": safetensors_bytes({"b": ("F32", [2**62, 4], [0, 0])}),
        "beyond": safetensors_bytes({"b": ("F32", [2**40], [0, 2**42])}, b"\0" * 20),
        "negative": safetensors_bytes({"b": ("F32", [1], [4, 0])}, b"\0" * 4),
        "trailing": safetensors_bytes(good, b"\0" * 21),
        "short": safetensors_bytes(good, b"\0" * 19),
        "header": safetensors_bytes(good, b"\0" * 20, length=10_000),
        "huge header": safetensors_bytes(good, b"\0" * 20, length=2**63),
        "no JSON": struct.pack("<Q", 4) + b"text",
    }
    for name, content in bad.items():
        path.write_bytes(content)
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load_file(path)
        with pytest.raises(InputError) as error:
            checkpoint.read_weights(path)
        message = str(error.value)
        assert message.startswith(f"{path}: damaged, or no safetensors file ("), name
        assert "\n" not in message and message.endswith("; fetch or save it again"), name


EMPTY = ("F32", [0], [0, 0])


@pytest.mark.parametrize("dtype, shape, offsets", [
    ("F32", [0, 2**62], [0, 0]), ("F32", [2**62, 0], [0, 0]), ("F32", [0, 2**63], [0, 0]),
    ("F32", [0, 2**40, 2**40], [0, 0]), ("F32", [0, 2**64], [0, 0]), ("F32", [-1], [0, 0]),
    ("F32", [0] * 100, [0, 0]), ("BF16", [0, 2**62], [0, 0]), ("BF16", [1] * 70, [0, 2]),
    ("F32\n\x1b[2J", [0], [0, 0]), ("F6_E2M3", [4], [0, 3]), ("F32", [1.0], [0, 4])])
def test_safetensors_of_odd_shapes_and_types(checkpoint, tmp_path, dtype, shape, offsets):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"a": (dtype, shape, offsets)}, bytes(offsets[1])))
    with pytest.raises(InputError) as error:
        checkpoint.read_weights(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith("; fetch or save it again")


@pytest.mark.parametrize("name, dtype", [("a\n\x1b[2J", "F32"), ("a", "C64")])
def test_names_and_numbers_that_no_weights_have(checkpoint, tmp_path, name, dtype):
    """Control characters, which could end in a message, and complex numbers."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({name: (dtype, [0], [0, 0])}))
    with pytest.raises(InputError, match="holds no named weights"):
        checkpoint.read_weights(path)
    path = tmp_path / "model.pt"
    path.write_bytes(stored(named({"a\x85": tensor("FloatStorage", 0, (0,), (1,))})))
    with pytest.raises(InputError, match="holds no named weights"):
        checkpoint.read_weights(path)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_checkpoint_that_is_no_regular_file(refused, tmp_path, name):
    os.mkfifo(tmp_path / name)
    keep = os.open(tmp_path / name, os.O_RDWR)  # without a writer, open would wait for ever
    assert "cannot be read: not a regular file; check the path" in refused(tmp_path / name)
    os.close(keep)


def test_a_message_lists_three_names_of_each_kind(refused, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"x" * 400 + str(i): EMPTY for i in range(1000)}))
    message = refused(path)
    assert re.search("28 missing: (transformer[a-z0-9._]+, ){2}[a-z0-9._]+ and 25 others; "
                     f"1000 unexpected: ({'x' * 100}, ){{2}}{'x' * 100} and 997 others; ", message)


@pytest.mark.slow
def test_no_checkpoint_multiplies_memory_or_time(jittor, tmp_path):
    """Numbers of one byte, which become float32, and headers of many tensors."""
    n = 2 << 20
    mask = tensor("ByteStorage", n, (n,), (1,))
    said = cheap(tmp_path, {
        "masks.pt": stored(named({"a": mask}), bytes(n)),
        "views.pt": stored(named({f"view {i}": mask for i in range(8)}), bytes(n)),
        "repeated.pt": stored(named({"a": tensor("ByteStorage", n, (8 * n,), (0,))}), bytes(n)),
        "bytes.safetensors": safetensors_bytes({"a": ("U8", [n], [0, n])}, bytes(n)),
        "halves.safetensors": safetensors_bytes({"a": ("BF16", [n // 2], [0, n])}, bytes(n)),
        "dimensions.safetensors": safetensors_bytes({"a": ("F32", [0] * 300_000, [0, 0])}),
        **{f"{count} of {dtype}.safetensors": safetensors_bytes({
            str(i): (dtype, [0], [0, 0]) for i in range(count)})
           for count in (15_000, 30_000) for dtype in ("F32", "BF16")},
    }, imports=CHECKPOINT)
    loaded = {"masks.pt", "bytes.safetensors", "halves.safetensors", "15000 of F32.safetensors",
              "15000 of BF16.safetensors"}
    assert {name for name, message in said.items() if message is None} == loaded
    assert "its header would have" in said["30000 of F32.safetensors"]


CHECKPOINT = """from runtime import backend
backend.start("cpu")
import safetensors.numpy
from checkpoint import read_weights as load"""


def test_hostile_file_is_named_and_runs_nothing(refused, tmp_path):
    trap = tmp_path / "trapped"
    for wrap in (hostile_zip, hostile_legacy):
        path = tmp_path / "hostile.bin"
        path.write_bytes(wrap(pickle.dumps({"wte.weight": Hostile(trap)}, 2)))
        message = refused(path)
        assert f"{path}: refused: it asks for {os.system.__module__}.system" in message
        assert not trap.exists()


def test_the_pytorch_side_of_the_experiment_reads_our_models(small_model, checkpoint, torch_side,
                                                             tmp_path):
    model = small_model(seed=1)
    checkpoint.save_model(model, tmp_path / "model.1.pt")
    card = {"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 61, "n_positions": 40}
    opened = torch_side("load_into_model", path=str(tmp_path / "model.1.pt"), card=card, r=3)
    same(opened, weights_of(model))


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
@pytest.mark.parametrize("other", ["h.0.ln_1.weight", "transformer.h.0.ln_1.g",
                                   "module.transformer.h.0.ln_1.weight"])
def test_two_names_of_one_weight(checkpoint, saved, small_model, name, other):
    weights = base_of(small_model())
    path = saved({**weights, other: weights["transformer.h.0.ln_1.weight"] + 1}, name)
    with pytest.raises(InputError, match=r"holds transformer\.h\.0\.ln_1\.weight under two names"):
        checkpoint.read_weights(path)
