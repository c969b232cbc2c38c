"""The decoder process: decodes clips, and reads headers, for the process that started it.

It runs one job after another, so that a decoder that crashes or hangs takes this process along, and
nothing else. It is started with ``python -m transforms.decoding.child`` rather than with
multiprocessing, so that it never imports the user's main module. It imports neither torch nor Beam.

Both ends of the socket carry frames: one byte of kind, eight of length, and the payload. Samples go
through shared memory, in slots that the parent gives back.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import re
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from transforms.decoding.decode import DecodedPiece, decode, read_length_s
from transforms.decoding.settings import DecodeSettings
from transforms.errors import DecodeError
from transforms.process.stage_times import stage_clocks, timed
from transforms.records import FloatArray

FRAME_HEADER = struct.Struct("!cQ")
READY, PIECE, LAST, LENGTH, ERROR, ALIVE = b"R", b"P", b"L", b"T", b"E", b"A"  # to the parent
JOB, CREDIT = b"J", b"C"  # to the child
NUM_SLOTS = 3
ALIVE_EVERY_S = 1.0

DecodeFunction = Callable[..., Iterator[DecodedPiece]]


def data_bytes(process: int | str) -> int:
    """Return what RLIMIT_DATA counts of a process: private writable memory; 0 if unknown."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux, or the process is gone
        return 0
    found = re.search(r"^VmData:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def send_frame(connection: socket.socket, kind: bytes, payload: bytes = b"") -> None:
    """Write one frame."""
    connection.sendall(FRAME_HEADER.pack(kind, len(payload)) + payload)


@dataclass
class _Job:
    source: bytes | str
    start_s: float | None
    end_s: float | None
    channel: int | None
    reads_header: bool  # only the length that its header promises is wanted


@dataclass
class _Child:
    """The connection. Its reader thread ends the process when the parent is gone."""

    connection: socket.socket
    settings: DecodeSettings
    slots: FloatArray  # (NUM_SLOTS, piece_samples)
    jobs: queue.SimpleQueue[_Job] = field(default_factory=queue.SimpleQueue)
    credits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(NUM_SLOTS))
    num_sent: int = 0
    last_sign_s: float = 0.0
    num_bytes_before: int = 0  # of the previous clip, which may not have been freed yet
    base_bytes: int = field(default_factory=lambda: data_bytes("self"))

    def read_frames(self) -> None:
        stream = self.connection.makefile("rb")
        try:
            while header := stream.read(FRAME_HEADER.size):
                kind, length = FRAME_HEADER.unpack(header)
                payload = stream.read(length)
                if kind == CREDIT:
                    self.credits.release()
                    continue
                job = json.loads(payload)
                if job["returned_slots"]:
                    self.credits.release(job["returned_slots"])
                self.limit_memory(job["size"])
                source = stream.read(job["size"]) if job["path"] is None else job["path"]
                wanted = (job[name] for name in ("start_s", "end_s", "channel", "reads_header"))
                self.jobs.put(_Job(source, *wanted))
        finally:
            os._exit(0)

    def run_job(self, decode_function: DecodeFunction) -> None:
        job = self.jobs.get()
        try:
            if job.reads_header:
                self.send(LENGTH, {"length_s": read_length_s(job.source, self.show_life)})
            else:
                self.send_pieces(job, decode_function)
        except DecodeError as error:
            self.send_error(error.error_type, str(error))
        except MemoryError as error:
            words = str(error) or "out of memory"
            message = (
                f"the decoder needs too much memory ({words}); at most "
                f"{self.settings.max_decoder_bytes} bytes are allowed; to allow more, raise "
                "decode.max_decoder_bytes"
            )
            self.send_error("DecoderOutOfMemory", message)
        except Exception as error:  # whatever a library raises concerns this clip alone
            message = f"the decoder failed: {type(error).__name__}: {error}"
            self.send_error(type(error).__name__, message)

    @timed("decode")
    def send_pieces(self, job: _Job, decode_function: DecodeFunction) -> None:
        for piece in decode_function(
            job.source,
            settings=self.settings,
            start_s=job.start_s,
            end_s=job.end_s,
            channel=job.channel,
            on_progress=self.show_life,
        ):
            with timed("other"):  # waiting for room is not decoding
                self.send_piece(piece)

    def limit_memory(self, num_bytes: int) -> None:
        """Bound what the process may allocate, beyond a clip of so many encoded bytes."""
        allowed = self.settings.max_decoder_bytes
        if self.base_bytes:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            soft = self.base_bytes + allowed + num_bytes + self.num_bytes_before
            if hard != resource.RLIM_INFINITY:
                soft = min(soft, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        self.num_bytes_before = num_bytes

    def send_piece(self, piece: DecodedPiece) -> None:
        self.credits.acquire()
        self.slots[self.num_sent % NUM_SLOTS, : len(piece.samples)] = piece.samples
        self.num_sent += 1
        content = {
            "num_samples": len(piece.samples),
            "facts": asdict(piece.facts),
            "num_channels": piece.num_channels,
        }
        if piece.is_last:
            self.send(LAST, content | {"seconds": seconds_of_decoder()})
        else:
            self.send(PIECE, content)

    def send_error(self, error_type: str, message: str) -> None:
        content = {"error_type": error_type, "message": message}
        self.send(ERROR, content | {"seconds": seconds_of_decoder()})

    def send(self, kind: bytes, payload: dict[str, Any]) -> None:
        send_frame(self.connection, kind, json.dumps(payload).encode())
        self.last_sign_s = time.monotonic()

    def show_life(self) -> None:
        if time.monotonic() - self.last_sign_s > ALIVE_EVERY_S:
            self.send(ALIVE, {})


def seconds_of_decoder() -> dict[str, float]:
    """Return the time worked since the last call, as fields of ``StageSeconds``."""
    lap = stage_clocks.lap()
    return {"open_s": lap.open_s, "decode_s": lap.decode_s, "resample_s": lap.resample_s}


def serve(arguments: list[str], decode_function: DecodeFunction = decode) -> None:
    """Do the parent's jobs until it goes away; never returns.

    ``arguments`` are the file descriptors of the socket and of the shared memory, and
    ``DecodeSettings`` as JSON. Tests pass a ``decode_function`` that crashes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # hostile files would fill the disk with cores
    with contextlib.suppress(OSError):  # if memory runs out, Linux kills a decoder, and not the run
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    socket_fd, memory_fd = map(int, arguments[:2])
    settings = DecodeSettings(**json.loads(arguments[2]))
    memory = mmap.mmap(memory_fd, NUM_SLOTS * settings.piece_samples * 4)
    os.close(memory_fd)
    slots = np.frombuffer(memory, np.float32).reshape(NUM_SLOTS, settings.piece_samples)
    connection = socket.socket(fileno=socket_fd)
    child = _Child(connection, settings, slots)
    threading.Thread(target=child.read_frames, daemon=True).start()
    send_frame(child.connection, READY)
    while True:
        child.run_job(decode_function)


if __name__ == "__main__":
    serve(sys.argv[1:])
