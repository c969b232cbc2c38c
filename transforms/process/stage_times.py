"""Where the time goes: a stopwatch for each thread, and the seconds that they add up to.

    labelling thread   ── wait ── fbank ── copy ── model ── other ── write ──▶ lap ─▶ UnitSummary
    reading thread     read ─────────────────────────────┐                     ▲
    decoder processes  open, decode, resample ───────────┴──────── add ────────┘

A thread's stopwatch is always in exactly one stage, ``other`` unless it is told otherwise, so that
its stages add up to its wall time without rest. ``with timed("fbank")`` is in ``fbank`` meanwhile;
within another ``timed``, only the inner one counts. What a labelling thread has measured leaves
with each unit that it commits (``lap``), together with what the background has added since: so
the figures reach the end of the run on every runner, with the summaries that go there anyway.
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
    """Seconds by stage; those of several threads, processes and units are added up.

    Attributes:
        fbank_s: Labelling threads: waiting for features, which threads of their own make meanwhile.
        copy_s: Labelling threads: sending features to the device.
        model_s: Labelling threads: the model, until its embeddings are back on the host.
        queue_s: Labelling threads: waiting for the device while another thread uses it.
        check_s: Labelling threads: computing windows again, to see how precise the engine is.
        write_s: Labelling threads: Parquet, uploads and commits.
        wait_read_s: Labelling threads: waiting for audio, none of which has been read yet.
        wait_decode_s: Labelling threads: waiting for audio that is read and not decoded.
        other_s: Labelling threads: everything else (Beam, cutting, batching, rows). With the ones
            above, this is all of their time.
        read_s: The reading thread of each process: getting at the next item of its units. Local
            files are left to the decoders to read.
        open_s: Decoder processes: reading and hashing what they are given.
        decode_s: Decoder processes: decoding, mixing down and measuring levels.
        resample_s: Decoder processes: resampling.
        device_ahead_s: A GPU: computing, while no labelling thread waited for it.
        process_s: Time in which a process was labelling, however many threads it did so with.
        decoder_s: The same, times the decoder processes that it may have.
        load_s: Loading the model, before labelling begins.
        start_s: Waiting for the first decoder process to start; no part of the above either.
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
        """Wall time of the labelling threads, added up."""
        device_s = self.copy_s + self.model_s + self.queue_s + self.check_s
        wait_s = self.wait_read_s + self.wait_decode_s
        return device_s + wait_s + self.fbank_s + self.write_s + self.other_s


NO_SECONDS = StageSeconds()


class _Stopwatch:
    """One thread's time."""

    def __init__(self) -> None:
        self.stage: Stage = "other"
        self.since_s = self.lap_began_s = time.perf_counter()
        self.seconds: dict[Stage, float] = {}
        self.num_decoders = 0

    def switch(self, stage: Stage) -> Stage:
        """Enter a stage; gives the one that it was in."""
        now_s, before = time.perf_counter(), self.stage
        self.seconds[before] = self.seconds.get(before, 0.0) + now_s - self.since_s
        self.stage, self.since_s = stage, now_s
        return before


class StageClocks:
    """The stopwatches of a process, one for each thread, and what its background has done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget what an earlier run in this process has left."""
        with self._lock:
            self._threads = threading.local()
            self._background = NO_SECONDS
            self._counted_until_s = 0.0  # up to where the process's time has been counted

    def begin(self, num_decoders: int) -> None:
        """This thread labels from now on: what it did in no stage before was no work.

        Args:
            num_decoders: Decoder processes that this process may have.
        """
        watch = self._mine()
        watch.stage, watch.num_decoders = "other", num_decoders
        watch.since_s = watch.lap_began_s = time.perf_counter()
        watch.seconds.pop("other", None)

    def switch(self, stage: Stage) -> Stage:
        """Put this thread's stopwatch into a stage; gives the one that it was in."""
        return self._mine().switch(stage)

    def add(self, seconds: StageSeconds) -> None:
        """Note work of the background; it goes out with the next lap of any thread."""
        with self._lock:
            self._background += seconds

    def lap(self) -> StageSeconds:
        """This thread's time since its last lap, and the background's since anybody's."""
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
    """What happens in the ``with`` block is this thread's time in that stage.

    It must not yield to others in between: their time would count too.
    """
    before = stage_clocks.switch(stage)
    try:
        yield
    finally:
        stage_clocks.switch(before)
