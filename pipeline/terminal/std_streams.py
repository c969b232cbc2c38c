"""The standard streams: how to print on them, and what happens if one is unusable.

``answer`` prints what was asked for to standard output, ``say`` everything else to standard error;
names in it cannot command the terminal. Within ``usable_streams`` no file gets the number of a
closed stream. A log that cannot be written (a full disk) loses its lines and never ends the run. An
answer that cannot be written is an error that names standard output.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO, cast

from transforms.errors import AnswerError


def say(text: str, *, quiet: bool = False) -> None:
    """Print a line on standard error, unless the run is quiet."""
    if not quiet:
        from transforms.sources.clip_ids import for_terminal  # imports numpy

        print(for_terminal(text), file=sys.stderr)


def answer_bytes(data: bytes) -> None:
    """Write to standard output for other programs; a terminal gets it as ``answer`` prints."""
    if sys.stdout.isatty():
        from transforms.sources.clip_ids import for_terminal

        sys.stdout.write(for_terminal(data.decode(errors="replace"), keep_lines=True))
        return
    try:
        sys.stdout.flush()  # what was printed before comes first
        sys.stdout.buffer.write(data)
    except OSError as error:
        _raise_unwritable(error)


def answer(text: str, *, kind: str = "") -> None:
    """Print a line on standard output, after ``kind``, which is red where there are colours."""
    from rich.console import Console

    from transforms.sources.clip_ids import for_terminal

    console = Console(highlight=False, soft_wrap=True, emoji=False)
    if kind:
        console.print(f"{kind} ", style="bold red", end="", markup=False)
    console.print(for_terminal(text), markup=False)


def open_closed_streams() -> None:
    """Put /dev/null where a standard stream is closed.

    Otherwise the next file that is opened gets its number, and what is printed goes into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # open() takes the lowest free number: this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Python has None for a stream that was closed when it started.
    sys.stdin = sys.stdin or os.fdopen(0, "r", encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Make the standard streams usable, as the module says; restore them afterwards."""
    open_closed_streams()
    before = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, _Answers(sys.stdout))
    sys.stderr = cast(TextIO, _Stream(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _drop_the_rest(stream)


def _drop_the_rest(stream: TextIO) -> None:
    """Flush, or send the stream nowhere: what is buffered must not raise when Python exits."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class _Stream:
    """A stream whose errors are handled by ``_handle``; by default they are dropped.

    A log that nobody can read any more is no reason for a run to end.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or handle the error."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._handle(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or handle the error."""
        try:
            self._stream.flush()
        except OSError as error:
            self._handle(error)

    def _handle(self, error: OSError) -> None:
        pass


class _Answers(_Stream):
    """Standard output, whose errors are raised."""

    def _handle(self, error: OSError) -> None:
        _raise_unwritable(error)


def _raise_unwritable(error: OSError) -> NoReturn:
    if isinstance(error, BrokenPipeError):
        raise error  # the reader has had enough
    raise AnswerError(
        f"standard output cannot be written: {error.strerror or error}. Fix that, or redirect it."
    ) from error
