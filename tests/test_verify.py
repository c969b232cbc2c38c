"""What ``verify`` finds in a result, and that following its advice mends it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config import RunConfig
from pipeline.result import read_result
from pipeline.run import run_label
from pipeline.verify import Finding, Kind, make_advice, run_verify, verify_result
from tests.audio_factory import noise, write
from transforms import storage

RERUN = "un the same earmark label command again"
CapturedText = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for index in range(3):
        write(folder / f"{index}.wav", noise(1.0, seed=index), 16_000)
    return folder


@pytest.fixture(scope="module")
def label(tiny_model: Path, clips: Path) -> Callable[[Path], int]:
    """Runs the same ``earmark label`` command each time: two units, of two clips and of one."""

    def run(out: Path) -> int:
        config = {
            "inputs": (str(clips),),
            "output": str(out),
            "quiet": True,
            "model": {"name": str(tiny_model)},
            "inference": {"precision": "fp32", "device": "cpu", "batch_size": 2},
            "units": {"windows": 2},
            "decode": {"processes": 1},
        }
        return run_label(RunConfig(**config), [])

    return run


@pytest.fixture(scope="module")
def whole(label: Callable[[Path], int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert label(out) == 0
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A result to damage, in a folder whose name a shell and a terminal could mistake."""
    return Path(shutil.copytree(whole, tmp_path / "[bold] out"))


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def first(folder: Path) -> Path:
    return min(folder.iterdir())


def kinds(out: Path) -> list[Kind]:
    return [finding.kind for finding in verify_result(read_result(str(out)))]


def test_a_whole_result_is_called_so(out: Path, capsys: CapturedText) -> None:
    assert run_verify(str(out)) == 0
    assert capsys.readouterr().out == (
        f"{out} is whole: 2 units, 3 clips, 3 windows, 0 failures.\n"
    )


@pytest.mark.parametrize("part", ["windows", "clips"])
def test_what_is_said_of_a_flipped_byte_mends_it(
    label: Callable[[Path], int], out: Path, capsys: CapturedText, part: str
) -> None:
    victim = first(out / part)
    wanted = pq.read_table(victim)
    flip_byte(victim)
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert f"changed {victim}: its content has changed" in text
    assert "Then r" + RERUN in text
    commands = [line for line in text.splitlines() if line.startswith("  rm ")]
    assert len(commands) == 1
    # A run alone does not see it; with the commit away it redoes that unit and no other.
    assert label(out) == 0
    assert run_verify(str(out)) == 3
    kept = max((out / part).iterdir()).stat().st_mtime_ns
    subprocess.run(commands[0], shell=True, check=True)
    assert label(out) == 0
    assert run_verify(str(out)) == 0
    assert pq.read_table(victim).equals(wanted)
    assert max((out / part).iterdir()).stat().st_mtime_ns == kept


def remove_part(out: Path) -> None:
    first(out / "clips").unlink()


def cut_part(out: Path) -> None:
    path = first(out / "windows")
    path.write_bytes(path.read_bytes()[:-10])


def break_commit(out: Path) -> None:
    first(out / "_commits").write_text("{")


def remove_commit(out: Path) -> None:
    first(out / "_commits").unlink()


def add_orphan(out: Path) -> None:
    shutil.copy(first(out / "windows"), out / "windows" / f"{'0' * 20}.parquet")


def change_totals(out: Path) -> None:
    run = json.loads((out / "run.json").read_text())
    run["totals"]["clips"] += 1
    (out / "run.json").write_text(json.dumps(run))


def remove_run(out: Path) -> None:
    (out / "run.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        remove_part,
        cut_part,
        break_commit,
        remove_commit,
        add_orphan,
        change_totals,
        remove_run,
    ],
)
def test_what_a_run_sees_by_itself_needs_only_a_run(
    label: Callable[[Path], int],
    out: Path,
    capsys: CapturedText,
    damage: Callable[[Path], None],
) -> None:
    damage(out)
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert "R" + RERUN in text
    assert "  rm " not in text
    assert f"{out} is damaged" in text
    assert label(out) == 0
    assert run_verify(str(out)) == 0


def test_an_interrupted_result_is_unfinished_not_damaged(
    label: Callable[[Path], int], out: Path, capsys: CapturedText
) -> None:
    # As a kill leaves it: a unit's parts are there and its commit is not, and no _SUCCESS.
    (out / "_SUCCESS").unlink()
    remove_commit(out)
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert f"{out} is unfinished: what is committed is whole, 1 units" in text
    assert "damaged" not in text
    assert "R" + RERUN in text
    assert label(out) == 0
    assert run_verify(str(out)) == 0


def test_an_interrupted_result_can_be_damaged_as_well(out: Path, capsys: CapturedText) -> None:
    (out / "_SUCCESS").unlink()
    remove_part(out)
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert f"{out} is damaged" in text
    assert "unfinished" in text


def test_files_of_others_that_nobody_reads_are_only_mentioned(
    out: Path, capsys: CapturedText
) -> None:
    (out / "windows" / ".DS_Store").touch()
    assert run_verify(str(out)) == 0
    text = capsys.readouterr().out
    assert f"note {out}/windows/.DS_Store: Earmark did not write it\n" in text
    assert "is whole" in text
    assert run_verify(str(out), quiet=True) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["mine.parquet", "MINE.PARQUET", "deep/mine.parquet"])
def test_foreign_parquet_is_to_be_moved_away(out: Path, capsys: CapturedText, name: str) -> None:
    path = out / "clips" / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(first(out / "clips"), path)
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert f"foreign {path}: Earmark did not write it\n" in text
    assert "Move the foreign files away" in text
    assert RERUN not in text
    path.unlink()
    assert run_verify(str(out)) == 0


def test_an_unreadable_part_is_not_said_to_have_changed(
    out: Path, capsys: CapturedText, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str) -> None:
        raise PermissionError(13, "Permission denied", url)

    monkeypatch.setattr(storage, "open_read", refuse)
    assert set(kinds(out)) == {Kind.UNREADABLE}
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert re.search(r"unreadable .*: it cannot be read: .*Permission denied", text)
    assert "Make readable" in text
    assert "  rm " not in text
    assert RERUN not in text


def test_rows_that_do_not_add_up_and_other_settings_name_the_commit(
    label: Callable[[Path], int], out: Path
) -> None:
    path = first(out / "_commits")
    commit = json.loads(path.read_text())
    commit["totals"]["clips"] += 1
    commit["totals"]["items"] += 1
    path.write_text(json.dumps(commit))
    found = [f for f in verify_result(read_result(str(out))) if f.kind is Kind.CHANGED]
    assert [finding.unit_id for finding in found] == [path.stem]
    path.unlink()
    assert label(out) == 0
    assert run_verify(str(out)) == 0


def test_a_clip_in_two_units_is_found(out: Path) -> None:
    path = first(out / "_commits")
    other = "f" * 20
    for part in ("windows", "clips"):
        shutil.copy(out / part / f"{path.stem}.parquet", out / part / f"{other}.parquet")
    commit = {**json.loads(path.read_text()), "unit_id": other}
    (out / "_commits" / f"{other}.json").write_text(json.dumps(commit))
    found = [f for f in verify_result(read_result(str(out))) if "twice" in f.problem]
    assert found
    assert {(finding.kind, finding.unit_id) for finding in found} == {(Kind.CHANGED, other)}


def test_advice_is_given_once_and_for_urls_without_a_shell() -> None:
    findings = [
        Finding("a", "it has changed", Kind.CHANGED, "u1"),
        Finding("b", "it has changed", Kind.CHANGED, "u1"),
        Finding("c", "foreign", Kind.FOREIGN),
    ]
    foreign, remove, url, rerun = make_advice("gs://bucket/out", findings)
    assert foreign.startswith("Move the foreign files away")
    assert remove.startswith("A run does not see changed content; remove the commits")
    assert url == "  remove gs://bucket/out/_commits/u1.json"
    assert rerun.startswith("Then r" + RERUN)
    assert make_advice("gs://bucket/out", [Finding("x", "note", Kind.STRAY)]) == []
