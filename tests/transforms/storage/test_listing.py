"""Folders and patterns list every file once, and name what cannot be listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_stores import DiskFileSystem
from transforms.storage import listing, urls, writing


def test_list_files_is_recursive_and_sorted(folder: str) -> None:
    names = ["b.wav", "a/z.wav", "a.wav", "a/b/c.wav", "é.wav"]
    for name in names:
        writing.write_bytes(urls.join(folder, name), b"x")
    found = [info.url for info in listing.list_files(folder)]
    assert found == sorted(urls.join(folder, name) for name in names)


def test_glob_files(folder: str) -> None:
    for name in ("a/1.wav", "a/2.mp3", "b/3.wav", "b/c/4.wav"):
        writing.write_bytes(urls.join(folder, name), b"x")

    def matches(pattern: str) -> list[str]:
        found = listing.glob_files(urls.join(folder, pattern))
        return [info.url.removeprefix(folder + "/") for info in found]

    assert matches("*/*.wav") == ["a/1.wav", "b/3.wav"]
    assert matches("**/*.wav") == ["a/1.wav", "b/3.wav", "b/c/4.wav"]
    assert matches("[b]") == ["b/3.wav", "b/c/4.wav"]
    assert matches("*.flac") == []


def test_a_pattern_of_any_depth_follows_each_link_once(tmp_path: Path) -> None:
    for name in ("x.wav", "a/y.wav", "a/b/z.wav", "a/b/n.txt", "a/.hidden/q.wav", "a/.k.wav"):
        writing.write_bytes(f"{tmp_path}/{name}", b"1")
    for number in range(4):  # followed round and round, these are a million folders
        (tmp_path / "a" / "b" / f"loop{number}").symlink_to(tmp_path)

    def found(pattern: str) -> list[str]:
        return [info.url[len(str(tmp_path)) + 1 :] for info in listing.glob_files(pattern)]

    assert found(f"{tmp_path}/**/*.wav") == ["a/b/z.wav", "a/y.wav", "x.wav"]
    assert found(f"{tmp_path}/**") == ["a/b/n.txt", "a/b/z.wav", "a/y.wav", "x.wav"]
    assert found(f"{tmp_path}/*/b/**") == ["a/b/n.txt", "a/b/z.wav"]
    assert found(f"{tmp_path}/**/b/*.wav") == ["a/b/z.wav"]
    assert found(f"{tmp_path}/nowhere/**") == []
    assert found(f"{tmp_path}/a/**.wav") == ["a/y.wav"]  # no component of its own: a plain star


def test_listing_a_remote_file_system_tells_of_folders_it_cannot_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.wav", "b/2.wav"):
        writing.write_bytes(f"{tmp_path}/{name}", b"x")
    real = DiskFileSystem.ls

    def ls(self: Any, path: str, **kwargs: Any) -> Any:
        if path.endswith("/a"):
            raise PermissionError("no")
        return real(self, path, **kwargs)

    monkeypatch.setattr(DiskFileSystem, "ls", ls)
    errors: list[OSError] = []
    found = list(listing.list_files(f"disk:/{tmp_path}", errors.append))
    assert [info.url for info in found] == [f"disk:/{tmp_path}/b/2.wav"]
    assert [type(error) for error in errors] == [PermissionError]
    assert "/a:" in str(errors[0])
