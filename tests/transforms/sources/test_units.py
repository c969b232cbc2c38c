"""Units of about the same work, from the whole input or from what is not committed."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.label import RunConfig
from tests.support.containers import parquet_bytes, tar_bytes
from tests.support.sources import SMALL_UNITS, as_dict, plan, put, read, read_all
from transforms.records import Item
from transforms.sources.read_unit import (
    SourceSettings,
    find_inputs,
    limit_items,
    plan_units,
)


def test_units_hold_about_the_same_work_and_every_item_once(folder: str) -> None:
    for number in range(10):
        put(folder, f"{number}.wav")
    found = find_inputs([folder])
    units = plan(found, SourceSettings(windows_per_unit=4))
    assert [len(unit.items) for unit in units] == [4, 4, 2]
    assert [unit.estimated_windows for unit in units] == [4, 4, 2]
    assert [item for unit in units for item in unit.items] == list(found.items)
    assert len({unit.unit_id for unit in units}) == 3
    assert plan(find_inputs([folder]), SourceSettings(windows_per_unit=4)) == units


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3_000_000), max_size=40),
    done=st.sets(st.integers(0, 40)),
    windows=st.integers(1, 9),
)
def test_committed_units_leave_the_others_as_they_were(
    sizes: list[int], done: set[int], windows: int
) -> None:
    items = [
        Item(f"/{n:03}.wav", f"/{n:03}.wav", size=size, version="1") for n, size in enumerate(sizes)
    ]
    using = SourceSettings(windows_per_unit=windows)
    units = plan_units(items, [], using)
    gone = {item.clip_id for n, unit in enumerate(units) if n in done for item in unit.items}
    rest = plan_units([item for item in items if item.clip_id not in gone], [], using)
    assert rest == [unit for n, unit in enumerate(units) if n not in done]


def test_a_unit_ends_at_its_bytes_and_segments_count_by_duration(folder: str) -> None:
    for number in range(4):
        put(folder, f"{number}.wav", b"x" * 100)
    units = plan(find_inputs([folder]), SourceSettings(max_unit_bytes=200))
    assert [len(unit.items) for unit in units] == [2, 2]
    rows = [{"uri": "0.wav", "start_s": n * 20, "end_s": n * 20 + 20} for n in range(4)]
    listed = put(folder, "l.jsonl", "\n".join(map(json.dumps, rows)))
    units = plan(find_inputs([listed]), SourceSettings(windows_per_unit=4))
    assert [unit.estimated_windows for unit in units] == [4, 4]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 99])
def test_limit_takes_exactly_the_first_items(folder: str, limit: int) -> None:
    for number in range(2):
        put(folder, f"{number}.wav")
    put(folder, "a.tar", tar_bytes([(f"{n}.wav", b"t") for n in range(3)]))
    put(folder, "b.tar.gz", tar_bytes([(f"k.{n}.wav", b"z") for n in range(3)], "w:gz"))
    put(folder, "c.parquet", parquet_bytes(pa.table({"audio": [b"p"] * 3}), 2))
    everything = list(as_dict(read_all(folder)))
    assert len(everything) == 11
    found = limit_items(find_inputs([folder]), limit, SMALL_UNITS)
    assert list(as_dict(read(plan(found)))) == everything[:limit]


@pytest.mark.parametrize(
    ("limit", "counts"), [(1, (1, 0, 0)), (3, (1, 2, 0)), (4, (1, 2, 1)), (9, (1, 2, 2))]
)
def test_limit_counts_failures_of_planning_after_loose_items(
    folder: str, limit: int, counts: tuple[int, int, int]
) -> None:
    put(folder, "x.tar", tar_bytes([("a.wav", b"1"), ("b.wav", b"2")]))
    put(folder, "a.wav")
    listed = put(folder, "l.jsonl", '{"uri": "a.wav"}\n{\n[]\n')
    found = limit_items(find_inputs([folder + "/x.tar", listed]), limit, SMALL_UNITS)
    inside = read(plan(dataclasses.replace(found, items=())))
    assert (len(found.items), len(found.failures), len(inside)) == counts


def test_items_beyond_a_limit_are_planned_later(folder: str) -> None:
    url = put(folder, "a.tar", tar_bytes([(f"{n}.wav", bytes([n])) for n in range(5)]))
    found = find_inputs([url])
    first = plan(limit_items(found, 2, SMALL_UNITS))
    covered = {url: [(u.container.start, u.container.stop) for u in first if u.container]}
    rest = plan(found, covered=covered)
    assert as_dict(read([*first, *rest])) == as_dict(read_all(url))
    assert len(read([*first, *rest])) == 5


def test_the_config_and_reading_agree_on_the_bounds() -> None:
    config, limits = RunConfig(), SourceSettings().limits
    assert config.read.model_dump() == {
        "max_page_bytes": limits.max_page_bytes,
        "max_expansion": limits.max_expansion,
    }
    assert config.decode.max_item_bytes == limits.max_item_bytes
