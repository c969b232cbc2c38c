"""The main job on real recordings: every kind of input gives the labels of transformers."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import soxr
import torch
import transformers

from pipeline.labelling.run import run_label
from pipeline.result.verify import run_verify
from tests.support.labelling import read_rows, small_config
from tests.support.model_factory import write_transformers_model

CLIPS_PER_SHARD = 16


@pytest.fixture(scope="module")
def transformers_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder written by transformers, random in every parameter."""
    return write_transformers_model(tmp_path_factory.mktemp("transformers-model"))


def label(model: Path, inputs: list[Path], output: Path) -> dict[str, dict[str, Any]]:
    """Run the main job and return the rows of ``clips`` by file name."""
    inference = {"precision": "fp32", "device": "cpu"}
    changes = {"inference": inference, "units": {}, "decode": {}, "labels": {"scores": True}}
    config = small_config(model, output, *inputs, **changes)
    assert run_label(config, []) == 0
    assert run_verify(str(output), quiet=True) == 0
    return {file_name(row): row for row in read_rows(output, "clips")}


def file_name(row: dict[str, Any]) -> str:
    """Return the recording's name, from the column that holds it for this kind of input."""
    if row["row"] is not None:
        return str(json.loads(row["metadata"])["name"])
    return Path(row["member"] or row["uri"]).name


@pytest.fixture(scope="module")
def from_files(
    esc10: list[Path], transformers_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Label all recordings as loose files: the reference for the other kinds of input."""
    output = tmp_path_factory.mktemp("files") / "out"
    return label(transformers_model, [esc10[0].parent], output)


@pytest.fixture(scope="module")
def some(esc10: list[Path]) -> list[Path]:
    """Return every fifth recording, for what would take long with all of them."""
    return esc10[::5]


@pytest.fixture(scope="module")
def classes(esc10: list[Path]) -> dict[str, str]:
    with open(esc10[0].parent.parent / "esc10.csv", newline="") as file:
        return {row["filename"]: row["label"] for row in csv.DictReader(file)}


def assert_same_labels(
    actual: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]
) -> None:
    assert actual.keys() == expected.keys()
    names = sorted(expected)
    for column, tolerance in (("scores", 1e-5), ("embedding", 1e-4)):
        np.testing.assert_allclose(
            [actual[name][column] for name in names],
            [expected[name][column] for name in names],
            atol=tolerance,
        )
    for name in names:
        assert actual[name]["content_sha256"] == expected[name]["content_sha256"]
        assert actual[name]["num_windows"] == expected[name]["num_windows"] == 1


def test_scores_equal_those_of_transformers(
    from_files: dict[str, dict[str, Any]], some: list[Path], transformers_model: Path
) -> None:
    model = transformers.ASTForAudioClassification.from_pretrained(transformers_model).eval()
    extractor = transformers.ASTFeatureExtractor.from_pretrained(transformers_model)
    assert len(from_files) == 320
    for start in range(0, len(some), 32):
        paths = some[start : start + 32]
        clips = [soundfile.read(path, dtype="float32", always_2d=True) for path in paths]
        mono = [soxr.resample(samples.mean(axis=1), rate_hz, 16_000) for samples, rate_hz in clips]
        inputs = extractor(mono, sampling_rate=16_000, return_tensors="pt")
        with torch.inference_mode():
            expected = model(**inputs).logits.sigmoid().numpy()
        actual = np.array([from_files[path.name]["scores"] for path in paths])
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_rows_describe_the_recordings(from_files: dict[str, dict[str, Any]]) -> None:
    for row in from_files.values():
        info = soundfile.info(row["uri"])
        assert (row["sample_rate_hz"], row["channels"]) == (info.samplerate, info.channels)
        assert row["duration_s"] == pytest.approx(info.duration, abs=1e-6)
        assert row["warning"] is None
        assert -120 < row["rms_dbfs"] < row["peak_dbfs"] <= 1


def write_tars(folder: Path, paths: list[Path], classes: dict[str, str]) -> Path:
    """Write shards with a ``.json`` for each recording; the first is compressed."""
    for start in range(0, len(paths), CLIPS_PER_SHARD):
        suffix = "tar.gz" if start == 0 else "tar"
        with tarfile.open(folder / f"{start:04}.{suffix}", f"w:{suffix[4:]}") as shard:
            for path in paths[start : start + CLIPS_PER_SHARD]:
                shard.add(path, path.name)
                text = json.dumps({"label": classes[path.name]}).encode()
                info = tarfile.TarInfo(f"{path.stem}.json")
                info.size = len(text)
                shard.addfile(info, io.BytesIO(text))
    return folder


def write_parquet(folder: Path, paths: list[Path], classes: dict[str, str]) -> Path:
    for start in range(0, len(paths), CLIPS_PER_SHARD):
        shard = paths[start : start + CLIPS_PER_SHARD]
        columns = {
            "audio": [{"bytes": path.read_bytes(), "path": path.name} for path in shard],
            "name": [path.name for path in shard],
            "label": [classes[path.name] for path in shard],
        }
        pq.write_table(pa.table(columns), folder / f"{start:04}.parquet", row_group_size=30)
    return folder


def write_manifest(folder: Path, paths: list[Path], classes: dict[str, str]) -> Path:
    rows = [f"{path},{classes[path.name]},{path.name[0]}\n" for path in paths]
    (folder / "manifest.csv").write_text("uri,labels,fold\n" + "".join(rows))
    return folder / "manifest.csv"


@pytest.mark.parametrize("write", [write_tars, write_parquet, write_manifest])
def test_every_kind_of_input_gives_the_same_labels_and_the_truth(
    write: Callable[[Path, list[Path], dict[str, str]], Path],
    from_files: dict[str, dict[str, Any]],
    some: list[Path],
    classes: dict[str, str],
    transformers_model: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "in").mkdir()
    inputs = write(tmp_path / "in", some, classes)
    rows = label(transformers_model, [inputs], tmp_path / "out")
    assert_same_labels(rows, {path.name: from_files[path.name] for path in some})
    assert {name: row["truth"] for name, row in rows.items()} == {
        path.name: [classes[path.name]] for path in some
    }
    if write is write_manifest:
        assert all(json.loads(row["metadata"]) == {"fold": name[0]} for name, row in rows.items())
