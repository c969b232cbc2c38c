"""Tars: items with their siblings, slices, and damage."""

from __future__ import annotations

import json
import logging
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.containers import tar_bytes
from tests.support.sources import (
    WEBDATASET,
    as_dict,
    content,
    described,
    failures,
    plan,
    put,
    read,
    read_all,
)
from transforms.sources import tar
from transforms.sources.read_unit import (
    ReadLimits,
    SourceSettings,
    find_inputs,
    make_clip_id,
)
from transforms.storage import filesystem


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
def test_a_tar_gives_its_audio_with_its_siblings(folder: str, name: str) -> None:
    mode = "w" if name.endswith(".tar") else "w:gz"
    url = put(folder, name, tar_bytes(WEBDATASET, mode))
    found = find_inputs([folder])
    assert bool(found.notes) == (mode == "w:gz")
    items = read(plan(found, SourceSettings()))
    assert described(items) == {
        "d/a.wav": (("Dog",), {"speaker": 7, "label": "Dog", "txt": "a dog barks"}),
        "d/b.wav": (None, {"cls": 3}),
        "d/x.1.wav": (None, {"both": True, "txt": "of x.1 alone"}),
        "d/x.2.wav": (("Cat", "Purr"), {"labels": ["Cat", "Purr"], "both": True}),
        "d/a.wav~2": (None, None),
    }
    assert [content(one) for one in items] == [b"A", b"B", b"X1", b"X2", b"A again"]
    first = items[0].item
    assert (first.uri, first.member, first.size) == (url, "d/a.wav", filesystem.stat(url).size)
    assert first.url == ""


def test_siblings_that_are_not_neighbours_are_found(tmp_path: Path) -> None:
    members = [(f"{n}.json", f'{{"n": {n}}}'.encode()) for n in range(4)]
    members += [(f"{n}.wav", b"x") for n in range(4)]
    url = put(str(tmp_path), "x.tar", tar_bytes(members))
    items = read_all(url)
    assert described(items) == {f"{n}.wav": (None, {"n": n}) for n in range(4)}


def test_siblings_that_are_not_json_objects_are_kept_as_they_are(folder: str) -> None:
    deep = b"[" * 900 + b"]" * 900
    members = [("a.wav", b"1"), ("a.json", b"{broken"), ("b.wav", b"2"), ("b.json", b"[1, NaN]")]
    members += [("c.wav", b"3"), ("c.json", deep), ("d.wav", b"4"), ("d.json", b'{"x": "\\ud800"}')]
    found = described(read_all(put(folder, "x.tar", tar_bytes(members))))
    assert found["a.wav"] == (None, {"json": "{broken"})
    assert found["b.wav"] == (None, {"json": [1, None]})
    assert found["c.wav"] == (None, {"json": deep.decode()})
    assert found["d.wav"] == (None, {"x": "\ud800"})


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_and_long_names(folder: str, format_: int) -> None:
    names = ["a.wav", "f/" * 40 + "b.wav", "🎵.wav", "x" * 90 + ".wav"]
    if format_ != tarfile.USTAR_FORMAT:
        names += ["y" * 300 + ".wav", "d/" * 200 + "z.wav"]
    url = put(folder, "x.tar", tar_bytes([(name, name.encode()) for name in names], "w", format_))
    assert as_dict(read_all(url)) == {make_clip_id(url, name): name.encode() for name in names}


NAMES = st.sampled_from(
    ["a.wav", "a.json", "a.txt", "b.wav", "b.2.wav", "b.2.json", "c.jpg", "d" * 120 + ".ogg"]
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    names=st.lists(NAMES, max_size=25),
    sizes=st.lists(st.integers(0, 1500), min_size=25, max_size=25),
    windows=st.integers(1, 6),
    done=st.sets(st.integers(0, 25)),
)
def test_a_tar_in_slices_gives_the_same_items_as_the_whole(
    tmp_path: Path, names: list[str], sizes: list[int], windows: int, done: set[int]
) -> None:
    members = [
        (name, json.dumps({"n": n}).encode() if name.endswith("json") else bytes([n]) * size)
        for n, (name, size) in enumerate(zip(names, sizes, strict=False))
    ]
    if not any(name.endswith((".wav", ".ogg")) for name, _ in members):
        members.append(("a.wav", b"x"))
    url = put(str(tmp_path), "x.tar", tar_bytes(members))
    found = find_inputs([url])
    whole = read(plan(found, SourceSettings()))
    # A tiny limit of bytes makes planning walk the tar, however small it is.
    using = SourceSettings(windows_per_unit=windows, max_unit_bytes=10_000)
    units = plan(found, using)
    assert read(units) == whole
    # Once some are committed, the rest is cut as before.
    parts = [unit.container for unit in units if unit.container]
    covered = [(part.start, part.stop) for n, part in enumerate(parts) if n in done]
    rest = plan(found, using, covered={url: covered})
    assert {unit.unit_id for unit in rest} <= {unit.unit_id for unit in units}
    assert len(rest) == len(units) - len(covered)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_tar_cut_short_gives_what_is_whole_and_one_failure(
    tmp_path: Path, compressed: bool
) -> None:
    members = [(f"{n}.wav", os.urandom(700)) for n in range(4)]
    members.insert(2, ("y" * 200 + ".wav", os.urandom(100)))
    name, mode = ("x.tar.gz", "w:gz") if compressed else ("x.tar", "w")
    whole = tar_bytes(members, mode)
    end = len(whole) - 1000 if compressed else len(whole.rstrip(b"\0"))
    expected = {f"{tmp_path}/{name}#{member}": data for member, data in members}
    for length in {0, 1, 511, *range(512, end, 512), *range(600, end, 97)}:
        url = put(str(tmp_path), name, whole[:length])
        using = SourceSettings(max_unit_bytes=1500)
        items = read(plan(find_inputs([url]), using), using)
        assert as_dict(items).items() <= expected.items(), length
        broken = failures(items)
        assert len(broken) == 1 and broken[0].is_container, length
        assert broken[0].item.uri == url
        assert items[-1] is broken[0]


def test_a_tar_without_audio_is_a_failure(folder: str) -> None:
    url = put(folder, "x.tar", tar_bytes([("a.txt", b"1")]))
    (failure,) = read_all(url)
    assert failure.is_container
    assert "no member has an audio or video extension" in failure.message


def test_large_members_are_spooled(folder: str) -> None:
    url = put(folder, "x.tar", tar_bytes([("a.wav", b"x" * 3000), ("b.wav", b"y")]))
    using = SourceSettings(limits=ReadLimits(spool_bytes=1000))
    clips = read_all(url, units=using)
    assert [(clip.data is None, clip.delete_path) for clip in clips] == [
        (True, True),
        (False, False),
    ]
    assert str(clips[0].path).endswith(".wav")
    assert [content(clip) for clip in clips] == [b"x" * 3000, b"y"]


def test_one_key_for_many_files_does_not_gather_them_all(folder: str) -> None:
    members = [(f"take1.{n:03}.wav", bytes([n])) for n in range(200)]
    url = put(folder, "x.tar", tar_bytes(members))
    whole = as_dict(read_all(url, units=SourceSettings()))
    assert list(whole.values()) == [data for _, data in members]
    units = plan(find_inputs([url]), SourceSettings(windows_per_unit=1, max_unit_bytes=10))
    assert len(units) == 4
    assert as_dict(read(units)) == whole


def test_ignored_members_are_logged_once_for_each_extension(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "_logged_extensions", set())
    names = ("a.wav", "a.json", "inner.tar", "b.xyz", "c.xyz")
    url = put(str(tmp_path), "shard.tar", tar_bytes([(name, b"null") for name in names]))
    with caplog.at_level(logging.INFO, logger="transforms.sources.tar"):
        for _ in range(2):
            assert list(as_dict(read_all(url))) == [f"{url}#a.wav"]
    assert [record.getMessage().partition("ignored: ")[2] for record in caplog.records] == [
        ".tar, the first is 'inner.tar'",
        ".xyz, the first is 'b.xyz'",
    ]
