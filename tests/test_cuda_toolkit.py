"""The choice of GPU, CUDA toolkit and compiler, and the folder that is laid out for Jittor.

A driver (see conftest.py), nvcc and compilers stand in for those of many machines.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runtime import backend, cuda_toolkit
from runtime.cuda_toolkit import Cuda, Gpu, find_cuda, needs_wheels
from runtime.errors import InputError

# Says its version, and refuses compilers newer than NEWEST in the words of NVIDIA's host_config.h.
NVCC = """#!/bin/sh
case $* in
    --version) echo 'Cuda compilation tools, release {release}'; exit ;;
esac
for word; do
    case $word in -ccbin=*) version=$($(echo $word | cut -d = -f 2) -dumpversion) ;; esac
done
if [ $version -gt {newest} ]; then
    echo "unsupported GNU version! gcc versions later than {newest} are not supported!" >&2
    exit 1
fi
echo "$@"
"""
FILES = ("lib64/libcudart.so", "lib64/libcublas.so", "lib64/libcurand.so", "include/npp.h")


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(driver, monkeypatch, tmp_path):
    """Makes a machine; returns a function that adds a toolkit in ``folder`` and its nvcc."""
    for name in [name for name in os.environ if name.startswith("OMPI_")] + [
            "CUDA_VISIBLE_DEVICES", "nvcc_flags", "cc_path", "nvcc_path"]:
        monkeypatch.delenv(name, raising=False)

    def toolkit(folder="cuda", release="12.4, V12.4.131", newest=13, files=FILES,
                header="include/cuda_runtime.h"):
        nvcc = write_program(tmp_path / folder / "bin/nvcc",
                             NVCC.format(release=release, newest=newest))
        for file in (header, *files):
            (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / file).write_text(file)
        return str(nvcc)

    def make(says="12040 89", compilers={"g++": 12}, **variables):  # noqa: B006
        if says is not None:
            monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
            monkeypatch.setenv("STAND_IN_DRIVER", says)
        for name in ("sh", "cut", "echo"):
            (tmp_path / "path").mkdir(exist_ok=True)
            (tmp_path / "path" / name).symlink_to(f"/bin/{name}")
        for name, version in compilers.items():
            write_program(tmp_path / "path" / name, f"#!/bin/sh\necho {version}\n")
        monkeypatch.setenv("PATH", str(tmp_path / "path"))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return toolkit
    return make


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """The folder of the toolkit by pip. The toolkits of the machine that runs this are not seen."""
    monkeypatch.setattr(cuda_toolkit, "PLACES", ())
    monkeypatch.setattr(cuda_toolkit, "_wheels", lambda: [str(tmp_path / "pip/bin/nvcc")])
    return "pip"


def test_a_toolkit_that_suits_jittor_is_taken_as_it_is(machine, tmp_path, monkeypatch):
    nvcc = machine()()
    monkeypatch.setenv("nvcc_path", nvcc)
    cuda, reason = find_cuda()
    assert cuda == Cuda(Gpu("0", (8, 9), (12, 4)), nvcc, (12, 4), "g++") and reason == ""
    assert cuda.environment(tmp_path / "place") == {
        "CUDA_VISIBLE_DEVICES": "0", "cc_path": "g++", "nvcc_path": nvcc}
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("setting, toolkit, reason", [
    ({"says": None}, {}, "^no NVIDIA driver found$"),
    ({"says": "12040"}, {}, "driver finds no GPU .*error 100"),
    ({"says": "crash"}, {}, "driver crashes"),
    ({"says": "broken 89"}, {}, "driver fails .cuDriverGetVersion: error 1"),
    ({}, None, "^a GPU, but no nvcc; SETUP_CUDA=1 .*"),
    ({}, {"release": "10.2, V10.2.89"}, r"nvcc is CUDA 10\.2, .* nvcc_path"),
    ({}, {"release": "14.0, V14.0.1"}, r"nvcc is CUDA 14\.0, "),
    ({}, {"release": ""}, r"nvcc is CUDA 0\.0"),
    ({}, {"files": ["lib64/libcublas.so"]}, "no libcudart.so"),
    ({}, {"files": [FILES[0], "lib64/libcublas_static.a"]}, "no libcublas.so"),
    ({}, {"files": FILES[:2]}, "no libcurand.so beside it; install the whole toolkit"),
    ({}, {"header": "cuda.h"}, "no cuda_runtime.h"),
    ({"says": "12080 89"}, {"release": "13.0"}, r"CUDA 13\.0, .* is for CUDA 12\.8; .* 580"),
    ({"says": "11040 89"}, {}, r"CUDA 12\.4, .* is for CUDA 11\.4; update"),
    ({"says": "13000 61"}, {"release": "13.0"}, r"7\.5 or more, and this one has 6\.1; .*older"),
    ({"says": "12080 120"}, {"release": "12.9"}, r"is CUDA 12\.9, .* is for CUDA 12\.8"),
    ({"compilers": {"g++": 14}}, {}, r"nvcc does not work with g\+\+; apt-get install g\+\+-13"),
    ({"compilers": {"g++": 15, "g++-14": 14}}, {"newest": 12}, r"g\+\+, g\+\+-14; .*g\+\+-12, or"),
    ({"compilers": {}}, {}, r"g\+\+, which is not installed"),
    ({"compilers": {"g++": 13, "c": 14}, "cc_path": "c"}, {}, r"with c; .*g\+\+-13.*cc_path"),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, {}, "2 processes on this machine, GPUs: 1; .* own$"),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "1"}, {},
     "GPUs: 1; .*let CUDA_VISIBLE_DEVICES name all"),
    ({"says": "12040 89 89", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, {}, "3 processes .* GPUs: 2; "),
])
def test_what_a_machine_lacks(machine, wheels, monkeypatch, setting, toolkit, reason):
    add = machine(**setting)
    if toolkit is not None:
        monkeypatch.setenv("nvcc_path", add(**toolkit))
    cuda, found = find_cuda()
    assert cuda is None
    assert re.search(reason, found), found
    with pytest.raises(InputError, match="--device cuda: .*; use --device cpu") as error:
        backend.start("cuda")
    assert found in str(error.value) and "\n" not in str(error.value)


# From the notes of NVIDIA's releases.
@pytest.mark.parametrize("release, newest, chosen", [
    ("11.8", 11, "g++-11"), ("12.0", 12, "g++-12"), ("12.4", 13, "g++-13"), ("12.8", 14, "g++"),
    ("13.0", 15, "g++")])
def test_the_newest_compiler_that_nvcc_accepts(machine, monkeypatch, release, newest, chosen):
    add = machine("13000 89", {"g++": 14, "g++-13": 13, "g++-12": 12, "g++-11": 11})
    monkeypatch.setenv("nvcc_path", add(release=release, newest=newest))
    cuda, reason = find_cuda()
    assert cuda is not None, reason
    assert cuda.compiler == chosen
    monkeypatch.setenv("cc_path", "g++-11")
    assert find_cuda()[0].compiler == "g++-11"


@pytest.mark.parametrize("says, release, code", [
    ("12080 120", "12.8", "-code=compute_90"), ("11080 90", "11.7", "-code=compute_86"),
    ("11040 86", "11.0", "-code=compute_80"), ("13000 103", "13.0", "-code=compute_90"),
    ("12080 90", "12.8", ""), ("11040 75", "11.0", "")])
def test_ptx_is_embedded_for_gpus_that_are_newer_than_jittor(
        machine, monkeypatch, tmp_path, says, release, code):
    monkeypatch.setenv("nvcc_path", machine(says)(release=release))
    monkeypatch.setenv("nvcc_flags", "-lineinfo")
    cuda, reason = find_cuda()
    assert cuda is not None, reason
    flags = cuda.environment(tmp_path / "place").get("nvcc_flags", "")
    assert flags.split() == (["-lineinfo", code] if code else [])


@pytest.mark.parametrize("visible, rank, name, capability", [
    (None, 0, "0", (7, 5)), (None, 1, "1", (8, 9)),
    ("3,1", 0, "3", (7, 5)), ("3, 1", 1, "1", (8, 9)),
    ("GPU-8932f937,GPU-d0a2c1b4", 1, "GPU-d0a2c1b4", (8, 9))])
def test_each_process_has_a_gpu_of_its_own(machine, monkeypatch, visible, rank, name, capability):
    variables = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)}
    if visible:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    monkeypatch.setenv("nvcc_path", machine("12040 75 89", **variables)())
    cuda, reason = find_cuda()
    assert cuda is not None, reason
    assert (cuda.gpu.name, cuda.gpu.capability) == (name, capability)


def test_the_first_usable_toolkit_is_taken(machine, wheels, monkeypatch, tmp_path):
    add = machine()
    by_pip, on_path = add(wheels, "13.0, V13.0.88"), add("cuda", "12.4, V12.4.131")
    monkeypatch.setenv("PATH", f"{tmp_path / 'cuda/bin'}:{os.environ['PATH']}")
    for says, nvcc in (("12040 89", on_path), ("13000 89", by_pip)):
        monkeypatch.setenv("STAND_IN_DRIVER", says)
        cuda, reason = find_cuda()
        assert cuda is not None, reason
        assert cuda.nvcc == nvcc
    monkeypatch.setenv("STAND_IN_DRIVER", "11080 89")
    cuda, reason = find_cuda()
    assert cuda is None and by_pip in reason and on_path in reason


@pytest.mark.parametrize("says, release, needed", [
    ("13000 89", None, "no nvcc"), ("13000 89", "10.2", "10.2"), ("13000 89", "12.4", ""),
    ("12040 89", None, ""), ("13000 70", None, ""), ("13000", None, ""), (None, None, "")])
def test_whether_a_toolkit_by_pip_would_help(machine, wheels, monkeypatch, tmp_path, says,
                                             release, needed):
    add = machine(says)
    if release:
        add("cuda", release)
        monkeypatch.setenv("PATH", f"{tmp_path / 'cuda/bin'}:{os.environ['PATH']}")
    obstacle = needs_wheels()
    assert needed in obstacle and bool(needed) == bool(obstacle)
    # Not if the wheels are there already, and something else is in the way.
    add(wheels, files=())
    assert needs_wheels() == ""


CONDA = ("lib/libcudart.so.12", "lib/libcublas.so.12", "lib/libcublasLt.so.12",
         "lib/libcurand.so.10", "lib/libcudadevrt.a", "lib/libstdc++.so.6",
         "targets/x86_64-linux/include/cublas.h", "targets/x86_64-linux/include/cuda_runtime.h")


def test_the_folder_for_a_toolkit_with_another_layout(machine, monkeypatch, tmp_path):
    nvcc = machine()("a conda's", files=CONDA[:-1], header=CONDA[-1])
    monkeypatch.setenv("nvcc_path", nvcc)
    cuda, reason = find_cuda()
    assert cuda is not None, reason
    with ThreadPoolExecutor() as several:
        made, = {one["nvcc_path"] for one in several.map(cuda.environment, [tmp_path / "new"] * 8)}
    folder = Path(made).parents[1]
    assert os.listdir(tmp_path / "new") == [folder.name]
    assert {str(path.relative_to(folder)): path.read_text()
            for path in folder.glob("*/*") if path.name != "nvcc"} == {
        "include/cuda_runtime.h": CONDA[-1], "include/cublas.h": CONDA[-2],
        "include/npp.h": cuda_toolkit.NPP_H,
        "lib64/libcudart.so": CONDA[0], "lib64/libcudart.so.12": CONDA[0],
        "lib64/libcublas.so": CONDA[1], "lib64/libcublas.so.12": CONDA[1],
        "lib64/libcublasLt.so": CONDA[2], "lib64/libcublasLt.so.12": CONDA[2],
        "lib64/libcurand.so": CONDA[3], "lib64/libcurand.so.10": CONDA[3],
        "lib64/libcudadevrt.a": CONDA[4]}
    said = subprocess.run([made, "-std=c++14", "-ccbin=g++", "a b", "$c"], capture_output=True,
                          text=True, check=True).stdout
    assert said == "-std=c++17 -ccbin=g++ a b $c\n"
    # The variables of a start are those of the process that it starts again as.
    monkeypatch.setenv("nvcc_path", made)
    again, reason = find_cuda()
    assert again is not None, reason


RUNTIME = "int cudaGetDeviceCount(int* count) { if (!CODE) *count = 1; return CODE; }"


@pytest.mark.parametrize("code", [0, 35])
def test_a_runtime_that_finds_no_gpu_is_seen_before_jittor_crashes(machine, monkeypatch, tmp_path,
                                                                   code):
    monkeypatch.setenv("nvcc_path", machine()())
    cuda, reason = find_cuda()
    assert cuda is not None, reason
    monkeypatch.undo()
    subprocess.run(["cc", "-shared", "-fPIC", f"-DCODE={code}", "-x", "c", "-", "-o",
                    tmp_path / "cuda/lib64/libcudart.so"], input=RUNTIME, text=True, check=True)
    if code:
        with pytest.raises(InputError, match=r"libcudart.so: .* finds no GPU \(error 35\)"):
            cuda.check_runtime()
    else:
        cuda.check_runtime()


def cuda_13() -> Path:
    """The nvcc of a real CUDA 13."""
    found = [*(Path(folder, "nvidia/cu13/bin/nvcc") for folder in sys.path),
             *Path("/usr/local").glob("cuda-13.*/bin/nvcc")]
    there = [nvcc for nvcc in found if nvcc.is_file()]
    if not there:
        pytest.skip("no CUDA 13; pip install -r requirement-cuda.txt")
    return there[0]


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Path:
    """The folder for a real CUDA 13, here of a newer GPU than Jittor knows."""
    cuda = Cuda(Gpu("0", (12, 0), (13, 0)), str(cuda_13()), (13, 0), "g++")
    variables = cuda.environment(tmp_path_factory.mktemp("cuda"))
    return Path(variables["nvcc_path"]).parents[1]


# What Jittor's own files name that CUDA 13 has no more, or that comes with another library.
USES = """
#include "helper_cuda.h"
#include "misc/cuda_limits.h"
__global__ void smallest(float* x) { x[threadIdx.x] = numeric_min<float>(); }
extern "C" int use(float* x) {
    smallest<<<1, 32>>>(x);
    return gpuGetMaxGflopsDeviceId();
}
"""


@pytest.mark.slow
def test_cuda_13_compiles_as_jittor_calls_it(layout, tmp_path):
    jittor = Path(importlib.util.find_spec("jittor").origin).parent
    (tmp_path / "op.cc").write_text(USES)
    # As in Jittor's compiler.py and jit_compiler.cc.
    command = [layout / "bin/nvcc", tmp_path / "op.cc", "-std=c++14", "-Xcompiler", "-fPIC",
               "-lstdc++", "-ldl", "-shared", f"-I{jittor}/src", "-DHAS_CUDA", "-DIS_CUDA",
               f"-I{layout}/include", f"-I{jittor}/extern/cuda/inc", "-lcudart",
               f"-L{layout}/lib64", "-x", "cu", "--cudart=shared", "-ccbin=g++", "--use_fast_math",
               "-w", "-arch=compute_90", "-code=sm_90", "-code=compute_90", "-no-compress", "-o",
               tmp_path / "op.so"]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    linked = subprocess.run(["readelf", "-d", tmp_path / "op.so"], capture_output=True, text=True)
    assert "Shared library: [libcudart.so.13]" in linked.stdout
    found = subprocess.run(["ldd", tmp_path / "op.so"], capture_output=True, text=True,
                           env={**os.environ, "LD_LIBRARY_PATH": str(layout / "lib64")}).stdout
    assert "not found" not in found
    assert b".target sm_90" in (tmp_path / "op.so").read_bytes()


# Stands in for some functions of CUDA's runtime: Jittor starts and records operators without a GPU.
# The first operator that runs asks for memory of the GPU, of which there is none.
NO_GPU = """
#include <stdlib.h>
int cudaGetDeviceCount(int* count) { return *count = 0, 100; }
int cudaMalloc(void** memory, size_t size) { return *memory = malloc(size), 0; }
int cudaMallocHost(void** memory, size_t size) { return *memory = malloc(size), 0; }
"""
COMPILE_ALL = """
import ctypes
import sys

sys.path.insert(0, sys.argv[1])
from runtime import backend, cuda_toolkit

cuda_toolkit.Cuda.check_runtime = lambda cuda: None
try:
    backend.start("cuda", seed=1)
except RuntimeError as error:  # it comes as far as the choice of the device
    assert "No device found" in str(error), error
import jittor as jt
import numpy as np

import lora
import ops
from config import GPT2Config, LoRAConfig
from dataset import Batch
from generator import Generator
from model import GPT2LMModel
from optimizer import AdamW, make_schedule
from trainer import TrainOptions, Trainer

jt.Var.sync = lambda var, *_, **__: None  # ops.upload would ask for memory before all is compiled
use_cuda = ctypes.c_int.in_dll(ctypes.CDLL(jt.core.__file__), "_ZN6jittor8use_cudaE")
model = GPT2LMModel(GPT2Config(2, 64, 1, 97, 32), LoRAConfig(2, 4, 0.5))
lora.mark_only_lora_as_trainable(model)
runner = Trainer(model, AdamW(lora.lora_state_dict(model)),
                 make_schedule("linear", 0.01, 2, 40, [], []), TrainOptions(label_smooth=0.1))
jt.sync_all()


def compiles(run):
    # All operators are compiled and loaded before the first one runs, which finds no GPU.
    use_cuda.value = 1
    try:
        run()
        raise AssertionError("this ran without a GPU")
    except RuntimeError as error:
        assert "GPU memory is overflow" in str(error), error
    finally:
        use_cuda.value = 0


def validate():
    with jt.no_grad():
        model.completion_losses([((1, 2, 3), (4, 5)), ((1, 2, 3), (6,))])


def generate():
    generator = Generator(model)
    logits, cache = generator.start(np.array([[1, 2, 3]]), np.array([3]), 2, 2)
    cache.logits = x  # the step before is over
    logits = generator.step(np.array([4, 5]), np.array([0, 0]), cache)
    ops.top_log_probs(logits, 4)


ids = np.arange(16, dtype=np.int32).reshape(2, 8)
x, weight, bias = (jt.ones(shape) for shape in ((2, 3), (3,), (3,)))
jt.sync([x, weight, bias])
compiles(lambda: runner.backward([Batch(ids, ids, np.ones((2, 8), np.float32))]))
runner.gradients = {name: p * 0 for name, p in runner.optimizer.parameters.items()}
jt.sync(list(runner.gradients.values()))
compiles(runner.step)
# Only full fine-tuning needs these gradients.
compiles(lambda: jt.sync(jt.grad(ops.layer_norm(x, weight, bias, 1e-5).sum(), [weight, bias])))
model.eval()
compiles(validate)
compiles(generate)
"""


@pytest.fixture(scope="module")
def toolkit_by_pip(root, tmp_path_factory) -> Path:
    """The nvcc of requirement-cuda.txt."""
    folders = [Path(folder) for folder in sys.path]
    if not any((folder / "nvidia/cu13/bin/nvcc").is_file() for folder in folders):
        folders = [tmp_path_factory.mktemp("wheels")]
        pip = subprocess.run([sys.executable, "-m", "pip", "install", "--target", folders[0],
                              "-r", root / "requirement-cuda.txt"], capture_output=True)
        if pip.returncode:
            pytest.skip("pip cannot install requirement-cuda.txt")
    return next(filter(Path.is_file, (folder / "nvidia/cu13/bin/nvcc" for folder in folders)))


@pytest.fixture(scope="module")
def jittor_home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.mark.nightly
@pytest.mark.parametrize("switch", ["kernels", "plain"])
def test_jittor_and_its_operators_compile_with_cuda_13(driver, toolkit_by_pip, jittor_home, root,
                                                       tmp_path, switch):
    """Up to where a GPU is needed: all is compiled, linked and loaded; nothing has run."""
    stand_in = tmp_path / "cudart.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcudart.so.13,--default-symver",
                    "-x", "c", "-", "-o", stand_in], input=NO_GPU, text=True, check=True)
    environment = {**os.environ, "STAND_IN_DRIVER": "13000 89", "LD_LIBRARY_PATH": str(driver),
                   "nvcc_path": str(toolkit_by_pip), "JITTOR_HOME": str(jittor_home),
                   "OPS_CUDA": switch, "LD_PRELOAD": str(stand_in)}
    for name in ("cache_name", "cc_path", "log_silent", "CUDA_VISIBLE_DEVICES"):
        environment.pop(name, None)
    run = subprocess.run([sys.executable, "-c", COMPILE_ALL, root / "src"], capture_output=True,
                         text=True, env=environment)
    assert run.returncode == 0, run.stderr
    folder, = jittor_home.glob(".cache/jittor/jt*/**/cu13.*/jit")
    compiled = [path for path in folder.glob("*.so") if b".nv_fatbin" in path.read_bytes()]
    assert len(compiled) > 20
    sources = "".join(path.with_suffix(".cc").read_text() for path in compiled)
    launched = set(re.findall(r"(\w+)(?:<\d+>)?<<<", sources))
    kernels = {kernel for file in root.glob("src/ops/*.*h") for kernel in re.findall(
        r"^(?:KERNEL|__global__ static) void (\w+)", file.read_text(), re.MULTILINE)}
    assert "dropout" in launched and (kernels <= launched or switch == "plain")
