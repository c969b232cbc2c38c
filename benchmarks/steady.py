"""The steady part of a run: its rate, from the commits, and how busy the device was meanwhile.

A run starts for many seconds (imports, the model, compiling), and ends for some. The time of its
commits tells when it was neither, so that one short run gives a rate.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIN_COMMITS = 8  # fewer do not tell a rate
SAMPLE_INTERVAL_S = 0.25
MIB = 1 << 20


@dataclass(frozen=True)
class CommitTime:
    """When a unit was committed.

    Attributes:
        time_s: In seconds since the epoch.
        clips: Clips in the unit.
    """

    time_s: float
    clips: int


@dataclass(frozen=True)
class SteadyPart:
    """The steady part of a run.

    Attributes:
        began_s: When the first quarter of the units had been committed, in seconds since the epoch.
        ended_s: When the last unit was committed.
        clips: Clips committed between the two.
    """

    began_s: float
    ended_s: float
    clips: int

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.ended_s - self.began_s

    @property
    def clips_per_s(self) -> float:
        """Its rate."""
        return self.clips / self.seconds


def read_commit_times(output: Path) -> list[CommitTime]:
    """The commits of a result, in the order in which they were made, whoever made them."""
    commits = []
    for path in (output / "_commits").glob("*.json"):
        clips = json.loads(path.read_text())["totals"]["clips"]
        commits.append(CommitTime(path.stat().st_mtime, clips))
    return sorted(commits, key=lambda commit: commit.time_s)


def steady_part(commits: Sequence[CommitTime]) -> SteadyPart | None:
    """The run from a quarter of its commits to the last one.

    Args:
        commits: In order of time.

    Returns:
        What the rate is taken of; None if there are too few commits, or all at the same time.
    """
    num_skipped = (len(commits) + 3) // 4
    if len(commits) < MIN_COMMITS or commits[-1].time_s <= commits[num_skipped - 1].time_s:
        return None
    clips = sum(commit.clips for commit in commits[num_skipped:])
    return SteadyPart(commits[num_skipped - 1].time_s, commits[-1].time_s, clips)


def clips_by_second(commits: Sequence[CommitTime], began_s: float) -> list[int]:
    """Clips committed in each second of a run."""
    clips: Counter[int] = Counter()
    for commit in commits:
        clips[max(0, int(commit.time_s - began_s))] += commit.clips
    return [clips[second] for second in range(max(clips, default=-1) + 1)]


@dataclass
class Minutes:
    """The time that is left for measuring.

    Attributes:
        limit_s: Seconds in all.
        began_s: When they began, by the monotonic clock.
    """

    limit_s: float
    began_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Seconds that remain; below 0 if it took longer."""
        return self.limit_s - (time.monotonic() - self.began_s)

    def why_not(self, needed_s: float) -> str | None:
        """Why something that takes so long is left out; None if it fits."""
        left_s = max(0.0, self.left_s)
        if needed_s <= left_s:
            return None
        return f"needs about {needed_s:.0f} s, and {left_s:.0f} s of the minutes remain"


@dataclass(frozen=True)
class DeviceSample:
    """A look at the device.

    Attributes:
        time_s: When, in seconds since the epoch.
        busy: Share of the driver's last sampling period in which the device computed, in [0, 1].
        memory_mib: Memory in use on the device, by all processes.
    """

    time_s: float
    busy: float
    memory_mib: float


class DeviceMonitor:
    """Looks at the first GPU several times a second, in a thread.

    Attributes:
        error: Why it cannot; None if it can.
    """

    def __init__(self, device: str) -> None:
        self.error: str | None = None
        self._samples: list[DeviceSample] = []
        self._stop = threading.Event()
        self._nvml: Any = None
        if device != "cuda":
            self.error = f"{device} is no GPU of NVIDIA's"
        elif importlib.util.find_spec("pynvml") is None:
            self.error = "not installed: nvidia-ml-py"
        else:
            self._nvml = importlib.import_module("pynvml")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Look while the block runs."""
        self._samples = []
        self._stop.clear()
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _look(self) -> None:
        if self._nvml is None:
            return
        try:
            self._nvml.nvmlInit()
            handle = self._nvml.nvmlDeviceGetHandleByIndex(0)
            while not self._stop.wait(SAMPLE_INTERVAL_S):
                busy = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100.0
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle).used / MIB
                self._samples.append(DeviceSample(time.time(), busy, memory))
        except self._nvml.NVMLError as error:
            self.error = f"NVML: {error}"

    def figures(self, began_s: float, ended_s: float) -> dict[str, Any]:
        """What was seen between two times; why nothing was, if nothing was."""
        return summarise_samples(self._samples, began_s, ended_s) or {
            "device_busy_error": self.error or "no sample in the steady part"
        }


def summarise_samples(
    samples: Sequence[DeviceSample], began_s: float, ended_s: float
) -> dict[str, Any]:
    """How busy the device was between two times; nothing if it was not looked at then."""
    seen = [sample for sample in samples if began_s <= sample.time_s <= ended_s]
    if not seen:
        return {}
    busy = sum(sample.busy for sample in seen) / len(seen)
    return {
        "device_busy": busy,
        "device_waits": 1.0 - busy,
        "device_memory_mib": max(sample.memory_mib for sample in seen),
        "device_samples": len(seen),
    }
