"""The processes of a run: which of them this is, and sums over all of them.

``mpirun`` tells each process its place in the environment, so that this is known before Jittor is
there; a process that it has not started is the only one. Every process must ask for the same sums
in the same order, as each waits for the others. Process 0 alone writes files and logs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scripts without arrays need not wait for it
    import numpy as np


def started_by_mpirun() -> bool:
    """Whether this process is one of Open MPI's, be it the only one."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ


def world_size() -> int:
    """The number of processes."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1))


def local_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))


def rank() -> int:
    """This one's number, from 0."""
    return int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))


def total(variables: list) -> list:
    """The sums over all processes of jt.Vars, whose shapes are the same everywhere."""
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


def total_numbers(*numbers: float) -> list[float]:
    """The sums over all processes of a few numbers, in float32 where there are several."""
    if world_size() == 1:
        return list(numbers)
    import numpy as np

    return [float(number) for number in total_array(np.array(numbers, np.float32))]
