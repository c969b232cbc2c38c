"""The choice of a library for each part of a file, and FFmpeg after a libsndfile that gives up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from transforms.decoding.ffmpeg_reader import FfmpegReader
from transforms.decoding.formats.encoded import Encoded
from transforms.decoding.formats.not_audio import describe_not_audio
from transforms.decoding.formats.routes import Route, find_behind_junk, find_routes
from transforms.decoding.reader import Block, Reader
from transforms.decoding.soundfile_reader import SoundFileReader
from transforms.errors import DecodeError
from transforms.records import Note


class ReaderChain:
    """The parts of a file, one after the other; nearly every file has one."""

    def __init__(self, encoded: Encoded, start_s: float, on_progress: Callable[[], None]) -> None:
        self._on_progress = on_progress
        self._notes: list[Note] = []
        self._parts: list[_Part] = []
        self._promised_s: list[float | None] = []
        self._routes = find_routes(encoded, on_progress)
        try:
            self._open_part()
        except DecodeError as error:
            self._routes = self._find_routes_elsewhere(encoded, error)
            self._open_part()
        self.first_frame = 0 if self._routes else self._parts[0].reader.seek(start_s)

    def _find_routes_elsewhere(self, encoded: Encoded, error: DecodeError) -> list[Route]:
        """Look for audio behind junk, or raise an error that says what the file is."""
        rest = find_behind_junk(encoded)
        if rest is not None:
            words = f"{rest.start} bytes in front of the audio skipped"
            self._notes.append(Note("extra_bytes", words))
            return find_routes(rest, self._on_progress)
        what = describe_not_audio(encoded) if error.error_type == "NotAudio" else None
        if what is None:
            raise error
        raise DecodeError(f"not audio: this is {what}", error_type="NotAudio") from error

    def _open_part(self) -> None:
        route = self._routes.pop(0)
        part = _Part(route)
        if self._parts:
            self._parts[-1].reader.close()
        self._parts.append(part)

    @property
    def promised_s(self) -> float | None:
        """Length that the file promises in seconds; None if it does not, or is not open yet."""
        lengths = [part.promised_s for part in self._parts]
        if self._routes or None in lengths:
            return None
        return sum(length for length in lengths if length is not None)

    @property
    def slack_s(self) -> float:
        """How far off the promise may be in an undamaged file, in seconds."""
        return sum(part.reader.promise_slack_s for part in self._parts)

    def blocks(self) -> Iterator[Block]:
        """Yield the samples from ``first_frame`` on."""
        yield from self._parts[0].blocks(self.first_frame, self._on_progress)
        while self._routes:
            try:
                self._open_part()
            except DecodeError as error:
                self._notes.append(Note("damaged", f"what follows cannot be decoded: {error}"))
                continue
            yield from self._parts[-1].blocks(0, self._on_progress)

    def notes(self) -> list[Note]:
        """Return what the libraries reported, for the clip's warning."""
        notes = [note for part in self._parts for note in part.notes()]
        return list(dict.fromkeys([*self._notes, *notes]))

    def close(self) -> None:
        """Release the file."""
        self._parts[-1].reader.close()


class _Part:
    """The library that opened a part, and FFmpeg after it where libsndfile gives up midway."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._notes: list[Note] = []
        self._stopped: str | None = None  # set once the samples have been read up to there
        self.reader = self._open_first()
        self.promised_s = self.reader.promised_s

    def _open_first(self) -> Reader:
        if self._route.pcm is not None:
            return SoundFileReader(self._route)
        openers: list[Callable[[Route], Reader]] = [SoundFileReader, FfmpegReader]
        if not self._route.soundfile_first:
            openers.reverse()
        errors: list[DecodeError] = []
        for opener in openers:
            try:
                return opener(self._route)
            except DecodeError as error:
                errors.append(error)
        raise _most_specific(errors)

    def blocks(self, position: int, on_progress: Callable[[], None]) -> Iterator[Block]:
        """Yield the samples from frame ``position`` on, where the reader stands."""
        rate, channels = 0, 0
        for block in self.reader.blocks(on_progress):
            rate, channels = block.rate, block.samples.shape[1]
            position += len(block.samples)
            yield block
        stopped = self._stopped = self.reader.stopped
        if stopped is None or not isinstance(self.reader, SoundFileReader) or self._route.pcm:
            return
        for block in self._continue_with_ffmpeg(stopped, position, rate, on_progress):
            if block.samples.shape[1] == channels or not channels:
                yield block
        self._stopped = self.reader.stopped

    def _continue_with_ffmpeg(
        self, stopped: str, position: int, rate: int, on_progress: Callable[[], None]
    ) -> Iterator[Block]:
        try:
            other = FfmpegReader(self._route)
        except DecodeError:
            return
        self.reader.close()
        self.reader, self._stopped = other, None
        at = f" at {position / rate:.1f} s" if rate else ""
        self._notes.append(Note("damaged", f"damaged{at} (libsndfile: {stopped})"))
        for block in other.blocks(on_progress):
            if rate and block.rate != rate:
                return
            skip = min(position, len(block.samples))
            position -= skip
            if skip < len(block.samples):
                yield Block(block.rate, block.samples[skip:])

    def notes(self) -> list[Note]:
        """Return what the libraries reported."""
        notes = [*self._route.notes, *self._notes, *self.reader.notes]
        if self._stopped is not None:
            notes.append(Note("damaged", f"{self.reader.library}: {self._stopped}"))
        return notes


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
