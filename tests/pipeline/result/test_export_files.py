"""Exports of one file: per clip, as a list of paths, to standard output, one table for Raven."""

from __future__ import annotations

import csv
import io
import os
import sys
from pathlib import Path

import pytest

from pipeline.result.export import run_export
from tests.support.unit_factory import commit_unit, make_item
from transforms.errors import EarmarkError, OutputError, UsageError

# The labels are Alpha (/m/a), "Beta, loud" (/m/b) and Gamma (no id); two of them are stored.
ALPHA, GAMMA = (0.5, 0.25, 0.125), (0.25, 0.75, 0.875)


@pytest.fixture
def result(tmp_path: Path) -> str:
    """A file of two windows, two segments of another, a tar member and a Parquet row."""
    output = str(tmp_path / "result")
    long = {"uri": "/audio/long.wav"}
    tar = {"uri": "/audio/t.tar", "member": "x.ogg"}
    row = {"uri": "/audio/p.parquet", "row": 7, "metadata": '{"path": "clips/dog.wav", "fold": 2}'}
    dog = make_item("/audio/a.wav", truth=("Alpha", "Gamma"), metadata='{"site": "Düne"}')
    commit_unit(
        output,
        "u1",
        [
            (dog, [(0.0, 10.0, ALPHA), (10.0, 12.0, GAMMA)]),
            (make_item("s1", start_s=0.0, end_s=12.0, **long), [(0.0, 12.0, ALPHA)]),
        ],
    )
    commit_unit(
        output,
        "u2",
        [
            (make_item("s2", start_s=12.0, end_s=24.0, **long), [(12.0, 24.0, GAMMA)]),
            (make_item("/audio/t.tar#x.ogg", **tar), [(0.0, 12.0, GAMMA)]),
            (make_item("/audio/p.parquet#row=7", **row), [(0.0, 12.0, ALPHA)]),
        ],
    )
    (tmp_path / "result" / "_SUCCESS").touch()
    return output


def rows_of(text: str) -> list[str]:
    return ["|".join(row) for row in csv.reader(io.StringIO(text, newline=""))]


def test_csv_per_clip_has_truth_metadata_and_the_original_name(
    result: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run_export(result, "csv", "-", per="clip", top_k=1) == 0
    out, err = capfdbinary.readouterr()
    assert err == b""
    assert rows_of(out.decode()) == [
        "clip_id|uri|member|row|start_s|end_s|label_index|label_id|label|score|path|truth|metadata",
        '/audio/a.wav|/audio/a.wav|||0|12|0|/m/a|Alpha|0.5||Alpha;Gamma|{"site": "Düne"}',
        "s1|/audio/long.wav|||0|12|0|/m/a|Alpha|0.5|||",
        "s2|/audio/long.wav|||12|24|2||Gamma|0.875|||",
        "/audio/t.tar#x.ogg|/audio/t.tar|x.ogg||0|12|2||Gamma|0.875|||",
        "/audio/p.parquet#row=7|/audio/p.parquet||7|0|12|0|/m/a|Alpha|0.5|clips/dog.wav||"
        '{"path": "clips/dog.wav", "fold": 2}',
    ]
    assert not (Path(result) / "export").exists()


A, LONG, TAR, ROW = "/audio/a.wav /audio/long.wav /audio/t.tar#x.ogg /audio/p.parquet#row=7".split()


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({}, [A, LONG, TAR, ROW]),
        ({"labels": ["Gamma"]}, [LONG, TAR]),
        ({"labels": ["/m/a"]}, [A, LONG, ROW]),
        ({"labels": ["Beta, loud"]}, []),
        ({"labels": ["Beta, loud"], "top_k": 2}, [A, LONG, TAR, ROW]),
        ({"labels": ["Beta, loud"], "threshold": 0.5}, [LONG, TAR]),
        ({"labels": ["Gamma", "Alpha"], "threshold": 0.6}, [LONG, TAR]),
        ({"threshold": 0.5}, [A, LONG, TAR, ROW]),
        ({"threshold": 0.51}, [LONG, TAR]),
    ],
)
def test_a_list_has_each_path_once(
    result: str,
    options: dict[str, object],
    paths: list[str],
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    assert run_export(result, "list", **options) == 0  # type: ignore[arg-type]
    out, err = capfdbinary.readouterr()
    assert out.decode().splitlines() == paths
    num_inside = sum("#" in path for path in paths)
    inside = f"{num_inside} of these lie in tars or Parquet files, named by their clip ids.\n"
    said = (inside if num_inside else "") if paths else "no clip has such a label\n"
    assert err.decode() == said
    assert run_export(result, "list", null=True, **options) == 0  # type: ignore[arg-type]
    assert capfdbinary.readouterr().out == "".join(f"{path}\0" for path in paths).encode()


def test_a_name_that_is_not_utf8_is_listed_as_it_is(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = os.fsencode(tmp_path) + b"/d\xfcne.wav"
    try:
        Path(os.fsdecode(path)).touch()
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    commit_unit(
        str(tmp_path / "out"), "u1", [(make_item(f"{tmp_path}/d%FCne.wav"), [(0.0, 12.0, ALPHA)])]
    )
    assert run_export(str(tmp_path / "out"), "list", null=True) == 0
    assert capfdbinary.readouterr().out == path + b"\0"
    assert run_export(str(tmp_path / "out"), "raven", "-", one_table=True, top_k=1) == 0
    assert b"\t" + path + b"\t" in capfdbinary.readouterr().out


def test_a_name_cannot_command_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_unit(str(tmp_path / "out"), "u1", [(make_item("/a\x1b[31m.wav"), [(0.0, 12.0, ALPHA)])])
    assert run_export(str(tmp_path / "out"), "list") == 0
    assert capsys.readouterr().out == "/a\x1b[31m.wav\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run_export(str(tmp_path / "out"), "list") == 0
    assert capsys.readouterr().out == "/a\\x1b[31m.wav\n"


@pytest.mark.parametrize(
    ("format", "output", "file"),
    [
        ("csv", "mine/dogs.csv", "mine/dogs.csv"),
        ("csv", "mine", "mine/labels.csv"),
        ("list", "dogs.txt", "dogs.txt"),
        ("list", "mine", "mine/paths.txt"),
        ("csv", None, "result/export/csv/labels.csv"),
    ],
)
def test_a_name_that_ends_like_a_file_is_one(
    result: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    format: str,
    output: str | None,
    file: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert run_export(result, format, output, labels=["Gamma"]) == 0
    assert {path for path in tmp_path.rglob("*") if path.is_file()} - before == {tmp_path / file}
    said = {"csv": "3 labels", "list": "2 paths"}[format]
    assert capsys.readouterr().err.endswith(f"exported {said} to {tmp_path / file}\n")


def test_one_raven_table_says_where_each_selection_lies(result: str) -> None:
    assert run_export(result, "raven", one_table=True, top_k=1) == 0
    text = (Path(result) / "export" / "raven" / "labels.selections.txt").read_text()
    lines = [line.split("\t") for line in text.splitlines()]
    assert lines[0][-3:] == ["Begin Path", "Begin File", "File Offset (s)"]
    assert lines[0][3:5] == ["Begin Time (s)", "End Time (s)"]
    # Selection, begin, end, label; where in which file. The files follow one another.
    assert [[line[i] for i in (0, 3, 4, 7, 9, 10, 11)] for line in lines[1:]] == [
        ["1", "0.000000", "10.000000", "Alpha", A, "a.wav", "0.000000"],
        ["2", "10.000000", "12.000000", "Gamma", A, "a.wav", "10.000000"],
        ["3", "12.000000", "24.000000", "Alpha", LONG, "long.wav", "0.000000"],
        ["4", "24.000000", "36.000000", "Gamma", LONG, "long.wav", "12.000000"],
        ["5", "36.000000", "48.000000", "Alpha", ROW, "dog.wav", "0.000000"],
        ["6", "48.000000", "60.000000", "Gamma", TAR, "t.tar#x.ogg", "0.000000"],
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "csv", "labels": ["Gama"]}, UsageError, "--label is 'Gama'.*'Gamma'"),
        ({"format": "csv", "labels": ["zzz"]}, UsageError, "it has Alpha, Beta, loud, Gamma"),
        ({"format": "raven", "output": "-"}, OutputError, "give a folder, or --one-table"),
        ({"format": "audacity", "output": "x.txt"}, OutputError, "a file per recording; give a f"),
        ({"format": "raven", "per": "clip"}, UsageError, "--per is for --format csv"),
        ({"format": "csv", "per": "hour"}, UsageError, "--per is hour; must be clip or window"),
        ({"format": "csv", "null": True}, UsageError, "--null is for --format list"),
        ({"format": "list", "one_table": True}, UsageError, "--one-table is for --format raven"),
        ({"format": "csv", "output": "DIR/labels.csv"}, OutputError, "holds the result itself"),
    ],
)
def test_what_does_not_fit_is_refused(
    result: str, options: dict[str, object], error: type[EarmarkError], message: str
) -> None:
    options = {
        key: value.replace("DIR", result) if isinstance(value, str) else value
        for key, value in options.items()
    }
    before = sorted(Path(result).rglob("*"))
    with pytest.raises(error, match=message):
        run_export(result, **options)  # type: ignore[arg-type]
    assert sorted(Path(result).rglob("*")) == before
