"""Files whose time has changed and whose bytes have not: their rows are kept."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.labelling import same_bytes
from pipeline.labelling.run import run_label
from pipeline.result.verify import run_verify
from tests.support.audio_factory import write_noise
from tests.support.labelling import read_rows, small_config

NAMES = ("a", "b", "c", "d", "e")


class Labelled:
    """Five files in units of up to two windows, labelled again and again."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.audio, self.out, self._model = folder / "audio", folder / "out", model
        for number, name in enumerate(NAMES):
            write_noise(self.audio / f"{name}.wav", seed=number)

    def __call__(self, **changes: Any) -> dict[str, Any]:
        """Label; return the totals."""
        assert run_label(small_config(self._model, self.out, self.audio, **changes), []) in (0, 3)
        assert run_verify(str(self.out), quiet=True) == 0
        totals: dict[str, Any] = json.loads((self.out / "run.json").read_text())["totals"]
        assert totals["found_items"] == totals["items"] == len(list(self.audio.iterdir()))
        return totals

    def touch(self, *names: str) -> None:
        """Give files another time."""
        for name in names:
            path = self.audio / f"{name}.wav"
            before_ns = path.stat().st_mtime_ns
            os.utime(path, ns=(before_ns + 10**9, before_ns + 10**9))

    def commits(self) -> dict[str, bytes]:
        return {path.stem: path.read_bytes() for path in (self.out / "_commits").iterdir()}


@pytest.fixture
def labelled(tmp_path: Path, tiny_model: Path) -> Labelled:
    return Labelled(tmp_path, tiny_model)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed."""
    names: list[str] = []
    hash_it = same_bytes._sha256

    def note(url: str) -> str | None:
        names.append(Path(url).stem)
        return hash_it(url)

    monkeypatch.setattr(same_bytes, "_sha256", note)
    return names


def test_another_time_alone_labels_nothing_again(
    labelled: Labelled, hashed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert labelled()["new_items"] == 5
    rows, units = read_rows(labelled.out, "clips"), labelled.commits().keys()
    assert labelled()["new_items"] == 0
    assert hashed == []
    labelled.touch(*NAMES)
    capsys.readouterr()
    assert labelled(quiet=False)["new_items"] == 0
    assert "with another time and the same bytes: 5 files" in capsys.readouterr().err
    assert sorted(hashed) == list(NAMES)
    assert (read_rows(labelled.out, "clips"), labelled.commits().keys()) == (rows, units)
    assert (labelled.out / "_SUCCESS").is_file()
    hashed.clear()
    assert labelled()["new_items"] == 0
    assert hashed == []  # the commits have learnt the new times


def test_a_copy_of_the_folder_labels_nothing_again(labelled: Labelled) -> None:
    labelled()
    shutil.copytree(labelled.audio, labelled.audio.with_name("copy"))  # times are copied, too
    shutil.rmtree(labelled.audio)
    labelled.audio.mkdir()
    for path in labelled.audio.with_name("copy").iterdir():
        shutil.copyfile(path, labelled.audio / path.name)
    assert labelled()["new_items"] == 0


def test_other_bytes_of_the_same_size_are_labelled_and_the_rest_is_kept(
    labelled: Labelled, hashed: list[str]
) -> None:
    labelled(units={"windows": 100})
    before = {row["clip_id"]: row for row in read_rows(labelled.out, "clips")}
    size = (labelled.audio / "b.wav").stat().st_size
    write_noise(labelled.audio / "b.wav", seed=77)
    assert (labelled.audio / "b.wav").stat().st_size == size
    labelled.touch("b", "c", "d")
    assert labelled(units={"windows": 100})["new_items"] == 1
    assert sorted(hashed) == ["b", "c", "d"]
    after = {row["clip_id"]: row for row in read_rows(labelled.out, "clips")}
    differing = {Path(name).stem for name, row in after.items() if row != before[name]}
    assert differing == {"b"}
    assert labelled(units={"windows": 100})["new_items"] == 0


def test_a_unit_without_a_file_to_keep_is_redone_whole(labelled: Labelled) -> None:
    labelled(units={"windows": 100})
    write_noise(labelled.audio / "b.wav", seed=77)
    labelled.touch("b")
    assert labelled(units={"windows": 100})["new_items"] == 5


def test_a_failed_file_with_another_time_is_tried_again_alone(labelled: Labelled) -> None:
    (labelled.audio / "b.wav").write_bytes(b"no audio")
    assert labelled(units={"windows": 100})["failures"] == 1
    labelled.touch("a", "b", "c")
    totals = labelled(units={"windows": 100})
    assert (totals["new_items"], totals["failures"]) == (1, 1)
    labelled.touch("a")
    totals = labelled(units={"windows": 100}, retry_failed=True)
    assert (totals["new_items"], totals["failures"]) == (1, 1)


def test_segments_of_a_file_are_kept_with_it(
    labelled: Labelled, hashed: list[str], tmp_path: Path
) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text("uri,start_s,end_s\naudio/a.wav,0,0.5\naudio/a.wav,0.5,1\n")
    config = small_config(labelled._model, labelled.out, manifest)
    assert run_label(config, []) == 0
    labelled.touch("a")
    assert run_label(config, []) == 0
    assert hashed == ["a"]
    assert json.loads((labelled.out / "run.json").read_text())["totals"]["new_items"] == 0


def test_workers_that_plan_keep_them_too(labelled: Labelled, hashed: list[str]) -> None:
    labelled()
    labelled.touch(*NAMES)
    by_workers = {"windows": 2, "max_listed_here": 0}
    assert labelled(units=by_workers)["new_items"] == 0
    assert sorted(hashed) == list(NAMES)
    assert labelled(units=by_workers)["new_items"] == 0
    assert sorted(hashed) == list(NAMES)


def test_a_plan_writes_nothing(labelled: Labelled) -> None:
    from pipeline.labelling.plan import make_plan

    labelled()
    commits = labelled.commits()
    labelled.touch(*NAMES)
    plan = make_plan(small_config(labelled._model, labelled.out, labelled.audio))
    assert (len(plan.units), len(plan.renewed)) == (0, len(commits))
    assert labelled.commits() == commits
