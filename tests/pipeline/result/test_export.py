"""Exports: what a result holds, in the formats of the tools people review audio in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.result.export import raven_text, run_export
from pipeline.result.export_sources import Source, name_files, source_of
from tests.support.unit_factory import commit_unit, make_item
from transforms.errors import EarmarkError, InputError, OutputError, UsageError
from transforms.storage import reading

# The labels are Alpha (/m/a), "Beta, loud" (/m/b) and Gamma (no id); two of them are stored.
QUIET, LOUD = (0.5, 0.25, 0.125), (0.25, 0.75, 0.875)


@pytest.fixture
def result(tmp_path: Path) -> str:
    """Two clips of two windows and one, a tar member and a Parquet row, in two units."""
    output = str(tmp_path / "result")
    commit_unit(
        output,
        "u1",
        [
            (make_item("/audio/dogs/a.wav"), [(0.0, 10.0, QUIET), (10.0, 12.5, LOUD)]),
            (make_item("/audio/cats/b.wav"), [(0.0, 3.25, QUIET)]),
        ],
    )
    commit_unit(
        output,
        "u2",
        [
            (make_item("/audio/t.tar#x.ogg", uri="/audio/t.tar", member="x.ogg"), [(0, 1, LOUD)]),
            (make_item("/audio/p.parquet#row=7", uri="/audio/p.parquet", row=7), [(0, 1, QUIET)]),
        ],
    )
    (tmp_path / "result" / "_SUCCESS").touch()
    return output


def files_of(folder: str | Path) -> dict[str, str]:
    root = Path(folder)
    return {
        str(path.relative_to(root)): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_csv_has_a_row_per_window_and_label(result: str) -> None:
    assert run_export(result, "csv") == 0
    ((name, text),) = files_of(f"{result}/export/csv").items()
    assert name == "labels.csv"
    rows = ["|".join(row) for row in csv.reader(io.StringIO(text, newline=""))]
    assert rows == [
        "clip_id|uri|member|row|start_s|end_s|label_index|label_id|label|score|path|truth|metadata",
        "/audio/dogs/a.wav|/audio/dogs/a.wav|||0|10|0|/m/a|Alpha|0.5|||",
        "/audio/dogs/a.wav|/audio/dogs/a.wav|||0|10|1|/m/b|Beta, loud|0.25|||",
        "/audio/dogs/a.wav|/audio/dogs/a.wav|||10|12.5|2||Gamma|0.875|||",
        "/audio/dogs/a.wav|/audio/dogs/a.wav|||10|12.5|1|/m/b|Beta, loud|0.75|||",
        "/audio/cats/b.wav|/audio/cats/b.wav|||0|3.25|0|/m/a|Alpha|0.5|||",
        "/audio/cats/b.wav|/audio/cats/b.wav|||0|3.25|1|/m/b|Beta, loud|0.25|||",
        "/audio/t.tar#x.ogg|/audio/t.tar|x.ogg||0|1|2||Gamma|0.875|||",
        "/audio/t.tar#x.ogg|/audio/t.tar|x.ogg||0|1|1|/m/b|Beta, loud|0.75|||",
        "/audio/p.parquet#row=7|/audio/p.parquet||7|0|1|0|/m/a|Alpha|0.5|||",
        "/audio/p.parquet#row=7|/audio/p.parquet||7|0|1|1|/m/b|Beta, loud|0.25|||",
    ]


def test_audacity_has_a_label_track_per_source(result: str) -> None:
    assert run_export(result, "audacity") == 0
    assert files_of(f"{result}/export/audacity") == {
        "cats/b.wav.txt": (
            "0.000000\t3.250000\tAlpha (0.50)\n0.000000\t3.250000\tBeta, loud (0.25)\n"
        ),
        "dogs/a.wav.txt": (
            "0.000000\t10.000000\tAlpha (0.50)\n"
            "0.000000\t10.000000\tBeta, loud (0.25)\n"
            "10.000000\t12.500000\tGamma (0.88)\n"
            "10.000000\t12.500000\tBeta, loud (0.75)\n"
        ),
        "p.parquet/row=7.txt": (
            "0.000000\t1.000000\tAlpha (0.50)\n0.000000\t1.000000\tBeta, loud (0.25)\n"
        ),
        "t.tar/x.ogg.txt": (
            "0.000000\t1.000000\tGamma (0.88)\n0.000000\t1.000000\tBeta, loud (0.75)\n"
        ),
    }


RAVEN_HEADER = (
    "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)"
    "\tAnnotation\tScore\n"
)


def test_raven_has_a_selection_table_per_source(result: str) -> None:
    assert run_export(result, "raven", threshold=0.5) == 0
    files = files_of(f"{result}/export/raven")
    assert sorted(files) == [
        "cats/b.wav.selections.txt",
        "dogs/a.wav.selections.txt",
        "p.parquet/row=7.selections.txt",
        "t.tar/x.ogg.selections.txt",
    ]
    assert files["dogs/a.wav.selections.txt"] == RAVEN_HEADER + (
        "1\tSpectrogram 1\t1\t0.000000\t10.000000\t20.0\t8000.0\tAlpha\t0.5000\n"
        "2\tSpectrogram 1\t1\t10.000000\t12.500000\t20.0\t8000.0\tGamma\t0.8750\n"
        "3\tSpectrogram 1\t1\t10.000000\t12.500000\t20.0\t8000.0\tBeta, loud\t0.7500\n"
    )


def test_a_selection_ends_where_the_source_has_no_more_frequencies() -> None:
    row = {"start_s": 0.0, "end_s": 1.0, "label": "A\tB\nC", "score": 0.5, "sample_rate_hz": 8000}
    assert raven_text([row]) == RAVEN_HEADER + (
        "1\tSpectrogram 1\t1\t0.000000\t1.000000\t20.0\t4000.0\tA B C\t0.5000\n"
    )


@pytest.mark.parametrize(
    ("threshold", "track"), [(0.6, ""), (0.5, "0.000000\t3.250000\tAlpha (0.50)\n")]
)
def test_labels_from_the_threshold_on_are_exported_if_there_are_any(
    result: str, threshold: float, track: str
) -> None:
    run_export(result, "audacity", threshold=threshold)
    files = files_of(f"{result}/export/audacity")
    assert files["cats/b.wav.txt"] == track
    assert files["t.tar/x.ogg.txt"].count("\n") == 2


def test_top_k_takes_the_best(result: str) -> None:
    run_export(result, "audacity", top_k=1)
    assert files_of(f"{result}/export/audacity")["dogs/a.wav.txt"] == (
        "0.000000\t10.000000\tAlpha (0.50)\n10.000000\t12.500000\tGamma (0.88)\n"
    )


def test_segments_of_a_file_go_into_one_track_in_order(tmp_path: Path) -> None:
    output = str(tmp_path / "result")
    for unit_id, start_s in (("u1", 20.0), ("u2", 0.0)):
        item = make_item(
            f"/a/long.wav@{start_s:.3f}-{start_s + 5:.3f}",
            uri="/a/long.wav",
            start_s=start_s,
            end_s=start_s + 5,
        )
        commit_unit(output, unit_id, [(item, [(start_s, start_s + 5, QUIET)])])
    run_export(output, "audacity", top_k=1)
    assert files_of(f"{output}/export/audacity") == {
        "long.wav.txt": "0.000000\t5.000000\tAlpha (0.50)\n20.000000\t25.000000\tAlpha (0.50)\n"
    }


def test_only_committed_units_that_nothing_replaces_are_read(result: str) -> None:
    commit_unit(result, "u3", [(make_item("/audio/dogs/a.wav"), [(0, 1, LOUD)])])
    (Path(result) / "_commits" / "u2.json").unlink()
    commit = Path(result) / "_commits" / "u3.json"
    # As a kill leaves it: the new commit is there, the one it replaces not gone yet.
    commit.write_text(json.dumps({**json.loads(commit.read_text()), "replaces": ["u1"]}))
    run_export(result, "audacity", top_k=1)
    assert files_of(f"{result}/export/audacity") == {
        "a.wav.txt": "0.000000\t1.000000\tGamma (0.88)\n"
    }


def test_the_result_itself_stays_as_it_was(result: str) -> None:
    before = {p: p.read_bytes() for p in Path(result).rglob("*") if p.is_file()}
    for name in ("csv", "audacity", "raven"):
        run_export(result, name)
    assert [path.name for path in Path(result, "export", "csv").iterdir()] == ["labels.csv"]
    after = {p: p.read_bytes() for p in Path(result).rglob("*") if p.is_file()}
    assert {p: data for p, data in after.items() if "export" not in p.parts} == before


def test_batches_make_no_difference(result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exports = []
    for batch_rows in (4096, 1):
        monkeypatch.setattr("transforms.results.read.BATCH_ROWS", batch_rows)
        for name in ("csv", "raven"):
            run_export(result, name)
        exports.append(files_of(f"{result}/export"))
    assert exports[0] == exports[1]


def test_a_remote_result_is_exported_in_place() -> None:
    output = "memory://export-test/result"
    commit_unit(output, "u1", [(make_item("gs://b/x/a.wav"), [(0, 1, QUIET)])])
    run_export(output, "audacity", top_k=1)
    run_export(output, "csv")
    track = reading.read_bytes(f"{output}/export/audacity/a.wav.txt")
    assert track == b"0.000000\t1.000000\tAlpha (0.50)\n"
    assert reading.read_bytes(f"{output}/export/csv/labels.csv").count(b"\n") == 3


def test_an_unfinished_result_is_exported_with_a_warning(
    result: str, caplog: pytest.LogCaptureFixture
) -> None:
    (Path(result) / "_SUCCESS").unlink()
    assert run_export(result, "csv") == 0
    assert "the 2 units committed so far" in caplog.text


def test_the_written_files_are_reported_unless_quiet(
    result: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_export(result, "raven", quiet=True)
    assert capsys.readouterr().err == ""
    run_export(result, "raven")
    assert capsys.readouterr().err == f"exported 10 labels to 4 files in {result}/export/raven\n"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "textgrid"}, UsageError, "--format is textgrid; must be csv, audacity, raven"),
        ({"threshold": 1.5}, UsageError, r"--threshold is 1.5; must be in \[0, 1\]"),
        ({"threshold": float("nan")}, UsageError, "--threshold is nan"),
        ({"top_k": 0}, UsageError, "--top-k is 0; must be at least 1"),
        ({"top_k": 3}, UsageError, "--top-k is 3; must be at most 2, .* --top-k 3 for more"),
        ({"output": "windows"}, OutputError, "holds the result itself"),
        ({"output": "_commits/x"}, OutputError, "holds the result itself"),
        ({"output": ""}, OutputError, "holds the result itself"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    result: str, arguments: dict[str, object], error: type[EarmarkError], message: str
) -> None:
    arguments = {"format": "csv", **arguments}
    if "output" in arguments:
        arguments["output"] = f"{result}/{arguments['output']}"
    before = sorted(Path(result).rglob("*"))
    with pytest.raises(error, match=message):
        run_export(result, **arguments)  # type: ignore[arg-type]
    assert sorted(Path(result).rglob("*")) == before


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        run_export(str(tmp_path / "nowhere"), "csv")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no result of Earmark"):
        run_export(str(tmp_path), "csv")


@pytest.mark.parametrize("damage", ["commit", "missing part", "broken part"])
def test_a_damaged_result_is_refused(result: str, damage: str) -> None:
    part = Path(result) / "windows" / "u1.parquet"
    if damage == "commit":
        (Path(result) / "_commits" / "u1.json").write_text("{")
    elif damage == "missing part":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(OutputError, match="run earmark verify"):
        run_export(result, "csv")
    assert not (Path(result) / "export" / "csv" / "labels.csv").exists()


def test_a_result_without_a_unit_yet_is_called_unfinished(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"fingerprint": "f", "results": {"top_k": 2}}')
    with pytest.raises(InputError, match=r"unfinished and has nothing to export yet.*label"):
        run_export(str(tmp_path), "csv")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="holds no result of Earmark"):
        run_export(str(tmp_path), "csv")


def test_tracks_are_of_files_whatever_a_manifest_calls_its_clips(tmp_path: Path) -> None:
    output = str(tmp_path / "result")
    segment = {"uri": "/in/c@1.wav", "end_s": None}
    clips = [
        (make_item("s@1", uri="/in/a.wav"), [(0, 1, QUIET)]),
        (make_item("s@2", uri="/in/b.wav"), [(0, 1, LOUD)]),
        (make_item("c2", start_s=5.0, **segment), [(5, 6, LOUD)]),
        (make_item("c1", start_s=0.0, **segment), [(0, 1, QUIET)]),
        (make_item("dog~2", uri="/in/t.tar", member="x.ogg"), [(0, 1, QUIET)]),
        (make_item("/in/t.tar#x.ogg~2", uri="/in/t.tar", member="x.ogg"), [(0, 1, LOUD)]),
    ]
    commit_unit(output, "u1", clips)
    run_export(output, "audacity", top_k=1)
    assert files_of(f"{output}/export/audacity") == {
        "a.wav.txt": "0.000000\t1.000000\tAlpha (0.50)\n",
        "b.wav.txt": "0.000000\t1.000000\tGamma (0.88)\n",
        "c@1.wav.txt": ("0.000000\t1.000000\tAlpha (0.50)\n5.000000\t6.000000\tGamma (0.88)\n"),
        "t.tar/x.ogg.txt": "0.000000\t1.000000\tAlpha (0.50)\n",
        "t.tar/x.ogg~2.txt": "0.000000\t1.000000\tGamma (0.88)\n",
    }


def sources_of(names: Sequence[str]) -> list[Source]:
    """Sources as ``uri`` or ``uri#member``."""
    return [Source(uri, member) for uri, _, member in (name.partition("#") for name in names)]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["/a/b/x.wav"], ["x.wav.txt"]),
        (["/a/b/x.wav", "/a/c/x.wav"], ["b/x.wav.txt", "c/x.wav.txt"]),
        (["gs://k/d/x.wav", "gs://k/y.wav"], ["d/x.wav.txt", "y.wav.txt"]),
        (["/a/t.tar#d/x.ogg", "/a/t.tar#x.ogg"], ["t.tar/d/x.ogg.txt", "t.tar/x.ogg.txt"]),
        (["/a/t.tar#../../x.ogg"], ["t.tar/%2E%2E/%2E%2E/x.ogg.txt"]),
        (["/a/q?.wav", '/a/"<:>|*\\\n'], ['q%3F.wav.txt', "%22%3C%3A%3E%7C%2A%5C%0A.txt"]),
        (["/a/x", "/a/x.txt#y"], ["x.txt", "x.txt_/y.txt"]),
    ],
)  # fmt: skip
def test_files_are_named_after_their_sources(sources: list[str], names: list[str]) -> None:
    named = name_files(sources_of(sources), ".txt")
    assert [named[source] for source in sources_of(sources)] == names


def test_a_long_name_is_cut_and_stays_unique() -> None:
    first, second = sources_of([f"/a/{'ä' * 300}{end}.wav" for end in "12"])
    named = name_files([first, second], ".selections.txt")
    assert named[first] != named[second]
    assert all(len(name.encode()) < 255 for name in named.values())


@given(st.lists(st.text("aA.~#/:txt\n%", min_size=1, max_size=8), min_size=1, unique=True))
def test_every_source_has_a_safe_file_of_its_own(names: list[str]) -> None:
    sources = sources_of([f"/base/{name}" for name in names])
    named = name_files(sources, ".txt")
    assert set(named) == set(sources)
    assert len({name.casefold() for name in named.values()}) == len(set(sources))
    folders = {
        "/".join(name.casefold().split("/")[:depth])
        for name in named.values()
        for depth in range(1, name.count("/") + 1)
    }
    assert not folders & {name.casefold() for name in named.values()}
    for name in named.values():
        assert not {".", "..", ""} & set(name.split("/"))


@pytest.mark.parametrize(
    ("clip_id", "uri", "member", "row", "source"),
    [
        ("/a/b%40c.wav", "/a/b@c.wav", None, None, Source("/a/b@c.wav")),
        ("/a/b.wav@1.000-2.500", "/a/b.wav", None, None, Source("/a/b.wav")),
        ("any~2", "/a/b.wav", None, None, Source("/a/b.wav")),
        ("/p.parquet#row=0", "/p.parquet", None, 0, Source("/p.parquet", row=0)),
        ("/t.tar#x.wav", "/t.tar", "x.wav", None, Source("/t.tar", "x.wav")),
        ("/t.tar#x.wav~2@0.000-1.000", "/t.tar", "x.wav", None, Source("/t.tar", "x.wav", 2)),
        ("/t.tar#x%7E2", "/t.tar", "x~2", None, Source("/t.tar", "x~2")),
        ("/t.tar#x%FF.wav~3", "/t.tar", "x%FF.wav", None, Source("/t.tar", "x%FF.wav", 3)),
        ("dog~2", "/t.tar", "x.wav", None, Source("/t.tar", "x.wav")),
    ],
)
def test_the_source_of_a_clip_follows_from_its_columns(
    clip_id: str, uri: str, member: str | None, row: int | None, source: Source
) -> None:
    assert source_of(clip_id, uri, member, row) == source


def test_the_second_of_a_name_and_a_name_that_looks_so_have_files_of_their_own() -> None:
    named = name_files([Source("/t.tar", "x", 2), Source("/t.tar", "x~2")], ".txt")
    assert len(set(named.values())) == 2
