"""A result is read as Arrow tables, through the package's public names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import earmark
from pipeline.cli import main as cli
from tests.support.audio_factory import noise, write
from transforms.errors import OutputError


@pytest.fixture(scope="module")
def result(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("read")
    (folder / "in").mkdir()
    for index in range(3):
        write(folder / "in" / f"{index}.wav", noise(11.0, 16_000, seed=index), 16_000)
    (folder / "in" / "broken.wav").write_bytes(b"RIFF nothing")
    arguments = ["label", str(folder / "in"), "-o", str(folder / "out"), "-m", str(tiny_model)]
    options = ["--device", "cpu", "--set", "units.windows=2", "--max-failed", "1"]
    assert cli.main([*arguments, *options]) == 0
    return str(folder / "out")


def test_all_units_are_read(result: str) -> None:
    clips = earmark.read_result(result)
    names = [Path(uri).name for uri in clips["uri"].to_pylist()]
    assert sorted(names) == ["0.wav", "1.wav", "2.wav"]
    windows = earmark.read_result(result, "windows", ["clip_id", "start_s"])
    assert windows.column_names == ["clip_id", "start_s"]
    assert windows.num_rows == sum(clips["num_windows"].to_pylist()) == 6
    (failure,) = earmark.read_result(result, "errors").to_pylist()
    assert Path(failure["uri"]).name == "broken.wav"


def test_what_is_not_committed_is_not_read(result: str, tmp_path: Path) -> None:
    leftover = Path(result) / "clips" / "leftover.parquet"
    leftover.write_bytes(b"not Parquet")
    try:
        assert earmark.read_result(result).num_rows == 3
    finally:
        leftover.unlink()


def test_a_replaced_unit_that_a_killed_run_left_behind_is_not_read_twice(
    result: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(result, tmp_path / "out")
    old = sorted((folder / "_commits").iterdir())[0]
    new = "f" * 20
    commit = json.loads(old.read_text()) | {"unit_id": new, "replaces": [old.stem]}
    (folder / "_commits" / f"{new}.json").write_text(json.dumps(commit))
    for table in commit["parts"]:
        part = folder / table / f"{old.stem}.parquet"
        shutil.copy(part, part.with_stem(new))
    clips = earmark.read_result(str(folder))
    assert sorted(clips["uri"].to_pylist()) == sorted(
        earmark.read_result(result)["uri"].to_pylist()
    )


def test_a_folder_without_commits_and_an_unknown_table_are_errors(
    result: str, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="has no commits; expected the --output of earmark label"):
        earmark.read_result(str(tmp_path))
    with pytest.raises(ValueError, match="table is 'labels'; expected one of windows, clips, err"):
        earmark.read_result(result, "labels")
