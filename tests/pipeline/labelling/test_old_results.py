"""A result that an earlier version began: it is read, verified and continued as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import earmark
from pipeline.cli import main as cli
from tests.support.audio_factory import encode, noise, write_noise
from tests.support.old_results import make_old

SAID = "is continued without the new columns of clips: warning_kinds"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two whole clips, one that is cut, and one that is no audio."""
    for index in range(2):
        write_noise(tmp_path / "in" / f"{index}.wav", seed=index)
    whole = encode(noise(2.0), 16_000, "wav")
    (tmp_path / "in" / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "none.wav").write_bytes(b"no audio at all")
    return tmp_path / "in"


@pytest.fixture
def label(folder: Path, tiny_model: Path) -> list[str]:
    """The command that labels the folder, to go on with other options."""
    out = str(folder.parent / "out")
    options = ["--device", "cpu", "--set", "units.windows=2", "--max-failed", "1"]
    return ["label", str(folder), "-o", out, "-m", str(tiny_model), *options]


def columns_of(out: Path) -> set[tuple[str, ...]]:
    return {tuple(pq.read_schema(path).names) for path in (out / "clips").iterdir()}


def test_an_old_result_is_read_verified_and_continued(
    label: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "out"
    assert cli.main(label) == 0
    (new_columns,) = columns_of(out)
    make_old(out)
    (old_columns,) = columns_of(out)
    assert set(new_columns) - set(old_columns) == {"warning_kinds"}
    assert cli.main(["verify", str(out)]) == 0
    assert earmark.read_result(str(out)).num_rows == 3

    write_noise(folder / "more.wav", seed=9)
    capsys.readouterr()
    assert cli.main(label) == 0
    said = capsys.readouterr().err
    assert said.count(SAID) == 1
    assert "Clips by best label (without 3 that an earlier version labelled): " in said
    assert "Failures by cause: 1 of an earlier version." in said
    assert "To retry: --retry-failed" in said
    assert columns_of(out) == {old_columns}
    assert earmark.read_result(str(out)).num_rows == 4
    run = json.loads((out / "run.json").read_text())
    assert (run["schema_version"], run["totals"]["counted_clips"]) == (1, 1)
    assert cli.main(["verify", str(out)]) == 0

    # Rows say what the commits do not.
    capsys.readouterr()
    assert cli.main(["summary", str(out)]) == 0
    said = capsys.readouterr().out
    assert "4 clips" in said
    assert "1 of 4 clips with a warning; see" in said
    assert "Failures by cause: 1 NotAudio" in said


def test_started_anew_it_has_the_new_columns(
    label: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "out"
    assert cli.main(label) == 0
    (columns,) = columns_of(out)
    make_old(out)
    capsys.readouterr()
    assert cli.main([*label, "--overwrite"]) == 0
    assert SAID not in capsys.readouterr().err
    assert columns_of(out) == {columns}
    assert json.loads((out / "run.json").read_text())["schema_version"] == 2


def test_a_column_of_a_later_version_is_not_lost(
    label: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "out"
    assert cli.main(label) == 0
    for path in (out / "_commits").iterdir():
        commit = json.loads(path.read_text())
        path.write_text(json.dumps({**commit, "optional_columns": ["mood", "warning_kinds"]}))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert cli.main(label) == 2
    assert "has a column mood, which this version of Earmark does not" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
