"""Long remote files are kept from part to part, within bounds."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pytest

from transforms.errors import ReadError
from transforms.process import temp_folders
from transforms.process.temp_folders import scratch_folder
from transforms.sources import fetching, kept_files
from transforms.sources.fetching import Fetched, ReadLimits
from transforms.sources.kept_files import KeptFiles

NUM_BYTES = 5000
WAIT_S = 30.0  # for what comes at once, or never
Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The scratch folder, of this test alone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(temp_folders, "_scratch", temp_folders._Scratch())
    yield scratch_folder()
    temp_folders._scratch.remove()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were fetched, by their names."""
    names: list[str] = []
    fetch = fetching.fetch

    def counting(url: str, *args: Any) -> Fetched:
        names.append(url[-1])
        return fetch(url, *args)

    monkeypatch.setattr(kept_files, "fetch", counting)
    return names


@pytest.fixture(autouse=True)
def store() -> Iterator[None]:
    memory = fsspec.filesystem("memory")
    for name in "abcd":
        memory.pipe(f"/kept/{name}", name.encode() * NUM_BYTES)
    yield
    memory.rm("/kept", recursive=True)


def take(
    kept: KeptFiles, name: str, size: int | None = NUM_BYTES, version: str | None = None
) -> Fetched:
    return kept.fetch(f"memory://kept/{name}", size, version, ReadLimits())


def read(kept: KeptFiles, names: str, **changes: Any) -> None:
    """Read files one after another, as parts of them are."""
    for name in names:
        found = take(kept, name, **changes)
        assert found.error is None
        assert Path(str(found.path)).read_bytes() == name.encode() * NUM_BYTES
        found.discard()


def test_files_whose_parts_alternate_are_fetched_once(folder: Path, fetched: list[str]) -> None:
    read(KeptFiles(), "abcabcbca")
    assert fetched == ["a", "b", "c"]
    assert len(list(folder.iterdir())) == 3


def test_another_version_is_another_file(fetched: list[str]) -> None:
    kept = KeptFiles()
    read(kept, "a", version="1")
    read(kept, "a", version="2")
    read(kept, "a", version="1")
    assert fetched == ["a", "a"]


def test_what_was_used_longest_ago_goes_first(folder: Path, fetched: list[str]) -> None:
    kept = KeptFiles(max_files=2)
    read(kept, "abac")
    assert len(list(folder.iterdir())) == 2
    read(kept, "acb")
    assert fetched == ["a", "b", "c", "b"]


def test_what_is_being_read_stays(folder: Path, fetched: list[str]) -> None:
    kept = KeptFiles(max_files=1)
    found = take(kept, "a")
    read(kept, "bcba")
    assert fetched == ["a", "b", "c", "b"]
    assert Path(str(found.path)).read_bytes() == b"a" * NUM_BYTES
    found.discard()
    read(kept, "d")
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("size", [NUM_BYTES, None])
def test_what_is_kept_takes_no_more_room_than_it_leaves(
    folder: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    def disk_usage(path: Any) -> Usage:
        used = sum(one.stat().st_size for one in folder.iterdir() if one.stat().st_nlink == 1)
        used += sum(one.stat().st_size for one in folder.iterdir() if one.stat().st_nlink == 2) // 2
        return Usage(0, used, 5 * NUM_BYTES - used)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    kept = KeptFiles()
    read(kept, "abba", size=size)
    assert fetched == ["a", "b"]  # two are there, and there is room for three
    read(kept, "cab", size=size)
    assert fetched == ["a", "b", "c", "b"]
    assert len(list(folder.iterdir())) == 2


def test_one_thread_fetches_a_file_and_others_are_fetched_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[str] = []
    both_have_begun = threading.Barrier(2)
    fetch = fetching.fetch

    def waiting(url: str, *args: Any) -> Fetched:
        begun.append(url[-1])
        both_have_begun.wait(WAIT_S)
        return fetch(url, *args)

    monkeypatch.setattr(kept_files, "fetch", waiting)
    kept = KeptFiles()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: read(kept, name), "aabbab"))
    assert sorted(begun) == ["a", "b"]


def test_what_has_been_cleared_away_is_fetched_again(folder: Path, fetched: list[str]) -> None:
    kept = KeptFiles()
    read(kept, "a")
    for path in folder.iterdir():
        path.unlink()
    read(kept, "a")
    shutil.rmtree(folder)
    read(kept, "a")
    assert fetched == ["a", "a", "a"]


def test_a_local_file_is_read_where_it_lies(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "local"
    path.write_bytes(b"x")
    assert KeptFiles().fetch(str(path), 1, None, ReadLimits()) == Fetched(path=str(path))
    assert not list(folder.iterdir())


@pytest.fixture
def small_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for a second file, though the system says that there is plenty."""
    copy_rest = fetching._copy_rest

    def copying(data: bytes, rest: BinaryIO, target: BinaryIO, limits: ReadLimits) -> None:
        if any(path.stat().st_size for path in folder.iterdir()):
            target.write(data)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy_rest(data, rest, target, limits)

    monkeypatch.setattr(fetching, "_copy_rest", copying)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_costs_what_is_kept_and_not_in_use(folder: Path, fetched: list[str]) -> None:
    read(KeptFiles(), "aab")
    assert fetched == ["a", "b", "b"]
    assert len(list(folder.iterdir())) == 1


@pytest.mark.usefixtures("small_disk")
def test_where_there_is_no_room_the_failure_says_how_much_is_needed(
    folder: Path, fetched: list[str], tmp_path: Path
) -> None:
    kept = KeptFiles()
    in_use = take(kept, "a")
    error = take(kept, "b").error
    assert isinstance(error, ReadError)
    assert error.error_type == "NoRoom"
    for words in (f"no room in {tmp_path} for memory://", "/kept/b", "it needs 5000 bytes, and "):
        assert words in str(error)
    assert "--retry-failed" in str(error)
    assert fetched == ["a", "b"]  # nothing could be dropped: no second try
    assert len(list(folder.iterdir())) == 2
    in_use.discard()
    read(kept, "b")
