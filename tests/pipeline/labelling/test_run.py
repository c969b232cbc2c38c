"""The main job, end to end: what a run writes, and what the next run does with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.config.label import RunConfig
from pipeline.labelling import run as run_module
from pipeline.labelling.run import run_label
from pipeline.result.lock import hold_output
from pipeline.result.state import read_result
from pipeline.result.verify import run_verify, verify_result
from tests.support.audio_factory import write_noise
from tests.support.labelling import read_rows, small_config
from transforms.errors import ConfigError, OutputError


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of four short clips."""
    for index in range(4):
        write_noise(tmp_path / "clips" / f"{index}.wav", seed=index)
    return tmp_path / "clips"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class Labeller:
    """Runs ``label`` with the tiny model; two windows a unit, so that there are several units."""

    def __init__(self, model: Path, output: Path) -> None:
        self.model, self.output = model, output

    def __call__(self, *inputs: Path | str, **changes: Any) -> int:
        return run_label(self.config(*inputs, **changes), [])

    def config(self, *inputs: Path | str, **changes: Any) -> RunConfig:
        return small_config(self.model, self.output, *inputs, **changes)


@pytest.fixture
def label(tiny_model: Path, out: Path) -> Labeller:
    return Labeller(tiny_model, out)


def part_times(out: Path) -> dict[str, int]:
    return {
        str(path.relative_to(out)): path.stat().st_mtime_ns
        for folder in ("windows", "clips", "errors", "_commits")
        for path in (out / folder).glob("*")
    }


def run_record(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "run.json").read_text()))


def test_files_become_clips_windows_and_a_record_of_the_run(
    label: Labeller, clips: Path, out: Path
) -> None:
    assert label(clips) == 0
    assert [Path(row["clip_id"]).name for row in read_rows(out, "clips")] == [
        f"{index}.wav" for index in range(4)
    ]
    assert len(read_rows(out, "windows")) == 4
    assert (out / "_SUCCESS").exists()
    assert not (out / "_staging").exists() or not list((out / "_staging").iterdir())
    run = run_record(out)
    assert run["status"] == "done"
    assert run["totals"]["clips"] == run["totals"]["found_items"] == 4
    assert run["totals"]["units"] == len(list((out / "_commits").iterdir())) == 2
    assert run["engines"] == ["torch cpu fp32"]
    assert run["model"]["sha256"] and run["fingerprint"]
    assert run_verify(str(out)) == 0


def test_running_again_does_nothing(label: Labeller, clips: Path, out: Path) -> None:
    label(clips)
    before = part_times(out)
    assert label(clips) == 0
    assert part_times(out) == before
    assert run_record(out)["totals"]["clips"] == 4


def test_an_added_file_is_one_new_unit(label: Labeller, clips: Path, out: Path) -> None:
    label(clips)
    before = part_times(out)
    write_noise(clips / "extra.wav", seed=9)
    assert label(clips) == 0
    after = part_times(out)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 3
    assert run_record(out)["totals"]["new_items"] == 1


def test_a_changed_file_redoes_its_unit_and_nothing_else(
    label: Labeller, clips: Path, out: Path
) -> None:
    label(clips)
    before, old = part_times(out), {row["clip_id"]: row for row in read_rows(out, "clips")}
    write_noise(clips / "0.wav", duration_s=2.0, seed=50)
    assert label(clips) == 0
    after = part_times(out)
    assert len(after) == len(before)
    assert len(before.items() & after.items()) == 3
    new = {row["clip_id"]: row for row in read_rows(out, "clips")}
    assert new.keys() == old.keys()
    assert new[str(clips / "0.wav")]["duration_s"] == pytest.approx(2.0)
    assert run_record(out)["totals"]["new_items"] == 2
    assert run_verify(str(out)) == 0


def test_a_changed_row_of_a_manifest_is_labelled_again(
    label: Labeller, tmp_path: Path, out: Path
) -> None:
    write_noise(tmp_path / "a.wav", 4.0)
    listed = tmp_path / "list.jsonl"
    for start_s, end_s in ((0, 2), (1, 3)):
        line = {"uri": "a.wav", "clip_id": "x", "start_s": start_s, "end_s": end_s}
        listed.write_text(json.dumps(line))
        assert label(listed) == 0
        (clip,) = read_rows(out, "clips")
        assert (clip["clip_id"], clip["start_s"], clip["end_s"]) == ("x", start_s, end_s)


def test_vanished_files_are_counted_apart_and_kept(label: Labeller, clips: Path, out: Path) -> None:
    label(clips)
    (clips / "3.wav").unlink()
    assert label(clips) == 0
    assert len(read_rows(out, "clips")) == 4
    totals = run_record(out)["totals"]
    assert (totals["found_items"], totals["vanished_items"], totals["items"]) == (3, 1, 4)
    assert run_verify(str(out)) == 0


def test_another_model_is_refused_and_nothing_is_touched(
    label: Labeller, clips: Path, out: Path, tmp_path: Path
) -> None:
    from tests.support.model_factory import write_tiny_model

    label(clips)
    before = part_times(out)
    other = Labeller(write_tiny_model(tmp_path / "other", seed=5), out)
    advice = r"[\s\S]*Give another --output, go back to those settings, or start anew"
    with pytest.raises(OutputError, match=rf"model_sha256: .* there, .* now{advice}"):
        other(clips)
    assert part_times(out) == before


def test_a_setting_that_changes_results_is_refused_with_the_difference(
    label: Labeller, clips: Path
) -> None:
    label(clips)
    with pytest.raises(OutputError, match="top_k: 10 there, 3 now"):
        label(clips, labels={"top_k": 3})


def test_a_setting_that_does_not_change_results_goes_on(
    label: Labeller, clips: Path, out: Path
) -> None:
    label(clips)
    write_noise(clips / "extra.wav")
    assert label(clips, inference={"precision": "fp32", "device": "auto", "batch_size": 5}) == 0
    assert len(read_rows(out, "clips")) == 5


def test_overwrite_starts_anew_and_spares_what_is_not_ours(
    label: Labeller, clips: Path, out: Path
) -> None:
    label(clips)
    (out / "notes.txt").write_text("mine")
    (out / "clips" / "mine.csv").write_text("mine")
    assert label(clips, labels={"top_k": 3}, overwrite=True) == 0
    assert len(read_rows(out, "clips")) == 4
    assert len(read_rows(out, "clips")[0]["labels"]) == 3
    assert (out / "notes.txt").read_text() == (out / "clips" / "mine.csv").read_text() == "mine"


def test_overwrite_never_touches_a_folder_of_others(
    label: Labeller, clips: Path, out: Path
) -> None:
    (out / "clips").mkdir(parents=True)
    (out / "clips" / "mine.parquet").write_text("mine")
    with pytest.raises(OutputError, match="overwrite removes only what Earmark wrote"):
        label(clips, overwrite=True)
    assert (out / "clips" / "mine.parquet").read_text() == "mine"


def test_retry_failed_tries_only_the_failed_items(label: Labeller, clips: Path, out: Path) -> None:
    bad = clips / "1.wav"
    good, stat = bad.read_bytes(), bad.stat()
    bad.write_bytes(b"x" * len(good))
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert label(clips, max_failed=1.0) == 0
    kept = {row["clip_id"]: row for row in read_rows(out, "clips")}
    assert label(clips, max_failed=1.0) == 0  # failed items are not tried again by themselves
    assert len(read_rows(out, "errors")) == 1
    bad.write_bytes(good)
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert label(clips, retry_failed=True) == 0
    assert not read_rows(out, "errors")
    now = {row["clip_id"]: row for row in read_rows(out, "clips")}
    assert len(now) == 4
    assert kept.items() <= now.items()
    assert run_verify(str(out)) == 0


@pytest.mark.parametrize("part", ["windows", "clips"])
def test_a_deleted_part_is_found_and_redone_alone(
    label: Labeller, clips: Path, out: Path, part: str
) -> None:
    label(clips)
    before, wanted = part_times(out), read_rows(out, "clips")
    victim = sorted((out / part).iterdir())[0]
    victim.unlink()
    assert run_verify(str(out)) == 3
    problems = [finding.problem for finding in verify_result(read_result(str(out)))]
    assert problems == [f"its {part} part is missing"]
    assert label(clips) == 0
    assert [row["clip_id"] for row in read_rows(out, "clips")] == [row["clip_id"] for row in wanted]
    assert len(before.items() & part_times(out).items()) == 3
    assert run_verify(str(out)) == 0


def test_a_second_run_on_the_same_output_says_why_not(
    label: Labeller, clips: Path, out: Path
) -> None:
    with hold_output(str(out)), pytest.raises(OutputError, match="another run is writing to"):
        label(clips)
    assert not out.exists()
    assert label(clips) == 0


def test_what_has_vanished_is_no_failure_of_this_run(
    label: Labeller, clips: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (clips / "bad.wav").write_bytes(b"no audio")
    assert label(clips) == 3
    (clips / "bad.wav").unlink()
    (clips / "3.wav").unlink()
    assert label(clips, quiet=False) == 0
    totals = run_record(out)["totals"]
    assert (totals["found_items"], totals["found_failures"], totals["vanished_items"]) == (3, 0, 2)
    printed = capsys.readouterr().err
    assert "3 items found: 3 labelled, 0 failed" in printed
    assert "Not in this input, or beyond its limit: 2 items of earlier runs" in printed
    assert label(clips, retry_failed=True) == 0
    assert len(read_rows(out, "errors")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runner=Nonsense"], "Beam has no runner Nonsense"),
        (["--nosuch=1"], "Beam knows no pipeline option --nosuch"),
        (["--runner=FlinkRunner", "--flink_master=host:8081"], "neither Earmark nor torch"),
        (
            ["--runner=FlinkRunner", "--flink_master=host:8081", "--environment_config=image"],
            "is the local path",
        ),
    ],
)
def test_a_runner_that_cannot_do_it_is_refused_before_anything_is_written(
    label: Labeller, clips: Path, out: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_label(label.config(clips), options)
    assert not out.exists()


SECRET_OUTPUT = "memory://someone:PASSWORD@host/out"


@pytest.fixture
def secret_output() -> Iterator[str]:
    """A remote output whose URL holds a password."""
    yield SECRET_OUTPUT
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_an_outputs_password_is_neither_printed_nor_written(
    label: Labeller, clips: Path, secret_output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (clips / "bad.wav").write_bytes(b"this is no audio at all" * 50)
    assert label(clips, output=secret_output, quiet=False) == 3
    said = capsys.readouterr()
    for folder in ("clips", "windows", "errors"):
        assert f"memory://host/out/{folder}/*.parquet" in said.err
    assert "PASSWORD" not in said.out + said.err
    texts = {
        name: file.getvalue()
        for name, file in MemoryFileSystem.store.items()
        if name.endswith(".json")
    }
    assert len(texts) == 4  # run.json and three commits
    assert b"memory://host/out" in texts["/someone:PASSWORD@host/out/run.json"]
    assert not [name for name, text in texts.items() if b"PASSWORD" in text]


def test_a_run_that_is_left_running_names_the_output_without_its_password(
    label: Labeller,
    clips: Path,
    secret_output: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_module, "run_graph", lambda *args: False)
    assert label(clips, output=secret_output) == 0
    assert "check it: earmark verify memory://host/out" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named_without_its_password(
    label: Labeller, clips: Path, secret_output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError("access is denied")

    monkeypatch.setattr(run_module, "heal", fail)
    with pytest.raises(
        OutputError, match=r"^memory://host/out cannot be written: access"
    ) as caught:
        label(clips, output=secret_output)
    assert "PASSWORD" not in str(caught.value)
