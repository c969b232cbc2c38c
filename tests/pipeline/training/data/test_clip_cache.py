"""Decoded clips: exact, found again unit by unit, and never mixed up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.training.data.clip_cache import CachedClips
from pipeline.training.data.failures import check_failures, write_errors
from tests.pipeline.training.data.clip_caches import (
    DECODE,
    RATE,
    SOURCES,
    by_name,
    cache,
    num_bytes_of,
    resume,
    wav,
    write_folder,
    write_manifest,
)
from tests.pipeline.training.small_trainings import everything_in
from tests.support import audio_factory
from tests.support.containers import audio_table, tar_bytes
from transforms.decoding.decode import decode_whole
from transforms.errors import InputError
from transforms.sources.read_unit import find_inputs, limit_items

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


def test_another_channel_is_decoded_again_in_the_same_folder(sounds: Path, tmp_path: Path) -> None:
    inputs = [sounds / "b.flac"]
    cache(inputs, tmp_path)
    second = dataclasses.replace(DECODE, channel=2)
    for is_reused in (False, True):
        cached = cache(inputs, tmp_path, decode=second)
        expected, _ = decode_whole(inputs[0], sample_rate_hz=RATE, channel=2)
        np.testing.assert_array_equal(cached.files.read_clip(cached.clips[0]), expected)
        assert cached.is_reused is is_reused


def test_samples_are_those_that_label_gets(sounds: Path, cached_sounds: CachedClips) -> None:
    clips = by_name(cached_sounds)
    assert list(clips) == ["a.wav", "b.flac", "c.ogg", "d.mp3"]
    for name, clip in clips.items():
        expected, facts = decode_whole((sounds / name).read_bytes(), sample_rate_hz=RATE)
        samples = cached_sounds.files.read_clip(clip)
        assert samples.dtype == np.float32
        np.testing.assert_array_equal(samples, expected)
        assert clip.content_sha256 == facts.content_sha256
    plain, _ = soundfile.read(sounds / "a.wav", dtype="float32")
    np.testing.assert_array_equal(cached_sounds.files.read_clip(clips["a.wav"]), plain)
    assert num_bytes_of(cached_sounds) == 4 * sum(clip.num_samples for clip in cached_sounds.clips)
    assert not cached_sounds.is_reused and not cached_sounds.failures


def test_int16_is_half_as_large_and_nearly_the_same(
    sounds: Path, cached_sounds: CachedClips, tmp_path: Path
) -> None:
    rounded = cache([sounds], tmp_path / "cache", dtype="int16")
    assert num_bytes_of(rounded) == num_bytes_of(cached_sounds) // 2
    for clip, other in zip(rounded.clips, cached_sounds.clips, strict=True):
        assert clip == other
        difference = np.abs(rounded.files.read_clip(clip) - cached_sounds.files.read_clip(other))
        is_exact = clip.item.uri.endswith("a.wav")  # 16 bits from the start
        assert difference.max() <= (0 if is_exact else 1 / 65_536)
        assert is_exact or difference.max() > 1 / 70_000


def test_int16_clips_what_is_too_loud(tmp_path: Path) -> None:
    loud = np.array([1.5, -1.5, 1.0, -1.0, 0.5] * 200, np.float32)
    audio_factory.write(tmp_path / "loud.wav", loud, RATE, "wav_float")
    cached = cache([tmp_path / "loud.wav"], tmp_path / "cache", dtype="int16")
    most = 32_767 / 32_768
    expected = np.array([most, -1.0, most, -1.0, 0.5] * 200, np.float32)
    np.testing.assert_array_equal(cached.files.read_clip(cached.clips[0]), expected)


def test_tars_tables_and_manifests_give_labels_and_samples(tmp_path: Path) -> None:
    sound = {name: wav(seed) for seed, name in enumerate(("tar", "row0", "row1", "file"))}
    members = [("x.wav", sound["tar"]), ("x.json", b'{"label": "cat", "fold": 2}')]
    (tmp_path / "t.tar").write_bytes(tar_bytes(members))
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
        np.testing.assert_array_equal(cached.files.read_clip(clip), samples)
    again = cache(inputs, tmp_path / "cache")
    assert again.is_reused
    assert again.clips == cached.clips


def test_every_item_is_reported_once_while_decoding(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "audio")
    (folder / "bad.wav").write_bytes(b"no audio")
    told: list[tuple[int, bool]] = []
    cache([folder], tmp_path / "cache", on_clip=lambda *done: told.append(done))
    assert told == [*[(9_600, False)] * 5, (0, True)]
    told.clear()
    cache([folder], tmp_path / "cache", on_clip=lambda *done: told.append(done))
    assert told == []


# --- Which cache is used -------------------------------------------------------------------


def test_only_units_with_a_changed_file_are_decoded_again(tmp_path: Path) -> None:
    folder, root = write_folder(tmp_path / "audio"), tmp_path / "cache"
    cache([folder], root)
    assert cache([folder], root).is_reused
    before = everything_in(root)
    (folder / "1.wav").write_bytes(wav(99, 0.7))
    changed = resume([folder], root)
    assert (changed.kept, len(changed.told)) == ([3], 2)
    assert {name: changed.files[name] for name in before} == before
    np.testing.assert_array_equal(
        changed.cached.files.read_clip(by_name(changed.cached)["1.wav"]),
        decode_whole(wav(99, 0.7))[0],
    )
    limited = cache(limit_items(find_inputs([str(folder)]), 2, SOURCES), root)
    assert limited.is_reused
    assert [clip.item.uri for clip in limited.clips] == [f"{folder}/0.wav", f"{folder}/1.wav"]


def test_what_changes_samples_makes_other_files_and_windows_do_not(tmp_path: Path) -> None:
    folder, root = write_folder(tmp_path / "audio"), tmp_path / "cache"
    first = cache([folder], root)
    windows = dataclasses.replace(SOURCES, window_s=1.0, hop_s=0.5)
    assert cache([folder], root, sources=windows).is_reused
    lower = cache([folder], root, decode=dataclasses.replace(DECODE, sample_rate_hz=8_000))
    assert not lower.is_reused
    assert lower.clips[0].num_samples == 4_800
    assert not cache([folder], root, dtype="int16").is_reused
    shorter = cache([folder], root, decode=dataclasses.replace(DECODE, max_item_s=0.5))
    assert (len(shorter.clips), len(shorter.failures)) == (0, 5)
    assert cache([folder], root).clips == first.clips


def test_labels_are_those_of_now_without_decoding_again(tmp_path: Path) -> None:
    write_folder(tmp_path / "audio", 2)
    (tmp_path / "t.tar").write_bytes(tar_bytes([("x.wav", wav(0))]))
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


def test_failed_items_are_tried_again_when_a_cache_is_used_again(tmp_path: Path) -> None:
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
    whole = first.files.read_clip(first.clips[2])
    second = resume(found, tmp_path / "cache")
    assert (second.kept, len(second.told)) == ([4], 2)
    assert len(second.cached.clips) == 5
    assert [event.failure.error_type for event in second.cached.failures] == ["NotAudio"]
    # Another process may be training on the first.
    np.testing.assert_array_equal(first.files.read_clip(first.clips[2]), whole)
    np.testing.assert_array_equal(whole, decode_whole(wav(2))[0])


def test_a_clip_that_fails_halfway_leaves_no_samples(tmp_path: Path) -> None:
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
        samples = cached.files.read_clip(by_name(cached)[name])
        np.testing.assert_array_equal(samples, decode_whole(wav(seed))[0])
    assert cache([folder], tmp_path / "cache", decode=bounded).is_reused
    assert len(cache([folder], tmp_path / "cache").clips) == 3


def test_members_and_rows_that_failed_stay_failures(tmp_path: Path) -> None:
    members = [("x.wav", data) for data in (wav(0), b"no audio", wav(1))]  # all of one name
    (tmp_path / "t.tar").write_bytes(tar_bytes(members))
    table = audio_table({"bytes": wav(2)}, {"bytes": b"no audio"})
    pq.write_table(table, tmp_path / "p.parquet")
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


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("samples", lambda data: data[:-4]),
        ("samples", lambda data: data + b"more"),
        ("samples", None),
        ("json", lambda data: data[:-1]),
        ("json", lambda data: b"{}"),
        ("json", lambda data: data.replace(b'"offset": 9600', b'"offset": 9601')),
        ("json", None),
    ],
)
def test_a_damaged_unit_is_decoded_again(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[bytes], bytes] | None,
) -> None:
    folder, root = write_folder(tmp_path / "audio", 3), tmp_path / "cache"
    first = cache([folder], root)
    before = everything_in(root)
    path = root / first.files.names[0]
    if name == "json":
        path = root / f"{path.name.partition('.')[0]}.json"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    again = resume([folder], root)
    assert (again.kept, len(again.told)) == ([1], 2)
    assert again.files == before
    assert again.cached.clips == first.clips
    is_there = (name, damage is None) != ("json", True)
    assert ("is damaged (" in caplog.text) == is_there


def test_nothing_that_can_be_decoded_is_a_cache_too(tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"")
    cached = cache([tmp_path / "bad.wav"], tmp_path / "cache")
    assert cached.clips == ()
    with pytest.raises(InputError, match=r"^none of 1 item could be decoded; one of them: .*bad"):
        check_failures(cached, 1.0)


# --- Failures ------------------------------------------------------------------------------


def test_failures_are_a_manifest_that_gives_them_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "audio", 1)
    (folder / "bad.wav").write_bytes(b"no audio")
    rows = [{"uri": f"audio/{name}.wav", "label": name, "n": 1} for name in ("0", "bad")]
    cached = cache([write_manifest(tmp_path / "m.jsonl", [*rows, {"n": 2}])], tmp_path / "cache")
    url = str(tmp_path / "out" / "errors.parquet")
    write_errors(cached.failures, url)
    table = pq.read_table(url).to_pylist()
    assert [(row["error_type"], row["truth"]) for row in table] == [
        ("ReadError", None),
        ("NotAudio", ["bad"]),
    ]
    (item,) = (item for item in find_inputs([url]).items if item.truth)
    assert (item.uri, item.truth, item.metadata) == (f"{folder}/bad.wav", ("bad",), '{"n": 1}')
    write_errors([], url)
    assert not Path(url).exists()
