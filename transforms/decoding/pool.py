"""From encoded clips to waveforms, in child processes that can be killed and replaced.

    WorkUnit ─read_unit─▶ EncodedClip ─▶ DecodePool ─▶ Waveform pieces, ItemFailure ─▶ UnitEnd
                                          │      ▲
                                          ▼      │ samples through shared memory
                                     child processes

``DecodePool`` looks ahead: while the model works on one clip, the next ones are read and decoded
on all cores. It guarantees:

* Order: what comes out of a stream is in the order of what went in.
* Bounds: at most ``clips_ahead`` clips and ``bytes_ahead`` encoded bytes are under way, and a few
  pieces of each clip; hours-long clips flow at the speed of whoever takes them.
* Isolation: a decoder that crashes or hangs costs its own clip. What was decoded until then is
  kept, with a warning that says why it ends there.
* Limits: an item that is too large, too long, or takes too much time or memory to decode is a
  failure, even if pieces of it are out already: nothing is silently cut.
* Progress: streams are fed first come, first served, and whoever waits for a clip gets it, even
  if nobody takes what came before. That clip then jumps the bounds, and a decoder beyond
  ``num_processes`` is started for it if all others wait for somebody to take their pieces.
* Nothing stays: no process, thread or temporary file outlives ``close``; children also end by
  themselves when this process dies.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import apache_beam as beam
from apache_beam.metrics.metric import Metrics
from apache_beam.utils.windowed_value import WindowedValue

from transforms.decoding import decode
from transforms.decoding.process import (
    WORKER_COMMAND,
    DecoderLostError,
    DecoderOptions,
    DecoderProcess,
    start_decoder,
)
from transforms.errors import DecodeError, EarmarkError, item_too_large
from transforms.process.stage_times import LabellingStage, StageSeconds, stage_clocks, timed
from transforms.records import (
    ClipFacts,
    EncodedClip,
    Failure,
    FloatArray,
    Item,
    ItemFailure,
    UnitEnd,
    Waveform,
    WorkUnit,
)

logger = logging.getLogger(__name__)

Decoded: TypeAlias = Waveform | ItemFailure
ReadUnit: TypeAlias = Callable[[WorkUnit], Iterator[EncodedClip | Failure]]

PIECES_AHEAD = 3  # decoded pieces of one clip that wait to be taken
MIN_DECODER_BYTES = 256 << 20  # less would not hold the libraries themselves
CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class DecodeSettings:
    """How clips are decoded.

    Attributes:
        sample_rate_hz: The model's rate.
        num_processes: Decoder processes; 0 means one for each core this process may use.
        clips_ahead: Clips read but not taken yet; 0 means 4 and 2 more for each process.
        bytes_ahead: Encoded bytes read but not decoded yet; one clip may exceed it.
        stall_timeout_s: A decoder that shows no sign of life for this long is killed.
        piece_samples: Samples per piece of a decoded clip.
        max_item_bytes: Encoded bytes of an item.
        max_item_s: Seconds of audio of an item.
        max_decode_ratio: Seconds of computing per second of audio, once an item has taken
            ``stall_timeout_s`` of computing.
        max_decoder_bytes: Memory of a decoder process, beside what it holds when it starts and
            the encoded bytes of its clip. Linux only.
    """

    sample_rate_hz: int = 16_000
    num_processes: int = 0
    clips_ahead: int = 0
    bytes_ahead: int = 512 << 20
    stall_timeout_s: float = 60.0
    piece_samples: int = 160_000
    max_item_bytes: int = 64 << 30
    max_item_s: float = 604_800.0
    max_decode_ratio: float = 10.0
    max_decoder_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        for name, least in (
            ("sample_rate_hz", 1),
            ("num_processes", 0),
            ("clips_ahead", 0),
            ("bytes_ahead", 1),
            ("piece_samples", self.min_clip_samples),
            ("max_item_bytes", 1),
            ("max_decoder_bytes", MIN_DECODER_BYTES),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; must be at least {least}")
        for name in ("stall_timeout_s", "max_item_s", "max_decode_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; must be greater than 0")

    @property
    def min_clip_samples(self) -> int:
        """Samples below which a clip is an error: 25 ms."""
        return round(decode.MIN_CLIP_S * self.sample_rate_hz)

    @property
    def limits(self) -> decode.DecodeLimits:
        """The bounds that a decoder process holds to."""
        return decode.DecodeLimits(
            max_item_s=self.max_item_s,
            max_decode_ratio=self.max_decode_ratio,
            min_decode_s=self.stall_timeout_s,
            max_decoder_bytes=self.max_decoder_bytes,
        )

    @property
    def of_process(self) -> DecoderOptions:
        """What a decoder process is started with."""
        return DecoderOptions(
            self.sample_rate_hz, self.piece_samples, self.limits, self.stall_timeout_s
        )

    def resolve_num_processes(self) -> int:
        """``num_processes``, or the number of usable cores."""
        return self.num_processes or usable_cores()

    def resolve_clips_ahead(self) -> int:
        """``clips_ahead``, or its default."""
        return self.clips_ahead or 4 + 2 * self.resolve_num_processes()


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class DecodePool:
    """Decodes streams of clips in child processes, in order and within bounds.

    Threads: one reads what is to be decoded, one drives each child. Children start when there is
    work for them. All state is guarded by one lock; waiting is on conditions of that lock.

    Args:
        settings: Bounds and rates.
        worker_command: Starts a child; tests put one that crashes here. The child's arguments
            follow it.
    """

    def __init__(
        self,
        settings: DecodeSettings | None = None,
        *,
        worker_command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self.settings = settings or DecodeSettings()
        self.worker_command = tuple(worker_command)
        self.lock = threading.Lock()
        self._room = threading.Condition(self.lock)  # the feeder waits here
        self._work = threading.Condition(self.lock)  # idle workers wait here
        self._num_processes = self.settings.resolve_num_processes()
        self._clips_ahead = self.settings.resolve_clips_ahead()
        self._to_feed: list[_Stream] = []  # open streams whose input has not ended, oldest first
        self._waiting: list[_Stream] = []  # streams whose consumer waits for the next piece
        self._open: set[_Stream] = set()
        self._queue: collections.deque[_Job] = collections.deque()
        self._workers: set[_Worker] = set()
        self._num_idle = 0
        self._has_started = False  # a child has been ready for work
        self._num_stalled = 0  # workers whose clip has enough pieces waiting
        self._clips_under_way = 0
        self._bytes_under_way = 0
        self._feeder: threading.Thread | None = None
        self._fatal: EarmarkError | None = None
        self._closed = False
        atexit.register(self.close)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def stream(self, unit_id: str, clips: Iterable[EncodedClip | Failure]) -> DecodeStream:
        """Start decoding; returns at once.

        Args:
            unit_id: The unit that the results belong to.
            clips: What to decode; read by the pool's own thread. A ``Failure`` passes through.

        Returns:
            An iterator of waveform pieces and failures in the order of ``clips``. Close it, or
            drop it, to stop early. It raises what ``clips`` raises, in its place.

        Raises:
            EarmarkError: The pool is closed.
        """
        stream = _Stream(unit_id, iter(clips), threading.Condition(self.lock))
        with self.lock:
            if self._closed:
                raise EarmarkError("the decode pool is closed; make a new one")
            self._open.add(stream)
            self._to_feed.append(stream)
            if self._feeder is None:
                self._feeder = threading.Thread(
                    target=self._feed, name="earmark-decode-feeder", daemon=True
                )
                self._feeder.start()
            self._room.notify()
        return DecodeStream(self, stream)

    def close(self) -> None:
        """Stop all work; ends every child and thread, and removes temporary clips."""
        atexit.unregister(self.close)
        with self.lock:
            self._closed = True
            streams = list(self._open)
            self._room.notify_all()
            self._work.notify_all()
            workers = list(self._workers)
        for stream in streams:
            self.close_stream(stream)
        threads = [worker.thread for worker in workers]
        if self._feeder is not None:
            threads.append(self._feeder)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(CLOSE_TIMEOUT_S)
                if thread.is_alive():
                    logger.warning("%s did not end within %g s", thread.name, CLOSE_TIMEOUT_S)

    # The consumer's side

    def take(self, stream: _Stream) -> Decoded | None:
        """The stream's next result, waiting for it; None at its end."""
        with self.lock:
            while True:
                if self._fatal is not None:
                    raise self._fatal
                if stream.closed:
                    if self._closed:
                        raise EarmarkError("the decode pool was closed while a stream was read")
                    return None
                if stream.jobs:
                    job = stream.jobs[0]
                    result = job.results.popleft() if job.results else None
                    if job.done and not job.results:
                        self._finish_head(stream)
                    if result is not None:
                        job.taken.notify()
                        return result
                elif stream.exhausted:
                    self._open.discard(stream)
                    error, stream.error = stream.error, None
                    if error is not None:
                        raise error
                    return None
                self._wait_for_result(stream)

    def _finish_head(self, stream: _Stream) -> None:
        stream.jobs.popleft()
        self._clips_under_way -= 1
        self._room.notify()

    def _wait_for_result(self, stream: _Stream) -> None:
        self._waiting.append(stream)
        try:
            self._room.notify()
            self._help_waiting()
            with timed(self._cause_of_wait(stream)):
                stream.ready.wait()
        finally:
            self._waiting.remove(stream)

    def _cause_of_wait(self, stream: _Stream) -> LabellingStage:
        if not stream.jobs:
            return "wait_read"
        return "wait_decode" if self._has_started else "start"

    def _help_waiting(self) -> None:
        """If every decoder waits for somebody to take its pieces, start one for who waits."""
        if self._num_stalled < len(self._workers):
            return
        for stream in self._waiting:
            if stream.jobs and stream.jobs[0] in self._queue:
                self._queue.remove(stream.jobs[0])
                self._start_worker(stream.jobs[0])
                return

    def close_stream(self, stream: _Stream) -> None:
        """Stop a stream's work and forget it."""
        with self.lock:
            if stream.closed:
                return
            stream.closed = True
            self._open.discard(stream)
            self._clips_under_way -= len(stream.jobs)
            for job in stream.jobs:
                self._cancel(job)
            stream.jobs.clear()
            is_mine = not stream.is_being_read and stream in self._to_feed
            if is_mine:
                self._to_feed.remove(stream)
            stream.ready.notify_all()
            self._room.notify()
        if is_mine:  # else the feeder closes it, once it is done reading
            _close_iterator(stream.clips)

    def _cancel(self, job: _Job) -> None:
        job.cancelled = True
        job.taken.notify_all()
        if job in self._queue:
            self._queue.remove(job)
            self._let_go(job)
        elif job.child is not None:
            job.child.kill()

    # The feeder's side

    def _feed(self) -> None:
        """Body of the feeder thread."""
        while True:
            with self.lock:
                while (stream := self._next_to_feed()) is None:
                    if self._closed:
                        return
                    self._room.wait()
                stream.is_being_read = True
            self._feed_one(stream)

    def _next_to_feed(self) -> _Stream | None:
        if self._closed or not self._to_feed:
            return None
        if (
            self._clips_under_way < self._clips_ahead
            and self._bytes_under_way < self.settings.bytes_ahead
        ):
            return self._to_feed[0]
        starved = (s for s in self._waiting if not s.jobs and not s.exhausted)
        return next(starved, None)

    def _feed_one(self, stream: _Stream) -> None:
        clip: EncodedClip | Failure | None = None
        error: BaseException | None = None
        began_s = time.perf_counter()
        try:
            clip = next(stream.clips, None)
        except BaseException as raised:  # the consumer gets it, whatever it is
            error = raised
        stage_clocks.add(StageSeconds(read_s=time.perf_counter() - began_s))
        with self.lock:
            stream.is_being_read = False
            is_wanted = not (stream.closed or self._closed)
            if not is_wanted:
                self._to_feed.remove(stream)
            elif clip is None:
                stream.exhausted, stream.error = True, error
                self._to_feed.remove(stream)
                stream.ready.notify()
            else:
                self._enqueue(stream, clip)
        if not is_wanted:
            if isinstance(clip, EncodedClip):
                _remove_temporary(clip)
            _close_iterator(stream.clips)

    def _enqueue(self, stream: _Stream, clip: EncodedClip | Failure) -> None:
        encoded = clip if isinstance(clip, EncodedClip) else None
        taken = threading.Condition(self.lock)
        job = _Job(stream, stream.num_items, clip.item, encoded, taken)
        stream.num_items += 1
        stream.jobs.append(job)
        self._clips_under_way += 1
        if isinstance(clip, Failure):
            self._finish(job, ItemFailure(stream.unit_id, job.item_index, clip))
            return
        job.num_bytes = len(clip.data) if clip.data is not None else 0
        self._bytes_under_way += job.num_bytes
        self._queue.append(job)
        if len(self._queue) <= self._num_idle:
            self._work.notify()
        elif len(self._workers) < self._num_processes:
            self._start_worker(None)
        else:
            self._help_waiting()

    def _start_worker(self, job: _Job | None) -> None:
        worker = _Worker(self, job)
        self._workers.add(worker)
        worker.thread.start()

    # The workers' side

    def next_job(self, worker: _Worker) -> _Job | None:
        """The next clip to decode; None if the worker is to end."""
        with self.lock:
            while not self._closed and len(self._workers) <= self._num_processes:
                if self._queue:
                    return self._queue.popleft()
                self._num_idle += 1
                self._work.wait()
                self._num_idle -= 1
            self._workers.discard(worker)  # now, so that no other one retires in its place
            return None

    def note_start(self) -> None:
        """A child is ready: who waits does so for its work from now on."""
        with self.lock:
            self._has_started = True

    def retire(self, worker: _Worker) -> None:
        """The worker has ended."""
        with self.lock:
            self._workers.discard(worker)

    def begin(self, job: _Job, child: DecoderProcess) -> bool:
        """Note which child decodes a job; False if nobody wants it any more."""
        with self.lock:
            job.child = child
            return not job.cancelled

    def put(self, job: _Job, piece: Waveform) -> bool:
        """Hand out a piece that is not the last; waits for room. False if nobody wants it."""
        with self.lock:
            while len(job.results) >= PIECES_AHEAD and not job.cancelled:
                self._num_stalled += 1
                self._help_waiting()
                job.taken.wait()
                self._num_stalled -= 1
            if not job.cancelled:
                job.results.append(piece)
                self._announce(job)
            return not job.cancelled

    def end(self, job: _Job, result: Decoded | None) -> None:
        """Hand out a clip's last result, if anybody still wants it, and let its bytes go."""
        with self.lock:
            job.child = None
            self._let_go(job)
            if result is not None and not job.cancelled:
                self._finish(job, result)

    def fail(self, error: EarmarkError) -> None:
        """No child can be started: every consumer gets the error."""
        with self.lock:
            self._fatal = error
            for stream in self._open:
                stream.ready.notify_all()

    def _finish(self, job: _Job, result: Decoded) -> None:
        job.results.append(result)
        job.done = True
        self._announce(job)

    def _announce(self, job: _Job) -> None:
        if job.stream.jobs and job.stream.jobs[0] is job:
            job.stream.ready.notify()

    def _let_go(self, job: _Job) -> None:
        self._bytes_under_way -= job.num_bytes
        job.num_bytes = 0
        if job.clip is not None:
            _remove_temporary(job.clip)
            job.clip = None
        self._room.notify()


class DecodeStream(Iterator[Decoded]):
    """What a pool makes of one unit's clips, in their order. Dropping it stops the work."""

    def __init__(self, pool: DecodePool, stream: _Stream) -> None:
        self._pool = pool
        self._stream = stream

    def __next__(self) -> Decoded:
        result = self._pool.take(self._stream)
        if result is None:
            raise StopIteration
        return result

    def close(self) -> None:
        """Stop the work; what has not been taken is dropped."""
        self._pool.close_stream(self._stream)

    def __del__(self) -> None:
        stream = self._stream
        if stream.closed or (stream.exhausted and not stream.jobs):
            return
        # The garbage collector may run this on a thread that holds the pool's lock.
        with contextlib.suppress(RuntimeError):  # the interpreter is going down
            threading.Thread(target=self.close, daemon=True).start()


@dataclass(eq=False)
class _Stream:
    """A unit's clips on their way through the pool."""

    unit_id: str
    clips: Iterator[EncodedClip | Failure]
    ready: threading.Condition  # the consumer waits here
    jobs: collections.deque[_Job] = field(default_factory=collections.deque)
    num_items: int = 0
    exhausted: bool = False
    error: BaseException | None = None
    is_being_read: bool = False
    closed: bool = False


@dataclass(eq=False)
class _Job:
    """A clip on its way through the pool."""

    stream: _Stream
    item_index: int
    item: Item
    clip: EncodedClip | None  # None once it has been decoded
    taken: threading.Condition  # the worker waits here for room
    results: collections.deque[Decoded] = field(default_factory=collections.deque)
    num_bytes: int = 0
    child: DecoderProcess | None = None
    done: bool = False
    cancelled: bool = False


def _remove_temporary(clip: EncodedClip) -> None:
    if clip.delete_path and clip.path is not None:
        Path(clip.path).unlink(missing_ok=True)


def _close_iterator(clips: Iterator[EncodedClip | Failure]) -> None:
    close = getattr(clips, "close", None)
    if close is not None:
        with contextlib.suppress(Exception):  # nobody is left to hear of it
            close()


class _Worker:
    """A thread, and the child process that it drives, one clip at a time."""

    def __init__(self, pool: DecodePool, first_job: _Job | None) -> None:
        self._pool = pool
        self._first_job = first_job
        self._child: DecoderProcess | None = None
        self.thread = threading.Thread(target=self._run, name="earmark-decoder", daemon=True)

    def _run(self) -> None:
        job, self._first_job = self._first_job, None
        try:
            while job := job or self._pool.next_job(self):
                self._decode(job)
                job = None
        except Exception as error:
            self._pool.fail(EarmarkError(f"a decoder thread failed: {error!r}"))
            raise
        finally:
            self._pool.retire(self)
            if self._child is not None:
                self._child.close()

    def _decode(self, job: _Job) -> None:
        try:
            child = self._living_child()
        except EarmarkError as error:
            self._pool.end(job, None)
            self._pool.fail(error)
            return
        result = None
        clip = job.clip
        try:
            if clip is not None and self._pool.begin(job, child):
                result = _ClipDecoding(self._pool, job, child).run(clip)
        finally:
            self._pool.end(job, result)

    def _living_child(self) -> DecoderProcess:
        """The child, started or replaced if need be."""
        if self._child is not None and self._child.is_usable():
            return self._child
        if self._child is not None:
            self._child.close()
            self._child = None
        self._child = start_decoder(self._pool.settings.of_process, self._pool.worker_command)
        self._pool.note_start()
        return self._child


class _ClipDecoding:
    """One clip in a child: its pieces as they come, and how it ends."""

    def __init__(self, pool: DecodePool, job: _Job, child: DecoderProcess) -> None:
        self._pool = pool
        self._job = job
        self._child = child
        self._num_samples = 0
        # A piece is held back until the next has come, so that the last one is never empty.
        self._held: FloatArray | None = None
        self._held_facts: ClipFacts | None = None

    def run(self, clip: EncodedClip) -> Decoded | None:
        """The clip's last result; None if nobody wants it any more."""
        try:
            _check_size(clip, self._pool.settings.max_item_bytes)
            self._child.send_job(clip)
            while True:
                reply = self._child.receive_reply()
                if self._held is not None and not self._hand_out(self._held):
                    self._child.kill()
                    return None
                self._held, self._held_facts = reply.samples, reply.facts
                self._num_samples += len(reply.samples)
                if reply.is_last:
                    return self._waveform(reply.samples, reply.facts)
                self._child.return_slot()
        except DecodeError as error:
            return self._end_early(error)
        except DecoderLostError as error:
            return self._end_early(DecodeError(str(error), error_type=error.error_type))

    def _hand_out(self, samples: FloatArray) -> bool:
        return self._pool.put(self._job, self._waveform(samples, None))

    def _waveform(self, samples: FloatArray, facts: ClipFacts | None) -> Waveform:
        job = self._job
        return Waveform(job.stream.unit_id, job.item_index, job.item, samples, facts)

    def _end_early(self, error: DecodeError) -> Decoded:
        """What was decoded so far with a warning, or else the failure."""
        if error.error_type == "DecoderOutOfMemory":
            self._child.kill()  # libraries leak on this path: a fresh one takes its place
        is_bound = error.error_type in decode.BOUND_ERRORS
        if self._held is None or self._held_facts is None or is_bound:
            return _item_failure(self._job, error)
        duration_s = self._num_samples / self._pool.settings.sample_rate_hz
        facts = dataclasses.replace(
            self._held_facts,
            duration_s=duration_s,
            warning=f"decoded {duration_s:.1f} s, then stopped: {error}",
        )
        return self._waveform(self._held, facts)


def _check_size(clip: EncodedClip, max_item_bytes: int) -> None:
    if clip.data is not None:
        num_bytes = len(clip.data)
    else:
        try:
            num_bytes = Path(str(clip.path)).stat().st_size
        except OSError:  # the child says what is wrong with it
            return
    if num_bytes > max_item_bytes:
        message = item_too_large(max_item_bytes, num_bytes)
        raise DecodeError(message, error_type="ItemTooLarge")


def _item_failure(job: _Job, error: DecodeError) -> ItemFailure:
    failure = Failure(job.item, error.stage, error.error_type, str(error))
    return ItemFailure(job.stream.unit_id, job.item_index, failure)


# One pool for all the DoFns of a process, so that threads of a runner share the decoders.


@dataclass
class _SharedPool:
    pool: DecodePool
    num_users: int = 0


_shared_pools: dict[DecodeSettings, _SharedPool] = {}
_shared_pools_lock = threading.Lock()


def _borrow_pool(settings: DecodeSettings) -> DecodePool:
    with _shared_pools_lock:
        shared = _shared_pools.get(settings)
        if shared is None:
            shared = _shared_pools[settings] = _SharedPool(DecodePool(settings))
        shared.num_users += 1
        return shared.pool


def _return_pool(settings: DecodeSettings) -> None:
    with _shared_pools_lock:
        shared = _shared_pools[settings]
        shared.num_users -= 1
        if shared.num_users:
            return
        del _shared_pools[settings]
    shared.pool.close()


@beam.typehints.with_input_types(WorkUnit)
@beam.typehints.with_output_types(Waveform | ItemFailure | UnitEnd)
class DecodeAudio(beam.PTransform[Any, Any]):
    """Reads and decodes work units: ``WorkUnit`` to ``Waveform``, ``ItemFailure``, ``UnitEnd``.

    A unit's results come in the order of its items, ``UnitEnd`` last. The unit after the one that
    is handed on is already being decoded. Must be fused with what takes the samples.

    Args:
        settings: How to decode.
        read_unit: Gives a unit's clips, and failures where one cannot be read. Picklable; called
            on a thread of its own.
    """

    def __init__(self, settings: DecodeSettings, read_unit: ReadUnit) -> None:
        super().__init__()
        self._settings = settings
        self._read_unit = read_unit

    def expand(self, units: Any) -> Any:
        """Applies the step to a PCollection of ``WorkUnit``."""
        decode_fn = _DecodeFn(self._settings, self._read_unit)
        decode: Any = beam.ParDo(decode_fn)
        return units | "Decode the unit's clips" >> decode


@dataclass
class _Pending:
    """A unit whose clips are being decoded, and where in Beam's time it belongs."""

    unit: WorkUnit
    stream: DecodeStream
    window: Any
    timestamp: Any


class _DecodeFn(beam.DoFn):
    """Runs one unit behind: starts a unit's decoding, and emits the results of the one before."""

    def __init__(self, settings: DecodeSettings, read_unit: ReadUnit) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._settings = settings
        self._read_unit = read_unit
        self._pool: DecodePool | None = None
        self._pending: _Pending | None = None
        self._num_clips: Any = Metrics.counter("earmark.decode", "clips")
        self._num_failures: Any = Metrics.counter("earmark.decode", "failures")
        self._decoded_ms: Any = Metrics.counter("earmark.decode", "decoded_ms")

    def setup(self) -> None:
        self._pool = _borrow_pool(self._settings)

    def start_bundle(self) -> None:
        self._abandon()  # a bundle before this one may have failed halfway
        stage_clocks.begin(self._settings.resolve_num_processes())

    def process(
        self,
        unit: WorkUnit,
        window: Any = beam.DoFn.WindowParam,
        timestamp: Any = beam.DoFn.TimestampParam,
    ) -> Iterator[WindowedValue]:
        if self._pool is None:
            raise EarmarkError("setup was not called before process; a runner must call it")
        stream = self._pool.stream(unit.unit_id, _read_lazily(self._read_unit, unit))
        previous, self._pending = self._pending, _Pending(unit, stream, window, timestamp)
        if previous is not None:
            yield from self._emit(previous)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        previous, self._pending = self._pending, None
        if previous is not None:
            yield from self._emit(previous)

    def teardown(self) -> None:
        self._abandon()
        if self._pool is not None:
            self._pool = None
            _return_pool(self._settings)

    def _abandon(self) -> None:
        if self._pending is not None:
            self._pending.stream.close()
            self._pending = None

    def _emit(self, pending: _Pending) -> Iterator[WindowedValue]:
        num_items = 0
        with contextlib.closing(pending.stream):
            for result in pending.stream:
                num_items += self._count(result)
                yield WindowedValue(result, pending.timestamp, (pending.window,))
        end = UnitEnd(pending.unit, num_items)
        yield WindowedValue(end, pending.timestamp, (pending.window,))

    def _count(self, result: Decoded) -> int:
        """1 if the result is its item's last, else 0."""
        if isinstance(result, ItemFailure):
            self._num_failures.inc()
            return 1
        if result.facts is None:
            return 0
        self._num_clips.inc()
        self._decoded_ms.inc(round(result.facts.duration_s * 1000))
        return 1


def _read_lazily(read_unit: ReadUnit, unit: WorkUnit) -> Iterator[EncodedClip | Failure]:
    """Calls ``read_unit`` on the thread that reads, so that its errors come in their place."""
    yield from read_unit(unit)
