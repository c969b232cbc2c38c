"""Devices of a process: its number of threads, its GPU, and copies that overlap with computing.

A GPU computes while Python continues. It stays busy if it has the next batch before the last one is
done. Batches copied from pinned memory, in a stream of their own, arrive meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from transforms.process import disk_cache
from transforms.process.limits import usable_cores
from transforms.process.locks import open_locked

_counting_threads = threading.Lock()


def threads_of(num_processes: int) -> int:
    """Return the number of threads for one of several processes that share the cores.

    The answer stays the same after torch has been set to it.
    """
    with _counting_threads:
        return max(1, _torch_threads() // num_processes)


@functools.cache
def _torch_threads() -> int:
    """Return torch's default number of threads, before it is set here; at most the usable cores.

    torch knows the cores that a process is bound to, but not the share that a container has.
    """
    return min(torch.get_num_threads(), usable_cores())


@functools.cache
def processor_facts() -> dict[str, str]:
    """Return Linux's facts about the first processor (``model name``, ``flags``…); else nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


@functools.cache
def torch_device(name: str) -> torch.device:
    """Return the device ``cpu``, ``cuda`` or ``mps``; of several GPUs, each process has its own."""
    if name != "cuda" or torch.cuda.device_count() < 2:
        return torch.device(name)
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [str(getattr(gpu, "uuid", index)) for index, gpu in enumerate(gpus)]
    return torch.device("cuda", claim(names, disk_cache.cache_root() / "gpus"))


def claim(names: Sequence[str], folder: Path) -> int:
    """Claim the resource that the fewest processes of this machine have claimed; return its index.

    The claim ends with the process, however that ends.

    Args:
        names: The resources, by names that are the same in every process.
        folder: The folder of the claims.
    """
    with contextlib.suppress(OSError):  # a file system without locks, or a read-only one
        folder.mkdir(parents=True, exist_ok=True)
        for place in itertools.count():
            for index, name in enumerate(names):
                descriptor = open_locked(folder / f"{name}.{place}")
                if descriptor is not None:
                    _held.append(descriptor)
                    return index
    return os.getpid() % len(names)


_held: list[int] = []  # descriptors that hold this process's locks


class Sender:
    """Copies tensors from the host to a device; to a GPU, while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, values: Tensor) -> Tensor:
        """Copy values to the device; computations on them wait until they have arrived.

        Values in pinned memory are not copied twice.
        """
        if self._stream is None:
            return values.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            sent = values.pin_memory().to(self._device, non_blocking=True)
        computing.wait_stream(self._stream)
        sent.record_stream(computing)  # else its memory might be reused too early
        return sent
