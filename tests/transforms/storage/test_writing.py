"""Files are written whole or not at all, on local disks and on remote stores."""

from __future__ import annotations

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.support.fake_stores import DiskFileSystem
from transforms.errors import OutputError
from transforms.storage import filesystem, listing, reading, urls, writing


def test_write_then_read_stat_list_remove(folder: str) -> None:
    url = urls.join(folder, "sub", "a #@%.bin")
    writing.write_bytes(url, b"one")
    writing.write_bytes(url, b"three")
    assert reading.read_bytes(url) == b"three"
    with reading.open_read(url) as file:
        assert file.seekable()
        file.seek(2)
        assert file.read() == b"ree"
    info = filesystem.stat(url)
    assert (info.url, info.size) == (url, 5)
    assert info.version
    assert filesystem.exists(url) and filesystem.exists(folder)
    assert filesystem.is_folder(folder) and not filesystem.is_folder(url)
    assert listing.list_names(urls.join(folder, "sub")) == ["a #@%.bin"]
    assert listing.list_names(folder) == []
    assert list(listing.list_files(folder)) == [info]
    writing.remove(url)
    writing.remove(url)
    assert not filesystem.exists(url)
    assert listing.list_names(urls.join(folder, "absent")) == []


def test_put_file_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "staged"
    source.write_bytes(b"data")
    real = os.replace

    def replace(a: Any, b: Any) -> None:
        if str(a) == str(source):
            raise OSError(18, "Invalid cross-device link")
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    writing.put_file(str(source), str(tmp_path / "out" / "part"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part"]
    assert (tmp_path / "out" / "part").read_bytes() == b"data"
    assert not source.exists()


def test_a_failed_local_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "a")
    writing.write_bytes(url, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        writing.write_bytes(url, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert reading.read_bytes(url) == b"old"


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("start", ["", "memory:/", "disk:/"])  # disk: no exclusive write
def test_create_bytes_makes_a_file_once_and_never_replaces_it(
    start: str, has_links: bool, tmp_path: Path, empty_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted", source)

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    folder = f"{start}{tmp_path}/new"
    url = f"{folder}/lease"
    assert writing.create_bytes(url, b"mine") is True
    assert writing.create_bytes(url, b"another's") is False
    assert reading.read_bytes(url) == b"mine"
    assert listing.list_names(folder) == ["lease"]
    writing.remove(url)
    assert writing.create_bytes(url, b"third") is True


def test_create_bytes_lets_one_of_many_win(tmp_path: Path) -> None:
    url = str(tmp_path / "lease")
    start = threading.Barrier(16)

    def create(number: int) -> bool:
        start.wait()
        return writing.create_bytes(url, b"%d" % number)

    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(create, range(16)))
    assert made.count(True) == 1
    assert reading.read_bytes(url) == b"%d" % made.index(True)


@pytest.mark.parametrize(("num_short", "is_stored"), [(2, True), (99, False)])
def test_what_the_store_has_only_in_part_is_uploaded_again(
    num_short: int, is_stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = itertools.count()

    def put_file(self: Any, lpath: str, rpath: str, **kwargs: Any) -> None:
        data = Path(lpath).read_bytes()
        self.pipe_file(rpath, data[:3] if next(tries) < num_short else data)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    source = tmp_path / "staged"
    source.write_bytes(b"all of it")
    if is_stored:
        writing.put_file(str(source), "memory://short/part")
        assert reading.read_bytes("memory://short/part") == b"all of it"
    else:
        with pytest.raises(OSError, match="9 bytes were written, and the store has 3 of them"):
            writing.put_file(str(source), "memory://short/part")
    assert source.exists() is not is_stored
    MemoryFileSystem.store.clear()


def test_a_file_system_without_whole_uploads_gets_a_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"disk:/{tmp_path}/out/part"
    source = tmp_path / "staged"
    source.write_bytes(b"first")
    writing.put_file(str(source), url)
    assert (tmp_path / "out" / "part").read_bytes() == b"first"
    source.write_bytes(b"second")
    monkeypatch.setattr(DiskFileSystem, "fails", True)
    with pytest.raises(OSError, match="connection lost"):
        writing.put_file(str(source), url)
    assert (tmp_path / "out" / "part").read_bytes() == b"first"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part"]
    assert source.exists()


def test_http_cannot_be_written() -> None:
    with pytest.raises(OutputError, match="can be read, not written"):
        writing.write_bytes("https://h/x?sig=SECRET", b"")


def test_staging_lies_inside_a_local_output_and_outside_a_remote_one(tmp_path: Path) -> None:
    inside = writing.staging_path(str(tmp_path / "out"), "run")
    assert inside == str(tmp_path / "out" / "_staging" / "run")
    assert Path(inside).is_dir()
    outside = Path(writing.staging_path("memory://x/out", f"test-{os.getpid()}"))
    try:
        assert outside.is_dir()
    finally:
        outside.rmdir()


def test_remove_empty_folder_keeps_what_is_not_empty(tmp_path: Path) -> None:
    writing.write_bytes(f"{tmp_path}/a/b", b"")
    assert writing.remove_empty_folder(f"{tmp_path}/a") is False
    writing.remove(f"{tmp_path}/a/b")
    assert writing.remove_empty_folder(f"{tmp_path}/a") is True
    assert writing.remove_empty_folder(f"{tmp_path}/a") is True
    assert not (tmp_path / "a").exists()
