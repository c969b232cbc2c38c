"""The encoded bytes of a file, in memory or mapped, and their hash."""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from transforms.errors import DecodeError

MAX_IN_MEMORY_BYTES = 64 << 20  # larger files are mapped
HASH_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Encoded:
    """A file's bytes, in memory or mapped.

    ``identity`` is device, inode, size and modification time of a mapped file.
    """

    view: bytes | mmap.mmap
    path: str | None = None
    identity: tuple[int, int, int, int] | None = None

    def open(self) -> BinaryIO:
        """Return a new file object over the bytes."""
        if isinstance(self.view, bytes):
            return io.BytesIO(self.view)
        # Without its name, by which soundfile would take "a.raw" for samples without a header.
        return open(os.open(str(self.path), os.O_RDONLY), "rb")


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
