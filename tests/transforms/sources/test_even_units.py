"""Units hold about the same work, whatever the input: a million small files, or three huge tars."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.sources import manifest
from tests.support.stores.listing_store import ListingFileSystem, SparseTar, bucket_url
from transforms.records import WorkUnit
from transforms.sources import tar_parallel
from transforms.sources.read_unit import SourceSettings, find_inputs, plan_units

SETTINGS = SourceSettings()
FIVE_SECONDS = 44 + 5 * 44_100 * 2
GB = 10**9


def plan(inputs: Sequence[str]) -> list[WorkUnit]:
    found = find_inputs(inputs)
    return plan_units(found.items, found.containers, SETTINGS)


def work_of(unit: WorkUnit) -> float:
    """Return how full a unit is, by its windows or its bytes."""
    if unit.container is None:
        num_bytes = sum(item.size or 0 for item in unit.items)
    else:
        part = unit.container
        num_bytes = (part.stop or part.size or 0) - part.start
    full = SETTINGS.windows_per_unit, SETTINGS.max_unit_bytes
    return max(unit.estimated_windows / full[0], num_bytes / full[1])


def check_even(units: Sequence[WorkUnit]) -> None:
    work = [work_of(unit) for unit in units]
    assert max(work) <= 2 * statistics.median(work)


def test_small_files() -> None:
    units = plan([bucket_url(20_000, FIVE_SECONDS)])
    assert sum(len(unit.items) for unit in units) == 20_000
    assert len(units) == 79
    check_even(units)
    assert [unit.unit_id for unit in plan([bucket_url(20_000, FIVE_SECONDS)])] == [
        unit.unit_id for unit in units
    ]


def test_three_tars_of_200_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_parallel, "_SCAN_BYTES", 1 << 20)  # zeros that take time to make
    mb = 10**6
    sizes = [[150 * mb] * 1333, [100 * mb, 300 * mb, 50 * mb] * 444, [250 * mb] * 800]
    tars = [SparseTar(members) for members in sizes]
    urls = [ListingFileSystem.add_tar(f"huge-{n}.tar", tar) for n, tar in enumerate(tars)]
    assert all(abs(tar.size - 200 * GB) < GB for tar in tars)
    units = plan(urls)
    assert len(units) > 400
    check_even(units)
    for url, tar in zip(urls, tars, strict=True):
        parts = [unit.container for unit in units if unit.container and unit.container.uri == url]
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop is None
        # Every slice begins where a member does, and nothing but headers was read.
        assert {part.start for part in parts} <= set(tar.starts)
        assert tar.requests < 2 * len(tar.sizes) + 128


def test_segments_of_a_recording_are_many_units(tmp_path: Path) -> None:
    recording = tmp_path / "day.wav"
    with recording.open("wb") as file:
        file.truncate(40 * 3600 * 44_100 * 2)  # a hole, which takes no room
    rows = [{"uri": recording.name, "start_s": s, "end_s": s + 600} for s in range(0, 144_000, 600)]
    segments = plan([manifest(str(tmp_path), "csv", rows)])
    windows = [unit.estimated_windows for unit in segments]
    assert len(segments) == 48
    assert max(windows) <= 2 * statistics.median(windows)
