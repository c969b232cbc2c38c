"""A cache of clips whose process is killed, whose disk is full, or that others use too."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pipeline.training.data import clip_cache
from pipeline.training.data.clip_cache import CachedClips, remove_cache
from tests.pipeline.training.data.clip_caches import (
    DECODE,
    be_killed,
    cache,
    num_bytes_of,
    resume,
    wav,
    write_folder,
    write_mixed,
)
from tests.pipeline.training.small_trainings import everything_in
from tests.support.paths import ROOT
from tests.transforms.results.test_faulty_disk import Namespace, namespace  # noqa: F401
from transforms.decoding.decode import decode_whole
from transforms.errors import OutputError, WriteError
from transforms.sources.read_unit import SourceSettings, find_inputs
from transforms.storage import writing

# --- Killed, full, or not there ------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_mixed(tmp_path_factory.mktemp("mixed") / "audio")


@pytest.fixture(scope="module")
def uninterrupted(mixed: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the cache that comes of it."""
    root = tmp_path_factory.mktemp("uninterrupted")
    cached = cache(mixed, root)
    files = everything_in(root)
    assert len(files) == 2 * len(cached.files.names) == 10
    assert num_bytes_of(cached) == 8 * 9_600 * 4
    return files


@pytest.mark.parametrize(
    ("module", "function", "call", "num_kept"),
    [
        (clip_cache, "_encoded", 2, 0),  # in the first clip, of which there is a piece
        (clip_cache, "_encoded", 8, 2),  # in the second unit
        (clip_cache, "_encoded", 14, 5),  # in a clip of a tar
        (clip_cache, "_make_index", 5, 7),  # after the last clip
        (writing, "write_bytes", 1, 0),  # between a unit's samples and its index
        (writing, "write_bytes", 5, 7),
    ],
)
def test_after_a_kill_decoding_continues_and_ends_with_the_same_files(
    mixed: list[Path],
    uninterrupted: dict[str, bytes],
    tmp_path: Path,
    module: ModuleType,
    function: str,
    call: int,
    num_kept: int,
) -> None:
    be_killed(mixed, tmp_path, module, function, call)
    assert len(list(tmp_path.glob("*.json"))) == call - 1 or function == "_encoded"
    after = resume(mixed, tmp_path)
    assert after.files == uninterrupted
    assert (after.kept, len(after.told)) == ([num_kept] if num_kept else [], 9 - num_kept)


def test_samples_are_on_the_disk_before_the_index_says_so(
    mixed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    real = os.fsync

    def note(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_file():
            synced.append((path.name.split(".")[2], path.stat().st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    cache(mixed, tmp_path)
    assert [kind for kind, _ in synced] == ["samples", "json"] * 5
    num_clips = [2, 1, 1, 2, 2]
    assert [num_bytes for _, num_bytes in synced[::2]] == [num * 9_600 * 4 for num in num_clips]


KILLED = """
import os, signal, sys
from pipeline.training.data import clip_cache
from transforms.decoding.settings import DecodeSettings
from transforms.sources.read_unit import SourceSettings, find_inputs
left = int(sys.argv[3])
def on_clip(num_samples, failed):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
clip_cache.cache_clips(
    find_inputs([sys.argv[1]]), sys.argv[2], on_clip=on_clip,
    on_kept=lambda num: print(num, flush=True),
    decode=DecodeSettings(num_processes=1), sources=SourceSettings(windows_per_unit=2),
)
"""


@pytest.mark.slow
def test_decoding_continues_after_a_signal_has_killed_it(
    mixed: list[Path], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    said = []
    for num_clips in (3, 3, 0):
        command = [sys.executable, "-c", KILLED, *mixed, tmp_path, str(num_clips)]
        process = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE)
        said.append((process.returncode, process.stdout))
        assert len(list(tmp_path.glob(".*"))) == (num_clips > 0)
    # The last clip of a unit is reported before the unit is whole.
    assert said == [(-signal.SIGKILL, b""), (-signal.SIGKILL, b"2\n"), (0, b"4\n")]
    assert everything_in(tmp_path) == uninterrupted


def test_another_process_that_is_faster_does_no_harm(
    mixed: list[Path], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    others: list[CachedClips] = []

    def meanwhile(num_samples: int, failed: bool) -> None:
        if not others:
            others.append(cache(mixed, tmp_path))

    mine = cache(mixed, tmp_path, on_clip=meanwhile)
    assert mine.clips == others[0].clips
    assert everything_in(tmp_path) == uninterrupted


def test_what_a_living_process_writes_and_other_files_are_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    alive, dead = (root / f".{'0' * 20}.samples.{mark * 32}.tmp" for mark in "ab")
    other = root / "notes.txt"
    for path in (alive, dead, other):
        path.write_bytes(b"x")
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        cache([write_folder(tmp_path / "audio", 1)], root)
    finally:
        os.close(descriptor)
    assert alive.exists() and other.exists()
    assert not dead.exists()


def test_a_file_that_is_taken_for_a_dead_process_s_is_made_anew(
    mixed: list[Path],
    uninterrupted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = clip_cache.try_lock, itertools.count(1)

    def be_late(descriptor: int) -> bool:
        if next(calls) == 1:  # between making a file and locking it
            Path(f"/proc/self/fd/{descriptor}").readlink().unlink()
        return real(descriptor)

    monkeypatch.setattr(clip_cache, "try_lock", be_late)
    cache(mixed, tmp_path)
    assert next(calls) == 7  # five units, and one again
    assert everything_in(tmp_path) == uninterrupted


def test_an_interruption_leaves_no_temporary_file(tmp_path: Path) -> None:
    def interrupt(num_samples: int, failed: bool) -> None:
        raise KeyboardInterrupt

    folder = write_folder(tmp_path / "audio", 2)
    with pytest.raises(KeyboardInterrupt):
        cache([folder], tmp_path / "cache", on_clip=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder, root = write_folder(tmp_path / "audio"), tmp_path / "cache"
    cache([folder], root)
    (root / "notes.txt").write_text("mine")
    remove_cache(str(root))
    assert everything_in(root) == {"notes.txt": b"mine"}
    (root / "notes.txt").unlink()
    cache([folder], root)
    remove_cache(str(root))
    assert not root.exists()


def test_samples_that_have_been_cut_off_meanwhile_are_an_error(tmp_path: Path) -> None:
    cached = cache([write_folder(tmp_path / "audio", 1)], tmp_path / "cache")
    path = cached.files.folder / cached.files.names[0]
    path.write_bytes(path.read_bytes()[:400])
    np.testing.assert_array_equal(cached.files.read(0, 100), decode_whole(wav(0))[0][:100])
    with pytest.raises(OSError, match=rf"^{path} has become shorter: 10 of 20 samples could be"):
        cached.files.read(90, 110)


@pytest.fixture
def limit_of_file_sizes() -> Iterator[int]:
    """Files of this process may not grow beyond it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_for_the_size_of_files_is_explained(
    tmp_path: Path, limit_of_file_sizes: int
) -> None:
    folder = write_folder(tmp_path / "audio")
    small, one_unit = dataclasses.replace(DECODE, piece_samples=400), SourceSettings()
    with pytest.raises(WriteError) as caught:
        cache([folder], tmp_path / "cache", decode=small, sources=one_unit)
    assert str(caught.value) == (
        f"{tmp_path}/cache cannot hold the decoded clips: File too large. 0.1 MiB held 2 items of "
        "5, so about 0.2 MiB are needed. With --set cache.dtype=int16 they take half as much. Make "
        "room there, or give another folder with --cache; what this run has written there is "
        "removed."
    )
    assert list((tmp_path / "cache").iterdir()) == []
    # Half as much fits, as it says.
    rounded = cache([folder], tmp_path / "cache", decode=small, sources=one_unit, dtype="int16")
    assert len(rounded.clips) == 5


def test_on_a_full_disk_units_of_earlier_runs_stay(
    mixed: list[Path], tmp_path: Path, limit_of_file_sizes: int
) -> None:
    be_killed(mixed, tmp_path / "cache", clip_cache, "_make_index", 3)
    before = everything_in(tmp_path / "cache")
    assert len(before) == 4
    write_folder(tmp_path / "more", 1)
    (tmp_path / "more" / "0.wav").write_bytes(wav(0, 2.0))
    with pytest.raises(WriteError):
        cache([*mixed, tmp_path / "more"], tmp_path / "cache")
    assert everything_in(tmp_path / "cache") == before


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "audio", 1)
    found = find_inputs([str(folder)])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=rf"{tmp_path}/file/cache cannot be made: Not a direc"):
        cache(found, tmp_path / "file" / "cache")
