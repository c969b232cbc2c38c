"""Labelled clips: decoded once and exactly, kept whole or not at all, with labels that fit."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import io
import itertools
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.training.data import clip_cache
from pipeline.training.data.clip_cache import (
    CachedClip,
    CachedClips,
    CacheDtype,
    SampleFile,
    cache_clips,
    check_failures,
    write_errors,
)
from pipeline.training.data.dataset import (
    ClipSet,
    label_clips,
    make_clip_sets,
    resolve_labels,
    split_clips,
)
from tests.support import audio_factory
from tests.support.paths import ROOT
from tests.transforms.results.test_faulty_disk import Namespace, namespace  # noqa: F401
from transforms.decoding.decode import decode_whole
from transforms.decoding.pool import DecodeSettings
from transforms.errors import ConfigError, InputError, OutputError, WriteError
from transforms.records import Failure, Item, ItemFailure
from transforms.sources.read_unit import Found, SourceSettings, find_inputs, limit_items

RATE = 16_000
# Pieces are short, so that most clips come in several.
DECODE = DecodeSettings(num_processes=1, piece_samples=4_000)
SOURCES = SourceSettings(windows_per_unit=2)


def cache(
    inputs: Sequence[Path] | Found,
    folder: Path,
    *,
    decode: DecodeSettings = DECODE,
    sources: SourceSettings = SOURCES,
    dtype: CacheDtype = "float32",
    on_clip: Any = None,
    on_kept: Any = None,
) -> CachedClips:
    found = inputs if isinstance(inputs, Found) else find_inputs([str(path) for path in inputs])
    return cache_clips(
        found,
        str(folder),
        decode=decode,
        sources=sources,
        dtype=dtype,
        on_clip=on_clip,
        on_kept=on_kept,
    )


def wav(seed: int = 0, duration_s: float = 0.6, rate: int = RATE) -> bytes:
    return audio_factory.encode(audio_factory.noise(duration_s, rate, seed=seed), rate)


def write_folder(folder: Path, num: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num):
        (folder / f"{index}.wav").write_bytes(wav(index))
    return folder


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_name(cached: CachedClips) -> dict[str, CachedClip]:
    return {Path(clip.item.member or clip.item.uri).name: clip for clip in cached.clips}


def finished(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


# --- What a cache holds --------------------------------------------------------------------


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of several formats, rates and channels."""
    folder = tmp_path_factory.mktemp("sounds")
    for name, format_, rate, channels in (
        ("a.wav", "wav", 16_000, 1),
        ("b.flac", "flac", 44_100, 2),
        ("c.ogg", "ogg", 22_050, 1),
        ("d.mp3", "mp3", 48_000, 2),
    ):
        samples = audio_factory.noise(1.3, rate, num_channels=channels, seed=len(name))
        audio_factory.write(folder / name, samples, rate, format_)
    return folder


@pytest.fixture(scope="module")
def cached_sounds(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedClips:
    return cache([sounds], tmp_path_factory.mktemp("cache"))


def test_samples_are_those_that_label_gets(sounds: Path, cached_sounds: CachedClips) -> None:
    clips = by_name(cached_sounds)
    assert list(clips) == ["a.wav", "b.flac", "c.ogg", "d.mp3"]
    for name, clip in clips.items():
        expected, facts = decode_whole((sounds / name).read_bytes(), sample_rate_hz=RATE)
        samples = cached_sounds.samples(clip)
        assert samples.dtype == np.float32
        np.testing.assert_array_equal(samples, expected)
        assert clip.content_sha256 == facts.content_sha256
    plain, _ = soundfile.read(sounds / "a.wav", dtype="float32")
    np.testing.assert_array_equal(cached_sounds.samples(clips["a.wav"]), plain)
    total = sum(clip.num_samples for clip in cached_sounds.clips)
    assert (Path(cached_sounds.folder) / "samples.bin").stat().st_size == 4 * total
    assert cached_sounds.duration_s == pytest.approx(4 * 1.3, abs=0.1)
    assert not cached_sounds.is_reused and not cached_sounds.failures


def test_a_part_of_a_clip_is_read_by_itself(cached_sounds: CachedClips) -> None:
    clip = by_name(cached_sounds)["b.flac"]
    whole = cached_sounds.samples(clip)
    np.testing.assert_array_equal(cached_sounds.samples(clip, 100, 205), whole[100:205])
    np.testing.assert_array_equal(cached_sounds.samples(clip, whole.size), whole[:0])
    part = cached_sounds.samples(clip, 0, 10)
    part[:] = 9.0  # a copy: the cache stays as it is
    np.testing.assert_array_equal(cached_sounds.samples(clip, 0, 10), whole[:10])
    with pytest.raises(ValueError, match=rf"samples 0 to {whole.size + 1} were asked for; it has"):
        cached_sounds.samples(clip, 0, whole.size + 1)


def test_int16_is_half_as_large_and_nearly_the_same(
    sounds: Path, cached_sounds: CachedClips, tmp_path: Path
) -> None:
    rounded = cache([sounds], tmp_path / "cache", dtype="int16")
    assert rounded.folder != cached_sounds.folder
    for clip, other in zip(rounded.clips, cached_sounds.clips, strict=True):
        assert clip == other
        difference = np.abs(rounded.samples(clip) - cached_sounds.samples(other))
        is_exact = clip.item.uri.endswith("a.wav")  # 16 bits from the start
        assert difference.max() <= (0 if is_exact else 1 / 65_536)
        assert is_exact or difference.max() > 1 / 70_000


def test_int16_cuts_off_what_is_too_loud(tmp_path: Path) -> None:
    loud = np.array([1.5, -1.5, 1.0, -1.0, 0.5] * 200, np.float32)
    audio_factory.write(tmp_path / "loud.wav", loud, RATE, "wav_float")
    cached = cache([tmp_path / "loud.wav"], tmp_path / "cache", dtype="int16")
    most = 32_767 / 32_768
    expected = np.array([most, -1.0, most, -1.0, 0.5] * 200, np.float32)
    np.testing.assert_array_equal(cached.samples(cached.clips[0]), expected)


def test_tars_tables_and_manifests_give_labels_and_samples(tmp_path: Path) -> None:
    sound = {name: wav(seed) for seed, name in enumerate(("tar", "row0", "row1", "file"))}
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, data in (("x.wav", sound["tar"]), ("x.json", b'{"label": "cat", "fold": 2}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    audio = [{"bytes": sound[name], "path": f"{name}.wav"} for name in ("row0", "row1")]
    table = pa.table({"audio": audio, "label": ["dog", "cow"], "fold": [1, 2]})
    pq.write_table(table, tmp_path / "p.parquet")
    (tmp_path / "f.wav").write_bytes(sound["file"])
    rows = [{"uri": "f.wav", "labels": ["owl", "cat"], "start_s": 0.1, "end_s": 0.35, "fold": 3}]
    inputs = [
        tmp_path / "t.tar",
        tmp_path / "p.parquet",
        write_manifest(tmp_path / "m.jsonl", rows),
    ]
    cached = cache(inputs, tmp_path / "cache")
    whole = {name: decode_whole(data, sample_rate_hz=RATE)[0] for name, data in sound.items()}
    expected = [
        (("owl", "cat"), 3, whole["file"][1_600:5_600]),
        (("dog",), 1, whole["row0"]),
        (("cow",), 2, whole["row1"]),
        (("cat",), 2, whole["tar"]),
    ]
    assert len(cached.clips) == 4
    for clip, (truth, fold, samples) in zip(cached.clips, expected, strict=True):
        assert clip.item.truth == truth
        assert json.loads(clip.item.metadata or "")["fold"] == fold
        np.testing.assert_array_equal(cached.samples(clip), samples)
    again = cache(inputs, tmp_path / "cache")
    assert again.is_reused
    assert again.clips == cached.clips


def test_every_item_is_told_once_while_decoding(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "audio")
    (folder / "bad.wav").write_bytes(b"no audio")
    told: list[tuple[int, bool]] = []
    cache([folder], tmp_path / "cache", on_clip=lambda *done: told.append(done))
    assert told == [*[(9_600, False)] * 5, (0, True)]
    told.clear()
    cache([folder], tmp_path / "cache", on_clip=lambda *done: told.append(done))
    assert told == []


# --- Which cache is used -------------------------------------------------------------------


def test_a_changed_file_and_another_kind_of_samples_make_another_cache(tmp_path: Path) -> None:
    folder, caches = write_folder(tmp_path / "audio"), tmp_path / "cache"
    first = cache([folder], caches)
    assert cache([folder], caches).is_reused
    # However the work is cut, and whatever the window.
    assert cache([folder], caches, sources=SourceSettings(window_s=1.0, hop_s=0.5)).is_reused
    assert finished(caches) == [Path(first.folder).name]
    (folder / "1.wav").write_bytes(wav(99, 0.7))
    changed = cache([folder], caches)
    assert not changed.is_reused
    assert len(finished(caches)) == 2
    np.testing.assert_array_equal(
        changed.samples(by_name(changed)["1.wav"]), decode_whole(wav(99, 0.7))[0]
    )
    lower = cache([folder], caches, decode=dataclasses.replace(DECODE, sample_rate_hz=8_000))
    assert lower.clips[0].num_samples == 4_800
    limited = cache(limit_items(find_inputs([str(folder)]), 2, SOURCES), caches)
    assert [clip.item.uri for clip in limited.clips] == [f"{folder}/0.wav", f"{folder}/1.wav"]
    assert len(finished(caches)) == 4
    assert cache([folder], caches).clips == changed.clips


def test_labels_are_those_of_now_without_decoding_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "audio", 2)
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(folder / "0.wav", "x.wav")
    rows = [
        {"uri": "audio/0.wav", "label": "cat", "fold": 1},
        {"uri": "audio/1.wav", "label": "dog", "fold": 2},
        {"uri": "t.tar", "member": "x.wav", "label": "cow"},
    ]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)

    def facts(cached: CachedClips) -> list[tuple[Any, Any]]:
        return [(clip.item.truth, clip.item.metadata) for clip in cached.clips]

    first = cache([manifest], tmp_path / "cache")
    assert facts(first) == [
        (("cat",), '{"fold": 1}'),
        (("dog",), '{"fold": 2}'),
        (("cow",), None),
    ]
    rows[0] |= {"label": "lion", "fold": 5}
    del rows[1]["label"]
    rows[2]["label"] = "bull"
    write_manifest(manifest, rows)
    second = cache([manifest], tmp_path / "cache")
    assert second.is_reused
    assert facts(second) == [(("lion",), '{"fold": 5}'), (None, '{"fold": 2}'), (("bull",), None)]
    # Whether the tar's own labels count is another matter: they must be read.
    del rows[2]["label"]
    write_manifest(manifest, rows)
    third = cache([manifest], tmp_path / "cache")
    assert not third.is_reused
    assert third.clips[2].item.truth is None


def test_what_failed_is_tried_again_when_a_cache_is_used_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "audio")
    (folder / "bad.wav").write_bytes(b"no audio")
    found = find_inputs([str(folder)])
    moved = (folder / "3.wav").rename(tmp_path / "3.wav")
    first = cache(found, tmp_path / "cache")
    assert len(first.clips) == 4
    assert [(Path(e.failure.item.uri).name, e.failure.error_type) for e in first.failures] == [
        ("3.wav", "FileNotFoundError"),
        ("bad.wav", "NotAudio"),
    ]
    assert cache(found, tmp_path / "cache").is_reused
    moved.rename(folder / "3.wav")  # with its size and its time of change
    second = cache(found, tmp_path / "cache")
    assert not second.is_reused
    assert second.folder == first.folder
    assert len(second.clips) == 5
    assert [event.failure.error_type for event in second.failures] == ["NotAudio"]
    assert finished(tmp_path / "cache") == [Path(second.folder).name]
    assert not unfinished(tmp_path / "cache")


def test_a_clip_that_fails_half_way_leaves_no_samples(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "audio", 3)
    (folder / "1.wav").write_bytes(wav(1, 3.0))
    bounded = dataclasses.replace(DECODE, max_item_s=2.0)
    cached = cache([folder], tmp_path / "cache", decode=bounded)
    assert [event.failure.error_type for event in cached.failures] == ["ItemTooLong"]
    assert [(clip.offset, clip.num_samples) for clip in cached.clips] == [
        (0, 9_600),
        (9_600, 9_600),
    ]
    for name, seed in (("0.wav", 0), ("2.wav", 2)):
        samples = cached.samples(by_name(cached)[name])
        np.testing.assert_array_equal(samples, decode_whole(wav(seed))[0])
    assert cache([folder], tmp_path / "cache", decode=bounded).is_reused
    assert len(cache([folder], tmp_path / "cache").clips) == 3


def test_members_and_rows_that_failed_stay_failures(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for data in (wav(0), b"no audio", wav(1)):  # all of one name
            info = tarfile.TarInfo("x.wav")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    audio = [{"bytes": data, "path": "x.wav"} for data in (wav(2), b"no audio")]
    pq.write_table(pa.table({"audio": audio}), tmp_path / "p.parquet")
    inputs = [tmp_path / "t.tar", tmp_path / "p.parquet"]
    cached = cache(inputs, tmp_path / "cache")
    names = [event.failure.item.clip_id.removeprefix(f"{tmp_path}/") for event in cached.failures]
    assert names == ["p.parquet#row=1", "t.tar#x.wav~2"]
    assert len(cached.clips) == 3
    again = cache(inputs, tmp_path / "cache")
    assert again.is_reused
    assert again.failures == cached.failures


def test_lines_of_manifests_that_cannot_be_read_are_failures(tmp_path: Path) -> None:
    write_folder(tmp_path / "audio", 1)
    rows = [{"uri": "audio/0.wav", "label": "a"}, {"label": "b"}]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    cached = cache([manifest], tmp_path / "cache")
    assert len(cached.clips) == 1
    assert "line 2 of" in cached.failures[0].failure.message
    rows[1] = {"uri": "audio/absent.wav", "label": "b"}
    write_manifest(manifest, rows)
    mended = cache([manifest], tmp_path / "cache")
    assert [event.failure.error_type for event in mended.failures] == ["FileNotFoundError"]


def test_a_damaged_cache_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "audio", 2)
    first = cache([folder], tmp_path / "cache")
    samples = Path(first.folder) / "samples.bin"
    whole = samples.read_bytes()
    for name, content in (("samples.bin", whole[:-4]), ("clips.parquet", b"PAR1"), (None, b"")):
        if name is None:
            samples.unlink()
        else:
            (Path(first.folder) / name).write_bytes(content)
        caplog.clear()
        again = cache([folder], tmp_path / "cache")
        assert not again.is_reused
        assert f"{first.folder} is damaged (" in caplog.text
        assert samples.read_bytes() == whole
        assert again.clips == first.clips


def test_nothing_that_can_be_decoded_is_a_cache_too(tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"")
    cached = cache([tmp_path / "bad.wav"], tmp_path / "cache")
    assert cached.clips == ()
    with pytest.raises(InputError, match=r"^none of 1 item could be decoded; one of them: .*bad"):
        check_failures(cached, 1.0)


# --- Killed, full, or not there ------------------------------------------------------------


class Killed(BaseException):
    """Stands for a signal that comes at a point that no signal could be made to meet."""


def write_mixed(folder: Path) -> list[Path]:
    """Nine items in five units: 0 1 | bad 2 | 3 | two of a tar | two rows of a Parquet file."""
    write_folder(folder, 4)
    (folder / "1b.wav").write_bytes(b"no audio")
    with tarfile.open(folder / "t.tar", "w") as archive:
        for name, data in (("x.wav", wav(7)), ("x.json", b'{"label": "cat"}'), ("y.wav", wav(8))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    audio = [{"bytes": wav(seed), "path": f"{seed}.wav"} for seed in (9, 10)]
    pq.write_table(pa.table({"audio": audio, "label": ["dog", "\u00e4"]}), folder / "p.parquet")
    return [folder]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_mixed(tmp_path_factory.mktemp("mixed") / "audio")


def contents(cached: CachedClips) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(cached.folder).iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(
    mixed: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[CacheDtype, dict[str, bytes]]:
    """The files of the cache that comes of it."""
    root = tmp_path_factory.mktemp("uninterrupted")
    files = {dtype: contents(cache(mixed, root, dtype=dtype)) for dtype in get_args(CacheDtype)}
    assert sorted(files["int16"]) == ["clips.parquet", "failures.parquet", "samples.bin"]
    assert len(files["float32"]["samples.bin"]) == 8 * 9_600 * 4
    return files


class GoingOn(NamedTuple):
    """What came of going on."""

    files: dict[str, bytes]
    kept: list[int]
    told: list[tuple[int, bool]]


def go_on(inputs: list[Path], root: Path, dtype: CacheDtype = "float32") -> GoingOn:
    kept: list[int] = []
    told: list[tuple[int, bool]] = []
    cached = cache(
        inputs, root, dtype=dtype, on_kept=kept.append, on_clip=lambda *done: told.append(done)
    )
    assert not cached.is_reused
    assert finished(root) == [Path(cached.folder).name]
    assert not unfinished(root)
    return GoingOn(contents(cached), kept, told)


def kill_at(patch: pytest.MonkeyPatch, function: str, call: int) -> None:
    """End a process at a call of one of the cache's functions, counted from 1."""
    real, calls = getattr(clip_cache, function), itertools.count(1)

    def die_some_time(*arguments: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return real(*arguments)

    patch.setattr(clip_cache, function, die_some_time)


def be_killed(
    inputs: list[Path],
    root: Path,
    function: str = "_give_name",
    call: int = 1,
    dtype: CacheDtype = "float32",
) -> Path:
    """Decode until a process ends; gives what it has left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_cache, "LOG_INTERVAL_S", 0.0)
        kill_at(patch, function, call)
        with pytest.raises(Killed):
            cache(inputs, root, dtype=dtype)
    assert finished(root) == []
    (left,) = unfinished(root)
    return left


@pytest.mark.parametrize("dtype", get_args(CacheDtype))
@pytest.mark.parametrize(
    ("function", "call", "num_kept"),
    [
        ("_clip_row", 3, 2),  # between two clips: the first of the second unit that can be decoded
        ("_encoded", 8, 2),  # in a clip, of which there is a piece
        ("_encoded", 14, 5),  # in a clip of a tar
        ("_clip_row", 8, 7),  # in a unit, whose other clip is decoded again
        ("_write_table", 1, 9),  # after the last clip
        ("_write_table", 2, 9),  # between the tables
        ("_give_name", 1, 9),  # when all is there but the name
    ],
)
def test_after_a_kill_decoding_goes_on_and_ends_with_the_same_files(
    mixed: list[Path],
    uninterrupted: dict[CacheDtype, dict[str, bytes]],
    tmp_path: Path,
    function: str,
    call: int,
    num_kept: int,
    dtype: CacheDtype,
) -> None:
    be_killed(mixed, tmp_path, function, call, dtype)
    after = go_on(mixed, tmp_path, dtype)
    assert after.files == uninterrupted[dtype]
    assert (after.kept, len(after.told)) == ([num_kept], 9 - num_kept)


def test_decoding_goes_on_after_several_kills(
    mixed: list[Path], uninterrupted: dict[CacheDtype, dict[str, bytes]], tmp_path: Path
) -> None:
    for call in (4, 2, 3):
        be_killed(mixed, tmp_path, "_clip_row", call)
    after = go_on(mixed, tmp_path)
    assert after.files == uninterrupted["float32"]
    assert after.kept == [7]


@pytest.mark.parametrize(
    ("name", "damage", "num_kept"),
    [
        ("units.jsonl", lambda data: data[:-1], 7),
        ("units.jsonl", lambda data: data[:-200], 7),
        ("units.jsonl", lambda data: data + b'{"unit_id": "0', 9),
        ("units.jsonl", lambda data: data[:-200] + bytes(200), 7),
        ("units.jsonl", lambda data: data[:-200] + bytes(199) + b"\n", 7),
        ("samples.bin", lambda data: data[:-1], 7),
        ("samples.bin", lambda data: data + b"more", 9),
        ("samples.bin", lambda data: b"", 0),
        ("samples.bin", None, 0),
    ],
)
def test_what_a_dying_machine_has_torn_is_not_gone_on_with(
    mixed: list[Path],
    uninterrupted: dict[CacheDtype, dict[str, bytes]],
    tmp_path: Path,
    name: str,
    damage: Callable[[bytes], bytes] | None,
    num_kept: int,
) -> None:
    path = be_killed(mixed, tmp_path) / name
    data = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(data))
    after = go_on(mixed, tmp_path)
    assert after.files == uninterrupted["float32"]
    assert (after.kept, len(after.told)) == ([num_kept] if num_kept else [], 9 - num_kept)


def test_samples_are_safe_before_the_log_says_so(
    mixed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    real = os.fsync

    def note(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "samples.bin":
            assert len(Path(path.parent, "units.jsonl").read_bytes().splitlines()) == len(synced)
            synced.append((path.name, path.stat().st_size))
        real(descriptor)

    monkeypatch.setattr(clip_cache, "LOG_INTERVAL_S", 0.0)
    monkeypatch.setattr(os, "fsync", note)
    cache(mixed, tmp_path)
    num_clips = [2, 3, 4, 6, 8, 8]  # after each unit, and at the end
    assert synced == [("samples.bin", num * 9_600 * 4) for num in num_clips]


def test_a_changed_input_is_not_gone_on_with(tmp_path: Path) -> None:
    inputs = write_mixed(tmp_path / "audio")
    be_killed(inputs, tmp_path / "cache")
    (tmp_path / "audio" / "0.wav").write_bytes(wav(99))
    after = go_on(inputs, tmp_path / "cache")
    assert (after.kept, len(after.told)) == ([], 9)
    assert after.files == contents(cache(inputs, tmp_path / "other"))


def test_units_that_are_cut_elsewhere_are_decoded_anew(mixed: list[Path], tmp_path: Path) -> None:
    be_killed(mixed, tmp_path / "cache")
    larger = SourceSettings(windows_per_unit=3)
    kept: list[int] = []
    cached = cache(mixed, tmp_path / "cache", sources=larger, on_kept=kept.append)
    assert kept == []
    assert contents(cached) == contents(cache(mixed, tmp_path / "other", sources=larger))


def test_what_failed_is_tried_again_when_decoding_goes_on(tmp_path: Path) -> None:
    inputs, root = write_mixed(tmp_path / "audio"), tmp_path / "cache"
    found = find_inputs([str(path) for path in inputs])
    moved = (tmp_path / "audio" / "3.wav").rename(tmp_path / "3.wav")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_cache, "LOG_INTERVAL_S", 0.0)
        kill_at(patch, "_give_name", 1)
        with pytest.raises(Killed):
            cache(found, root)
    moved.rename(tmp_path / "audio" / "3.wav")
    kept: list[int] = []
    cached = cache(found, root, on_kept=kept.append)
    assert kept == [2]  # the units before the first that has a failure
    assert [event.failure.error_type for event in cached.failures] == ["NotAudio"]
    assert contents(cached) == contents(cache(found, tmp_path / "other"))


def test_of_several_the_one_that_holds_most_is_gone_on_with(
    mixed: list[Path], uninterrupted: dict[CacheDtype, dict[str, bytes]], tmp_path: Path
) -> None:
    for name, call in (("less", 5), ("most", 8), ("least", 3)):
        left = be_killed(mixed, tmp_path / name, "_clip_row", call)
        left.rename(tmp_path / left.name)
    root = tmp_path / "cache"
    root.mkdir()
    for left in unfinished(tmp_path):
        left.rename(root / left.name)
    after = go_on(mixed, root)
    assert after.files == uninterrupted["float32"]
    assert after.kept == [7]


def test_what_one_process_goes_on_with_another_leaves_alone(
    mixed: list[Path], uninterrupted: dict[CacheDtype, dict[str, bytes]], tmp_path: Path
) -> None:
    be_killed(mixed, tmp_path, "_clip_row", 8)
    kept: list[int] = []
    others: list[CachedClips] = []

    def meanwhile(num_samples: int, failed: bool) -> None:
        if not others:
            others.append(cache(mixed, tmp_path, on_kept=lambda num: kept.append(-num)))

    mine = cache(mixed, tmp_path, on_kept=kept.append, on_clip=meanwhile)
    assert kept == [7]
    assert mine.clips == others[0].clips
    assert contents(mine) == uninterrupted["float32"]
    assert not unfinished(tmp_path)


def test_a_stale_cache_that_was_set_aside_is_not_gone_on_with(
    mixed: list[Path], uninterrupted: dict[CacheDtype, dict[str, bytes]], tmp_path: Path
) -> None:
    """Even if its process died before it had removed the log, and the next before it was gone."""
    log = (be_killed(mixed, tmp_path) / "units.jsonl").read_bytes()
    cached = cache(mixed, tmp_path)
    (Path(cached.folder) / "units.jsonl").write_bytes(log)
    (Path(cached.folder) / "clips.parquet").write_bytes(b"")  # damaged
    with pytest.MonkeyPatch.context() as patch:

        def die(path: Path, **_: Any) -> None:
            raise Killed

        patch.setattr(clip_cache.shutil, "rmtree", die)
        with pytest.raises(Killed):
            cache(mixed, tmp_path)
    assert len(unfinished(tmp_path)) == 2
    after = go_on(mixed, tmp_path)
    assert after.files == uninterrupted["float32"]
    assert after.kept == [9]  # of the new one


KILLED = """
import os, signal, sys
from pipeline.training.data import clip_cache
from transforms.decoding.pool import DecodeSettings
from transforms.sources.read_unit import SourceSettings, find_inputs
clip_cache.LOG_INTERVAL_S = 0.0
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
def test_killed_by_a_signal_decoding_goes_on(
    mixed: list[Path], uninterrupted: dict[CacheDtype, dict[str, bytes]], tmp_path: Path
) -> None:
    said = []
    for num_clips in (3, 3, 0):
        command = [sys.executable, "-c", KILLED, *mixed, tmp_path, str(num_clips)]
        process = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE)
        said.append((process.returncode, process.stdout))
    # The last clip of a unit is told before the unit is in the log.
    assert said == [(-signal.SIGKILL, b""), (-signal.SIGKILL, b"2\n"), (0, b"4\n")]
    (whole,) = tmp_path.iterdir()
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == uninterrupted["float32"]


@pytest.mark.slow
def test_two_processes_at_once_go_on_without_disturbing_each_other(
    mixed: list[Path], uninterrupted: dict[CacheDtype, dict[str, bytes]], tmp_path: Path
) -> None:
    be_killed(mixed, tmp_path, "_clip_row", 4)
    command = [sys.executable, "-c", KILLED, *mixed, tmp_path, "0"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(said) == [b"", b"4\n"]
    (whole,) = tmp_path.iterdir()
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == uninterrupted["float32"]


def test_what_a_living_process_writes_and_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    caches = tmp_path / "cache"
    alive, dead = (caches / f".{'0' * 20}.{mark * 32}.tmp" for mark in "ab")
    mine = caches / ".git"
    for path in (alive, dead, mine):
        path.mkdir(parents=True)
        (path / "file").write_bytes(b"x")
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        cache([write_folder(tmp_path / "audio", 1)], caches)
    finally:
        os.close(descriptor)
    assert (alive / "file").exists() and (mine / "file").exists()
    assert not dead.exists()


def test_an_interruption_before_anything_lasts_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(num_samples: int, failed: bool) -> None:
        raise KeyboardInterrupt

    folder = write_folder(tmp_path / "audio", 2)
    with pytest.raises(KeyboardInterrupt):
        cache([folder], tmp_path / "cache", on_clip=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_process_that_was_faster_is_taken_up(tmp_path: Path) -> None:
    folder, caches = write_folder(tmp_path / "audio", 2), tmp_path / "cache"
    others: list[CachedClips] = []

    def meanwhile(num_samples: int, failed: bool) -> None:
        if not others:
            others.append(cache([folder], caches))

    mine = cache([folder], caches, on_clip=meanwhile)
    assert mine.clips == others[0].clips
    assert finished(caches) == [Path(mine.folder).name]
    assert not unfinished(caches)


@pytest.fixture
def limit_of_file_sizes() -> Iterator[int]:
    """Files of this process may not grow beyond it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_for_the_size_of_files_is_told(tmp_path: Path, limit_of_file_sizes: int) -> None:
    folder = write_folder(tmp_path / "audio")
    small = dataclasses.replace(DECODE, piece_samples=400)
    with pytest.raises(WriteError) as caught:
        cache([folder], tmp_path / "cache", decode=small)
    assert str(caught.value) == (
        f"{tmp_path}/cache cannot hold the decoded clips: File too large. 0.1 MiB held 2 items of "
        "5, so about 0.2 MiB are needed. With --set cache.dtype=int16 they take half as much. Make "
        "room there, or give another folder with --cache; what was begun is removed."
    )
    assert list((tmp_path / "cache").iterdir()) == []
    # Half as much fits, as it says.
    assert len(cache([folder], tmp_path / "cache", decode=small, dtype="int16").clips) == 5


CACHE = """
import sys
from pipeline.training.data.clip_cache import cache_clips
from transforms.decoding.pool import DecodeSettings
from transforms.errors import EarmarkError
from transforms.sources.read_unit import SourceSettings, find_inputs
try:
    cache_clips(find_inputs([sys.argv[1]]), sys.argv[2], decode=DecodeSettings(num_processes=1),
                sources=SourceSettings())
except EarmarkError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "60k", "140k"])
def test_a_disk_that_fills_up_is_told_and_left_as_it_was(
    namespace: Namespace,  # noqa: F811
    tmp_path: Path,
    size: str,
) -> None:
    folder = write_folder(tmp_path / "audio")
    namespace.mount(f"size={size}")
    caches = namespace.disk / "cache"
    command = [sys.executable, "-c", CACHE, folder, caches]
    process = namespace.start(*command)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    words = f"{caches} cannot hold the decoded clips: No space left on device."
    assert said.splitlines()[-1].startswith(words), said
    assert "Make room there, or give another folder with --cache" in said
    assert list(namespace.outside(caches).iterdir()) == []
    namespace.remount("size=10m")
    process = namespace.start(*command)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    (whole,) = namespace.outside(caches).iterdir()
    assert (whole / "samples.bin").stat().st_size == 5 * 9_600 * 4


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "audio", 1)
    found = find_inputs([str(folder)])
    with pytest.raises(OutputError, match=r"is gs://bucket/cache; must be a local folder"):
        cache_clips(found, "gs://bucket/cache", decode=DECODE, sources=SOURCES)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=rf"{tmp_path}/file/cache cannot be made: Not a direc"):
        cache(found, tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match=r"cache\.dtype is 'float16'; must be float32 or int16"):
        cache(found, tmp_path / "cache", dtype="float16")  # type: ignore[arg-type]


# --- Failures ------------------------------------------------------------------------------


def test_failures_are_a_manifest_that_gives_them_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "audio", 1)
    (folder / "bad.wav").write_bytes(b"no audio")
    rows = [{"uri": f"audio/{name}.wav", "label": name, "n": 1} for name in ("0", "bad")]
    cached = cache([write_manifest(tmp_path / "m.jsonl", [*rows, {"n": 2}])], tmp_path / "cache")
    url = str(tmp_path / "out" / "errors.parquet")
    write_errors([cached], url)
    table = pq.read_table(url).to_pylist()
    assert [(row["error_type"], row["truth"]) for row in table] == [
        ("ReadError", None),
        ("NotAudio", ["bad"]),
    ]
    (item,) = (item for item in find_inputs([url]).items if item.truth)
    assert (item.uri, item.truth, item.metadata) == (f"{folder}/bad.wav", ("bad",), '{"n": 1}')
    write_errors([dataclasses.replace(cached, failures=())], url)
    assert not Path(url).exists()


def failed(num_clips: int, num_failed: int, *, is_container: bool = False) -> CachedClips:
    failures = [
        ItemFailure("u", i, Failure(Item(f"bad{i}", "bad"), "decode", "X", "why", is_container))
        for i in range(num_failed)
    ]
    return made([clip(f"{i}", "a") for i in range(num_clips)], failures)


def test_too_many_failures_are_an_error() -> None:
    check_failures(failed(100, 0), 0.0)
    check_failures(failed(95, 5), 0.05)
    with pytest.raises(
        InputError,
        match=r"^6 of 100 items could not be decoded, and max_failed allows 0\.05 of them; one of "
        r"them: bad0: why\. Mend or leave out what is broken, or raise --max-failed\.$",
    ):
        check_failures(failed(94, 6), 0.05)
    with pytest.raises(InputError, match=r"^1 container could not be read to the end.*bad0: why"):
        check_failures(failed(99, 1, is_container=True), 0.5)
    check_failures(failed(99, 1, is_container=True), 1.0)


# --- Training and validation ---------------------------------------------------------------


def clip(name: str, *labels: str, content: str | None = None, **metadata: object) -> CachedClip:
    item = Item(name, name, truth=labels, metadata=json.dumps(metadata) if metadata else None)
    return CachedClip(item, 0, 1, content or name)


def unlabelled(name: str) -> CachedClip:
    return CachedClip(Item(name, name), 0, 1, name)


def made(clips: Sequence[CachedClip], failures: Sequence[ItemFailure] = ()) -> CachedClips:
    file = SampleFile(Path("/nowhere"), "float32")
    return CachedClips("/nowhere", RATE, file, tuple(clips), tuple(failures), False)


FOLDS = [
    clip("a", "x", fold="1"),
    clip("b", "x", fold=2),
    clip("c", "y", fold=2.0, other=True),
    clip("d", "y", fold=2.5),
    clip("e", "y"),
]


@pytest.mark.parametrize(
    ("hold_out", "held"),
    [
        (None, ""),
        ("fold=1", "a"),
        ("fold=2", "bc"),
        ("fold = 2 ", "bc"),
        ("fold=2.0", "c"),
        ("fold=2.5", "d"),
        ("other=true", "c"),
    ],
)
def test_clips_are_held_out_by_a_column(hold_out: str | None, held: str) -> None:
    train, validation = split_clips(made(FOLDS), hold_out)
    assert "".join(clip.item.clip_id for clip in validation) == held
    assert "".join(clip.item.clip_id for clip in train) == "".join(
        c for c in "abcde" if c not in held
    )


@pytest.mark.parametrize(
    ("clips", "hold_out", "words"),
    [
        (FOLDS, "fold", r"^hold_out is 'fold'; expected COLUMN=VALUE, such as fold=4"),
        (FOLDS, "Fold=1", r"no clip has a column Fold; the columns there are: fold, other$"),
        (FOLDS, "fold=9", r"no clip has this value; of the 3 values of fold: 1, 2, 2\.5$"),
        (FOLDS[4:], "fold=9", r"the inputs say nothing of their clips but labels; expected a man"),
        (FOLDS[1:3], "fold=2", r"fold=2 holds out all of 2 clips, and nothing is left to train on"),
    ],
)
def test_a_hold_out_that_means_nothing_is_an_error(
    clips: list[CachedClip], hold_out: str, words: str
) -> None:
    with pytest.raises((InputError, ConfigError), match=words):
        split_clips(made(clips), hold_out)


# --- Labels --------------------------------------------------------------------------------

PAIRS = [clip("a1", "cat"), clip("a2", "cat"), clip("b1", "ant"), clip("b2", "ant")]


def test_labels_are_those_of_the_clips_sorted() -> None:
    assert resolve_labels(PAIRS) == (("ant", "cat"), ())


def test_labels_of_a_list_are_found_by_id_and_spelling() -> None:
    names = ["Walk, footsteps", "cat", "ant"]
    clips = [clip("a", " Cat"), clip("b", "ANT"), clip("c", "walk,  footsteps")]
    resolved = resolve_labels(clips, names=names)
    assert resolved.names == tuple(names)
    labelled = label_clips(made(clips), clips, names)
    assert [one.labels for one in labelled.clips] == [(1,), (2,), (0,)]


def test_ids_of_audioset_are_known() -> None:
    from transforms.models.labels import audioset_labels

    names = [label.name for label in audioset_labels()]
    clips = [clip("a", "/m/09x0r", "Speech"), clip("b", "Dog", "/m/04rlf")]
    resolved = resolve_labels(clips, names=names, loss="binary_cross_entropy")
    assert resolved.warnings == (
        "3 labels with one training clip: Speech, Dog, Music.",
        "524 labels without a training clip: Male speech, man speaking, Female speech, woman "
        "speaking, Child speech, kid speaking, Conversation, Narration, monologue and 519 more.",
    )
    labelled = label_clips(made(clips), clips, resolved.names)
    assert [one.labels for one in labelled.clips] == [(0,), (74, 137)]
    assert [names[index] for index in labelled.clips[1].labels] == ["Dog", "Music"]


@pytest.mark.parametrize(
    ("train", "validation", "settings", "words"),
    [
        (
            [unlabelled("a"), unlabelled("b")],
            [],
            {},
            r"^none of 2 training clips has a label; expected a manifest with a column label \(one "
            r"name\) or labels \(several\).*The first clip: a$",
        ),
        (
            [*PAIRS, *map(unlabelled, "uvwxyz")],
            [],
            {},
            r"^6 of 10 training clips have no label: u, v, w, x, y and 1 more\. Label them",
        ),
        (PAIRS, [unlabelled("v"), *PAIRS], {}, r"^1 of 5 validation clips have no label: v\."),
        (
            [*PAIRS, clip("c", "catt"), clip("d", "catt"), clip("e", "zebra")],
            [],
            {"names": ["cat", "ant"]},
            r"^3 of 7 training clips have labels that are not among the 2 labels to learn: 'catt' "
            r"of c \(the closest is 'cat'\), 'zebra' of e\. Mend them",
        ),
        (
            PAIRS,
            [clip("v", "ants")],
            {},
            r"^1 of 1 validation clip have labels that no training clip has: 'ants' of v \(the "
            r"closest is 'ant'\)\. Give training clips with them",
        ),
        (
            [*PAIRS, clip("c", "ant", "cat"), clip("d")],
            [],
            {},
            r"^2 of 6 training clips have not exactly one label, which training\.loss=cross_entropy"
            r" needs; c has 2\. Give --set training\.loss=binary_cross_entropy",
        ),
        (PAIRS, [clip("v")], {}, r"^1 of 1 validation clip have not exactly one.*v has none"),
        (PAIRS[:2], [], {}, r"^there is one label to learn, 'cat', and with training\.loss=cross"),
        (
            [clip("a"), clip("b")],
            [],
            {"loss": "binary_cross_entropy"},
            r"^2 training clips say that they have no label at all",
        ),
        (
            [*PAIRS, clip("c", "cow"), clip("d", "dog")],
            PAIRS,
            {},
            r"^2 labels of 4 have one clip, which cannot be both learnt from and checked with: "
            r"cow, dog\. Add clips, leave those out, or give the list of labels with --labels",
        ),
        (
            PAIRS[:2],
            PAIRS[2:],
            {"names": ["cat", "ant"], "is_held_out": True},
            r"^all clips of 1 label are held out, and none is left to learn from: ant\. Hold out",
        ),
    ],
)
def test_clips_and_labels_that_do_not_go_together_are_an_error(
    train: list[CachedClip], validation: list[CachedClip], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        resolve_labels(train, validation, **settings)


def test_rare_labels_that_are_meant_are_a_warning() -> None:
    single = [*PAIRS, clip("c", "cow")]
    meant = resolve_labels(single, names=["cat", "ant", "cow", "dog", "elk"])
    assert meant.warnings == (
        "1 label with one training clip: cow.",
        "2 labels without a training clip: dog, elk.",
    )
    checked = resolve_labels(single, [clip("v", "cow")], is_held_out=True)
    assert checked.warnings == ("1 label with one training clip: cow.",)
    several = resolve_labels(single, loss="binary_cross_entropy")
    assert several.warnings == ("1 label with one training clip: cow.",)
    other = resolve_labels(PAIRS[:2], PAIRS[2:], ["cat", "ant"])  # an input of its own
    assert other.warnings == ("1 label without a training clip: ant.",)


def test_labels_that_differ_in_spelling_alone_are_a_warning() -> None:
    clips = [*PAIRS, clip("c", "Cat"), clip("d", "Cat")]
    assert resolve_labels(clips).warnings == (
        "Labels that differ in spelling alone are learnt as different ones: Cat, cat.",
    )


# --- Clips with labels ---------------------------------------------------------------------


def test_targets_and_counts_say_which_labels_a_clip_has() -> None:
    clips = [clip("a", "x", "z"), clip("b"), clip("c", "y")]
    sets = make_clip_sets(made(clips), loss="binary_cross_entropy")
    expected = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)
    assert sets.train.targets().dtype == np.float32
    np.testing.assert_array_equal(sets.train.targets(), expected)
    assert sets.train.targets() is sets.train.targets()
    assert sets.train.counts() == {"x": 1, "y": 1, "z": 1}
    assert sets.train.label_names == ("x", "y", "z")
    assert len(sets.train) == 3
    assert sets.validation is None


def test_a_set_travels_to_another_process_without_its_samples(cached_sounds: CachedClips) -> None:
    clips = label_clips(cached_sounds, cached_sounds.clips, ["a"])
    before = clips.samples(2, 5, 50)
    sent = pickle.dumps(clips)
    assert len(sent) < 10_000
    arrived: ClipSet = pickle.loads(sent)
    np.testing.assert_array_equal(arrived.samples(2, 5, 50), before)
    np.testing.assert_array_equal(before, cached_sounds.samples(cached_sounds.clips[2])[5:50])


def test_validation_clips_that_are_training_clips_are_told() -> None:
    other = [clip("v1", "cat", content="a1"), clip("v2", "ant"), clip("v3", "ant", content="b2")]
    sets = make_clip_sets(made(PAIRS), made(other))
    assert sets.validation is not None
    assert [one.item.clip_id for one in sets.validation.clips] == ["v1", "v2", "v3"]
    assert sets.warnings == (
        "2 of 3 validation clips have the same content as a training clip, so that the figures "
        "promise too much: v1, v3.",
    )


def test_clips_decoded_in_part_are_told() -> None:
    odd = dataclasses.replace(PAIRS[0], warning="decoded 1.0 s, then stopped")
    assert make_clip_sets(made([odd, *PAIRS[1:]])).warnings == (
        "1 clip could be decoded with a warning; one of them: a1: decoded 1.0 s, then stopped.",
    )


def test_failures_of_either_input_count() -> None:
    with pytest.raises(InputError, match=r"^3 of 4 items could not be decoded"):
        make_clip_sets(made(PAIRS), failed(1, 3), max_failed=0.5)
    with pytest.raises(ValueError, match="both validation clips and hold_out='a=1' are given"):
        make_clip_sets(made(PAIRS), made(PAIRS), hold_out="a=1")


# --- Real recordings -----------------------------------------------------------------------


@pytest.mark.slow
def test_esc10_by_folds(esc10: list[Path], tmp_path: Path) -> None:
    with open(esc10[0].parents[1] / "esc10.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    manifest = tmp_path / "esc10.csv"
    with open(manifest, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "label", "fold"])
        writer.writerows([esc10[0].parent / r["filename"], r["label"], r["fold"]] for r in rows)
    cached = cache([manifest], tmp_path / "cache", decode=DecodeSettings(num_processes=2))
    sets = make_clip_sets(cached, hold_out="fold=4")
    assert sets.validation is not None
    assert sets.warnings == ()
    assert (len(sets.train), len(sets.validation)) == (240, 80)
    assert sets.train.label_names == tuple(sorted({row["label"] for row in rows}))
    assert set(sets.train.counts().values()) == {24}
    assert set(sets.validation.counts().values()) == {8}
    for one in cached.clips:
        info = soundfile.info(one.item.uri)
        assert one.num_samples == pytest.approx(info.frames * RATE / info.samplerate, abs=1)
    label_of = {row["filename"]: row["label"] for row in rows}
    for index in (0, 100, 239):
        one = sets.train.clips[index]
        path = Path(one.item.uri)
        assert sets.train.label_names[one.labels[0]] == label_of[path.name]
        expected, _ = decode_whole(path.read_bytes(), sample_rate_hz=RATE)
        np.testing.assert_array_equal(sets.train.samples(index), expected)
    assert cache([manifest], tmp_path / "cache").is_reused
