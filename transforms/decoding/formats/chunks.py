"""WAV, RF64, AIFF, CAF and AU: audio that goes on behind what their headers declare.

Recorders write sizes before they know them, 32 bits overflow at 4 GiB, and files are joined end to
end. libsndfile trusts the sizes and silently reads less.
"""

from __future__ import annotations

import dataclasses
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import soundfile

from transforms.decoding.formats.encoded import Encoded
from transforms.records import FloatArray

UNKNOWN_SIZE_FROM = 0x7FFFF000  # streaming writers put "unknown" sizes this large into headers
MAX_SIZE = 1 << 32  # sizes of 32 bits count modulo this
MIN_REST_S = 0.025  # less is no audio that anybody would miss
MAX_PADDING_BYTES = 64 << 10  # zeros behind the audio, up to the end of a disk's or tape's block
PROBE_BYTES = 1 << 18
NUM_PROBES = 4
MAX_CHANNELS = 1024  # libsndfile's
# What stands behind the audio of a file that was cut short within it.
_METADATA_CHUNKS = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"cue ", b"PEAK", b"JUNK", b"FLLR")
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")
FILE_STARTS = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff", b".snd")


@dataclass(frozen=True)
class PcmFormat:
    """Samples without a header, as ``soundfile.SoundFile`` takes them with ``format="RAW"``."""

    samplerate: int
    channels: int
    subtype: str
    endian: Literal["LITTLE", "BIG"]

    @property
    def frame_bytes(self) -> int:
        """Bytes of one sample of every channel."""
        return self.channels * _SUBTYPE_BYTES[self.subtype]


_SUBTYPE_BYTES = {
    "PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4,
    "FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1,
}  # fmt: skip


class Chunk(NamedTuple):
    """A chunk's type, where its content starts, and the size of that by its header."""

    kind: bytes
    start: int
    size: int


class _Layout(NamedTuple):
    order: Literal["little", "big"]
    size_bytes: int
    padding: int  # contents are padded to a multiple of this
    first: int  # where the first chunk lies
    data_kind: bytes
    lead_bytes: int  # of the data chunk, before its samples


_WAV = _Layout("little", 4, 2, 12, b"data", 0)
_AU = _Layout("big", 4, 1, 0, b"", 0)  # has no chunks
_LAYOUTS = {
    b"RIFF": _WAV,
    b"RF64": _WAV,
    b"RIFX": _WAV._replace(order="big"),
    b"FORM": _Layout("big", 4, 2, 12, b"SSND", 8),
    b"caff": _Layout("big", 8, 1, 8, b"data", 4),
}


@dataclass(frozen=True)
class DeclaredAudio:
    """The audio that the header of a WAV, AIFF, CAF or AU declares, and what lies behind it.

    Attributes:
        start: First byte of the samples.
        num_bytes: What the header declares; None if it says that it does not know.
        pcm: The samples' format; None if a codec other than PCM made them.
        more: Parts of samples behind it, as (start, stop).
        next_file: Where another file begins behind this one; -1: nowhere.
        num_unknown: Bytes behind it that are neither chunks, nor tags, nor audio.
    """

    start: int
    num_bytes: int | None
    pcm: PcmFormat | None
    more: tuple[tuple[int, int], ...] = ()
    next_file: int = -1
    num_unknown: int = 0


def find_declared_audio(encoded: Encoded) -> DeclaredAudio | None:
    """Read the header of a WAV, RF64, AIFF, CAF or AU; None where there is no audio chunk."""
    if encoded.read(0, 4) == b".snd":
        return _find_au_audio(encoded)
    layout = _LAYOUTS[encoded.read(0, 4)]
    found: dict[bytes, Chunk] = {}
    for chunk in _chunks(encoded, layout.first, layout):
        found.setdefault(chunk.kind, chunk)
        if chunk.kind == layout.data_kind:
            break
    else:
        return None
    pcm = _pcm_format(encoded, found, layout)
    start = min(chunk.start + layout.lead_bytes, len(encoded))
    size = chunk.size
    if b"ds64" in found:
        size = int.from_bytes(encoded.read(found[b"ds64"].start + 8, 8), "little")
    unknown_from = UNKNOWN_SIZE_FROM if layout.size_bytes == 4 and b"ds64" not in found else 1 << 62
    if size >= unknown_from:
        return DeclaredAudio(start, None, pcm)
    size = max(size - layout.lead_bytes, 0)
    declared = DeclaredAudio(start, size, pcm)
    if start + size >= len(encoded):
        return declared
    return _look_behind(encoded, declared, layout)


def _find_au_audio(encoded: Encoded) -> DeclaredAudio:
    start, size, codec, rate, channels = struct.unpack(">5I", encoded.read(4, 20).ljust(20, b"\0"))
    subtypes = {
        1: "ULAW", 2: "PCM_S8", 3: "PCM_16", 4: "PCM_24", 5: "PCM_32",
        6: "FLOAT", 7: "DOUBLE", 27: "ALAW",
    }  # fmt: skip
    is_sound = codec in subtypes and rate >= 1 and 1 <= channels <= MAX_CHANNELS
    pcm = PcmFormat(rate, channels, subtypes[codec], "BIG") if is_sound else None
    if size == 0xFFFFFFFF:
        return DeclaredAudio(start, None, pcm)
    declared = DeclaredAudio(start, size, pcm)
    return declared if start + size >= len(encoded) else _look_behind(encoded, declared, _AU)


def _chunks(encoded: Encoded, position: int, layout: _Layout) -> Iterator[Chunk]:
    header_bytes = 4 + layout.size_bytes
    while len(header := encoded.read(position, header_bytes)) == header_bytes:
        chunk = Chunk(header[:4], position + header_bytes, int.from_bytes(header[4:], layout.order))
        yield chunk
        position = chunk.start + chunk.size + -chunk.size % layout.padding


def _look_behind(encoded: Encoded, declared: DeclaredAudio, layout: _Layout) -> DeclaredAudio:
    """Tell what the bytes behind the declared audio are."""
    end = declared.start + (declared.num_bytes or 0)
    position = end + end % layout.padding
    audio: list[tuple[int, int]] = []
    only_known = True
    for chunk in _chunks(encoded, position, layout):
        if chunk.kind in FILE_STARTS:
            return dataclasses.replace(declared, more=tuple(audio), next_file=position)
        stop = chunk.start + chunk.size
        if not _is_text(chunk.kind) or stop > len(encoded):
            break
        if chunk.kind == layout.data_kind:
            audio.append((chunk.start + layout.lead_bytes, stop))
        only_known = only_known and chunk.kind in (*_METADATA_CHUNKS, layout.data_kind)
        position = stop + chunk.size % layout.padding
    is_whole = len(encoded) - position < 8 or encoded.read(position, 12).startswith(
        _TAGS + _METADATA_CHUNKS
    )
    if is_whole:
        return dataclasses.replace(declared, more=tuple(audio))
    if not only_known or position == end + end % layout.padding:
        # Nothing behind the audio is surely a chunk: it may be samples.
        position, audio = end, []
        rest = _find_rest(encoded, declared)
        if rest is not None:
            return dataclasses.replace(declared, more=(rest,))
    num_unknown = len(encoded) - position
    if num_unknown <= MAX_PADDING_BYTES and not any(encoded.read(position, num_unknown)):
        num_unknown = 0
    return dataclasses.replace(declared, more=tuple(audio), num_unknown=num_unknown)


def _find_rest(encoded: Encoded, declared: DeclaredAudio) -> tuple[int, int] | None:
    """Return where the samples lie that clearly go on behind the declared ones, or None.

    They do where a size of 32 bits has overflowed. Else it depends on how far one sample lies from
    the next: in white noise, and in data that is not audio, the mean square of the differences is
    twice that of the samples. In audio it is less, or as it is in the declared part.
    """
    pcm, num_bytes = declared.pcm, declared.num_bytes
    if pcm is None or num_bytes is None:
        return None
    start = declared.start + num_bytes // pcm.frame_bytes * pcm.frame_bytes
    stop = len(encoded)
    if num_bytes == 0:
        return start, stop
    if stop - declared.start - num_bytes >= MAX_SIZE:
        return start, stop
    if stop - start < MIN_REST_S * pcm.samplerate * pcm.frame_bytes:
        return None
    rough, level = _roughness(encoded, pcm, start, stop)
    if rough < 1.0:
        return start, stop
    declared_rough, declared_level = _roughness(encoded, pcm, declared.start, start)
    is_alike = 0.25 < (level + 1e-9) / (declared_level + 1e-9) < 4.0
    return (start, stop) if is_alike and abs(rough - declared_rough) < 0.25 else None


def _is_text(data: bytes) -> bool:
    return all(0x20 <= byte < 0x7F for byte in data)


def _roughness(encoded: Encoded, pcm: PcmFormat, start: int, stop: int) -> tuple[float, float]:
    """Return mean square of differences over that of samples (inf: no audio), and the RMS."""
    num_frames = (stop - start) // pcm.frame_bytes
    probe_frames = min(PROBE_BYTES // pcm.frame_bytes, num_frames // NUM_PROBES)
    if probe_frames < 16:
        probe_frames = num_frames
    difference_energy = energy = 0.0
    num_values = 0
    for index in range(NUM_PROBES if probe_frames < num_frames else 1):
        frame = index * (num_frames - probe_frames) // max(NUM_PROBES - 1, 1)
        data = encoded.read(start + frame * pcm.frame_bytes, probe_frames * pcm.frame_bytes)
        samples = _read_pcm(data, pcm).astype(np.float64)
        if not np.isfinite(samples).all() or np.abs(samples).max(initial=0.0) > 8.0:
            return float("inf"), float("inf")
        samples -= samples.mean()
        difference_energy += float(np.square(np.diff(samples, axis=0)).sum())
        energy += float(np.square(samples).sum())
        num_values += samples.size
    if energy == 0.0:
        return float("inf"), 0.0
    return difference_energy / energy, float(np.sqrt(energy / num_values))


def _read_pcm(data: bytes, pcm: PcmFormat) -> FloatArray:
    with soundfile.SoundFile(io.BytesIO(data), format="RAW", **vars(pcm)) as file:
        samples: FloatArray = file.read(dtype="float32", always_2d=True)
        return samples


# The sample format


def _pcm_format(encoded: Encoded, found: dict[bytes, Chunk], layout: _Layout) -> PcmFormat | None:
    for kind, parse in ((b"fmt ", _parse_fmt), (b"COMM", _parse_comm), (b"desc", _parse_desc)):
        if kind in found:
            content = encoded.read(found[kind].start, min(found[kind].size, 64))
            pcm = parse(content.ljust(64, b"\0"), layout.order)
            is_sound = pcm is not None and pcm.samplerate >= 1 and 1 <= pcm.channels <= MAX_CHANNELS
            return pcm if is_sound else None
    return None


def _parse_fmt(content: bytes, order: Literal["little", "big"]) -> PcmFormat | None:
    def number(start: int, stop: int) -> int:
        return int.from_bytes(content[start:stop], order)

    tag, channels, rate, bits = number(0, 2), number(2, 4), number(4, 8), number(14, 16)
    if tag == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: the tag starts the GUID
        tag = number(24, 26)
    subtypes = {
        (1, 8): "PCM_U8", (1, 16): "PCM_16", (1, 24): "PCM_24", (1, 32): "PCM_32",
        (3, 32): "FLOAT", (3, 64): "DOUBLE", (6, 8): "ALAW", (7, 8): "ULAW",
    }  # fmt: skip
    subtype = subtypes.get((tag, bits))
    if subtype is None or number(12, 14) != channels * bits // 8:
        return None
    return PcmFormat(rate, channels, subtype, "LITTLE" if order == "little" else "BIG")


def _parse_comm(content: bytes, order: Literal["little", "big"]) -> PcmFormat | None:
    channels, bits = int.from_bytes(content[:2], order), int.from_bytes(content[6:8], order)
    exponent = int.from_bytes(content[8:10], order) - 16383 - 63  # a float of 80 bits
    mantissa = int.from_bytes(content[10:18], order)
    rate = int(mantissa * 2.0**exponent) if -64 < exponent < 0 else 0
    codec = content[18:22] if any(content[18:22]) else b"NONE"
    integers = {8: "PCM_S8", 16: "PCM_16", 24: "PCM_24", 32: "PCM_32"}
    subtype = {
        b"fl32": "FLOAT", b"FL32": "FLOAT", b"fl64": "DOUBLE", b"FL64": "DOUBLE",
        b"alaw": "ALAW", b"ALAW": "ALAW", b"ulaw": "ULAW", b"ULAW": "ULAW",
    }.get(codec)  # fmt: skip
    if codec in (b"NONE", b"twos", b"sowt", b"in24", b"in32"):
        subtype = integers.get((bits + 7) // 8 * 8)
    if subtype is None:
        return None
    return PcmFormat(rate, channels, subtype, "LITTLE" if codec == b"sowt" else "BIG")


def _parse_desc(content: bytes, order: Literal["little", "big"]) -> PcmFormat | None:
    rate = float(np.frombuffer(content[:8], ">f8")[0])
    flags = int.from_bytes(content[12:16], order)
    channels, bits = int.from_bytes(content[24:28], order), int.from_bytes(content[28:32], order)
    integers = {8: "PCM_S8", 16: "PCM_16", 24: "PCM_24", 32: "PCM_32"}
    floats = {32: "FLOAT", 64: "DOUBLE"}
    subtype = {
        b"lpcm": (floats if flags & 1 else integers).get(bits),
        b"alaw": "ALAW",
        b"ulaw": "ULAW",
    }.get(content[8:12])
    if subtype is None or not 1 <= rate < 1 << 31:
        return None
    return PcmFormat(int(rate), channels, subtype, "LITTLE" if flags & 2 else "BIG")
