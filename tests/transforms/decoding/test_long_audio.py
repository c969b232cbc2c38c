"""Long recordings and segments: every window scored as transformers scores the same samples.

What is expected is made here by other means, from the contract alone: soundfile decodes the whole
file, the segment's frames are sliced, the channels averaged, soxr resamples in one go, and the
windows are sliced by hand.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import soxr
import torch
import transformers

from pipeline.config.label import RunConfig
from pipeline.labelling.run import run_label
from pipeline.result.verify import run_verify
from tests.support import audio_factory
from tests.support.audio_factory import Samples
from tests.support.labelling import read_rows
from tests.support.model_factory import write_transformers_model

RATE_HZ = 16_000
FULL = 164_080  # samples in 1024 frames of 25 ms, every 10 ms: 10.255 s
LONG_S = 65.0
MIN_TAIL = 0.1


@dataclass(frozen=True)
class Cutting:
    """Window and hop of a run in samples at 16 kHz, and the model's activation."""

    window: int
    hop: int
    activation: str
    config: dict[str, Any]

    def starts(self, num_samples: int) -> list[int]:
        """Yield windows one after another until the clip is covered, as the contract says."""
        starts = [0]
        while (end := starts[-1] + self.window) < num_samples:
            next_is_full = end + self.hop <= num_samples
            if next_is_full or num_samples - end >= MIN_TAIL * self.window:
                starts.append(starts[-1] + self.hop)
            else:
                starts.append(num_samples - self.window)
        return starts


CUTTINGS = {
    "one after another": Cutting(FULL, FULL, "sigmoid", {}),
    "shorter than the model's, overlapping unevenly, softmax": Cutting(
        5 * RATE_HZ,
        3 * RATE_HZ,
        "softmax",
        {"window": {"length_s": 5.0, "hop_s": 3.0}, "model": {"activation": "softmax"}},
    ),
}


# Segments as a manifest names them: start_s and end_s, offset and duration.
SEGMENTS = [
    (0.0, 3.2),
    (1.2345, 14.0),
    (7.001, 30.4021),
    (41.37, None),
    (None, 11.0),
    (44.44, 64.9),
    (64.95, None),  # in the last page of the Ogg file, where libsndfile loses its place
]
OFFSETS = [(3.3, 12.5), (0.5, 10.255), (50.02, 4.0)]


class Source(NamedTuple):
    """A file, or a segment of it; an end of None is the file's."""

    path: Path
    start_s: float | None = None
    end_s: float | None = None


class Expected(NamedTuple):
    """The expected row of a window."""

    start_s: float
    end_s: float
    scores: np.ndarray
    embedding: np.ndarray


@pytest.fixture(scope="module")
def recording(esc10: list[Path]) -> Samples:
    """65 s of real recordings at 44.1 kHz, different in each channel; shape (num_samples, 2)."""
    num_samples = round(LONG_S * 44_100)
    channels = []
    for first in (0, 7):
        paths = esc10[first::23]
        clips = [soundfile.read(path, dtype="float32")[0] for path in paths]
        channels.append(np.concatenate(clips)[:num_samples])
    return np.clip(0.9 * np.stack(channels, axis=1), -1.0, 1.0).astype(np.float32)


def at_rate(recording: Samples, rate_hz: int) -> Samples:
    return np.clip(soxr.resample(recording, 44_100, rate_hz), -1.0, 1.0)


def cases(recording: Samples) -> Iterator[tuple[str, Samples, int, str]]:
    """The name, samples, rate and format of every file."""
    yield "stereo_44100.wav", recording, 44_100, "wav"
    yield "stereo_48000.flac", at_rate(recording, 48_000), 48_000, "flac"
    yield "mono_8000.wav", at_rate(recording, 8_000)[:, :1], 8_000, "wav"
    yield "stereo_22050.aiff", at_rate(recording, 22_050), 22_050, "aiff"
    yield "stereo_48000.mp3", at_rate(recording, 48_000), 48_000, "mp3"
    yield "stereo_44100.ogg", recording, 44_100, "ogg"
    exact = at_rate(recording, RATE_HZ)
    for name, num_samples in LENGTHS.items():
        yield f"{name}.wav", exact[:num_samples], RATE_HZ, "wav"
    yield "ten_seconds_44100.wav", recording[: 441_000 + 5], 44_100, "wav"


LENGTHS = {
    "one_frame": 400,
    "one_window": FULL,
    "one_window_and_a_sample": FULL + 1,
    "ten_seconds_and_a_bit": 160_000 + 7,
    "short_tail": 2 * FULL + 16_407,  # a tenth of the window is 16,408 samples
    "long_tail": 2 * FULL + 16_408,
    "three_windows": 3 * FULL,
    "five_seconds": 80_000,
    "ten_seconds": 160_000,
    "five_seconds_and_a_short_tail": 80_000 + 7_999,
    "five_seconds_and_a_long_tail": 80_000 + 8_000,
}


@pytest.fixture(scope="module")
def folder(recording: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("long")
    for name, samples, rate_hz, format_name in cases(recording):
        audio_factory.write(target / name, samples, rate_hz, format_name)
    return target


@pytest.fixture(scope="module")
def sources(folder: Path) -> list[Source]:
    """All sources: the files and their segments."""
    files = sorted(folder.iterdir())
    found = [Source(path) for path in files]
    for path in (path for path in files if path.name.startswith("stereo")):
        found += [Source(path, *segment) for segment in SEGMENTS]
        found += [Source(path, start_s, start_s + length_s) for start_s, length_s in OFFSETS]
    return found


@pytest.fixture(scope="module")
def manifests(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The segments in a manifest: with start_s and end_s, and with offset and duration."""
    target = tmp_path_factory.mktemp("manifests")
    paths = sorted(folder.glob("stereo*"))
    for name, columns, spans in (
        ("segments.csv", ["uri", "start_s", "end_s"], SEGMENTS),
        ("offsets.csv", ["audio_filepath", "offset", "duration"], OFFSETS),
    ):
        with (target / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([path, *span] for path in paths for span in spans)
    return sorted(target.iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformers_model(tmp_path_factory.mktemp("transformers-model"))


Rows = dict[Source, tuple[dict[str, Any], list[dict[str, Any]]]]


class Results(NamedTuple):
    """The rows and the windows' settings of a run."""

    cutting: Cutting
    rows: Rows


@pytest.fixture(scope="module", params=CUTTINGS)
def results(
    request: pytest.FixtureRequest,
    folder: Path,
    manifests: list[Path],
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    """One run over all sources, with each source's rows of ``clips`` and ``windows``."""
    cutting = CUTTINGS[request.param]
    output = tmp_path_factory.mktemp("out") / "out"
    config = RunConfig.model_validate(
        {
            "inputs": [str(path) for path in (folder, *manifests)],
            "output": str(output),
            "quiet": True,
            "max_failed": 0.0,
            "labels": {"scores": True},
            "inference": {"precision": "fp32", "device": "cpu"},
            **cutting.config,
            "model": {"name": str(model), **cutting.config.get("model", {})},
        }
    )
    assert run_label(config, []) == 0
    assert run_verify(str(output), quiet=True) == 0
    windows: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(output, "windows"):
        windows.setdefault(row["clip_id"], []).append(row)
    rows = {
        Source(Path(row["uri"]), row["start_s"], row["end_s"]): (
            row,
            sorted(windows.pop(row["clip_id"]), key=lambda row: row["window_index"]),
        )
        for row in read_rows(output, "clips")
    }
    assert windows == {}
    return Results(cutting, rows)


@functools.cache
def decoded(path: Path) -> tuple[Samples, int]:
    return soundfile.read(path, dtype="float32", always_2d=True)


@functools.cache
def resampled(source: Source) -> Samples:
    """Return a source's samples at 16 kHz, mono."""
    samples, rate_hz = decoded(source.path)
    stop = None if source.end_s is None else round(source.end_s * rate_hz)
    cut = samples[round((source.start_s or 0.0) * rate_hz) : stop]
    return soxr.resample(cut.mean(axis=1), rate_hz, RATE_HZ)


class Reference:
    """Scores of transformers for windows cut here."""

    def __init__(self, folder: Path) -> None:
        self._model = transformers.ASTForAudioClassification.from_pretrained(folder).eval()
        self._extractor = transformers.ASTFeatureExtractor.from_pretrained(folder)

    def __call__(self, source: Source, cutting: Cutting) -> list[Expected]:
        samples = resampled(source)
        starts = cutting.starts(len(samples))
        cuts = [samples[start : start + cutting.window] for start in starts]
        inputs = self._extractor(cuts, sampling_rate=RATE_HZ, return_tensors="pt")
        with torch.inference_mode():
            embeddings = self._model.audio_spectrogram_transformer(**inputs).pooler_output
            logits = self._model.classifier(embeddings)
            scores = logits.sigmoid() if cutting.activation == "sigmoid" else logits.softmax(dim=1)
        offset_s = source.start_s or 0.0
        return [
            Expected(
                offset_s + start / RATE_HZ,
                offset_s + (start + len(cut)) / RATE_HZ,
                scores[index].numpy(),
                embeddings[index].numpy(),
            )
            for index, (start, cut) in enumerate(zip(starts, cuts, strict=True))
        ]


@pytest.fixture(scope="module")
def expected(results: Results, sources: list[Source], model: Path) -> dict[Source, list[Expected]]:
    """The expected rows of each source, for the windows of the run."""
    reference = Reference(model)
    return {source: reference(source, results.cutting) for source in sources}


def test_each_window_is_scored_as_transformers_scores_it(
    results: Results, expected: dict[Source, list[Expected]]
) -> None:
    assert results.rows.keys() == expected.keys()
    for source, wanted in expected.items():
        clip, windows = results.rows[source]
        assert clip["num_windows"] == len(windows) == len(wanted), source
        assert [row["window_index"] for row in windows] == list(range(len(windows)))
        for column in Expected._fields:
            np.testing.assert_allclose(
                [row[column] for row in windows],
                [getattr(window, column) for window in wanted],
                atol=1e-9 if column.endswith("_s") else 1e-4,
                rtol=0,
                err_msg=f"{column} of {source}",
            )


def test_a_clip_sums_up_its_windows(
    results: Results, expected: dict[Source, list[Expected]]
) -> None:
    for source, windows in expected.items():
        clip, _ = results.rows[source]
        scores = np.stack([window.scores for window in windows])
        whole = scores.max(axis=0) if results.cutting.activation == "sigmoid" else scores.mean(0)
        np.testing.assert_allclose(clip["scores"], whole, atol=1e-4, err_msg=str(source))
        embedding = np.average(
            [window.embedding for window in windows],
            axis=0,
            weights=[window.end_s - window.start_s for window in windows],
        )
        np.testing.assert_allclose(clip["embedding"], embedding, atol=1e-4, err_msg=str(source))


def test_the_last_window_ends_where_the_audio_does(results: Results, sources: list[Source]) -> None:
    for source in sources:
        clip, windows = results.rows[source]
        samples, rate_hz = decoded(source.path)
        file_end_s = len(samples) / rate_hz
        end_s = file_end_s if source.end_s is None else source.end_s
        assert windows[0]["start_s"] == (source.start_s or 0.0)
        # The resampler rounds to whole samples, once at each end.
        assert windows[-1]["end_s"] == pytest.approx(end_s, abs=2 / RATE_HZ), source
        assert clip["duration_s"] == pytest.approx(end_s - windows[0]["start_s"], abs=1 / rate_hz)
        assert clip["warning"] is None
