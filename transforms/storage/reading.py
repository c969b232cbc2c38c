"""Read files: buffered streams in bounded memory, from any store.

Guarantees:
- **A file that changes while it is read is an error, never a patchwork.** Google's generation,
  S3's etag and a web server's validators are compared with every answer. On other stores, the
  version is compared when a broken stream is opened again.
- **A short answer is never taken for the whole.** The bytes read are compared with the size that
  the store gives. This fails only if a web server gives no size and does not mark the body's end.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import stat as stat_module
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.spec import AbstractBufferedFile

from transforms.process.temp_folders import scratch_folder
from transforms.storage.filesystem import (
    ChangedError,
    ask_file,
    details_of,
    fresh,
    open_filesystem,
    storage_errors,
    version_of,
)
from transforms.storage.retries import ShortBodyError
from transforms.storage.secrets import public_uri
from transforms.storage.urls import OBJECT_STORES, READ_ONLY, is_local, local_path, protocol

# The method of fsspec's files that cannot be read at any position.
_NO_RANGES = getattr(AbstractBufferedFile, "_fetch_range", None)
_COPY_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 16
_MAX_BLOCK_BYTES = 8 << 20  # of one request; at most two blocks are held


def open_read(
    url: str,
    block_bytes: int | None = None,
    stop: int | None = None,
    *,
    only_ranges: bool = False,
) -> BinaryIO:
    """Open a file as a buffered stream of bytes, in bounded memory; close it after use.

    The stream can seek, except over ``http`` if the server gives no size. At most 16 MiB of a file
    in an object store or on the web are held.

    Args:
        url: The file.
        block_bytes: Bytes per request to a remote store; small for random access in a large file.
            None: sequential reads request ever larger pieces and prefetch the next one.
        stop: The byte before which sequential reading will end; nothing from there on is
            prefetched. None: the file's end.
        only_ranges: Raise an error instead of transferring more than was requested. That would
            happen if a web server supports no ranges, or an object store decompresses the file.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It is not a regular file (reading a pipe would block forever), or cannot be opened.
            Errors while reading are ``OSError`` too.
    """
    if is_local(url):
        return open(_regular_file(url), "rb")
    raw = cast(io.RawIOBase, _open_remote(url, block_bytes, stop, only_ranges))
    return cast(BinaryIO, io.BufferedReader(raw, _BUFFER_BYTES))


def read_bytes(url: str) -> bytes:
    """Return the content of a file. Raises as ``open_read``."""
    with open_read(url) as file:
        return file.read()


def get_file(url: str, target: str) -> None:
    """Copy a file to the local path ``target``; remove it if that fails."""
    try:
        with open_read(url) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink, _COPY_BYTES)
    except BaseException:
        Path(target).unlink(missing_ok=True)
        raise


def _regular_file(url: str) -> str:
    path = local_path(url)
    mode = os.stat(path).st_mode  # noqa: PTH116
    if stat_module.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, a file was expected", path)
    if not stat_module.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is a pipe, socket or device, a file was expected", path)
    return path


def _open_remote(
    url: str, block_bytes: int | None, stop: int | None, only_ranges: bool
) -> io.RawIOBase | io.BytesIO:
    fs, path = open_filesystem(url)
    options: dict[str, Any] = {} if block_bytes is None else {"block_size": block_bytes}
    if protocol(url) == "memory":
        # Its open files share one position; copies do not.
        return io.BytesIO(ask_file(url, lambda: fs.cat_file(path)))
    content = _WebContent()
    if protocol(url) in READ_ONLY:
        options["raise_for_status"] = content.check
    file = ask_file(url, lambda: fresh(fs).open(path, "rb", **options))
    details = getattr(file, "details", None) or {}
    if details.get("type") == "directory":
        file.close()
        raise IsADirectoryError(f"{public_uri(url)} is a folder, a file was expected")
    if details.get("contentEncoding") == "gzip":
        # Google decompresses it in the transfer, so the size it gives is not that of the content.
        file.close()
        if only_ranges:
            raise _no_ranges(url)
        return _open_unpacked(fs, url, path)
    size = getattr(file, "size", None)
    has_ranges = getattr(type(file), "_fetch_range", None) not in (None, _NO_RANGES)
    if size is not None and has_ranges:
        content.size = size
        if protocol(url) in OBJECT_STORES | READ_ONLY:
            pace = _Pace(block_bytes, size if stop is None else min(stop, size))
        else:  # one connection, one request at a time
            pace = _Pace(block_bytes or int(file.blocksize), size)
        return _RangedFile(file, url, size, content, pace, only_ranges)
    file.close()
    if only_ranges and protocol(url) in READ_ONLY:
        raise _no_ranges(url)
    details = ask_file(url, lambda: details_of(url))
    content.version = None if protocol(url) in READ_ONLY else version_of(details)
    return _StreamedFile(url, details.get("size"), content)


def _no_ranges(url: str) -> OSError:
    return OSError(f"{public_uri(url)}: its server supports no range requests")


def _open_unpacked(fs: Any, url: str, path: str) -> io.FileIO:
    """Return the content as an open local file that has no name any more."""
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        target = f"{folder}/unpacked"
        # With headers given, gcsfs requests one stream; else ranges of the compressed file.
        ask_file(url, lambda: fs.get_file(path, target, headers={}))
        return io.FileIO(target)


class _WebContent:
    """Facts on which all answers for one open file must agree.

    Answers are compared with each other, not with the answer to ``HEAD``: that may come from
    another server, which knows the file by another etag.

    Attributes:
        size: Bytes of the whole file; None if not known.
        version: ``version_of`` a file that is not on the web; None if it has none.
    """

    def __init__(self) -> None:
        self.size: int | None = None
        self.version: str | None = None
        self._validators: dict[str, str] = {}

    async def check(self, response: Any) -> None:
        """Check an answer before its body is read; called by aiohttp.

        Raises:
            ChangedError: It is for another content than earlier answers.
        """
        if response.method == "HEAD" or response.status not in (200, 206, 416):
            return
        size = _whole_size(response)
        self.size = size if self.size is None else self.size
        if size not in (None, self.size):
            raise ChangedError(f"it had {self.size} bytes, and has {size}")
        if response.status == 416:
            return
        for name in ("ETag", "Last-Modified"):
            found = _comparable(response.headers.get(name))
            known = self._validators.setdefault(name, found) if found else found
            if found != known:
                raise ChangedError(f"its {name} was {known}, and is {found}")

    def check_version(self, details: dict[str, Any]) -> None:
        """Check the facts of a file that is not on the web, when it is opened again.

        Raises:
            ChangedError: The version is another.
        """
        found = version_of(details)
        if found not in (None, self.version):
            raise ChangedError(f"its version was {self.version}, and is {found}")


def _whole_size(response: Any) -> int | None:
    """Return the file's size from an answer; None if it has none, or the body is compressed."""
    if response.headers.get("Content-Encoding", "identity") not in ("identity", ""):
        return None
    if response.status == 200:
        length = response.headers.get("Content-Length", "")
    else:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(length) if length.isdecimal() else None


def _comparable(validator: str | None) -> str | None:
    """Return a validator without the marks of a compressed transfer of the same content."""
    return validator and re.sub(r'^W/|"|[-;](?:gzip|br|zstd|deflate)(?="?$)', "", validator)


@dataclass
class _Pace:
    """The sizes of requests, and whether to prefetch.

    In sequential reading, pieces double up to 8 MiB. A jump starts again with the requested size.
    Once as many bytes as the largest piece were read in a row, the next piece is prefetched, so a
    useless prefetch is never larger than what was read before it.

    Attributes:
        fixed_bytes: Minimum bytes of every request, without prefetch; None: as above.
        stop: The byte before which sequential reading ends.
    """

    fixed_bytes: int | None
    stop: int
    _piece_bytes: int = field(default=0, init=False)
    _bytes_in_a_row: int = field(default=0, init=False)

    def jump(self) -> None:
        """Note that the next read does not follow the last one."""
        self._piece_bytes = self._bytes_in_a_row = 0

    def end_of(self, start: int, num_bytes: int, size: int) -> int:
        """Return the end of the piece that starts at ``start``; ``num_bytes`` are wanted now."""
        if self.fixed_bytes is not None:
            return min(start + min(max(num_bytes, self.fixed_bytes), _MAX_BLOCK_BYTES), size)
        if start >= self.stop:
            return min(start + min(num_bytes, _MAX_BLOCK_BYTES), size)
        self._piece_bytes = min(max(num_bytes, 2 * self._piece_bytes), _MAX_BLOCK_BYTES)
        return min(start + self._piece_bytes, self.stop)

    def has_read(self, num_bytes: int) -> None:
        """Note that a piece of so many bytes was fetched."""
        self._bytes_in_a_row += num_bytes

    def wants_ahead(self, start: int) -> bool:
        """Return whether to prefetch the piece that starts at ``start``."""
        is_in_order = self._bytes_in_a_row >= _MAX_BLOCK_BYTES
        return self.fixed_bytes is None and is_in_order and start < self.stop


class _Ahead:
    """A piece of a file that a daemon thread prefetches; an abandoned piece is not waited for."""

    def __init__(self, start: int, end: int, fetch: Callable[[int, int], bytes | None]) -> None:
        self.start, self.end = start, end
        self._fetch = fetch
        self.piece: Future[bytes | None] = Future()
        threading.Thread(target=self._run, name="earmark-read-ahead", daemon=True).start()

    def _run(self) -> None:
        try:
            self.piece.set_result(self._fetch(self.start, self.end))
        except BaseException as error:  # raised by ``piece.result()``
            self.piece.set_exception(error)


class _RangedFile(io.RawIOBase):
    """A remote file, fetched in pieces; the current one and a prefetched one are held.

    A piece that comes short is requested again, where fsspec's own caches would keep it. If a web
    server turns out to support no ranges, the rest is read as a stream.
    """

    def __init__(
        self,
        file: Any,
        url: str,
        size: int,
        content: _WebContent,
        pace: _Pace,
        only_ranges: bool = False,
    ) -> None:
        super().__init__()
        self._file, self._url, self._size, self._content = file, url, size, content
        self._pace = pace
        self._only_ranges = only_ranges
        self._position = 0
        self._start, self._block = 0, b""
        self._ahead: _Ahead | None = None
        self._stream: _StreamedFile | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "a position before the start of the file")
        self._position = start + offset
        return self._position

    def readall(self) -> bytes:
        return b"".join(iter(partial(self.read, _MAX_BLOCK_BYTES), b""))

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        if not 0 <= self._position - self._start < len(self._block):
            self._load(len(buffer))
        at = self._position - self._start
        data = memoryview(self._block)[at : at + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _load(self, num_bytes: int) -> None:
        """Fetch the piece at the current position, and start to prefetch the next one."""
        ahead, self._ahead = self._ahead, None
        end = self._start + len(self._block)
        self._block = b""  # freed before the next piece comes, so that at most two are held
        if ahead is not None and ahead.start <= self._position < ahead.end:
            self._start = ahead.start
            self._block = self._read_piece(ahead.start, ahead.end, ahead)
        else:
            if self._position != end:
                self._pace.jump()
            self._start = self._position
            end = self._pace.end_of(self._position, num_bytes, self._size)
            self._block = self._read_piece(self._position, end)
        self._pace.has_read(len(self._block))
        start = self._start + len(self._block)
        if self._stream is None and self._pace.wants_ahead(start):
            self._ahead = _Ahead(start, self._pace.end_of(start, 0, self._size), self._ask_for)

    def _ask_for(self, start: int, end: int) -> bytes | None:
        return ask_file(self._url, lambda: self._fetch(start, end))

    def _read_piece(self, start: int, end: int, ahead: _Ahead | None = None) -> bytes:
        if self._stream is None:
            piece = ahead.piece.result() if ahead is not None else self._ask_for(start, end)
            if piece is not None:
                return piece
            if self._only_ranges:
                raise _no_ranges(self._url)
        if self._stream is None or self._stream.tell() != start:
            self._close_stream()
            self._stream = _StreamedFile(self._url, self._size, self._content, start)
        return self._stream.read(end - start) or b""

    def _fetch(self, start: int, end: int) -> bytes | None:
        """Return bytes ``start`` to ``end``; None if the server supports no ranges."""
        generation = (getattr(self._file, "details", None) or {}).get("generation")
        if generation:  # Google's; it excludes a newer object of the same name
            fs, path = self._file.fs, self._file.path
            try:
                data = fs.cat_file(path, start=start, end=end, generation=generation)
            except FileNotFoundError:
                raise FileNotFoundError("it was changed or removed meanwhile") from None
        else:
            try:
                data = self._file._fetch_range(start, end)
            except ValueError:
                if protocol(self._url) in READ_ONLY and start > 0:
                    return None
                raise
        if len(data) != end - start:
            raise ShortBodyError(
                f"of bytes {start} to {end} of {self._size}, {len(data)} were received"
            )
        return cast(bytes, data)

    def close(self) -> None:
        if not self.closed:
            self._block, self._ahead = b"", None
            self._close_stream()
            self._file.close()
        super().close()

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _StreamedFile(io.RawIOBase):
    """A remote file that is read as one stream, up to its ``size`` if that is known.

    A stream that breaks is opened again and skipped forward to the same position. If the file has
    changed by then, an error is raised.
    """

    def __init__(self, url: str, size: int | None, content: _WebContent, position: int = 0) -> None:
        super().__init__()
        self._url, self._size, self._content = url, size, content
        self._position = position
        self._file = ask_file(url, self._open)

    def _open(self) -> Any:
        fs, path = open_filesystem(self._url)
        self._fs = fs  # the file system of an archive closes it when garbage-collected
        is_web = protocol(self._url) in READ_ONLY
        options = {"block_size": 0, "raise_for_status": self._content.check} if is_web else {}
        file = fs.open(path, "rb", **options)
        try:
            if not is_web and self._content.version is not None:
                self._content.check_version(details_of(self._url))
            if self.seekable():
                file.seek(self._position)
                return file
            left = self._position
            while left:
                data = file.read(min(left, _COPY_BYTES))
                if not data:
                    raise ShortBodyError(f"ended {left} bytes before byte {self._position}")
                left -= len(data)
        except BaseException:
            file.close()
            raise
        return file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return protocol(self._url) not in READ_ONLY

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if not self.seekable():
            raise _no_ranges(self._url)
        with storage_errors(self._url):
            self._position = int(self._file.seek(offset, whence))
        return self._position

    def readall(self) -> bytes:
        return b"".join(iter(partial(self.read, _COPY_BYTES), b""))

    def readinto(self, buffer: Any) -> int:
        data = ask_file(self._url, lambda: self._next(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _next(self, num_bytes: int) -> bytes:
        if self._file is None:
            self._file = self._open()
        try:
            data = self._file.read(num_bytes)
            if not data and self._size is not None and self._position < self._size:
                raise ShortBodyError(f"ended after {self._position} of {self._size} bytes")
        except BaseException:
            file, self._file = self._file, None
            file.close()
            raise
        return cast(bytes, data)

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()
