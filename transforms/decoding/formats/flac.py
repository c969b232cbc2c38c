"""The parts of a FLAC file that one decoder can read (RFC 9639).

libsndfile and FFmpeg trust the header: they stop at its number of samples, at a second file behind
the first, and take frames of another rate for frames of the first. Here every frame's header is
looked at, which costs a few percent of decoding. Each run of frames of one format gets a header of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from transforms.decoding.formats.encoded import Encoded

MAGIC = b"fLaC"
STREAMINFO_BYTES = 34
# How a FLAC starts: the magic, then STREAMINFO, which may be the only metadata block.
STARTS = (MAGIC + b"\x00\x00\x00\x22", MAGIC + b"\x80\x00\x00\x22")
MAX_FRAME_HEADER_BYTES = 16
SCAN_BYTES = 16 << 20  # looked at in one go
_RATES = (
    0,
    88_200,
    176_400,
    192_000,
    8_000,
    16_000,
    22_050,
    24_000,
    32_000,
    44_100,
    48_000,
    96_000,
)
_BITS = (0, 8, 12, 0, 16, 20, 24, 32)


@dataclass(frozen=True)
class FlacPart:
    """Frames of one format, behind a header that declares them.

    ``declared_s`` is the length by the file's own header, where the frames hold more; else None.
    """

    encoded: Encoded
    length_s: float | None
    declared_s: float | None = None


class _Format(NamedTuple):
    rate: int
    channels: int
    bits: int


class _Frame(NamedTuple):
    start: int  # first byte
    format: _Format
    number: int  # of its first sample where ``counts_samples``, else of the frame
    counts_samples: bool
    num_samples: int


def find_flac_parts(encoded: Encoded, on_progress: Callable[[], None]) -> list[FlacPart]:
    """Return the parts of a file that starts with ``fLaC``; mostly the file itself, alone."""
    parts: list[FlacPart] = []
    start = 0
    while start >= 0:
        frames_start, info = _read_metadata(encoded, start)
        following = encoded.find(MAGIC, frames_start)
        while following >= 0 and encoded.read(following, len(STARTS[0])) not in STARTS:
            following = encoded.find(MAGIC, following + 1)
        stop = following if following >= 0 else len(encoded)
        parts.extend(_parts_of_stream(encoded.part(start, stop), frames_start - start, info))
        on_progress()
        start = following
    return parts


def _read_metadata(encoded: Encoded, start: int) -> tuple[int, bytes]:
    """Return where the first frame lies, and STREAMINFO."""
    position, info = start + len(MAGIC), b""
    while len(header := encoded.read(position, 4)) == 4:
        if header[0] & 0x7F == 0:
            info = encoded.read(position + 4, STREAMINFO_BYTES)
        position += 4 + int.from_bytes(header[1:], "big")
        if header[0] & 0x80:  # the last block
            break
    return min(position, len(encoded)), info


def _parts_of_stream(encoded: Encoded, frames_start: int, info: bytes) -> list[FlacPart]:
    whole = FlacPart(encoded, None)
    if len(info) < STREAMINFO_BYTES:
        return [whole]
    packed = int.from_bytes(info[10:18], "big")
    declared = _Format(packed >> 44, (packed >> 41 & 7) + 1, (packed >> 36 & 31) + 1)
    num_declared = packed & (1 << 36) - 1
    runs = _Scan(encoded, declared).runs(frames_start)
    if not runs or declared.rate == 0:
        return [whole]
    if len(runs) == 1 and runs[0][0].format == declared:
        num_samples = _num_samples(*runs[0])
        if not 0 < num_declared < num_samples:
            return [whole]
        rest = encoded.part(frames_start, None, _make_header(declared, num_samples))
        rate = declared.rate
        return [FlacPart(rest, num_samples / rate, num_declared / rate)]
    parts = []
    stops = [first.start for first, _ in runs[1:]] + [len(encoded)]
    for (first, last), stop in zip(runs, stops, strict=True):
        num_samples = _num_samples(first, last)
        part = encoded.part(first.start, stop, _make_header(first.format, num_samples))
        parts.append(FlacPart(part, num_samples / first.format.rate))
    return parts


def _num_samples(first: _Frame, last: _Frame) -> int:
    # All frames but the last have the same size, unless their headers count samples.
    unit = 1 if first.counts_samples else first.num_samples
    return (last.number - first.number) * unit + last.num_samples


def _make_header(format: _Format, num_samples: int) -> bytes:
    """Return the magic and a STREAMINFO for frames of any size."""
    packed = format.rate << 44 | format.channels - 1 << 41 | format.bits - 1 << 36 | num_samples
    sizes = (16).to_bytes(2, "big") + (65_535).to_bytes(2, "big") + bytes(6)
    return STARTS[1] + sizes + packed.to_bytes(8, "big") + bytes(16)


class _Scan:
    """Finds a stream's frames by their headers."""

    def __init__(self, encoded: Encoded, declared: _Format) -> None:
        self._encoded = encoded
        self._declared = declared

    def runs(self, position: int) -> list[tuple[_Frame, _Frame]]:
        """Return the first and the last frame of each run of one format."""
        first = next(self._frames(position), None)
        if first is None:
            return []
        runs: list[tuple[_Frame, _Frame]] = []
        places, codes = self._find_alike(first.start)
        begin = 0
        for index in np.flatnonzero(np.diff(codes, prepend=codes[:1])):
            if codes[index] == codes[begin]:
                continue
            frame = self._begins_run(int(places[index]), first)
            if frame is not None:
                runs.append((first, self._last_of(places[begin:index], first)))
                first, begin = frame, int(index)
        runs.append((first, self._last_of(places[begin:], first)))
        return runs

    def _find_alike(self, start: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
        """Return where the first frame's two bytes of sync occur, and the format's codes there."""
        sync = np.frombuffer(self._encoded.read(start, 2), np.uint16)
        places, codes = [], []
        for begin in range(start, len(self._encoded) - 3, SCAN_BYTES):
            data = np.frombuffer(self._encoded.read(begin, SCAN_BYTES + 3), np.uint8)
            pairs = [data[odd : odd + (len(data) - odd) // 2 * 2].view(np.uint16) for odd in (0, 1)]
            found = [2 * np.flatnonzero(pair == sync) + odd for odd, pair in enumerate(pairs)]
            at = np.sort(np.concatenate(found))
            at = at[at < min(SCAN_BYTES, len(data) - 3)]
            places.append(at + begin)
            codes.append(_format_codes(data[at + 2], data[at + 3]))
        return np.concatenate(places), np.concatenate(codes)

    def _begins_run(self, position: int, first: _Frame) -> _Frame | None:
        """Return the frame of another format that starts here, if the next frame has it too.

        Random bytes look like a frame's header once in some hundred megabytes.
        """
        frame = self._parse(position)
        if frame is None or frame.format == first.format:
            return None
        following = next(self._frames(position + 1), None)
        return frame if following is not None and following.format == frame.format else None

    def _last_of(self, places: npt.NDArray[np.int64], first: _Frame) -> _Frame:
        for position in places[::-1]:
            frame = self._parse(int(position))
            if frame is not None and frame.number >= first.number:
                return frame
        return first

    def _frames(self, position: int) -> Iterator[_Frame]:
        """Yield what seems to be a frame, from ``position`` on."""
        while (position := self._encoded.find(b"\xff", position)) >= 0:
            frame = self._parse(position)
            if frame is not None:
                yield frame
            position += 1

    def _parse(self, position: int) -> _Frame | None:
        """Parse a frame's header (RFC 9639, section 9.1); None if there is none here."""
        data = self._encoded.read(position, MAX_FRAME_HEADER_BYTES)
        if len(data) < 6 or data[0] != 0xFF or data[1] & 0xFE != 0xF8 or data[3] & 1:
            return None
        size_code, rate_code = data[2] >> 4, data[2] & 15
        channel_code, bits_code = data[3] >> 4, data[3] >> 1 & 7
        if size_code == 0 or rate_code == 15 or channel_code > 10 or bits_code == 3:
            return None
        number, at = _parse_number(data, 4)
        size_bytes = {6: 1, 7: 2}.get(size_code, 0)
        rate_bytes = {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
        end = at + size_bytes + rate_bytes
        if number < 0 or end >= len(data) or _crc8(data[:end]) != data[end]:
            return None
        if size_bytes:
            num_samples = int.from_bytes(data[at : at + size_bytes], "big") + 1
        else:
            num_samples = {1: 192}.get(size_code) or (
                576 << size_code - 2 if size_code < 6 else 256 << size_code - 8
            )
        if rate_bytes:
            rate = int.from_bytes(data[at + size_bytes : end], "big")
            rate *= {12: 1000, 13: 1, 14: 10}[rate_code]
        else:
            rate = _RATES[rate_code] or self._declared.rate
        format = _Format(
            rate,
            channel_code + 1 if channel_code < 8 else 2,
            _BITS[bits_code] or self._declared.bits,
        )
        return _Frame(position, format, number, bool(data[1] & 1), num_samples)


def _format_codes(
    third: npt.NDArray[np.uint8], fourth: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint16]:
    """Return the codes of rate, channels (stereo in any coding is one) and bits, as one number."""
    channels = fourth >> 4
    channels[channels > 7] = 1
    codes = (third & 15) | channels.astype(np.uint16) << 4 | (fourth & 15).astype(np.uint16) << 8
    return np.asarray(codes, np.uint16)


def _parse_number(data: bytes, at: int) -> tuple[int, int]:
    """Parse a number coded as UTF-8 codes characters; -1 if it is none. Also where it ends."""
    first = data[at]
    if first < 0x80:
        return first, at + 1
    num_bytes = 8 - (first ^ 0xFF).bit_length()
    following = data[at + 1 : at + num_bytes]
    if not 2 <= num_bytes <= 7 or any(byte & 0xC0 != 0x80 for byte in following):
        return -1, at
    number = first & (1 << 7 - num_bytes) - 1
    for byte in following:
        number = number << 6 | byte & 0x3F
    return number, at + num_bytes


def _crc8_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value << 1 ^ (0x07 if value & 0x80 else 0)) & 0xFF
        table.append(value)
    return table


_CRC8 = _crc8_table()


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc = _CRC8[crc ^ byte]
    return crc
