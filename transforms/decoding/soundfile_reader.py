"""Reading WAV, FLAC, Ogg Vorbis, MP3, AIFF, AU, CAF and more with libsndfile."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import soundfile

from transforms.decoding.formats.chunks import UNKNOWN_SIZE_FROM
from transforms.decoding.formats.routes import Route
from transforms.decoding.reader import PACKET_SLACK_S, ROUNDING_S, Block, block_frames, check_rate
from transforms.errors import DecodeError
from transforms.records import FloatArray, Note

# libsndfile seeks in a lossy stream are exact once the decoder has warmed up, except into the last
# Ogg page, where it loses its place. A page holds at most 255 packets, of 1024 samples mostly.
PREROLL_FRAMES = 1 << 19
EXACT_SEEK_SUBTYPES = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")


class _SequentialFile(soundfile.SoundFile):  # type: ignore[misc]
    """A file without seeks: SoundFile seeks after every read, slow and in Vorbis inexact."""

    def seekable(self) -> bool:
        return False


class SoundFileReader:
    """A ``Reader`` on libsndfile."""

    library = "libsndfile"

    def __init__(self, route: Route) -> None:
        self._bytes = route.encoded.open()
        self._options = {} if route.pcm is None else {"format": "RAW", **vars(route.pcm)}
        try:
            self._file = _SequentialFile(self._bytes, **self._options)
        except soundfile.LibsndfileError as error:
            self._bytes.close()
            raise DecodeError(f"libsndfile: {error.error_string}", error_type="NotAudio") from error
        self.rate = int(self._file.samplerate)
        self.notes: list[Note] = []
        self.stopped: str | None = None
        try:
            # libsndfile turns any rate below 1 in an AIFF's 80-bit field into 1.
            check_rate(0 if self._file.format == "AIFF" and self.rate == 1 else self.rate)
        except DecodeError:
            self.close()
            raise
        self._position = 0
        # A WAV of MPEG audio counts whole frames, and the decoder's delay.
        is_mpeg = self._file.subtype.startswith("MPEG")
        self.promise_slack_s = PACKET_SLACK_S if is_mpeg else ROUNDING_S
        self.promised_s = route.promised_s or self._read_promise()

    def _read_promise(self) -> float | None:
        """Return the header's length, from the log: libsndfile trusts the file's size instead."""
        frames = int(self._file.frames)
        log = self._file.extra_info
        match = re.search(r"(?:COMM'|ds64') chunk (?:of )?\(?(-?\d+)", log)
        if match:
            return int(match[1]) % (1 << 32) / self.rate  # printed with 32 bits and a sign
        match = re.search(
            r"^\s*(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", log, re.MULTILINE
        )
        if match and UNKNOWN_SIZE_FROM > int(match[1]) > int(match[2]) > 0:
            return frames * int(match[1]) / int(match[2]) / self.rate
        return frames / self.rate if frames < 1 << 62 else None

    def seek(self, start_s: float) -> int:
        """Move to ``start_s``; in a lossy file to an earlier frame, to warm up the decoder."""
        frame = round(start_s * self.rate)
        lossless = self._file.format == "FLAC" or self._file.subtype.startswith(EXACT_SEEK_SUBTYPES)
        target = frame if lossless else frame - PREROLL_FRAMES
        if target <= 0:
            return 0
        try:
            # At least one frame remains to be read: it shows where the file ends.
            self._position = int(self._file.seek(min(target, int(self._file.frames) - 1)))
        except soundfile.LibsndfileError:
            self._file.close()
            self._bytes.seek(0)
            self._file = _SequentialFile(self._bytes, **self._options)
        return self._position

    def blocks(self, on_progress: Callable[[], None]) -> Iterator[Block]:
        """Yield the samples up to the end, or to where libsndfile gives up."""
        channels = int(self._file.channels)
        size = block_frames(self.rate, channels)
        remaining = int(self._file.frames) - self._position
        while remaining > 0:
            block = np.empty((min(size, remaining), channels), np.float32)
            block[:, 0] = np.nan  # marks what has not been written if reading stops with an error
            try:
                num_read = len(self._file.read(out=block))
            except soundfile.LibsndfileError as error:
                self.stopped = self._error_text(error)
                num_read = _count_written(block)
            remaining -= num_read
            on_progress()
            if num_read:
                yield Block(self.rate, block[:num_read])
            if num_read < len(block) or self.stopped:
                return

    def _error_text(self, error: soundfile.LibsndfileError) -> str:
        logged = re.findall(r"^ERROR\s*:\s*(.+)$", self._file.extra_info, re.MULTILINE)
        return error.error_string or (logged[-1] if logged else f"error {error.code}")

    def close(self) -> None:
        """Release the file."""
        self._file.close()
        self._bytes.close()


def _count_written(block: FloatArray) -> int:
    written = np.flatnonzero(~np.isnan(block[:, 0]))
    return int(written[-1]) + 1 if len(written) else 0
