"""The bytes of an item, within bounds: in memory, or beyond some size in a temporary file.

The size is checked before the bytes are read if the source tells it, and else while they are read.
"""

from __future__ import annotations

import bisect
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from transforms.errors import EarmarkError, ReadError, item_too_large
from transforms.process.temp_folders import scratch_folder
from transforms.records import EncodedClip, Failure, Item
from transforms.sources.clip_ids import read_failure
from transforms.sources.file_kinds import extension, is_audio_name
from transforms.storage import reading, urls

_COPY_BYTES = 1 << 20
_SMALL_BLOCK_BYTES = 64 << 10
_MAX_HELD_BYTES = 256 << 20
_HELD_IN_MEMORY_BYTES = 16 << 20
_HELD_PIECE_BYTES = 4 << 20  # per request


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """The bounds for reading; to exceed one, except ``spool_bytes``, is an error.

    Attributes:
        spool_bytes: A larger item goes to a temporary file instead of memory.
        max_item_bytes: Encoded bytes of an item.
        max_page_bytes: Bytes of a decompressed page of a Parquet file.
        max_expansion: Decompressed bytes per byte of a compressed tar, beyond the first GiB.
    """

    spool_bytes: int = 64 << 20
    max_item_bytes: int = 64 << 30
    max_page_bytes: int = 1 << 30
    max_expansion: float = 200.0

    def __post_init__(self) -> None:
        for name in ("spool_bytes", "max_item_bytes", "max_page_bytes", "max_expansion"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; must be at least 1")


def check_item_size(num_bytes: int | None, limits: ReadLimits) -> None:
    """Raise ``ReadError`` if an item is known to have more than ``limits.max_item_bytes``."""
    if num_bytes is not None and num_bytes > limits.max_item_bytes:
        raise _too_large(limits, num_bytes)


def _too_large(limits: ReadLimits, num_bytes: int | None) -> ReadError:
    message = item_too_large(limits.max_item_bytes, num_bytes)
    return ReadError(message, error_type="ItemTooLarge")


def spool(name: str, write: Callable[[BinaryIO], object]) -> str:
    """Create a temporary file with the extension of ``name`` and the output of ``write``.

    Returns its path. An exception of ``write`` removes it.
    """
    suffix = extension(name) if is_audio_name(name) else ""  # others may be of any length
    with tempfile.NamedTemporaryFile(dir=scratch_folder(), suffix=suffix, delete=False) as file:
        try:
            write(cast(BinaryIO, file))
            file.flush()  # on close, the error of a full disk would come too late
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return file.name


def second_name(path: str) -> str:
    """Return another path to a temporary file; either can be removed without the other."""
    name = str(scratch_folder() / f"{uuid.uuid4().hex}{Path(path).suffix}")
    try:
        os.link(path, name)
    except OSError:
        with open(path, "rb") as source:
            return spool(path, lambda file: shutil.copyfileobj(source, file, _COPY_BYTES))
    return name


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of a file, in memory or in a local file, or the error that prevented it."""

    data: bytes | None = None
    path: str | None = None
    is_temporary: bool = False
    error: Exception | None = None

    def discard(self) -> None:
        """Remove the local file if it is temporary."""
        if self.is_temporary and self.path is not None:
            Path(self.path).unlink(missing_ok=True)


def clips_of(items: Sequence[Item], fetched: Fetched) -> Iterator[EncodedClip | Failure]:
    """Yield the items of one file; what was fetched is theirs or, if they are abandoned, gone."""
    try:
        for number, item in enumerate(items, 1):
            if fetched.error is not None:
                yield read_failure(item, fetched.error)
            elif fetched.data is not None:
                yield EncodedClip(item, data=fetched.data)
            elif fetched.is_temporary and number < len(items):
                # Each clip's file is deleted after decoding: all but the last get their own link.
                yield EncodedClip(item, path=second_name(str(fetched.path)), delete_path=True)
            else:
                path, temporary = fetched.path, fetched.is_temporary
                fetched = Fetched(path=path)
                yield EncodedClip(item, path=path, delete_path=temporary)
    finally:
        fetched.discard()


def fetch(url: str, size: int | None, limits: ReadLimits) -> Fetched:
    """Fetch a remote file (its size may be None), or return the path of a local one."""
    try:
        if urls.is_local(url):
            path = urls.local_path(url)
            with reading.open_read(path):  # raises unless it is a readable file
                return Fetched(path=path)
        check_item_size(size, limits)
        with reading.open_read(url) as file:
            data = file.read(min(limits.spool_bytes, limits.max_item_bytes) + 1)
            if len(data) > limits.max_item_bytes:
                raise _too_large(limits, None)
            if len(data) <= limits.spool_bytes:
                return Fetched(data=data)
            name = urls.file_name(url)
            path = spool(name, lambda target: _copy_rest(data, file, target, limits))
            return Fetched(path=path, is_temporary=True)
    except (OSError, ValueError, EarmarkError) as error:
        return Fetched(error=error)


def _copy_rest(data: bytes, rest: BinaryIO, target: BinaryIO, limits: ReadLimits) -> None:
    num_bytes = 0
    while data:
        num_bytes += len(data)
        if num_bytes > limits.max_item_bytes:
            raise _too_large(limits, None)
        target.write(data)
        data = rest.read(_COPY_BYTES)


class RangeReader(io.RawIOBase):
    """A remote file with random access, some ranges of which can be held locally.

    Held ranges are fetched once, into memory or a temporary file without a name. Other bytes are
    requested in small blocks, or in larger ones when larger pieces are read. Opening and reading
    raise ``OSError``.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._file = reading.open_read(url, _SMALL_BLOCK_BYTES)
        self._held: IO[bytes] | None = None
        self._starts: list[int] = []  # of the held ranges, in order ...
        self._places: list[tuple[int, int]] = []  # ... with their ends and places in ``_held``
        self._position = 0

    def hold(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Fetch ranges of bytes [start, stop) and hold them instead of earlier ones.

        Returns False if they exceed 256 MiB, or if the disk is full. Raises ``OSError`` if the file
        cannot be read.
        """
        self.release()
        merged = _merged(ranges)
        if sum(stop - start for start, stop in merged) > _MAX_HELD_BYTES:
            return False
        try:
            held = tempfile.SpooledTemporaryFile(  # noqa: SIM115
                _HELD_IN_MEMORY_BYTES, dir=str(scratch_folder())
            )
        except OSError:
            return False
        self._held = held
        return all(self._hold_range(held, start, stop) for start, stop in merged)

    def _hold_range(self, held: IO[bytes], start: int, stop: int) -> bool:
        place, position = held.tell(), start
        self._file.seek(start)
        while data := self._file.read(min(stop - position, _HELD_PIECE_BYTES)):
            try:
                held.write(data)
                held.flush()
            except OSError:  # the disk is full
                self.release()
                return False
            position += len(data)
        self._starts.append(start)
        self._places.append((position, place))
        return True

    def release(self) -> None:
        """Drop the held ranges."""
        if self._held is not None:
            with suppress(OSError):  # closing writes the rest to a full disk
                self._held.close()
        self._held, self._starts, self._places = None, [], []

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return whether the store can seek."""
        return self._file.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to another position, and return it."""
        if whence == os.SEEK_CUR:
            offset, whence = self._position + offset, os.SEEK_SET
        self._position = self._file.seek(offset, whence)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read up to a held range's edge; return the number of bytes, 0 at the end."""
        index = bisect.bisect_right(self._starts, self._position) - 1
        source: IO[bytes] = self._file
        position, length = self._position, len(buffer)
        if index >= 0 and self._held is not None and position < self._places[index][0]:
            stop, place = self._places[index]
            length = min(length, stop - position)
            source, position = self._held, place + position - self._starts[index]
        elif index + 1 < len(self._starts):
            length = min(length, self._starts[index + 1] - position)
        source.seek(position)
        data = source.read(length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file and drop the held ranges."""
        if not self.closed:
            self.release()
            self._file.close()
        super().close()


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((max(0, start), stop) for start, stop in ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        elif start < stop:
            merged.append((start, stop))
    return merged
