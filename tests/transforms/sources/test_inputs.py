"""The content of files, folders and globs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.support.containers import parquet_bytes
from tests.support.sources import as_dict, plan, put, read, read_all
from transforms.errors import InputError
from transforms.sources.read_unit import (
    find_inputs,
    make_clip_id,
)
from transforms.storage import filesystem, listing


def test_a_folder_gives_audio_and_counts_the_rest(folder: str) -> None:
    for name in ("a.wav", "sub/b.MP4", "notes.txt", "list.csv", "sub/._b.mp4", "README"):
        put(folder, name)
    found = find_inputs([folder])
    assert [item.uri for item in found.items] == [f"{folder}/a.wav", f"{folder}/sub/b.MP4"]
    assert found.skipped_by_extension == {".txt": 1, ".csv": 1, "._*": 1, "(no extension)": 1}
    assert [(item.size, bool(item.version)) for item in found.items] == [(5, True)] * 2
    assert as_dict(read(plan(found))) == {item.clip_id: b"audio" for item in found.items}


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
    with pytest.raises(PermissionError):
        list(listing.list_files(str(tmp_path)))


def test_a_link_to_itself_is_a_failure_beside_the_rest(tmp_path: Path) -> None:
    put(str(tmp_path), "in/a.wav")
    (tmp_path / "in" / "self").symlink_to("self")
    for source in (str(tmp_path / "in"), f"{tmp_path}/i*"):
        found = find_inputs([source])
        assert [item.uri for item in found.items] == [f"{tmp_path}/in/a.wav"]
        (failure,) = found.failures
        assert (failure.item.uri, failure.is_container) == (f"{tmp_path}/in/self", False)
        assert "symbolic links" in failure.message


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
