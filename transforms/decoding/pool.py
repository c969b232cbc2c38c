"""A pool of decoder processes: encoded clips in, pieces of waveforms out.

The pool prefetches: while the model works on one clip, the next ones are read and decoded on all
cores. It guarantees:

* Order: a stream's results come in the order of its clips.
* Bounds: at most ``clips_ahead`` clips and ``bytes_ahead`` encoded bytes are in flight, and a few
  pieces of each clip. Hours-long clips are decoded at the speed of their consumer.
* Isolation: a decoder that crashes or hangs costs its own clip. The samples up to there are kept,
  with a warning that says why they end.
* Limits: an item that is too large, too long, or takes too much time or memory to decode is a
  failure, even if pieces of it have been emitted: nothing is silently cut.
* Progress: streams are fed first come, first served, and a consumer that waits for a clip receives
  it even if earlier clips are never consumed. That clip is exempt from the bounds. If every decoder
  is blocked on a full queue, another one beyond ``num_processes`` is started for it.
* Cleanup: no process, thread or temporary file outlives ``close``. Children also end when this
  process dies.
* With ``channel: each``, a clip is decoded once for each of its channels, one after the other. That
  is as much decoding for each row as mixing down takes.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from transforms.decoding.process import (
    WORKER_COMMAND,
    DecoderProcess,
    start_decoder,
)
from transforms.decoding.settings import DecodeSettings
from transforms.errors import DecodeError, EarmarkError
from transforms.process.limits import start_threads
from transforms.process.stage_times import LabellingStage, StageSeconds, stage_clocks, timed
from transforms.records import EncodedClip, Failure, Item, ItemFailure, Waveform

logger = logging.getLogger(__name__)

Decoded: TypeAlias = Waveform | ItemFailure

PIECES_AHEAD = 3  # decoded pieces of one clip in its queue
CLOSE_TIMEOUT_S = 30.0


class DecodePool:
    """Decodes streams of clips in child processes, in order and within bounds.

    One thread reads the clips, and one thread drives each child. Children start when there is work
    for them. One lock guards all state, and threads wait on conditions of that lock.

    ``worker_command`` starts a child, whose arguments are appended; tests pass one that crashes.
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
        self._bytes_ahead = self.settings.resolve_bytes_ahead()
        self._clips_ahead = self.settings.clips_ahead or 4 + 2 * self._num_processes
        self._to_feed: list[_Stream] = []  # open streams whose input has not ended, oldest first
        self._waiting: list[_Stream] = []  # streams whose consumer waits for a result
        self._open: set[_Stream] = set()
        self._queue: collections.deque[_Job] = collections.deque()
        self._workers: set[_Worker] = set()
        self._num_idle = 0
        self._has_started = False  # whether a child has been ready
        self._num_stalled = 0  # workers blocked on a full queue of pieces
        self._clips_in_flight = 0
        self._bytes_in_flight = 0
        self._fatal: EarmarkError | None = None
        self._closed = False
        self._feeder = threading.Thread(
            target=self._feed, name="earmark-decode-feeder", daemon=True
        )
        start_threads(self._feeder.start, "the thread that reads clips")
        atexit.register(self.close)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def stream(self, unit_id: str, clips: Iterable[EncodedClip | Failure]) -> DecodeStream:
        """Start decoding, and return at once; a ``Failure`` among the clips passes through.

        The clips are read on the pool's own thread. The results come in their order, and an
        exception of ``clips`` is raised in its place. Close the stream, or drop it, to stop early.

        Raises ``EarmarkError`` if the pool is closed.
        """
        stream = _Stream(unit_id, iter(clips), threading.Condition(self.lock))
        with self.lock:
            if self._closed:
                raise EarmarkError("the decode pool is closed; make a new one")
            self._open.add(stream)
            self._to_feed.append(stream)
            self._room.notify()
        return DecodeStream(self, stream)

    def close(self) -> None:
        """Stop all work, end every child and thread, and remove temporary clips."""
        atexit.unregister(self.close)
        with self.lock:
            self._closed = True
            streams = list(self._open)
            self._room.notify_all()
            self._work.notify_all()
            threads = [self._feeder, *(worker.thread for worker in self._workers)]
        for stream in streams:
            self.close_stream(stream)
        for thread in threads:
            thread.join(CLOSE_TIMEOUT_S)
            if thread.is_alive():
                logger.warning("%s did not end within %g s", thread.name, CLOSE_TIMEOUT_S)

    # The consumer's side

    def take(self, stream: _Stream) -> Decoded | None:
        """Wait for a stream's next result and return it; None at the end."""
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
                        stream.jobs.popleft()
                        self._clips_in_flight -= 1
                        self._room.notify()
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

    def _wait_for_result(self, stream: _Stream) -> None:
        cause: LabellingStage = "wait_decode" if self._has_started else "start"
        self._waiting.append(stream)
        try:
            self._room.notify()
            self._help_waiting()
            with timed(cause if stream.jobs else "wait_read"):
                stream.ready.wait()
        finally:
            self._waiting.remove(stream)

    def _help_waiting(self) -> None:
        """If every decoder is blocked on a full queue, start another for a waiting consumer."""
        if self._num_stalled < len(self._workers):
            return
        for stream in self._waiting:
            if stream.jobs and stream.jobs[0] in self._queue:
                self._queue.remove(stream.jobs[0])
                self._start_worker(stream.jobs[0])
                return

    def close_stream(self, stream: _Stream) -> None:
        """Stop a stream's work and drop its results."""
        with self.lock:
            if stream.closed:
                return
            stream.closed = True
            self._open.discard(stream)
            self._clips_in_flight -= len(stream.jobs)
            for job in stream.jobs:
                self._cancel(job)
            stream.jobs.clear()
            is_idle = not stream.is_being_read and stream in self._to_feed
            if is_idle:
                self._to_feed.remove(stream)
            stream.ready.notify_all()
            self._room.notify()
        if is_idle:  # else the feeder closes the iterator after its read
            _close_iterator(stream.clips)

    def _cancel(self, job: _Job) -> None:
        job.cancelled = True
        job.taken.notify_all()
        if job in self._queue:
            self._queue.remove(job)
            self._release(job)
        elif job.child is not None:
            job.child.kill()

    # The feeder's side

    def _feed(self) -> None:
        while True:
            with self.lock:
                while (stream := self._next_to_feed()) is None:
                    if self._closed:
                        return
                    self._room.wait()
                stream.is_being_read = True
            try:
                self._feed_one(stream)
            except Exception as error:  # else the consumers would wait for ever
                self.fail(_as_fatal("the thread that reads clips", error))
                return

    def _next_to_feed(self) -> _Stream | None:
        if self._closed or not self._to_feed:
            return None
        if self._clips_in_flight < self._clips_ahead and self._bytes_in_flight < self._bytes_ahead:
            return self._to_feed[0]
        starved = (s for s in self._waiting if not s.jobs and not s.exhausted)
        return next(starved, None)

    def _feed_one(self, stream: _Stream) -> None:
        clip: EncodedClip | Failure | None = None
        error: BaseException | None = None
        began_s = time.perf_counter()
        try:
            clip = next(stream.clips, None)
        except BaseException as raised:  # re-raised in the consumer
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
        self._clips_in_flight += 1
        if isinstance(clip, Failure):
            self._finish(job, ItemFailure(stream.unit_id, job.item_index, clip))
            return
        job.num_bytes = len(clip.data) if clip.data is not None else 0
        self._bytes_in_flight += job.num_bytes
        self._queue.append(job)
        if len(self._queue) <= self._num_idle:
            self._work.notify()
        elif len(self._workers) < self._num_processes:
            self._start_worker(None)
        else:
            self._help_waiting()

    def _start_worker(self, job: _Job | None) -> None:
        worker = _Worker(self, job)
        start_threads(worker.thread.start, "the thread of a decoder")
        self._workers.add(worker)

    # The workers' side

    def next_job(self, worker: _Worker) -> _Job | None:
        """Wait for the next clip to decode; None tells the worker to end."""
        with self.lock:
            while not self._closed and len(self._workers) <= self._num_processes:
                if self._queue:
                    return self._queue.popleft()
                self._num_idle += 1
                self._work.wait()
                self._num_idle -= 1
            self._workers.discard(worker)  # under this lock, so that no other worker ends too
            return None

    def retire(self, worker: _Worker) -> None:
        """Forget a worker that has ended."""
        with self.lock:
            self._workers.discard(worker)

    def begin(self, job: _Job, child: DecoderProcess) -> bool:
        """Record which child decodes a job; return False if the job was cancelled."""
        with self.lock:
            self._has_started = True  # from now on, waiting counts as decoding
            job.child = child
            return not job.cancelled

    def put(self, job: _Job, piece: Waveform) -> bool:
        """Queue a piece that is not the last, waiting for room; False if the job was cancelled."""
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
        """Queue a clip's last result unless the job was cancelled, and release its bytes."""
        with self.lock:
            job.child = None
            self._release(job)
            if result is not None and not job.cancelled:
                self._finish(job, result)

    def fail(self, error: EarmarkError) -> None:
        """Raise an error in every consumer: no child can be started."""
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

    def _release(self, job: _Job) -> None:
        self._bytes_in_flight -= job.num_bytes
        job.num_bytes = 0
        if job.clip is not None:
            _remove_temporary(job.clip)
            job.clip = None
        self._room.notify()


class DecodeStream(Iterator[Decoded]):
    """The results for one unit's clips, in their order. Dropping it stops the work."""

    def __init__(self, pool: DecodePool, stream: _Stream) -> None:
        self._pool = pool
        self._stream = stream

    def __next__(self) -> Decoded:
        result = self._pool.take(self._stream)
        if result is None:
            raise StopIteration
        return result

    def close(self) -> None:
        """Stop the work and drop the remaining results."""
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


def _as_fatal(what: str, error: Exception) -> EarmarkError:
    return error if isinstance(error, EarmarkError) else EarmarkError(f"{what} failed: {error!r}")


def _remove_temporary(clip: EncodedClip) -> None:
    if clip.delete_path and clip.path is not None:
        Path(clip.path).unlink(missing_ok=True)


def _close_iterator(clips: Iterator[EncodedClip | Failure]) -> None:
    close = getattr(clips, "close", None)
    if close is not None:
        with contextlib.suppress(Exception):  # no consumer is left to raise it in
            close()


class _Worker:
    """A thread that drives one child process, one clip at a time."""

    def __init__(self, pool: DecodePool, first_job: _Job | None) -> None:
        self._pool = pool
        self._first_job = first_job
        self._child: DecoderProcess | None = None
        self.thread = threading.Thread(target=self._work, name="earmark-decoder", daemon=True)

    def _work(self) -> None:
        job, self._first_job = self._first_job, None
        try:
            while job := job or self._pool.next_job(self):
                self._decode(job)
                job = None
        except Exception as error:
            self._pool.fail(_as_fatal("the thread of a decoder", error))
            raise
        finally:
            self._pool.retire(self)
            if self._child is not None:
                self._child.close()

    def _decode(self, job: _Job) -> None:
        channel = 1 if self._pool.settings.channel == "each" else None
        result: Decoded | None = None
        try:
            child = self._usable_child()
            result = self._run(job, child, channel)
            while isinstance(result, Waveform) and channel and channel < child.num_channels:
                # The last piece of a channel is not the item's last.
                is_wanted, result = self._pool.put(job, result), None
                if is_wanted:
                    channel += 1
                    child = self._usable_child()
                    result = self._run(job, child, channel)
        except EarmarkError as error:
            self._pool.fail(error)
        finally:
            self._pool.end(job, result)

    def _run(self, job: _Job, child: DecoderProcess, channel: int | None) -> Decoded | None:
        """Queue a clip's pieces, and return its last result; None if the job was cancelled.

        ``channel`` is the one to decode, from 1; None for what the settings say.
        """
        clip = job.clip
        if clip is None or not self._pool.begin(job, child):
            return None
        place = (job.stream.unit_id, job.item_index)
        try:
            for samples, facts in child.decode(clip, channel):
                piece = Waveform(*place, job.item, samples, facts, channel)
                if facts is not None:
                    return piece
                if not self._pool.put(job, piece):
                    child.kill()
                    return None
        except DecodeError as error:
            where = "" if channel in (None, 1) else f"channel {channel}: "
            failure = Failure(job.item, error.stage, error.error_type, f"{where}{error}")
            return ItemFailure(*place, failure, channel)
        raise EarmarkError("a decoder ended a clip without its facts")

    def _usable_child(self) -> DecoderProcess:
        if self._child is not None and not self._child.is_usable():
            self._child.close()
            self._child = None
        if self._child is None:
            self._child = start_decoder(self._pool.settings, self._pool.worker_command)
        return self._child
