"""The choice of the library that reads a file, by its content and never by its name.

The file's own structure also tells its length. It is compared here with the file's size, because
the libraries silently cut some files, and read some that are cut short without an error.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from transforms.decoding.formats import boxes, chunks
from transforms.decoding.formats.chunks import UNKNOWN_SIZE_FROM, PcmFormat
from transforms.decoding.formats.encoded import Encoded
from transforms.decoding.formats.flac import MAGIC as FLAC_MAGIC
from transforms.decoding.formats.flac import STARTS as FLAC_STARTS
from transforms.decoding.formats.flac import FlacPart, find_flac_parts
from transforms.decoding.formats.tags import without_back_tags, without_front_tags
from transforms.errors import DecodeError
from transforms.records import Note

UNKNOWN_LONG_SIZE_FROM = 1 << 62  # what streaming writers put where sizes have 64 bits
MAX_JUNK_BYTES = 1 << 20  # in front of the audio


@dataclass(frozen=True)
class Route:
    """How to read a file, or one of the parts that follow one another in it.

    Attributes:
        encoded: The part's bytes.
        soundfile_first: Whether libsndfile is to be tried before FFmpeg.
        promised_s: The length by the header, or None.
        notes: Oddities of the part, for the clip's warning.
        pcm: The format of samples that have no header of their own.
    """

    encoded: Encoded
    soundfile_first: bool
    promised_s: float | None = None
    notes: tuple[Note, ...] = ()
    pcm: PcmFormat | None = None


_ASF_MAGIC = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_ENCRYPTION = tuple(
    map(
        bytes.fromhex,
        (
            "fbb3112223bdd211b4b700a0c955fc6e",  # Content Encryption Object
            "14e68a292226174cb935dae07ee9289c",  # Extended Content Encryption Object
        ),
    )
)
# S/PDIF (IEC 61937) begins its bursts with these words; DTS may lie in a WAV without them.
_BITSTREAM_SYNCS = (b"\x72\xf8\x1f\x4e", b"\xfe\x7f\x01\x80", b"\xff\x1f\x00\xe8")
_BITSTREAM_PROBE_BYTES = 16 << 10


def find_routes(encoded: Encoded, on_progress: Callable[[], None]) -> list[Route]:
    """Return the parts of a file in their order; most files have one.

    Raises:
        DecodeError: ``Encrypted``: the audio cannot be decoded without its key.
    """
    encoded = without_front_tags(encoded)
    head = encoded.read(0, 64)
    if head[4:8] == b"ftyp":
        return _find_mp4_routes(encoded, on_progress)
    if head.startswith(chunks.FILE_STARTS):
        return _find_chunk_routes(encoded, on_progress)
    if head.startswith(FLAC_MAGIC):
        return [_flac_route(part) for part in find_flac_parts(encoded, on_progress)]
    return [_find_route(encoded, head, on_progress)]


def _find_route(encoded: Encoded, head: bytes, on_progress: Callable[[], None]) -> Route:
    """Route a file of one part; FFmpeg goes first where libsndfile would silently cut the file."""
    if head.startswith(b"riff"):  # W64: libsndfile reads trailing bytes as audio
        return _ffmpeg_route(encoded, int.from_bytes(head[16:24], "little"))
    if head.startswith(boxes.EBML_MAGIC):
        _refuse_encrypted(boxes.matroska_is_encrypted(encoded))
        return _ffmpeg_route(encoded, boxes.matroska_length(encoded))
    if head.startswith(_ASF_MAGIC):
        _refuse_encrypted(_asf_is_encrypted(encoded))
        return _ffmpeg_route(encoded, _asf_length(encoded))
    if head.startswith(b"OggS"):
        return _find_ogg_route(encoded, on_progress)
    if head.startswith(b"NIST_1A"):
        return Route(encoded, True, _sphere_length_s(encoded))
    if head.startswith(b"2BIT"):
        return Route(encoded, True, notes=_cut_short(encoded, _avr_length(head)))
    if head.startswith(b"Creative Voice File"):
        return _ffmpeg_route(encoded, _voc_length(encoded))
    if frame := _headerless_frame(head):
        return Route(encoded, True, notes=_cut_within_a_frame(encoded, *frame))
    return _find_mp3_route(without_back_tags(encoded))


def find_behind_junk(encoded: Encoded) -> Encoded | None:
    """Return the part behind what precedes a FLAC, Ogg or AAC stream, or None if there is none."""
    starts = [encoded.find(start, 1, MAX_JUNK_BYTES) for start in (*FLAC_STARTS, b"OggS\0\x02")]
    starts.append(_find_adts(encoded))
    found = [start for start in starts if start > 0]
    return encoded.part(min(found)) if found else None


def _find_adts(encoded: Encoded) -> int:
    """Return where three frames of AAC follow one another (ISO 13818-7, section 6.2); -1: no."""
    start = -1
    while (start := encoded.find(b"\xff", start + 1, MAX_JUNK_BYTES)) >= 0:
        position, num_frames = start, 0
        while num_frames < 3:
            header = encoded.read(position, 6)
            if len(header) < 6 or header[0] != 0xFF or header[1] & 0xF6 != 0xF0:
                break
            num_frames += 1
            position += (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
        if num_frames == 3:
            return start
    return -1


def _find_mp4_routes(encoded: Encoded, on_progress: Callable[[], None]) -> list[Route]:
    _refuse_encrypted(boxes.mp4_is_encrypted(encoded))
    next_file = boxes.next_mp4(encoded)
    if next_file >= 0:
        rest = find_routes(encoded.part(next_file), on_progress)
        return [Route(encoded.part(0, next_file), False), *rest]
    return [_ffmpeg_route(encoded, boxes.mp4_length(encoded))]


def _refuse_encrypted(is_encrypted: bool) -> None:
    if is_encrypted:
        raise DecodeError(
            "the audio is encrypted (DRM): it cannot be decoded without its key",
            error_type="Encrypted",
        )


def _ffmpeg_route(encoded: Encoded, declared_bytes: int) -> Route:
    """Give FFmpeg a file that should have so many bytes; 0: it does not say."""
    return Route(encoded, False, notes=_cut_short(encoded, declared_bytes))


def _cut_short(encoded: Encoded, declared_bytes: int) -> tuple[Note, ...]:
    """Return a note if the header declares more bytes than the file has."""
    if not len(encoded) < declared_bytes < UNKNOWN_LONG_SIZE_FROM:
        return ()
    words = f"the file is cut short: {len(encoded)} of {declared_bytes} bytes"
    return (Note("cut_short", words),)


def _more_than_declared(declared_s: float, found_s: float) -> tuple[Note, ...]:
    words = f"the header declares {declared_s:.1f} s; there are {found_s:.1f} s of audio"
    return (Note("header_wrong", words),)


def _flac_route(part: FlacPart) -> Route:
    notes: tuple[Note, ...] = ()
    if part.declared_s is not None and part.length_s is not None:
        notes = _more_than_declared(part.declared_s, part.length_s)
    return Route(part.encoded, True, part.length_s, notes)


def _find_chunk_routes(encoded: Encoded, on_progress: Callable[[], None]) -> list[Route]:
    """Route WAV, AIFF, CAF and AU, with what lies behind the audio that their headers declare."""
    head = encoded.read(0, 12)
    if head[:4] not in (b"caff", b".snd") and head[8:] not in (b"WAVE", b"AIFF", b"AIFC"):
        size = int.from_bytes(head[4:8], "big" if head.startswith(b"FORM") else "little")
        return [_ffmpeg_route(encoded, size + 8 if size < UNKNOWN_SIZE_FROM else 0)]
    audio = chunks.find_declared_audio(encoded)
    if audio is None:
        return [Route(encoded, True)]
    probe = encoded.read(audio.start, _BITSTREAM_PROBE_BYTES).lstrip(b"\0")
    if probe.startswith(_BITSTREAM_SYNCS):
        return [Route(encoded, False)]
    pcm, num_bytes = audio.pcm, audio.num_bytes
    if num_bytes is None:
        if pcm is not None and len(encoded) - audio.start >= UNKNOWN_SIZE_FROM:
            return [_pcm_route(encoded, pcm, audio.start, len(encoded))]
        return [Route(encoded, True)]
    more = [_pcm_route(encoded, pcm, start, stop) for start, stop in audio.more if pcm is not None]
    num_unknown = audio.num_unknown or sum(stop - start for start, stop in audio.more[len(more) :])
    notes: list[Note] = []
    # libsndfile says nothing of a cut CAF, nor of an AU whose size and offset exceed 32 bits.
    if head.startswith(b"caff") or (head.startswith(b".snd") and num_bytes >= UNKNOWN_SIZE_FROM):
        notes.extend(_cut_short(encoded, audio.start + num_bytes))
    if num_bytes == 0 and (more or num_unknown):
        notes.append(Note("header_wrong", "the header declares no audio; read to the end"))
        if not more:
            return [Route(encoded, False, notes=tuple(notes))]
        return [dataclasses.replace(more[0], notes=tuple(notes)), *more[1:]]
    declared_s = None
    if more and pcm is not None:
        declared_s = num_bytes // pcm.frame_bytes / pcm.samplerate
        found_s = declared_s + sum(route.promised_s or 0.0 for route in more)
        notes.extend(_more_than_declared(declared_s, found_s))
    if num_unknown:
        words = (
            f"{num_unknown} bytes follow the {num_bytes} bytes of audio that the header declares"
        )
        notes.append(Note("extra_bytes", words))
    if audio.next_file >= 0:
        more.extend(find_routes(encoded.part(audio.next_file), on_progress))
    return [Route(encoded, True, declared_s, tuple(notes)), *more]


def _pcm_route(encoded: Encoded, pcm: PcmFormat, start: int, stop: int) -> Route:
    length_s = (stop - start) // pcm.frame_bytes / pcm.samplerate
    return Route(encoded.part(start, stop), True, length_s, pcm=pcm)


def _find_ogg_route(encoded: Encoded, on_progress: Callable[[], None]) -> Route:
    """Send a chained Ogg to FFmpeg: libsndfile reads only the first link."""
    position, flags, chained, begun = 0, 0, False, False
    end = 0
    while position >= 0:
        header = encoded.read(position, 6)
        if len(header) == 6 and header[4] == 0:
            end = _ogg_page_end(encoded, position)
            flags = header[5]
            is_first_page = bool(flags & 2)
            chained = chained or (is_first_page and begun)
            begun = begun or not is_first_page
        position = encoded.find(b"OggS", position + 27)
        on_progress()
    has_end = flags & 4 and end <= len(encoded)
    words = "the Ogg stream has no end: it may have been cut short"
    notes = () if has_end else (Note("cut_short", words),)
    first_packet = encoded.read(28, 9)
    known = first_packet.startswith((b"\x01vorbis", b"\x7fFLAC"))
    return Route(encoded, known and not chained, notes=notes)


def _ogg_page_end(encoded: Encoded, position: int) -> int:
    """Return where a page ends by the sizes in its header (RFC 3533, section 6)."""
    header = encoded.read(position, 27 + 255)
    num_segments = header[26] if len(header) > 26 else 0
    return position + 27 + num_segments + sum(header[27 : 27 + num_segments])


def _find_mp3_route(encoded: Encoded) -> Route:
    """Give libsndfile only an MP3 whose Xing header covers the whole file.

    libsndfile trusts the header, or guesses the length from the first frames, and so would cut
    concatenated files and those without a header short.
    """
    frame = encoded.read(0, 256)
    if len(frame) < 256 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2:  # sync, Layer III
        return Route(encoded, False)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    rate_index = frame[2] >> 2 & 3
    if at < 0 or rate_index == 3:
        return Route(encoded, False)
    version = frame[1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    rate = (44_100, 48_000, 32_000)[rate_index] >> {3: 0, 2: 1}.get(version, 2)
    flags, num_frames, num_bytes = struct.unpack_from(">III", frame, at + 4)
    if flags & 3 != 3:
        return Route(encoded, False)
    slack = 4096 + len(encoded) // 100  # tags that are not known, and zeros
    promised_s = num_frames * (1152 if version == 3 else 576) / rate
    is_whole = abs(len(encoded) - num_bytes) <= slack
    is_cut = len(encoded) < num_bytes and not is_whole
    return Route(encoded, is_whole, promised_s if is_cut else None)


# Lengths by the headers of rarer formats


def _sphere_length_s(encoded: Encoded) -> float | None:
    """Return the seconds that a NIST SPHERE header counts, or None."""
    fields = dict(re.findall(rb"^(\w+) -i (\d{1,15})", encoded.read(0, 4096), re.MULTILINE))
    rate = int(fields.get(b"sample_rate", 0))
    return int(fields[b"sample_count"]) / rate if rate and b"sample_count" in fields else None


def _avr_length(head: bytes) -> int:
    """Return the size of an AVR file by its header of 128 bytes."""
    channels = 2 if any(head[12:14]) else 1
    bits, num_frames = int.from_bytes(head[14:16], "big"), int.from_bytes(head[26:30], "big")
    return 128 + num_frames * channels * (bits // 8)


def _headerless_frame(head: bytes) -> tuple[int, int] | None:
    """Return header size and bytes of a frame for PVF, PAF and IRCAM, which declare no length."""
    if match := re.match(rb"PVF1\n(\d+) \d+ (\d+)\n", head):
        return match.end(), int(match[1]) * int(match[2]) // 8
    if head.startswith((b" paf", b"fap ")):
        numbers = struct.unpack_from(">6I" if head.startswith(b" paf") else "<6I", head, 4)
        sample_format, channels = numbers[3], numbers[4]
        return 2048, channels * {0: 2, 1: 32, 2: 1}.get(sample_format, 0)
    if re.match(rb"\x64\xa3[\1-\4]\0|\0[\1-\4]\xa3\x64", head):  # IRCAM
        channels, encoding = struct.unpack_from("<2I", head, 8)
        if channels > 0xFFFF:
            channels, encoding = struct.unpack_from(">2I", head, 8)
        return 1024, channels * (encoding & 0xFFFF)
    return None


def _cut_within_a_frame(encoded: Encoded, header_bytes: int, frame_bytes: int) -> tuple[Note, ...]:
    rest = (len(encoded) - header_bytes) % frame_bytes if frame_bytes else 0
    if not rest:
        return ()
    words = f"the file is cut short: it ends within a sample ({rest} of {frame_bytes} bytes)"
    return (Note("cut_short", words),)


def _voc_length(encoded: Encoded) -> int:
    """Return where the last block of a VOC ends by the blocks' sizes of 24 bits."""
    position = int.from_bytes(encoded.read(20, 2), "little")
    while len(header := encoded.read(position, 4)) == 4 and header[0]:  # 0: the end
        position += 4 + int.from_bytes(header[1:], "little")
    return position


def _asf_length(encoded: Encoded) -> int:
    """Return the size of an ASF file by its File Properties Object (section 3.2); 0: unknown."""
    position = encoded.find(_ASF_FILE_PROPERTIES, 0, MAX_JUNK_BYTES)
    is_live = encoded.read(position + 88, 1)[:1] == b"\x01"
    if position < 0 or is_live:
        return 0
    return int.from_bytes(encoded.read(position + 40, 8), "little")


def _asf_is_encrypted(encoded: Encoded) -> bool:
    header_bytes = int.from_bytes(encoded.read(16, 8), "little")
    return any(encoded.find(guid, 30, header_bytes) >= 0 for guid in _ASF_ENCRYPTION)
