"""Audio to decode into a cache of clips, and ways to fill, resume and interrupt one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.training.data.clip_cache import CachedClips, cache_clips
from pipeline.training.data.packed_clips import CachedClip, CacheDtype
from tests.pipeline.training.small_trainings import everything_in
from tests.support import audio_factory
from tests.support.containers import tar_bytes
from transforms.decoding.settings import DecodeSettings
from transforms.sources.read_unit import Found, SourceSettings, find_inputs

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


def num_bytes_of(cached: CachedClips) -> int:
    return sum((cached.files.folder / name).stat().st_size for name in cached.files.names)


class Resumed(NamedTuple):
    """What came of decoding into a folder that may hold units already."""

    cached: CachedClips
    files: dict[str, bytes]
    kept: list[int]
    told: list[tuple[int, bool]]


def resume(inputs: Sequence[Path] | Found, root: Path) -> Resumed:
    kept: list[int] = []
    told: list[tuple[int, bool]] = []
    cached = cache(inputs, root, on_kept=kept.append, on_clip=lambda *done: told.append(done))
    assert cached.is_reused == (not told)
    return Resumed(cached, everything_in(root), kept, told)


class Killed(BaseException):
    """Stands for a signal that comes at a point that no signal could be made to meet."""


def be_killed(
    inputs: Sequence[Path] | Found,
    root: Path,
    module: ModuleType,
    function: str,
    call: int,
) -> None:
    """Decode until a function is called, the first time being 1, and the process ends."""
    real, calls = getattr(module, function), itertools.count(1)

    def die_some_time(*arguments: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, die_some_time)
        with pytest.raises(Killed):
            cache(inputs, root)


def write_mixed(folder: Path) -> list[Path]:
    """Nine items in five units: 0 1 | bad 2 | 3 | two of a tar | two rows of a Parquet file."""
    write_folder(folder, 4)
    (folder / "1b.wav").write_bytes(b"no audio")
    members = [("x.wav", wav(7)), ("x.json", b'{"label": "cat"}'), ("y.wav", wav(8))]
    (folder / "t.tar").write_bytes(tar_bytes(members))
    audio = [{"bytes": wav(seed), "path": f"{seed}.wav"} for seed in (9, 10)]
    pq.write_table(pa.table({"audio": audio, "label": ["dog", "\u00e4"]}), folder / "p.parquet")
    return [folder]
