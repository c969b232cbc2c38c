"""Names of items and units."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from transforms.records import ContainerSlice, Item
from transforms.sources.read_unit import (
    make_clip_id,
    make_unit_id,
)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"uri": "/d/a.wav"}, "/d/a.wav"),
        ({"uri": "/d/100%#1@2.wav"}, "/d/100%25%231%402.wav"),
        ({"uri": "gs://b/x.tar", "member": "a b/c#d.wav"}, "gs://b/x.tar#a b/c%23d.wav"),
        ({"uri": "/x.tar", "member": "a.wav", "occurrence": 2}, "/x.tar#a.wav~2"),
        ({"uri": "/x.tar", "member": "a.wav~2"}, "/x.tar#a.wav%7E2"),
        ({"uri": "/x.parquet", "row": 5}, "/x.parquet#row=5"),
        ({"uri": "/a.wav", "start_s": 1.5, "end_s": 3}, "/a.wav@1.500-3.000"),
        ({"uri": "/a.wav", "start_s": 1.5}, "/a.wav@1.500-"),
        ({"uri": "/a.wav", "end_s": 2.25}, "/a.wav@0.000-2.250"),
        ({"uri": "/x.tar", "member": "a", "start_s": 0.0, "end_s": 1.0}, "/x.tar#a@0.000-1.000"),
        ({"uri": "/caf\udce9.wav"}, "/caf%E9.wav"),
    ],
)
def test_clip_ids(kwargs: dict[str, Any], expected: str) -> None:
    assert make_clip_id(**kwargs) == expected


def test_unit_ids_depend_only_on_the_content() -> None:
    item = Item("/a.wav", "/a.wav", "/a.wav", size=3, version="1")
    part = ContainerSlice("/x.tar", "/x.tar", 10, "1", 0, 512)
    same = make_unit_id("files", [item])
    assert same == "bcdbf3ae473122b93de1"  # results on disk bear this name: it must not change
    assert same == make_unit_id("files", (Item("/a.wav", "/a.wav", "other", size=3, version="1"),))
    others = {
        make_unit_id("files", [Item("/a.wav", "/a.wav", size=3, version="2")]),
        make_unit_id("files", [dataclasses.replace(item, uri="/b.wav")]),
        make_unit_id("files", [dataclasses.replace(item, start_s=1.0)]),
        make_unit_id("files", [dataclasses.replace(item, end_s=1.0)]),
        make_unit_id("files", [dataclasses.replace(item, member="m")]),
        make_unit_id("files", [dataclasses.replace(item, row=1)]),
        make_unit_id("files", [item], replaces=["u"]),
        make_unit_id("tar", (), part),
        make_unit_id("tar", (), ContainerSlice("/x.tar", "", 10, "1", 512, None)),
        make_unit_id("tar", [item], part),
    }
    assert len(others | {same}) == 11
    assert all(len(name) == 20 and name.isalnum() for name in others)
