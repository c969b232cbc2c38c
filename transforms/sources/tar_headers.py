"""The headers of a tar: where its members lie, found by walking from one header to the next.

Part of ``sources``, below ``tar_source``. The headers are walked here rather than by
``tarfile.open``, which takes an invalid header in the middle for the end of the archive and says
nothing; single headers are still parsed by ``tarfile``. An archive is whole only if zero blocks end
it.

Where a member begins, only the header before it says: what looks like a header may be the content
of a member, such as another tar. So a walk goes one by one, which in a remote archive is a request
each. ``walk_wide`` asks many at once all the same: it guesses where headers lie, walks on from each
guess, and then uses of that only what the walk from the first header reaches. What comes of it is
what one walk alone would give, whatever the members hold.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

from transforms.errors import ContainerError
from transforms.sources.fetching import ReadLimits
from transforms.sources.file_kinds import extension
from transforms.storage import reading, urls

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENDED_HEADER = 1 << 20  # long names and pax records; real ones have a few hundred bytes
MAX_NAME_CHARS = 4096  # no system has longer paths
_MAX_SIZE = 1 << 62
# A compressed tar may be all silence as long as it stays below this.
_MIN_EXPANDED_BYTES = 1 << 30
_WALK_BLOCK_BYTES = 64 << 10
_SKIP_BYTES = 1 << 20

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
    """A member as its headers describe it.

    Attributes:
        name: As stored; bytes that are not UTF-8 are kept as lone surrogates. One of more than
            4096 characters is its beginning and a digest: such a member is not read.
        kind: ``file``, ``folder``, ``symbolic link`` and so on.
        size: Bytes of its content.
        start: Where its first header begins, extended headers included.
        stop: One past its last block.
    """

    name: str
    kind: str
    size: int
    start: int
    stop: int


# --- Walking -------------------------------------------------------------------------------


class Archive:
    """The bytes of a (decompressed) tar from a position on; every error a ContainerError.

    Args:
        file: The bytes.
        uri: For messages.
        can_seek: Whether ``file`` can.
        compressed: The file that they are decompressed from, if they are.
        max_expansion: Bytes that may come of a compressed one, once 1 GiB have.
    """

    def __init__(
        self,
        file: BinaryIO,
        uri: str,
        *,
        can_seek: bool,
        compressed: BinaryIO | None = None,
        max_expansion: float = ReadLimits().max_expansion,
    ) -> None:
        self._file = file
        self._uri = uri
        self._compressed = compressed
        self._max_expansion = max_expansion
        self.can_seek = can_seek
        self.position = 0
        self.global_headers = False

    def error(self, message: str) -> ContainerError:
        """What is wrong with the archive, with its name."""
        return ContainerError(f"{self._uri}: {message}")

    def read(self, size: int) -> bytes:
        """``size`` bytes, or fewer at the end."""
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
        """``size`` bytes of ``what``; an end before that is an error."""
        data = self.read(size)
        if len(data) < size:
            raise self.error(f"ends at byte {self.position}, inside {what}")
        return data

    def move_to(self, position: int) -> None:
        """Go forward (or anywhere, if it can seek); past the end, nothing is left to read."""
        if self.can_seek:
            try:
                self._file.seek(position)
            except OSError as error:
                raise self.error(f"cannot be read past byte {self.position}: {error}") from error
            self.position = position
        while self.position < position:
            if not self.read(min(_SKIP_BYTES, position - self.position)):
                raise self.error(f"ends at byte {self.position}, before {position}")

    def copy_to(self, target: BinaryIO, size: int, what: str) -> None:
        """Copy ``size`` bytes of ``what`` into a file."""
        while size:
            part = self.read_exactly(min(size, _SKIP_BYTES), what)
            target.write(part)
            size -= len(part)


@contextmanager
def open_archive(
    url: str, uri: str, max_expansion: float, *, to_walk: bool = False, stop: int | None = None
) -> Iterator[Archive]:
    """The archive at byte 0, decompressed if its first bytes are those of gzip.

    Args:
        url: Where it lies.
        uri: Its name in messages.
        max_expansion: As for ``Archive``.
        to_walk: Only headers are read, here and there.
        stop: Where what is to be read ends.
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
                yield Archive(
                    cast(BinaryIO, plain),
                    uri,
                    can_seek=False,
                    compressed=file,
                    max_expansion=max_expansion,
                )
        else:
            yield Archive(file, uri, can_seek=file.seekable())


def walk_members(archive: Archive, stop: int | None) -> Iterator[TarMember]:
    """The members from the archive's position to ``stop``; the caller may read a member's bytes.

    Raises:
        ContainerError: What follows is neither a header nor the end of an archive.
    """
    ended = False  # zero blocks came since the last member
    start = archive.position
    extended: dict[str, str] = {}
    while stop is None or archive.position < stop:
        block = archive.read(_BLOCK)
        if len(block) < _BLOCK:
            if ended and not block.strip(b"\0"):
                return
            raise archive.error(
                f"ends at byte {archive.position} without the zero blocks that end an archive; it "
                "was probably cut short"
            )
        if not block.strip(b"\0"):
            if extended:
                raise archive.error(f"a member is missing at byte {start}, after its name")
            ended, start = True, archive.position
            continue
        ended = False
        info = _parse_header(archive, block)
        if info.type in _EXTENDED:
            extended |= _read_extended(archive, info)
            continue
        member = _make_member(archive, info, block, extended, start)
        yield member
        archive.move_to(member.stop)
        start, extended = member.stop, {}


def _parse_header(archive: Archive, block: bytes) -> tarfile.TarInfo:
    at = archive.position - _BLOCK
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise archive.error(f"what is at byte {at} is not a tar header ({error})") from error
    if not 0 <= info.size < _MAX_SIZE:
        raise archive.error(f"the header at byte {at} gives a size of {info.size} bytes")
    return info


def _read_extended(archive: Archive, info: tarfile.TarInfo) -> dict[str, str]:
    """What a GNU long name or a pax header says of the member that follows."""
    if info.size > _MAX_EXTENDED_HEADER:
        raise archive.error(
            f"the extended header at byte {archive.position - _BLOCK} has {info.size} bytes; "
            f"at most {_MAX_EXTENDED_HEADER} are read"
        )
    data = archive.read_exactly(padded(info.size), "an extended header")[: info.size]
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return {"linkpath": ""}
    records = _parse_pax(archive, data)
    if info.type == tarfile.XGLTYPE:
        # It speaks of all members that follow; what git and others put there is a comment.
        archive.global_headers = archive.global_headers or bool(records.keys() - {"comment"})
        return {"comment": ""}
    return {"pax": "", **records}


def _parse_pax(archive: Archive, data: bytes) -> dict[str, str]:
    records = {}
    data, at = data.rstrip(b"\0"), 0
    while at < len(data):
        # A record is "length key=value\n"; its length counts all of it.
        digits = data[at : at + 11].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) + 2 < length <= len(data) - at:
            raise archive.error(f"the pax header before byte {archive.position} is damaged")
        record = data[at + len(digits) + 1 : at + length - 1]
        key, _, value = record.decode("utf-8", "surrogateescape").partition("=")
        records[key] = value
        at += length
    return records


def _make_member(
    archive: Archive, info: tarfile.TarInfo, block: bytes, extended: dict[str, str], start: int
) -> TarMember:
    kind = _KINDS.get(info.type, "special file")
    if kind == "sparse file" and block[482]:
        while archive.read_exactly(_BLOCK, "a header")[504]:
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
        name = _short_name(name)
    data = 0 if kind in _KINDS_WITHOUT_DATA else padded(size)
    return TarMember(name, kind, size, start, archive.position + data)


def _short_name(name: str) -> str:
    """What stands for a name that is too long: how it begins, a digest, and its extension."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name[:64]}…{digest[:16]}{extension(name)[:16]}"


def padded(size: int) -> int:
    """The bytes that content of ``size`` bytes takes in an archive."""
    return -(-size // _BLOCK) * _BLOCK


# --- Walking in many places at once ----------------------------------------------------------

# Below this, a single walk is soon done.
_MIN_WIDE_BYTES = 256 << 20
_MAX_STRETCHES = 128
_MIN_STRETCH_BYTES = 16 << 20
_WALK_THREADS = 32
# How far a header is looked for. In members that are larger, one walk alone makes long steps.
_SCAN_BYTES = 64 << 20
_MAGIC_AT = 257  # where a header says "ustar"


def is_wide(url: str, size: int | None) -> bool:
    """Whether an archive takes so many requests that they are better made at once."""
    return size is not None and size >= _MIN_WIDE_BYTES and not urls.is_local(url)


def walk_wide(
    archive: Archive, open_another: Callable[[], AbstractContextManager[Archive]], size: int
) -> Iterator[TarMember]:
    """The members of a whole archive, as ``walk_members`` gives them, found in many places at once.

    Args:
        archive: At byte 0, and able to seek.
        open_another: Opens the same archive once more.
        size: Bytes of the archive.

    Raises:
        ContainerError: What follows is neither a header nor the end of an archive.
    """
    step = padded(max(_MIN_STRETCH_BYTES, -(-size // _MAX_STRETCHES)))
    bounds = [(low, low + step) for low in range(0, size, step)]
    pool = ThreadPoolExecutor(_WALK_THREADS, "earmark-tar")
    try:
        guesses = pool.map(lambda bound: _guess_stretch(open_another, *bound), bounds)
        position = 0  # where the next member begins, as far as is known for certain
        for (_, high), guess in zip(bounds, guesses, strict=True):
            numbers = {member.start: number for number, member in enumerate(guess.members)}
            while position < high:
                if position in numbers:
                    yield from guess.members[numbers[position] :]
                    position = guess.members[-1].stop
                    if guess.is_end:
                        return
                    continue
                archive.move_to(position)
                member = next(walk_members(archive, None), None)
                if member is None:
                    return
                yield member
                position = member.stop
        archive.move_to(position)
        yield from walk_members(archive, None)  # the archive has grown, or is cut short
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What a walk from a guessed header has found.

    Attributes:
        members: They follow one another without a gap; whether they are members is not certain.
        is_end: The archive ends behind the last of them.
    """

    members: tuple[TarMember, ...] = ()
    is_end: bool = False


def _guess_stretch(
    open_another: Callable[[], AbstractContextManager[Archive]], low: int, high: int
) -> _Stretch:
    """Members that seem to begin from byte ``low`` up to byte ``high``."""
    members: list[TarMember] = []
    is_end = True
    try:
        with open_another() as archive:
            start = _find_header(archive, low, min(high, low + _SCAN_BYTES))
            if start is None:
                return _Stretch()
            archive.move_to(start)
            for member in walk_members(archive, None):
                if member.start >= high:
                    is_end = False
                    break
                members.append(member)
            if archive.global_headers:
                return _Stretch()  # they count only where they are met for certain
    except ContainerError:
        is_end = False  # the walk that gets here for certain will say what is wrong
    return _Stretch(tuple(members), is_end and bool(members))


def _find_header(archive: Archive, low: int, high: int) -> int | None:
    """The first block from byte ``low`` on that could be a header; None if there is none."""
    position = low
    while position < high:
        archive.move_to(position)
        data = archive.read(min(_SKIP_BYTES, high - position))
        at = data.find(b"ustar")
        while at >= 0:
            block = data[at - _MAGIC_AT : at - _MAGIC_AT + _BLOCK]
            if at % _BLOCK == _MAGIC_AT and len(block) == _BLOCK and _is_header(block):
                return position + at - _MAGIC_AT
            at = data.find(b"ustar", at + 1)
        if len(data) < _SKIP_BYTES:
            return None
        position += len(data)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
