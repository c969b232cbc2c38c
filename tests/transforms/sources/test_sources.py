"""What inputs hold, how it is cut into units, and reading them; nothing here is decoded."""

from __future__ import annotations

import csv
import dataclasses
import functools
import http.server
import io
import itertools
import json
import os
import pickle
import re
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.label import RunConfig
from transforms.errors import InputError
from transforms.records import ContainerSlice, EncodedClip, Failure, Item, WorkUnit
from transforms.sources import fetching, manifests
from transforms.sources.manifests import ManifestRow, read_manifest
from transforms.sources.read_unit import (
    Found,
    ReadLimits,
    SourceSettings,
    find_inputs,
    limit_items,
    make_clip_id,
    make_unit_id,
    plan_units,
    read_unit,
)
from transforms.storage import filesystem, writing
from transforms.storage import urls as storage_urls

_numbers = itertools.count()
SMALL_UNITS = SourceSettings(windows_per_unit=2)
HARD_NAMES = ["with space.wav", "quote'\".wav", "a#b.wav", "a@1-2.wav", "100%.wav", "🎵 é.wav"]


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "in")
        return
    yield f"memory://sources-{next(_numbers)}/in"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def put(folder: str, name: str, data: bytes | str = b"audio") -> str:
    url = storage_urls.join(folder, name)
    writing.write_bytes(url, data.encode() if isinstance(data, str) else data)
    return url


Member = tuple[str, bytes]


def tar_bytes(
    members: Iterable[Member], mode: str = "w", format_: int = tarfile.PAX_FORMAT
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format_) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_bytes(table: pa.Table, rows_per_group: int = 1000) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows_per_group)
    return buffer.getvalue()


def content(clip: EncodedClip) -> bytes:
    if clip.data is not None:
        return clip.data
    path = Path(str(clip.path))
    data = path.read_bytes()
    if clip.delete_path:
        path.unlink()
    return data


def plan(found: Found, units: SourceSettings = SMALL_UNITS, **kwargs: Any) -> list[WorkUnit]:
    return plan_units(found.items, found.containers, units, **kwargs)


def read(units: Iterable[WorkUnit], using: SourceSettings = SMALL_UNITS) -> list[Any]:
    return [one for unit in units for one in read_unit(unit, using)]


def read_all(*inputs: str, units: SourceSettings = SMALL_UNITS) -> list[Any]:
    return read(plan(find_inputs(inputs), units), units)


def as_dict(read_items: Iterable[Any]) -> dict[str, bytes]:
    clips = [one for one in read_items if isinstance(one, EncodedClip)]
    return {clip.item.clip_id: content(clip) for clip in clips}


def failures(read_items: Iterable[Any]) -> list[Failure]:
    return [one for one in read_items if isinstance(one, Failure)]


# --- Names ---------------------------------------------------------------------------------


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


def test_unit_ids_depend_on_what_is_in_them_alone() -> None:
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


# --- Files, folders, globs -----------------------------------------------------------------


def test_a_folder_gives_audio_and_counts_the_rest(folder: str) -> None:
    for name in ("a.wav", "sub/b.MP4", "notes.txt", "list.csv", "sub/._b.mp4", "README"):
        put(folder, name)
    found = find_inputs([folder])
    assert [item.uri for item in found.items] == [f"{folder}/a.wav", f"{folder}/sub/b.MP4"]
    assert found.skipped_by_extension == {".txt": 1, ".csv": 1, "._*": 1, "(no extension)": 1}
    assert [(item.size, bool(item.version)) for item in found.items] == [(5, True)] * 2
    assert as_dict(read(plan(found))) == {item.clip_id: b"audio" for item in found.items}


def test_names_of_all_sorts_come_through(folder: str) -> None:
    urls = [put(folder, name, name) for name in HARD_NAMES]
    expected = {
        make_clip_id(url): name.encode() for url, name in zip(urls, HARD_NAMES, strict=True)
    }
    assert as_dict(read_all(folder)) == expected
    assert as_dict(read_all(*urls)) == expected
    listed = "\n".join(json.dumps({"path": name}) for name in HARD_NAMES)
    assert as_dict(read_all(put(folder, "list.jsonl", listed))) == expected


def test_globs_and_names_with_brackets(folder: str) -> None:
    for name in ("a1.wav", "a2.wav", "b[1].wav"):
        put(folder, name)
    uris = lambda *inputs: [item.uri for item in find_inputs(inputs).items]  # noqa: E731
    assert uris(f"{folder}/a*.wav") == [f"{folder}/a1.wav", f"{folder}/a2.wav"]
    assert uris(f"{folder}/b[1].wav") == [f"{folder}/b[1].wav"]


def test_the_output_folder_is_never_part_of_the_input(tmp_path: Path) -> None:
    for name in ("a.wav", "out/clips/x.wav", "outer.wav"):
        put(str(tmp_path), name)
    (tmp_path / "link").symlink_to(tmp_path / "out" / "clips")
    found = find_inputs([str(tmp_path)], exclude=str(tmp_path / "out"))
    assert [item.uri for item in found.items] == [f"{tmp_path}/a.wav", f"{tmp_path}/outer.wav"]
    assert any("is left out of the input" in note for note in found.notes)
    with pytest.raises(InputError, match="lies in the output folder"):
        find_inputs([str(tmp_path / "out" / "clips" / "x.wav")], exclude=str(tmp_path / "out"))


def test_an_item_listed_twice_is_one_item(folder: str) -> None:
    url = put(folder, "a.wav")
    found = find_inputs([folder, url, f"{folder}/*.wav"])
    assert len(found.items) == 1
    assert (found.duplicates, found.duplicate_examples) == (2, (make_clip_id(url),))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (None, b"", "does not exist"),
        ("*.wav", b"", "matches no file"),
        ("", b"", "holds nothing to label.*1 .txt"),
        ("notes.txt", b"", "is not audio, a tar, a Parquet file or a manifest"),
        ("empty.jsonl", b"\n", "holds no rows"),
        ("empty.csv", b"uri,label\n", "holds no rows"),
        ("other.csv", b"name,label\nx,y\n", "no column names the files.*name, label"),
        ("x.parquet", parquet_bytes(pa.table({"n": [1]})), "neither an audio column.*columns: n"),
        (
            "none.parquet",
            parquet_bytes(pa.table({"audio": pa.array([], pa.binary())})),
            "holds no rows",
        ),
    ],
)
def test_an_input_without_anything_to_label(
    folder: str, name: str | None, data: bytes, message: str
) -> None:
    put(folder, "other.txt", "x")
    if name and "*" not in name:
        put(folder, name, data)
    target = f"{folder}/absent.wav" if name is None else f"{folder}/{name}"
    with pytest.raises(InputError, match=message):
        find_inputs([target])


def test_an_empty_input_is_refused() -> None:
    with pytest.raises(InputError, match="an input is empty"):
        find_inputs([" "])


def test_an_unknown_extension_named_directly_is_tried(folder: str) -> None:
    assert list(as_dict(read_all(put(folder, "recording"), put(folder, "x.dat")))) == [
        f"{folder}/recording",
        f"{folder}/x.dat",
    ]


def test_what_goes_between_planning_and_reading_is_a_failure(folder: str) -> None:
    keep, gone = put(folder, "a.wav"), put(folder, "b.wav")
    units = plan(find_inputs([folder]))
    writing.remove(gone)
    clip, failure = read(units)
    assert clip.item.uri == keep
    assert (failure.item.uri, failure.stage, failure.error_type) == (
        gone,
        "read",
        "FileNotFoundError",
    )
    assert not failure.is_container


def test_an_unreadable_subfolder_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(str(tmp_path), "ok/a.wav")
    put(str(tmp_path), "bad/b.wav")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("/bad"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find_inputs([str(tmp_path)])
    assert [item.uri for item in found.items] == [f"{tmp_path}/ok/a.wav"]
    (failure,) = found.failures
    assert failure.is_container
    assert failure.message == f"Permission denied: {tmp_path}/bad"
    assert find_inputs([f"{tmp_path}/*"]).failures == (failure,)  # as where a shell expands it
    with pytest.raises(InputError, match="Permission denied"):
        find_inputs([str(tmp_path / "bad")])


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


# --- Units ---------------------------------------------------------------------------------


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


def test_reading_is_a_picklable_function(folder: str) -> None:
    put(folder, "a.wav")
    (unit,) = plan(find_inputs([folder]))
    reader = pickle.loads(pickle.dumps(functools.partial(read_unit, settings=SMALL_UNITS)))
    assert list(reader(pickle.loads(pickle.dumps(unit)))) == list(read_unit(unit))


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
    listed = put(folder, "l.jsonl", '{"uri": "a.wav"}\n{\n[]\n')
    found = limit_items(find_inputs([folder + "/x.tar", listed]), limit, SMALL_UNITS)
    inside = read(plan(dataclasses.replace(found, items=())))
    assert (len(found.items), len(found.failures), len(inside)) == counts


def test_what_a_limit_left_is_planned_later(folder: str) -> None:
    url = put(folder, "a.tar", tar_bytes([(f"{n}.wav", bytes([n])) for n in range(5)]))
    found = find_inputs([url])
    first = plan(limit_items(found, 2, SMALL_UNITS))
    covered = {url: [(u.container.start, u.container.stop) for u in first if u.container]}
    rest = plan(found, covered=covered)
    assert as_dict(read([*first, *rest])) == as_dict(read_all(url))
    assert len(read([*first, *rest])) == 5


# --- Tars ----------------------------------------------------------------------------------

WEBDATASET = [
    ("d/a.wav", b"A"),
    ("d/a.json", b'{"speaker": 7, "label": "Dog"}'),
    ("d/a.txt", b"a dog barks\n"),
    ("d/b.cls", b"3"),
    ("d/b.wav", b"B"),
    ("d/c.jpg", b"picture"),
    ("d/x.1.wav", b"X1"),
    ("d/x.2.wav", b"X2"),
    ("d/x.2.json", b'{"labels": ["Cat", "Purr"]}'),
    ("d/x.json", b'{"both": true}'),
    ("d/a.wav", b"A again"),
]


def described(items: Iterable[Any]) -> dict[str, tuple[Any, Any]]:
    return {
        one.item.clip_id.partition("#")[2]: (
            one.item.truth,
            json.loads(one.item.metadata) if one.item.metadata else None,
        )
        for one in items
    }


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
        "d/x.1.wav": (None, {"both": True}),
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


def test_a_large_tar_is_cut_into_units_of_the_size_asked_for(folder: str) -> None:
    members = [(f"{n}.wav", bytes([n]) * 1000) for n in range(20)]
    url = put(folder, "x.tar", tar_bytes(members))
    units = plan(find_inputs([url]), SourceSettings(windows_per_unit=4, max_unit_bytes=20_000))
    assert [unit.estimated_windows for unit in units] == [4] * 5
    assert units[0].container is not None and units[0].container.start == 0
    assert units[-1].container is not None and units[-1].container.stop is None
    starts = [unit.container.start for unit in units[1:] if unit.container]
    assert [unit.container.stop for unit in units[:-1] if unit.container] == starts


@pytest.mark.parametrize("compressed", [False, True])
def test_a_tar_cut_short_gives_what_is_whole_and_one_failure(
    tmp_path: Path, compressed: bool
) -> None:
    members = [(f"{n}.wav", os.urandom(700)) for n in range(4)]
    members.insert(2, ("y" * 200 + ".wav", os.urandom(100)))
    whole = tar_bytes(members, "w:gz" if compressed else "w")
    name = "x.tar.gz" if compressed else "x.tar"
    if not compressed:
        whole = whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024]
    expected = {f"{tmp_path}/{name}#{member}": data for member, data in members}
    for length in {0, 1, 511, 512, *range(600, len(whole) - 1024, 97), *range(512, 4000, 512)}:
        if length > len(whole) - 1024:
            continue
        url = put(str(tmp_path), name, whole[:length])
        using = SourceSettings(max_unit_bytes=1500)
        items = read(plan(find_inputs([url]), using), using)
        assert as_dict(items).items() <= expected.items(), length
        broken = failures(items)
        assert len(broken) == 1 and broken[0].is_container, length
        assert broken[0].item.uri == url
        assert items[-1] is broken[0]


def test_damage_in_the_middle_is_not_the_end(folder: str) -> None:
    data = bytearray(tar_bytes([(f"{n}.wav", bytes([n]) * 600) for n in range(5)]))
    data[2 * 1536 + 5] ^= 0xFF  # the third header
    url = put(folder, "x.tar", bytes(data))
    items = read_all(url, units=SourceSettings())
    assert list(as_dict(items)) == [f"{url}#0.wav", f"{url}#1.wav"]
    (failure,) = failures(items)
    assert failure.is_container
    assert "what is at byte 3072 is not a tar header" in failure.message


def test_archives_one_after_the_other_are_read_to_the_end(folder: str) -> None:
    url = put(folder, "x.tar", tar_bytes([("a.wav", b"1")]) + tar_bytes([("b.wav", b"2")]))
    assert as_dict(read_all(url)) == {f"{url}#a.wav": b"1", f"{url}#b.wav": b"2"}
    url = put(folder, "y.tar", tar_bytes([("a.wav", b"1")]) + b"garbage" * 100)
    assert [one.is_container for one in failures(read_all(url))] == [True]


def test_only_regular_members_are_read(folder: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (
            ("soft.wav", tarfile.SYMTYPE),
            ("hard.wav", tarfile.LNKTYPE),
            ("dev.wav", tarfile.CHRTYPE),
            ("pipe.wav", tarfile.FIFOTYPE),
            ("folder.wav", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret")
            tar.addfile(info)
        for name in ("../../up.wav", "/abs.wav", "._a.wav"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    url = put(folder, "x.tar", buffer.getvalue())
    items = read_all(url, units=SourceSettings())
    assert as_dict(items) == {f"{url}#../../up.wav": b"x", f"{url}#/abs.wav": b"x"}
    assert [(one.item.member, one.is_container) for one in failures(items)] == [
        ("soft.wav", False),
        ("hard.wav", False),
        ("dev.wav", False),
        ("pipe.wav", False),
    ]
    assert "is a symbolic link; only regular files are read" in failures(items)[0].message


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


# --- Parquet -------------------------------------------------------------------------------


def hf_table() -> pa.Table:
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "audio": pa.array(
                [
                    {"bytes": b"one", "path": "orig.wav"},
                    {"bytes": None, "path": "beside.wav"},
                    {"bytes": None, "path": None},
                    None,
                    {"bytes": None, "path": "absent.wav"},
                ],
                audio,
            ),
            "label": pa.array([1, 0, -1, 1, 0]),
            "tags": pa.array([[0, 1], [], None, [1], [0]], pa.list_(pa.int64())),
            "score": pa.array([0.5, float("nan"), None, 1.0, 2.0]),
            "image": pa.array([b"png"] * 5),
        }
    )
    names = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    features = {
        "audio": {"_type": "Audio"},
        "label": names,
        "tags": {"_type": "List", "feature": names},
    }
    info = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({b"huggingface": info.encode()})


def test_the_hugging_face_layout(folder: str) -> None:
    put(folder, "beside.wav", "file")
    url = put(folder, "data.parquet", parquet_bytes(hf_table()))
    items = read_all(url)
    assert as_dict(items) == {f"{url}#row=0": b"one", f"{url}#row=1": b"file"}
    assert described(items)["row=0"] == (
        ("dog",),
        {
            "label": "dog",
            "tags": ["cat", "dog"],
            "score": 0.5,
            "image": "<3 bytes>",
            "path": "orig.wav",
        },
    )
    assert described(items)["row=1"][0] == ("cat",)
    assert described(items)["row=2"] == (None, {"image": "<3 bytes>"})
    assert [(one.item.row, one.error_type) for one in failures(items)] == [
        (2, "ReadError"),
        (3, "ReadError"),
        (4, "FileNotFoundError"),
    ]
    told = [one.message for one in failures(items)]
    assert told[:2] == [f"row {row} has neither bytes nor a path" for row in (2, 3)]
    assert told[2].startswith("row 4 has no bytes, and its path 'absent.wav': ")
    assert "there is no such file" in told[2] and f"{folder}/absent.wav" in told[2]
    assert url not in told[2]


@pytest.mark.slow
def test_the_schema_that_the_datasets_library_gives(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "audio": datasets.Audio(decode=False),
            "label": datasets.ClassLabel(names=["rain", "wind"]),
        }
    )
    rows = {"audio": [{"bytes": b"w", "path": None}, {"bytes": b"r", "path": "r"}], "label": [1, 0]}
    table = pa.table(rows, schema=features.arrow_schema)
    url = put(str(tmp_path), "hf.parquet", parquet_bytes(table))
    items = read_all(url)
    assert as_dict(items) == {f"{url}#row=0": b"w", f"{url}#row=1": b"r"}
    assert [one.item.truth for one in items] == [("wind",), ("rain",)]


@pytest.mark.parametrize(
    ("table", "is_audio"),
    [
        (pa.table({"audio": [b"x"], "other": [b"y"]}), True),
        (pa.table({"data": [b"x"], "name": ["n"]}), True),
        (pa.table({"data": pa.array([b"x"], pa.large_binary())}), True),
        (pa.table({"one": [b"x"], "two": [b"y"]}), False),
        (pa.table({"uri": ["a.wav"], "digest": [b"y"]}), False),
    ],
)
def test_which_columns_are_audio(folder: str, table: pa.Table, is_audio: bool) -> None:
    put(folder, "a.wav")
    put(folder, "t.parquet", parquet_bytes(table))
    found = find_inputs([folder])
    assert len(found.containers) == is_audio
    assert found.skipped_by_extension == ({} if is_audio else {".parquet": 1})
    if is_audio:
        assert content(read_all(f"{folder}/t.parquet")[0]) == b"x"


@pytest.mark.parametrize("rows_per_unit", [1, 3, 7, 100])
def test_parquet_is_cut_at_row_groups(folder: str, rows_per_unit: int) -> None:
    table = pa.table({"audio": [bytes([n]) for n in range(20)]})
    url = put(folder, "t.parquet", parquet_bytes(table, 3))
    using = SourceSettings(windows_per_unit=rows_per_unit)
    found = find_inputs([url])
    units = plan(found, using)
    parts = [unit.container for unit in units if unit.container]
    assert all(part.start % 3 == 0 for part in parts)
    assert len(parts) == {1: 7, 3: 7, 7: 3, 100: 1}[rows_per_unit]
    assert [content(clip) for clip in read(units)] == [bytes([n]) for n in range(20)]
    assert sum(unit.estimated_windows for unit in units) == 20
    covered = [(part.start, part.stop) for part in parts[::2]]
    assert plan(found, using, covered={url: covered}) == units[1::2]
    assert plan(found, using, covered={url: [(0, None)]}) == []


class _RangeServer(http.server.ThreadingHTTPServer):
    """Serves one file by ranges; counts requests for bytes, and the bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _RangeHandler)
        self.data, self.num_requests, self.num_bytes = data, 0, 0


class _RangeHandler(http.server.BaseHTTPRequestHandler):
    server: _RangeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(is_get=False)

    def do_GET(self) -> None:
        self._answer(is_get=True)

    def _answer(self, *, is_get: bool) -> None:
        data = self.server.data
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        part = data[start : int(asked[2]) + 1 if asked and asked[2] else None]
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.end_headers()
        if is_get:
            self.server.num_requests += 1
            self.server.num_bytes += len(part)
            self.wfile.write(part)


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], _RangeServer]]:
    servers: list[_RangeServer] = []

    def start(data: bytes) -> _RangeServer:
        server = _RangeServer(data)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("is_held", [True, False])
@pytest.mark.parametrize(
    ("page_bytes", "row_group"), [(16 << 10, 200), (2 << 20, 200), (2 << 20, 50)]
)
def test_no_byte_of_a_remote_parquet_file_is_asked_for_twice(
    serve: Callable[[bytes], _RangeServer],
    monkeypatch: pytest.MonkeyPatch,
    page_bytes: int,
    row_group: int,
    is_held: bool,
) -> None:
    """Of one whose row groups are too large to be held, the headers of its pages are."""
    if not is_held:
        monkeypatch.setattr(fetching, "_MAX_HELD_BYTES", 0)
    cells = [{"bytes": os.urandom(100_000), "path": f"{n}.wav"} for n in range(200)]
    buffer = io.BytesIO()
    options = {"data_page_size": page_bytes, "write_batch_size": 1, "use_dictionary": False}
    table = pa.table({"audio": cells, "note": [f"note {n}" for n in range(200)]})
    pq.write_table(table, buffer, row_group_size=row_group, **options)
    server = serve(buffer.getvalue())
    url = f"http://127.0.0.1:{server.server_port}/t.parquet"
    items = read_all(url, units=SourceSettings())
    assert as_dict(items) == {f"{url}#row={n}": cell["bytes"] for n, cell in enumerate(cells)}
    ratio = server.num_bytes / len(server.data)
    # Pages of 100 kB lie closer together than the blocks in which headers are asked for.
    assert ratio < (1.05 if is_held else 1.2 if page_bytes > 1 << 20 else 2)
    assert server.num_requests < (40 if is_held else 300)


def test_ranges_that_are_held_are_read_as_the_file_is(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    url = put(f"memory://held-{next(_numbers)}", "x", data)
    with fetching.RangeReader(url) as reader:
        for ranges in ([], [(0, 10)], [(5, 9), (7, 20), (100_000, 900_000)], [(-5, 3), (9, 4)]):
            assert reader.hold(ranges)
            for start, length in ((0, 300_000), (3, 30), (99_990, 20), (299_999, 5), (300_000, 1)):
                reader.seek(start)
                got = b"".join(iter(lambda: reader.read(4096), b""))[:length]
                assert got == data[start : start + length]
        assert not reader.hold([(0, 1 << 40)])
        assert reader.seek(-4, io.SEEK_END) == len(data) - 4
        assert reader.read() == data[-4:]


def test_without_room_to_hold_them_row_groups_are_read_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fetching, "_HELD_IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(fetching, "scratch_folder", lambda: tmp_path / "gone")
    cells = [os.urandom(5000) for _ in range(4)]
    url = put(
        f"memory://no-room-{next(_numbers)}", "t.parquet", parquet_bytes(pa.table({"audio": cells}))
    )
    assert [content(clip) for clip in read_all(url)] == cells


def test_a_value_that_cannot_be_held_does_not_cost_a_manifest_its_rows(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"fine", b"\xff", None]).buffers())
    table = pa.table({"uri": ["a.wav", "b.wav", "c.wav"], "note": broken})
    url = put(str(tmp_path), "list.parquet", parquet_bytes(table))
    first, second, third = find_inputs([url]).items
    assert (first.metadata, third.metadata) == ('{"note": "fine"}', None)
    assert second.metadata is not None and "<cannot be read: " in second.metadata


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path: Path) -> None:
    table = pa.table({"audio": [os.urandom(500) for _ in range(6)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=2, compression="zstd", use_dictionary=False)
    data = bytearray(buffer.getvalue())
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0)
    for at in range(column.data_page_offset, column.data_page_offset + 60):
        data[at] = 0xFF
    url = put(str(tmp_path), "t.parquet", bytes(data))
    items = read_all(url, units=SourceSettings())
    assert list(as_dict(items)) == [f"{url}#row={n}" for n in (0, 1, 4, 5)]
    (failure,) = failures(items)
    assert failure.is_container
    assert "rows 2 to 3 cannot be read" in failure.message
    assert items[-1] is failure


# --- Manifests -----------------------------------------------------------------------------


def manifest(folder: str, ending: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if ending == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows)
        return put(folder, "list.jsonl", "\ufeff" + text)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if ending == "parquet":
        table = pa.table({name: [row.get(name) for row in rows] for name in columns})
        return put(folder, "list.parquet", parquet_bytes(table, 2))
    buffer = io.StringIO()
    delimiter = "\t" if ending == "tsv" else ","
    writer = csv.DictWriter(buffer, columns, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return put(folder, f"list.{ending}", "\ufeff" + buffer.getvalue())


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("column", ["uri", "path", "file", "audio_filepath", "filename"])
def test_manifests_of_each_kind(folder: str, ending: str, column: str) -> None:
    for name in ("a.wav", "sub/b, c.wav"):
        put(folder, name, name)
    rows = [
        {column: "a.wav", "labels": "Dog; Bark", "place": "here", "note": None},
        {column: f"{folder}/sub/b, c.wav", "labels": None, "place": None, "note": 'say "x"\nnow'},
    ]
    items = read_all(manifest(folder, ending, rows))
    assert as_dict(items) == {
        f"{folder}/a.wav": b"a.wav",
        f"{folder}/sub/b, c.wav": b"sub/b, c.wav",
    }
    assert [one.item.truth for one in items] == [("Dog", "Bark"), None]
    assert [json.loads(one.item.metadata) for one in items] == [
        {"place": "here"},
        {"note": 'say "x"\nnow'},
    ]
    assert all(one.item.size and one.item.version for one in items)


@pytest.mark.parametrize(
    ("row", "truth"),
    [
        ({"labels": ["Dog", "Cat; wild", None]}, ("Dog", "Cat; wild")),
        ({"labels": "Dog;; Cat ;Dog"}, ("Dog", "Cat")),
        ({"labels": '["Dog", "Cat"]'}, ("Dog", "Cat")),
        ({"labels": "[Dog]"}, ("[Dog]",)),
        ({"labels": []}, ()),
        ({"labels": ""}, None),
        ({"label": "Dog, barking; loud"}, ("Dog, barking; loud",)),
        ({"label": 3}, ("3",)),
        ({}, None),
    ],
)
def test_labels_become_truth(folder: str, row: dict[str, Any], truth: Any) -> None:
    put(folder, "a.wav")
    found = find_inputs([manifest(folder, "jsonl", [{"uri": "a.wav", **row}])])
    assert found.items[0].truth == truth
    assert found.items[0].metadata is None


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_segments(folder: str, ending: str) -> None:
    put(folder, "a.wav")
    rows = [
        {"uri": "a.wav", "start_s": 1.5, "end_s": 3.0},
        {"uri": "a.wav", "start_s": 10, "end_s": None},
        {"uri": "a.wav", "end_s": 2.0},
        {"uri": "a.wav", "offset": 20.25, "duration": 5.0},
        {"uri": "a.wav", "offset": 30.0},
        {"uri": "a.wav", "duration": 44.0},
    ]
    found = find_inputs([manifest(folder, ending, rows)])
    uri = f"{folder}/a.wav"
    assert [(item.clip_id, item.start_s, item.end_s) for item in found.items] == [
        (f"{uri}@0.000-2.000", None, 2.0),
        (uri, None, None),
        (f"{uri}@1.500-3.000", 1.5, 3.0),
        (f"{uri}@10.000-", 10.0, None),
        (f"{uri}@20.250-25.250", 20.25, 25.25),
        (f"{uri}@30.000-", 30.0, None),
    ]
    # NeMo writes every file's length as "duration": alone it is no segment.
    assert json.loads(str(found.items[1].metadata))["duration"] in (44.0, "44.0")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_members_and_rows(folder: str, ending: str) -> None:
    put(folder, "x.tar", tar_bytes(WEBDATASET))
    put(folder, "t.parquet", parquet_bytes(pa.table({"audio": [b"r0", b"r1", b"r2"]}), 1))
    rows: list[dict[str, Any]] = [
        {"uri": "x.tar", "member": "d/b.wav", "label": "Bird"},
        {"uri": "x.tar", "member": "d/a.wav"},
        {"uri": "x.tar", "member": "absent.wav"},
        {"uri": "t.parquet", "row": 2, "clip_id": "mine"},
        {"uri": "t.parquet", "row": 7},
        {"uri": "gone.tar", "member": "a.wav"},
    ]
    items = read_all(manifest(folder, ending, rows))
    clips = {one.item.clip_id: one for one in items if isinstance(one, EncodedClip)}
    assert {name: one.data for name, one in clips.items()} == {
        f"{folder}/x.tar#d/b.wav": b"B",
        f"{folder}/x.tar#d/a.wav": b"A",
        "mine": b"r2",
    }
    assert clips[f"{folder}/x.tar#d/b.wav"].item.truth == ("Bird",)
    assert clips[f"{folder}/x.tar#d/a.wav"].item.truth == ("Dog",)
    assert {(one.item.clip_id, one.is_container) for one in failures(items)} == {
        (f"{folder}/x.tar#absent.wav", False),
        (f"{folder}/t.parquet#row=7", False),
        (f"{folder}/gone.tar#a.wav", False),
        (f"{folder}/gone.tar", True),
    }


def test_members_of_a_large_tar_are_read_from_the_slices_that_hold_them(folder: str) -> None:
    members = [(f"{n % 30}.wav", bytes([n]) * 500) for n in range(60)]
    url = put(folder, "x.tar", tar_bytes(members))
    asked = [{"uri": "x.tar", "member": f"{n}.wav"} for n in (3, 4, 28)]
    asked += [{"uri": "x.tar", "member": "3.wav", "start_s": 1.0, "end_s": 2.0}]
    asked += [{"uri": "x.tar", "member": "5.wav", "clip_id": f"{url}#5.wav~2"}]
    using = SourceSettings(windows_per_unit=2, max_unit_bytes=20_000)
    units = plan(find_inputs([manifest(folder, "jsonl", asked)]), using)
    assert len(units) > 1
    assert all(unit.container and unit.container.start > 0 for unit in units)
    assert {one.item.clip_id.removeprefix(url): content(one)[:1] for one in read(units)} == {
        "#3.wav": bytes([3]),
        "#3.wav@1.000-2.000": bytes([3]),
        "#4.wav": bytes([4]),
        "#28.wav": bytes([28]),
        "#5.wav~2": bytes([35]),
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"uri": ', "line 2 of .* is not JSON"),
        ("[1]", "is a JSON list; expected an object"),
        ("[" * 100_000, "is not JSON"),
        ('{"uri": "a.wav", "x": ' + "[" * 900 + "]" * 900 + "}", "is nested too deeply"),
        ('{"label": "x"}', "names no file; expected one of uri"),
        ('{"uri": 3}', "has uri = 3; expected text"),
        ('{"uri": "a\\u0000.wav"}', "cannot be a name"),
        ('{"uri": "\\ud800.wav"}', "cannot be a name"),
        ('{"uri": "nope://x/a.wav"}', "whose protocol is not known"),
        ('{"uri": "x.tar"}', "names the container .*x.tar as a whole"),
        ('{"uri": "x.parquet"}', "names the container"),
        ('{"uri": "x.jsonl"}', "a manifest; give it as an input"),
        ('{"uri": "x.tar", "member": "a", "row": 1}', "both a member and a row"),
        ('{"uri": "x.parquet", "member": "a"}', "give row instead"),
        ('{"uri": "x.parquet", "row": -1}', "has row = -1; expected a whole number"),
        ('{"uri": "a.wav", "start_s": "soon"}', "has start_s = 'soon'; expected a number"),
        ('{"uri": "a.wav", "start_s": -1}', "starts at -1.0 s; must be at least 0"),
        ('{"uri": "a.wav", "start_s": 2, "end_s": 2}', "must be after its start"),
        ('{"uri": "a.wav", "end_s": Infinity}', "expected a finite number"),
    ],
)
def test_a_bad_line_is_a_failure_that_names_it(folder: str, line: str, message: str) -> None:
    put(folder, "a.wav")
    url = put(folder, "l.jsonl", f'{{"uri": "a.wav"}}\n{line}\n{{"uri": "b.wav"}}\n')
    found = find_inputs([url])
    assert [item.uri for item in found.items] == [f"{folder}/a.wav", f"{folder}/b.wav"]
    (failure,) = found.failures
    assert failure.item.clip_id == f"{url}#line=2"
    assert (failure.error_type, failure.is_container) == ("ReadError", False)
    assert re.search(message, failure.message)


def test_long_csv_fields_are_read_without_a_lasting_limit_for_the_process(folder: str) -> None:
    before = csv.field_size_limit()
    note = "n" * (2 * before)
    rows = read_manifest(put(folder, "list.csv", f"uri,note\na.wav,{note}\nb.wav,\n"))
    first = next(rows)
    assert isinstance(first, ManifestRow)
    assert json.loads(first.item.metadata or "") == {"note": note}
    assert csv.field_size_limit() == before  # while the manifest is still open
    assert len(list(rows)) == 1
    assert csv.field_size_limit() == before


def test_csv_lines_that_are_too_long_cost_themselves(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One alone, and one inside a quote that is never closed."""
    monkeypatch.setattr(manifests, "_MAX_LINE_CHARS", 100)
    long = "x" * 250
    lines = ["uri,note", f"a.wav,{long}", "b.wav,", 'c.wav,"open', f"d.wav,{long}", "e.wav,"]
    rows = read_manifest(put(folder, "list.csv", "\n".join(lines)))
    names = []
    for row in rows:
        assert isinstance(row, ManifestRow | Failure)
        is_row = isinstance(row, ManifestRow)
        names.append((is_row, (row.where if is_row else row.message).partition(" of ")[0]))
    is_good = [False, True, False, False, True]
    assert names == [(good, f"line {n}") for n, good in enumerate(is_good, 2)]


def test_a_missing_file_in_a_manifest_is_a_failure_when_read(folder: str) -> None:
    items = read_all(manifest(folder, "jsonl", [{"uri": "absent.wav"}]))
    assert [one.error_type for one in failures(items)] == ["FileNotFoundError"]
    assert "there is no such file" in failures(items)[0].message


def test_a_manifest_row_wins_over_the_bare_file(folder: str) -> None:
    url = put(folder, "a.wav")
    other = put(folder, "b.wav")
    rows = [{"uri": "a.wav", "label": "Dog"}, {"uri": "b.wav", "clip_id": "own"}]
    listed = manifest(folder, "jsonl", rows)
    for inputs in ([folder, listed], [listed, folder]):
        found = find_inputs(inputs)
        assert [(item.clip_id, item.truth) for item in found.items] == [
            (url, ("Dog",)),
            ("own", None),
        ]
        assert found.duplicates == 2
    assert find_inputs([listed, listed]).duplicates == 2
    assert other in {item.uri for item in found.items}


def test_rows_of_one_file_give_it_all_their_labels(folder: str) -> None:
    put(folder, "a.wav")
    put(folder, "b.wav")
    rows: list[dict[str, Any]] = [
        {"uri": "a.wav", "label": "Dog", "by": "first"},
        {"uri": "b.wav"},
        {"uri": "a.wav", "labels": ["Bark", "Dog"], "by": "second"},
        {"uri": "a.wav"},
        {"uri": "b.wav", "label": "Cat"},
    ]
    found = find_inputs([manifest(folder, "jsonl", rows)])
    assert [(item.truth, item.metadata) for item in found.items] == [
        (("Dog", "Bark"), '{"by": "first"}'),
        (("Cat",), None),
    ]
    assert found.duplicates == 3


def test_one_clip_id_for_two_items_is_refused(folder: str) -> None:
    for name in ("a.wav", "b.wav"):
        put(folder, name)
    rows = [{"uri": "a.wav", "clip_id": "x"}, {"uri": "b.wav", "clip_id": "x"}]
    with pytest.raises(InputError, match=r"two different items: .*a.wav \(line 1 .*b.wav \(line 2"):
        find_inputs([manifest(folder, "jsonl", rows)])
    rows = [{"uri": "a.wav", "clip_id": f"{folder}/b.wav"}]
    with pytest.raises(InputError, match="two different items"):
        find_inputs([manifest(folder, "jsonl", rows), f"{folder}/b.wav"])


def test_a_container_listed_whole_and_by_a_manifest_is_read_once(folder: str) -> None:
    url = put(folder, "x.tar", tar_bytes([("a.wav", b"1"), ("b.wav", b"2")]))
    rows = [
        {"uri": "x.tar", "member": "a.wav"},
        {"uri": "x.tar", "member": "b.wav", "start_s": 1.0},
    ]
    found = find_inputs([url, manifest(folder, "jsonl", rows)])
    clip_ids = [one.item.clip_id for one in read(plan(found))]
    assert sorted(clip_ids) == [f"{url}#a.wav", f"{url}#b.wav", f"{url}#b.wav@1.000-"]
    assert found.duplicates == 1
    assert any("listed as a whole" in note for note in found.notes)


ERROR_ROWS = {
    "stage": "decode",
    "error_type": "DecodeError",
    "message": "no",
    "unit_id": "0f",
}


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_the_errors_table_is_a_manifest(folder: str, ending: str) -> None:
    put(folder, "a.wav")
    put(folder, "x.tar", tar_bytes([("m.wav", b"1"), ("m.wav", b"2")]))
    place = dict.fromkeys(("member", "row", "start_s", "end_s"))
    rows = [
        {"clip_id": f"{folder}/a.wav", "uri": f"{folder}/a.wav", **place, **ERROR_ROWS}
        | {"truth": ["Dog"], "metadata": '{"k": [1, null]}'},
        {"clip_id": f"{folder}/x.tar#m.wav~2", "uri": f"{folder}/x.tar", **place, **ERROR_ROWS}
        | {"member": "m.wav", "truth": None, "metadata": None},
    ]
    manifest(storage_urls.join(folder, "errors"), ending, rows)
    items = read_all(f"{folder}/errors/*.{ending}")
    assert as_dict(items) == {f"{folder}/a.wav": b"audio", f"{folder}/x.tar#m.wav~2": b"2"}
    assert (items[0].item.truth, items[0].item.metadata) == (("Dog",), '{"k": [1, null]}')
    assert (items[1].item.truth, items[1].item.metadata) == (None, None)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_the_errors_table_names_broken_containers_as_a_whole(folder: str, ending: str) -> None:
    for name in ("x.tar", "signed.tar"):
        put(folder, name, tar_bytes([("m.wav", b"1"), ("n.wav", b"2")]))
    put(folder, "t.parquet", parquet_bytes(pa.table({"audio": [b"r0", b"r1"]})))
    put(folder, "old.parquet", parquet_bytes(pa.table({"uri": ["a.wav"]})))
    names = ("x.tar#bytes=0-512", "x.tar#bytes=512-", "t.parquet", "gone.tar", "old.parquet#row=1")
    rows = [
        {"clip_id": f"{folder}/{name}", "uri": f"{folder}/{name.partition('#')[0]}"}
        | {"member": None, "row": None, **ERROR_ROWS}
        for name in names
    ]
    listed = manifest(storage_urls.join(folder, "errors"), ending, rows)
    found = find_inputs([listed])
    assert (found.items, found.duplicates, dict(found.skipped_by_extension)) == ((), 0, {})
    items = read(plan(found))
    assert list(as_dict(items)) == [
        *(f"{folder}/t.parquet#row={row}" for row in (0, 1)),
        *(f"{folder}/x.tar#{name}.wav" for name in "mn"),
    ]
    (missing,) = failures(items)
    assert (missing.item.clip_id, missing.is_container) == (f"{folder}/gone.tar", True)
    (no_audio,) = found.failures
    assert f"names the container {folder}/old.parquet as a whole" in no_audio.message
    assert not no_audio.is_container


@pytest.mark.parametrize("is_there", [True, False])
def test_each_row_asked_for_of_a_broken_parquet_file_is_one_failure(
    folder: str, is_there: bool
) -> None:
    if is_there:
        put(folder, "t.parquet", "not Parquet")
    rows = [{"uri": "t.parquet", "row": row} for row in (1, 3)]
    items = read_all(manifest(folder, "jsonl", rows))
    assert [(one.item.row, one.is_container) for one in failures(items)] == [(1, False), (3, False)]
    reason = "is not a whole Parquet file" if is_there else f"{folder}/t.parquet: "
    for row, failure in zip((1, 3), items, strict=True):
        assert failure.message.startswith(f"row {row} cannot be read: {folder}/t.parquet")
        assert reason in failure.message
        assert is_there or failure.error_type == "FileNotFoundError"


def test_the_clips_table_is_a_manifest(folder: str) -> None:
    put(folder, "a.wav")
    row = {
        "clip_id": f"{folder}/a.wav@1.000-2.000",
        "uri": f"{folder}/a.wav",
        "member": None,
        "row": None,
        "start_s": 1.0,
        "end_s": 2.0,
        "duration_s": 1.0,
        "num_windows": 1,
        "content_sha256": "00",
        "truth": ["Dog"],
        "labels": [{"index": 0, "id": None, "name": "Speech", "score": 0.5}],
        "embedding": [0.0, 1.0],
        "metadata": None,
    }
    (item,) = find_inputs([manifest(folder, "parquet", [row])]).items
    assert (item.clip_id, item.start_s, item.end_s) == (row["clip_id"], 1.0, 2.0)
    assert (item.truth, item.metadata) == (("Dog",), None)


def test_signatures_are_neither_in_ids_nor_in_units(monkeypatch: pytest.MonkeyPatch) -> None:
    put("memory://signed", "a.wav")
    signed = "https://h/a.wav?sig=SECRET&v=2"
    rows = [{"uri": signed}]
    url = put("memory://signed", "l.jsonl", json.dumps(rows[0]))
    error = PermissionError("https://h/a.wav?v=2: access is denied")
    monkeypatch.setattr(filesystem, "stat_many", lambda urls: dict.fromkeys(urls, error))
    found = find_inputs([url])
    (item,) = found.items
    assert (item.clip_id, item.uri, item.url) == ("https://h/a.wav?v=2",) * 2 + (signed,)
    assert "SECRET" not in repr(found) + repr(plan(found))


def test_the_config_and_reading_agree_on_the_bounds() -> None:
    config, limits = RunConfig(), SourceSettings().limits
    assert config.read.model_dump() == {
        "max_page_bytes": limits.max_page_bytes,
        "max_expansion": limits.max_expansion,
    }
    assert config.decode.max_item_bytes == limits.max_item_bytes


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


def test_large_cells_travel_in_a_file_and_beyond_the_bound_not_at_all(tmp_path: Path) -> None:
    table = pa.table({"audio": [b"x" * 500, b"y" * 1500, b"z" * 2500]})
    url = put(str(tmp_path), "t.parquet", parquet_bytes(table))
    using = SourceSettings(limits=ReadLimits(spool_bytes=1000, max_item_bytes=2000))
    small, large, failure = read_all(url, units=using)
    assert (small.data, small.path) == (b"x" * 500, None)
    assert large.data is None and large.delete_path
    assert content(large) == b"y" * 1500
    assert (failure.error_type, failure.item.row) == ("ItemTooLarge", 2)
    assert "the item has 2500 bytes; at most 2000 are allowed" in failure.message
