"""Clips decoded once, in a folder that training reads again and again.

    Found ─find_units─▶ WorkUnit ─DecodePool─▶ Waveform pieces ─▶ FOLDER/<key>.<digest>.samples
                                                                    FOLDER/<key>.json, written last

A cache holds whole clips, mono at the model's rate, in one file of samples per work unit. Clips of
any length and data sets larger than the memory pass through in pieces.

Guarantees:

* Samples are those that ``earmark label`` gets; ``int16`` rounds them to 16 bits and clips them to
  [-1, 1).
* A key is a digest of the unit's items, their versions and the settings, so a changed file or
  setting makes another file. Labels and metadata that a manifest gives are always those of now,
  without decoding again.
* A unit is there once its ``.json`` is. A process that is killed loses the unit that it was
  decoding; the next one removes the remains and continues.
* Several processes may fill one folder and train from it. Each writes under a name of its own and
  renames the file when it is whole. Samples never change under a name: the digest is that of the
  ``.json``, which says where in the file each clip lies.
* Every item found is a clip or a failure. Failed items are tried again whenever the cache is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import logging
import os
import re
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pipeline.labelling.remaining import count_found_items, find_units
from pipeline.terminal.wording import counted
from pipeline.training.data.packed_clips import (
    INT16_SCALE,
    STORED_DTYPES,
    CachedClip,
    CacheDtype,
    SampleFiles,
)
from transforms.decoding.pool import DecodePool
from transforms.decoding.settings import DecodeSettings
from transforms.errors import AccountingError, OutputError, WriteError
from transforms.label_audio import read_items
from transforms.process.locks import try_lock
from transforms.records import Failure, FloatArray, Item, ItemFailure, Waveform, WorkUnit
from transforms.sources.read_unit import Found, SourceSettings
from transforms.storage import urls, writing

logger = logging.getLogger(__name__)

OnClip: TypeAlias = Callable[[int, bool], None]
OnKept: TypeAlias = Callable[[int], None]
Decoded: TypeAlias = Iterator[Waveform | ItemFailure]

CACHE_VERSION = 2  # raise it when the same input gives other samples or other files
_CUT = SourceSettings()
_OWN_FILE = re.compile(r"[0-9a-f]{20}(\.[0-9a-f]{8}\.samples|\.json)")
_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# --- What a cache holds --------------------------------------------------------------------


@dataclass(frozen=True)
class CachedClips:
    """The clips that could be decoded, in the order in which they were read, and the failures.

    ``is_reused`` says that all of it had been decoded before.
    """

    files: SampleFiles
    clips: tuple[CachedClip, ...]
    failures: tuple[ItemFailure, ...]
    is_reused: bool


@dataclass(frozen=True)
class _CachedUnit:
    """A unit in the cache; its clips' offsets count from the start of its own file."""

    name: str
    num_samples: int
    clips: Sequence[CachedClip]
    failures: Sequence[ItemFailure]

    @property
    def num_items(self) -> int:
        return len(self.clips) + len(self.failures)


def cache_clips(
    found: Found,
    folder: str,
    *,
    decode: DecodeSettings,
    sources: SourceSettings,
    dtype: CacheDtype = "float32",
    on_clip: OnClip | None = None,
    on_kept: OnKept | None = None,
) -> CachedClips:
    """Decode everything that was found, except for the units that are in the cache already.

    Args:
        folder: A local folder for the cache.
        decode: How to decode; its rate is the model's.
        sources: How to read, and how to cut the input into units.
        on_clip: Called with each decoded item's number of samples, and whether it failed. Not
            called for items in the cache.
        on_kept: Called once before decoding with the number of items in the cache, unless none or
            all of them are.

    Raises:
        OutputError: The folder cannot be made.
        WriteError: The disk is full or fails. The units that this call wrote are removed.
    """
    root = _make_root(folder)
    # Units are cut alike whatever the windows are, so that a training with others finds them.
    sources = dataclasses.replace(sources, window_s=_CUT.window_s, hop_s=_CUT.hop_s)
    planned = find_units(found, sources)
    listed = [
        ItemFailure(unit.unit_id, index, failure)
        for unit in planned
        for index, failure in enumerate(unit.failures)
    ]
    units = [unit for unit in planned if not unit.failures]
    keys = [unit_key(unit, decode, sources, dtype) for unit in units]
    cached: dict[str, _CachedUnit] = {}
    with DecodePool(decode) as pool:
        for key, unit in zip(keys, units, strict=True):
            kept = _read_unit(root, key, unit, dtype)
            if kept is not None and _fails_again(unit, kept.failures, pool, sources):
                cached[key] = kept
        missing = [(key, unit) for key, unit in zip(keys, units, strict=True) if key not in cached]
        writer = _CacheWriter(root, dtype, list(cached.values()), count_found_items(found))
        if missing and writer.num_items and on_kept is not None:
            on_kept(writer.num_items)
        streams = _decode_ahead([unit for _, unit in missing], pool, sources)
        for (key, unit), stream in zip(missing, streams, strict=True):
            cached[key] = writer.write(key, unit, stream, on_clip)
    whole = [cached[key] for key in keys]
    starts = [0, *accumulate(unit.num_samples for unit in whole)][: len(keys)]
    return CachedClips(
        files=SampleFiles(root, tuple(unit.name for unit in whole), tuple(starts), dtype),
        clips=tuple(
            dataclasses.replace(clip, offset=clip.offset + start)
            for unit, start in zip(whole, starts, strict=True)
            for clip in unit.clips
        ),
        failures=(*listed, *(failure for unit in whole for failure in unit.failures)),
        is_reused=not missing,
    )


def remove_cache(folder: str) -> None:
    """Remove a cache, and the folder if nothing else is in it."""
    root = Path(urls.local_path(folder))
    for path in root.iterdir():
        if _OWN_FILE.fullmatch(path.name) or writing.is_temporary_name(path.name):
            path.unlink(missing_ok=True)
    writing.remove_empty_folder(folder)


def _make_root(folder: str) -> Path:
    """Make the folder, and remove what processes that were killed have left in it."""
    root = Path(urls.local_path(urls.normalise(folder)))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder for decoded clips {root} cannot be made: {error.strerror or error}. Give "
            "another with --cache, or correct its permissions."
        ) from error
    for path in root.glob(".*.samples.*.tmp"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if try_lock(file.fileno()):  # a living process holds the lock
                path.unlink()
    return root


def unit_key(
    unit: WorkUnit, decode: DecodeSettings, sources: SourceSettings, dtype: CacheDtype
) -> str:
    """Return the name of a unit's files: a digest of everything that its samples depend on.

    Of labels and metadata, only whether a manifest gives them for a container's item counts. If it
    does, those of now are taken, else those that the container has.
    """
    parts: list[object] = [CACHE_VERSION, dtype, decode.sample_rate_hz, decode.max_item_s]
    parts += [decode.max_item_bytes, sources.limits.max_page_bytes, sources.limits.max_expansion]
    parts.append(unit.unit_id)
    if decode.channel != "mix":  # caches from before stay of use
        parts.append(decode.channel)
    if unit.container is not None:
        parts.append([[item.truth is None, item.metadata is None] for item in unit.items])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


# --- Decoding ------------------------------------------------------------------------------


def _decode_ahead(
    units: Sequence[WorkUnit], pool: DecodePool, sources: SourceSettings
) -> Iterator[Decoded]:
    """Yield each unit's clips and failures; meanwhile, the next unit is being decoded."""
    streams: deque[Decoded] = deque()
    for unit in units:
        streams.append(pool.stream(unit.unit_id, read_items(unit, sources)))
        if len(streams) > 1:
            yield streams.popleft()
    yield from streams


def _fails_again(
    unit: WorkUnit, failures: Sequence[ItemFailure], pool: DecodePool, sources: SourceSettings
) -> bool:
    """Return whether everything that failed still does: a store may be back.

    How much of a broken container is missing is not known, so it counts as one that does not.
    """
    if not failures:
        return True
    if any(event.failure.is_container for event in failures):
        return False
    failed = tuple(event.failure.item for event in failures)
    events = pool.stream(unit.unit_id, read_items(dataclasses.replace(unit, items=failed), sources))
    # An item beyond a bound may give pieces before it fails.
    return not any(isinstance(event, Waveform) and event.facts is not None for event in events)


# --- Writing -------------------------------------------------------------------------------


class _CacheWriter:
    """Writes units into a cache; ``total_items`` is for the message about a full disk."""

    def __init__(
        self, root: Path, dtype: CacheDtype, kept: Sequence[_CachedUnit], total_items: int | None
    ) -> None:
        self.num_items = sum(unit.num_items for unit in kept)
        self._root = root
        self._dtype: CacheDtype = dtype
        self._item_bytes = STORED_DTYPES[dtype].itemsize
        self._total_items = total_items
        self._num_samples = sum(unit.num_samples for unit in kept)
        self._written: list[Path] = []

    def write(
        self, key: str, unit: WorkUnit, stream: Decoded, on_clip: OnClip | None
    ) -> _CachedUnit:
        """Write a unit's clips; its ``.json``, which says that it is whole, comes last.

        Raises:
            WriteError: The disk is full or fails; everything that this writer wrote is removed.
            AccountingError: The unit lists fewer or more items than came out of it.
        """
        with self._explained():
            file, path = _create_locked(self._root, key)
        try:
            with file:
                num_samples, clips, failures = self._write_samples(file, stream, on_clip)
                num_items = len(clips) + len(failures)
                if unit.kind == "files" and num_items != len(unit.items):
                    raise AccountingError(
                        f"unit {unit.unit_id} lists {len(unit.items)} items, and {num_items} came "
                        "out of it"
                    )
                index = _make_index(num_samples, clips, failures)
                name = _name_of(key, index)
                with self._explained():
                    os.fsync(file.fileno())
                    self._written += [self._root / name, self._root / f"{key}.json"]
                    path.rename(self._root / name)
                    writing.write_bytes(str(self._root / f"{key}.json"), index)
        finally:
            path.unlink(missing_ok=True)
        return _CachedUnit(name, num_samples, clips, failures)

    def _write_samples(
        self, file: io.FileIO, stream: Decoded, on_clip: OnClip | None
    ) -> tuple[int, list[CachedClip], list[ItemFailure]]:
        clips: list[CachedClip] = []
        failures: list[ItemFailure] = []
        before = self._num_samples
        start = end = 0  # of the clip that is being written
        for event in stream:
            if isinstance(event, ItemFailure):
                with self._explained():  # pieces of it may have come before
                    file.truncate(start * self._item_bytes)
                    file.seek(0, os.SEEK_END)
                end = start
                failures.append(event)
            else:
                with self._explained():
                    _write_all(file, _encoded(event.samples, self._dtype))
                end += event.samples.size
                if event.facts is not None:
                    facts = event.facts.content_sha256, event.facts.warning
                    clips.append(CachedClip(event.item, start, end - start, *facts))
            self._num_samples = before + end
            if isinstance(event, ItemFailure) or event.facts is not None:
                self.num_items += 1
                if on_clip is not None:
                    on_clip(end - start, isinstance(event, ItemFailure))
                start = end
        return end, clips, failures

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise ``WriteError`` for an ``OSError``: where it was, and what helps."""
        try:
            yield
        except OSError as error:
            needs = self._needs()
            for path in self._written:  # others need the disk, too
                path.unlink(missing_ok=True)
            reason = os.strerror(error.errno) if error.errno else str(error)
            remedy = "Make room there" if error.errno in _IS_FULL else "Correct that"
            raise WriteError(
                f"{self._root} cannot hold the decoded clips: {reason}.{needs} {remedy}, or give "
                "another folder with --cache; what this run has written there is removed."
            ) from error

    def _needs(self) -> str:
        """Return in words how much was written, how much it may become, and how to halve it."""
        num_bytes = self._num_samples * self._item_bytes
        text = ""
        if num_bytes and self.num_items:
            text = f" {_in_mib(num_bytes)} held {counted(self.num_items, 'item')}"
            if self._total_items:
                needed = _in_mib(num_bytes * self._total_items / self.num_items)
                text += f" of {self._total_items:,}, so about {needed} are needed"
            text += "."
        if self._dtype == "float32":
            text += " With --set cache.dtype=int16 they take half as much."
        return text


def _create_locked(root: Path, key: str) -> tuple[io.FileIO, Path]:
    """Create a file for a unit's samples, locked as long as this process lives."""
    while True:
        path = root / f".{key}.samples.{uuid.uuid4().hex}.tmp"
        file = open(path, "xb", buffering=0)  # noqa: SIM115
        try:
            is_locked = try_lock(file.fileno())
        except OSError:  # some network file systems have no locks
            is_locked = True
        if is_locked and path.exists():
            return file, path
        file.close()  # another process took it for that of a dead one before it was locked


def _in_mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _encoded(samples: FloatArray, dtype: CacheDtype) -> bytes:
    if dtype == "int16":
        steps = np.rint(samples * np.float32(INT16_SCALE))
        samples = np.clip(steps, -INT16_SCALE, INT16_SCALE - 1)
    return samples.astype(STORED_DTYPES[dtype]).tobytes()


def _write_all(file: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # a disk that fills up takes a part, and refuses the next
        rest = rest[file.write(rest) :]


# --- The index of a unit -------------------------------------------------------------------

# Of an item; never its url, which may carry a signature.
_ITEM_FIELDS = (
    *("clip_id", "uri", "member", "row", "start_s", "end_s"),
    *("truth", "metadata", "size", "version"),
)
_CLIP_FIELDS = ("offset", "num_samples", "content_sha256", "warning")
_FAILURE_FIELDS = ("stage", "error_type", "message", "is_container")


def _name_of(key: str, index: bytes) -> str:
    return f"{key}.{hashlib.sha256(index).hexdigest()[:8]}.samples"


def _make_index(
    num_samples: int, clips: Sequence[CachedClip], failures: Sequence[ItemFailure]
) -> bytes:
    entry = {
        "num_samples": num_samples,
        "clips": [
            {"item": _values(clip.item, _ITEM_FIELDS), **_values(clip, _CLIP_FIELDS)}
            for clip in clips
        ],
        "failures": [
            {
                "item": _values(event.failure.item, _ITEM_FIELDS),
                "item_index": event.item_index,
                **_values(event.failure, _FAILURE_FIELDS),
            }
            for event in failures
        ],
    }
    return json.dumps(entry).encode()


def _values(record: object, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def _read_unit(root: Path, key: str, unit: WorkUnit, dtype: CacheDtype) -> _CachedUnit | None:
    """Read a unit's index; None if the unit is not in the cache, or damaged there."""
    path = root / f"{key}.json"
    if not path.exists():
        return None
    given = {item.clip_id: item for item in unit.items}
    try:
        index = path.read_bytes()
        entry = json.loads(index)
        cached = _CachedUnit(
            _name_of(key, index),
            entry["num_samples"],
            [
                CachedClip(_item_of(row["item"], unit, given), *(row[n] for n in _CLIP_FIELDS))
                for row in entry["clips"]
            ],
            [
                ItemFailure(
                    unit.unit_id,
                    row["item_index"],
                    Failure(_item_of(row["item"], unit, given), *(row[n] for n in _FAILURE_FIELDS)),
                )
                for row in entry["failures"]
            ],
        )
        num_bytes = (root / cached.name).stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s); its clips are decoded again.", path, error)
        return None
    expected = cached.num_samples * STORED_DTYPES[dtype].itemsize
    if num_bytes != expected:
        logger.warning(
            "%s is damaged (it has %d bytes, and its clips %d); its clips are decoded again.",
            *(root / cached.name, num_bytes, expected),
        )
        return None
    return cached


def _item_of(row: Mapping[str, Any], unit: WorkUnit, given: Mapping[str, Item]) -> Item:
    """Return the item as the inputs describe it now."""
    now = given.get(row["clip_id"])
    if now is not None and unit.kind == "files":
        return now
    stored = Item(**{**row, "truth": None if row["truth"] is None else tuple(row["truth"])})
    if now is None:
        return stored
    return dataclasses.replace(
        stored,
        truth=stored.truth if now.truth is None else now.truth,
        metadata=stored.metadata if now.metadata is None else now.metadata,
    )
