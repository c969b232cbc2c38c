"""Decoding itself, and the child process that ``decode`` runs it in.

    encoded bytes ─▶ libsndfile or FFmpeg ─▶ blocks ─▶ segment ─▶ levels ─▶ mono ─▶ soxr ─▶ pieces

``decode`` turns any audio or video file into pieces of mono float32 at the model's rate, in
memory that does not grow with the file. ``serve`` runs it in a child process, one clip after
another: a decoder that crashes or hangs takes its child along, and nothing else. The child is
started with ``python -m transforms.decode_worker``, not with multiprocessing, so that it never
imports the user's main module. It imports neither torch nor Beam, and FFmpeg only once a clip
needs it.

What a reader may rely on:

* The content decides which library reads a file, never its name. libsndfile is faster where it
  reads a format right; FFmpeg takes the rest, and goes on where libsndfile gives up in the middle.
* Encoder delay and padding: as the library gives it. libsndfile and FFmpeg cut them where the
  file says how much (LAME and Opus headers, MP4 edit lists) and keep them where it does not.
  Timestamps are not used: gaps between packets are closed, and a late start counts as the start.
* A segment is exactly the source samples ``[round(start_s * rate), round(end_s * rate))`` of what
  decoding the whole file gives.
* The resampler is soxr's HQ; streamed or in one go gives the same samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from transforms.errors import DecodeError
from transforms.records import ClipFacts, FloatArray

MIN_CLIP_S = 0.025  # one fbank frame: less than this gives no features
CLIPPED_AT = 0.999
SILENT_MEAN_SQUARE = 1e-6  # −60 dBFS
LEVEL_FRAME_S = 0.02
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
UNKNOWN_SIZE_FROM = 0x7FFFF000  # streaming writers put "unknown" sizes this large into headers
# Errors that say that a bound was reached: the item fails, whatever has been decoded of it.
BOUND_ERRORS = frozenset({"ItemTooLarge", "ItemTooLong", "DecodingTooSlow", "DecoderOutOfMemory"})


@dataclass(frozen=True)
class DecodeLimits:
    """What one item may cost. More is an error that names the config's key; none by default.

    Attributes:
        max_item_s: Seconds of audio.
        max_decode_ratio: Seconds of computing per second of audio.
        min_decode_s: Seconds of computing that any item may take, however little audio it gives.
        max_decoder_bytes: Memory of the child process, beside what it holds when it starts and
            the encoded bytes that it is sent. Linux only.
    """

    max_item_s: float = math.inf
    max_decode_ratio: float = math.inf
    min_decode_s: float = math.inf
    max_decoder_bytes: float = math.inf


NO_LIMITS = DecodeLimits()


class DecodedPiece(NamedTuple):
    """A piece of a clip on its way out.

    Attributes:
        samples: Shape (num_samples,), mono float32 at the model's rate.
        facts: The clip's facts as far as decoded; complete where ``is_last``.
        is_last: Nothing follows.
    """

    samples: FloatArray
    facts: ClipFacts
    is_last: bool


class _Block(NamedTuple):
    """Samples as they come from a library: shape (num_samples, num_channels), float32."""

    rate: int
    samples: FloatArray


class _Reader(Protocol):
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

    def blocks(self, on_progress: Callable[[], None]) -> Iterator[_Block]:
        """The samples from there to the end; never raises for a damaged file."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


def _ignore_progress() -> None:
    """Nobody waits for signs of life."""


def decode(
    source: bytes | str | Path,
    *,
    sample_rate_hz: int = 16_000,
    piece_samples: int = 160_000,
    start_s: float | None = None,
    end_s: float | None = None,
    limits: DecodeLimits = NO_LIMITS,
    on_progress: Callable[[], None] = _ignore_progress,
) -> Iterator[DecodedPiece]:
    """Decode a file, or a segment of it, to mono at one rate, piece by piece.

    Args:
        source: The encoded bytes, or the path of a local file.
        sample_rate_hz: The rate to resample to.
        piece_samples: Samples per piece; the last has between 1 and this many.
        start_s: Start of the segment in seconds, or None for the file's start.
        end_s: End of the segment, exclusive, or None for the file's end.
        limits: What the item may cost.
        on_progress: Called whenever work has been done, for whoever watches for a hang.

    Yields:
        Pieces in order; at least one, and exactly one ``is_last``.

    Raises:
        DecodeError: Nothing can be labelled. ``error_type`` is ``EmptyFile``, ``NoAudioStream``,
            ``NotAudio``, ``BadSegment``, ``BadSampleRate``, ``NonFiniteSamples``, ``TooShort``, or
            the name of the operating system's error. Once a piece is out, trouble ends the clip
            with a warning in its facts instead; a bound does not (``ItemTooLong``,
            ``DecodingTooSlow``): it raises at any time.
    """
    _check_segment(start_s, end_s)
    with _open_encoded(source) as encoded:
        sha256 = _hash(encoded, on_progress)
        segment = _Segment(start_s or 0.0, end_s)
        budget = _Budget(limits, on_progress)
        chain = _ReaderChain(encoded, segment.start_s, budget.on_progress)
        try:
            yield from _decode_blocks(chain, segment, sha256, sample_rate_hz, piece_samples, budget)
        finally:
            chain.close()


def decode_whole(
    source: bytes | str | Path,
    *,
    sample_rate_hz: int = 16_000,
    start_s: float | None = None,
    end_s: float | None = None,
) -> tuple[FloatArray, ClipFacts]:
    """Decode a short clip in one go: samples of shape (num_samples,), and its facts.

    Raises:
        DecodeError: As ``decode``.
    """
    pieces = list(decode(source, sample_rate_hz=sample_rate_hz, start_s=start_s, end_s=end_s))
    return np.concatenate([piece.samples for piece in pieces]), pieces[-1].facts


def _decode_blocks(
    chain: _ReaderChain,
    segment: _Segment,
    sha256: str,
    sample_rate_hz: int,
    piece_samples: int,
    budget: _Budget,
) -> Iterator[DecodedPiece]:
    levels = _Levels()
    resampler = _Resampler(sample_rate_hz)
    pieces = _Pieces(piece_samples)
    notes: list[str] = []
    for block in segment.cut(budget.count(chain.blocks()), chain.first_frame):
        samples, energy, bad = _finite_part(block.samples)
        levels.add(block.rate, samples, energy)
        budget.check_duration(levels.duration_s)
        if bad:
            error = DecodeError(
                f"the sample at {segment.start_s + levels.duration_s:.3f} s is NaN or infinite",
                error_type="NonFiniteSamples",
            )
            if not pieces.num_out:
                raise error
            notes.append(f"decoded {levels.duration_s:.1f} s, then stopped: {error}")
        for samples_out in pieces.push(resampler.push(block.rate, mix_down(samples))):
            yield DecodedPiece(samples_out, levels.facts(sha256, None), False)
        if bad:
            break
    else:
        notes.extend(segment.shortfall(chain, levels.duration_s))
    yield from (
        DecodedPiece(samples_out, levels.facts(sha256, None), False)
        for samples_out in pieces.push(resampler.flush())
    )
    last = pieces.rest()
    notes.extend(levels.notes)
    notes.extend(chain.notes())
    if not pieces.num_out and len(last) < round(MIN_CLIP_S * sample_rate_hz):
        raise _too_short(levels.duration_s, segment, notes)
    yield DecodedPiece(last, levels.facts(sha256, "; ".join(notes) or None), True)


def _too_short(decoded_s: float, segment: _Segment, notes: list[str]) -> DecodeError:
    if decoded_s == 0.0 and segment.start_s > 0.0 and segment.frames_seen:
        return DecodeError(
            f"the segment starts at {segment.start_s:.3f} s, but the audio ends at "
            f"{segment.reached_s:.3f} s; check start_s and end_s of the manifest",
            error_type="BadSegment",
        )
    words = f" ({'; '.join(notes)})" if notes else ""
    return DecodeError(
        f"{decoded_s * 1000:.1f} ms of audio; "
        f"at least {MIN_CLIP_S * 1000:.0f} ms are needed{words}",
        error_type="TooShort",
    )


def _check_segment(start_s: float | None, end_s: float | None) -> None:
    start = 0.0 if start_s is None else start_s
    if not (math.isfinite(start) and start >= 0.0):
        raise DecodeError(
            f"start_s is {start_s}; must be a number of seconds ≥ 0", error_type="BadSegment"
        )
    if end_s is not None and not (math.isfinite(end_s) and end_s > start):
        raise DecodeError(
            f"end_s is {end_s}; must be greater than start_s ({start})", error_type="BadSegment"
        )


class _Budget:
    """Holds one item to its limits.

    Time is that of the processor, so that neither a busy machine nor a consumer who takes his
    time makes a file slow; who waits for nothing at all is ended by the parent.
    """

    def __init__(self, limits: DecodeLimits, on_progress: Callable[[], None]) -> None:
        self._limits = limits
        self._on_progress = on_progress
        self._began_s = time.process_time()
        self._audio_s = 0.0

    def count(self, blocks: Iterable[_Block]) -> Iterator[_Block]:
        """Note how much audio goes by, a segment's way to its start included."""
        for block in blocks:
            self._audio_s += len(block.samples) / block.rate
            yield block

    def on_progress(self) -> None:
        """Work has been done: pass it on, and look at the clock."""
        self._on_progress()
        used_s = time.process_time() - self._began_s
        allowed_s = max(self._limits.min_decode_s, self._limits.max_decode_ratio * self._audio_s)
        if used_s > allowed_s:
            raise DecodeError(
                f"decoding took {used_s:.1f} s for {self._audio_s:.1f} s of audio; at most "
                f"{self._limits.max_decode_ratio:g} s per second are allowed (and "
                f"{self._limits.min_decode_s:g} s for any item); to allow more, raise "
                "decode.max_decode_ratio",
                error_type="DecodingTooSlow",
            )

    def check_duration(self, duration_s: float) -> None:
        """Refuse an item that is longer than allowed, rather than cut it."""
        if duration_s > self._limits.max_item_s:
            raise DecodeError(
                f"the item goes on after {duration_s:.1f} s of audio; at most "
                f"{self._limits.max_item_s:g} s are allowed; to allow more, raise "
                "decode.max_item_s, or label it in segments",
                error_type="ItemTooLong",
            )


# The encoded bytes


@dataclass(frozen=True)
class _Encoded:
    """A file's bytes, in memory or mapped; ``open`` gives a fresh file object over them."""

    view: bytes | mmap.mmap
    path: str | None = None

    def open(self) -> BinaryIO:
        if isinstance(self.view, bytes):
            return io.BytesIO(self.view)
        return open(str(self.path), "rb")


@contextlib.contextmanager
def _open_encoded(source: bytes | str | Path) -> Iterator[_Encoded]:
    if isinstance(source, bytes):
        if not source:
            raise DecodeError("the file is empty (0 bytes)", error_type="EmptyFile")
        yield _Encoded(source)
        return
    try:
        view = _read_or_map(source)
    except OSError as error:
        raise DecodeError(
            f"cannot read the local file: {error.strerror}", error_type=type(error).__name__
        ) from error
    if not len(view):
        raise DecodeError("the file is empty (0 bytes)", error_type="EmptyFile")
    try:
        yield _Encoded(view, str(source))
    finally:
        if not isinstance(view, bytes):
            view.close()


def _read_or_map(path: str | Path) -> bytes | mmap.mmap:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size <= MAX_IN_MEMORY_BYTES:
            return file.read()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _hash(encoded: _Encoded, on_progress: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with memoryview(encoded.view) as view:
        for start in range(0, len(view), HASH_CHUNK_BYTES):
            digest.update(view[start : start + HASH_CHUNK_BYTES])
            on_progress()
    return digest.hexdigest()


# Which library reads it


@dataclass(frozen=True)
class _Route:
    """Which library to try first, and what the file's own structure says of it."""

    soundfile_first: bool
    promised_s: float | None = None
    notes: tuple[str, ...] = ()


_SOUNDFILE_MAGIC = (b"fLaC", b".snd", b"NIST_1A")


def _find_route(view: bytes | mmap.mmap, on_progress: Callable[[], None]) -> _Route:
    """Choose by content. Where libsndfile would silently cut a file, FFmpeg goes first."""
    head = view[:64]
    if head.startswith((b"RIFF", b"RIFX", b"RF64")):
        if head[8:12] == b"WAVE":
            return _Route(True)
        return _Route(False, notes=_cut_short(view, int.from_bytes(head[4:8], "little") + 8))
    if head.startswith(b"riff"):  # W64: libsndfile reads trailing bytes as audio
        return _Route(False, notes=_cut_short(view, int.from_bytes(head[16:24], "little")))
    if head.startswith(b"caff"):
        return _Route(True, notes=_cut_short(view, _caf_length(view)))
    if head.startswith(b"FORM"):
        return _Route(head[8:12] in (b"AIFF", b"AIFC"))
    if head.startswith(b"OggS"):
        return _find_ogg_route(view, on_progress)
    if head.startswith(_SOUNDFILE_MAGIC):
        return _Route(True)
    start = _id3_length(head)
    if view[start : start + 4] == b"fLaC":
        return _Route(True)
    return _find_mp3_route(view, start)


def _cut_short(view: bytes | mmap.mmap, declared_bytes: int) -> tuple[str, ...]:
    """A note if the header speaks of more bytes than there are."""
    if not len(view) < declared_bytes < UNKNOWN_SIZE_FROM:
        return ()
    return (f"the file is cut short: {len(view)} of {declared_bytes} bytes",)


def _caf_length(view: bytes | mmap.mmap) -> int:
    """Where a CAF's audio data ends by its own account; 0 if it does not say."""
    position = 8  # chunks follow the file header: type, 64-bit size, content
    while position + 12 <= len(view):
        kind = view[position : position + 4]
        size = int.from_bytes(view[position + 4 : position + 12], "big", signed=True)
        if size < 0:  # "to the end of the file"
            return 0
        position += 12 + size
        if kind == b"data":
            return position
    return 0


def _find_ogg_route(view: bytes | mmap.mmap, on_progress: Callable[[], None]) -> _Route:
    """libsndfile reads only the first link of a chained Ogg; FFmpeg reads them all."""
    position, flags, chained, begun = 0, 0, False, False
    while position >= 0:
        header = view[position : position + 6]
        if len(header) == 6 and header[4] == 0:
            flags = header[5]
            is_first_page = bool(flags & 2)
            chained = chained or (is_first_page and begun)
            begun = begun or not is_first_page
        position = view.find(b"OggS", position + 27)
        on_progress()
    notes = () if flags & 4 else ("the Ogg stream has no end: it may have been cut short",)
    first_packet = view[28:37]
    known = first_packet.startswith((b"\x01vorbis", b"\x7fFLAC"))
    return _Route(known and not chained, notes=notes)


def _id3_length(head: bytes) -> int:
    """Bytes that an ID3v2 tag takes at the start (ID3v2.4, section 3.1: 4 × 7 bits)."""
    if not head.startswith(b"ID3") or len(head) < 10:
        return 0
    size = 0
    for byte in head[6:10]:
        size = size << 7 | (byte & 0x7F)
    return 10 + size + (10 if head[5] & 0x10 else 0)


def _find_mp3_route(view: bytes | mmap.mmap, start: int) -> _Route:
    """libsndfile believes an MP3's Xing header, or guesses the length from the first frames.

    Concatenated files and those without the header would be cut short, so it reads only those
    whose header speaks of the whole file.
    """
    frame = view[start : start + 256]
    if len(frame) < 256 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2:  # sync, Layer III
        return _Route(False)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    rate_index = frame[2] >> 2 & 3
    if at < 0 or rate_index == 3:
        return _Route(False)
    version = frame[1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    rate = (44_100, 48_000, 32_000)[rate_index] >> {3: 0, 2: 1}.get(version, 2)
    flags, num_frames, num_bytes = struct.unpack_from(">III", frame, at + 4)
    if flags & 3 != 3:
        return _Route(False)
    length = len(view) - start
    slack = 4096 + length // 100  # trailing tags
    promised_s = num_frames * (1152 if version == 3 else 576) / rate
    is_whole = abs(length - num_bytes) <= slack
    return _Route(is_whole, promised_s if length < num_bytes and not is_whole else None)


class _ReaderChain:
    """The library that opened the file, and FFmpeg behind it where libsndfile gives up midway."""

    def __init__(self, encoded: _Encoded, start_s: float, on_progress: Callable[[], None]) -> None:
        self._encoded = encoded
        self._on_progress = on_progress
        self._route = _find_route(encoded.view, on_progress)
        self._notes: list[str] = []
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

    def _open_first(self) -> _Reader:
        openers: list[Callable[[_Encoded, _Route], _Reader]] = [_SoundFileReader, _FfmpegReader]
        if not self._route.soundfile_first:
            openers.reverse()
        errors: list[DecodeError] = []
        for opener in openers:
            try:
                return opener(self._encoded, self._route)
            except DecodeError as error:
                errors.append(error)
        raise _most_telling(errors)

    def blocks(self) -> Iterator[_Block]:
        """The samples, from ``first_frame`` on."""
        position, rate, channels = self.first_frame, 0, 0
        for block in self._current.blocks(self._on_progress):
            rate, channels = block.rate, block.samples.shape[1]
            position += len(block.samples)
            yield block
        stopped = self._current.stopped
        if stopped is None or not isinstance(self._current, _SoundFileReader):
            return
        for block in self._go_on_with_ffmpeg(stopped, position, rate):
            if block.samples.shape[1] == channels or not channels:
                yield block

    def _go_on_with_ffmpeg(self, stopped: str, position: int, rate: int) -> Iterator[_Block]:
        try:
            other = _FfmpegReader(self._encoded, self._route)
        except DecodeError:
            return
        other.promised_s = self._current.promised_s
        self._current.close()
        self._current = other
        at = f" at {position / rate:.1f} s" if rate else ""
        self._notes.append(f"damaged{at} (libsndfile: {stopped})")
        for block in other.blocks(self._on_progress):
            if rate and block.rate != rate:
                return
            skip = min(position, len(block.samples))
            position -= skip
            if skip < len(block.samples):
                yield _Block(block.rate, block.samples[skip:])

    def notes(self) -> list[str]:
        """What the libraries said, for the clip's warning."""
        stopped = self._current.stopped
        words = [] if stopped is None else [f"{self._current.library}: {stopped}"]
        return [*self._route.notes, *self._notes, *self._current.notes, *words]

    def close(self) -> None:
        self._current.close()


_GENERIC = re.compile("format not recognised|invalid data found|unspecified", re.IGNORECASE)


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

    def __init__(self, encoded: _Encoded, route: _Route) -> None:
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
            _check_rate(self.rate)
        except DecodeError:
            self.close()
            raise
        self._position = 0
        self.promised_s = route.promised_s or self._read_promise()

    def _read_promise(self) -> float | None:
        """Seconds that the header promises. libsndfile trusts the file's size, but tells."""
        frames = int(self._file.frames)
        log = self._file.extra_info
        match = re.search(r"(?:COMM'|ds64') chunk (?:of )?\(?(\d+)", log)
        if match:
            return int(match[1]) / self.rate
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

    def blocks(self, on_progress: Callable[[], None]) -> Iterator[_Block]:
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
                yield _Block(self.rate, block[:num_read])
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

    def __init__(self, encoded: _Encoded, route: _Route) -> None:
        self._av = _import_av()
        self._bytes = encoded.open()
        self.notes: list[str] = []
        self.stopped: str | None = None
        self._container: Any = None
        self._num_damaged = 0
        try:
            # A playlist inside the bytes must not make FFmpeg open other files or addresses.
            self._container = self._av.open(
                self._bytes, options={"protocol_whitelist": "none"}, metadata_errors="ignore"
            )
            self._stream = self._first_audio_stream()
            self.promised_s = route.promised_s or self._read_promise()
        except (DecodeError, MemoryError):
            self.close()
            raise
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

    def blocks(self, on_progress: Callable[[], None]) -> Iterator[_Block]:
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

    def _drain(self, fifo: Any, key: Any) -> Iterator[_Block]:
        frame = fifo.read(0)
        if frame is not None and frame.samples:
            yield _Block(key[2], _to_float(frame))

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


# From blocks to pieces


class _Segment:
    """Cuts ``[round(start_s * rate), round(end_s * rate))`` out of the blocks.

    Attributes:
        start_s: Start in seconds.
        reached_s: How far the file was read, in seconds from its start.
        frames_seen: Whether anything was read at all.
    """

    def __init__(self, start_s: float, end_s: float | None) -> None:
        self.start_s = start_s
        self.end_s = end_s
        self.reached_s = 0.0
        self.frames_seen = False

    def cut(self, blocks: Iterable[_Block], first_frame: int) -> Iterator[_Block]:
        run_start_s, rate, frame = 0.0, 0, first_frame
        for block in blocks:
            if rate and block.rate != rate:  # a stream may change its rate on the way
                run_start_s, frame = self.reached_s, 0
            rate = block.rate
            self.frames_seen = True
            start = max(round((self.start_s - run_start_s) * rate) - frame, 0)
            stop = len(block.samples)
            if self.end_s is not None:
                stop = min(round((self.end_s - run_start_s) * rate) - frame, stop)
            if start < stop:
                yield _Block(rate, block.samples[start:stop])
            frame += len(block.samples)
            self.reached_s = run_start_s + frame / rate
            if self.end_s is not None and frame >= round((self.end_s - run_start_s) * rate):
                return

    def shortfall(self, chain: _ReaderChain, decoded_s: float) -> list[str]:
        """A warning if there is less audio than the file promises or the segment asks for."""
        promised_s, slack_s = chain.promised_s, chain.slack_s
        wanted_end_s = promised_s if self.end_s is None else self.end_s
        if self.end_s is not None:
            slack_s = ROUNDING_S
        if wanted_end_s is None or decoded_s >= wanted_end_s - self.start_s - slack_s:
            return []
        note = f"decoded {_of(decoded_s, wanted_end_s - self.start_s)} s"
        if self.end_s is not None and (
            promised_s is None or promised_s <= self.reached_s + slack_s
        ):
            note += f" (the segment ends at {self.end_s:.3f} s, the file at {self.reached_s:.3f} s)"
        return [note]


def _of(part_s: float, whole_s: float) -> str:
    """``3.2 of 5.0``, with as many decimals as it takes to tell the two apart."""
    digits = 1 if whole_s - part_s >= 0.1 else 3
    return f"{part_s:.{digits}f} of {whole_s:.{digits}f}"


class _Levels:
    """Level statistics over all channels at the source's rate, added up block by block.

    A silent frame is 20 ms (``round(0.02 * rate)`` samples) whose RMS over all channels is below
    −60 dBFS; a last partial frame counts as one.

    Attributes:
        duration_s: Seconds added so far.
        notes: Changes of format on the way.
    """

    def __init__(self) -> None:
        self.duration_s = 0.0
        self.notes: list[str] = []
        self._first_format: tuple[int, int] | None = None
        self._format: tuple[int, int] = (0, 0)
        self._run_start_s = 0.0
        self._run_samples = 0
        self._peak = 0.0
        self._energy = 0.0
        self._num_values = 0
        self._num_clipped = 0
        self._num_frames = 0
        self._num_silent = 0
        self._partial_energy = 0.0
        self._partial_samples = 0

    def add(self, rate: int, samples: FloatArray, energy: npt.NDArray[np.float64]) -> None:
        """Add a block.

        Args:
            rate: Its rate in Hz.
            samples: Shape (num_samples, num_channels), finite.
            energy: Shape (num_samples,): the sum of squares over the channels.
        """
        if (rate, samples.shape[1]) != self._format:
            self._change_format(rate, samples.shape[1])
        if not len(samples):
            return
        peak = max(float(samples.max()), -float(samples.min()))
        self._peak = max(self._peak, peak)
        if peak >= CLIPPED_AT:
            self._num_clipped += int(np.count_nonzero(np.abs(samples) >= CLIPPED_AT))
        self._energy += float(energy.sum())
        self._num_values += samples.size
        self._count_frames(rate, samples.shape[1], energy)
        self._run_samples += len(samples)
        self.duration_s = self._run_start_s + self._run_samples / rate

    def _change_format(self, rate: int, channels: int) -> None:
        if self._first_format is None:
            self._first_format = (rate, channels)
        else:
            self.notes.append(
                f"at {self.duration_s:.1f} s the audio changes from {self._format[0]} Hz, "
                f"{self._format[1]} channels to {rate} Hz, {channels} channels"
            )
        self._close_partial_frame()
        self._format = (rate, channels)
        self._run_start_s, self._run_samples = self.duration_s, 0

    def _count_frames(self, rate: int, channels: int, energy: npt.NDArray[np.float64]) -> None:
        frame_samples = max(round(LEVEL_FRAME_S * rate), 1)
        if self._partial_samples:
            head = energy[: frame_samples - self._partial_samples]
            self._partial_energy += float(head.sum())
            self._partial_samples += len(head)
            energy = energy[len(head) :]
            if self._partial_samples < frame_samples:
                return
            self._close_partial_frame()
        num_whole = len(energy) // frame_samples
        whole = energy[: num_whole * frame_samples].reshape(num_whole, frame_samples)
        silent_below = SILENT_MEAN_SQUARE * frame_samples * channels
        self._num_silent += int(np.count_nonzero(whole.sum(axis=1) < silent_below))
        self._num_frames += num_whole
        rest = energy[num_whole * frame_samples :]
        self._partial_energy, self._partial_samples = float(rest.sum()), len(rest)

    def _partial_frame(self) -> tuple[int, int]:
        """The frame that is not full yet, as (1 or 0 frames, 1 or 0 of them silent)."""
        if not self._partial_samples:
            return 0, 0
        silent_below = SILENT_MEAN_SQUARE * self._partial_samples * self._format[1]
        return 1, int(self._partial_energy < silent_below)

    def _close_partial_frame(self) -> None:
        frames, silent = self._partial_frame()
        self._num_frames += frames
        self._num_silent += silent
        self._partial_energy, self._partial_samples = 0.0, 0

    def facts(self, content_sha256: str, warning: str | None) -> ClipFacts:
        """What is known so far."""
        frames, silent = self._partial_frame()
        rate, channels = self._first_format or (0, 0)
        return ClipFacts(
            duration_s=self.duration_s,
            sample_rate_hz=rate,
            channels=channels,
            peak_dbfs=_decibels(self._peak),
            rms_dbfs=_decibels(math.sqrt(self._energy / max(self._num_values, 1))),
            clipped_ratio=self._num_clipped / max(self._num_values, 1),
            silent_ratio=(self._num_silent + silent) / max(self._num_frames + frames, 1),
            content_sha256=content_sha256,
            warning=warning,
        )


def _decibels(amplitude: float) -> float:
    return 20.0 * math.log10(amplitude) if amplitude > 0.0 else -math.inf


def _finite_part(samples: FloatArray) -> tuple[FloatArray, npt.NDArray[np.float64], bool]:
    """The samples up to the first NaN or infinity, their energy, and whether there is one.

    Energy has shape (num_samples,): the sum of squares over the channels, in float64, which no
    float32 can overflow.
    """
    with np.errstate(all="ignore"):
        energy = np.square(samples[:, 0], dtype=np.float64)
        for channel in range(1, samples.shape[1]):
            energy += np.square(samples[:, channel], dtype=np.float64)
    if math.isfinite(float(energy.sum())):
        return samples, energy, False
    first_bad = int(np.argmin(np.isfinite(energy)))
    return samples[:first_bad], energy[:first_bad], True


def mix_down(samples: FloatArray) -> FloatArray:
    """The mean of the channels: (num_samples, num_channels) to (num_samples,), float32."""
    num_channels = samples.shape[1]
    if num_channels == 1:
        return samples[:, 0]
    mono = samples[:, 0] + samples[:, 1]
    for channel in range(2, num_channels):
        mono += samples[:, channel]
    mono *= np.float32(1.0 / num_channels)
    return mono


class _Resampler:
    """soxr HQ, streaming; starts afresh where the source changes its rate."""

    def __init__(self, sample_rate_hz: int) -> None:
        self._sample_rate_hz = sample_rate_hz
        self._rate = 0
        self._stream: soxr.ResampleStream | None = None

    def push(self, rate: int, mono: FloatArray) -> FloatArray:
        """Samples at the new rate that are ready; shape (num_samples,)."""
        before = np.zeros(0, np.float32)
        if rate != self._rate:
            before = self.flush()
            self._rate = rate
            if rate != self._sample_rate_hz:
                self._stream = soxr.ResampleStream(
                    rate, self._sample_rate_hz, 1, dtype="float32", quality="HQ"
                )
        after = mono if self._stream is None else self._stream.resample_chunk(mono)
        return np.concatenate([before, after]) if len(before) else after

    def flush(self) -> FloatArray:
        """What the filter still holds."""
        stream, self._stream, self._rate = self._stream, None, 0
        empty = np.zeros(0, np.float32)
        return empty if stream is None else stream.resample_chunk(empty, last=True)


class _Pieces:
    """Cuts a stream of samples into pieces of one size, and holds the last one back.

    Attributes:
        num_out: Pieces given out so far.
    """

    def __init__(self, piece_samples: int) -> None:
        self.num_out = 0
        self._piece_samples = piece_samples
        self._parts: list[FloatArray] = []
        self._num_held = 0

    def push(self, samples: FloatArray) -> Iterator[FloatArray]:
        """Take samples in; give out whole pieces that something follows."""
        self._parts.append(samples)
        self._num_held += len(samples)
        if self._num_held <= self._piece_samples:
            return
        held = self.rest()
        start = 0
        while len(held) - start > self._piece_samples:
            self.num_out += 1
            yield held[start : start + self._piece_samples]
            start += self._piece_samples
        self._parts, self._num_held = [held[start:]], len(held) - start

    def rest(self) -> FloatArray:
        """All that is held."""
        parts, self._parts, self._num_held = self._parts, [], 0
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])


# The child process. Its end of a socket carries frames: one byte of kind, eight of length, and
# the payload. Samples go through shared memory, in slots that the parent gives back.

FRAME_HEADER = struct.Struct("!cQ")
READY, PIECE, LAST, ERROR, ALIVE = b"R", b"P", b"L", b"E", b"A"  # to the parent
JOB, CREDIT = b"J", b"C"  # to the child
NUM_SLOTS = 3
ALIVE_EVERY_S = 1.0

DecodeFunction = Callable[..., Iterator[DecodedPiece]]


def data_bytes(process: int | str) -> int:
    """What RLIMIT_DATA counts of a process: private writable memory; 0 if that is not known."""
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
    """A clip as the parent sends it."""

    source: bytes | str
    start_s: float | None
    end_s: float | None


@dataclass
class _Child:
    """The child's side of the connection.

    The reader thread takes in jobs and credits, and ends the process when the parent is gone.
    """

    connection: socket.socket
    sample_rate_hz: int
    piece_samples: int
    limits: DecodeLimits
    slots: FloatArray  # (NUM_SLOTS, piece_samples)
    jobs: queue.SimpleQueue[_Job] = field(default_factory=queue.SimpleQueue)
    credits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(NUM_SLOTS))
    num_sent: int = 0
    last_sign_s: float = 0.0
    num_bytes_before: int = 0  # of the clip before, which may not have been let go of yet
    base_bytes: int = field(default_factory=lambda: data_bytes("self"))

    def read_frames(self) -> None:
        """Body of the reader thread."""
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
                self.jobs.put(_Job(source, job["start_s"], job["end_s"]))
        finally:
            os._exit(0)

    def run_job(self, decode_function: DecodeFunction) -> None:
        """Decode one clip and send what comes of it."""
        job = self.jobs.get()
        try:
            for piece in decode_function(
                job.source,
                sample_rate_hz=self.sample_rate_hz,
                piece_samples=self.piece_samples,
                start_s=job.start_s,
                end_s=job.end_s,
                limits=self.limits,
                on_progress=self.show_life,
            ):
                self.send_piece(piece)
        except DecodeError as error:
            self.send(ERROR, {"error_type": error.error_type, "message": str(error)})
        except MemoryError as error:
            words = str(error) or "out of memory"
            message = (
                f"the decoder needs too much memory ({words}); at most "
                f"{self.limits.max_decoder_bytes:.0f} bytes are allowed; to allow more, raise "
                "decode.max_decoder_bytes"
            )
            self.send(ERROR, {"error_type": "DecoderOutOfMemory", "message": message})
        except Exception as error:  # whatever a library throws belongs to this clip alone
            message = f"the decoder failed: {type(error).__name__}: {error}"
            self.send(ERROR, {"error_type": type(error).__name__, "message": message})

    def limit_memory(self, num_bytes: int) -> None:
        """Bound what the process may allocate, beside a clip of so many encoded bytes."""
        allowed = self.limits.max_decoder_bytes
        if math.isfinite(allowed) and self.base_bytes:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            soft = self.base_bytes + int(allowed) + num_bytes + self.num_bytes_before
            if hard != resource.RLIM_INFINITY:
                soft = min(soft, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        self.num_bytes_before = num_bytes

    def send_piece(self, piece: DecodedPiece) -> None:
        self.credits.acquire()
        self.slots[self.num_sent % NUM_SLOTS, : len(piece.samples)] = piece.samples
        self.num_sent += 1
        self.send(
            LAST if piece.is_last else PIECE,
            {"num_samples": len(piece.samples), "facts": asdict(piece.facts)},
        )

    def send(self, kind: bytes, payload: dict[str, Any]) -> None:
        send_frame(self.connection, kind, json.dumps(payload).encode())
        self.last_sign_s = time.monotonic()

    def show_life(self) -> None:
        if time.monotonic() - self.last_sign_s > ALIVE_EVERY_S:
            self.send(ALIVE, {})


def serve(arguments: list[str], decode_function: DecodeFunction = decode) -> None:
    """Decode clips for the parent process until it goes away; never returns.

    Args:
        arguments: File descriptors of the socket and of the shared memory, the rate in Hz, the
            samples per piece, and ``DecodeLimits`` as JSON.
        decode_function: What decodes; tests put a crashing one here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # hostile files would fill the disk with cores
    socket_fd, memory_fd, sample_rate_hz, piece_samples = map(int, arguments[:4])
    limits = DecodeLimits(**json.loads(arguments[4]))
    memory = mmap.mmap(memory_fd, NUM_SLOTS * piece_samples * 4)
    os.close(memory_fd)
    slots = np.frombuffer(memory, np.float32).reshape(NUM_SLOTS, piece_samples)
    connection = socket.socket(fileno=socket_fd)
    child = _Child(connection, sample_rate_hz, piece_samples, limits, slots)
    threading.Thread(target=child.read_frames, daemon=True).start()
    send_frame(child.connection, READY)
    while True:
        child.run_job(decode_function)


if __name__ == "__main__":
    serve(sys.argv[1:])
