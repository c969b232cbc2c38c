"""``decode.channel``: the promises of a run hold where each channel is a clip of its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.reliability.kill_runs import Run, Setup, check_same_rows, num_commits
from pipeline.cli import main as cli
from pipeline.labelling.estimate import estimate_work
from pipeline.labelling.plan import make_plan
from pipeline.labelling.run import run_label
from pipeline.result.export import run_export
from pipeline.result.state import read_result
from pipeline.result.verify import Kind, run_verify, verify_result
from tests.support import audio_factory
from tests.support.containers import parquet_bytes, tar_bytes
from tests.support.labelling import read_rows, rows_by_name, small_config, wait_until
from tests.support.model_factory import write_tiny_model
from transforms.errors import OutputError

RATE = 16_000


def sound(num_channels: int, duration_s: float = 1.0, seed: int = 0) -> bytes:
    samples = audio_factory.noise(duration_s, num_channels=num_channels, seed=seed)
    return audio_factory.encode(samples, RATE, "wav_float")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Files of two, one and three channels, and one that is no audio."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, num_channels in (("a", 2), ("b", 1), ("c", 3)):
        (folder / f"{name}.wav").write_bytes(sound(num_channels, seed=num_channels))
    (folder / "bad.wav").write_bytes(b"no audio" * 100)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class Labeller:
    """Runs ``label`` with the tiny model, with each channel as a clip."""

    def __init__(self, model: Path, output: Path) -> None:
        self.model, self.output = model, output

    def __call__(self, *inputs: Path | str, channel: Any = "each", **changes: Any) -> int:
        decode = {"processes": 1, "channel": channel}
        values = {"max_failed": 1.0, "decode": decode} | changes
        return run_label(small_config(self.model, self.output, *inputs, **values), [])

    def names(self, part: str = "clips") -> list[str]:
        return [name for name, _ in rows_by_name(self.output, part)]

    def totals(self) -> dict[str, Any]:
        return dict(json.loads((self.output / "run.json").read_text())["totals"])

    def committed(self) -> dict[str, int]:
        folders = ("windows", "clips", "errors", "_commits")
        paths = (path for name in folders for path in (self.output / name).glob("*"))
        return {str(path.relative_to(self.output)): path.stat().st_mtime_ns for path in paths}


@pytest.fixture
def label(tiny_model: Path, out: Path) -> Labeller:
    return Labeller(tiny_model, out)


ALL = ["a.wav!1", "a.wav!2", "b.wav!1", "c.wav!1", "c.wav!2", "c.wav!3"]


def test_items_are_counted_as_items_and_channels_as_clips(
    label: Labeller, clips: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(clips, quiet=False) == 0
    assert label.names() == label.names("windows") == ALL
    assert [Path(row["clip_id"]).name for row in read_rows(out, "errors")] == ["bad.wav"]
    totals = label.totals()
    assert (totals["items"], totals["found_items"], totals["new_items"]) == (4, 4, 4)
    assert (totals["clips"], totals["windows"], totals["failures"]) == (6, 6, 1)
    assert totals["audio_s"] == pytest.approx(6.0)
    said = capsys.readouterr().err
    assert "4 items found: 3 labelled, 1 failed" in said
    assert "6 clips (a channel each), 6 windows, 6 s of audio" in said
    assert run_verify(str(out)) == 0
    rows = rows_by_name(out, "clips")
    assert [rows[name, 0]["channels"] for name in ALL] == [2, 2, 1, 3, 3, 3]
    assert rows["c.wav!1", 0]["uri"] == rows["c.wav!3", 0]["uri"] == str(clips / "c.wav")
    assert rows["c.wav!1", 0]["embedding"] != rows["c.wav!3", 0]["embedding"]


def test_a_channel_has_the_row_that_it_would_have_as_a_file(
    label: Labeller, clips: Path, tiny_model: Path, tmp_path: Path, out: Path
) -> None:
    label(clips)
    alone = tmp_path / "alone" / "c3.wav"
    samples = audio_factory.noise(1.0, num_channels=3, seed=3)[:, 2]
    alone.parent.mkdir()
    alone.write_bytes(audio_factory.encode(samples, RATE, "wav_float"))
    Labeller(tiny_model, tmp_path / "other")(alone, channel="mix")
    (expected,) = read_rows(tmp_path / "other", "clips")
    row = rows_by_name(out, "clips")["c.wav!3", 0]
    for name in ("duration_s", "peak_dbfs", "rms_dbfs", "silent_ratio", "num_windows", "warning"):
        assert row[name] == expected[name]
    np.testing.assert_allclose(row["embedding"], expected["embedding"], rtol=0, atol=1e-5)


def test_running_again_does_nothing(label: Labeller, clips: Path) -> None:
    label(clips)
    before = label.committed()
    assert label(clips) == 0
    assert label.committed() == before
    assert label.totals()["new_items"] == 0


def test_a_file_whose_time_alone_has_changed_keeps_its_channels(
    label: Labeller, clips: Path
) -> None:
    label(clips)
    parts = {name: at for name, at in label.committed().items() if "_commits" not in name}
    os.utime(clips / "c.wav", ns=(0, 1_000_000_000))
    assert label(clips) == 0
    assert parts.items() <= label.committed().items()
    assert label.totals()["new_items"] == 0


def test_a_changed_file_is_redone_with_all_its_channels(
    label: Labeller, clips: Path, out: Path
) -> None:
    label(clips)
    (clips / "a.wav").write_bytes(sound(4, 2.0))
    assert label(clips) == 0
    assert label.names() == ["a.wav!1", "a.wav!2", "a.wav!3", "a.wav!4", *ALL[2:]]
    assert label.totals()["new_items"] == 2  # a unit holds two files here
    (clips / "a.wav").write_bytes(sound(1, 2.5))
    assert label(clips) == 0
    assert label.names() == ["a.wav!1", *ALL[2:]]
    assert run_verify(str(out)) == 0


def test_what_vanishes_keeps_its_rows_beside_what_is_redone(
    label: Labeller, clips: Path, out: Path
) -> None:
    label(clips, units={})  # all in one unit
    (clips / "c.wav").unlink()
    (clips / "a.wav").write_bytes(sound(3, 2.0))
    assert label(clips, units={}) == 0
    assert label.names() == ["a.wav!1", "a.wav!2", "a.wav!3", *ALL[2:]]
    totals = label.totals()
    assert (totals["items"], totals["found_items"], totals["vanished_items"]) == (4, 3, 1)
    assert run_verify(str(out)) == 0
    before = label.committed()
    assert label(clips, units={}) == 0
    assert label.committed() == before


def test_retry_failed_tries_the_file_again_and_keeps_the_channels_of_others(
    label: Labeller, clips: Path, out: Path
) -> None:
    bad, good = clips / "bad.wav", sound(2)
    bad.write_bytes(b"x" * len(good))
    stat = bad.stat()
    label(clips, units={})
    kept = {row["clip_id"]: row for row in read_rows(out, "clips")}
    bad.write_bytes(good)
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert label(clips, units={}, retry_failed=True) == 0
    assert not read_rows(out, "errors")
    assert label.names() == [*ALL[:3], "bad.wav!1", "bad.wav!2", *ALL[3:]]
    assert kept.items() <= {row["clip_id"]: row for row in read_rows(out, "clips")}.items()
    assert label.totals()["items"] == 4
    assert label.totals()["new_items"] == 1
    assert run_verify(str(out)) == 0


def test_the_errors_lead_back_to_the_file(
    label: Labeller, clips: Path, tiny_model: Path, tmp_path: Path
) -> None:
    label(clips)
    (clips / "bad.wav").write_bytes(sound(2))
    again = Labeller(tiny_model, tmp_path / "again")
    assert again(f"{label.output}/errors/*.parquet") == 0
    assert again.names() == ["bad.wav!1", "bad.wav!2"]


def test_members_rows_and_segments_have_channels_too(
    label: Labeller, tmp_path: Path, out: Path
) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    members = [("x.wav", sound(2)), ("x.wav", sound(1)), ("y.wav", b"no audio")]
    (inputs / "t.tar").write_bytes(tar_bytes(members))
    audio = [{"bytes": sound(2), "path": None}, {"bytes": sound(1), "path": None}]
    (inputs / "p.parquet").write_bytes(parquet_bytes(pa.table({"audio": audio})))
    (inputs / "long.wav").write_bytes(sound(2, 4.0))
    lines = [
        {"uri": "long.wav", "start_s": 0.0, "end_s": 1.0},
        {"uri": "long.wav", "start_s": 1.0, "end_s": 3.0, "clip_id": "mine"},
    ]
    listed = inputs / "list.jsonl"
    listed.write_text("\n".join(map(json.dumps, lines)))
    given = (inputs / "t.tar", inputs / "p.parquet", listed)
    for _ in range(2):  # the second time, nothing is left to do
        assert label(*given) == 0
        assert label.names() == [
            *("long.wav@0.000-1.000!1", "long.wav@0.000-1.000!2"),
            *("p.parquet#row=0!1", "p.parquet#row=0!2", "p.parquet#row=1!1"),
            *("t.tar#x.wav!1", "t.tar#x.wav!2", "t.tar#x.wav~2!1", "mine!1", "mine!2"),
        ]
        assert [Path(row["clip_id"]).name for row in read_rows(out, "errors")] == ["t.tar#y.wav"]
        assert label.totals()["found_items"] == label.totals()["items"] == 7
        assert run_verify(str(out)) == 0
    assert label.totals()["new_items"] == 0
    assert label(*given, retry_failed=True) == 0
    assert label.totals()["items"] == 7
    assert label.totals()["new_items"] == 1
    assert run_verify(str(out)) == 0


def test_an_item_listed_twice_is_one_item(label: Labeller, clips: Path) -> None:
    assert label(clips / "a.wav", clips / "a.wav") == 0
    assert label.names() == ALL[:2]
    assert label.totals()["found_items"] == 1


def test_verify_finds_a_channel_that_is_there_twice_and_an_item_without_a_row(
    label: Labeller, clips: Path, out: Path
) -> None:
    label(clips, units={})
    (commit,) = (out / "_commits").glob("*.json")
    record = json.loads(commit.read_text())
    entries = record["ledger"]["items"]
    entries.append({**entries[0], "clip_id": f"{clips}/d.wav"})
    commit.write_text(json.dumps(record))
    findings = list(verify_result(read_result(str(out))))
    assert [finding.problem for finding in findings] == [
        f"its commit lists {clips}/d.wav, which has no row"
    ]
    record["ledger"]["items"] = entries[:-1]
    record["totals"]["items"] += 1
    commit.write_text(json.dumps(record))
    findings = list(verify_result(read_result(str(out))))
    assert [finding.problem for finding in findings if finding.kind is Kind.CHANGED] == [
        "it has 4 items, and its commit says 5"
    ]


def test_a_result_of_another_channel_is_refused_with_the_difference(
    label: Labeller, clips: Path
) -> None:
    label(clips, channel="mix")
    assert "channel" not in json.loads((label.output / "run.json").read_text())["results"]
    with pytest.raises(OutputError, match='channel: null there, "each" now'):
        label(clips)
    assert label(clips, channel="loudest", overwrite=True) == 0
    with pytest.raises(OutputError, match='channel: "loudest" there, 1 now'):
        label(clips, channel=1)


def test_a_channel_that_a_file_does_not_have_is_a_row(
    label: Labeller, clips: Path, out: Path
) -> None:
    assert label(clips, channel=2) == 0
    assert label.names() == ["a.wav", "c.wav"]
    errors = {Path(row["uri"]).name: row["error_type"] for row in read_rows(out, "errors")}
    assert errors == {"b.wav": "NoSuchChannel", "bad.wav": "NotAudio"}
    assert label.totals()["items"] == 4


def test_a_mix_that_loses_much_has_a_warning_in_its_row(label: Labeller, tmp_path: Path) -> None:
    noise = audio_factory.noise(1.0)
    samples = np.concatenate([noise, -0.95 * noise], axis=1)
    (tmp_path / "a.wav").write_bytes(audio_factory.encode(samples, RATE, "wav_float"))
    assert label(tmp_path / "a.wav", channel="mix") == 0
    (row,) = read_rows(label.output, "clips")
    assert row["warning"] == (
        "mixing down to mono loses 32.0 dB against channel 1, the loudest of 2; to label that one "
        "alone: --set decode.channel=loudest"
    )


def test_a_plan_counts_the_windows_of_every_channel(tiny_model: Path, tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.wav").write_bytes(sound(3, 2.0, seed=index))
    decode = {"processes": 1, "channel": "each"}
    config = small_config(tiny_model, Path(), tmp_path, output=None, decode=decode)
    estimate = estimate_work(make_plan(config, needs_output=False))
    assert estimate.total.audio_s == pytest.approx(24.0, rel=0.01)


def test_exports_name_the_channel(label: Labeller, clips: Path, out: Path) -> None:
    label(clips)
    assert run_export(str(out), "raven", top_k=1) == 0
    lines = (out / "export" / "raven" / "c.wav.selections.txt").read_text().splitlines()[1:]
    assert sorted(line.split("\t")[2] for line in lines) == ["1", "2", "3"]
    assert run_export(str(out), "audacity", top_k=1) == 0
    track = (out / "export" / "audacity" / "b.wav.txt").read_text()
    assert track.rstrip().endswith(", channel 1)")


@pytest.mark.parametrize("folder", ["clips/", ""], ids=["by URI", "by name"])
def test_a_row_of_truth_is_that_of_each_channel(
    folder: str,
    label: Labeller,
    clips: Path,
    tmp_path: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    label(clips)
    first, second, *_ = (entry["name"] for entry in read_rows(out, "clips")[0]["labels"])
    lines = [f"{folder}a.wav,{first}", f"{folder}b.wav,{second}", f"{folder}c.wav,{first}"]
    truth = tmp_path / "truth.csv"
    truth.write_text("\n".join(["uri,label", *lines]))
    assert cli.main(["evaluate", str(out), "--truth", str(truth)]) == 0
    assert "6 clips" in capsys.readouterr().out


@pytest.fixture
def slow_model(tmp_path: Path) -> Path:
    """Return a small model that takes a unit long enough to be killed in the middle of a run."""
    folder = tmp_path / "model"
    return write_tiny_model(folder, hidden_size=64, frequency_stride=10, time_stride=10)


@pytest.fixture
def start(
    slow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], Run]:
    """Starts a run of its own process into ``tmp_path / "out"``, up to its first commits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tmp").mkdir()

    def start_run(clips: Path) -> Run:
        setup = Setup([clips], slow_model, tmp_path / "tmp", 2)
        options = ("--engine", "torch", "--batch-size", "1", "--set", "decode.channel=each")
        return Run(setup, tmp_path / "out", *options, cold=True)

    return start_run


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_killed_run_gives_what_an_uninterrupted_one_gives(
    start: Callable[[Path], Run], slow_model: Path, tmp_path: Path
) -> None:
    clips, out, whole = tmp_path / "clips", tmp_path / "out", tmp_path / "whole"
    clips.mkdir()
    for index in range(60):
        (clips / f"{index:02}.wav").write_bytes(sound(1 + index % 3, seed=index))
    run = start(clips)
    try:
        wait_until(lambda: num_commits(out) >= 3 or run.exit_code() is not None, "commits")
        assert run.exit_code() is None, run.words()
        run.send(signal.SIGKILL, to_group=True)
        assert run.wait() == -signal.SIGKILL
    finally:
        run.end()
    assert 3 <= num_commits(out) < 30
    assert Labeller(slow_model, out)(clips) == 0
    assert Labeller(slow_model, whole)(clips) == 0
    check_same_rows(out, whole)
    assert len(read_rows(out, "clips")) == 120
    assert run_verify(str(out)) == 0
