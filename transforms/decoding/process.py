"""A decoder process as its parent sees it: started with limits, given jobs, replaced when lost.

Whatever a hostile file does to a library, it does to that process: it may die, hang, or ask for
more memory than it is allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transforms.decoding import child as protocol
from transforms.decoding.decode import BOUND_ERRORS, DecodedPiece
from transforms.decoding.settings import DecodeSettings
from transforms.errors import DecodeError, EarmarkError, item_too_large
from transforms.process.limits import RAISE_LIMIT
from transforms.process.stage_times import StageSeconds, stage_clocks
from transforms.records import ClipFacts, EncodedClip, FloatArray

logger = logging.getLogger(__name__)

# Starts a decoder; its arguments are appended.
WORKER_COMMAND = (sys.executable, "-P", "-m", "transforms.decoding.child")
START_TIMEOUT_S = 120.0  # importing the libraries on a busy machine with a cold disk
MAX_ANSWER_BYTES = 1 << 20  # facts, a length or the message of an error
MAX_FAILED_STARTS = 3


class DecoderLostError(DecodeError):
    """The loss of a decoder: ``error_type`` is ``DecoderCrashed`` or ``DecoderHung``."""


def start_decoder(
    settings: DecodeSettings, command: Sequence[str] = WORKER_COMMAND
) -> DecoderProcess:
    """Start a process and wait until it is ready; after retries, raise ``EarmarkError``."""
    for attempt in range(1, MAX_FAILED_STARTS + 1):
        try:
            return _start_once(settings, command)
        except (DecoderLostError, OSError) as error:
            problem = error
            logger.warning("decoder process: start %d of %d: %s", attempt, MAX_FAILED_STARTS, error)
    advice = f"run {' '.join(command)!r} in a shell for its error message"
    if isinstance(problem, OSError):
        advice = RAISE_LIMIT
    raise EarmarkError(f"no decoder process could be started: {problem}; {advice}")


def _start_once(settings: DecodeSettings, command: Sequence[str]) -> DecoderProcess:
    """Raise ``DecoderLostError`` if it dies before it is ready, ``OSError`` if it cannot start."""
    with contextlib.ExitStack() as undo:
        stderr = _nameless_file()
        undo.callback(os.close, stderr)
        # Appending, so that truncating it between clips moves the child's position too.
        fcntl.fcntl(stderr, fcntl.F_SETFL, os.O_APPEND)
        ours, theirs = socket.socketpair()
        undo.enter_context(ours)
        undo.enter_context(theirs)
        memory_fd = _nameless_file()
        try:
            os.ftruncate(memory_fd, protocol.NUM_SLOTS * settings.piece_samples * 4)
            memory = mmap.mmap(memory_fd, 0)
            undo.callback(memory.close)
            fds = (theirs.fileno(), memory_fd)
            process = subprocess.Popen(
                [*command, *map(str, fds), json.dumps(dataclasses.asdict(settings))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=fds,
                env=_child_environment(),
                start_new_session=True,  # Ctrl-C in the terminal does not reach it
            )
        finally:
            os.close(memory_fd)
            theirs.close()
        undo.pop_all()
    child = DecoderProcess(process, ours, memory, stderr, settings)
    try:
        child.wait_until_ready()
    except BaseException:
        child.close()
        raise
    return child


def _nameless_file() -> int:
    """Return a file that needs no cleaning up, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("earmark-decode")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _child_environment() -> dict[str, str]:
    """Give each library one thread, and put this package on the child's path."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


class DecoderProcess:
    """The parent's side of a decoder process; made by ``start_decoder``.

    ``num_channels`` is how many the clip that was decoded last has, as far as it was decoded.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        connection: socket.socket,
        memory: mmap.mmap,
        stderr: int,
        settings: DecodeSettings,
    ) -> None:
        self.num_channels = 0
        self._process = process
        self._settings = settings
        self._base_bytes = 0
        self._connection = connection
        self._stream = connection.makefile("rb")
        self._memory = memory
        self._slots: FloatArray = np.frombuffer(memory, np.float32).reshape(protocol.NUM_SLOTS, -1)
        self._stderr = stderr
        self._num_received = 0
        self._slots_to_return = 0
        self._is_killed = False

    def is_usable(self) -> bool:
        """Return whether it is alive and has leaked at most half of its allowed memory."""
        if self._is_killed or self._process.poll() is not None:
            return False
        if not self._base_bytes:  # unknown on this system
            return True
        held_bytes = protocol.data_bytes(self._process.pid)  # 0 once the process is exiting
        return 0 < held_bytes <= self._base_bytes + self._settings.max_decoder_bytes / 2

    def wait_until_ready(self) -> None:
        """Wait for the first sign of life."""
        self._connection.settimeout(START_TIMEOUT_S)
        self._receive()
        self._connection.settimeout(self._settings.stall_timeout_s)
        self._base_bytes = protocol.data_bytes(self._process.pid)

    def decode(
        self, clip: EncodedClip, channel: int | None = None
    ) -> Iterator[tuple[FloatArray, ClipFacts | None]]:
        """Yield the samples of a clip piece by piece; the facts come with the last piece.

        If the process is lost midway, the clip ends there, with a warning in its facts. Raises
        ``DecodeError`` if nothing could be decoded, or a bound was exceeded.

        Args:
            channel: The channel to decode, from 1; None for what the settings say.
        """
        # Held back until the next arrives, so that the last is not empty.
        held: DecodedPiece | None = None
        num_samples = 0
        try:
            _check_size(clip, self._settings.max_item_bytes)
            self._send_job(clip, channel)
            while True:
                piece = self._receive_piece()
                if held is not None:
                    yield held.samples, None
                if piece.is_last:
                    yield piece.samples, piece.facts
                    return
                held = piece
                num_samples += len(piece.samples)
                self._return_slot()
        except DecodeError as error:
            if error.error_type == "DecoderOutOfMemory":
                self.kill()  # libraries leak here: the next clip gets a new process
            if held is None or error.error_type in BOUND_ERRORS:
                raise
            duration_s = num_samples / self._settings.sample_rate_hz
            warning = f"decoded {duration_s:.1f} s, then stopped: {error}"
            facts = dataclasses.replace(
                held.facts, duration_s=duration_s, warning=warning, warning_kinds=("damaged",)
            )
        yield held.samples, facts

    def _send_job(
        self, clip: EncodedClip, channel: int | None = None, *, reads_header: bool = False
    ) -> None:
        os.ftruncate(self._stderr, 0)
        job = {
            "path": None if clip.path is None else str(Path(clip.path).absolute()),
            "size": 0 if clip.data is None else len(clip.data),
            "start_s": clip.item.start_s,
            "end_s": clip.item.end_s,
            "channel": channel,
            "reads_header": reads_header,
            "returned_slots": self._slots_to_return,
        }
        self._slots_to_return = 0
        self._send(protocol.JOB, json.dumps(job).encode(), clip.data or b"")

    def _return_slot(self) -> None:
        """Return the slot of the last piece while its clip continues."""
        self._slots_to_return -= 1
        try:
            protocol.send_frame(self._connection, protocol.CREDIT)
        except TimeoutError as error:
            raise self._hung() from error
        except OSError:
            pass  # the child is dead, but pieces that it sent before may still be received

    def _receive_piece(self) -> DecodedPiece:
        """Receive the next piece, copied out of shared memory.

        Raises:
            DecodeError: The child reported an error of the clip; ``DecoderLostError`` if it died,
                showed no sign of life, or sent an invalid answer.
        """
        kind, content = self._receive_answer()
        slot = self._num_received % protocol.NUM_SLOTS
        self._num_received += 1
        self._slots_to_return += 1
        with self._checked_answer():
            self.num_channels = int(content["num_channels"])
            samples = self._slots[slot, : content["num_samples"]].copy()
            facts = content["facts"]
            facts["warning_kinds"] = tuple(facts["warning_kinds"])  # JSON has no tuples
            is_last = kind == protocol.LAST
            return DecodedPiece(samples, ClipFacts(**facts), is_last, self.num_channels)

    def read_length_s(self, clip: EncodedClip) -> float | None:
        """Return the seconds of audio that a clip's header promises; None if it promises nothing.

        Raises:
            DecodeError: The child cannot open the file.
            DecoderLostError: The child died, showed no sign of life, or sent an invalid answer.
        """
        self._send_job(clip, reads_header=True)
        _, content = self._receive_answer()
        with self._checked_answer():
            length_s = content["length_s"]
            if length_s is not None and not (
                isinstance(length_s, float) and 0.0 <= length_s < math.inf
            ):
                raise ValueError(f"a length of {length_s!r}")
            return length_s

    def _receive_answer(self) -> tuple[bytes, dict[str, Any]]:
        """Receive the next frame that is more than a sign of life; raise its error if it is one."""
        kind, payload = self._receive()
        while kind == protocol.ALIVE:
            kind, payload = self._receive()
        with self._checked_answer():
            content: dict[str, Any] = json.loads(payload)
            stage_clocks.add(StageSeconds(**content.get("seconds", {})))  # at the end of each clip
            if kind != protocol.ERROR:
                return kind, content
            error = DecodeError(str(content["message"]), error_type=str(content["error_type"]))
        raise error

    @contextlib.contextmanager
    def _checked_answer(self) -> Iterator[None]:
        """Kill the child and raise ``DecoderLostError`` if its answer is invalid.

        A library may have damaged its memory.
        """
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self.kill()
            raise DecoderLostError(
                f"the decoder sent an invalid answer ({type(error).__name__}: {error}) and was "
                "killed",
                error_type="DecoderCrashed",
            ) from error

    def _send(self, kind: bytes, payload: bytes = b"", data: bytes = b"") -> None:
        try:
            protocol.send_frame(self._connection, kind, payload)
            if data:
                self._connection.sendall(data)
        except TimeoutError as error:
            raise self._hung() from error
        except OSError as error:
            raise self._lost() from error

    def _receive(self) -> tuple[bytes, bytes]:
        try:
            header = self._stream.read(protocol.FRAME_HEADER.size)
            if len(header) == protocol.FRAME_HEADER.size:
                kind, length = protocol.FRAME_HEADER.unpack(header)
                with self._checked_answer():
                    if length > MAX_ANSWER_BYTES:
                        raise ValueError(f"an answer of {length} bytes")
                payload = self._stream.read(length)
                if len(payload) == length:
                    return kind, payload
        except TimeoutError as error:
            raise self._hung() from error
        except OSError as error:
            raise self._lost() from error
        raise self._lost()

    def _hung(self) -> DecoderLostError:
        timeout_s = self._connection.gettimeout()
        self.kill()
        return DecoderLostError(
            f"the decoder gave no sign of life for {timeout_s:g} s and was killed",
            error_type="DecoderHung",
        )

    def _lost(self) -> DecoderLostError:
        try:
            code = self._process.wait(timeout=1.0)  # it closed the connection, so it is exiting
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        message = f"the decoder {how}{self._last_stderr_line()}"
        return DecoderLostError(message, error_type="DecoderCrashed")

    def _last_stderr_line(self) -> str:
        size = os.fstat(self._stderr).st_size
        tail = os.pread(self._stderr, 4096, max(size - 4096, 0)).decode(errors="replace")
        lines = [line.strip() for line in tail.splitlines() if line.strip()]
        return f" ({lines[-1][:500]})" if lines else ""

    def kill(self) -> None:
        """Kill the process; a pending read fails."""
        self._is_killed = True
        self._process.kill()

    def close(self) -> None:
        """Kill the process and free its resources."""
        self.kill()
        self._process.wait()
        self._stream.close()
        self._connection.close()
        del self._slots
        self._memory.close()
        os.close(self._stderr)


def _check_size(clip: EncodedClip, max_item_bytes: int) -> None:
    if clip.data is not None:
        num_bytes = len(clip.data)
    else:
        try:
            num_bytes = Path(str(clip.path)).stat().st_size
        except OSError:  # the child reports what is wrong with the file
            return
    if num_bytes > max_item_bytes:
        message = item_too_large(max_item_bytes, num_bytes)
        raise DecodeError(message, error_type="ItemTooLarge")


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"{name} (out of memory?)" if number == signal.SIGKILL else name
