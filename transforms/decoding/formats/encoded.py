"""The encoded bytes of a file, in memory or mapped, and their hash."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from transforms.errors import DecodeError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_IN_MEMORY_BYTES = 64 << 20  # larger files are mapped
HASH_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Encoded:
    """A file's bytes, in memory or mapped, or a part of them.

    Attributes:
        view: All bytes of the file.
        start: First byte of the part. Positions in what follows count from here.
        stop: One past its last byte; None for the file's end.
        prefix: A header that ``open`` puts before the part, for one that has none of its own.
        path: The file, if it is one.
        identity: Device, inode, size and modification time of a mapped file.
    """

    view: bytes | mmap.mmap
    path: str | None = None
    identity: tuple[int, int, int, int] | None = None
    start: int = 0
    stop: int | None = None
    prefix: bytes = b""

    def __len__(self) -> int:
        return max(self._stop - self.start, 0)

    @property
    def _stop(self) -> int:
        return len(self.view) if self.stop is None else self.stop

    def read(self, position: int, num_bytes: int) -> bytes:
        """Return at most so many bytes from ``position`` on."""
        start = self.start + position
        return self.view[start : min(start + num_bytes, self._stop)]

    def find(self, pattern: bytes, position: int, stop: int | None = None) -> int:
        """Return where ``pattern`` lies, wholly between ``position`` and ``stop``; -1: nowhere."""
        end = self._stop if stop is None else min(self.start + stop, self._stop)
        found = self.view.find(pattern, self.start + position, end)
        return found - self.start if found >= 0 else -1

    def part(self, start: int, stop: int | None = None, prefix: bytes = b"") -> Encoded:
        """Return the part from ``start`` to ``stop``, both counted from this part's start."""
        end = self.stop if stop is None else min(self.start + stop, self._stop)
        return dataclasses.replace(self, start=self.start + start, stop=end, prefix=prefix)

    def open(self) -> BinaryIO:
        """Return a new file object over the bytes."""
        if isinstance(self.view, bytes):
            is_whole = self.start == 0 and self.stop is None
            data = self.view if is_whole else self.view[self.start : self._stop]
            return io.BytesIO(self.prefix + data if self.prefix else data)
        if self.start == 0 and self.stop is None and not self.prefix:
            # Without its name, by which soundfile would take "a.raw" for samples without a header.
            return open(os.open(str(self.path), os.O_RDONLY), "rb")
        return cast(BinaryIO, io.BufferedReader(_PartOfFile(self)))


class _PartOfFile(io.RawIOBase):
    """A file object over a part of a mapped file, behind its prefix."""

    def __init__(self, part: Encoded) -> None:
        self._file_descriptor = os.open(str(part.path), os.O_RDONLY | os.O_CLOEXEC)
        self._part = part
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = len(self._part.prefix) + len(self._part)
        base = (0, self._position, size)[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        behind_prefix = self._position - len(self._part.prefix)
        if behind_prefix < 0:
            data = self._part.prefix[self._position : self._position + len(target)]
        else:
            num_bytes = max(min(len(target), len(self._part) - behind_prefix), 0)
            data = os.pread(self._file_descriptor, num_bytes, self._part.start + behind_prefix)
        target[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._file_descriptor)
        super().close()


@contextlib.contextmanager
def open_encoded(source: bytes | str | Path) -> Iterator[Encoded]:
    """Open a file's bytes, or raise ``DecodeError`` if it is empty or cannot be read."""
    if isinstance(source, bytes):
        encoded = Encoded(source)
    else:
        try:
            encoded = _read_or_map(str(source))
        except OSError as error:
            raise DecodeError(
                f"cannot read the local file: {error.strerror}", error_type=type(error).__name__
            ) from error
    if not len(encoded.view):
        raise DecodeError("the file is empty (0 bytes)", error_type="EmptyFile")
    try:
        yield encoded
    finally:
        if not isinstance(encoded.view, bytes):
            encoded.view.close()


def _read_or_map(path: str) -> Encoded:
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size <= MAX_IN_MEMORY_BYTES:
            return Encoded(file.read(), path)
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return Encoded(view, path, identity)


# The mapped file that was hashed last: thousands of its segments may follow one another.
_last_hash: tuple[tuple[int, int, int, int], str] | None = None


def hash_encoded(encoded: Encoded, on_progress: Callable[[], None]) -> str:
    """Return the SHA-256 of the bytes in hex; consecutive clips of a mapped file share it."""
    global _last_hash
    if encoded.identity is None:
        return _hash_bytes(encoded, on_progress)
    if _last_hash is None or _last_hash[0] != encoded.identity:
        _last_hash = (encoded.identity, _hash_bytes(encoded, on_progress))
    return _last_hash[1]


def _hash_bytes(encoded: Encoded, on_progress: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with memoryview(encoded.view) as view:
        for start in range(0, len(view), HASH_CHUNK_BYTES):
            digest.update(view[start : start + HASH_CHUNK_BYTES])
            on_progress()
    return digest.hexdigest()
