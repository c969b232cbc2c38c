"""What is kept from run to run: whole or not at all, and never a reason for a run to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from transforms.process import disk_cache
from transforms.process.disk_cache import (
    cache_root,
    find_folder,
    keep_figures,
    keep_folder,
    read_figures,
)


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EARMARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_a(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"abc")


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EARMARK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "earmark"
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cache_root() == tmp_path / "home" / ".cache" / "earmark"


def test_a_folder_is_found_again() -> None:
    folder = keep_folder("models", "k", write_a)
    assert folder is not None
    assert find_folder("models", "k") == folder
    assert (folder / "a.bin").read_bytes() == b"abc"
    assert find_folder("models", "other") is None


def test_a_folder_that_was_changed_is_not_found(root: Path) -> None:
    keep_folder("models", "k", write_a)
    (root / "models" / "k" / "a.bin").write_bytes(b"abd")
    assert find_folder("models", "k") is None
    assert keep_folder("models", "k", write_a) == find_folder("models", "k") is not None


def test_what_cannot_be_written_leaves_nothing_behind(root: Path) -> None:
    def fail(folder: Path) -> None:
        write_a(folder)
        raise OSError(28, "No space left on device")

    assert keep_folder("models", "k", fail) is None
    assert list((root / "models").iterdir()) == []


def test_without_a_folder_for_it_nothing_is_kept(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.write_text("a file where the folder belongs")
    for _ in range(2):
        keep_figures("checks", "k", {"a": 1}, most=3)
        assert read_figures("checks", "k") == {}
        assert keep_folder("models", "k", write_a) is None
        monkeypatch.delenv("EARMARK_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_the_folders_that_were_last_used_stay(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "MAX_FOLDERS", 2)
    times = iter(range(1, 100))

    def age(folder: Path) -> None:
        disk_cache.os.utime(folder, (next(times),) * 2)

    for key in ("a", "b"):
        folder = keep_folder("models", key, write_a)
        assert folder is not None
        age(folder)
    assert find_folder("models", "a") is not None  # used again: newer than b
    keep_folder("models", "c", write_a)
    assert {path.name for path in (root / "models").iterdir()} == {"a", "c"}


def test_figures_join_and_the_oldest_go() -> None:
    keep_figures("checks", "k", {"a": 1, "b": 2}, most=3)
    keep_figures("checks", "k", {"c": 3, "a": 4}, most=3)
    assert read_figures("checks", "k") == {"b": 2, "c": 3, "a": 4}
    keep_figures("checks", "k", {"d": 5}, most=3)
    assert read_figures("checks", "k") == {"c": 3, "a": 4, "d": 5}
    assert read_figures("checks", "other") == {}
