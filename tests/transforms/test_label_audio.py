"""``LabelAudio`` in a pipeline of one's own: URIs in, rows and failures out, as dictionaries."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow.parquet as pq
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing import test_pipeline
from apache_beam.testing.util import assert_that, equal_to

from pipeline.labelling.run import run_label
from tests.support import audio_factory
from tests.support.labelling import assert_same_rows, small_config
from transforms.beam_yaml import LabelAudioRows
from transforms.inference.backbones import InferenceSettings
from transforms.label_audio import LabelAudio, LabelSettings, make_settings, unit_of_files
from transforms.models.ast.checkpoints import resolve_model

Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good files, one of them of three windows, and one that is no audio."""
    folder: Path = tmp_path_factory.mktemp("audio")
    audio_factory.write(folder / "a.wav", audio_factory.noise(1.0), 16_000)
    stereo = audio_factory.noise(25.0, 22_050, num_channels=2, seed=1)
    audio_factory.write(folder / "b #1.flac", stereo, 22_050, "flac")
    audio_factory.write(folder / "c.ogg", audio_factory.tone(3.0, 44_100), 44_100, "ogg")
    (folder / "d.wav").write_bytes(b"this is no audio" * 100)
    return folder


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> LabelSettings:
    inference = InferenceSettings(precision="fp32", device="cpu", batch_size=2)
    return make_settings(resolve_model(str(tiny_model)), inference=inference)


@pytest.fixture(scope="module")
def labelled(
    folder: Path, settings: LabelSettings, tmp_path_factory: pytest.TempPathFactory
) -> Rows:
    """What ``LabelAudio`` gives for the folder's files, and for one that is not there."""
    target = tmp_path_factory.mktemp("rows")
    uris = [*map(str, sorted(folder.iterdir())), f"file://{folder}/none.wav"]
    with test_pipeline.TestPipeline(runner=FnApiRunner()) as pipeline:
        found = pipeline | beam.Create(uris) | LabelAudio(settings)
        for name, rows in found._asdict().items():
            _ = (
                rows
                | f"{name} to JSON" >> beam.Map(json.dumps)
                | f"Write {name}"
                >> beam.io.WriteToText(str(target / name), shard_name_template="", num_shards=1)
            )
    return {
        name: [json.loads(line) for line in (target / name).read_text().splitlines()]
        for name in ("windows", "clips", "failures")
    }


@pytest.fixture(scope="module")
def expected(folder: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``earmark label`` makes of the same files."""
    out: Path = tmp_path_factory.mktemp("label") / "out"
    config = small_config(tiny_model, out, folder, max_failed=1.0, units={})
    assert run_label(config, []) == 0
    return out


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["clip_id"], row.get("window_index", 0)))


@pytest.mark.parametrize(("part", "count"), [("windows", 5), ("clips", 3)])
def test_rows_equal_those_of_the_command(
    labelled: Rows, expected: Path, part: str, count: int
) -> None:
    found = in_order(labelled[part])
    wanted = in_order(pq.read_table(expected / part).to_pylist())
    assert len(found) == len(wanted) == count
    assert_same_rows(found, wanted)


def test_a_bad_file_among_good_ones_is_a_failure(
    labelled: Rows, expected: Path, folder: Path
) -> None:
    bad, missing = in_order(labelled["failures"])
    (wanted,) = pq.read_table(expected / "errors").to_pylist()
    assert {**bad, "unit_id": None} == {**wanted, "unit_id": None}
    assert (missing["clip_id"], missing["stage"]) == (f"{folder}/none.wav", "read")
    assert missing["error_type"] == "FileNotFoundError"
    assert str(folder / "none.wav") in missing["message"]


def test_clip_ids_equal_those_of_the_command(folder: Path) -> None:
    unit = unit_of_files([f"{folder}/b #1.flac", "https://host/x.wav?X-Amz-Signature=secret"])
    local, remote = unit.items
    assert local.clip_id == f"{folder}/b %231.flac"
    assert (remote.clip_id, remote.uri) == ("https://host/x.wav", "https://host/x.wav")
    assert remote.url.endswith("secret")
    assert "secret" not in repr(unit)


def test_each_channel_is_a_clip_where_it_is_asked_for(
    folder: Path, settings: LabelSettings, tiny_model: Path
) -> None:
    each = dataclasses.replace(settings.decode, channel="each")
    uris = [f"{folder}/{name}" for name in ("a.wav", "b #1.flac", "d.wav")]
    with test_pipeline.TestPipeline(runner=FnApiRunner()) as pipeline:
        transform = LabelAudio(dataclasses.replace(settings, decode=each))
        found = pipeline | beam.Create(uris) | transform
        for name, wanted in (
            ("clips", ["a.wav!1", "b %231.flac!1", "b %231.flac!2"]),
            ("windows", ["a.wav!1", *["b %231.flac!1"] * 3, *["b %231.flac!2"] * 3]),
            ("failures", ["d.wav"]),
        ):
            ids = getattr(found, name) | f"Ids of {name}" >> beam.Map(lambda row: row["clip_id"])
            assert_that(ids, equal_to([f"{folder}/{one}" for one in wanted]), f"Check {name}")
    loudest = LabelAudioRows(model=str(tiny_model), device="cpu", channel="loudest")
    assert loudest._settings.decode.channel == "loudest"
