"""What this process may use of cores, memory and threads: the machine's, or a container's share.

A container, a Kubernetes pod, a Slurm job and a service of systemd are limited by control groups
(cgroups), of version 2 or 1. Python and torch count the whole machine there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from transforms.errors import EarmarkError

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")

RAISE_LIMIT = (
    "raise the system's limit (ulimit -u, -n, -v; of a container, those on processes and on "
    "memory), or use less: --set decode.processes=1"
)


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    A share of a core counts as one.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in _core_quotas()]
    return max(1, min([cores, *quotas]))


def usable_bytes() -> int:
    """Return the bytes of memory that this process may use, together with others beside it."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min([machine, *_memory_limits()]))


def _core_quotas() -> Iterator[float]:
    for folder in _folders("cpu"):
        if quota := _numbers(folder / "cpu.max"):  # version 2: "150000 100000", or "max 100000"
            with suppress(ValueError, ZeroDivisionError):
                yield quota[0] / quota[1]
        period = _numbers(folder / "cpu.cfs_period_us")
        for microseconds in _numbers(folder / "cpu.cfs_quota_us"):  # version 1; -1 is no limit
            if microseconds > 0 and period and period[0] > 0:
                yield microseconds / period[0]


def _memory_limits() -> Iterator[int]:
    for folder in _folders("memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):  # the last: version 1
            yield from _numbers(folder / name)


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroups for a controller, with those above them.

    Each of them limits what is below. Inside a container, the root is the container's own cgroup,
    and the path that the kernel tells may not exist below it.
    """
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2; "unified" is its place beside version 1
            tops = [CGROUPS, CGROUPS / "unified"]
        elif controller in controllers.split(","):
            tops = [CGROUPS / controllers, CGROUPS / controller]
        else:
            continue
        own = Path(path.lstrip("/"))
        for top in tops:
            yield from (top / above for above in (own, *own.parents))


def _numbers(path: Path) -> list[int]:
    """Return the whole numbers in a cgroup's file; none if one is no number, such as ``max``."""
    try:
        return [int(word) for word in path.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []


def start_threads(start: Callable[[], object], what: str) -> None:
    """Call a function that starts threads.

    Raises:
        EarmarkError: The system allows no more threads, or gives no memory for them.
    """
    try:
        start()
    except (RuntimeError, MemoryError) as error:  # Python has no type of its own for it
        message = f"{what} cannot be started: {str(error) or 'no memory'}; {RAISE_LIMIT}"
        raise EarmarkError(message) from error
