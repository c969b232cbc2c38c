"""Kinds of files by their names: audio with its usual bit rate, tars, manifests, other files."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Audio and video extensions by their usual number of encoded bytes per second, which only
# estimates use. ".ts" is left out because most are TypeScript, ".raw" and ".pcm" because they do
# not tell their rate. FFmpeg decodes others too: a new extension is one more name here.
_AUDIO = {
    88_200: ".wav .wave .w64 .rf64 .bwf .aif .aiff .aifc .au .snd .caf",  # 44.1 kHz mono 16 bit
    44_100: ".flac .oggflac .ape .wv .tta .tak .shn",  # lossless: half of that
    16_000: """
        .mp3 .mp2 .mp1 .mpa .mpga .aac .adts .m4a .m4b .m4r .mp4a .f4a .f4b .mka .mpc .ra .rm
        .ac3 .eac3 .ec3 .dts .3gp .3gpp .3g2 .qt .asf .flv .f4v .ogv .ogx .vob .mts .m2ts .awb
        .voc .sph .nist .dsf .dff .vqf .afc
    """,  # 128 kbit/s, and wherever no usual rate is known
    12_000: ".ogg .oga .opus .wma .webm .weba",
    1_600: ".amr .gsm .spx .qcp",
    250_000: ".mp4 .m4v .mov .mkv .avi .wmv .mpg .mpeg",
    3_600_000: ".dv .mxf",
}
_BYTES_PER_S = {name: rate for rate, names in _AUDIO.items() for name in names.split()}
DEFAULT_BYTES_PER_S = 16_000

_MANIFESTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
MANIFEST_EXTENSIONS = frozenset(_MANIFESTS) | {f"{one}.gz" for one in _MANIFESTS}
SIDECAR_EXTENSIONS = frozenset({".json", ".txt", ".cls"})  # beside the audio in a tar

# Named directly, these are a mistake rather than audio under an unusual name.
_NOT_AUDIO = """
    .txt .md .rst .pdf .doc .docx .xls .xlsx .html .xml .yaml .yml
    .py .ipynb .sh .c .h .cpp .js .ts .log .lock .toml .ini .cfg
    .jpg .jpeg .png .gif .bmp .svg .webp .tif .tiff
    .zip .7z .rar .gz .bz2 .xz .zst .npy .npz .pkl .pt .pth .bin
    .safetensors .h5 .hdf5 .db .sqlite .arrow .feather .tfrecord
    .mid .midi .lab .srt .vtt .textgrid .cue .m3u .cls
"""
NOT_AUDIO_EXTENSIONS = frozenset(_NOT_AUDIO.split())


def extension(name: str) -> str:
    """Return the last extension of a file's or member's name in lower case with its dot, or ""."""
    base = name.rpartition("/")[2]
    stem, dot, tail = base.rpartition(".")
    return f".{tail.lower()}" if dot and stem else ""


def manifest_extension(name: str) -> str:
    """Return the ending of a text manifest, like ``.csv`` or ``.csv.gz``; "" if it is none."""
    stem = name[: -len(".gz")] if name.lower().endswith(".gz") else name
    ending = extension(stem) + name[len(stem) :].lower()
    return ending if ending in MANIFEST_EXTENSIONS else ""


def is_audio_name(name: str) -> bool:
    """Return whether a name has an audio or video extension and is not a shadow file's."""
    return extension(name) in _BYTES_PER_S and not is_shadow_name(name)


def is_shadow_name(name: str) -> bool:
    """Return whether a file only keeps another's attributes, as macOS writes them."""
    return name.rpartition("/")[2].startswith("._")


def is_tar_name(name: str) -> bool:
    """Return whether a name ends in ``.tar``, ``.tar.gz`` or ``.tgz``."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def guess_duration_s(name: str, size: int | None) -> float:
    """Guess the seconds of audio in a file from its extension and its size in bytes."""
    return (size or 0) / _BYTES_PER_S.get(extension(name), DEFAULT_BYTES_PER_S)


@dataclass(frozen=True)
class WindowEstimate:
    """Guesses the number of windows before anything is decoded."""

    window_s: float
    hop_s: float

    def of_duration(self, duration_s: float) -> int:
        """Return the windows that cover ``duration_s`` seconds; at least 1."""
        return 1 + max(0, math.ceil((duration_s - self.window_s) / self.hop_s))

    def of_file(self, name: str, size: int | None) -> int:
        """Guess the windows of a file from its extension and its size in bytes; at least 1."""
        return self.of_duration(guess_duration_s(name, size))
