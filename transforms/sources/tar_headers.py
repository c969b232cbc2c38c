"""The headers of a tar: where its members are, found by walking from one header to the next.

``tarfile`` parses single headers. The walk and the extended headers are parsed here, because
``tarfile`` silently takes an invalid header for the end of the archive, keeps damaged pax records,
and before Python 3.11.10 needs hours for one pax header of a megabyte (CVE-2024-6232).

Only the header before a member tells where it begins: what looks like a header may be the content
of a member, such as another tar. So a walk goes step by step.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

from transforms.errors import ContainerError
from transforms.sources.file_kinds import extension
from transforms.storage import reading

BLOCK_BYTES = tarfile.BLOCKSIZE
_MAX_EXTENDED_BYTES = 1 << 20  # long names and pax records; real ones have a few hundred bytes
MAX_NAME_CHARS = 4096  # no system has longer paths
_MAX_SIZE = 1 << 62
# A compressed tar may be all silence as long as it stays below this.
_MIN_EXPANDED_BYTES = 1 << 30
_WALK_BLOCK_BYTES = 64 << 10
SKIP_BYTES = 1 << 20

_KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "pipe",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}
LONG_NAME = "file with a long name"
_KINDS_WITHOUT_DATA = frozenset({"folder", "symbolic link", "hard link", "device", "pipe"})
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member, by its headers.

    Attributes:
        name: Name as stored; bytes that are not UTF-8 are lone surrogates. A name of more than
            4096 characters is shortened with a digest, and such a member is not read.
        size: Bytes of its content.
        start: Where its first header begins, extended headers included.
        stop: One past its last block.
    """

    name: str
    kind: str
    size: int
    start: int
    stop: int


class Archive:
    """The bytes of a (decompressed) tar from a position on; every error is a ContainerError.

    ``compressed`` is the file that they are decompressed from, if any. ``max_expansion`` is the
    decompressed bytes allowed per compressed byte, beyond the first GiB.
    """

    def __init__(
        self, file: BinaryIO, uri: str, compressed: BinaryIO | None, max_expansion: float
    ) -> None:
        self._file = file
        self._uri = uri
        self._compressed = compressed
        self._max_expansion = max_expansion
        self.can_seek = compressed is None and file.seekable()
        self.position = 0
        self.global_headers = False  # whether there are headers for all members that follow

    def error(self, message: str) -> ContainerError:
        """Make an error with the archive's name."""
        return ContainerError(f"{self._uri}: {message}")

    def read(self, size: int) -> bytes:
        """Read ``size`` bytes, or fewer at the end."""
        parts = []
        missing = size
        try:
            while missing and (part := self._file.read(missing)):
                parts.append(part)
                missing -= len(part)
        except (OSError, EOFError, zlib.error) as error:
            raise self.error(f"cannot be read past byte {self.position}: {error}") from error
        self.position += size - missing
        self._check_expansion()
        return b"".join(parts)

    def _check_expansion(self) -> None:
        if self._compressed is None or self.position <= _MIN_EXPANDED_BYTES:
            return
        num_bytes = self._compressed.tell()
        if self.position > self._max_expansion * num_bytes:
            raise self.error(
                f"{num_bytes} compressed bytes gave {self.position}; at most "
                f"{self._max_expansion:g} per byte are allowed; to allow more, raise "
                "read.max_expansion"
            )

    def read_exactly(self, size: int, what: str) -> bytes:
        """Read ``size`` bytes of ``what``; fewer are an error."""
        data = self.read(size)
        if len(data) < size:
            raise self.error(f"ends at byte {self.position}, inside {what}")
        return data

    def move_to(self, position: int) -> None:
        """Move forward, or anywhere if the file can seek."""
        if self.can_seek:
            try:
                self._file.seek(position)
            except OSError as error:
                raise self.error(f"cannot be read past byte {self.position}: {error}") from error
            self.position = position
        while self.position < position:
            if not self.read(min(SKIP_BYTES, position - self.position)):
                raise self.error(f"ends at byte {self.position}, before {position}")

    def copy_to(self, target: BinaryIO, size: int, what: str) -> None:
        """Copy ``size`` bytes of ``what`` to a file."""
        while size:
            part = self.read_exactly(min(size, SKIP_BYTES), what)
            target.write(part)
            size -= len(part)


@contextmanager
def open_archive(
    url: str, uri: str, max_expansion: float, *, to_walk: bool = False, stop: int | None = None
) -> Iterator[Archive]:
    """Open an archive at byte 0, decompressed if its first bytes are those of gzip.

    ``to_walk`` means that only headers will be read: small blocks are requested. The caller reads
    no byte from ``stop`` on.
    """
    try:
        file = reading.open_read(url, _WALK_BLOCK_BYTES if to_walk else None, stop)
    except OSError as error:
        raise ContainerError(f"{uri}: {error.strerror or error}") from error
    with file:
        try:
            is_gzip = cast(bytes, file.peek(2)[:2]) == b"\x1f\x8b"  # type: ignore[attr-defined]
        except OSError as error:
            raise ContainerError(f"{uri}: cannot be read: {error}") from error
        if is_gzip:
            with gzip.GzipFile(fileobj=file, mode="rb") as plain:
                yield Archive(cast(BinaryIO, plain), uri, file, max_expansion)
        else:
            yield Archive(file, uri, None, max_expansion)


def walk_members(archive: Archive, stop: int | None) -> Iterator[TarMember]:
    """Yield the members from the archive's position to ``stop``; the caller may read their bytes.

    Raises ``ContainerError`` if a header is damaged or cut short, or no zero blocks are at the end.
    """
    has_end = False  # whether zero blocks follow the last member
    while stop is None or archive.position < stop:
        start = archive.position
        block = archive.read(BLOCK_BYTES)
        if not block.strip(b"\0"):
            if len(block) == BLOCK_BYTES:
                has_end = True
                continue
            if has_end:
                return
        if len(block) < BLOCK_BYTES:
            raise archive.error(
                f"ends at byte {archive.position} without the zero blocks that end an archive; it "
                "was probably cut short"
            )
        has_end = False
        member = _read_member(archive, block, start)
        yield member
        archive.move_to(member.stop)


def _read_member(archive: Archive, block: bytes, start: int) -> TarMember:
    """Parse a member's headers, of which ``block`` is the first."""
    info = _parse_header(archive, block)
    extended: dict[str, str] = {}
    while info.type in _EXTENDED:
        extended |= _read_extended(archive, info, start)
        block = archive.read_exactly(BLOCK_BYTES, "a header")
        if not block.strip(b"\0"):
            raise archive.error(f"a member is missing at byte {start}, after its name")
        info = _parse_header(archive, block)
    kind = _KINDS.get(info.type, "special file")
    if kind == "sparse file" and block[482]:
        while archive.read_exactly(BLOCK_BYTES, "a header")[504]:
            pass  # further maps of a sparse file
    if any(key.startswith("GNU.sparse.") for key in extended):
        kind = "sparse file"
    size = info.size
    if "size" in extended:
        digits = extended["size"]
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
            raise archive.error(f"the pax header before byte {archive.position} is damaged")
        size = int(digits)
    name = extended.get("GNU.sparse.name") or extended.get("path") or info.name
    if len(name) > MAX_NAME_CHARS:
        kind = LONG_NAME if kind == "file" else kind
        name = _shortened(name)
    data = 0 if kind in _KINDS_WITHOUT_DATA else padded(size)
    return TarMember(name, kind, size, start, archive.position + data)


def _parse_header(archive: Archive, block: bytes) -> tarfile.TarInfo:
    at = archive.position - BLOCK_BYTES
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise archive.error(f"what is at byte {at} is not a tar header ({error})") from error
    if not 0 <= info.size < _MAX_SIZE:
        raise archive.error(f"the header at byte {at} gives a size of {info.size} bytes")
    return info


def _read_extended(archive: Archive, info: tarfile.TarInfo, start: int) -> dict[str, str]:
    """Read what a GNU long name or a pax header says of the member that begins at ``start``."""
    num_bytes = archive.position - BLOCK_BYTES - start + info.size
    if num_bytes > _MAX_EXTENDED_BYTES:
        raise archive.error(
            f"the member at byte {start} has {num_bytes} bytes of extended headers; at most "
            f"{_MAX_EXTENDED_BYTES} are read"
        )
    data = archive.read_exactly(padded(info.size), "an extended header")[: info.size]
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    records = _parse_pax(archive, data)
    if info.type == tarfile.XGLTYPE:
        # It concerns all members that follow, unless it is only a comment, as git writes it.
        archive.global_headers = archive.global_headers or bool(records.keys() - {"comment"})
        return {}
    return records


def _parse_pax(archive: Archive, data: bytes) -> dict[str, str]:
    records = {}
    data, at = data.rstrip(b"\0"), 0
    while at < len(data):
        # A record is "length key=value\n", where the length is that of the whole record.
        digits = data[at : at + 11].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) + 2 < length <= len(data) - at:
            raise archive.error(f"the pax header before byte {archive.position} is damaged")
        record = data[at + len(digits) + 1 : at + length - 1]
        key, _, value = record.decode("utf-8", "surrogateescape").partition("=")
        records[key] = value
        at += length
    return records


def _shortened(name: str) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name[:64]}…{digest[:16]}{extension(name)[:16]}"


def padded(size: int) -> int:
    """Return the bytes that content of ``size`` bytes takes in an archive."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
