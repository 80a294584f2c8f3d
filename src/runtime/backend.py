"""Chooses the device and imports Jittor; nothing else may import Jittor first.

Jittor reads environment variables and downloads libraries while it is imported, so this module sets
them before: the device (see :mod:`runtime.cuda_toolkit`), oneDNN for fast matrix products on the
CPU, the level of Jittor's log, and the folder and name of its cache of compiled operators. Jittor's
commands are cut at a blank in a path, so it gets only paths without one (see :func:`plain`).
Scripts call :func:`start` after they have parsed their flags, and only then import modules that
need Jittor; so ``--help`` and errors in flags are instant.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import gc
import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Iterator, NoReturn

from runtime import compiling, memory, processes
from runtime.cuda_toolkit import Cuda, find_cuda
from runtime.errors import InputError
from runtime.progress import log

ONEDNN_WHEELS = ("onednn-cpu-gomp", "onednn-devel-cpu-gomp")
# The folder in which Jittor 1.3.11 looks for the oneDNN it would otherwise download.
ONEDNN_FOLDER = "dnnl_lnx_2.2.0_cpu_gomp"
START_MEMORY = 300 << 20  # bytes that Jittor's import needs at least; with less, it can hang
LINKS = ("/var/tmp", "/tmp")  # where plain() may put its links
NOT_PLAIN = r"[^A-Za-z0-9/._+@%=~-]"  # what a shell or an option of the compiler may cut or change


def start(device: str = "auto", seed: int | None = None) -> str:
    """Imports Jittor on a device and seeds it; returns ``"cpu"`` or ``"cuda"``.

    ``device`` is auto, cpu or cuda. One log line names the device and, if ``auto`` chose the CPU,
    the reason. Raises InputError if ``device`` is cuda and cannot be used, or if Jittor cannot be
    built.
    """
    cuda, obstacle = find_cuda() if device != "cpu" else (None, "as asked by --device cpu")
    if device == "cuda" and cuda is None:
        raise InputError(f"--device cuda: {obstacle}; use --device cpu, or repair that")
    if "jittor" not in sys.modules:
        sys.path[:] = map(plain, map(os.fspath, sys.path))
        sys.executable = plain(sys.executable)
    home = _find_home()
    try:
        # An empty nvcc_path gives a CPU build even if an nvcc is on the PATH.
        with _environment(HOME=home, JITTOR_HOME=home, **(
                cuda.environment(Path(home, ".cache/jittor/cuda")) if cuda else {"nvcc_path": ""})):
            _prepare_environment(cuda)
            if "jittor" not in sys.modules:
                memory.require(START_MEMORY, "free some, or raise the limit (ulimit -v)")
                if cuda:
                    cuda.check_runtime()
                compiling.watch()
            jt = _import_jittor(cuda)
    except SystemExit:  # Jittor rebuilt its loader (another compiler or Python): start again
        compiling.unwatch()
        os.execv(sys.executable, getattr(sys, "orig_argv", [sys.executable, *sys.argv]))
    # Jittor runs this to compile an operator, and jittor_utils again looks for its home folder. In
    # Jittor's command it must be a single word; the shell splits it.
    jt.flags.python_path = "${IFS}".join(
        ("env", f"HOME={home}", f"JITTOR_HOME={home}", _python()))
    processes.check_world()
    if device == "auto":
        processes.check_same({"device": "cuda" if cuda else "cpu"})
    # Code compiled with -Ofast flushes subnormal numbers to zero, about which NumPy warns.
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")
    # Without these libraries, Jittor says nothing and multiplies by slow loops.
    if cuda and not (jt.compile_extern.cublas_ops and jt.compile_extern.curand_ops):
        raise InputError(f"{cuda.nvcc}: Jittor cannot load cuBLAS or cuRAND of this toolkit, "
                         "log_silent=0 shows why; install the whole toolkit, or use --device cpu")
    jt.flags.use_cuda = int(cuda is not None)
    if seed is not None:
        jt.set_global_seed(seed, different_seed_for_mpi=False)  # the same weights in all processes
    gc.freeze()  # Python's collector then skips what start-up made: 4 % of a training step
    log(f"device: CUDA ({cuda.nvcc})" if cuda else f"device: CPU ({obstacle})")
    return "cuda" if cuda else "cpu"


def plain(path: str) -> str:
    """The path itself if Jittor's commands can contain it, else one through a link to its folder.

    Jittor puts some paths into its commands without quotes. The link's name depends on the folder
    alone, since the path becomes part of the keys of compiled operators.
    """
    if not re.search(NOT_PLAIN, path):
        return path
    head, tail = re.findall(rf"(?s)^(.*{NOT_PLAIN}[^/]*)(.*)", os.path.abspath(path))[0]
    for place in LINKS:
        folder = Path(place, f"jittor-paths-{os.getuid()}")
        link = folder / hashlib.sha256(os.fsencode(head)).hexdigest()[:8]
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()  # all users can write to LINKS
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() \
                    or status.st_mode & 0o022:
                continue
            if not link.is_symlink() or os.readlink(link) != head:
                log(f"note: Jittor cannot use {head}, it gets the link {link} to it")
                _replace_link(link, head)
            return f"{link}{tail}"
        except OSError:
            continue
    raise InputError(f"{path}: Jittor cannot use this path, and no link to it can be made in "
                     f"{' or '.join(LINKS)}; move it to a path of ASCII letters and digits")


def _replace_link(link: Path, target: str | Path) -> None:
    """Makes a symbolic link, at once also for other processes that make it."""
    fresh = link.with_name(f".{link.name}.{os.urandom(4).hex()}")
    fresh.symlink_to(target)
    os.replace(fresh, link)


def _find_home() -> str:
    """The folder in whose ``.cache/jittor`` Jittor stores all it compiles: JITTOR_HOME, or HOME."""
    try:
        home = os.path.abspath(os.environ.get("JITTOR_HOME") or Path.home())
    except RuntimeError:
        raise InputError("HOME is not set, and Jittor stores what it compiles there; set "
                         "JITTOR_HOME to a folder that can be written") from None
    cache = Path(home, ".cache", "jittor")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"{cache}: {error.strerror}; Jittor stores what it compiles there: set "
                         "JITTOR_HOME to a folder that can be written") from None
    return plain(home)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets environment variables for a while."""
    before = os.environ.copy()
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
            if name in before:
                os.environ[name] = before[name]


def _python() -> str:
    """One name of the interpreter that all of python, python3 and python3.X have in common."""
    python = plain(os.path.join(sys.prefix, "bin", "python%d.%d" % sys.version_info[:2]))
    return python if os.access(python, os.X_OK) else sys.executable


def _cache_name(compiler: str, cuda: Cuda | None) -> str:
    """The name of Jittor's cache: a hash of what the keys of compiled operators contain.

    In a cache that two environments share, each would compile again over the other's operators.
    """
    jittor = importlib.util.find_spec("jittor")
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    parts = (jittor and jittor.origin, _python(), sysconfig.get_path("include"),
             shutil.which(compiler), version, *([cuda.nvcc, cuda.gpu.capability] if cuda else []))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def _prepare_environment(cuda: Cuda | None) -> None:
    numpy = importlib.metadata.version("numpy")
    if int(numpy.split(".")[0]) > 1:
        raise InputError(f"NumPy {numpy}: Jittor takes wrong numbers from its arrays; "
                         "pip install -r requirement.txt")
    try:
        multiprocessing.Lock()  # as those of Jittor's compiler processes
    except OSError as error:
        raise InputError(f"/dev/shm: {error.strerror}; Jittor's compiler processes need it: make "
                         "room there, or mount it writable") from None
    # Even jittor_utils, which locates the cache, runs the compiler to learn its version.
    compiler = os.environ.get("cc_path", "g++")
    if not shutil.which(compiler):
        raise InputError(f"{compiler} not found, Jittor compiles its operators with it; "
                         "apt-get install g++")
    if subprocess.run([compiler, "--version"], capture_output=True).returncode:
        raise InputError(f"{compiler} cannot print its version, Jittor compiles its operators "
                         "with it; set cc_path to another compiler, or repair it")
    # With more threads than an operating system allows, OpenMP ends the process.
    most, threads = 16 * (os.cpu_count() or 1), os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > most:
        raise InputError(f"OMP_NUM_THREADS={threads}: more than 16 threads for each core of this "
                         "machine; set a smaller number")
    _prepare_mpi()
    # Ctrl-C while Jittor is imported is left to Python, as in a Jupyter notebook.
    os.environ["JPY_PARENT_PID"] = ""
    # No cuDNN, cuFFT, cuSPARSE: GPT-2 needs none of them.
    os.environ["conv_opt"] = "1"
    # Jittor would download these. Sums over processes then go through the memory of the host.
    os.environ.update(use_nccl="0", use_cutt="0", use_cutlass="0")
    os.environ.setdefault("log_silent", "1")  # no information and warnings, only errors
    # Jittor's 16 compilers at once are too many for a machine with fewer cores.
    os.environ.setdefault("use_parallel_op_compiler", str(min(16, len(os.sched_getaffinity(0)))))
    os.environ.setdefault("cache_name", _cache_name(compiler, cuda))
    os.environ.setdefault("use_mkl", "1" if _provide_onednn() else "0")


def _prepare_mpi() -> None:
    os.environ["use_mpi"] = "1" if processes.started_by_mpirun() else "0"
    if not processes.started_by_mpirun():
        os.environ.pop("OMPI_COMM_WORLD_SIZE", None)  # Jittor reads it, whatever it is
        return
    if not shutil.which(os.environ.get("mpicc_path", "mpicc")):
        raise InputError("mpicc not found, Jittor compiles its part of MPI with it; "
                         "apt-get install openmpi-bin libopenmpi-dev")
    # Each process would use all cores, unless mpirun has bound it to some.
    cores = len(os.sched_getaffinity(0))
    if cores == os.cpu_count():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes.local_size())))


def _provide_onednn() -> bool:
    """Links oneDNN's wheels to where Jittor looks for its download; False without the wheels."""
    try:
        import jittor_utils
    except (PermissionError, IsADirectoryError) as error:  # of its lock, or of a folder above it
        sys.unraisablehook = lambda _: None  # its lock cannot close a file that was not opened
        raise InputError(f"{error.filename}: {error.strerror}; Jittor writes there: remove it, or "
                         "set JITTOR_HOME to another folder") from None

    place = Path(jittor_utils.home(), ".cache", "jittor", "mkl", ONEDNN_FOLDER)
    if (place / "lib" / "libmkldnn.so").is_file() and (place / "include" / "dnnl.hpp").is_file():
        return True
    files: dict[str, Path] = {}
    for wheel in ONEDNN_WHEELS:
        try:
            distribution = importlib.metadata.distribution(wheel)
        except importlib.metadata.PackageNotFoundError:
            log(f"note: {wheel} is not installed, matrix products on the CPU will be slow; "
                "pip install -r requirement.txt")
            return False
        for file in distribution.files or ():
            files.setdefault(file.name, Path(str(distribution.locate_file(file))).resolve())
    for name in ("dnnl.hpp", "libdnnl.so.2"):
        if name not in files or not files[name].is_file():  # pip was killed
            raise InputError(f"{ONEDNN_WHEELS[1]}: a file is missing, {name}; pip install "
                             "--force-reinstall --no-deps -r requirement.txt")
    links = {place / "include": files["dnnl.hpp"].parent}
    for name in ("libdnnl.so", "libdnnl.so.2", "libmkldnn.so"):
        links[place / "lib" / name] = files["libdnnl.so.2"]
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        _replace_link(link, target)  # also one to an environment that was removed
    return True


def _import_jittor(cuda: Cuda | None):
    import jittor_utils.install_cuda

    if "python_config_path" not in os.environ:  # Jittor would look for it, and cut its output
        jittor_utils._py3_include_path = " ".join(
            f"-I{plain(sysconfig.get_path(kind))}" for kind in ("include", "platinclude"))
        jittor_utils._py3_extension_suffix = sysconfig.get_config_var("EXT_SUFFIX")
    compiling.take_over()
    jittor_lock = jittor_utils.lock.jittor_lock
    jittor_lock.lock()
    cache = Path(jittor_utils.cache_path)
    compiling.discard_unfinished(cache)
    if not any(cache.glob("*/jittor_core*.so" if cuda else "jittor_core*.so")):
        log("first start on this machine: Jittor compiles itself, about two minutes ...")
    # Jittor installs handlers: on Ctrl-C and when a child is killed or stopped, they end this
    # process; on a segmentation fault they try to, and often hang. Python's are put back below,
    # that of SIGCHLD at once, see runtime.compiling.
    handlers = {number: signal.getsignal(number) for number in
                (signal.SIGINT, signal.SIGCHLD, signal.SIGQUIT, signal.SIGSEGV, signal.SIGFPE,
                 signal.SIGILL, signal.SIGBUS)}
    interrupts: list[int] = []  # Jittor catches exceptions of any type in some places
    if handlers[signal.SIGINT] == signal.default_int_handler:
        signal.signal(signal.SIGINT, partial(_interrupt, interrupts))
    python_locals = builtins.locals
    realpath = os.path.realpath  # with it, Jittor would resolve the links of plain()
    os.path.realpath = lambda path, **options: plain(  # type: ignore[assignment]
        realpath(path, **options))
    if sys.version_info >= (3, 13):
        builtins.locals = _locals_for_jittor
    # A toolkit that an earlier Jittor has downloaded would be completed by another download.
    jittor_utils.install_cuda.has_installation = lambda: False
    try:
        import jittor
    except Exception as error:  # a failed build raises exceptions of any type
        if interrupts:
            raise KeyboardInterrupt from None
        if memory.ran_out(error):
            raise MemoryError from None
        if isinstance(error, InputError):
            raise
        raise InputError(_why_not_built(error, cache)) from None
    finally:
        os.path.realpath, builtins.locals = realpath, python_locals
    compiling.end_pool()
    jittor_lock.unlock()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if interrupts:
        raise KeyboardInterrupt
    return jittor


def _locals_for_jittor() -> dict:
    """locals() that also shows Jittor what exec() has imported, as before Python 3.13 (PEP 667)."""
    caller = sys._getframe(1)
    if caller.f_globals.get("__name__", "").partition(".")[0] in ("jittor", "jittor_utils"):
        return {**sys.modules, **caller.f_locals}
    return caller.f_locals  # itself: a class body may write into it


def _why_not_built(error: Exception, cache: Path) -> str:
    """What Jittor's import failed at, and the remedy."""
    if not str(error):  # Jittor does not say why the first library that it compiles is not loaded
        try:
            for library in cache.glob("jit_utils_core*.so"):
                ctypes.CDLL(str(library))
        except OSError as unloadable:
            error = unloadable
    reason = (str(error).strip().splitlines() or ["unknown"])[-1]
    found = re.search(r"(\S+): version `((?:GLIBCXX|CXXABI)_\S+)' not found", reason)
    if found:
        compiler = os.environ.get("cc_path", "g++")
        version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True)
        return (f"{found[1]} lacks {found[2]}, it is older than {compiler} "
                f"{version.stdout.strip()}, with which Jittor was compiled; set cc_path to an "
                "older g++, e.g. g++-12, or let Python load a newer library (conda install -c "
                "conda-forge libstdcxx-ng, or unset LD_LIBRARY_PATH)")
    return (f"Jittor cannot be built on this machine: {reason}; see the table of errors in "
            "docs/running.md")


def _interrupt(interrupts: list[int], number: int, _frame) -> NoReturn:
    interrupts.append(number)
    raise KeyboardInterrupt


if "jittor" in sys.modules:
    raise ImportError("import runtime.backend before jittor: it sets what Jittor reads at import")
