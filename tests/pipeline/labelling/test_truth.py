"""Truth from a table: which row belongs to which clip, and ``label --truth``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main as cli
from pipeline.labelling.truth import Matches, Place, TruthRow, match_rows, place_of, read_truth
from tests.support.audio_factory import write_noise
from tests.support.labelling import read_rows


def row(*paths: str, clip_id: str | None = None, name: str | None = None, segment: str = "") -> Any:
    return TruthRow(Place(clip_id, name, paths, segment), ("dog",), "line 1")


def matched(rows: list[Any], *uris: str) -> Matches:
    return match_rows(rows, [place_of(uri, uri) for uri in uris])


@pytest.mark.parametrize(
    ("rows", "clips", "expected", "ambiguous"),
    [
        (["a.wav"], ["/x/a.wav"], [0], ()),
        (["a.ogg"], ["/x/a.wav"], [0], ()),
        (["a"], ["/x/a.wav"], [0], ()),
        (["rec.01"], ["/x/rec.01.wav"], [0], ()),
        (["rec.01"], ["/x/rec.02.wav", "/x/rec.wav"], [None, None], ()),
        (["./a.wav"], ["/x/a.wav"], [0], ()),
        (["../audio/a.wav"], ["/x/audio/a.wav"], [0], ()),
        # Files that differ in their extension only.
        (["a.wav"], ["/x/a.flac", "/x/a.wav"], [None, 0], ()),
        (["a"], ["/x/a.flac", "/x/a.wav"], [None, None], ("a",)),
        # Several clips of one name.
        (["a.wav"], ["/x/1/a.wav", "/x/2/a.wav"], [None, None], ("a.wav",)),
        (["1/a.wav", "2/a.wav"], ["/x/2/a.wav", "/x/1/a.wav"], [1, 0], ()),
        (["1/a.wav", "a.wav"], ["/x/1/a.wav"], [0], ()),
        (["1/a.wav", "a.wav"], ["/x/1/a.wav", "/x/2/a.flac"], [0, None], ("a.wav",)),
        (["d/1/a.wav", "e/1/a.wav"], ["/x/1/a.wav"], [None], ("d/1/a.wav", "e/1/a.wav")),
        # Folders that have moved, and folders that are others.
        (["/old/1/a.wav"], ["/new/1/a.wav"], [0], ()),
        (["/old/1/a.wav"], ["/new/2/a.wav"], [None], ()),
        (["1/a.wav"], ["/x/2/a.wav"], [None], ()),
        (["1/a.wav", "a.wav"], ["/x/2/a.wav"], [1], ()),
        (["gs://b/1/a.wav"], ["s3://c/1/a.wav"], [0], ()),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_row_finds_the_clip_with_the_longest_common_tail_if_it_is_the_only_one(
    rows: list[str], clips: list[str], expected: list[int | None], ambiguous: tuple[str, ...]
) -> None:
    matches = matched([row(path) for path in rows], *clips)
    assert list(matches.row_of_clip) == expected
    assert matches.ambiguous == ambiguous
    num_joined = sum(index is not None for index in expected)
    assert matches.counts == {"clip_id": 0, "uri": 0, "path": num_joined}
    assert set(matches.rows_without_clip) == set(range(len(rows))) - set(expected)


def test_a_clip_id_wins_over_a_uri_and_a_uri_over_a_path() -> None:
    rows = [row("a.wav"), row("x/a.wav", name="/x/a.wav"), row("b.wav", clip_id="mine")]
    clips = [place_of("mine", "/x/a.wav"), place_of("/x/a.wav", "/x/a.wav")]
    matches = match_rows(rows, clips)
    assert matches.row_of_clip == (2, 1)
    assert matches.joined_by == ("clip_id", "uri")
    assert matches.rows_without_clip == (0,)


def test_all_channels_of_a_file_get_its_row() -> None:
    clips = [place_of(f"/x/a.wav!{channel}", "/x/a.wav") for channel in (1, 2)]
    assert match_rows([row("a.ogg")], clips).row_of_clip == (0, 0)
    assert match_rows([row("a.ogg", name="/x/a.wav")], clips).row_of_clip == (0, 0)


def test_two_rows_of_one_file_are_not_guessed() -> None:
    rows = [row("a.wav", clip_id=clip_id, name="/x/a.wav") for clip_id in ("one", "two")]
    matches = matched(rows, "/x/a.wav")
    assert (matches.row_of_clip, "/x/a.wav" in matches.ambiguous) == ((None,), True)


def test_names_that_fit_two_clips_are_ambiguous_though_the_row_has_several() -> None:
    matches = matched([row("ID", "ID_30000")], "/x/ID.wav", "/x/ID_30000.wav")
    assert matches.row_of_clip == (None, None)
    assert matches.ambiguous == ("ID",)


def test_segments_members_and_rows_are_places_of_their_own() -> None:
    rows = [
        row("a.wav", segment="@1.000-2.000"),
        row("t.tar/a.wav"),
        row("p.parquet/row=3"),
    ]
    clips = [
        place_of("c0", "/x/a.wav"),
        place_of("c1", "/x/a.wav", start_s=1.0, end_s=2.0),
        place_of("c2", "/x/t.tar", member="a.wav"),
        place_of("c3", "/x/p.parquet", row=4),
        place_of("c4", "/x/p.parquet", row=3),
    ]
    assert match_rows(rows, clips).row_of_clip == (None, 0, 1, None, 2)


def test_a_parquet_row_is_found_by_its_original_name() -> None:
    uri = "/x/p.parquet"
    named = [
        place_of(f"{uri}#row={index}", uri, row=index, metadata=json.dumps({"path": path}))
        for index, path in enumerate(["fold1/a.wav", "b.wav", "c.wav"])
    ]
    clips = [*named, place_of(f"{uri}#row=3", uri, row=3, metadata='{"path": 5}')]
    rows = [row("b.wav"), row("a.wav"), row("p.parquet/row=3"), row("p.parquet/row=2")]
    assert match_rows(rows, clips).row_of_clip == (1, 0, 3, 2)


def test_the_second_member_of_a_name_is_not_the_first() -> None:
    uri = "/x/t.tar"
    rows = [row("t.tar/a.wav", name=f"{uri}#a.wav"), row("t.tar/a.wav", name=f"{uri}#a.wav~2")]
    clips = [place_of(f"{uri}#a.wav~2", uri, "a.wav"), place_of(f"{uri}#a.wav", uri, "a.wav")]
    assert match_rows(rows, clips).row_of_clip == (1, 0)


def test_rows_of_one_file_written_in_two_ways_are_one_with_all_labels(tmp_path: Path) -> None:
    table = tmp_path / "truth.csv"
    table.write_text(f"uri,label\na.wav,dog\n./a.wav,rain\n{tmp_path}/a.wav,dog\n")
    (only,) = read_truth(str(table)).rows
    assert (only.labels, only.place.name) == (("dog", "rain"), f"{tmp_path}/a.wav")


# --- label --truth ---------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for index in range(4):
        write_noise(tmp_path / "clips" / f"{index}.wav", seed=index)
    return tmp_path / "clips"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Labels of three of the four clips, in another folder than theirs."""
    path = tmp_path / "tables" / "truth.csv"
    path.parent.mkdir()
    path.write_text(
        "filename,label,fold\n0.ogg,dog,1\n1.ogg,rain,2\n2.ogg,dog,1\nabsent.ogg,dog,1\n"
    )
    return path


def label(model: Path, *arguments: object) -> int:
    settings = ["--set", "units.windows=1", "--set", "decode.processes=1"]
    settings += ["--precision", "fp32", "--device", "cpu", "--batch-size", "2"]
    return cli.main(["label", *map(str, arguments), "-m", str(model), *settings])


def truths(out: Path) -> dict[str, Any]:
    return {Path(row["uri"]).name: row["truth"] for row in read_rows(out, "clips")}


def test_a_table_says_what_is_true_of_the_audio_and_adds_no_items(
    tiny_model: Path, clips: Path, table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert label(tiny_model, clips, "--truth", table, "-o", out) == 0
    assert truths(out) == {"0.wav": ["dog"], "1.wav": ["rain"], "2.wav": ["dog"], "3.wav": None}
    said = capfd.readouterr().err
    assert (
        "Clips joined with a row of the truth: 3 by the end of the path (such as 0.ogg for" in said
    )
    assert f"1 of the items found have no row in the truth, such as {clips}/3.wav." in said
    assert f"1 of the truth's rows have no item, such as {table.parent}/absent.ogg." in said
    run = json.loads((out / "run.json").read_text())
    assert run["config"]["truth"] == str(table)
    assert any("3 by the end of the path" in note for note in run["input"]["notes"])
    # What evaluate joins without being given a table.
    assert cli.main(["evaluate", str(out), "-q"]) == 0
    figures = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert figures["counts"]["clips"] == 3


def test_another_table_changes_the_truth_of_its_clips_and_redoes_no_other_unit(
    tiny_model: Path, clips: Path, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert label(tiny_model, clips, "--truth", table, "-o", out) == 0
    before = {path.name for path in (out / "clips").iterdir()}
    assert label(tiny_model, clips, "--truth", table, "-o", out) == 0
    assert {path.name for path in (out / "clips").iterdir()} == before
    table.write_text(table.read_text().replace("1.ogg,rain", "1.ogg,rooster"))
    assert label(tiny_model, clips, "--truth", table, "-o", out) == 0
    assert truths(out) == {"0.wav": ["dog"], "1.wav": ["rooster"], "2.wav": ["dog"], "3.wav": None}
    assert len(before - {path.name for path in (out / "clips").iterdir()}) == 1
    assert cli.main(["verify", str(out), "-q"]) == 0


def test_a_table_wins_over_the_labels_of_the_input(
    tiny_model: Path, clips: Path, table: Path, tmp_path: Path
) -> None:
    manifest = clips / "own.csv"
    manifest.write_text("uri,label\n0.wav,rain\n3.wav,rain\n")
    assert label(tiny_model, manifest, "--truth", table, "-o", tmp_path / "out") == 0
    assert truths(tmp_path / "out") == {"0.wav": ["dog"], "3.wav": ["rain"]}


@pytest.mark.parametrize("command", ["label", "plan"])
def test_a_table_of_other_files_stops_before_any_work(
    tiny_model: Path, clips: Path, tmp_path: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "truth.csv"
    table.write_text("filename,label\nother.wav,dog\n")
    arguments = [str(clips), "--truth", str(table), "-m", str(tiny_model), "-o", "out"]
    assert cli.main([command, *arguments[:-1], str(tmp_path / "out")]) == 2
    said = capfd.readouterr()
    assert f"--truth {table} has no row for any of the 4 items found" in said.err
    assert f"Paths in a table are relative to its folder, {tmp_path}" in said.err
    assert "Estimate" not in said.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["label", "plan"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_manifest_whose_files_are_all_missing_stops_before_any_work(
    tiny_model: Path, tmp_path: Path, command: str, ending: str, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / f"list.{ending}"
    rows = [{"uri": f"audio/{index}.wav", "label": "dog"} for index in range(3)]
    lines = ["uri,label", *(f"{row['uri']},dog" for row in rows)]
    texts = lines if ending == "csv" else [json.dumps(row) for row in rows]
    table.write_text("\n".join(texts) + "\n")
    out = tmp_path / "out"
    assert cli.main([command, str(table), "-m", str(tiny_model), "-o", str(out)]) == 2
    said = capfd.readouterr()
    assert (
        f"{table} names no file that exists: 3 missing, such as {tmp_path}/audio/0.wav" in said.err
    )
    assert f"written as audio/0.wav; paths are relative to {tmp_path}" in said.err
    assert f"earmark label AUDIO… --truth {table}" in said.err
    assert "Estimate" not in said.out
    assert not out.exists()
    # A single one that exists, and the others are rows in errors.
    write_noise(tmp_path / "audio" / "1.wav", seed=1)
    assert label(tiny_model, table, "-o", out, "--max-failed", "1", "-q") == 0
    assert len(read_rows(out, "errors")) == 2


def test_what_is_inside_a_container_is_not_joined_and_that_is_said(
    tiny_model: Path, clips: Path, table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.support.containers import tar_bytes

    members = [("0.wav", (clips / "0.wav").read_bytes())]
    (tmp_path / "only").mkdir()
    for folder in (clips, tmp_path / "only"):
        (folder / "t.tar").write_bytes(tar_bytes(members))
    assert label(tiny_model, clips, "--truth", table, "-o", tmp_path / "out") == 0
    said = capfd.readouterr().err
    assert (
        f"1 containers were not joined, because their content is not known yet, such as {clips}"
        in said
    )
    assert label(tiny_model, tmp_path / "only", "--truth", table, "-o", tmp_path / "o") == 2
    assert "use earmark evaluate --truth when the clips are labelled" in capfd.readouterr().err


def test_segments_keep_the_labels_of_a_table(
    clips: Path, table: Path, tmp_path: Path, tiny_model: Path
) -> None:
    segments = tmp_path / "segments.jsonl"
    arguments = ["plan", str(clips), "--truth", str(table), "-m", str(tiny_model)]
    assert cli.main([*arguments, "--segment-s", "900", "--manifest", str(segments)]) == 0
    rows = [json.loads(line) for line in segments.read_text().splitlines()]
    assert [row.get("labels") for row in rows] == [["dog"], ["rain"], ["dog"], None]
