"""Planned by workers or by the launching machine: the same units, the same result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.label import RunConfig
from pipeline.labelling import run as run_module
from pipeline.labelling.forecast import DeferredForecast
from pipeline.labelling.plan import resolve_run
from pipeline.labelling.run import fits_job, plan_on_workers, run_label
from pipeline.result.verify import run_verify
from pipeline.terminal.progress import Expected
from tests.support.audio_factory import write_noise
from tests.support.containers import tar_bytes
from tests.support.labelling import read_rows, small_config
from tests.support.unit_factory import file_unit
from transforms.errors import ConfigError, InputError
from transforms.process.progress_counts import LiveCounts, UnitsSeen
from transforms.results.commits import list_unit_ids


def files(folder: Path) -> list[str]:
    """Loose files, one of them damaged and one twice."""
    for number in range(7):
        write_noise(folder / "files" / f"{number}.wav", seed=number)
    (folder / "files" / "broken.wav").write_bytes(b"no audio")
    (folder / "files" / "notes.txt").write_bytes(b"left aside")
    return [str(folder / "files"), str(folder / "files" / "0.wav")]


def clips_of(folder: Path, count: int) -> list[tuple[str, bytes]]:
    return [
        (f"{n}.wav", write_noise(folder / f"{n}.wav", seed=n).read_bytes()) for n in range(count)
    ]


def tar(folder: Path) -> list[str]:
    """An archive of several units, with a name twice and siblings."""
    members = clips_of(folder / "clips", 9)
    members[4:4] = [("3.json", b'{"label": "bird"}'), ("1.wav", members[5][1])]
    (folder / "x.tar").write_bytes(tar_bytes(members))
    return [str(folder / "x.tar")]


def parquet(folder: Path) -> list[str]:
    """A Parquet file of several row groups."""
    rows = [data for _, data in clips_of(folder / "clips", 7)]
    pq.write_table(pa.table({"audio": rows, "n": list(range(7))}), folder / "x.parquet", 2)
    return [str(folder / "x.parquet")]


def manifest(folder: Path) -> list[str]:
    """Segments, metadata, a file that is not there and a line that cannot be read."""
    write_noise(folder / "long.wav", 12.0)
    rows = [{"uri": "long.wav", "start_s": n, "end_s": n + 2, "n": n} for n in range(5)]
    lines = [*map(json.dumps, [*rows, {"uri": "nowhere.wav"}]), "{"]
    (folder / "list.jsonl").write_text("\n".join(lines))
    return [str(folder / "list.jsonl")]


def mixture(folder: Path) -> list[str]:
    """Some of each."""
    return [
        text for make in (tar, parquet, manifest) for text in make(_made(folder / make.__name__))
    ]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


class Label:
    """``label`` with the tiny model and small units, planned here or there."""

    def __init__(self, model: Path) -> None:
        self.model = model

    def config(self, inputs: list[str], output: Path, **changes: Any) -> RunConfig:
        inference = {"device": "cpu", "precision": "fp32", "check_windows": 0}
        values = {"inference": inference, "max_failed": 1.0, **changes}
        return small_config(self.model, output, *inputs, **values)

    def here(self, inputs: list[str], output: Path, **changes: Any) -> int:
        return run_label(self.config(inputs, output, units={"windows": 2}, **changes), [])

    def there(self, inputs: list[str], output: Path, **changes: Any) -> int:
        units = {"windows": 2, "max_listed_here": 0}
        return run_label(self.config(inputs, output, units=units, **changes), [])


@pytest.fixture
def label(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Label:
    # A container counts as large enough to be cut.
    monkeypatch.setattr("transforms.sources.units.SourceSettings.is_full", _is_full)
    return Label(tiny_model)


def _is_full(settings: Any, windows: int, num_bytes: int) -> bool:
    return windows >= settings.windows_per_unit or num_bytes >= 100_000


def record(output: Path) -> dict[str, Any]:
    """What ``run.json`` says that does not depend on when the run was."""
    run = json.loads((output / "run.json").read_text())
    return {name: run[name] for name in ("status", "fingerprint", "results", "input", "totals")}


def clip_ids(output: Path) -> list[str]:
    return [row["clip_id"] for row in read_rows(output, "clips")]


@pytest.mark.parametrize("make", [files, mixture])
def test_workers_plan_the_same_units(
    make: Callable[[Path], list[str]], label: Label, tmp_path: Path
) -> None:
    inputs = make(_made(tmp_path / "in"))
    here, there = tmp_path / "here", tmp_path / "there"
    assert label.here(inputs, here) == label.there(inputs, there)
    units = list_unit_ids(str(here))
    assert list_unit_ids(str(there)) == units
    assert len(units) >= 3
    assert record(there) == record(here)
    assert clip_ids(there) == clip_ids(here)
    assert run_verify(str(there)) == 0
    # Again: all is done, whoever plans.
    for again in (label.there, label.here):
        again(inputs, there)
        assert record(there)["totals"]["new_units"] == 0
        assert record(there)["totals"]["found_items"] == record(here)["totals"]["found_items"]
    assert list_unit_ids(str(there)) == units


def test_the_display_learns_how_much_workers_planned(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.terminal.progress.POLL_INTERVAL_S", 0.001)
    monkeypatch.setattr("pipeline.labelling.forecast.PLAN_POLL_INTERVAL_S", 0.0)
    forecast, shown = DeferredForecast.__call__, []

    def watched(self: DeferredForecast, counts: LiveCounts, seen: UnitsSeen) -> Expected:
        shown.append((len(seen.committed), forecast(self, counts, seen)))
        return shown[-1][1]

    monkeypatch.setattr(DeferredForecast, "__call__", watched)
    inputs = tar(_made(tmp_path / "in"))
    label.there(inputs, tmp_path / "out", quiet=False)
    totals = record(tmp_path / "out")["totals"]
    half_way = [expected for units, expected in shown if units == totals["units"] // 2]
    assert half_way
    assert all(expected.windows for expected in half_way)
    assert "planned_units" not in json.loads((tmp_path / "out" / "run.json").read_text())


def test_what_is_missing_or_has_changed_is_done_alone(label: Label, tmp_path: Path) -> None:
    inputs = files(_made(tmp_path / "in"))
    out = tmp_path / "out"
    label.there(inputs, out)
    before = set(list_unit_ids(str(out)))
    (lost,) = (
        path
        for path in (out / "clips").glob("*.parquet")
        if inputs[1] in pq.read_table(path)["clip_id"].to_pylist()
    )
    lost.unlink()
    write_noise(tmp_path / "in" / "files" / "7.wav", seed=99)  # new
    write_noise(tmp_path / "in" / "files" / "6.wav", 2.0)  # changed
    (tmp_path / "in" / "files" / "5.wav").unlink()
    assert label.there(inputs, out) == 0
    totals = record(out)["totals"]
    after = set(list_unit_ids(str(out)))
    assert lost.stem in after
    assert len(before - after) == 1  # the unit of the changed file, replaced
    assert (totals["found_items"], totals["vanished_items"]) == (8, 1)
    assert run_verify(str(out)) == 0
    shutil.copytree(out, tmp_path / "twin")
    label.here(inputs, out)
    assert record(out)["totals"]["new_units"] == 0
    assert label.there(inputs, tmp_path / "twin", overwrite=True) == 0
    totals = record(tmp_path / "twin")["totals"]
    assert (totals["new_items"], totals["vanished_items"]) == (8, 0)


def test_failed_items_are_tried_again(label: Label, tmp_path: Path) -> None:
    inputs = files(_made(tmp_path / "in"))
    out = tmp_path / "out"
    label.there(inputs, out)
    assert record(out)["totals"]["found_failures"] == 1
    assert label.there(inputs, out, retry_failed=True) == 0
    assert record(out)["totals"]["new_items"] == 1


@pytest.mark.parametrize(("most", "is_here"), [(9, False), (10, True)])
def test_the_number_of_files_decides(
    most: int, is_here: bool, label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = files(_made(tmp_path / "in"))
    drawn = []
    monkeypatch.setattr(run_module, "build_graph", lambda *args, **kwargs: drawn.append("here"))
    monkeypatch.setattr(
        run_module, "build_deferred_graph", lambda *args, **kwargs: drawn.append("there")
    )
    units = {"max_listed_here": most}
    with pytest.raises((KeyError, TypeError)):  # no totals: nothing has been run
        run_label(label.config(inputs, tmp_path / "out", units=units), [])
    assert drawn == ["here" if is_here else "there"]


def test_what_is_wrong_is_found_before_the_work_starts(label: Label, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="nowhere does not exist"):
        label.there([str(tmp_path / "nowhere")], out)
    inputs = files(_made(tmp_path / "in"))
    resolved = resolve_run(label.config(inputs, out))
    calibrated = {"device": "cpu", "precision": "int8"}
    with pytest.raises(ConfigError, match=r"units\.max_listed_here is 1000000"):
        plan_on_workers(resolved, label.config(inputs, out, inference=calibrated))
    assert not (out / "run.json").exists()


def test_what_only_listing_shows_ends_the_run(label: Label, tmp_path: Path) -> None:
    (_made(tmp_path / "in") / "notes.txt").write_bytes(b"x")
    with pytest.raises(InputError, match="holds nothing to label"):
        label.there([str(tmp_path / "in")], tmp_path / "out")
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_a_job_that_dataflow_would_not_take_is_planned_there() -> None:
    assert fits_job([file_unit("u", 100)])
    assert not fits_job([file_unit(str(n), 1000) for n in range(200)])
