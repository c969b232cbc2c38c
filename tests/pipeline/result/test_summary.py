"""``earmark summary``: what is in a result, on one screen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.cli import main as cli
from pipeline.result.state import read_result
from pipeline.result.summary import (
    NUM_LABELS,
    Summary,
    print_labels,
    run_summary,
    seconds_by_label,
    summarise,
)
from tests.support.unit_factory import FACTS, commit_unit, make_item
from transforms.errors import InputError
from transforms.records import Failure
from transforms.results.counts import RowCounts

ALPHA, GAMMA = (0.5, 0.25, 0.125), (0.25, 0.75, 0.875)
UNITS = ("0" * 20, "1" * 20)
RUN = {"fingerprint": "f", "results": {"top_k": 2}, "model": {"name": "tiny", "num_labels": 3}}
CUT = dataclasses.replace(FACTS, warning="cut", warning_kinds=("cut_short",))


def write_result(output: str) -> None:
    """Commit a unit of two windows and one, and another of a clip with a warning."""
    clips = [
        (make_item("/a.wav"), [(0.0, 9.0, ALPHA), (3.0, 12.0, GAMMA)]),
        (make_item("/b.wav"), [(0.0, 12.0, ALPHA)]),
    ]
    failure = Failure(make_item("/c.wav"), "decode", "NotAudio", "a page")
    commit_unit(output, UNITS[0], clips, failures=[failure])
    commit_unit(output, UNITS[1], [(make_item("/d.wav"), [(0.0, 12.0, GAMMA)])], facts=CUT)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    write_result(str(out))
    (out / "run.json").write_text(json.dumps(RUN))
    (out / "_SUCCESS").touch()
    return out


def summary_of(out: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert cli.main(["summary", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out.splitlines()


def test_labels_scores_warnings_and_failures_are_on_one_screen(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = summary_of(out, capsys)
    assert [" ".join(line.split()) for line in lines] == [
        f"{out}, labelled by tiny (3 labels): 3 clips, 36 s of audio, 4 windows; 1 failure.",
        "best label clips audio median score",
        "Alpha 2 15 s 0.50",
        "Gamma 1 21 s 0.88",
        "Scores of the best labels: half of the clips above 0.50, a tenth above 0.80, a tenth "
        "below 0.50.",
        "1 of 3 clips with a warning: 1 cut_short; see the column warning of clips.",
        "Failures by cause: 1 NotAudio (not audio that can be decoded).",
        "NotAudio, for example /c.wav: a page",
    ]


def test_a_result_in_progress_says_so(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "_SUCCESS").unlink()
    assert summary_of(out, capsys)[1].startswith("Unfinished: the last run did not come to its end")


@pytest.mark.parametrize("damage", ["missing", "truncated", "no run.json"])
def test_a_damaged_result_says_so_and_shows_the_rest(
    out: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    part = out / "clips" / f"{UNITS[0]}.parquet"
    if damage == "missing":
        part.unlink()
    elif damage == "truncated":  # of the same size, so that only reading it tells
        part.write_bytes(part.read_bytes()[:-20] + bytes(20))
    else:
        (out / "run.json").unlink()
    text = "\n".join(summary_of(out, capsys))
    if damage == "no run.json":
        assert f"Damaged: run.json is missing. Run earmark verify {out}." in text
        assert "3 clips" in text
        return
    assert f"Damaged, and not counted here: 1 unit, such as {UNITS[0]}: " in text
    assert f"Run earmark verify {out}." in text
    assert "1 clip, 12 s of audio" in text


def test_a_remote_result_is_summed_up() -> None:
    output = "memory://summary-test/out"
    write_result(output)
    summary = summarise(output, read_result(output).commits.values())
    assert summary.audio_s == {"Alpha": 15.0, "Gamma": 21.0}
    assert (summary.counts.clips, summary.counts.labels) == (3, {"Alpha": 2, "Gamma": 1})


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no result of Earmark"):
        run_summary(str(tmp_path))


def test_each_second_counts_once_whatever_the_order_of_windows() -> None:
    def window(clip_id: str, start_s: float, end_s: float, *names: str) -> dict[str, object]:
        labels = [{"index": 0, "id": None, "name": name, "score": 0.5} for name in names]
        return {"clip_id": clip_id, "start_s": start_s, "end_s": end_s, "labels": labels}

    windows = pa.Table.from_pylist(
        [
            window("b", 4.0, 8.0, "cat", "dog"),
            window("a", 2.0, 6.0, "dog"),
            window("a", 0.0, 4.0, "cat"),
            window("b", 0.0, 3.0, "dog"),
            window("a", 5.0, 9.0, "dog"),
            window("c", 0.0, 1.0),
        ]
    )
    assert seconds_by_label(windows) == {"cat": 4.0 + 2.0, "dog": 3.0 + 4.0 + 3.0}


def test_many_labels_fit_on_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"label {n:02} [red]" for n in range(30)]
    counts = RowCounts(435, {name: n for n, name in enumerate(names) if n})
    print_labels(Summary(counts=counts, audio_s=dict.fromkeys(names, 3600.0)))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "label 29 [red] 29 1.0 h"
    assert len(lines) == 1 + NUM_LABELS + 1
    assert lines[-1] == f"10 other labels {sum(range(10))} 10.0 h"
