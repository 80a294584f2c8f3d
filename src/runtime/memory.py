"""How much memory this process can still get.

Jittor does not check whether an allocation succeeded: it crashes. So what is known to be too large
is refused before the start.
"""

import os
import re
import resource
from pathlib import Path
from typing import Iterator

from runtime.errors import InputError

CGROUPS = Path("/sys/fs/cgroup")


def require(needed: int, remedy: str) -> None:
    """Raises InputError if ``needed`` more bytes are not available."""
    left = available()
    if needed > left:
        raise InputError(f"not enough memory: at least {needed / 2**30:.2f} GiB more are needed, "
                         f"{max(left, 0) / 2**30:.2f} GiB are available; {remedy}")


def ran_out(error: BaseException) -> bool:
    """Whether an error of Jittor, of a compiler or of the loader says that memory ran out."""
    return bool(re.search("bad_alloc|annot allocate memory|virtual memory exhausted|start new "
                          "thread|failed to map segment", str(error)))


def available() -> int:
    """The bytes that this process can still get: what its limits leave, and what is free."""
    size, _, _, _, _, data, _ = (int(pages) * os.sysconf("SC_PAGE_SIZE")
                                 for pages in Path("/proc/self/statm").read_text().split())
    left = [_number(Path("/proc/meminfo"), "MemAvailable:") * 1024, *_cgroups()]
    for limit, used in ((resource.RLIMIT_AS, size), (resource.RLIMIT_DATA, data)):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            left.append(soft - used)
    return min(left)


def _cgroups() -> Iterator[int]:
    """What the control groups of this process leave, of version 2 or 1; files can be dropped."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUPS / controllers
        limit, used = (("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else
                       ("memory.max", "memory.current"))
        for group in (root / own.lstrip("/"), *(root / own.lstrip("/")).parents):
            try:
                yield (int((group / limit).read_text()) - int((group / used).read_text())
                       + _number(group / "memory.stat", "inactive_file"))
            except (OSError, ValueError):  # no such file, or "max"
                continue


def _number(path: Path, name: str) -> int:
    """The number after ``name`` in a file of names and numbers."""
    words = path.read_text().split()
    return int(words[words.index(name) + 1])
