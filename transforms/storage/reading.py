"""Read files: buffered streams in bounded memory, from any store.

Guarantees:
- **A file that changes while it is read is an error, never a patchwork.** Google's generation,
  S3's etag and a web server's validators are compared with every answer. Elsewhere only the version
  of a stream that broke and is opened again is compared.
- **A short answer is never taken for the whole.** What is read is compared with the size that the
  store gives. Only where a web server gives no size and does not say where a body ends, nobody can
  tell.
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

# What fsspec's files have that cannot be read at any place.
_NO_RANGES = getattr(AbstractBufferedFile, "_fetch_range", None)
_COPY_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 16
_MAX_BLOCK_BYTES = 8 << 20  # what one request asks for; two of them are held at most


def open_read(
    url: str,
    block_bytes: int | None = None,
    stop: int | None = None,
    *,
    only_ranges: bool = False,
) -> BinaryIO:
    """Open a file as a buffered stream of bytes, in bounded memory; close it after use.

    The stream can seek, except over ``http`` from a server that does not give a size. Of a file in
    an object store or on the web, at most 16 MiB are held.

    Args:
        url: The file.
        block_bytes: How much to ask a remote store for at once; small where one jumps about in a
            large file. None: what is read in order is asked for in ever larger pieces, the next
            one while the last is being used.
        stop: The byte before which reading in order will end; nothing from there on is asked for
            ahead. None: the file's end.
        only_ranges: Of a file on the web or in an object store, never read more than is asked for:
            an error rather than all that comes before, where a server gives no ranges, or all of
            it, where a store unpacks it on the way.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It is not a regular file (reading a pipe would wait forever), or cannot be
            opened. Errors while reading are ``OSError`` too.
    """
    if is_local(url):
        path = _regular_file(url)
        return open(path, "rb")
    raw = cast(io.RawIOBase, _open_remote(url, block_bytes, stop, only_ranges))
    return cast(BinaryIO, io.BufferedReader(raw, _BUFFER_BYTES))


def read_bytes(url: str) -> bytes:
    """The whole content of a file. Raises as ``open_read`` does."""
    if is_local(url):
        return Path(_regular_file(url)).read_bytes()
    with open_read(url) as file:
        return file.read()


def get_file(url: str, target: str) -> None:
    """Copy a file to the local path ``target``; on an error nothing is left there."""
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
        # Its open files share one position; a copy has its own.
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
        # It is unpacked on the way: the size that Google gives is that of something else.
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
        else:  # one connection, for one request at a time
            pace = _Pace(block_bytes or int(file.blocksize), size)
        return _RangedFile(file, url, size, content, pace, only_ranges)
    file.close()
    if only_ranges and protocol(url) in READ_ONLY:
        raise _no_ranges(url)
    details = ask_file(url, lambda: details_of(url))
    content.version = None if protocol(url) in READ_ONLY else version_of(details)
    return _StreamedFile(url, details.get("size"), content)


def _no_ranges(url: str) -> OSError:
    return OSError(f"{public_uri(url)}: its server gives it only from start to end")


def _open_unpacked(fs: Any, url: str, path: str) -> io.FileIO:
    """The whole content in a local file, which goes when it is closed."""
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        target = f"{folder}/unpacked"
        # With headers of its own gcsfs asks for it in one stream, else in ranges of the packed one.
        ask_file(url, lambda: fs.get_file(path, target, headers={}))
        return io.FileIO(target)


class _WebContent:
    """What the answers to the requests of one open file must agree on.

    Answers are compared with each other, and not with what ``HEAD`` said: some servers have that
    answered by another, which knows the file by another etag.

    Attributes:
        size: Of the whole file, in bytes; None if nobody has said.
        version: Of a file that is not on the web, as ``version_of`` has it; None if there is none.
    """

    def __init__(self) -> None:
        self.size: int | None = None
        self.version: str | None = None
        self._validators: dict[str, str] = {}

    async def check(self, response: Any) -> None:
        """Look at an answer before its body; aiohttp calls this.

        Raises:
            ChangedError: It is about another content than the ones before.
        """
        if response.method == "HEAD" or response.status not in (200, 206, 416):
            return
        self._check_size(_whole_size(response))
        if response.status == 416:
            return
        for name in ("ETag", "Last-Modified"):
            found = _comparable(response.headers.get(name))
            known = self._validators.setdefault(name, found) if found else found
            if found != known:
                raise ChangedError(f"its {name} was {known}, and is {found}")

    def _check_size(self, size: int | None) -> None:
        if size is None:
            return
        if self.size is None:
            self.size = size
        if size != self.size:
            raise ChangedError(f"it had {self.size} bytes, and has {size}")

    def check_version(self, details: dict[str, Any]) -> None:
        """Look at what a store other than the web says of it, when it is opened again.

        Raises:
            ChangedError: It is another.
        """
        found = version_of(details)
        if None not in (found, self.version) and found != self.version:
            raise ChangedError(f"its version was {self.version}, and is {found}")


def _whole_size(response: Any) -> int | None:
    """The size of the file that an answer is about, if it says so, and means the file itself."""
    if response.headers.get("Content-Encoding", "identity") not in ("identity", ""):
        return None
    if response.status == 200:
        length = response.headers.get("Content-Length", "")
    else:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(length) if length.isdecimal() else None


def _comparable(validator: str | None) -> str | None:
    """Without what says how the content was packed on its way: it is the same content."""
    return validator and re.sub(r'^W/|"|[-;](?:gzip|br|zstd|deflate)(?="?$)', "", validator)


@dataclass
class _Pace:
    """How much to ask for at once, and whether to ask for what comes next.

    Read in order, pieces double up to 8 MiB; a jump begins anew with what is asked for. Once as
    much has been read in a row as a piece has, the next piece is fetched ahead: so what is fetched
    in vain is never more than what was read before it.

    Attributes:
        fixed_bytes: Ask for at least this much each time, and nothing ahead; None: as above.
        stop: Where reading in order ends.
    """

    fixed_bytes: int | None
    stop: int
    _piece_bytes: int = field(default=0, init=False)
    _bytes_in_a_row: int = field(default=0, init=False)

    def jump(self) -> None:
        """What is read next does not follow what was read last."""
        self._piece_bytes = self._bytes_in_a_row = 0

    def end_of(self, start: int, num_bytes: int, size: int) -> int:
        """Where the piece ends that begins at ``start``, of which ``num_bytes`` are wanted now."""
        if self.fixed_bytes is not None:
            return min(start + min(max(num_bytes, self.fixed_bytes), _MAX_BLOCK_BYTES), size)
        if start >= self.stop:
            return min(start + min(num_bytes, _MAX_BLOCK_BYTES), size)
        self._piece_bytes = min(max(num_bytes, 2 * self._piece_bytes), _MAX_BLOCK_BYTES)
        return min(start + self._piece_bytes, self.stop)

    def has_read(self, num_bytes: int) -> None:
        """A piece of so many bytes is being used."""
        self._bytes_in_a_row += num_bytes

    def wants_ahead(self, start: int) -> bool:
        """Whether the piece that begins at ``start`` is to be fetched before it is asked for."""
        is_in_order = self._bytes_in_a_row >= _MAX_BLOCK_BYTES
        return self.fixed_bytes is None and is_in_order and start < self.stop


class _Ahead:
    """A piece of a file that is fetched while the one before is used, in a thread of its own.

    The thread keeps nobody from ending: whoever drops the piece does not wait for it.
    """

    def __init__(self, start: int, end: int, fetch: Callable[[int, int], bytes | None]) -> None:
        self.start, self.end = start, end
        self._fetch = fetch
        self._piece: Future[bytes | None] = Future()
        threading.Thread(target=self._run, name="earmark-read-ahead", daemon=True).start()

    def _run(self) -> None:
        try:
            self._piece.set_result(self._fetch(self.start, self.end))
        except BaseException as error:  # for whoever asks for the piece
            self._piece.set_exception(error)

    def result(self) -> bytes | None:
        """What ``fetch`` gives or raises, once it is there."""
        return self._piece.result()


class _RangedFile(io.RawIOBase):
    """A remote file, fetched piece by piece; only the last one is kept, and the next if it is due.

    Each piece is asked for until it is whole. fsspec's own caches would keep a short one. From a
    web server that turns out to give no ranges, the rest comes as a stream.
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

    def tell(self) -> int:
        return self._position

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
        """Have the piece that holds the position, and the next one on its way."""
        ahead, self._ahead = self._ahead, None
        end = self._start + len(self._block)
        self._block = b""  # before the next is there, so that two are held at most
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
            piece = ahead.result() if ahead is not None else self._ask_for(start, end)
            if piece is not None:
                return piece
            if self._only_ranges:
                raise _no_ranges(self._url)
        if self._stream is None or self._stream.tell() != start:
            self._close_stream()
            self._stream = _StreamedFile(self._url, self._size, self._content, start)
        return self._stream.read(end - start) or b""

    def _fetch(self, start: int, end: int) -> bytes | None:
        """Bytes ``start`` to ``end``, all of them; None if the server gives no ranges."""
        generation = (getattr(self._file, "details", None) or {}).get("generation")
        if generation:  # Google's; with it, another object of the same name is not found
            fs, path = self._file.fs, self._file.path
            try:
                data = fs.cat_file(path, start=start, end=end, generation=generation)
            except FileNotFoundError:
                raise FileNotFoundError("it has been changed or removed meanwhile") from None
        else:
            try:
                data = self._file._fetch_range(start, end)
            except ValueError:
                if protocol(self._url) in READ_ONLY and start > 0:
                    return None
                raise
        if len(data) != end - start:
            raise ShortBodyError(
                f"of bytes {start} to {end} of {self._size}, {len(data)} have come"
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
    """A remote file that comes as one stream, up to its ``size`` if that is known.

    A stream that breaks is opened anew and wound on to where it broke; a file that is not the same
    by then is an error.
    """

    def __init__(self, url: str, size: int | None, content: _WebContent, position: int = 0) -> None:
        super().__init__()
        self._url, self._size, self._content = url, size, content
        self._position = position
        self._file = ask_file(url, self._open)

    def _open(self) -> Any:
        fs, path = open_filesystem(self._url)
        self._fs = fs  # an archive's file system closes the archive when nobody refers to it
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
