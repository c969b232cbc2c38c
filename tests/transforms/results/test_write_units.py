"""Parts and commits are whole or absent, whatever the order and whatever happens in between."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path

import apache_beam as beam
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to

from tests.support.unit_factory import (
    clip_events,
    commit_events,
    failure_event,
    file_unit,
    make_item,
    row_settings,
    unit_events,
)
from transforms.errors import AccountingError, OutputError
from transforms.process.progress_counts import live_counts, live_units
from transforms.records import (
    Carried,
    ClipRow,
    ContainerSlice,
    UnitEnd,
    UnitEvent,
    WindowRow,
    WorkUnit,
)
from transforms.results import write_units as commit_step
from transforms.results.commits import (
    UnitSummary,
    UnitTotals,
    item_version,
    read_commit,
    read_commits,
)
from transforms.results.write_units import (
    CommitSettings,
    CommitUnits,
    OpenUnit,
    SkipCommitted,
    _CommitUnitsFn,
)
from transforms.storage import listing, urls


@pytest.fixture
def settings(tmp_path: Path) -> CommitSettings:
    return CommitSettings(
        output=str(tmp_path / "out"),
        run_id="run",
        fingerprint="f" * 64,
        model_sha256="m" * 64,
        rows=row_settings(),
    )


def read_part(settings: CommitSettings, part: str, unit_id: str) -> list[dict[str, object]]:
    return pq.read_table(Path(settings.output) / part / f"{unit_id}.parquet").to_pylist()


def files_below(folder: str) -> set[str]:
    root = Path(folder)
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def files_of_unit(unit_id: str) -> set[str]:
    parts = {f"{part}/{unit_id}.parquet" for part in ("windows", "clips", "errors")}
    return {*parts, f"_commits/{unit_id}.json"}


def test_a_unit_becomes_one_set_of_parts_and_a_commit(settings: CommitSettings) -> None:
    unit = file_unit("u1", 3)
    commit = commit_events(settings, unit_events(unit, failed=[1]))
    assert files_below(settings.output) == files_of_unit("u1")
    assert commit.totals == UnitTotals(items=3, clips=2, failures=1, windows=4, audio_s=24.0)
    assert [row["clip_id"] for row in read_part(settings, "clips", "u1")] == [
        "/audio/u1-0.wav",
        "/audio/u1-2.wav",
    ]
    assert read_part(settings, "errors", "u1")[0]["message"] == "not audio"


def test_a_unit_of_failures_has_empty_tables_with_their_schema(settings: CommitSettings) -> None:
    commit_events(settings, unit_events(file_unit("u1", 1), failed=[0]))
    table = pq.read_table(Path(settings.output) / "windows" / "u1.parquet")
    assert table.num_rows == 0
    assert "embedding" in table.schema.names


def test_no_order_is_assumed(settings: CommitSettings, tmp_path: Path) -> None:
    events = unit_events(file_unit("u1", 5), failed=[2], num_windows=3)
    ordered = commit_events(settings, events)
    random.Random(7).shuffle(events)
    shuffled = commit_events(dataclasses.replace(settings, output=str(tmp_path / "other")), events)
    assert shuffled.totals == ordered.totals
    assert shuffled.parts["clips"] == ordered.parts["clips"]
    assert shuffled.parts["errors"] == ordered.parts["errors"]


@pytest.mark.parametrize("failed", [[], [0]])
def test_a_commit_reads_back_as_it_was_written(settings: CommitSettings, failed: list[int]) -> None:
    commit = commit_events(settings, unit_events(file_unit("u1", 2), failed=failed))
    assert set(commit.parts) == {"windows", "clips", *["errors"] * len(failed)}
    assert read_commit(settings.output, "u1") == commit
    assert commit.ledger.items[0].clip_id == "/audio/u1-0.wav"
    assert commit.ledger.items[0].version == item_version(make_item("/audio/u1-0.wav"))


def test_parts_say_what_made_them(settings: CommitSettings) -> None:
    commit_events(settings, unit_events(file_unit("u1", 1)))
    for part in ("windows", "clips"):
        footer = pq.read_schema(Path(settings.output) / part / "u1.parquet").metadata
        assert footer[b"earmark.fingerprint"] == b"f" * 64
        assert footer[b"earmark.model_sha256"] == b"m" * 64
        assert json.loads(footer[b"earmark.labels"])[1]["name"] == "Beta, loud"
        codecs = pq.read_metadata(Path(settings.output) / part / "u1.parquet")
        assert codecs.row_group(0).column(0).compression == "ZSTD"


def test_a_damaged_commit_is_told_apart(settings: CommitSettings) -> None:
    commit_events(settings, unit_events(file_unit("u1", 1)))
    (Path(settings.output) / "_commits" / "u2.json").write_text("{")
    whole, damaged = read_commits(settings.output)
    assert (list(whole), list(damaged)) == (["u1"], ["u2"])
    assert isinstance(damaged["u2"], OutputError)
    with pytest.raises(OutputError, match=r"u2\.json: not a commit of Earmark"):
        read_commit(settings.output, "u2")


def test_windows_of_a_clip_that_fails_later_are_dropped_even_when_flushed(
    settings: CommitSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_step, "ROW_GROUP_ROWS", 2)
    unit = file_unit("u1", 3)
    events = unit_events(unit, num_windows=3)
    clip = next(e for e in events if type(e).__name__ == "ClipRow" and e.item_index == 1)
    events[events.index(clip)] = failure_event("u1", 1, unit.items[1])
    commit = commit_events(settings, events)
    assert commit.totals == UnitTotals(items=3, clips=2, failures=1, windows=6, audio_s=24.0)
    windows = read_part(settings, "windows", "u1")
    assert {row["clip_id"] for row in windows} == {"/audio/u1-0.wav", "/audio/u1-2.wav"}


def test_a_lost_window_leaves_the_unit_open(settings: CommitSettings) -> None:
    events = unit_events(file_unit("u1", 2), num_windows=2)[1:]
    with (
        pytest.raises(AccountingError, match="2 clips with 3 windows and 0 failures of 2 items"),
        TestPipeline(runner="FnApiRunner") as pipeline,
    ):
        _ = pipeline | beam.Create([events]) | beam.FlatMap(list) | CommitUnits(settings)
    assert not listing.list_names(urls.join(settings.output, "_commits"))


def test_a_unit_that_gives_fewer_items_than_it_lists_is_an_error(settings: CommitSettings) -> None:
    unit = file_unit("u1", 2)
    events = [*unit_events(file_unit("u1", 1))[:-1], UnitEnd(unit, 1)]
    with pytest.raises(AccountingError, match="lists 2 items, and 1 came out"):
        commit_events(settings, events)


def test_a_retry_keeps_the_good_rows_and_replaces_the_unit(settings: CommitSettings) -> None:
    old = file_unit("u1", 4)
    before = commit_events(settings, unit_events(old, failed=[1, 3]))
    retried = WorkUnit(
        unit_id="u2",
        kind="files",
        items=(old.items[1], old.items[3]),
        replaces=("u1",),
        carried=Carried("u1"),
    )
    commit = commit_events(settings, unit_events(retried, failed=[1]))
    assert files_below(settings.output) == files_of_unit("u2")
    assert commit.totals == UnitTotals(items=4, clips=3, failures=1, windows=6, audio_s=36.0)
    assert {item.clip_id for item in commit.ledger.items} == {
        item.clip_id for item in before.ledger.items
    }
    assert commit.engines == before.engines


def test_a_retried_slice_still_covers_its_slice(settings: CommitSettings) -> None:
    container = ContainerSlice("/a.tar", "/a.tar", 100, "v1", 0, 100)
    members = tuple(make_item(f"/a.tar#{name}.wav", member=f"{name}.wav") for name in "ab")
    whole = WorkUnit("u1", "tar", container=container)
    events = unit_events(WorkUnit("u1", "files", members), failed=[1])[:-1]
    first = commit_events(settings, [*events, UnitEnd(whole, 2)])
    assert first.ledger.items == ()
    retried = WorkUnit(
        "u2", "tar", (members[1],), container, replaces=("u1",), carried=Carried("u1")
    )
    again = unit_events(WorkUnit("u2", "files", (members[1],)))[:-1]
    second = commit_events(settings, [*again, UnitEnd(retried, 1)])
    assert second.ledger == first.ledger
    assert second.totals.items == 2


def test_rows_of_vanished_items_are_carried_over(settings: CommitSettings) -> None:
    old = file_unit("u1", 3)
    commit_events(settings, unit_events(old, failed=[2]))
    gone = frozenset({old.items[0].clip_id, old.items[2].clip_id})
    redone = WorkUnit("u2", "files", (old.items[1],), replaces=("u1",), carried=Carried("u1", gone))
    commit = commit_events(settings, unit_events(redone))
    assert commit.totals == UnitTotals(items=3, clips=2, failures=1, windows=4, audio_s=24.0)
    assert len(commit.ledger.items) == 3
    assert [row["unit_id"] for row in read_part(settings, "errors", "u2")] == ["u2"]


def test_the_transform_commits_each_unit_as_it_comes_to_its_end(settings: CommitSettings) -> None:
    events = [*unit_events(file_unit("u1", 2)), *unit_events(file_unit("u2", 1))]
    with TestPipeline(runner="FnApiRunner") as pipeline:
        summaries = pipeline | beam.Create([events]) | beam.FlatMap(list) | CommitUnits(settings)
        assert_that(summaries | beam.Map(lambda s: s.unit_id), equal_to(["u1", "u2"]))
    assert not Path(settings.output, "_staging").exists() or not files_below(
        str(Path(settings.output, "_staging"))
    )


def test_half_a_unit_at_the_bundles_end_raises_and_leaves_nothing(
    settings: CommitSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_step, "ROW_GROUP_ROWS", 1)
    events = unit_events(file_unit("u1", 2))[:-1]
    with (
        pytest.raises(AccountingError, match="split the stage"),
        TestPipeline(runner="FnApiRunner") as pipeline,
    ):
        _ = pipeline | beam.Create([events]) | beam.FlatMap(list) | CommitUnits(settings)
    assert files_below(settings.output) == set()


def test_units_committed_already_are_skipped_with_their_summary(settings: CommitSettings) -> None:
    done = file_unit("u1", 2)
    commit = commit_events(settings, unit_events(done))
    with TestPipeline(runner="FnApiRunner") as pipeline:
        to_do, skipped = (
            pipeline | beam.Create([done, file_unit("u2", 1)]) | SkipCommitted(settings)
        )
        assert_that(to_do | beam.Map(lambda unit: unit.unit_id), equal_to(["u2"]), "to do")
        assert_that(skipped, equal_to([UnitSummary.of(commit)]), "done")


def test_an_attempt_that_comes_second_keeps_the_parts_of_the_first(
    settings: CommitSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner presumes a worker dead and starts its unit again, but the worker is alive."""
    replaced, unit = file_unit("u0", 2), file_unit("u1", 2, replaces=("u0",))
    commit_events(settings, unit_events(replaced))
    write_parts, firsts = OpenUnit._write_parts, []

    def overtaken(second: OpenUnit, of: WorkUnit) -> dict[str, Path]:
        staged = write_parts(second, of)
        with monkeypatch.context() as patched:
            patched.setattr(OpenUnit, "_write_parts", write_parts)
            firsts.append(commit_events(settings, unit_events(unit)))
        return staged

    monkeypatch.setattr(OpenUnit, "_write_parts", overtaken)
    second = dataclasses.replace(settings, run_id="zombie")
    # The later attempt labelled less: its parts would not be those that the commit vouches for.
    assert commit_events(second, unit_events(unit, failed=[1])) == firsts[0]
    assert files_below(settings.output) == files_of_unit("u1") - {"errors/u1.parquet"}
    assert read_commit(settings.output, "u1") == firsts[0]
    assert [len(read_part(settings, part, "u1")) for part in ("clips", "windows")] == [2, 4]


@pytest.mark.parametrize("damage", ["fingerprint", "commit", "part", "size"])
def test_a_commit_that_is_not_valid_is_written_anew(settings: CommitSettings, damage: str) -> None:
    unit, output = file_unit("u1", 2), Path(settings.output)
    if damage == "fingerprint":
        commit_events(dataclasses.replace(settings, fingerprint="0" * 64), unit_events(unit))
    else:
        commit_events(settings, unit_events(unit))
    if damage == "commit":
        (output / "_commits" / "u1.json").write_text("{")
    elif damage == "part":
        (output / "clips" / "u1.parquet").unlink()
    elif damage == "size":
        (output / "clips" / "u1.parquet").write_bytes(b"PAR1")
    with TestPipeline(runner="FnApiRunner") as pipeline:
        to_do, _ = pipeline | beam.Create([unit]) | SkipCommitted(settings)
        assert_that(to_do | beam.Map(lambda unit: unit.unit_id), equal_to(["u1"]), "to do")
    again = commit_events(settings, unit_events(unit, failed=[1]))
    assert read_commit(settings.output, "u1") == again
    assert (again.fingerprint, again.totals.failures) == (settings.fingerprint, 1)
    assert len(read_part(settings, "clips", "u1")) == 1


def test_an_items_version_changes_with_where_it_lies_and_what_is_said_of_it() -> None:
    item = make_item("/a.wav")
    changes = {"size": 11, "version": "v2", "truth": ("Dog",), "metadata": '{"a": 1}',
               "uri": "/b.wav", "member": "m", "row": 0, "start_s": 1.0, "end_s": 1.0}  # fmt: skip
    versions = {
        item_version(item),
        *(item_version(dataclasses.replace(item, **{n: v})) for n, v in changes.items()),
    }
    assert len(versions) == 10
    assert item_version(dataclasses.replace(item, url="/signed?sig=1")) in versions


def audio_counted(events: list[UnitEvent]) -> list[float]:
    """Return the seconds of audio counted after each of a unit's events."""
    audio = commit_step.AudioProgress()
    return list(itertools.accumulate(audio.add(event) for event in events))


def windows_at(*starts_s: float, index: int = 0) -> list[UnitEvent]:
    """Windows of 10 s."""
    window = clip_events("u", index, make_item("a.wav"))[0]
    assert isinstance(window, WindowRow)
    return [dataclasses.replace(window, start_s=s, end_s=s + 10) for s in starts_s]


def clip_of(duration_s: float, index: int = 0) -> ClipRow:
    row = clip_events("u", index, make_item("a.wav"))[-1]
    assert isinstance(row, ClipRow)
    return dataclasses.replace(row, facts=dataclasses.replace(row.facts, duration_s=duration_s))


@pytest.mark.parametrize(
    ("events", "counted"),
    [
        ([*windows_at(0, 10), clip_of(20)], [10, 20, 20]),
        ([*windows_at(0, 2.5, 5, 7), clip_of(17)], [10, 12.5, 15, 17, 17]),  # overlapping
        ([*windows_at(100, 105), clip_of(15)], [10, 15, 15]),  # a segment starts where it starts
        ([*windows_at(5, 0), clip_of(15)], [10, 10, 15]),  # out of order
        ([clip_of(15), *windows_at(0, 5)], [15, 15, 15]),
        ([*windows_at(0), *windows_at(0, index=1), clip_of(9)], [10, 20, 19]),
        ([*windows_at(0), failure_event("u", 0, make_item("a.wav"))], [10, 0]),
        ([failure_event("u", 0, make_item("a.wav")), *windows_at(0)], [0, 0]),
    ],
)
def test_no_audio_is_counted_twice(events: list[UnitEvent], counted: list[float]) -> None:
    assert audio_counted(events) == counted


def test_live_counts_agree_with_what_is_committed(
    settings: CommitSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_counts, "audio_s", 0.0)  # what other tests left would round
    before, first_unit = dataclasses.replace(live_counts), live_units.num_committed
    # Two windows of 10 s in each clip of 12 s.
    events = [
        *unit_events(file_unit("u1", 3), failed=[1]),
        *unit_events(file_unit("u2", 2)),
    ]
    with TestPipeline() as p:
        _ = p | beam.Create([events]) | beam.FlatMap(lambda es: es) | CommitUnits(settings)
    totals = [commit.totals for commit in read_commits(settings.output)[0].values()]
    now = live_counts
    assert now.units - before.units == 2
    assert now.clip_windows - before.clip_windows == sum(t.windows for t in totals) == 8
    seen = live_units.seen(first_unit)
    assert (seen.committed, {"u1", "u2"} & seen.open.keys()) == (["u1", "u2"], set())
    assert now.clips - before.clips == sum(t.clips for t in totals) == 4
    assert now.audio_s - before.audio_s == sum(t.audio_s for t in totals) == 48.0


def test_units_in_progress_tell_how_many_items_are_done(settings: CommitSettings) -> None:
    first_unit = live_units.num_committed
    step = _CommitUnitsFn(settings)
    step.setup()
    step.start_bundle()
    events = unit_events(file_unit("u9", 3), failed=[1])
    done = []
    for event in events[:-1]:
        list(step.process(event))
        done.append(live_units.seen(first_unit).open.get("u9", 0))
    assert (done[-1], sorted(set(done))) == (3, [0, 1, 2, 3])
    step.teardown()  # what is not committed is forgotten
    seen = live_units.seen(first_unit)
    assert (seen.committed, "u9" in seen.open) == ([], False)
