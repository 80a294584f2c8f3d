"""``--device cuda`` from start to end on a machine without a GPU, see cuda_emulation.

The nightly tests compile Jittor's core with the emulated nvcc, which takes minutes; with the
environment variable CUDA_EMULATION, what is compiled is kept in the folder that it names.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from cuda_emulation import toolkit

OPERATORS = ["plain", "kernels"]  # settings of OPS_CUDA
CONFIG = {"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 97, "n_positions": 40}
STEPS = 8
TRAINING = ["--train_batch_size", 2, "--valid_batch_size", 2, "--grad_acc", 2, "--seq_len", 24,
            "--lr", 0.02, "--max_step", STEPS, "--warmup_step", 2, "--lora_dim", 4, "--lora_alpha",
            32, "--lora_dropout", 0.2, "--label_smooth", 0.1, "--correct_bias", "--clip", 1,
            "--eval_interval", 4, "--save_interval", 4, "--state_interval", 2]
SEARCH = ["--batch_size", 3, "--seq_len", 40, "--eval_len", 12, "--beam", 4, "--length_penalty",
          0.9, "--no_repeat_ngram_size", 3, "--repetition_penalty", 1.1, "--eos_token_id", 96]

PROGRAM = """
#include <cuda_runtime.h>
#include <cstdio>
template <int N>
__global__ static void sum(float* y, const float* x, int n) {
    __shared__ float sums[N];
    const int t = threadIdx.x;
    sums[t] = 0;
    for (int i = blockIdx.x * N + t; i < n; i += gridDim.x * N) sums[t] += x[i];
    for (int half = N / 2; half; half /= 2) {
        BARRIER;
        if (t < half) sums[t] += sums[t + half];
    }
    if (t == 0) y[blockIdx.x] = sums[0];
}
int main(int argc, char** argv) {
    const int n = 10000, blocks = 3;
    static float x[n], y[blocks], *on_device, *result;
    for (int i = 0; i < n; i++) x[i] = i % 10;
    cudaMalloc(&on_device, sizeof x);
    cudaMalloc(&result, sizeof y);
    cudaMemcpy(on_device, x, sizeof x, cudaMemcpyHostToDevice);
    const char mistake = argc > 1 ? argv[1][0] : ' ';
    sum<128><<<mistake == 'g' ? 0 : blocks, 128>>>(result, mistake == 'h' ? x : on_device, n);
    if (cudaError_t error = cudaGetLastError()) return puts(cudaGetErrorString(error)), 1;
    cudaDeviceSynchronize();
    if (mistake == 'r') return result[0] == 0;
    cudaMemcpy(y, result, sizeof y, mistake == 'c' ? cudaMemcpyHostToHost : cudaMemcpyDeviceToHost);
    printf("%g\\n", y[0] + y[1] + y[2]);
}
"""


@pytest.fixture(scope="module")
def emulated(emulation_folder) -> dict[str, str]:
    """The environment in which programs find the emulated toolkit, and compile into its folder."""
    return {**os.environ, **toolkit.build(emulation_folder), "JITTOR_HOME": str(emulation_folder)}


@pytest.mark.slow
def test_the_emulation_finds_mistakes(emulated, tmp_path):
    def compile_program(name, barrier):
        source = tmp_path / f"{name}.cu"
        source.write_text(PROGRAM.replace("BARRIER", barrier))
        subprocess.run([emulated["nvcc_path"], source, "-o", tmp_path / name], check=True)

    def run(name, *mistake):
        return subprocess.run([tmp_path / name, *mistake], capture_output=True, text=True,
                              env={**emulated, "EMULATION_REPORT": str(tmp_path / "report")})

    compile_program("right", "__syncthreads()")
    assert run("right").stdout == "45000\n"
    assert json.loads((tmp_path / "report").read_text()) == {
        "launches": 1, "syncs": 1, "to_device": 1, "to_host": 1, "bytes_to_device": 40000,
        "bytes_to_host": 12}
    assert run("right", "read").returncode == -signal.SIGSEGV
    for mistake, message in (("host", "sum<128>: a pointer to the host's memory"),
                             ("copy", "cudaMemcpy: the memory is not of the kind that")):
        ended = run("right", mistake)
        assert ended.returncode == -signal.SIGABRT and message in ended.stderr
    assert run("right", "grid").stdout == "cudaErrorInvalidConfiguration\n"

    compile_program("missing", "")
    assert run("missing").stdout != "45000\n"
    compile_program("skipped", "if (t < half) __syncthreads()")
    ended = run("skipped")
    assert ended.returncode == -signal.SIGABRT and "some threads skip a barrier" in ended.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a base model (base/), LoRA matrices, train.jsonl and valid.jsonl."""
    import hf_export
    from config import GPT2Config
    from runtime import torch_file

    folder, draw = tmp_path_factory.mktemp("files"), random.Random(1)
    numbers, config = np.random.default_rng(1), GPT2Config(**CONFIG)
    (folder / "base").mkdir()
    hf_export.write_model(folder / "base", config, {
        name: numbers.normal(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.2,
                             shape).astype(np.float32)
        for name, shape in hf_export.shapes(config).items()})
    # The matrices that training starts with are drawn, which each device does in its own way.
    torch_file.save(folder / "lora.pt", {"model_state_dict": {
        f"transformer.h.{layer}.attn.c_attn.lora_{matrix}":
            numbers.normal(0, 0.1, shape).astype(np.float32)
        for layer in range(2) for matrix, shape in (("A", (8, 24)), ("B", (48, 4)))}})
    for name, count in (("train", 9), ("valid", 5)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(count):
                record = {key: [draw.randrange(96) for _ in range(draw.randint(2, 9))] + [96]
                          for key in ("context", "completion")}
                file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def script(root, emulated, files):
    """Starts a script on a device: cpu, or cuda with a setting of OPS_CUDA."""
    def start(device, name, *flags):
        on_cuda = device != "cpu"
        environment = {**emulated, **({"OPS_CUDA": device} if on_cuda else {})}
        command = [sys.executable, root / "src" / name, *flags, "--init_checkpoint",
                   files / "base", "--device", "cuda" if on_cuda else "cpu"]
        return subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
    return start


@pytest.fixture(scope="module")
def train(script, files, tmp_path_factory):
    """Trains on a device, and returns the folder; stops and resumes if ``stop``."""
    folders = {}

    def run(device, *flags, stop=False):
        if (key := (device, *flags, stop)) in folders:
            return folders[key]
        folder = folders[key] = tmp_path_factory.mktemp(device)
        command = [device, "gpt2_ft.py", *TRAINING, "--train_data", files / "train.jsonl",
                   "--valid_data", files / "valid.jsonl", "--lora_checkpoint",
                   files / "lora.pt", "--work_dir", folder, *flags]
        if stop:
            process = script(*command)
            while not (folder / "resume.2.pt").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            said = process.communicate()[0]
            assert "to continue: the same command with --resume" in said, said
            command.append("--resume")
        process = script(*command)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        assert not stop or "resuming after step" in said
        return folder
    return run


def losses(folder) -> np.ndarray:
    """Losses (steps, 2) of training and validation."""
    with open(folder / "metrics.csv", newline="") as file:
        return np.array([[float(row[name] or 0) for name in ("loss", "valid_loss")]
                         for row in csv.DictReader(file)])


def weights(folder, step=STEPS) -> dict[str, np.ndarray]:
    from runtime import torch_file

    return torch_file.load(folder / f"model.{step}.pt")["model_state_dict"]


def agree(folder, other, tolerance=1e-4):
    assert losses(folder).shape == (STEPS, 2)
    assert np.allclose(losses(folder), losses(other), rtol=tolerance, atol=0)
    for step in (4, STEPS):
        ours, theirs = weights(folder, step), weights(other, step)
        assert ours.keys() == theirs.keys()
        for name in ours:
            difference = np.abs(ours[name] - theirs[name]).max()
            assert difference <= tolerance * np.abs(theirs[name]).max(), (step, name)


@pytest.mark.nightly
@pytest.mark.parametrize("operators", OPERATORS)
def test_training(train, operators):
    agree(train(operators), train("cpu"))


@pytest.mark.nightly
@pytest.mark.parametrize("operators", OPERATORS)
def test_a_resumed_run(train, operators):
    agree(train(operators, stop=True), train(operators))


@pytest.mark.nightly
@pytest.mark.parametrize("operators", OPERATORS)
def test_beam_search(train, script, files, operators, tmp_path):
    found = []
    for device in ("cpu", operators):
        folder = tmp_path / device
        process = script(device, "gpt2_beam.py", "--lora_checkpoint",
                         train("cpu") / f"model.{STEPS}.pt", "--data", files / "valid.jsonl",
                         "--work_dir", folder, *SEARCH)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        found.append((folder / "beam_prediction.jsonl").read_text())
    assert found[0] == found[1]


@pytest.mark.nightly
def test_bf16_and_int8(train, script, files, tmp_path):
    ours, theirs = (losses(train(device, "--precision", "bf16")) for device in ("kernels", "cpu"))
    assert np.allclose(ours, theirs, rtol=5e-3, atol=0)
    assert not np.allclose(ours, losses(train("kernels")), rtol=1e-5, atol=0)  # it is bf16
    process = script("kernels", "gpt2_beam.py", "--precision", "int8", "--lora_checkpoint",
                     train("cpu") / f"model.{STEPS}.pt", "--data", files / "valid.jsonl",
                     "--work_dir", tmp_path, *SEARCH)
    said = process.communicate()[0]
    assert process.returncode == 2
    assert "error: --precision int8: for --device cpu only" in said


# (a, b): in a model of L layers, at most a + b * L launches
LAUNCHES = {"kernels": {"training": (24, 33), "validation": (8, 12), "beam": (8, 12)},
            "plain": {"training": (45, 115), "validation": (20, 46), "beam": (12, 55)}}
# How often a step waits for the GPU, and how many copies of results it makes.
WAITS = {"training": 3, "validation": 1, "beam": 1}
RESULTS = {"training": 1, "validation": 1, "beam": 2}


@pytest.mark.nightly
@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize("layers", [1, 3])
def test_counts(root, emulated, operators, layers):
    program = subprocess.run(
        [sys.executable, root / "tests/cuda_emulation/count_steps.py", str(layers)],
        env={**emulated, "OPS_CUDA": operators}, stdout=subprocess.PIPE, check=True, text=True)
    for step, counts in json.loads(program.stdout.splitlines()[-1]).items():
        fixed, per_layer = LAUNCHES[operators][step]
        assert counts["launches"] <= fixed + per_layer * layers, step
        assert counts["syncs"] <= WAITS[step], step
        # Before it uploads an array, Jittor copies as much from the GPU, for nothing.
        assert counts["to_host"] - counts["to_device"] == RESULTS[step], step
        if step == "beam":  # 3 tokens and their values of each of 12 rows, but no logits
            assert counts["bytes_to_host"] - counts["bytes_to_device"] == 12 * 3 * 8
