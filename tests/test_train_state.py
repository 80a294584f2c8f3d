"""States to resume from: which files are taken for one, and which are refused in one line."""

from __future__ import annotations

import json
import math
import os
import random
import socket

import numpy as np
import pytest

from runtime import torch_file
from runtime.errors import InputError

SETTINGS = {"train_data": "ab" * 32, "lr": 0.1, "max_step": None, "i_steps": [0, 9], "np": 1}
COUNTERS = {"step": 7, "updates": 3, "log_sum": 1.5, "log_count": 2, "best_ppl": 9.0,
            "checkpoints": [2, 4], "log_sizes": [10, 20]}
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def module(jittor):
    import train_state

    return train_state


@pytest.fixture
def state(module, jittor, tmp_path):
    """The path of a state after step 7, written as a run writes it."""
    from optimizer import AdamW

    optimizer = AdamW({"w": jittor.array(np.float32([[1, 2], [3, 4]]))})
    fill = [list(random.Random(1).getstate()[1])]
    return module.write(tmp_path, SETTINGS, module.Counters(**COUNTERS), optimizer,
                        {"w": optimizer.parameters["w"] * 2}, fill, fill)


def change(path, tables: dict | None = None, **parts) -> None:
    """Writes the state again with other tables and other parts of its description."""
    raw = torch_file.load(path)
    about = {**json.loads(raw["about"]), **parts}
    torch_file.save(path, {**raw, "about": json.dumps(about), **(tables or {})})


def refused(module, path, message: str = ": no state of a training run; remove it") -> None:
    for read in (module.read, lambda path: module.newest(path.parent)):
        with pytest.raises(InputError) as error:
            read(path)
        assert str(error.value) == f"{path}{message}"


def test_what_was_written_is_read(module, state):
    read = module.newest(state.parent)
    assert (read.path, read.settings) == (state, SETTINGS) and vars(read.counters) == COUNTERS
    assert read.weights["w"].tolist() == [[1, 2], [3, 4]]
    assert read.gradients["w"].tolist() == [[2, 4], [6, 8]]
    change(state, counters={**COUNTERS, "best_ppl": INF, "checkpoints": [], "updates": 7})
    assert module.read(state).counters.best_ppl == INF


@pytest.mark.parametrize("counters", [None, [], "text", {}, *[{**COUNTERS, **wrong} for wrong in (
    {"step": 0}, {"step": -7}, {"step": 21}, {"step": 2**53, "log_sizes": [1, 2**60]},
    {"step": 7.0}, {"step": "7"}, {"step": True}, {"step": None}, {"updates": 8},
    {"updates": -1}, {"updates": 3.0}, {"log_sum": NAN},
    {"log_sum": -INF}, {"log_sum": "1"}, {"log_sum": [1.0]}, {"log_count": 8}, {"log_count": -1},
    {"best_ppl": NAN}, {"best_ppl": 0.0}, {"best_ppl": -1.0}, {"best_ppl": None},
    {"checkpoints": [8]}, {"checkpoints": [-1]}, {"checkpoints": [4, 2]}, {"checkpoints": [2, 2]},
    {"checkpoints": "24"}, {"checkpoints": [2.0]}, {"checkpoints": None}, {"checkpoints": {"2": 4}},
    {"log_sizes": [1]}, {"log_sizes": [-1, 2]}, {"log_sizes": [1.5, 2]}, {"log_sizes": None},
    {"log_sizes": "12"}, {"log_sizes": [1, 2, 3]}, {"other": 1})]])
def test_impossible_counters(module, state, counters):
    change(state, counters=counters)
    refused(module, state)


@pytest.mark.parametrize("settings", [
    None, [], [["np", 1]], "np", {}, {"np": 2}, {"np": "1"}, {"np": 1, "lr": {}},
    {"np": 1, "lr\n": 1}, {"np": 1, "obj": "\x1b[2J"}, {"np": 1, "obj": "\ud800"},
    {"np": 1, "obj": "x" * 20_000}, {"np": 1, "i_steps": [1] * 20_000}])
def test_settings_are_plain_values_that_a_message_may_show(module, state, settings):
    change(state, settings=settings)
    refused(module, state)


@pytest.mark.parametrize("fill", [
    None, [], [[0] * 624 + [624]], [[2**31] + [0] * 623 + [1]], [[1] * 624 + [-1]],
    [[1] * 624 + [2.0]], [{"0": 1}], [[[1]] * 625], [[1] * 625] * 2])
@pytest.mark.parametrize("part", ["train_fill", "valid_fill"])
def test_impossible_states_of_the_generators(module, state, part, fill):
    change(state, **{part: fill})
    refused(module, state)


@pytest.mark.parametrize("table", ["model_state_dict", "m", "v", "gradients"])
@pytest.mark.parametrize("content", [
    "text", 1, {"w": 1}, {"w": np.float32([1, NAN])}, {"w": np.float32([INF])}])
def test_impossible_tables(module, state, table, content):
    change(state, {table: content})
    refused(module, state)


def test_a_negative_mean_square(module, state):
    change(state, {"v": {"w": np.float32([[0, 1], [2, -1e-9]])}})
    refused(module, state)


@pytest.mark.parametrize("about", [
    "", "text", "[]", "1", "null", "[" * 100_000, "[" + "[]," * 100_000 + "1]",
    '{"a":' * 100_000, "9" * 5000, "NaN", 1, {}, {"settings": 1}])
def test_a_malformed_description(module, state, about):
    change(state, {"about": about})
    refused(module, state)


@pytest.mark.parametrize("content", [1, "text", {}, {"about": "{}"}])
def test_another_structure(module, state, content):
    torch_file.save(state, content if isinstance(content, dict) else {"x": content})
    refused(module, state)


def test_what_is_no_regular_file(module, state):
    """A FIFO, a socket and a folder that are named like newer states are passed over."""
    folder = state.parent
    os.mkfifo(folder / "resume.10.pt")
    keep = os.open(folder / "resume.10.pt", os.O_RDWR)  # without a writer, open would wait
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "resume.11.pt"))
        (folder / "resume.12.pt").mkdir()
        assert module.newest(folder).path == state
        state.unlink()
        with pytest.raises(InputError, match="resume.12.pt: cannot be read: not a regular file; "
                                             "check its permissions, or remove it"):
            module.newest(folder)
    module.remove(folder)
    os.close(keep)
    assert [path.name for path in folder.iterdir()] == ["resume.12.pt"]


def test_a_state_of_another_model(module, state, jittor):
    from optimizer import AdamW

    for parameters in ({"w": (2, 3)}, {"u": (2, 2)}, {"w": (2, 2), "u": (1,)}):
        optimizer = AdamW({name: jittor.zeros(shape) for name, shape in parameters.items()})
        with pytest.raises(InputError, match="the state of another model"):
            module.read(state).restore(optimizer)
