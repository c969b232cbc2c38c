"""Time by stage: a stopwatch for each thread, and the sum of their seconds.

    labelling thread   ── wait ── fbank ── copy ── model ── other ── write ──▶ lap ─▶ UnitSummary
    reading thread     read ─────────────────────────────┐                     ▲
    decoder processes  open, decode, resample ───────────┴──────── add ────────┘

A thread's stopwatch is always in exactly one stage, by default ``other``, so its stages add up to
its wall time. ``with timed("fbank")`` switches to ``fbank``; of nested blocks, only the innermost
counts. With each unit that it commits, a labelling thread hands over its time so far and that of
the background (``lap``). The figures travel with the summaries, and so reach the end of the run on
every runner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

LabellingStage = Literal[
    "load",
    "start",
    "wait_read",
    "wait_decode",
    "fbank",
    "queue",
    "check",
    "copy",
    "model",
    "write",
    "other",
]
DecoderStage = Literal["open", "decode", "resample"]
Stage = LabellingStage | DecoderStage


@dataclass(frozen=True)
class StageSeconds:
    """Seconds by stage, summed over threads, processes and units.

    Attributes:
        fbank_s: Labelling threads: waiting for features, which other threads make.
        copy_s: Labelling threads: copying features to the device.
        model_s: Labelling threads: the model, until its embeddings are back on the host.
        queue_s: Labelling threads: waiting for the device while another thread uses it.
        check_s: Labelling threads: computing windows again, to measure the engine's precision.
        write_s: Labelling threads: Parquet, uploads and commits.
        wait_read_s: Labelling threads: waiting for audio that is not read yet.
        wait_decode_s: Labelling threads: waiting for audio that is read and not decoded.
        other_s: Labelling threads: everything else (Beam, cutting, batching, rows). With those
            above, this is all of their time.
        read_s: The reading thread of each process: reading the next item of its units. Local files
            are read by the decoders.
        open_s: Decoder processes: reading and hashing their input.
        decode_s: Decoder processes: decoding, mixing down and measuring levels.
        resample_s: Decoder processes: resampling.
        device_ahead_s: A GPU: computing while no labelling thread waited for it.
        process_s: Wall time in which a process was labelling, with any number of threads.
        decoder_s: ``process_s`` times the decoder processes that the process may have.
        load_s: Loading the model, before labelling begins.
        start_s: Waiting for the first decoder process to start; not part of the above either.
    """

    fbank_s: float = 0.0
    copy_s: float = 0.0
    model_s: float = 0.0
    queue_s: float = 0.0
    check_s: float = 0.0
    write_s: float = 0.0
    wait_read_s: float = 0.0
    wait_decode_s: float = 0.0
    other_s: float = 0.0
    read_s: float = 0.0
    open_s: float = 0.0
    decode_s: float = 0.0
    resample_s: float = 0.0
    device_ahead_s: float = 0.0
    process_s: float = 0.0
    decoder_s: float = 0.0
    load_s: float = 0.0
    start_s: float = 0.0

    def __add__(self, other: StageSeconds) -> StageSeconds:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return StageSeconds(*(a + b for a, b in zip(mine, others, strict=True)))

    @property
    def labelling_s(self) -> float:
        """Sum of the labelling threads' wall times."""
        device_s = self.copy_s + self.model_s + self.queue_s + self.check_s
        wait_s = self.wait_read_s + self.wait_decode_s
        return device_s + wait_s + self.fbank_s + self.write_s + self.other_s


NO_SECONDS = StageSeconds()


class _Stopwatch:
    """The stopwatch of one thread."""

    def __init__(self) -> None:
        self.stage: Stage = "other"
        self.since_s = self.lap_began_s = time.perf_counter()
        self.seconds: dict[Stage, float] = {}
        self.num_decoders = 0

    def switch(self, stage: Stage) -> Stage:
        """Switch to a stage, and return the one before."""
        now_s, before = time.perf_counter(), self.stage
        self.seconds[before] = self.seconds.get(before, 0.0) + now_s - self.since_s
        self.stage, self.since_s = stage, now_s
        return before


class StageClocks:
    """The stopwatches of a process, one for each thread, and the time of its background."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Drop the times of an earlier run in this process."""
        with self._lock:
            self._threads = threading.local()
            self._background = NO_SECONDS
            self._counted_until_s = 0.0  # the process's time before this is counted

    def begin(self, num_decoders: int) -> None:
        """Start this thread's time as a labelling thread; drop its ``other`` time before.

        Args:
            num_decoders: Maximum number of decoder processes of this process.
        """
        watch = self._mine()
        watch.stage, watch.num_decoders = "other", num_decoders
        watch.since_s = watch.lap_began_s = time.perf_counter()
        watch.seconds.pop("other", None)

    def switch(self, stage: Stage) -> Stage:
        """Switch this thread's stopwatch to a stage, and return the one before."""
        return self._mine().switch(stage)

    def add(self, seconds: StageSeconds) -> None:
        """Add time of the background; the next lap of any thread takes it along."""
        with self._lock:
            self._background += seconds

    def lap(self) -> StageSeconds:
        """Return this thread's time since its last lap, and the background's since any lap."""
        watch = self._mine()
        watch.switch(watch.stage)
        own, watch.seconds = watch.seconds, {}
        began_s, watch.lap_began_s = watch.lap_began_s, watch.since_s
        with self._lock:
            process_s = max(0.0, watch.since_s - max(began_s, self._counted_until_s))
            self._counted_until_s = max(watch.since_s, self._counted_until_s)
            background, self._background = self._background, NO_SECONDS
        process_s = max(0.0, process_s - own.get("start", 0.0))
        mine = StageSeconds(
            **{f"{stage}_s": seconds for stage, seconds in own.items()},
            process_s=process_s,
            decoder_s=process_s * watch.num_decoders,
        )
        return mine + background

    def _mine(self) -> _Stopwatch:
        watch: _Stopwatch | None = getattr(self._threads, "watch", None)
        if watch is None:
            watch = self._threads.watch = _Stopwatch()
        return watch


stage_clocks = StageClocks()


@contextlib.contextmanager
def timed(stage: Stage) -> Iterator[None]:
    """Count the ``with`` block as this thread's time in a stage.

    The block must not yield to a consumer, whose time would count too.
    """
    before = stage_clocks.switch(stage)
    try:
        yield
    finally:
        stage_clocks.switch(before)
