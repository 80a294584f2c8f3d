"""Decides where Jittor computes and prepares its surroundings; imported before Jittor itself.

Jittor reads environment variables and downloads libraries while it is imported, so everything it
must know is settled here first: the device, oneDNN for fast matrix products on the CPU, its own
log messages, and the name of its cache of compiled operators. Scripts call :func:`start` once
their flags are parsed and import modules that need Jittor only after it; this also keeps
``--help`` and errors in flags instant.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import processes
from cli import InputError, log

ONEDNN_WHEELS = ("onednn-cpu-gomp", "onednn-devel-cpu-gomp")
# The folder in which Jittor 1.3.11 looks for the oneDNN it would otherwise download.
ONEDNN_FOLDER = "dnnl_lnx_2.2.0_cpu_gomp"
SUPPORTED_CUDA = (11, 0), (13, 0)  # from, below: the toolkits whose headers Jittor 1.3.11 compiles

# Jittor writes "Compiling Operators(3/40) ..." straight to std::cerr and has no switch for it:
# a stream buffer that passes on every other line.
_MUFFLER = r"""
#include <iostream>
#include <mutex>
#include <string>

struct Muffler : std::streambuf {
    std::streambuf* target;
    std::string line;
    std::mutex mutex;
    explicit Muffler(std::streambuf* target) : target(target) {}
    int overflow(int c) override {
        char one = c;
        return xsputn(&one, 1), c;
    }
    std::streamsize xsputn(const char* text, std::streamsize n) override {
        std::lock_guard<std::mutex> lock(mutex);
        for (std::streamsize i = 0; i < n; i++) {
            line += text[i];
            if (text[i] == '\n' || text[i] == '\r') pass();
        }
        return n;
    }
    void pass() {
        if (line != "\n" && line.compare(0, 9, "Compiling") != 0)
            target->sputn(line.data(), line.size());
        line.clear();
    }
};

static void muffle() { std::cerr.rdbuf(new Muffler(std::cerr.rdbuf())); }
"""


def add_device_flag(parser) -> None:
    """Adds ``--device auto|cpu|cuda`` to an argparse parser."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                        help="where to compute; auto takes CUDA where a GPU and its runtime are "
                             "usable, else the CPU (default: %(default)s)")


def start(device: str = "auto", seed: int | None = None) -> str:
    """Imports Jittor on the wanted device and seeds it; returns ``"cpu"`` or ``"cuda"``.

    Says in one line where it runs and, if on the CPU by ``auto``, why. Raises InputError where
    ``device`` is "cuda" and cannot be used, or where Jittor cannot be built.
    """
    nvcc, obstacle = find_cuda() if device != "cpu" else (None, "as asked by --device cpu")
    if device == "cuda" and nvcc is None:
        raise InputError(f"--device cuda: {obstacle}; use --device cpu, or mend that")
    _prepare_environment(nvcc)
    jt = _import_jittor(on_cuda=nvcc is not None)
    # Code compiled with -Ofast flushes subnormal numbers to zero, which NumPy remarks upon.
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")
    jt.flags.use_cuda = 0
    with jt.flag_scope(use_parallel_op_compiler=0):  # the parallel one would report on this, too
        jt.code((1,), "int32", [], cpu_header=_MUFFLER, cpu_src="muffle(); @out(0) = 1;").sync()
    jt.flags.use_cuda = int(nvcc is not None)
    if seed is not None:
        jt.set_global_seed(seed, different_seed_for_mpi=False)  # all begin with the same weights
    log(f"device: CUDA ({nvcc})" if nvcc else f"device: CPU ({obstacle})")
    return "cuda" if nvcc else "cpu"


def find_cuda() -> tuple[str | None, str]:
    """(path of nvcc, "") where Jittor can use a GPU, else (None, the reason why not)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, "no NVIDIA driver found"
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if failed or not count.value:
        return None, "the NVIDIA driver finds no GPU"
    nvcc = os.environ.get("nvcc_path") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(nvcc, os.X_OK):
        return None, "a GPU, but no nvcc to compile for it; install a CUDA toolkit 12.x"
    found = re.search(r"release (\d+)\.(\d+)",
                      subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    version = tuple(map(int, found.groups())) if found else (0, 0)
    if not SUPPORTED_CUDA[0] <= version < SUPPORTED_CUDA[1]:
        return None, (f"a GPU, but {nvcc} is CUDA {version[0]}.{version[1]} and Jittor compiles "
                      "with 11.x and 12.x; install one beside it and set nvcc_path")
    toolkit = Path(nvcc).resolve().parents[1]
    for library in ("libcudart.so", "libcublas.so", "libcurand.so"):  # what Jittor insists on
        if not [*toolkit.glob(f"lib64/{library}*"), *toolkit.glob(f"lib/*/{library}*")]:
            return None, f"a GPU, but no {library} beside {nvcc}; install the whole CUDA toolkit"
    return nvcc, ""


def _prepare_environment(nvcc: str | None) -> None:
    # Even jittor_utils, which names the cache's place, asks the compiler for its version.
    if not shutil.which(os.environ.get("cc_path", "g++")):
        raise InputError("g++ not found, Jittor compiles its operators with it; "
                         "apt-get install g++")
    # An empty nvcc_path gives a CPU build even where an nvcc stands without a GPU.
    os.environ["nvcc_path"] = nvcc or ""
    # Jittor seeks pythonX.Y-config beside sys.executable, where a virtual environment has none.
    config = "python%d.%d-config" % sys.version_info[:2]
    config = Path(sys.executable).resolve().with_name(config)
    if config.is_file():
        os.environ.setdefault("python_config_path", str(config))
    _prepare_mpi()
    # No cuDNN, cuFFT, cuSPARSE: GPT-2 needs none of them.
    os.environ["conv_opt"] = "1"
    # Informations and warnings of Jittor; its errors still show.
    os.environ.setdefault("log_silent", "1")
    # Jittor names its cache after the git branch it stands in, and would compile anew on each.
    os.environ.setdefault("cache_name", "default")
    os.environ.setdefault("use_mkl", "1" if _provide_onednn() else "0")


def _prepare_mpi() -> None:
    os.environ["use_mpi"] = "1" if processes.started_by_mpirun() else "0"
    if not processes.started_by_mpirun():
        return  # nothing of MPI is looked for, compiled or loaded
    if not shutil.which(os.environ.get("mpicc_path", "mpicc")):
        raise InputError("mpicc not found, Jittor compiles its part of MPI with it; "
                         "apt-get install openmpi-bin libopenmpi-dev")
    # Each process would take all cores. Where mpirun has bound it to some, OpenMP knows.
    cores = len(os.sched_getaffinity(0))
    if cores == os.cpu_count():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes.local_size())))


def _provide_onednn() -> bool:
    """Links oneDNN's wheels where Jittor looks for its own download; False if there are none."""
    import jittor_utils

    place = Path(jittor_utils.home(), ".cache", "jittor", "mkl", ONEDNN_FOLDER)
    if (place / "lib" / "libmkldnn.so").is_file() and (place / "include" / "dnnl.hpp").is_file():
        return True
    files = {}
    for wheel in ONEDNN_WHEELS:
        try:
            distribution = importlib.metadata.distribution(wheel)
        except importlib.metadata.PackageNotFoundError:
            log(f"note: {wheel} is not installed, matrix products on the CPU will be slow; "
                "pip install -r requirement.txt")
            return False
        for file in distribution.files or ():
            files.setdefault(file.name, Path(distribution.locate_file(file)).resolve())
    links = {place / "include": files["dnnl.hpp"].parent}
    for name in ("libdnnl.so", "libdnnl.so.2", "libmkldnn.so"):
        links[place / "lib" / name] = files["libdnnl.so.2"]
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        fresh = link.with_name(f".{link.name}.{os.getpid()}")
        fresh.symlink_to(target)
        os.replace(fresh, link)  # over the link of an environment that is gone
    return True


def _import_jittor(on_cuda: bool):
    import jittor_utils

    pattern = "*/jittor_core*.so" if on_cuda else "jittor_core*.so"
    if not any(Path(jittor_utils.cache_path).glob(pattern)):
        log("first start on this machine: Jittor compiles itself, about two minutes ...")
    # Jittor would end this process when Ctrl-C is pressed or any child of ours is killed, or only
    # stopped: that waits until its handlers are gone again.
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGQUIT)}
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    try:
        import jittor
    except SystemExit:  # it has rebuilt its loader (a new compiler or Python) and wants a new start
        os.execv(sys.executable, getattr(sys, "orig_argv", [sys.executable, *sys.argv]))
    except Exception as error:  # whatever its build step ends with
        reason = (str(error).strip().splitlines() or ["unknown"])[-1]
        raise InputError(f"Jittor cannot be built on this machine: {reason}; see the table of "
                         "errors in README.md") from None
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    return jittor


if "jittor" in sys.modules:
    raise ImportError("import backend before jittor: it settles what Jittor reads at import")
