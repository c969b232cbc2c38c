"""An item's bytes, within bounds: in memory, or beyond some size in a temporary file.

Part of ``sources``. What an item may hold is looked at before its bytes are taken wherever the
source tells it, and while they are taken where it does not.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from transforms import storage
from transforms.clip_ids import AUDIO_EXTENSIONS, extension
from transforms.errors import EarmarkError, ReadError, item_too_large
from transforms.scratch import scratch_folder

_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """What reading may take.

    Attributes:
        spool_bytes: What is larger goes to a temporary file instead of memory.
        max_item_bytes: Encoded bytes of an item; more is an error.
        max_page_bytes: Bytes of a page of a Parquet file, decompressed; more is an error.
        max_expansion: Bytes that a compressed tar may give per byte of it, once it has given
            1 GiB; more is an error.
    """

    spool_bytes: int = 64 << 20
    max_item_bytes: int = 64 << 30
    max_page_bytes: int = 1 << 30
    max_expansion: float = 200.0


def check_item_size(num_bytes: int | None, limits: ReadLimits) -> None:
    """Refuse an item that is known to be too large.

    Raises:
        ReadError: It has more than ``limits.max_item_bytes``.
    """
    if num_bytes is not None and num_bytes > limits.max_item_bytes:
        raise _too_large(limits, num_bytes)


def _too_large(limits: ReadLimits, num_bytes: int | None) -> ReadError:
    message = item_too_large(limits.max_item_bytes, num_bytes)
    return ReadError(message, error_type="ItemTooLarge")


@contextmanager
def temporary_file(name: str) -> Iterator[BinaryIO]:
    """A new file with the extension of ``name``; it goes if the block ends with an exception."""
    ending = extension(name)
    suffix = ending if ending in AUDIO_EXTENSIONS else ""  # others may be of any length
    with tempfile.NamedTemporaryFile(dir=scratch_folder(), suffix=suffix, delete=False) as file:
        try:
            yield cast(BinaryIO, file)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def spool(name: str, write: Callable[[BinaryIO], object]) -> str:
    """The path of a temporary file with what ``write`` writes; nothing is left if it raises."""
    with temporary_file(name) as file:
        write(file)
        return str(file.name)


def copy_file(path: str) -> str:
    """The path of a temporary copy."""
    with open(path, "rb") as source:
        return spool(path, lambda file: shutil.copyfileobj(source, file, _COPY_BYTES))


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of a file, in memory, in a local file, or why there are none."""

    data: bytes | None = None
    path: str | None = None
    is_temporary: bool = False
    error: Exception | None = None

    def discard(self) -> None:
        """Remove the local file, if it was made for this alone."""
        if self.is_temporary and self.path is not None:
            Path(self.path).unlink(missing_ok=True)


def fetch(url: str, size: int | None, limits: ReadLimits) -> Fetched:
    """The bytes of a file; a local one is read where it lies.

    Args:
        url: The file.
        size: Its size as far as it is known.
        limits: What it may take.
    """
    try:
        if storage.is_local(url):
            path = storage.local_path(url)
            with storage.open_read(path):  # a file, there and readable
                return Fetched(path=path)
        check_item_size(size, limits)
        with storage.open_read(url) as file:
            data = file.read(min(limits.spool_bytes, limits.max_item_bytes) + 1)
            if len(data) > limits.max_item_bytes:
                raise _too_large(limits, None)
            if len(data) <= limits.spool_bytes:
                return Fetched(data=data)
            name = storage.file_name(url)
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
