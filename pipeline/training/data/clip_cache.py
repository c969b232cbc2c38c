"""Clips decoded once, in a folder that training reads again and again.

    Found ─find_units─▶ WorkUnit ─DecodePool─▶ Waveform pieces ─▶ FOLDER/<key>/samples.bin
                                                                                 clips.parquet
                                                                                 failures.parquet
                                                     until then: units.jsonl, a line per unit

Part of ``dataset``. A cache holds whole clips, mono at the model's rate, one after the other in one
flat file that is mapped into memory: neither hours-long clips nor a data set larger than the memory
is ever held.

Guarantees:

* Samples are those that ``earmark label`` gets; ``int16`` rounds them to 16 bits and cuts them off
  at [-1, 1).
* A cache's name is a digest of what is in it: a file that has changed makes another one. Labels and
  metadata that a manifest gives are always those of now, without decoding again.
* A cache has its name only once it is whole. What a living process is writing is left alone; what
  a dead one has left is gone on with where it is of the same name, and else removed.
* Going on gives the files that an uninterrupted run gives, to the last byte. A unit that was not
  finished is decoded anew, and so is what was finished less than ``LOG_INTERVAL_S`` ago.
* Every item found is a clip or a failure. What failed is tried again when a cache is used again or
  gone on with.
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
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.labelling.plan import counted
from pipeline.labelling.remaining import count_found_items, find_units
from pipeline.training.data.packed_clips import INT16_SCALE, STORED_DTYPES, CacheDtype, SampleFile
from transforms.decoding.pool import DecodePool, DecodeSettings
from transforms.errors import AccountingError, ConfigError, InputError, OutputError, WriteError
from transforms.label_audio import read_items
from transforms.process.temp_folders import is_still
from transforms.records import (
    ClipFacts,
    ContainerSlice,
    Failure,
    FloatArray,
    Item,
    ItemFailure,
    UnitEnd,
    Waveform,
    WorkUnit,
)
from transforms.results.rows import errors_table
from transforms.sources.read_unit import Found, SourceSettings, make_unit_id, plan_units
from transforms.storage import urls, writing
from transforms.storage.secrets import public_uri

logger = logging.getLogger(__name__)

OnClip: TypeAlias = Callable[[int, bool], None]
OnKept: TypeAlias = Callable[[int], None]
Decoded: TypeAlias = Waveform | ItemFailure | UnitEnd

CACHE_VERSION = 1  # raise it when the same input gives other samples or other files
SAMPLES_NAME = "samples.bin"
CLIPS_NAME = "clips.parquet"
FAILURES_NAME = "failures.parquet"
LOG_NAME = "units.jsonl"
# How often what was decoded is made to last: what a death costs, and how often the disk is waited
# for.
LOG_INTERVAL_S = 5.0
# Of millions of rows, so many are in memory at once.
_ROWS_AT_ONCE = 10_000

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
    on_kept: OnKept | None = None,
) -> CachedClips:
    """Decode everything that was found into a cache, or use the one that is there.

    Where an earlier process was interrupted in decoding the same, it is gone on from there.

    Args:
        found: What the inputs hold.
        folder: A local folder for caches; each lies in a folder of its own below it.
        decode: How to decode; its rate is the model's.
        sources: How to read.
        dtype: What samples are stored as.
        on_clip: Called while decoding with each item's number of samples, and whether it failed;
            not called where the cache is there.
        on_kept: Called once before decoding, with the number of items that an interrupted process
            has decoded; ``on_clip`` is not called for these. Not called where there are none.

    Raises:
        OutputError: The folder is not local or cannot be written.
        WriteError: The disk is full or fails; nothing is left of what was begun.
        ConfigError: There is no such dtype.
    """
    if dtype not in STORED_DTYPES:
        known = " or ".join(get_args(CacheDtype))
        raise ConfigError(f"cache.dtype is {dtype!r}; must be {known}. Set it in the config.")
    root = _make_root(folder)
    key = cache_key(found, sources, decode, dtype)
    units = find_units(found, sources)
    cached = _read_cache(root / key, found, decode.sample_rate_hz, dtype)
    with DecodePool(decode) as pool:
        work = _Work(found, [unit for unit in units if not unit.failures], sources, pool)
        is_usable = cached is not None and work.fails_again(
            [event.failure for event in cached.failures]
        )
        if not is_usable:
            _write_cache(root, key, work, dtype, on_clip, on_kept)
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
    return dataclasses.replace(cached, failures=(*listed, *cached.failures), is_reused=is_usable)


def _make_root(folder: str) -> Path:
    if not urls.is_local(folder):
        raise OutputError(
            f"the folder for decoded clips is {public_uri(folder)}; must be a local "
            "folder, as samples are mapped into memory from there. Give one with --cache."
        )
    root = Path(urls.local_path(urls.normalise(folder)))
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


@dataclass(frozen=True)
class _Work:
    """What there is to decode, and what with.

    Attributes:
        found: What the inputs hold.
        units: The same, cut into units; without what planning already knows to have failed.
        sources: How to read.
        pool: Decodes.
    """

    found: Found
    units: Sequence[WorkUnit]
    sources: SourceSettings
    pool: DecodePool

    def decode(self, first_unit: int) -> Iterator[Decoded]:
        """Everything of the units from this one on, in order."""
        return _decode_units(self.units[first_unit:], self.pool, self.sources)

    def fails_again(self, failures: Sequence[Failure]) -> bool:
        """Whether what has failed before still does: a mended file, a store that is back.

        Of a container that broke off nobody knows how much is missing, so it has to be read anew.
        """
        if any(failure.is_container for failure in failures):
            return False
        failed = {failure.item.clip_id: failure.item for failure in failures}
        inside: dict[str, list[Item]] = defaultdict(list)
        for item in failed.values():
            if not _is_loose(item):
                inside[item.uri].append(item)
        loose = [item for item in self.found.items if item.clip_id in failed]
        containers = []
        for container in self.found.containers:
            own = {item.clip_id for item in container.items}
            items = [item for item in inside[container.uri] if not own or item.clip_id in own]
            if items:
                containers.append(dataclasses.replace(container, items=tuple(items)))
        units = plan_units(loose, containers, self.sources)
        events = _decode_units(units, self.pool, self.sources)
        # What is over a bound may give pieces before it fails.
        return not any(isinstance(event, Waveform) and event.facts is not None for event in events)


def _decode_units(
    units: Sequence[WorkUnit], pool: DecodePool, sources: SourceSettings
) -> Iterator[Decoded]:
    """Everything of all units, in order; the unit after the one given out is being decoded."""
    streams: deque[tuple[WorkUnit, Iterator[Waveform | ItemFailure]]] = deque()
    for unit in units:
        streams.append((unit, pool.stream(unit.unit_id, read_items(unit, sources))))
        if len(streams) > 1:
            yield from _events_of(*streams.popleft())
    for started in streams:
        yield from _events_of(*started)


def _events_of(unit: WorkUnit, stream: Iterator[Waveform | ItemFailure]) -> Iterator[Decoded]:
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
    yield UnitEnd(unit, num_items)


# --- Writing -------------------------------------------------------------------------------


def _write_cache(
    root: Path,
    key: str,
    work: _Work,
    dtype: CacheDtype,
    on_clip: OnClip | None,
    on_kept: OnKept | None,
) -> None:
    """Write a cache under another name, and give it its own once it is whole."""
    stale = root / key if (root / key).exists() else None
    with _writing_to(root):
        folder, lock = _take_over(root, key) or _make_unfinished(root, key)
    try:
        kept = _find_kept(folder, work, dtype)
        if kept.num_items and on_kept is not None:
            on_kept(kept.num_items)
        with contextlib.closing(
            _CacheWriter(folder, dtype, kept, count_found_items(work.found))
        ) as writer:
            for event in work.decode(kept.num_units):
                done = writer.add(event)
                if done is not None and on_clip is not None:
                    on_clip(*done)
            writer.finish()
        with _writing_to(root):
            _give_name(folder, root / key, stale)
    except BaseException as error:
        # It can be gone on with, but a disk that is full must not be left so.
        if isinstance(error, WriteError) or not _size_of_log(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


class _CacheWriter:
    """Writes samples as they come, a line for each unit, and at the end what the samples are of.

    A line is written once its unit's samples are safe, so that what the log has is there, however
    the process or the machine dies.

    Args:
        folder: Where to.
        dtype: What samples are stored as.
        kept: What is there already; anything beyond it is cut off.
        total_items: How many items there are, or None; for what is said when the disk is full.
    """

    def __init__(
        self, folder: Path, dtype: CacheDtype, kept: _Kept, total_items: int | None
    ) -> None:
        self._folder = folder
        self._dtype: CacheDtype = dtype
        self._total_items = total_items
        self._num_done = kept.num_items
        self._offset = kept.num_samples  # of the clip that is being written
        self._num_samples = kept.num_samples  # of all that is written
        self._clips: list[Mapping[str, Any]] = []  # of the unit that is being written
        self._failures: list[Mapping[str, Any]] = []
        self._lines: list[str] = []  # of units that are written and not in the log yet
        self._logged_at_s = time.monotonic()
        with self._writing(), contextlib.ExitStack() as opened:
            self._samples = opened.enter_context(
                _open_at(folder / SAMPLES_NAME, kept.num_samples * STORED_DTYPES[dtype].itemsize)
            )
            self._log = opened.enter_context(_open_at(folder / LOG_NAME, kept.num_log_bytes))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

    def add(self, event: Decoded) -> tuple[int, bool] | None:
        """Take what comes next; at an item's end its samples and whether it failed."""
        if isinstance(event, UnitEnd):
            self._end_unit(event.unit)
            return None
        if isinstance(event, ItemFailure):
            with self._writing():  # pieces of it may have come before
                self._samples.truncate(self._offset * STORED_DTYPES[self._dtype].itemsize)
            self._num_samples = self._offset
            self._failures.append(_failure_row(event))
            self._num_done += 1
            return 0, True
        with self._writing():
            _write_all(self._samples, _encoded(event.samples, self._dtype))
        self._num_samples += event.samples.size
        if event.facts is None:
            return None
        num_samples = self._num_samples - self._offset
        self._clips.append(_clip_row(event.item, event.facts, self._offset, num_samples))
        self._offset = self._num_samples
        self._num_done += 1
        return num_samples, False

    def finish(self) -> None:
        """Everything has come: write what the samples are of."""
        with self._writing():
            self._write_log()
            for name, kind, schema in (
                (CLIPS_NAME, "clips", _CLIPS_SCHEMA),
                (FAILURES_NAME, "failures", _FAILURES_SCHEMA),
            ):
                entries = _read_log(self._folder)
                rows = (row for entry, _ in entries for row in entry[kind])
                _write_table(rows, schema, self._folder / name)

    def _end_unit(self, unit: WorkUnit) -> None:
        entry = {
            "unit_id": unit.unit_id,
            "num_samples": self._num_samples,
            "clips": self._clips,
            "failures": self._failures,
        }
        self._lines.append(json.dumps(entry) + "\n")
        self._clips, self._failures = [], []
        if time.monotonic() - self._logged_at_s >= LOG_INTERVAL_S:
            with self._writing():
                self._write_log()

    def _write_log(self) -> None:
        os.fsync(self._samples.fileno())
        _write_all(self._log, "".join(self._lines).encode())
        os.fsync(self._log.fileno())
        self._lines = []
        self._logged_at_s = time.monotonic()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return _writing_to(self._folder.parent, self._needs)

    def _needs(self) -> str:
        """How much was written, how much it may become, and how to make it less."""
        num_bytes = self._num_samples * STORED_DTYPES[self._dtype].itemsize
        text = ""
        if num_bytes and self._num_done:
            text = f" {_in_mib(num_bytes)} held {counted(self._num_done, 'item')}"
            if self._total_items:
                needed = _in_mib(num_bytes * self._total_items / self._num_done)
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
        steps = np.rint(samples * np.float32(INT16_SCALE))
        samples = np.clip(steps, -INT16_SCALE, INT16_SCALE - 1)
    return samples.astype(STORED_DTYPES[dtype]).tobytes()


def _write_all(file: io.FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:  # a disk that fills up takes a part, and refuses the next
        left = left[file.write(left) :]


def _open_at(path: Path, num_bytes: int) -> io.FileIO:
    """Open a file to append to what it holds up to here."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    try:
        file.truncate(num_bytes)
    except BaseException:
        file.close()
        raise
    return file


def _write_table(rows: Iterator[Mapping[str, Any]], schema: pa.Schema, path: Path) -> None:
    with open(path, "wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            while some := list(islice(rows, _ROWS_AT_ONCE)):
                writer.write_table(pa.Table.from_pylist(some, schema=schema))
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


def _clip_row(item: Item, facts: ClipFacts, offset: int, num_samples: int) -> dict[str, Any]:
    return {
        **_item_values(item),
        "offset": offset,
        "num_samples": num_samples,
        "content_sha256": facts.content_sha256,
        "warning": facts.warning,
    }


def _failure_row(event: ItemFailure) -> dict[str, Any]:
    return {
        **_item_values(event.failure.item),
        "unit_id": event.unit_id,
        "item_index": event.item_index,
        "stage": event.failure.stage,
        "error_type": event.failure.error_type,
        "message": event.failure.message,
        "is_container": event.failure.is_container,
    }


# --- Going on ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """What an unfinished cache holds for good.

    Attributes:
        num_units: So many units of the work, from the first on.
        num_items: Clips and failures in them.
        num_samples: Samples of the clips.
        num_log_bytes: Bytes of the units' lines.
    """

    num_units: int = 0
    num_items: int = 0
    num_samples: int = 0
    num_log_bytes: int = 0


def _find_kept(folder: Path, work: _Work, dtype: CacheDtype) -> _Kept:
    """What can be gone on from: whole units of this work, with failures that still are some."""
    given = _given_items(work.found)
    samples = folder / SAMPLES_NAME
    num_bytes = samples.stat().st_size if samples.exists() else 0
    kept = before_failures = _Kept()
    failures: list[Failure] = []
    for unit, (entry, num_log_bytes) in zip(work.units, _read_log(folder), strict=False):
        is_there = entry["num_samples"] * STORED_DTYPES[dtype].itemsize <= num_bytes
        if entry["unit_id"] != unit.unit_id or not is_there:
            break
        kept = _Kept(
            num_units=kept.num_units + 1,
            num_items=kept.num_items + len(entry["clips"]) + len(entry["failures"]),
            num_samples=entry["num_samples"],
            num_log_bytes=num_log_bytes,
        )
        failures += [_failure_of(row, given).failure for row in entry["failures"]]
        if not failures:
            before_failures = kept
    return kept if not failures or work.fails_again(failures) else before_failures


def _read_log(folder: Path) -> Iterator[tuple[Mapping[str, Any], int]]:
    """What each line says, and where it ends; up to one that was not written to its end."""
    path = folder / LOG_NAME
    if not path.exists():
        return
    num_bytes = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
            except ValueError:  # of a machine that died before the disk had it
                return
            num_bytes += len(line)
            yield entry, num_bytes


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


def _take_over(root: Path, key: str) -> tuple[Path, int] | None:
    """The unfinished cache of this name that holds most, of those that dead processes have left.

    All others of theirs are removed. The system ends a lock with its process, however that ends.

    Returns:
        The folder and the descriptor of its lock, which is ours now; None if there is none.
    """
    taken: tuple[Path, int] | None = None
    for folder, descriptor in _abandoned(root):
        num_bytes = _size_of_log(folder) if folder.name.split(".")[1] == key else 0
        if num_bytes and (taken is None or num_bytes > _size_of_log(taken[0])):
            taken, unwanted = (folder, descriptor), taken
        else:
            unwanted = folder, descriptor
        if unwanted is not None:
            shutil.rmtree(unwanted[0], ignore_errors=True)
            os.close(unwanted[1])
    return taken


def _abandoned(root: Path) -> Iterator[tuple[Path, int]]:
    """What dead processes have left, each with the descriptor of a lock that is ours."""
    for folder in list(root.iterdir()):
        if _UNFINISHED.fullmatch(folder.name) is None:
            continue
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone, or finished meanwhile; or no folder at all
        # The one who held the lock may have given it its name since.
        if _is_locked_by_us(descriptor) and is_still(folder, descriptor):
            yield folder, descriptor
        else:
            os.close(descriptor)


def _size_of_log(folder: Path) -> int:
    path = folder / LOG_NAME
    return path.stat().st_size if path.exists() else 0


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
        # Under such a name it is removed if this process dies before it has done so: without a
        # log, nobody goes on with it.
        aside = name.with_name(f".{name.name}.{uuid.uuid4().hex}.tmp")
        with contextlib.suppress(FileNotFoundError):
            (stale / LOG_NAME).unlink(missing_ok=True)
            stale.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.rename(name)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(folder, ignore_errors=True)
    (name / LOG_NAME).unlink(missing_ok=True)  # not before: it is all that a successor has
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
    given = _given_items(found)
    try:
        clips = tuple(
            _clip_of(row, given) for row in _read_table(folder / CLIPS_NAME, _CLIPS_SCHEMA)
        )
        failures = tuple(
            _failure_of(row, given) for row in _read_table(folder / FAILURES_NAME, _FAILURES_SCHEMA)
        )
        num_bytes = (folder / SAMPLES_NAME).stat().st_size
    except (OSError, pa.ArrowException) as error:
        logger.warning("%s is damaged (%s): the clips are decoded anew.", folder, error)
        return None
    expected = sum(clip.num_samples for clip in clips) * STORED_DTYPES[dtype].itemsize
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
        clips=clips,
        failures=failures,
        is_reused=True,
    )


def _given_items(found: Found) -> dict[str, Item]:
    """The items that the inputs name, by their clip ids."""
    given = {item.clip_id: item for item in found.items}
    for container in found.containers:
        given |= {item.clip_id: item for item in container.items}
    return given


def _read_table(path: Path, schema: pa.Schema) -> Iterator[Mapping[str, Any]]:
    """The rows, of which a few are in memory at once.

    Raises:
        ArrowInvalid: The file has other columns.
    """
    with pq.ParquetFile(path) as file:
        if not file.schema_arrow.equals(schema):
            raise pa.ArrowInvalid(f"{path.name} has the columns {file.schema_arrow.names}")
        for batch in file.iter_batches(_ROWS_AT_ONCE):
            yield from batch.to_pylist()


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
    now = given.get(row["clip_id"])
    if now is not None and _is_loose(now):
        return now
    truth = None if row["truth"] is None else tuple(row["truth"])
    values = {field.name: row[field.name] for field in _ITEM_FIELDS}
    stored = Item(**{**values, "truth": truth})
    if now is None:
        return stored
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
        writing.remove(url)
        return
    tables = [errors_table(same, unit_id) for unit_id, same in by_unit.items()]
    target = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), target, compression="zstd")
    writing.write_bytes(url, target.getvalue())
