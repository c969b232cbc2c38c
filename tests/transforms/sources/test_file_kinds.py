"""Kinds of files by their names."""

from __future__ import annotations

import contextlib

import av
import pytest

from transforms.sources import file_kinds
from transforms.sources.file_kinds import (
    MANIFEST_EXTENSIONS,
    NOT_AUDIO_EXTENSIONS,
    WindowEstimate,
    extension,
    guess_duration_s,
    is_audio_name,
    is_tar_name,
)

# Other names of formats that FFmpeg reads under the names that it lists.
OTHER_NAMES = set(
    ".3gpp .awb .bwf .dff .dsf .f4a .f4b .m4r .mp1 .mp4a .mpga .oggflac "
    ".ogx .qcp .qt .rf64 .snd .wave .weba".split()
)


def test_every_audio_extension_is_of_a_format_that_the_decoders_read() -> None:
    known = set(OTHER_NAMES)
    for name in av.formats_available:
        for mode in "rw":
            with contextlib.suppress(ValueError):
                known |= {f".{ending}" for ending in av.ContainerFormat(name, mode).extensions}
    assert known >= file_kinds._BYTES_PER_S.keys()


def test_an_extension_is_of_one_kind() -> None:
    audio = set(file_kinds._BYTES_PER_S)
    assert len(audio) == sum(len(names.split()) for names in file_kinds._AUDIO.values())
    assert audio.isdisjoint(MANIFEST_EXTENSIONS | NOT_AUDIO_EXTENSIONS | {".parquet", ".tar"})
    assert MANIFEST_EXTENSIONS.isdisjoint(NOT_AUDIO_EXTENSIONS)


@pytest.mark.parametrize(
    ("name", "ending", "is_audio", "is_tar"),
    [
        ("a.wav", ".wav", True, False),
        ("dir.wav/A.FLAC", ".flac", True, False),
        ("dir/._a.wav", ".wav", False, False),
        ("a.b.mp3", ".mp3", True, False),
        (".wav", "", False, False),
        ("dir.wav/a", "", False, False),
        ("script.ts", ".ts", False, False),
        ("x.tar", ".tar", False, True),
        ("x.TAR.gz", ".gz", False, True),
        ("x.tgz", ".tgz", False, True),
        ("x.gz", ".gz", False, False),
    ],
)
def test_names_tell_the_kind(name: str, ending: str, is_audio: bool, is_tar: bool) -> None:
    assert (extension(name), is_audio_name(name), is_tar_name(name)) == (ending, is_audio, is_tar)


def test_durations_and_windows_are_guessed_from_the_size() -> None:
    assert guess_duration_s("a.wav", 882_000) == 10.0
    assert guess_duration_s("a.unknown", 160_000) == 10.0
    assert guess_duration_s("a.wav", None) == 0.0
    estimate = WindowEstimate(window_s=10.0, hop_s=5.0)
    assert estimate.of_file("a.wav", 882_001) == 2
    assert estimate.of_file("a.wav", None) == 1
