"""The choice of a library for a file, and FFmpeg as the successor of a libsndfile that gives up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from transforms.decoding.encoded import Encoded
from transforms.decoding.ffmpeg_reader import FfmpegReader
from transforms.decoding.reader import Block, Reader
from transforms.decoding.routes import Route, find_route
from transforms.decoding.soundfile_reader import SoundFileReader
from transforms.errors import DecodeError


class ReaderChain:
    """The library that opened the file, and FFmpeg after it where libsndfile gives up midway."""

    def __init__(self, encoded: Encoded, start_s: float, on_progress: Callable[[], None]) -> None:
        self._encoded = encoded
        self._on_progress = on_progress
        self._route = find_route(encoded.view, on_progress)
        self._notes: list[str] = []
        self._stopped: str | None = None  # set once the samples have been read up to there
        self._current = self._open_first()
        self.first_frame = self._current.seek(start_s)

    @property
    def promised_s(self) -> float | None:
        """Length that the file promises in seconds, or None."""
        return self._current.promised_s

    @property
    def slack_s(self) -> float:
        """How far off the promise may be in an undamaged file, in seconds."""
        return self._current.promise_slack_s

    def _open_first(self) -> Reader:
        openers: list[Callable[[Encoded, Route], Reader]] = [SoundFileReader, FfmpegReader]
        if not self._route.soundfile_first:
            openers.reverse()
        errors: list[DecodeError] = []
        for opener in openers:
            try:
                return opener(self._encoded, self._route)
            except DecodeError as error:
                errors.append(error)
        raise _most_specific(errors)

    def blocks(self) -> Iterator[Block]:
        """Yield the samples from ``first_frame`` on."""
        position, rate, channels = self.first_frame, 0, 0
        for block in self._current.blocks(self._on_progress):
            rate, channels = block.rate, block.samples.shape[1]
            position += len(block.samples)
            yield block
        stopped = self._stopped = self._current.stopped
        if stopped is None or not isinstance(self._current, SoundFileReader):
            return
        for block in self._continue_with_ffmpeg(stopped, position, rate):
            if block.samples.shape[1] == channels or not channels:
                yield block
        self._stopped = self._current.stopped

    def _continue_with_ffmpeg(self, stopped: str, position: int, rate: int) -> Iterator[Block]:
        try:
            other = FfmpegReader(self._encoded, self._route)
        except DecodeError:
            return
        other.promised_s = self._current.promised_s
        self._current.close()
        self._current, self._stopped = other, None
        at = f" at {position / rate:.1f} s" if rate else ""
        self._notes.append(f"damaged{at} (libsndfile: {stopped})")
        for block in other.blocks(self._on_progress):
            if rate and block.rate != rate:
                return
            skip = min(position, len(block.samples))
            position -= skip
            if skip < len(block.samples):
                yield Block(block.rate, block.samples[skip:])

    def notes(self) -> list[str]:
        """Return what the libraries reported, for the clip's warning."""
        stopped = [] if self._stopped is None else [f"{self._current.library}: {self._stopped}"]
        return [*self._route.notes, *self._notes, *self._current.notes, *stopped]

    def close(self) -> None:
        """Release the file."""
        self._current.close()


_GENERIC = re.compile(
    "format not recognised|invalid data found|unspecified|does not exist|struct incomplete",
    re.IGNORECASE,
)


def _most_specific(errors: list[DecodeError]) -> DecodeError:
    """Return the specific one of the libraries' errors, or both in one if neither is."""
    specific = [error for error in errors if not _GENERIC.search(str(error))]
    if specific:
        return specific[0]
    messages = "; ".join(str(error) for error in errors)
    return DecodeError(f"not audio that can be decoded ({messages})", error_type="NotAudio")
