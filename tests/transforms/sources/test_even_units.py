"""Units hold about the same work, whatever the input: a million small files, or three huge tars."""

from __future__ import annotations

import csv
import statistics
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.support.listing_store import ListingFileSystem, SparseTar, bucket_url
from tests.support.unit_factory import make_item
from transforms.decoding.pool import DecodeSettings
from transforms.features.windows import WindowSettings
from transforms.header_probe import HeaderProbe
from transforms.long_files import cut_long
from transforms.records import WorkUnit
from transforms.sources import tar_headers
from transforms.sources.read_unit import SourceSettings, find_inputs, is_long, plan_units

SETTINGS = SourceSettings(windows_per_part=200)
FIVE_SECONDS = 44 + 5 * 44_100 * 2
GB = 10**9


def plan(inputs: Sequence[str]) -> list[WorkUnit]:
    found = find_inputs(inputs)
    return plan_units(found.items, found.containers, SETTINGS)


def work_of(unit: WorkUnit) -> float:
    """The share of a full unit: of its windows or its bytes, whichever fills it."""
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
    monkeypatch.setattr(tar_headers, "_SCAN_BYTES", 1 << 20)  # zeros that take time to make
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


def test_a_recording_of_40_hours_is_cut_into_parts(tmp_path: Path) -> None:
    recording = tmp_path / "day.wav"
    with soundfile.SoundFile(recording, "w", 44_100, 1, "PCM_16", format="RF64") as file:
        file.write(np.zeros(441, np.int16))
    header = recording.read_bytes()
    size = 40 * 3600 * 44_100 * 2
    at = header.index(b"ds64") + 8  # sizes of the file and of the data, and the samples
    ds64 = struct.pack("<QQQ", size + len(header), size, size // 2)
    with recording.open("r+b") as file:
        file.write(header[:at] + ds64 + header[at + len(ds64) :])
        file.truncate(len(header) - 882 + size)  # a hole, which takes no room
    (whole,) = plan([str(recording)])
    assert whole.estimated_windows > 14_000
    windows = WindowSettings.from_seconds(None, None, 0.1, 1024, 16_000)
    with HeaderProbe(DecodeSettings()) as probe:
        duration_s = probe.read_duration_s(whole.items[0])
    assert duration_s == 40 * 3600
    parts = cut_long(whole, duration_s, SETTINGS, windows, "f" * 64)
    assert len(parts) == 71
    assert {part.estimated_windows for part in parts[:-1]} == {200}
    check_even(parts[:-1])
    assert parts[-1].estimated_windows <= 202
    items = [part.items[0] for part in parts]
    assert [item.start_s for item in items] == [2051.0 * index for index in range(71)]
    assert [item.end_s for item in items] == [*(item.start_s for item in items[1:]), None]
    assert len({part.unit_id for part in parts}) == 71
    assert all(part.part_of == whole for part in parts)
    again = cut_long(whole, duration_s, SETTINGS, windows, "f" * 64)
    assert [part.unit_id for part in again] == [part.unit_id for part in parts]
    others = cut_long(whole, duration_s, SETTINGS, windows, "0" * 64)
    assert not {part.unit_id for part in others} & {part.unit_id for part in parts}


def test_long_files_are_units_of_their_own_and_leave_the_others_as_they_are() -> None:
    small = [make_item(f"/audio/{n:03}.wav", size=FIVE_SECONDS) for n in range(600)]
    long = [make_item(f"/audio/{n:03}-long.wav", size=GB) for n in (100, 300)]
    without = plan_units(small, [], SETTINGS)
    units = plan_units([*small, *long], [], SETTINGS)
    of_long = [unit for unit in units if is_long(unit, SETTINGS)]
    assert [unit.items for unit in of_long] == [(item,) for item in long]
    assert [unit for unit in units if unit not in of_long] == without


def test_segments_of_a_recording_are_many_units(tmp_path: Path) -> None:
    recording = tmp_path / "day.wav"
    with recording.open("wb") as file:
        file.truncate(40 * 3600 * 44_100 * 2)  # a hole, which takes no room
    manifest = tmp_path / "hours.csv"
    with manifest.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["uri", "start_s", "end_s"])
        rows.writerows(
            (recording.name, start_s, start_s + 600) for start_s in range(0, 144_000, 600)
        )
    segments = plan([str(manifest)])
    windows = [unit.estimated_windows for unit in segments]
    assert len(segments) == 48
    assert max(windows) <= 2 * statistics.median(windows)
