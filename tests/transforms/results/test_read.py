"""A result is read as Arrow tables, through the package's public names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
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


def test_a_folder_without_commits_and_an_unknown_table_are_errors(
    result: str, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="has no commits; expected the --output of earmark label"):
        earmark.read_result(str(tmp_path))
    with pytest.raises(ValueError, match="table is 'labels'; expected one of windows, clips, err"):
        earmark.read_result(result, "labels")


def with_schema(result: str, copy: Path, version: int | None) -> Path:
    """Copy a result, with another schema version in its run.json, or none."""
    shutil.copytree(result, copy)
    run = json.loads((copy / "run.json").read_text())
    assert run.pop("schema_version") == 2
    if version is not None:
        run["schema_version"] = version
    (copy / "run.json").write_text(json.dumps(run))
    return copy


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [
        ("label", "IN", "--output", "OUT"),
        ("label", "IN", "--output", "OUT", "--overwrite"),
        ("plan", "IN", "--output", "OUT"),
        ("verify", "OUT"),
        ("export", "OUT", "--format", "csv"),
        ("evaluate", "OUT"),
    ],
    ids=" ".join,
)
def test_a_result_of_another_schema_is_refused(
    arguments: tuple[str, ...], result: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = with_schema(result, tmp_path / "out", 3)
    before = content(out)
    places = {"IN": str(Path(result).parent / "in"), "OUT": str(out)}
    assert cli.main([places.get(argument, argument) for argument in arguments]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{out} has schema version 3, and this version of Earmark reads 1 and 2; use the" in said
    assert "or label into a new folder" in said
    assert content(out) == before


def test_a_part_of_another_schema_is_no_table(result: str, tmp_path: Path) -> None:
    out = shutil.copytree(result, tmp_path / "out")
    (out / "run.json").unlink()
    for path in (out / "clips").iterdir():
        table = pq.read_table(path)
        footer = {**table.schema.metadata, b"earmark.schema_version": b"3"}
        pq.write_table(table.replace_schema_metadata(footer), path)
    assert earmark.read_result(str(out), "windows").num_rows == 6
    with pytest.raises(OutputError, match=r"\.parquet has schema version 3"):
        earmark.read_result(str(out), "clips")


def test_a_result_that_names_no_schema_has_the_first(result: str, tmp_path: Path) -> None:
    out = with_schema(result, tmp_path / "out", None)
    assert earmark.read_result(str(out)).num_rows == 3
    assert cli.main(["verify", str(out)]) == 0
