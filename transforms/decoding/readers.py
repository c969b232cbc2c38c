"""Reading audio: libsndfile and FFmpeg behind one face, which gives blocks of samples.

    encoded bytes ────routes────▶ libsndfile ─▶ blocks of float32, all channels, the file's rate
                           │          │ gives up midway
                           └─────▶ FFmpeg

libsndfile is faster where it reads a format right; FFmpeg takes the rest, and goes on where
libsndfile gives up in the middle. FFmpeg is imported only once a file needs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import mmap
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import soundfile

from transforms.decoding.routes import UNKNOWN_SIZE_FROM, Route, find_route
from transforms.errors import DecodeError
from transforms.records import FloatArray

BLOCK_S = 1.0
MAX_BLOCK_VALUES = 1 << 20  # samples times channels: bounds memory whatever a header claims
MAX_IN_MEMORY_BYTES = 64 << 20  # larger files are read where they lie
HASH_CHUNK_BYTES = 8 << 20
# libsndfile seeks in a lossy stream are exact once the decoder has warmed up, except into the last
# Ogg page, where it loses its place. A page holds at most 255 packets, of 1024 samples mostly.
PREROLL_FRAMES = 1 << 19
EXACT_SEEK_SUBTYPES = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
ROUNDING_S = 0.01  # manifests round their times; an end this little beyond the file is no news
FFMPEG_DURATION_SLACK_S = 0.1  # container durations are rounded to packets
# FFmpeg guesses the length of these from the bit rate; a guess is no promise.
GUESSED_DURATION_FORMATS = frozenset(
    {"aac", "ac3", "amr", "amrnb", "amrwb", "dts", "eac3", "latm", "loas", "mp3", "mpeg", "mpegts"}
)


class Block(NamedTuple):
    """Samples as they come from a library: shape (num_samples, num_channels), float32."""

    rate: int
    samples: FloatArray


class Reader(Protocol):
    """What ``decode`` asks of a library.

    Attributes:
        library: Its name, for messages.
        promised_s: The length that the file's header promises, in seconds, or None.
        notes: What the user should know of a file that was read all the same.
        stopped: The library's words if it gave up before the end, else None.
    """

    library: str
    promised_s: float | None
    notes: list[str]
    stopped: str | None

    def seek(self, start_s: float) -> int:
        """Go near ``start_s``, never past it; returns the frame that the next block starts at."""
        ...

    def blocks(self, on_progress: Callable[[], None]) -> Iterator[Block]:
        """The samples from there to the end; never raises for a damaged file."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


# The encoded bytes


@dataclass(frozen=True)
class Encoded:
    """A file's bytes, in memory or mapped.

    Attributes:
        view: The bytes.
        path: The local file that they come from, if they do.
        identity: What tells a mapped file from others: device, inode, size, time of change.
    """

    view: bytes | mmap.mmap
    path: str | None = None
    identity: tuple[int, int, int, int] | None = None

    def open(self) -> BinaryIO:
        """A fresh file object over them."""
        if isinstance(self.view, bytes):
            return io.BytesIO(self.view)
        return open(str(self.path), "rb")


@contextlib.contextmanager
def open_encoded(source: bytes | str | Path) -> Iterator[Encoded]:
    """The bytes of a file, for as long as the context lasts.

    Raises:
        DecodeError: There are none, or they cannot be read.
    """
    if isinstance(source, bytes):
        if not source:
            raise DecodeError("the file is empty (0 bytes)", error_type="EmptyFile")
        yield Encoded(source)
        return
    try:
        view, identity = _read_or_map(source)
    except OSError as error:
        raise DecodeError(
            f"cannot read the local file: {error.strerror}", error_type=type(error).__name__
        ) from error
    if not len(view):
        raise DecodeError("the file is empty (0 bytes)", error_type="EmptyFile")
    try:
        yield Encoded(view, str(source), identity)
    finally:
        if not isinstance(view, bytes):
            view.close()


def _read_or_map(
    path: str | Path,
) -> tuple[bytes | mmap.mmap, tuple[int, int, int, int] | None]:
    """The bytes, and the identity of a file that is mapped."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size <= MAX_IN_MEMORY_BYTES:
            return file.read(), None
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), identity


# Of the large file that was hashed last: thousands of segments of one come in a row.
_last_hash: tuple[tuple[int, int, int, int], str] | None = None


def hash_encoded(encoded: Encoded, on_progress: Callable[[], None]) -> str:
    """The SHA-256 of the bytes, in hex; of a large file once for clips of it in a row."""
    global _last_hash
    if encoded.identity is None:
        return _hash_bytes(encoded, on_progress)
    if _last_hash is None or _last_hash[0] != encoded.identity:
        _last_hash = (encoded.identity, _hash_bytes(encoded, on_progress))
    return _last_hash[1]


def _hash_bytes(encoded: Encoded, on_progress: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with memoryview(encoded.view) as view:
        for start in range(0, len(view), HASH_CHUNK_BYTES):
            digest.update(view[start : start + HASH_CHUNK_BYTES])
            on_progress()
    return digest.hexdigest()


# Which library reads it


class ReaderChain:
    """The library that opened the file, and FFmpeg behind it where libsndfile gives up midway."""

    def __init__(self, encoded: Encoded, start_s: float, on_progress: Callable[[], None]) -> None:
        self._encoded = encoded
        self._on_progress = on_progress
        self._route = find_route(encoded.view, on_progress)
        self._notes: list[str] = []
        self._stopped: str | None = None  # once somebody has read as far as that
        self._current = self._open_first()
        self.first_frame = self._current.seek(start_s)

    @property
    def promised_s(self) -> float | None:
        """Length that the file promises in seconds, or None."""
        return self._current.promised_s

    @property
    def slack_s(self) -> float:
        """How far the promise may be off in a whole file, in seconds."""
        return ROUNDING_S if self._current.library == "libsndfile" else FFMPEG_DURATION_SLACK_S

    def _open_first(self) -> Reader:
        openers: list[Callable[[Encoded, Route], Reader]] = [_SoundFileReader, _FfmpegReader]
        if not self._route.soundfile_first:
            openers.reverse()
        errors: list[DecodeError] = []
        for opener in openers:
            try:
                return opener(self._encoded, self._route)
            except DecodeError as error:
                errors.append(error)
        raise _most_telling(errors)

    def blocks(self) -> Iterator[Block]:
        """The samples, from ``first_frame`` on."""
        position, rate, channels = self.first_frame, 0, 0
        for block in self._current.blocks(self._on_progress):
            rate, channels = block.rate, block.samples.shape[1]
            position += len(block.samples)
            yield block
        stopped = self._stopped = self._current.stopped
        if stopped is None or not isinstance(self._current, _SoundFileReader):
            return
        for block in self._go_on_with_ffmpeg(stopped, position, rate):
            if block.samples.shape[1] == channels or not channels:
                yield block
        self._stopped = self._current.stopped

    def _go_on_with_ffmpeg(self, stopped: str, position: int, rate: int) -> Iterator[Block]:
        try:
            other = _FfmpegReader(self._encoded, self._route)
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
        """What the libraries said, for the clip's warning."""
        words = [] if self._stopped is None else [f"{self._current.library}: {self._stopped}"]
        return [*self._route.notes, *self._notes, *self._current.notes, *words]

    def close(self) -> None:
        """Let go of the file."""
        self._current.close()


_GENERIC = re.compile(
    "format not recognised|invalid data found|unspecified|does not exist|struct incomplete",
    re.IGNORECASE,
)


def _most_telling(errors: list[DecodeError]) -> DecodeError:
    """One error out of what both libraries said: the specific one, or both if neither is."""
    specific = [error for error in errors if not _GENERIC.search(str(error))]
    if specific:
        return specific[0]
    words = "; ".join(str(error) for error in errors)
    return DecodeError(f"not audio that can be decoded ({words})", error_type="NotAudio")


# libsndfile


class _SequentialFile(soundfile.SoundFile):  # type: ignore[misc]
    """Reads straight on: SoundFile seeks after every read, slow and in Vorbis inexact."""

    def seekable(self) -> bool:
        return False


class _SoundFileReader:
    """WAV, FLAC, Ogg Vorbis, MP3, AIFF, AU, CAF and more, by libsndfile."""

    library = "libsndfile"

    def __init__(self, encoded: Encoded, route: Route) -> None:
        self._bytes = encoded.open()
        try:
            self._file = _SequentialFile(self._bytes)
        except soundfile.LibsndfileError as error:
            self._bytes.close()
            raise DecodeError(f"libsndfile: {error.error_string}", error_type="NotAudio") from error
        self.rate = int(self._file.samplerate)
        self.notes: list[str] = []
        self.stopped: str | None = None
        try:
            # From an AIFF's 80-bit number, libsndfile makes 1 of whatever is below.
            _check_rate(0 if self._file.format == "AIFF" and self.rate == 1 else self.rate)
        except DecodeError:
            self.close()
            raise
        self._position = 0
        self.promised_s = route.promised_s or self._read_promise()

    def _read_promise(self) -> float | None:
        """Seconds that the header promises. libsndfile trusts the file's size, but tells."""
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
        frame = round(start_s * self.rate)
        lossless = self._file.format == "FLAC" or self._file.subtype.startswith(EXACT_SEEK_SUBTYPES)
        target = frame if lossless else frame - PREROLL_FRAMES
        if target <= 0:
            return 0
        try:
            # At least one frame is left to read: it shows where the file ends.
            self._position = int(self._file.seek(min(target, int(self._file.frames) - 1)))
        except soundfile.LibsndfileError:
            self._file.close()
            self._bytes.seek(0)
            self._file = _SequentialFile(self._bytes)
        return self._position

    def blocks(self, on_progress: Callable[[], None]) -> Iterator[Block]:
        channels = int(self._file.channels)
        size = _block_frames(self.rate, channels)
        left = int(self._file.frames) - self._position
        while left > 0:
            block = np.empty((min(size, left), channels), np.float32)
            block[:, 0] = np.nan  # marks what has not been written if reading stops with an error
            try:
                num_read = len(self._file.read(out=block))
            except soundfile.LibsndfileError as error:
                self.stopped = self._words(error)
                num_read = _count_written(block)
            left -= num_read
            on_progress()
            if num_read:
                yield Block(self.rate, block[:num_read])
            if num_read < len(block) or self.stopped:
                return

    def _words(self, error: soundfile.LibsndfileError) -> str:
        logged = re.findall(r"^ERROR\s*:\s*(.+)$", self._file.extra_info, re.MULTILINE)
        return error.error_string or (logged[-1] if logged else f"error {error.code}")

    def close(self) -> None:
        self._file.close()
        self._bytes.close()


def _count_written(block: FloatArray) -> int:
    unwritten = np.isnan(block[:, 0])
    written = np.flatnonzero(~unwritten)
    return int(written[-1]) + 1 if len(written) else 0


def _block_frames(rate: int, channels: int) -> int:
    return max(1, min(round(rate * BLOCK_S), MAX_BLOCK_VALUES // channels))


def _check_rate(rate: int) -> None:
    if rate < 1:
        raise DecodeError(
            f"the sample rate is {rate} Hz; must be at least 1", error_type="BadSampleRate"
        )


# FFmpeg


def _import_av() -> Any:
    """PyAV, with FFmpeg's words kept for error messages and away from the terminal."""
    import av

    if av.logging.get_level() is None:
        av.logging.set_level(av.logging.ERROR)
        logger = logging.getLogger("libav")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    return av


def _ffmpeg_words(error: Exception) -> str:
    log = getattr(error, "log", None)
    own = getattr(error, "strerror", None) or str(error)
    return f"{log[2].strip()}" if log else own


class _FfmpegReader:
    """Everything else that FFmpeg reads, by PyAV: the first audio stream."""

    library = "FFmpeg"

    def __init__(self, encoded: Encoded, route: Route) -> None:
        self._av = _import_av()
        self._bytes = encoded.open()
        self.notes: list[str] = []
        self.stopped: str | None = None
        self._container: Any = None
        self._num_damaged = 0
        self._has_decoded = False
        self._num_errors_before = self._av.logging.get_last_error()[0]
        try:
            # A playlist inside the bytes must not make FFmpeg open other files or addresses.
            self._container = self._av.open(
                self._bytes, options={"protocol_whitelist": "none"}, metadata_errors="ignore"
            )
            self._stream = self._first_audio_stream()
            self.promised_s = route.promised_s or self._read_promise()
        except DecodeError:
            self.close()
            raise
        except MemoryError as error:
            self.close()
            raise MemoryError(f"FFmpeg: {_ffmpeg_words(error)}") from error
        except Exception as error:  # PyAV raises built-in errors too, for what FFmpeg reports
            self.close()
            raise DecodeError(f"FFmpeg: {_ffmpeg_words(error)}", error_type="NotAudio") from error

    def _first_audio_stream(self) -> Any:
        streams = self._container.streams
        if not streams.audio:
            found = ", ".join(sorted({str(stream.type) for stream in streams})) or "nothing"
            raise DecodeError(
                f"no audio stream in this {self._container.format.name} file, only: {found}",
                error_type="NoAudioStream",
            )
        if len(streams.audio) > 1:
            self.notes.append(f"{len(streams.audio)} audio streams; the first was used")
        stream = streams.audio[0]
        if stream.codec_context is None:
            raise DecodeError(
                f"FFmpeg has no decoder for the audio in this {self._container.format.name} file",
                error_type="NotAudio",
            )
        stream.codec_context.thread_count = 1  # one core per decoder process
        return stream

    def _read_promise(self) -> float | None:
        if not GUESSED_DURATION_FORMATS.isdisjoint(self._container.format.name.split(",")):
            return None
        if self._stream.duration is not None and self._stream.time_base is not None:
            return float(self._stream.duration * self._stream.time_base)
        if self._container.duration is not None and len(self._container.streams) == 1:
            return float(self._container.duration) / 1e6
        return None

    def seek(self, start_s: float) -> int:
        """Stays at the start: FFmpeg's decoders do not give the same samples after a seek."""
        return 0

    def blocks(self, on_progress: Callable[[], None]) -> Iterator[Block]:
        fifo: Any = None
        key, size = ("", "", 0), 0
        for frame in self._frames(on_progress):
            frame_key = (frame.format.name, frame.layout.name, frame.sample_rate)
            if frame_key != key:
                if fifo is not None:
                    yield from self._drain(fifo, key)
                _check_rate(frame.sample_rate)
                fifo, key = self._av.AudioFifo(), frame_key
                size = _block_frames(frame.sample_rate, frame.layout.nb_channels)
            frame.pts = None  # the queue would refuse gaps between timestamps
            fifo.write(frame)
            if fifo.samples >= size:
                yield from self._drain(fifo, key)
        if fifo is not None:
            yield from self._drain(fifo, key)
        if self._num_damaged:
            plural = "" if self._num_damaged == 1 else "s"
            self.notes.append(f"{self._num_damaged} damaged packet{plural} skipped")
        elif not self._has_decoded and self.stopped is None:
            self.notes.extend(self._last_words())

    def _last_words(self) -> list[str]:
        """What FFmpeg logged of this file: all there is where it skips damage without a word."""
        num_errors, log = self._av.logging.get_last_error()
        if log is None or num_errors == self._num_errors_before:
            return []
        return [f"FFmpeg: {log[2].strip()}"]

    def _drain(self, fifo: Any, key: Any) -> Iterator[Block]:
        frame = fifo.read(0)
        if frame is not None and frame.samples:
            self._has_decoded = True
            yield Block(key[2], _to_float(frame))

    def _frames(self, on_progress: Callable[[], None]) -> Iterator[Any]:
        packets = self._container.demux(self._stream)
        while True:
            on_progress()  # per packet: damaged ones give nothing that could be seen
            try:
                packet = next(packets, None)
            except self._av.error.FFmpegError as error:
                self.stopped = _ffmpeg_words(error)
                packet = None
            if packet is None:
                return
            try:
                frames = packet.decode()
            except self._av.error.EOFError:
                return
            except self._av.error.FFmpegError as error:
                self._num_damaged += 1
                if self._num_damaged == 1:
                    self.notes.append(f"FFmpeg: {_ffmpeg_words(error)}")
                continue
            yield from frames

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._bytes.close()


# FFmpeg's sample formats, and what makes full scale 1.0 of each.
_SAMPLE_FORMATS: dict[str, tuple[type[np.generic], float]] = {
    "u8": (np.uint8, 2.0**-7),
    "s16": (np.int16, 2.0**-15),
    "s32": (np.int32, 2.0**-31),
    "s64": (np.int64, 2.0**-63),
    "flt": (np.float32, 1.0),
    "dbl": (np.float64, 1.0),
}


def _to_float(frame: Any) -> FloatArray:
    """PyAV samples, planar or packed, as float32 of shape (num_samples, num_channels).

    Reads the planes itself: with eight or more planar channels, PyAV counts one plane too many,
    and its ``to_ndarray`` reads through a stray pointer.
    """
    dtype, scale = _SAMPLE_FORMATS[frame.format.name.removesuffix("p")]
    num_channels = frame.layout.nb_channels
    if frame.format.is_planar:
        planes = [np.frombuffer(frame.planes[index], dtype) for index in range(num_channels)]
        samples = np.stack([plane[: frame.samples] for plane in planes], axis=1)
    else:
        packed = np.frombuffer(frame.planes[0], dtype)
        samples = packed[: frame.samples * num_channels].reshape(-1, num_channels).copy()
    if dtype is np.uint8:
        samples = samples.astype(np.int16) - 128
    if samples.dtype == np.int16:
        product: FloatArray = np.multiply(samples, np.float32(scale), dtype=np.float32)
        return product
    with np.errstate(all="ignore"):  # doubles beyond float32 become infinite: found later
        return np.asarray(samples if scale == 1.0 else samples * scale, np.float32)
