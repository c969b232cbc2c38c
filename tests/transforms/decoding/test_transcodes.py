"""The same recording gives the same labels in every lossless format."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.config.label import RunConfig
from pipeline.labelling.run import run_label
from tests.support.audio_factory import FORMATS, Format, Samples, encode, quantised

CLASSES = ("dog_bark", "rain", "clock_tick", "helicopter")

# Name: how it is written, and the extension it gets.
SIXTEEN_BITS: dict[str, tuple[Format, str]] = {
    "wav": (FORMATS["wav"], "wav"),
    "wavex": (FORMATS["wavex"], "wav"),
    "rf64": (FORMATS["rf64"], "wav"),
    "w64": (FORMATS["w64"], "w64"),
    "flac": (FORMATS["flac"], "flac"),
    "ogg_flac": (FORMATS["ogg_flac"], "oga"),
    "mkv_flac": (FORMATS["mkv"], "mkv"),
    "alac": (FORMATS["alac"], "m4a"),
    "caf_alac": (FORMATS["caf_alac"], "caf"),
    "aiff": (FORMATS["aiff"], "aiff"),
    "au": (FORMATS["au"], "au"),
    "caf": (FORMATS["caf"], "caf"),
    "wavpack": (FORMATS["wavpack"], "wv"),
}
TWENTY_FOUR_BITS: dict[str, tuple[Format, str]] = {
    "wav24": (FORMATS["wav24"], "wav"),
    "w64_24": (Format("soundfile", "W64", "PCM_24"), "w64"),
    "flac24": (FORMATS["flac24"], "flac"),
    # FFmpeg's encoder stores 24 bits of what it is given as 32.
    "alac24": (Format("av", "ipod", "alac", sample_format="s32p"), "m4a"),
    "caf_alac24": (Format("soundfile", "CAF", "ALAC_24"), "caf"),
    "aiff24": (Format("soundfile", "AIFF", "PCM_24"), "aiff"),
    "au24": (Format("soundfile", "AU", "PCM_24"), "au"),
    "caf24": (Format("soundfile", "CAF", "PCM_24"), "caf"),
    "wav32": (FORMATS["wav32"], "wav"),
    "wav_double": (FORMATS["wav_double"], "wav"),
}
# What a file holds, and what its name says.
MISNAMED = {"flac": "wav", "wav": "mp3", "alac": "flac", "aiff": "ogg", "flac24": "aiff"}
ALL = {**SIXTEEN_BITS, **TWENTY_FOUR_BITS}


@dataclass(frozen=True)
class Recording:
    """A real recording, decoded once.

    Attributes:
        name: Its file's stem.
        samples: Shape (num_samples, 1), within what 24 bits can hold.
        sample_rate_hz: Its rate.
    """

    name: str
    samples: Samples
    sample_rate_hz: int


@pytest.fixture(scope="module")
def recordings(esc10: list[Path]) -> list[Recording]:
    """One recording of each class: the first that decodes without exceeding full scale."""
    with (esc10[0].parent.parent / "esc10.csv").open(newline="") as lines:
        classes = {row["filename"]: row["label"] for row in csv.DictReader(lines)}
    found: dict[str, Recording] = {}
    for path in esc10:
        if classes[path.name] not in CLASSES or classes[path.name] in found:
            continue
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
        if np.abs(samples).max() < 0.999:
            found[classes[path.name]] = Recording(path.stem, samples, rate_hz)
    return [found[name] for name in CLASSES]


def transcode(recording: Recording, chosen: Format, channels: int, bits: int) -> bytes:
    samples = quantised(recording.samples, bits) if bits < 32 else recording.samples
    return encode(np.repeat(samples, channels, axis=1), recording.sample_rate_hz, chosen)


@pytest.fixture(scope="module")
def rows(
    recordings: list[Recording], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The rows of one run over every recording in every format, by file name."""
    folder = tmp_path_factory.mktemp("transcodes")
    for recording in recordings:
        for channels in (1, 2):
            name = f"{recording.name}.{channels}ch"
            content = transcode(recording, FORMATS["wav_float"], channels, 32)
            (folder / f"{name}.float.wav").write_bytes(content)
            for format_name, (chosen, extension) in ALL.items():
                bits = 16 if format_name in SIXTEEN_BITS else 24
                content = transcode(recording, chosen, channels, bits)
                (folder / f"{name}.{format_name}.{extension}").write_bytes(content)
                if channels == 1 and format_name in MISNAMED:
                    misnamed = f"{name}.{format_name}.misnamed.{MISNAMED[format_name]}"
                    (folder / misnamed).write_bytes(content)
    return label(tiny_model, folder, tmp_path_factory.mktemp("out") / "out")


def label(model: Path, folder: Path, output: Path) -> dict[str, dict[str, Any]]:
    config = RunConfig.model_validate(
        {
            "inputs": [str(folder)],
            "output": str(output),
            "quiet": True,
            "max_failed": 0.0,
            "model": {"name": str(model)},
            "labels": {"scores": True},
            "inference": {"precision": "fp32", "device": "cpu"},
        }
    )
    assert run_label(config, []) == 0
    found = [
        row for path in (output / "clips").iterdir() for row in pq.read_table(path).to_pylist()
    ]
    assert len(found) == len(list(folder.iterdir()))
    return {Path(row["uri"]).name: row for row in found}


def scores(rows: dict[str, dict[str, Any]], names: list[str]) -> np.ndarray:
    """Return every class's score of some files; shape (num_files, num_labels)."""
    return np.array([rows[name]["scores"] for name in names])


def names_of(recordings: list[Recording], channels: int, suffix: str) -> list[str]:
    return [f"{recording.name}.{channels}ch.{suffix}" for recording in recordings]


def file_suffix(format_name: str) -> str:
    return f"{format_name}.{ALL[format_name][1]}"


def test_the_model_tells_the_recordings_apart(
    rows: dict[str, dict[str, Any]], recordings: list[Recording]
) -> None:
    """They differ by ten times the tolerance below; otherwise agreement would prove nothing."""
    expected = scores(rows, names_of(recordings, 1, "float.wav"))
    for first in range(len(recordings)):
        for second in range(first):
            assert np.abs(expected[first] - expected[second]).max() > 0.01


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("format_name", TWENTY_FOUR_BITS)
def test_24_bits_give_the_scores_of_floats(
    rows: dict[str, dict[str, Any]], recordings: list[Recording], format_name: str, channels: int
) -> None:
    actual = scores(rows, names_of(recordings, channels, file_suffix(format_name)))
    expected = scores(rows, names_of(recordings, 1, "float.wav"))
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("format_name", SIXTEEN_BITS)
def test_16_bits_give_the_scores_of_floats_up_to_rounding(
    rows: dict[str, dict[str, Any]], recordings: list[Recording], format_name: str, channels: int
) -> None:
    actual = scores(rows, names_of(recordings, channels, file_suffix(format_name)))
    expected = scores(rows, names_of(recordings, 1, "float.wav"))
    np.testing.assert_allclose(actual, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("format_name", SIXTEEN_BITS)
def test_16_bits_are_the_same_16_bits_in_every_format(
    rows: dict[str, dict[str, Any]], recordings: list[Recording], format_name: str
) -> None:
    expected = scores(rows, names_of(recordings, 1, file_suffix("wav")))
    for channels in (1, 2):
        actual = scores(rows, names_of(recordings, channels, file_suffix(format_name)))
        np.testing.assert_allclose(actual, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("format_name", "extension"), MISNAMED.items())
def test_a_wrong_extension_changes_nothing(
    rows: dict[str, dict[str, Any]], recordings: list[Recording], format_name: str, extension: str
) -> None:
    misnamed = names_of(recordings, 1, f"{format_name}.misnamed.{extension}")
    named = names_of(recordings, 1, file_suffix(format_name))
    np.testing.assert_allclose(scores(rows, misnamed), scores(rows, named), atol=1e-6, rtol=0)
    for wrong, right in zip(misnamed, named, strict=True):
        assert rows[wrong]["content_sha256"] == rows[right]["content_sha256"]


def test_every_transcode_is_read_whole(
    rows: dict[str, dict[str, Any]], recordings: list[Recording]
) -> None:
    for recording in recordings:
        for name, row in rows.items():
            if name.startswith(f"{recording.name}."):
                channels = int(name.removeprefix(f"{recording.name}.")[0])
                assert (row["warning"], row["channels"]) == (None, channels), name
                assert row["duration_s"] == len(recording.samples) / recording.sample_rate_hz, name
