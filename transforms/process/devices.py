"""What a process computes on: how many threads, which of several GPUs, copies that cost no time.

A GPU works through what it is given while Python goes on. It is kept busy by giving it the next
batch before the last one is done; what is sent to it from pinned memory, in a stream of its own,
arrives meanwhile.
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
from transforms.process.locks import open_locked

_counting_threads = threading.Lock()


def threads_of(num_processes: int) -> int:
    """Threads for one of several processes that share this machine's cores.

    Whoever asks gets the same answer, also after torch has been set to it.
    """
    with _counting_threads:
        return max(1, _torch_threads() // num_processes)


@functools.cache
def _torch_threads() -> int:
    """What torch would take alone: its number of threads before anybody here has set it."""
    return torch.get_num_threads()


@functools.cache
def processor_facts() -> dict[str, str]:
    """What Linux says of the first processor (``model name``, ``flags``…); nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


@functools.cache
def torch_device(name: str) -> torch.device:
    """The device of this process; on a machine with several GPUs, each process has its own.

    Args:
        name: ``cpu``, ``cuda`` or ``mps``.
    """
    if name != "cuda" or torch.cuda.device_count() < 2:
        return torch.device(name)
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [str(getattr(gpu, "uuid", index)) for index, gpu in enumerate(gpus)]
    root = disk_cache.cache_root()
    return torch.device("cuda", claim(names, None if root is None else root / "gpus"))


def claim(names: Sequence[str], folder: Path | None) -> int:
    """Take the one of several things that the fewest processes of this machine have taken.

    It is taken until the process ends, however it ends.

    Args:
        names: What there is to take, by names that are the same in every process.
        folder: Where processes see what others have taken; None where there is no such folder.

    Returns:
        Its index.
    """
    with contextlib.suppress(OSError):  # a file system without locks, or that cannot be written to
        if folder is not None:
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
    """Sends tensors from the host to a device; to a GPU, while that computes something else.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, values: Tensor) -> Tensor:
        """The values on the device; what is computed with them there waits until they are.

        Args:
            values: On the host; what lies in pinned memory is not copied once more.
        """
        if self._stream is None:
            return values.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            sent = values.pin_memory().to(self._device, non_blocking=True)
        computing.wait_stream(self._stream)
        sent.record_stream(computing)  # or its memory might be given away before it is used
        return sent
