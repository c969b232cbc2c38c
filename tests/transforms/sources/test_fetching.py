"""Remote files that are spooled to temporary ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.support.containers import tar_bytes
from tests.support.sources import content, plan, put, read, read_all
from transforms.sources.read_unit import (
    ReadLimits,
    SourceSettings,
    find_inputs,
    read_unit,
)


def test_large_remote_files_are_spooled_and_fetched_once_for_their_segments() -> None:
    url = put("memory://spool", "a.wav", b"x" * 5000)
    small = put("memory://spool", "b.wav", b"y")
    rows = [{"uri": "a.wav", "start_s": n, "end_s": n + 1} for n in range(3)] + [{"uri": "b.wav"}]
    listed = put("memory://spool", "l.jsonl", "\n".join(map(json.dumps, rows)))
    using = SourceSettings(limits=ReadLimits(spool_bytes=1000))
    clips = read_all(listed, units=using)
    assert [clip.delete_path for clip in clips] == [True, True, True, False]
    assert len({clip.path for clip in clips}) == 4
    assert [content(clip) for clip in clips] == [b"x" * 5000] * 3 + [b"y"]
    assert [clip.item.uri for clip in clips] == [url] * 3 + [small]


def test_an_abandoned_reader_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for number in range(6):
        put("memory://leave", f"{number}.wav", b"x" * 5000)
    put("memory://leave", "x.tar", tar_bytes([("a.wav", b"x" * 5000), ("a.2.wav", b"x" * 5000)]))
    for unit in plan(find_inputs(["memory://leave"]), SourceSettings()):
        reader = read_unit(unit, SourceSettings(limits=ReadLimits(spool_bytes=1000)))
        content(next(reader))  # type: ignore[arg-type]
        reader.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


def test_remote_files_beyond_the_bound_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for number, size in enumerate((2000, 2001)):
        put("memory://bound", f"{number}.wav", b"x" * size)
    using = SourceSettings(limits=ReadLimits(spool_bytes=1000, max_item_bytes=2000))
    (unit,) = plan(find_inputs(["memory://bound"]), SourceSettings())
    unknown = dataclasses.replace(
        unit, items=tuple(dataclasses.replace(item, size=None) for item in unit.items)
    )
    for one, has in ((unit, "2001 bytes; at most 2000 are allowed"), (unknown, "more than 2000")):
        clip, failure = read([one], using)
        assert content(clip) == b"x" * 2000
        assert (failure.stage, failure.error_type) == ("read", "ItemTooLarge")
        assert failure.message.startswith(f"the item has {has}")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
