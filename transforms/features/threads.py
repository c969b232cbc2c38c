"""The threads of a process that make features."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from transforms.features.fbank_settings import MAX_FEATURE_THREADS
from transforms.process.devices import threads_of
from transforms.process.limits import start_threads

START_TIMEOUT_S = 60.0  # a thread takes far less than a millisecond, even on a busy machine

_starting_threads = threading.Lock()


def feature_threads(num_processes: int = 1) -> ThreadPoolExecutor:
    """Return the process's threads for features, in each of which torch uses a single thread.

    Several torch threads for one window gain little, and lose much while decoders run on the same
    cores, because each operation waits for the slowest (15 to 100 ms a window instead of 5, on two
    cores). ``num_processes`` share this machine's cores.

    Raises:
        EarmarkError: The system allows no more threads.
    """
    with _starting_threads:  # else two threads could each start a pool
        return _start_threads(min(threads_of(num_processes), MAX_FEATURE_THREADS))


@functools.cache
def _start_threads(num_threads: int) -> ThreadPoolExecutor:
    num_torch_threads = torch.get_num_threads()
    threads = ThreadPoolExecutor(
        num_threads,
        thread_name_prefix="earmark-features",
        initializer=_compute_alone,
    )
    # torch's setting applies to the thread that sets it and is the default of later threads. So
    # start all threads now, and restore the default.
    all_started = threading.Barrier(num_threads, timeout=START_TIMEOUT_S)

    def start() -> None:
        list(threads.map(lambda _: all_started.wait(), range(num_threads)))

    try:
        start_threads(start, f"the {num_threads} threads that compute features")
    except BaseException:
        all_started.abort()  # else those that have started would wait for the others
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(num_torch_threads)
    return threads


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread's first call copies the default
    torch.set_num_threads(1)
