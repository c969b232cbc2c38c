"""Clips decoded once, in a folder that training reads again and again.

    Found ─find_backlog─▶ WorkUnit ─DecodePool─▶ Waveform pieces ─▶ FOLDER/<key>/samples.bin
                                                                                 clips.parquet
                                                                                 failures.parquet

Part of ``dataset``. A cache holds whole clips, mono at the model's rate, one after the other in one
flat file that is mapped into memory: neither hours-long clips nor a data set larger than the memory
is ever held.

Guarantees:

* Samples are those that ``earmark label`` gets; ``int16`` rounds them to 16 bits and cuts them off
  at [-1, 1).
* A cache's name is a digest of what is in it: a file that has changed makes another one. Labels and
  metadata that a manifest gives are always those of now, without decoding again.
* A cache has its name only once it is whole. What a killed process leaves is removed by the next
  one; what a living one is writing is left alone.
* Every item found is a clip or a failure. What failed is tried again when a cache is used again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.backlog import count_found_items, find_backlog
from pipeline.plan import counted
from transforms import storage
from transforms.decode import DecodePool, DecodeSettings
from transforms.errors import AccountingError, ConfigError, InputError, OutputError, WriteError
from transforms.label_audio import read_items
from transforms.records import (
    ContainerSlice,
    Failure,
    FloatArray,
    Item,
    ItemFailure,
    Waveform,
    WorkUnit,
)
from transforms.rows import errors_table
from transforms.scratch import is_still
from transforms.sources import Found, SourceSettings, make_unit_id, plan_units

logger = logging.getLogger(__name__)

CacheDtype: TypeAlias = Literal["float32", "int16"]
OnClip: TypeAlias = Callable[[int, bool], None]

CACHE_VERSION = 1  # raise it when the same input gives other samples or other files
SAMPLES_NAME = "samples.bin"
CLIPS_NAME = "clips.parquet"
FAILURES_NAME = "failures.parquet"

_INT16_SCALE = 32_768.0
_STORED: dict[CacheDtype, np.dtype[Any]] = {"float32": np.dtype("<f4"), "int16": np.dtype("<i2")}
_UNFINISHED = re.compile(r"\.[0-9a-f]{20}\.[0-9a-f]{32}\.tmp")


# --- What a cache holds --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CachedClip:
    """A decoded clip and where it lies in its cache.

    Attributes:
        item: What it is, with its labels and metadata.
        offset: Its first sample in the flat file.
        num_samples: How many samples it has.
        content_sha256: Hex digest of the encoded bytes (the whole file, for a segment).
        warning: What is wrong with a clip that could be decoded all the same, or None.
    """

    item: Item
    offset: int
    num_samples: int
    content_sha256: str
    warning: str | None = None


class Located(Protocol):
    """A clip that knows where it lies in a flat file of samples."""

    @property
    def item(self) -> Item:
        """What it is."""

    @property
    def offset(self) -> int:
        """Its first sample in the file."""

    @property
    def num_samples(self) -> int:
        """How many samples it has."""


class SampleFile:
    """The flat file of a cache, mapped when it is first read; what is pickled is its name alone.

    Args:
        path: The file.
        dtype: What its samples are stored as.
    """

    def __init__(self, path: Path, dtype: CacheDtype) -> None:
        self.path = path
        self.dtype: CacheDtype = dtype
        self._samples: npt.NDArray[Any] | None = None

    def __reduce__(self) -> tuple[type[SampleFile], tuple[Path, CacheDtype]]:
        return SampleFile, (self.path, self.dtype)

    def __repr__(self) -> str:
        return f"SampleFile({str(self.path)!r}, {self.dtype!r})"

    def read_clip(self, clip: Located, start: int, stop: int | None) -> FloatArray:
        """A copy of the samples [start, stop) of a clip, float32, nominally in [-1, 1].

        Args:
            clip: Where it lies.
            start: First sample, counted from the start of the clip.
            stop: One past the last; None for the clip's end.

        Raises:
            ValueError: The clip has not so many.
        """
        stop = clip.num_samples if stop is None else stop
        if not 0 <= start <= stop <= clip.num_samples:
            raise ValueError(
                f"{clip.item.clip_id}: samples {start} to {stop} were asked for; it has "
                f"{clip.num_samples}"
            )
        return self.read(clip.offset + start, clip.offset + stop)

    def read(self, start: int, stop: int) -> FloatArray:
        """A copy of the samples [start, stop) of the file, whatever clip they are of."""
        if self._samples is None:
            self._samples = np.memmap(self.path, _STORED[self.dtype], mode="r")
        samples = np.array(self._samples[start:stop], np.float32)
        if self.dtype == "int16":
            samples /= np.float32(_INT16_SCALE)
        return samples


@dataclass(frozen=True)
class CachedClips:
    """Everything that inputs hold, decoded.

    Attributes:
        folder: The cache itself, ``FOLDER/<key>``.
        sample_rate_hz: Rate of the samples.
        file: The samples.
        clips: Every clip that could be decoded, in the order in which they were read.
        failures: Every item that could not.
        is_reused: The clips had been decoded before.
    """

    folder: str
    sample_rate_hz: int
    file: SampleFile
    clips: tuple[CachedClip, ...]
    failures: tuple[ItemFailure, ...]
    is_reused: bool

    @property
    def duration_s(self) -> float:
        """Seconds of audio of all clips."""
        return sum(clip.num_samples for clip in self.clips) / self.sample_rate_hz

    def samples(self, clip: CachedClip, start: int = 0, stop: int | None = None) -> FloatArray:
        """Samples [start, stop) of a clip, float32; all of them by default."""
        return self.file.read_clip(clip, start, stop)


def cache_clips(
    found: Found,
    folder: str,
    *,
    decode: DecodeSettings,
    sources: SourceSettings,
    dtype: CacheDtype = "float32",
    on_clip: OnClip | None = None,
) -> CachedClips:
    """Decode everything that was found into a cache, or use the one that is there.

    Args:
        found: What the inputs hold.
        folder: A local folder for caches; each lies in a folder of its own below it.
        decode: How to decode; its rate is the model's.
        sources: How to read.
        dtype: What samples are stored as.
        on_clip: Called while decoding with each item's number of samples, and whether it failed;
            not called where the cache is there.

    Raises:
        OutputError: The folder is not local or cannot be written.
        WriteError: The disk is full or fails; nothing is left of what was begun.
        ConfigError: There is no such dtype.
    """
    if dtype not in _STORED:
        known = " or ".join(get_args(CacheDtype))
        raise ConfigError(f"cache.dtype is {dtype!r}; must be {known}. Set it in the config.")
    root = _make_root(folder)
    key = cache_key(found, sources, decode, dtype)
    units = find_backlog(found, {}, sources, retry_from=None).units
    cached = _read_cache(root / key, found, decode.sample_rate_hz, dtype)
    with DecodePool(decode) as pool:
        is_usable = cached is not None and _fails_again(cached, found, pool, sources)
        if cached is None or not is_usable:
            events = _decode_units([unit for unit in units if not unit.failures], pool, sources)
            _write_cache(root, key, events, dtype, count_found_items(found), on_clip)
            cached = _read_cache(root / key, found, decode.sample_rate_hz, dtype)
    if cached is None:
        raise WriteError(
            f"{root / key} was written and cannot be read back; does something else write there? "
            "Give another folder with --cache."
        )
    listed = [
        ItemFailure(unit.unit_id, index, failure)
        for unit in units
        for index, failure in enumerate(unit.failures)
    ]
    return dataclasses.replace(
        cached, failures=(*listed, *cached.failures), is_reused=bool(is_usable)
    )


def _make_root(folder: str) -> Path:
    if not storage.is_local(folder):
        raise OutputError(
            f"the folder for decoded clips is {storage.public_uri(folder)}; must be a local "
            "folder, as samples are mapped into memory from there. Give one with --cache."
        )
    root = Path(storage.local_path(storage.normalise(folder)))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder for decoded clips {root} cannot be made: {error.strerror or error}. Give "
            "another with --cache, or mend its permissions."
        ) from error
    return root


def cache_key(
    found: Found, sources: SourceSettings, decode: DecodeSettings, dtype: CacheDtype
) -> str:
    """A digest of what decides the samples, however the input is cut into units: a cache's name.

    Of labels and metadata only counts whether a manifest gives a container's item its own: where
    it does, those of now are taken, else those that the container has.
    """
    parts: list[object] = [CACHE_VERSION, dtype, decode.sample_rate_hz, decode.max_item_s]
    parts += [decode.max_item_bytes, sources.limits.max_page_bytes, sources.limits.max_expansion]
    parts.append(make_unit_id("files", found.items))
    for container in found.containers:
        part = ContainerSlice(
            container.uri, container.url, container.size, container.version, 0, container.stop
        )
        given = [[item.truth is None, item.metadata is None] for item in container.items]
        parts += [make_unit_id(container.kind, container.items, part), given]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


# --- Decoding ------------------------------------------------------------------------------


def _decode_units(
    units: Sequence[WorkUnit], pool: DecodePool, sources: SourceSettings
) -> Iterator[Waveform | ItemFailure]:
    """Everything of all units, in order; the unit after the one given out is being decoded."""
    streams: deque[tuple[WorkUnit, Iterator[Waveform | ItemFailure]]] = deque()
    for unit in units:
        streams.append((unit, pool.stream(unit.unit_id, read_items(unit, sources))))
        if len(streams) > 1:
            yield from _events_of(*streams.popleft())
    for started in streams:
        yield from _events_of(*started)


def _events_of(
    unit: WorkUnit, stream: Iterator[Waveform | ItemFailure]
) -> Iterator[Waveform | ItemFailure]:
    """What comes of one unit, its items counted.

    Raises:
        AccountingError: They are not as many as it lists.
    """
    num_items = 0
    for event in stream:
        num_items += isinstance(event, ItemFailure) or event.facts is not None
        yield event
    if unit.kind == "files" and num_items != len(unit.items):
        raise AccountingError(
            f"unit {unit.unit_id} lists {len(unit.items)} items, and {num_items} came out of it"
        )


def _fails_again(
    cached: CachedClips, found: Found, pool: DecodePool, sources: SourceSettings
) -> bool:
    """Whether what failed when the cache was made still does: a mended right, a store that is back.

    Of a container that broke off nobody knows how much is missing, so it has to be read anew.
    """
    failed = {event.failure.item.clip_id: event.failure for event in cached.failures}
    if any(failure.is_container for failure in failed.values()):
        return False
    inside: dict[str, list[Item]] = defaultdict(list)
    for failure in failed.values():
        if not _is_loose(failure.item):
            inside[failure.item.uri].append(failure.item)
    loose = [item for item in found.items if item.clip_id in failed]
    containers = []
    for container in found.containers:
        own = {item.clip_id for item in container.items}
        items = [item for item in inside[container.uri] if not own or item.clip_id in own]
        if items:
            containers.append(dataclasses.replace(container, items=tuple(items)))
    events = _decode_units(plan_units(loose, containers, sources), pool, sources)
    # What is over a bound may give pieces before it fails.
    return not any(isinstance(event, Waveform) and event.facts is not None for event in events)


# --- Writing -------------------------------------------------------------------------------


def _write_cache(
    root: Path,
    key: str,
    events: Iterator[Waveform | ItemFailure],
    dtype: CacheDtype,
    total_items: int | None,
    on_clip: OnClip | None,
) -> None:
    """Write a cache under another name, and give it its own once it is whole."""
    stale = root / key if (root / key).exists() else None
    with _writing_to(root):
        _sweep(root)
        folder, lock = _make_unfinished(root, key)
    try:
        writer = _CacheWriter(folder, dtype, total_items)
        with contextlib.closing(writer):
            for event in events:
                done = writer.add(event)
                if done is not None and on_clip is not None:
                    on_clip(*done)
            writer.finish()
        with _writing_to(root):
            _give_name(folder, root / key, stale)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


class _CacheWriter:
    """Writes samples as they come, and at the end what they are of.

    Args:
        folder: Where to.
        dtype: What samples are stored as.
        total_items: How many items there are, or None; for what is said when the disk is full.
    """

    def __init__(self, folder: Path, dtype: CacheDtype, total_items: int | None) -> None:
        self._folder = folder
        self._dtype: CacheDtype = dtype
        self._total_items = total_items
        self._clips: list[CachedClip] = []
        self._failures: list[ItemFailure] = []
        self._offset = 0  # of the clip that is being written
        self._num_samples = 0  # of all that is written
        with self._writing():
            self._file = open(folder / SAMPLES_NAME, "wb", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def add(self, event: Waveform | ItemFailure) -> tuple[int, bool] | None:
        """Take a piece or a failure; at an item's end its samples and whether it failed."""
        if isinstance(event, ItemFailure):
            with self._writing():  # pieces of it may have come before
                self._file.truncate(self._offset * _STORED[self._dtype].itemsize)
                self._file.seek(0, os.SEEK_END)
            self._num_samples = self._offset
            self._failures.append(event)
            return 0, True
        with self._writing():
            _write_all(self._file, _encoded(event.samples, self._dtype))
        self._num_samples += event.samples.size
        if event.facts is None:
            return None
        clip = CachedClip(
            item=event.item,
            offset=self._offset,
            num_samples=self._num_samples - self._offset,
            content_sha256=event.facts.content_sha256,
            warning=event.facts.warning,
        )
        self._offset = self._num_samples
        self._clips.append(clip)
        return clip.num_samples, False

    def finish(self) -> None:
        """Everything has come: write what the samples are of."""
        with self._writing():
            os.fsync(self._file.fileno())
            _write_table(_clips_table(self._clips), self._folder / CLIPS_NAME)
            _write_table(_failures_table(self._failures), self._folder / FAILURES_NAME)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return _writing_to(self._folder.parent, self._needs)

    def _needs(self) -> str:
        """How much was written, how much it may become, and how to make it less."""
        num_bytes = self._num_samples * _STORED[self._dtype].itemsize
        num_done = len(self._clips) + len(self._failures)
        text = ""
        if num_bytes and num_done:
            text = f" {_in_mib(num_bytes)} held {counted(num_done, 'item')}"
            if self._total_items:
                needed = _in_mib(num_bytes * self._total_items / num_done)
                text += f" of {self._total_items:,}, so about {needed} are needed"
            text += "."
        if self._dtype == "float32":
            text += " With --set cache.dtype=int16 they take half as much."
        return text


def _in_mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


@contextlib.contextmanager
def _writing_to(root: Path, needs: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Say of what goes wrong with the disk where that was, and what helps.

    Args:
        root: The folder for caches.
        needs: Says how much room is needed.

    Raises:
        WriteError: In place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        remedy = "Make room there" if error.errno in _IS_FULL else "Mend that"
        raise WriteError(
            f"{root} cannot hold the decoded clips: {reason}.{needs()} {remedy}, or give another "
            "folder with --cache; what was begun is removed."
        ) from error


_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _encoded(samples: FloatArray, dtype: CacheDtype) -> bytes:
    if dtype == "int16":
        steps = np.rint(samples * np.float32(_INT16_SCALE))
        samples = np.clip(steps, -_INT16_SCALE, _INT16_SCALE - 1)
    return samples.astype(_STORED[dtype]).tobytes()


def _write_all(file: io.FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:  # a disk that fills up takes a part, and refuses the next
        left = left[file.write(left) :]


def _write_table(table: pa.Table, path: Path) -> None:
    with open(path, "wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())


_ITEM_FIELDS = [
    pa.field("clip_id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("member", pa.string()),
    pa.field("row", pa.int64()),
    pa.field("start_s", pa.float64()),
    pa.field("end_s", pa.float64()),
    pa.field("truth", pa.list_(pa.string())),
    pa.field("metadata", pa.string()),
    pa.field("size", pa.int64()),
    pa.field("version", pa.string()),
]
_CLIPS_SCHEMA = pa.schema(
    [
        *_ITEM_FIELDS,
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("content_sha256", pa.string(), nullable=False),
        pa.field("warning", pa.string()),
    ]
)
_FAILURES_SCHEMA = pa.schema(
    [
        *_ITEM_FIELDS,
        pa.field("unit_id", pa.string(), nullable=False),
        pa.field("item_index", pa.int64(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error_type", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("is_container", pa.bool_(), nullable=False),
    ]
)


def _item_values(item: Item) -> dict[str, Any]:
    # Never its url, which may carry a signature.
    return {field.name: getattr(item, field.name) for field in _ITEM_FIELDS}


def _clips_table(clips: Iterable[CachedClip]) -> pa.Table:
    rows = [
        {
            **_item_values(clip.item),
            "offset": clip.offset,
            "num_samples": clip.num_samples,
            "content_sha256": clip.content_sha256,
            "warning": clip.warning,
        }
        for clip in clips
    ]
    return pa.Table.from_pylist(rows, schema=_CLIPS_SCHEMA)


def _failures_table(failures: Iterable[ItemFailure]) -> pa.Table:
    rows = [
        {
            **_item_values(event.failure.item),
            "unit_id": event.unit_id,
            "item_index": event.item_index,
            "stage": event.failure.stage,
            "error_type": event.failure.error_type,
            "message": event.failure.message,
            "is_container": event.failure.is_container,
        }
        for event in failures
    ]
    return pa.Table.from_pylist(rows, schema=_FAILURES_SCHEMA)


# --- Names of folders ----------------------------------------------------------------------


def _make_unfinished(root: Path, key: str) -> tuple[Path, int]:
    """A folder for what is not whole yet, and the descriptor whose lock says that we live."""
    while True:
        folder = root / f".{key}.{uuid.uuid4().hex}.tmp"
        folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # swept before it could be locked
        if _is_locked_by_us(descriptor, if_there_are_no_locks=True) and is_still(
            folder, descriptor
        ):
            return folder, descriptor
        os.close(descriptor)  # being swept just now


def _sweep(root: Path) -> None:
    """Remove what processes have left by being killed; the system ends a lock with its process."""
    for folder in root.iterdir():
        if _UNFINISHED.fullmatch(folder.name) is None:
            continue
        with contextlib.suppress(OSError):  # somebody else may be sweeping too
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _is_locked_by_us(descriptor):
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _is_locked_by_us(descriptor: int, *, if_there_are_no_locks: bool = False) -> bool:
    """Whether the lock could be had; some network file systems have none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return if_there_are_no_locks
    return True


def _give_name(folder: Path, name: Path, stale: Path | None) -> None:
    """Rename a whole cache; in place of one that is stale, but not of one made meanwhile."""
    if stale is not None:
        # Under such a name it is swept if this process dies before it has removed it.
        aside = name.with_name(f".{name.name}.{uuid.uuid4().hex}.tmp")
        with contextlib.suppress(FileNotFoundError):
            stale.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.rename(name)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    descriptor = os.open(name.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Reading back --------------------------------------------------------------------------


def _read_cache(
    folder: Path, found: Found, sample_rate_hz: int, dtype: CacheDtype
) -> CachedClips | None:
    """A cache that is whole; None where there is none, or it has been damaged."""
    if not folder.exists():
        return None
    given = {item.clip_id: item for item in found.items}
    for container in found.containers:
        given |= {item.clip_id: item for item in container.items}
    try:
        rows = pq.read_table(folder / CLIPS_NAME, schema=_CLIPS_SCHEMA).to_pylist()
        failed = pq.read_table(folder / FAILURES_NAME, schema=_FAILURES_SCHEMA).to_pylist()
        num_bytes = (folder / SAMPLES_NAME).stat().st_size
    except (OSError, pa.ArrowException) as error:
        logger.warning("%s is damaged (%s): the clips are decoded anew.", folder, error)
        return None
    expected = sum(row["num_samples"] for row in rows) * _STORED[dtype].itemsize
    if num_bytes != expected:
        logger.warning(
            "%s is damaged (%s has %d bytes, and its clips %d): the clips are decoded anew.",
            *(folder, SAMPLES_NAME, num_bytes, expected),
        )
        return None
    return CachedClips(
        folder=str(folder),
        sample_rate_hz=sample_rate_hz,
        file=SampleFile(folder / SAMPLES_NAME, dtype),
        clips=tuple(_clip_of(row, given) for row in rows),
        failures=tuple(_failure_of(row, given) for row in failed),
        is_reused=True,
    )


def _clip_of(row: Mapping[str, Any], given: Mapping[str, Item]) -> CachedClip:
    return CachedClip(
        item=_item_of(row, given),
        offset=row["offset"],
        num_samples=row["num_samples"],
        content_sha256=row["content_sha256"],
        warning=row["warning"],
    )


def _failure_of(row: Mapping[str, Any], given: Mapping[str, Item]) -> ItemFailure:
    failure = Failure(
        item=_item_of(row, given),
        stage=row["stage"],
        error_type=row["error_type"],
        message=row["message"],
        is_container=row["is_container"],
    )
    return ItemFailure(row["unit_id"], row["item_index"], failure)


def _item_of(row: Mapping[str, Any], given: Mapping[str, Item]) -> Item:
    """The item as the inputs describe it now."""
    truth = None if row["truth"] is None else tuple(row["truth"])
    values = {field.name: row[field.name] for field in _ITEM_FIELDS}
    stored = Item(**{**values, "truth": truth})
    now = given.get(stored.clip_id)
    if now is None:
        return stored
    if _is_loose(now):
        return now
    return dataclasses.replace(
        stored,
        truth=stored.truth if now.truth is None else now.truth,
        metadata=stored.metadata if now.metadata is None else now.metadata,
    )


def _is_loose(item: Item) -> bool:
    return item.member is None and item.row is None


# --- Failures ------------------------------------------------------------------------------


def check_failures(cached: CachedClips, max_failed: float) -> None:
    """Refuse to train on what is left where too much could not be decoded.

    Args:
        cached: The clips.
        max_failed: Share of the items that may fail, in [0, 1]; below 1, no container may break
            off, as nobody knows how much of it is missing.

    Raises:
        InputError: More have failed, or everything has.
    """
    num_failed = len(cached.failures)
    if not num_failed:
        return
    num_items = num_failed + len(cached.clips)
    broken = [event.failure for event in cached.failures if event.failure.is_container]
    failure = broken[0] if broken else cached.failures[0].failure
    example = f"one of them: {failure.item.clip_id}: {failure.message}"
    if not cached.clips:
        raise InputError(f"none of {counted(num_items, 'item')} could be decoded; {example}")
    if broken and max_failed < 1:
        raise InputError(
            f"{counted(len(broken), 'container')} could not be read to the end, so that it is not "
            f"known how many clips are missing; {example}. Mend or leave out what is broken, or "
            "train on what could be read with --max-failed 1."
        )
    if num_failed > max_failed * num_items:
        raise InputError(
            f"{num_failed:,} of {counted(num_items, 'item')} could not be decoded, and max_failed "
            f"allows {max_failed:g} of them; {example}. Mend or leave out what is broken, or raise "
            "--max-failed."
        )


def write_errors(caches: Sequence[CachedClips], url: str) -> None:
    """Write what failed as a table of ``earmark label``'s kind, which is a manifest too.

    Args:
        caches: The training clips, and the validation clips where they are an input of their own.
        url: The table, a Parquet file. Where nothing failed, there is none afterwards.
    """
    by_unit: dict[str, list[Failure]] = defaultdict(list)
    for event in (event for cached in caches for event in cached.failures):
        by_unit[event.unit_id].append(event.failure)
    if not by_unit:
        storage.remove(url)
        return
    tables = [errors_table(same, unit_id) for unit_id, same in by_unit.items()]
    target = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), target, compression="zstd")
    storage.write_bytes(url, target.getvalue())
