"""PEFT's adapters: merged, as our LoRA, written. PEFT's own logits are the truth."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import safetensors.numpy
from conftest import run_main, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

import model_flags
import peft_adapter
from config import GPT2Config
from peft_adapter import OurLoRA
from runtime.errors import InputError
from weights import read_weights

TINY = GPT2Config(2, 32, 4, 61, 24)  # that of expected/interop
IDS = np.arange(0, 24).reshape(2, 12) * 7 % 61


def logits(weights, ids, n_head=4):
    """GPT-2 in NumPy and float64: ids (B, T) -> (B, T, V)."""
    w = {name[len("transformer."):]: a.astype(np.float64) for name, a in weights.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    (B, T), V = ids.shape, w["wte.weight"]
    x = V[ids] + w["wpe.weight"][:T]
    hidden = np.triu(np.full((T, T), -1e30), 1)
    for n in range(sum(name.endswith("ln_1.bias") for name in w)):
        q, k, v = np.moveaxis(linear(norm(x, f"h.{n}.ln_1"), f"h.{n}.attn.c_attn").reshape(
            B, T, 3, n_head, -1), (2, 3), (0, 2))  # (B, H, T, D) each
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + hidden
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + linear(np.moveaxis(mixed, 1, 2).reshape(B, T, -1), f"h.{n}.attn.c_proj")
        h = linear(norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h ** 3)))
        x = x + linear(h, f"h.{n}.mlp.c_proj")
    return norm(x, "ln_f") @ V.T


def with_lora(lora, base):
    """The base with our LoRA in it, by the definition: third by third."""
    merged = {**base, **{n: w for n, w in lora.weights.items() if "lora_" not in n}}
    for name, A in lora.weights.items():
        if name.endswith("lora_A"):
            weight, B = name.replace("lora_A", "weight"), lora.weights[name[:-1] + "B"]
            W, C, r = merged[weight].astype(np.float64), A.shape[1], lora.r
            for group, third in enumerate(np.flatnonzero(lora.enable)):
                delta = B[group * C:(group + 1) * C].astype(np.float64) \
                    @ A[group * r:(group + 1) * r].astype(np.float64)
                W[:, third * C:(third + 1) * C] += lora.alpha / r * delta.T
            merged[weight] = W
    return merged


@pytest.fixture(scope="module")
def interop(shared):
    folder = shared / "expected/interop"
    if not (folder / "expected.json").is_file():
        pytest.skip("no expected/interop in the reference data")
    return folder


@pytest.fixture(scope="module")
def base(interop):
    return read_weights(interop / "base/model.safetensors")


@pytest.fixture(scope="module")
def expected(interop):
    """(cases, ids (2, 12), PEFT's logits of the last tokens (2, 61) by case)"""
    content = json.loads((interop / "expected.json").read_text())
    return content["cases"], np.array(content["ids"]), np.load(interop / "logits.npz")


CASES = ["c_attn", "fan_in_fan_out_false", "default_targets", "all_linear", "rslora", "dora",
         "patterns", "bias_all", "bias_lora_only", "lora_bias", "one_layer", "gaussian", "save_wte",
         "save_lm_head", "lora_wte", "lora_lm_head", "pissa", "no_key_c_attn", "no_key_rslora_r3",
         "no_key_one_layer", "ours_exported"]
REFUSED = {"save_wte": "another transformer.wte.weight unties",
           "save_lm_head": "another lm_head.weight unties", "lora_wte": "wte unties",
           "lora_lm_head": "LoRA on lm_head unties", "pissa": "init_lora_weights is pissa, whose"}
MERGED_ONLY = {"all_linear": "attn.c_proj, which", "dora": "DoRA", "lora_bias": "lora_bias",
               "bias_all": "also holds transformer.h.0.attn.c_attn.bias",
               "bias_lora_only": "also holds transformer.h.0.attn.c_attn.bias"}


def test_cases_are_all(expected):
    assert set(CASES) == expected[0].keys()
    assert {name for name, case in expected[0].items() if case["merge"] != "exact"} \
        == REFUSED.keys()


@pytest.mark.parametrize("name", CASES)
def test_merge(interop, base, expected, name):
    """The merged base gives PEFT's logits, and not the base's."""
    before = {key: a.copy() for key, a in base.items()}
    if name in REFUSED:
        with pytest.raises(InputError, match=f"{name}: .*{REFUSED[name]}"):
            peft_adapter.merge(peft_adapter.read(interop / name), base)
        return
    merged = peft_adapter.merge(peft_adapter.read(interop / name), base)
    _, ids, truth = expected
    found = logits(merged, ids)[:, -1]
    assert np.abs(found - truth[name]).max() < 1e-6
    assert np.abs(found - truth["base"]).max() > 0.1
    assert all(a.dtype == np.float32 for a in merged.values())
    assert all(np.array_equal(base[key], a) for key, a in before.items())


@pytest.mark.parametrize("name", CASES)
def test_as_our_lora(interop, base, expected, name):
    cases, ids, truth = expected
    if name in REFUSED or name in MERGED_ONLY:
        with pytest.raises(InputError, match=f"{name}: .*{ {**REFUSED, **MERGED_ONLY}[name]}"):
            peft_adapter.as_lora(peft_adapter.read(interop / name), TINY)
        return
    lora = peft_adapter.as_lora(peft_adapter.read(interop / name), TINY)
    if isinstance(cases[name]["as_lora"], dict):  # nothing is on the key
        assert lora.r == cases[name]["as_lora"]["lora_dim"]
        assert lora.alpha == pytest.approx(cases[name]["as_lora"]["lora_alpha"], rel=1e-12)
        assert lora.enable == (True, False, True)
    else:
        assert lora.enable == (True, True, True)
    found = logits(with_lora(lora, base), ids)[:, -1]
    assert np.abs(found - truth[name]).max() < 1e-6
    assert np.abs(found - truth["base"]).max() > 0.1


@pytest.mark.parametrize("name", ["c_attn", "default_targets", "no_key_c_attn", "ours_exported",
                                  "one_layer", "no_key_one_layer"])
def test_written_again_are_the_same_matrices(interop, tmp_path, name):
    lora = peft_adapter.as_lora(peft_adapter.read(interop / name), TINY)
    peft_adapter.write(tmp_path, lora, 0.0, "", None)
    theirs, ours = (safetensors.numpy.load_file(folder / "adapter_model.safetensors")
                    for folder in (interop / name, tmp_path))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == np.float32
        assert np.array_equal(ours[key], theirs[key]), key
    old, new = (json.loads((folder / "adapter_config.json").read_text())
                for folder in (interop / name, tmp_path))
    assert (new["r"], new["lora_alpha"]) == (old["r"], old["lora_alpha"])
    assert peft_adapter.as_lora(peft_adapter.read(tmp_path), TINY).enable == lora.enable


def test_ours_exported_and_read_again(interop, tmp_path):
    weights = read_weights(interop / "ours_r3_alpha7.safetensors")
    lora = peft_adapter.our_lora(weights, 7.0, "it")
    peft_adapter.write(tmp_path, lora, 0.1, "9 micro-batches on e2e", "gpt2")
    assert "Trained with LoRA + GPT-2 + Jittor for 9 micro-batches on e2e: rank 3, alpha 7" in (
        tmp_path / "README.md").read_text()
    again = peft_adapter.as_lora(peft_adapter.read(tmp_path), TINY)
    assert (again.r, again.alpha, again.enable) == (3, 7.0, (True, False, True))
    assert again.weights.keys() == weights.keys()
    assert all(again.weights[name].tobytes() == a.tobytes() for name, a in weights.items())
    written = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    theirs = safetensors.numpy.load_file(interop / "ours_exported/adapter_model.safetensors")
    assert written.keys() == theirs.keys()
    assert all(np.array_equal(written[key], theirs[key]) for key in theirs)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 6 and config["lora_alpha"] == 14 and config["lora_dropout"] == 0.1
    assert config["base_model_name_or_path"] == "gpt2" and config["fan_in_fan_out"] is True


@settings(max_examples=50, deadline=None)
@given(r=st.integers(1, 5), alpha=st.floats(0.25, 200), key=st.booleans(),
       without=st.sets(st.integers(0, 2), max_size=2), seed=st.integers(0, 99))
def test_round_trip_of_ours(tmp_path_factory, r, alpha, key, without, seed):
    """Any LoRA of ours comes back from an adapter, layers without LoRA among them."""
    random, C = np.random.default_rng(seed), 6
    enable = (True, key, True)
    shapes = {"A": (sum(enable) * r, C), "B": (sum(enable) * C, r)}
    weights = {f"transformer.h.{n}.attn.c_attn.lora_{part}":
               random.normal(size=shape).astype(np.float32) * (n not in without)
               for n in range(3) for part, shape in shapes.items()}
    folder = tmp_path_factory.mktemp("adapter")
    peft_adapter.write(folder, OurLoRA(r, alpha, enable, weights), 0.0, "", None)
    adapter = peft_adapter.read(folder)
    again = peft_adapter.as_lora(adapter, GPT2Config(3, C, 2, 9, 9))
    base = {f"transformer.h.{n}.attn.c_attn.weight": random.normal(size=(C, 3 * C))
            .astype(np.float32) for n in range(3)}
    wanted = with_lora(OurLoRA(r, alpha, enable, weights), base)
    for found in (with_lora(again, base), peft_adapter.merge(adapter, base)):
        for name in base:
            assert np.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5 * alpha)
    if not key:
        assert (again.r, again.alpha, again.enable) == (r, alpha, enable)
        assert all(np.array_equal(again.weights[name], a) for name, a in weights.items())


needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"),
                                reason="no PEFT; pip install -r requirement-bench.txt")


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize("config, enable", [
    ({"r": 5, "lora_alpha": 3, "target_modules": ["c_attn"], "layers_to_transform": [0]},
     (True, True, True)),
    ({"r": 2, "lora_alpha": 7, "target_modules": ["c_attn", "c_fc"], "use_rslora": True,
      "rank_pattern": {"mlp.c_fc": 5}, "alpha_pattern": {r"h\.1\.attn\.c_attn": 2.5}}, None),
    ({"r": 3, "target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe"]}, None),
    ({"r": 3, "target_modules": ["c_attn", "wpe"]}, None),
    ({"r": 3, "target_modules": ["c_proj"], "use_dora": True, "use_rslora": True}, None),
    ({"r": 4, "target_modules": ["c_attn"], "init_lora_weights": "orthogonal"},
     (True, True, True)),
])
def test_adapters_that_peft_makes(interop, base, torch_side, tmp_path, config, enable):
    truth = torch_side("save_adapter", {"ids": IDS}, base=str(interop / "base"),
                       path=str(tmp_path), **config)["logits"]
    adapter = peft_adapter.read(tmp_path)
    found = logits(peft_adapter.merge(adapter, base), IDS)
    assert np.abs(found - truth).max() < 5e-6 < 1e-2 < np.abs(truth - logits(base, IDS)).max()
    if enable:
        lora = peft_adapter.as_lora(adapter, TINY)
        assert lora.enable == enable
        assert np.abs(logits(with_lora(lora, base), IDS) - truth).max() < 5e-6
    else:
        with pytest.raises(InputError, match="merge it into the base first"):
            peft_adapter.as_lora(adapter, TINY)


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize("enable, biases", [((True, False, True), ()), ((True, True, True), ()),
                                            ((True, False, True), ("attn.c_attn", "ln_1"))])
def test_peft_opens_what_we_write(interop, base, torch_side, tmp_path, enable, biases):
    random = np.random.default_rng(0)
    weights = {f"transformer.h.{n}.attn.c_attn.lora_{part}":
               random.normal(0, 0.3, shape).astype(np.float32) for n in range(2)
               for part, shape in (("A", (sum(enable) * 3, 32)), ("B", (sum(enable) * 32, 3)))}
    for name in biases:
        key = f"transformer.h.1.{name}.bias"
        weights[key] = random.normal(size=base[key].shape).astype(np.float32)
    lora = OurLoRA(3, 2.5, enable, weights)
    peft_adapter.write(tmp_path, lora, 0.1, "", str(interop / "base"))
    truth = torch_side("folder_logits", {"ids": IDS}, base=str(interop / "base"),
                       adapter=str(tmp_path))["logits"]
    wanted = logits(with_lora(lora, base), IDS)
    assert np.abs(wanted - truth).max() < 5e-6 < 0.1 < np.abs(truth - logits(base, IDS)).max()


def config_with(interop, folder, name="c_attn", **changes):
    """A copy of an adapter of expected/interop with another configuration."""
    shutil.copytree(interop / name, folder, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("changes, reason", [
    ({"peft_type": "LOHA"}, "an adapter of type LOHA; only LORA"),
    ({"peft_type": None}, "an adapter of type None; only LORA"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4, whose base"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is olora"),
    ({"init_lora_weights": ["x"]}, "init_lora_weights is"),
    ({"alora_invocation_tokens": [1]}, "an activated LoRA"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices is set; not supported"),
    ({"layer_replication": [[0, 2]]}, "sets layer_replication, which is not known here"),
    ({"target_parameters": ["x"]}, "sets target_parameters, which"),
    ({"use_qalora": True}, "sets use_qalora, which"),
    ({"arrow_config": {"top_k": 1}}, "sets arrow_config, which"),
    ({"a_later_key": 1}, "sets a_later_key, which is not known here"),
    ({"use_dora": True}, "use_dora is True, which does not fit the matrices"),
    ({"lora_bias": True}, "lora_bias is True, which does not fit the matrices"),
    ({"lora_alpha": "much"}, "does not give a number for transformer.h.0"),
    ({"lora_alpha": None}, "does not give a number"), ({"lora_alpha": True}, "not give a number"),
    ({"lora_alpha": float("nan")}, "does not give a number"),
    ({"alpha_pattern": {"(": 3}}, "does not give a number"),
    ({"alpha_pattern": [1]}, "does not give a number"),
])
def test_refused_configurations(interop, tmp_path, changes, reason):
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}.*{reason}"):
        peft_adapter.read(config_with(interop, tmp_path, **changes))


def test_a_hostile_pattern_of_alphas_ends(interop, tmp_path):
    """With Python's re, it takes a time that doubles with each character of a layer's name."""
    changes = {"alpha_pattern": {r"((\w|\.)+)+[xyz]": 3}, "lora_alpha": 5}
    adapter = peft_adapter.read(config_with(interop, tmp_path, **changes))
    assert {low.alpha for low in adapter.layers.values()} == {5}


def test_what_changes_nothing_is_accepted(interop, base, tmp_path):
    plain = peft_adapter.merge(peft_adapter.read(interop / "c_attn"), base)
    changed = config_with(interop, tmp_path, a_later_key=None, another=[], third=False, r=99,
                          target_modules="all-linear", init_lora_weights="gaussian",
                          eva_config={"rho": 2.0}, lora_dropout=0.3)
    assert all(np.array_equal(a, plain[name]) for name, a in
               peft_adapter.merge(peft_adapter.read(changed), base).items())


def test_alpha_is_8_if_the_configuration_has_none(interop, tmp_path):
    folder = config_with(interop, tmp_path)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    assert peft_adapter.as_lora(peft_adapter.read(folder), TINY).alpha == 8


@pytest.fixture
def edited(interop, tmp_path):
    """Changes the matrices of the adapter c_attn; returns its folder."""
    def edit(change, name="c_attn"):
        shutil.copytree(interop / name, tmp_path / "it")
        path = tmp_path / "it/adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        tensors = change(tensors) or tensors
        safetensors.numpy.save_file(tensors, path)
        return tmp_path / "it"
    return edit


KEY = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize("change, reason", [
    (lambda t: {k[len("base_model.model."):]: a for k, a in t.items()}, "does not begin with"),
    (lambda t: t.pop(KEY) is None, "has lora_B without lora_A"),
    (lambda t: t.update({KEY: t[KEY][:3].copy()}), "do not fit each other"),
    (lambda t: t.update({KEY: t[KEY] * np.float32(np.nan)}), "lora_A.weight is not finite"),
    (lambda t: {k.replace("attn.c_attn", "crossattention.c_attn"): a for k, a in t.items()},
     "crossattention.c_attn, which is not supported"),
    (lambda t: t.update({KEY.replace(".weight", ".default.weight"): t[KEY]}), "under two names"),
    (lambda t: {"base_model.model.transformer.ln_f.bias": np.zeros(32, np.float32)},
     "holds no LoRA matrices"),
])
def test_refused_matrices(edited, change, reason):
    with pytest.raises(InputError, match=reason):
        peft_adapter.read(edited(change))


def test_older_names(edited, interop, base):
    """PEFT before 0.3 saved the adapter's name, and models without a head have no prefix."""
    folder = edited(lambda t: {k.replace("transformer.", "").replace(".weight", ".default.weight"):
                               a for k, a in t.items()})
    plain = peft_adapter.merge(peft_adapter.read(interop / "c_attn"), base)
    assert all(np.array_equal(a, plain[name]) for name, a in
               peft_adapter.merge(peft_adapter.read(folder), base).items())


def test_enable_lora_of_old_versions(edited, interop, expected, base):
    """PEFT up to 0.2 had loralib's MergedLinear."""
    ours = read_weights(interop / "ours_r3_alpha7.safetensors")
    folder = edited(lambda t: {
        f"base_model.model.{name}.weight": a[..., None] if name.endswith("B") else a
        for name, a in ours.items()}, "ours_exported")
    config_with(folder, folder.parent / "old", "", r=3, lora_alpha=7,
                enable_lora=[True, False, True])
    adapter = peft_adapter.read(folder.parent / "old")
    _, ids, truth = expected
    found = logits(peft_adapter.merge(adapter, base), ids)[:, -1]
    assert np.abs(found - truth["ours_exported"]).max() < 1e-6
    again = peft_adapter.as_lora(adapter, TINY)
    assert (again.r, again.alpha) == (3, 7)
    assert all(np.array_equal(again.weights[name], a) for name, a in ours.items())


def test_same_embedding_is_no_change(edited, base):
    """PEFT saves the embedding also where it did not change, e.g. of a resized vocabulary."""
    wte = base["transformer.wte.weight"]
    folder = edited(lambda t: t.update({"base_model.model.transformer.wte.weight": wte,
                                        "base_model.model.lm_head.weight": wte.copy()}))
    merged = peft_adapter.merge(peft_adapter.read(folder), base)
    assert merged.keys() == base.keys()
    assert np.array_equal(merged["transformer.wte.weight"], wte)


def test_another_model(interop, base):
    adapter = peft_adapter.read(interop / "c_attn")
    smaller = {name: a for name, a in base.items() if ".h.1." not in name}
    with pytest.raises(InputError, match="c_attn: is for transformer.h.1.attn.c_attn.weight"):
        peft_adapter.merge(adapter, smaller)
    for other in (GPT2Config(2, 64, 4, 61, 24), GPT2Config(1, 32, 4, 61, 24)):
        with pytest.raises(InputError, match="does --model_card fit"):
            peft_adapter.as_lora(adapter, other)


def test_what_is_a_folder_of_an_adapter(interop, tmp_path):
    folder = interop / "c_attn"
    assert peft_adapter.folder_of(folder) == folder
    assert peft_adapter.folder_of(folder / "adapter_model.safetensors") == folder
    for other in (interop, interop / "base/model.safetensors", tmp_path, tmp_path / "nothing"):
        assert peft_adapter.folder_of(other) is None
        with pytest.raises(InputError, match="no folder of a PEFT adapter"):
            peft_adapter.read(other)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="neither adapter_model.safetensors nor"):
        peft_adapter.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(InputError, match="adapter_config.json: no JSON object; fetch or save it"):
        peft_adapter.read(tmp_path)


# Hypothesis draws no subnormal floats after Jittor has started: its operators turn them to 0.
FLOATS = st.floats(allow_subnormal=False)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4)
READ_KEYS = ["peft_type", "init_lora_weights", "lora_alpha", "alpha_pattern", "use_rslora",
             "use_dora", "lora_bias", "lora_dropout", "enable_lora", "r", "target_modules", "other"]


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(READ_KEYS), JSON, min_size=1, max_size=2),
       cut=st.none() | st.tuples(st.integers(0, 20000), st.binary(min_size=1, max_size=4)),
       shape=st.none() | st.lists(st.integers(0, 5), max_size=3))
def test_damaged_adapters(tmp_path_factory, interop, base, changes, cut, shape):
    """Whatever is in its files, an adapter is read or refused with an InputError."""
    folder = config_with(interop, tmp_path_factory.mktemp("it") / "adapter", **changes)
    path = folder / "adapter_model.safetensors"
    if shape is not None:
        tensors = safetensors.numpy.load_file(path)
        key = KEY if sum(shape) % 2 else KEY.replace("lora_A", "lora_B")
        safetensors.numpy.save_file({**tensors, key: np.ones(shape, np.float32)}, path)
    if cut:
        data = bytearray(path.read_bytes())
        data[cut[0]:cut[0] + len(cut[1])] = cut[1]
        path.write_bytes(data)
    for use in (lambda adapter: peft_adapter.as_lora(adapter, TINY),
                lambda adapter: peft_adapter.merge(adapter, base)):
        with contextlib.suppress(InputError), np.errstate(all="ignore"):
            use(peft_adapter.read(folder))


def complete(adapter, r=None, alpha=None):
    """The flags of a script by model_flags.complete."""
    args = Namespace(init_checkpoint=None, lora_checkpoint=str(adapter), model_card="gpt2.nano",
                     lora_dim=r, lora_alpha=alpha)
    model_flags.complete(args, "gpt2.sm")
    return args.lora_dim, args.lora_alpha


def test_flags_are_the_adapters(interop):
    adapter = interop / "no_key_rslora_r3"
    found = complete(adapter)
    assert found == (3, pytest.approx(16 * 3 ** 0.5)) == complete(adapter, *found)
    with pytest.raises(InputError, match="with --lora_dim 3, not 4"):
        complete(adapter, r=4)
    with pytest.raises(InputError, match=r"with --lora_alpha 27.7128\d*, not 16"):
        complete(adapter, alpha=16)
    with pytest.raises(InputError, match="merge it into the base first"):
        complete(interop / "dora")


# In our model


@pytest.fixture
def filled(jittor, interop, small_model):
    """Our model with the base of expected/interop and LoRA of a file or an adapter."""
    import checkpoint

    def fill(lora, r, alpha):
        model = small_model(r=r, alpha=alpha, n_layer=2, n_embd=32, n_head=4, vocab_size=61,
                            n_positions=24)
        checkpoint.load(model, str(interop / "base/model.safetensors"), str(lora))
        return model
    return fill


def last_logits(model, ids):
    from generator import Generator

    return Generator(model).start(ids, np.full(len(ids), ids.shape[1]), 1, 1)[0].numpy()


@pytest.mark.parametrize("name", [n for n in CASES if n not in REFUSED and n not in MERGED_ONLY])
def test_model_with_an_adapter(interop, expected, filled, name):
    _, ids, truth = expected
    model = filled(interop / name, *complete(interop / name))
    found = last_logits(model, ids)
    assert np.abs(found - truth[name]).max() < 5e-6 < 0.1 < np.abs(found - truth["base"]).max()


def test_lora_on_the_key_trains_and_is_saved(jittor, interop, filled, tmp_path):
    """Every LoRA matrix gets a gradient; both kinds of checkpoints load into a usual model."""
    import checkpoint
    import lora

    model = filled(interop / "c_attn", 4, 16)
    lora.mark_only_lora_as_trainable(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n: tuple(p.shape) for n, p in trained.items()} == {
        f"transformer.h.{n}.attn.c_attn.lora_{part}": shape for n in range(2)
        for part, shape in (("A", (12, 32)), ("B", (96, 4)))}
    loss = model.loss(IDS, np.roll(IDS, -1, 1), np.ones(IDS.shape, np.float32))
    for name, gradient in zip(trained, jittor.grad(loss, list(trained.values()))):
        for third in np.split(gradient.numpy(), 3):
            assert np.abs(third).max() > 1e-6, name

    weights = weights_of(model)
    checkpoint.save_lora(model, tmp_path / "model.5.pt")
    checkpoint.save_model(model, tmp_path / "model.9.pt")
    again = weights_of(filled(tmp_path / "model.5.pt", 4, 16))
    assert all(np.array_equal(again[name], a) for name, a in weights.items())
    other = filled(interop / "no_key_c_attn", 4, 16)
    checkpoint.load(other, str(tmp_path / "model.9.pt"))
    assert other.lora_config.enable == (True, True, True)
    assert all(np.array_equal(weights_of(other)[name], a) for name, a in weights.items())


def test_another_rank_or_alpha(interop, filled):
    for r, alpha in ((3, 16), (4, 32)):
        with pytest.raises(InputError, match="has --lora_dim 4 and --lora_alpha 16, not"):
            filled(interop / "c_attn", r, alpha)


def test_biases_of_a_lora_file(jittor, interop, base, filled, tmp_path):
    """loralib's bias="lora_only": biases replace the base's, and stay with LoRA when saved."""
    import checkpoint
    from runtime import torch_file

    lora = read_weights(interop / "ours_r3_alpha7.safetensors")
    bias = "transformer.h.1.attn.c_attn.bias"
    file = {**lora, bias: np.full(96, 0.5, np.float32)}
    torch_file.save(tmp_path / "lora.pt", {"model_state_dict": file})
    model = filled(tmp_path / "lora.pt", 3, 7)
    wanted = logits(with_lora(OurLoRA(3, 7, (True, False, True), file), base), IDS)[:, -1]
    without = logits(with_lora(OurLoRA(3, 7, (True, False, True), lora), base), IDS)[:, -1]
    assert np.abs(last_logits(model, IDS) - wanted).max() < 5e-6 < np.abs(wanted - without).max()
    checkpoint.save_lora(model, tmp_path / "model.5.pt")
    saved = read_weights(tmp_path / "model.5.pt")
    assert saved.keys() == file.keys()
    assert all(np.array_equal(saved[name], a) for name, a in file.items())

    # a whole model gives its LoRA alone, as the base of --init_checkpoint is asked for
    torch_file.save(tmp_path / "whole.pt", {"model_state_dict": {**base, **file}})
    model = filled(tmp_path / "whole.pt", 3, 7)
    assert np.abs(last_logits(model, IDS) - without).max() < 5e-6
    checkpoint.save_lora(model, tmp_path / "model.6.pt")
    assert read_weights(tmp_path / "model.6.pt").keys() == lora.keys()

    torch_file.save(tmp_path / "lora.pt", {"model_state_dict": {
        **lora, "transformer.h.1.attn.c_attn.other.bias": np.zeros(96, np.float32)}})
    with pytest.raises(InputError, match="1 unexpected: transformer.h.1.attn.c_attn.other.bias"):
        filled(tmp_path / "lora.pt", 3, 7)


@pytest.mark.slow
def test_scripts_take_adapters(tiny, tmp_path):
    """Trained on with LoRA on the key, searched and exported; an adapter that changed is another
    one, and a flag that contradicts it is an error."""
    import gpt2_beam
    import gpt2_export
    import gpt2_ft
    from runtime import torch_file

    random, adapter, C = np.random.default_rng(0), tmp_path / "adapter", 8
    adapter.mkdir()

    def write():
        weights = {f"transformer.h.{n}.attn.c_attn.lora_{part}": random.normal(0, 0.3, shape)
                   .astype(np.float32) for n in range(2)
                   for part, shape in (("A", (6, C)), ("B", (3 * C, 2)))}
        peft_adapter.write(adapter, OurLoRA(2, 3.5, (True, True, True), weights), 0.0, "", None)

    def train(folder, *flags):
        return run_main(gpt2_ft.main, [
            "--train_data", tmp_path / "data.jsonl", "--valid_data", tmp_path / "data.jsonl",
            "--model_card", "gpt2.nano", "--seq_len", 16, "--max_step", 4, "--save_interval", 2,
            "--lr", 0.01, "--work_dir", tmp_path / folder, "--device", "cpu", *flags])

    write()
    with open(tmp_path / "data.jsonl", "w") as file:
        for _ in range(8):
            context, completion = random.integers(97, size=(2, 5)).tolist()
            file.write(json.dumps({"context": context, "completion": completion}) + "\n")
    assert train("base") == (0, "")
    base = tmp_path / "base/model.4.pt"
    use = ["--init_checkpoint", base, "--lora_checkpoint", adapter]
    assert train("tuned", *use) == (0, "")
    rank = peft_adapter.as_lora(peft_adapter.read(adapter), GPT2Config(2, C, 2, 97, 32)).r
    weights = torch_file.load(tmp_path / "tuned/model.2.pt")["model_state_dict"]
    assert weights["transformer.h.1.attn.c_attn.lora_A"].shape == (3 * rank, C)
    assert train("tuned", *use, "--resume") == (0, "")  # it has ended
    code, said = train("tuned", *use, "--lora_dim", rank + 1)
    assert code == 1 and f"with --lora_dim {rank}, not {rank + 1}" in said

    def search(name, *flags):
        code, said = run_main(gpt2_beam.main, [
            "--data", tmp_path / "data.jsonl", "--seq_len", 16, "--eval_len", 6, "--model_card",
            "gpt2.nano", "--beam", 2, "--work_dir", tmp_path, "--output_file", name, "--device",
            "cpu", *flags])
        assert code == 0, said
        return (tmp_path / name).read_text()

    flags = complete(adapter)
    last = search("last.jsonl", "--init_checkpoint", tmp_path / "tuned/model.4.pt",
                  "--lora_dim", flags[0], "--lora_alpha", flags[1])
    exports = [["--format", "peft", "--output_dir", tmp_path / "again"],
               ["--format", "hf", "--output_dir", tmp_path / "hf"]]
    for export in exports:
        code, said = run_main(gpt2_export.main, [
            "--init_checkpoint", tmp_path / "tuned/model.4.pt", "--lora_alpha", flags[1], *export])
        assert code == 0, said
    assert search("peft.jsonl", "--init_checkpoint", base, "--lora_checkpoint",
                  tmp_path / "again") == last
    assert search("hf.jsonl", "--init_checkpoint", tmp_path / "hf/model.safetensors") == last
    assert search("base.jsonl", "--init_checkpoint", base) != last
