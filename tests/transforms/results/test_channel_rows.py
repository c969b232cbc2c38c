"""Items whose channels are clips: their rows, their accounting, and their failures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.unit_factory import (
    FACTS,
    commit_events,
    failure_event,
    file_unit,
    make_item,
    make_prediction,
    make_window,
    row_settings,
)
from transforms.process.progress_counts import LiveCounts, LiveUnits, live_counts
from transforms.records import (
    Carried,
    ClipRow,
    Failure,
    Item,
    ItemFailure,
    UnitEnd,
    UnitEvent,
    WindowRow,
    WorkUnit,
)
from transforms.results import write_units
from transforms.results.commits import (
    Commit,
    UnitTotals,
    channel_numbers,
    count_items,
    item_ids,
)
from transforms.results.rows import ClipAggregate
from transforms.results.write_units import CommitSettings


@pytest.fixture
def settings(tmp_path: Path) -> CommitSettings:
    rows = row_settings()
    return CommitSettings(str(tmp_path / "out"), "run", "f" * 64, "m" * 64, rows, each_channel=True)


def channel_events(
    unit_id: str, index: int, item: Item, channels: Sequence[int], failed: Sequence[int] = ()
) -> list[UnitEvent]:
    """Return two windows and the row or failure of each channel."""
    events: list[UnitEvent] = []
    prediction = make_prediction([0.1, 0.5, 0.9])
    for channel in channels:
        name = f"{item.clip_id}!{channel}"
        events += [
            WindowRow(unit_id, index, name, n, 10.0 * n, 10.0 * n + 10, prediction, channel)
            for n in range(2)
        ]
        if channel in failed:
            failure = Failure(item, "inference", "InferenceError", f"channel {channel} is bad")
            events.append(ItemFailure(unit_id, index, failure, channel))
        else:
            vectors = (prediction.embedding, prediction.scores)
            events.append(ClipRow(unit_id, index, item, FACTS, 2, *vectors, channel))
    return events


def ids_of(settings: CommitSettings, part: str, unit_id: str) -> list[str]:
    table = pq.read_table(Path(settings.output) / part / f"{unit_id}.parquet", columns=["clip_id"])
    return [str(name) for name in table["clip_id"].to_pylist()]


def test_an_item_has_a_row_for_each_channel_whatever_the_order(settings: CommitSettings) -> None:
    unit = file_unit("u1", 3)
    events = [
        *channel_events("u1", 0, unit.items[0], [1, 2, 3]),
        *channel_events("u1", 1, unit.items[1], [1]),
        failure_event("u1", 2, unit.items[2]),
        UnitEnd(unit, 3, 2),
    ]
    random.Random(0).shuffle(events)
    commit = commit_events(settings, events)
    assert commit.totals == UnitTotals(items=3, clips=4, failures=1, windows=8, audio_s=48.0)
    first, second, third = (item.clip_id for item in unit.items)
    assert ids_of(settings, "clips", "u1") == [f"{first}!{n}" for n in (1, 2, 3)] + [f"{second}!1"]
    assert ids_of(settings, "errors", "u1") == [third]
    assert [entry.clip_id for entry in commit.ledger.items] == [first, second, third]
    assert commit.each_channel
    assert Commit.from_json(commit.to_json()) == commit


@pytest.mark.parametrize("row_group_rows", [2, 4096])
def test_if_channels_fail_the_item_is_one_row_of_errors_and_no_clip(
    settings: CommitSettings, row_group_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_units, "ROW_GROUP_ROWS", row_group_rows)
    unit = file_unit("u1", 2)
    events = [
        *channel_events("u1", 0, unit.items[0], [1, 2, 3, 4], failed=[2, 3]),
        *channel_events("u1", 1, unit.items[1], [1, 2]),
        UnitEnd(unit, 2, 4),
    ]
    commit = commit_events(settings, events)
    assert commit.totals == UnitTotals(items=2, clips=2, failures=1, windows=4, audio_s=24.0)
    second = unit.items[1].clip_id
    assert ids_of(settings, "clips", "u1") == [f"{second}!1", f"{second}!2"]
    assert set(ids_of(settings, "windows", "u1")) == {f"{second}!1", f"{second}!2"}
    (row,) = pq.read_table(Path(settings.output) / "errors" / "u1.parquet").to_pylist()
    assert (row["clip_id"], row["message"]) == (unit.items[0].clip_id, "channel 2 is bad")


def test_the_channels_of_an_item_are_carried_over_together(settings: CommitSettings) -> None:
    items = (make_item("/a.wav"), make_item("/a.wav!1"), make_item("/b.wav"), make_item("/c.wav"))
    old = WorkUnit("u1", "files", items)
    events = [
        *channel_events("u1", 0, items[0], [1, 2]),
        *channel_events("u1", 1, items[1], [1]),  # its name ends as if it were a channel
        *channel_events("u1", 2, items[2], [1, 2]),
        failure_event("u1", 3, items[3]),
        UnitEnd(old, 4, 2),
    ]
    commit_events(settings, events)
    gone = frozenset({"/a.wav", "/c.wav"})
    redone = WorkUnit("u2", "files", items[1:3], replaces=("u1",), carried=Carried("u1", gone))
    events = [
        *channel_events("u2", 0, items[1], [1]),
        *channel_events("u2", 1, items[2], [1, 2, 3]),
        UnitEnd(redone, 2, 2),
    ]
    commit = commit_events(settings, events)
    assert commit.totals == UnitTotals(items=4, clips=6, failures=1, windows=12, audio_s=72.0)
    assert ids_of(settings, "clips", "u2") == [
        *("/a.wav!1", "/a.wav!2", "/a.wav!1!1", "/b.wav!1", "/b.wav!2", "/b.wav!3")
    ]
    assert ids_of(settings, "errors", "u2") == ["/c.wav"]


def test_ids_are_those_of_items_only_where_each_channel_is_a_clip() -> None:
    names = pa.chunked_array([["/a!1", "/a!12", "/b!1!2", "/c@0.000-1.000!3", "/d#row=5!1"]])
    expected = ["/a", "/a", "/b!1", "/c@0.000-1.000", "/d#row=5"]
    assert item_ids(names, each_channel=True).to_pylist() == expected
    assert count_items(names, each_channel=True) == 4
    assert channel_numbers(names, each_channel=True).to_pylist() == [1, 12, 2, 3, 1]
    assert item_ids(names, each_channel=False) == names
    assert count_items(names, each_channel=False) == 5
    assert channel_numbers(names, each_channel=False).to_pylist() == [None] * 5


def test_the_failure_of_a_window_names_its_channel() -> None:
    item = make_item("/a.wav")
    clip = ClipAggregate(item, row_settings(), 2)
    bad = make_window(item, 0, num_windows=1, item_index=3, channel=2, error="not finite")
    assert bad.clip_id == "/a.wav!2"
    clip.add(bad, None)
    result = clip.result("u", 3)
    assert isinstance(result, ItemFailure)
    assert (result.item_index, result.channel, result.failure.item) == (3, 2, item)
    assert result.failure.message == "channel 2, window 0 (0.000 to 10.000 s): not finite"


def test_an_item_counts_once_in_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = LiveCounts()
    for name in vars(counts):
        monkeypatch.setattr(live_counts, name, getattr(counts, name))
    monkeypatch.setattr(write_units, "live_units", LiveUnits())
    item = make_item("/a.wav")
    audio = write_units.AudioProgress()
    for event in channel_events("u", 0, item, [1, 2]):  # FACTS are of two channels
        assert live_counts.clips == 0
        write_units._count_live(event, "u", audio)
    assert (live_counts.clips, live_counts.windows) == (1, 4)
    assert live_counts.audio_s == pytest.approx(24.0)
    assert np.isfinite(live_counts.audio_s)
