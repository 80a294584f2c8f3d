"""The processes of a run: which of them this is, and sums over all of them.

mpirun tells each process its place through the environment, so it is known before Jittor is
imported; a process that mpirun did not start is the only one. Every process must call the same
functions in the same order, since each call waits for the others. Only process 0 writes files and
logs.
"""

from __future__ import annotations

import os
import socket
from hashlib import sha256
from typing import TYPE_CHECKING

from runtime.errors import InputError

if TYPE_CHECKING:  # scripts without arrays start faster without it
    import numpy as np


def _integer(text: str, default: int) -> int:
    return int(text) if text.isdecimal() else default


def started_by_mpirun() -> bool:
    """Whether Open MPI started this process, even if it is the only one."""
    return _integer(os.environ.get("OMPI_COMM_WORLD_SIZE", ""), 0) > 0


def world_size() -> int:
    """The number of processes."""
    return _integer(os.environ.get("OMPI_COMM_WORLD_SIZE", ""), 1)


def local_size() -> int:
    """The number of processes on this machine."""
    return _integer(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""), world_size())


def local_rank() -> int:
    """The number of this process among those on this machine, from 0."""
    return _integer(os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", ""), 0)


def several_hosts() -> bool:
    """Whether some of the processes run on another machine."""
    return world_size() != local_size()


def this_host() -> str:
    """The beginning of a message: "NAME: " of this machine if the run has several, else ""."""
    return f"{socket.gethostname()}: " if several_hosts() else ""


def rank() -> int:
    """The number of this process, from 0."""
    return _integer(os.environ.get("OMPI_COMM_WORLD_RANK", ""), 0)


def check_world() -> None:
    """Raises InputError if Open MPI's variables are left from another program than mpirun."""
    if started_by_mpirun():
        import jittor as jt

        mpi = jt.compile_extern.mpi
        if (mpi.world_size(), mpi.world_rank()) != (world_size(), rank()):
            raise InputError("OMPI_COMM_WORLD_SIZE is set, but mpirun did not start this process; "
                             "unset the variables whose names begin with OMPI_")


def first_to_report() -> bool:
    """Whether this is the first process on its machine that calls it: one tells why a run ends."""
    folder = os.environ.get("PMIX_SERVER_TMPDIR")  # mpirun's own, for one run
    try:
        if folder is not None:
            os.close(os.open(os.path.join(folder, "reported"), os.O_CREAT | os.O_EXCL))
        return True
    except OSError:  # the file is there, or mpirun has ended
        return False


def total(variables: list) -> list:
    """The sums over all processes of jt.Vars, whose shapes are the same in each process."""
    if world_size() == 1:
        return variables
    import jittor as jt
    import numpy as np

    summed = jt.concat([x.reshape(-1) for x in variables], dim=0).mpi_all_reduce("add")
    ends = np.cumsum([x.numel() for x in variables])
    return [summed[int(end) - x.numel():int(end)].reshape(x.shape)
            for x, end in zip(variables, ends)]


def total_array(array: np.ndarray) -> np.ndarray:
    """The sum over all processes of a float32 or int32 array."""
    if world_size() == 1:
        return array
    import jittor as jt

    return total([jt.array(array)])[0].numpy()


def total_number(number: float) -> float:
    """The sum over all processes of a number, in float32 if there are several processes."""
    if world_size() == 1:
        return number
    import numpy as np

    return float(total_array(np.array([number], np.float32))[0])


def gather(numbers: list[int]) -> list[list[int]]:
    """The lists of all processes, each of the same length, of integers in [0, 2**32)."""
    if world_size() == 1:
        return [numbers]
    import numpy as np

    table = np.zeros((world_size(), len(numbers)), np.uint32)
    table[rank()] = numbers  # the other rows are zeros, and x + 0 is exact also as int32
    return total_array(table.view(np.int32)).view(np.uint32).tolist()


def check_same(settings: dict[str, object]) -> None:
    """Raises InputError, in every process, if a setting is not the same in all processes."""
    names = sorted(settings)
    table = gather([int(sha256(repr(settings[name]).encode()).hexdigest()[:8], 16)
                    for name in names])
    for number, row in enumerate(table):
        for name, first, other in zip(names, table[0], row):
            if other != first:
                raise InputError(f"--{name}: process {number} has another value or file than "
                                 "process 0; start all with the same flags and files")


def barrier() -> None:
    """Waits until every process has come here."""
    if world_size() > 1:
        import jittor as jt

        jt.compile_extern.mpi.mpi_barrier()
