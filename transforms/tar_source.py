"""Items of a tar: where its members lie, how to cut it, and reading a slice of it.

Part of ``sources``. The headers are walked here rather than by ``tarfile.open``, which takes an
invalid header in the middle for the end of the archive and says nothing; single headers are still
parsed by ``tarfile``. An archive is whole only if zero blocks end it. Nothing is ever extracted by
name: links, devices and folders are not followed, and a member's name is only a name.

Siblings (``.json``, ``.txt``, ``.cls``) belong to the audio with the same WebDataset key: the
name up to the first dot after its last slash. Neighbours with the same key make a **group**; an
archive is only ever cut between groups.

What a tar may take is bounded whatever it says of itself: an item that is too large is passed over
without being kept, what is read of a group's siblings and of names has a bound, and so has what a
compressed tar may expand to.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from transforms import storage
from transforms.clip_ids import (
    WindowEstimate,
    extension,
    for_terminal,
    is_audio_name,
    make_clip_id,
    make_metadata,
    make_truth,
    occurrence_of,
    printable,
    read_failure,
)
from transforms.errors import ContainerError, ReadError
from transforms.records import ContainerSlice, EncodedClip, Failure, Item
from transforms.spooling import ReadLimits, check_item_size, second_name, spool

logger = logging.getLogger(__name__)

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENDED_HEADER = 1 << 20  # long names and pax records; real ones have a few hundred bytes
_MAX_NAME_CHARS = 4096  # no system has longer paths
_MAX_SIZE = 1 << 62
# What is read of the siblings of one group; beyond that, the metadata only says how large they are.
_MAX_SIDECAR_BYTES = 4 << 20
_MAX_SIDECARS = 1000
# Files named like "take1.5_001.wav" all have the key "take1". Past this many audio members, a
# group ends where the name without its last extension changes, or with the next audio.
_MAX_GROUP = 64
# A compressed tar may be all silence as long as it stays below this.
_MIN_EXPANDED_BYTES = 1 << 30
_WALK_BLOCK_BYTES = 64 << 10
_SKIP_BYTES = 1 << 20
_SIDECARS = frozenset({".json", ".txt", ".cls"})

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
_LONG_NAME = "file with a long name"
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


@dataclass(frozen=True, slots=True)
class TarGroup:
    """Neighbours with the same key that hold at least one item.

    Attributes:
        start: Byte where the group begins.
        names: Names of the items in it, in order.
        starts: Where each item's member begins.
        windows: Windows expected of them.
        size: Bytes of them.
    """

    start: int
    names: tuple[str, ...]
    starts: tuple[int, ...]
    windows: int
    size: int


@dataclass(frozen=True, slots=True)
class TarIndex:
    """What a walk over the headers found.

    Attributes:
        groups: In order.
        can_cut: Whether slices read by themselves hold the same as the whole.
        damage: What broke the walk off, or None.
    """

    groups: tuple[TarGroup, ...]
    can_cut: bool
    damage: str | None


# --- Walking -------------------------------------------------------------------------------


class _Archive:
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
        while size:
            part = self.read_exactly(min(size, _SKIP_BYTES), what)
            target.write(part)
            size -= len(part)


@contextmanager
def _open_archive(
    url: str, uri: str, max_expansion: float, *, to_walk: bool = False, stop: int | None = None
) -> Iterator[_Archive]:
    """The archive at byte 0, decompressed if its first bytes are those of gzip.

    Args:
        url: Where it lies.
        uri: Its name in messages.
        max_expansion: As for ``_Archive``.
        to_walk: Only headers are read, here and there.
        stop: Where what is to be read ends.
    """
    try:
        file = storage.open_read(url, _WALK_BLOCK_BYTES if to_walk else None, stop)
    except OSError as error:
        raise ContainerError(f"{uri}: {error.strerror or error}") from error
    with file:
        try:
            is_gzip = cast(bytes, file.peek(2)[:2]) == b"\x1f\x8b"  # type: ignore[attr-defined]
        except OSError as error:
            raise ContainerError(f"{uri}: cannot be read: {error}") from error
        if is_gzip:
            with gzip.GzipFile(fileobj=file, mode="rb") as plain:
                yield _Archive(
                    cast(BinaryIO, plain),
                    uri,
                    can_seek=False,
                    compressed=file,
                    max_expansion=max_expansion,
                )
        else:
            yield _Archive(file, uri, can_seek=file.seekable())


def _members(archive: _Archive, stop: int | None) -> Iterator[TarMember]:
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


def _parse_header(archive: _Archive, block: bytes) -> tarfile.TarInfo:
    at = archive.position - _BLOCK
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise archive.error(f"what is at byte {at} is not a tar header ({error})") from error
    if not 0 <= info.size < _MAX_SIZE:
        raise archive.error(f"the header at byte {at} gives a size of {info.size} bytes")
    return info


def _read_extended(archive: _Archive, info: tarfile.TarInfo) -> dict[str, str]:
    """What a GNU long name or a pax header says of the member that follows."""
    if info.size > _MAX_EXTENDED_HEADER:
        raise archive.error(
            f"the extended header at byte {archive.position - _BLOCK} has {info.size} bytes; "
            f"at most {_MAX_EXTENDED_HEADER} are read"
        )
    data = archive.read_exactly(_blocks(info.size), "an extended header")[: info.size]
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


def _parse_pax(archive: _Archive, data: bytes) -> dict[str, str]:
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
    archive: _Archive, info: tarfile.TarInfo, block: bytes, extended: dict[str, str], start: int
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
    if len(name) > _MAX_NAME_CHARS:
        kind = _LONG_NAME if kind == "file" else kind
        name = _short_name(name)
    data = 0 if kind in _KINDS_WITHOUT_DATA else _blocks(size)
    return TarMember(name, kind, size, start, archive.position + data)


def _short_name(name: str) -> str:
    """What stands for a name that is too long: how it begins, a digest, and its extension."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name[:64]}…{digest[:16]}{extension(name)[:16]}"


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _key_and_rest(name: str) -> tuple[str, str]:
    """WebDataset's key and what follows its dot: ``a/b.c/d.e.wav`` → ``a/b.c/d``, ``e.wav``."""
    folder, slash, base = name.rpartition("/")
    key, _, rest = base.partition(".")
    return folder + slash + key, rest


def _stem(name: str) -> str:
    return name[: len(name) - len(extension(name))]


class _Grouping:
    """Says where a group ends; the same for planning and for reading, from any boundary on."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._stem = ""
        self._num_items = 0

    def starts_new(self, member: TarMember) -> bool:
        """Whether ``member`` begins a new group; to be asked of every member in order."""
        key, stem = _key_and_rest(member.name)[0], _stem(member.name)
        is_new = self._key is not None and (
            key != self._key
            or (self._num_items >= _MAX_GROUP and (stem != self._stem or is_item(member)))
        )
        self._num_items = (0 if is_new else self._num_items) + is_item(member)
        self._key, self._stem = key, stem
        return is_new


def is_item(member: TarMember) -> bool:
    """Whether a member is an item: audio by its name, whatever stands behind the name."""
    return member.kind != "folder" and is_audio_name(member.name)


def index_tar(
    url: str,
    uri: str,
    estimate: WindowEstimate,
    max_items: int | None = None,
    *,
    max_expansion: float = ReadLimits().max_expansion,
) -> TarIndex:
    """Walk over the headers of a tar (of a compressed one: read it) and find where its items lie.

    Damage ends the walk, and so does having found more than ``max_items`` items; what lies before
    is given.
    """
    groups: list[TarGroup] = []
    pending: list[TarMember] = []
    whole_keys = _KeyHalves()
    damage = None
    has_global_headers = False
    try:
        with _open_archive(url, uri, max_expansion, to_walk=True) as archive:
            grouping, num_items = _Grouping(), 0
            for member in _members(archive, None):
                if grouping.starts_new(member):
                    groups += _index_group(pending, estimate)
                    whole_keys.add(pending)
                    num_items += sum(is_item(one) for one in pending)
                    pending = []
                    if max_items is not None and num_items > max_items:
                        break
                pending.append(member)
                has_global_headers = archive.global_headers
    except ContainerError as error:
        damage = str(error)
    groups += _index_group(pending, estimate)
    whole_keys.add(pending)
    can_cut = not has_global_headers and not whole_keys.torn()
    return TarIndex(tuple(groups), can_cut, damage)


def _index_group(members: list[TarMember], estimate: WindowEstimate) -> list[TarGroup]:
    items = [member for member in members if is_item(member)]
    if not items:
        return []
    return [
        TarGroup(
            members[0].start,
            tuple(member.name for member in items),
            tuple(member.start for member in items),
            sum(estimate.of_file(member.name, member.size) for member in items),
            sum(member.size for member in items),
        )
    ]


class _KeyHalves:
    """Finds keys whose audio and siblings are not neighbours (a tar of an unsorted folder)."""

    def __init__(self) -> None:
        self._audio_only: set[str] = set()
        self._sidecars_only: set[str] = set()

    def add(self, group: list[TarMember]) -> None:
        if not group:
            return
        has_audio = any(is_item(member) for member in group)
        has_sidecars = any(_is_sidecar(member) for member in group)
        if has_audio != has_sidecars:
            keys = self._audio_only if has_audio else self._sidecars_only
            keys.add(_key_and_rest(group[0].name)[0])

    def torn(self) -> set[str]:
        return self._audio_only & self._sidecars_only


def _is_sidecar(member: TarMember) -> bool:
    return member.kind == "file" and extension(member.name) in _SIDECARS


# --- Reading -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Held:
    """An audio member whose group is not yet complete."""

    member: TarMember
    occurrence: int
    data: bytes | None = None
    path: str | None = None


@dataclass(slots=True)
class _Group:
    held: list[_Held] = field(default_factory=list)
    sidecars: dict[str, bytes] = field(default_factory=dict)
    num_bytes: int = 0
    sidecar_bytes: int = 0

    def discard(self) -> None:
        for one in self.held:
            if one.path is not None:
                Path(one.path).unlink(missing_ok=True)


# Kinds of members that this process has said it leaves aside.
_left_aside: set[str] = set()


class TarReader:
    """Reads the items of one slice, in one pass.

    Args:
        part: The slice.
        wanted: Items to read, by name and occurrence; empty means all there are.
        limits: What reading may take.
    """

    def __init__(
        self, part: ContainerSlice, wanted: tuple[Item, ...], limits: ReadLimits | None = None
    ) -> None:
        self._part = part
        self._limits = limits or ReadLimits()
        self._seen = Counter(part.seen_names)
        self._reads_all = not wanted
        self._wanted: dict[tuple[str, int], list[Item]] = {}
        for item in wanted:
            self._wanted.setdefault((item.member or "", occurrence_of(item)), []).append(item)
        self._torn: dict[str, list[TarMember]] = {}
        self._num_items = 0

    def read(self) -> Iterator[EncodedClip | Failure]:
        """The items of the slice, then what was asked for and not there, then what is broken."""
        group = _Group()
        damage: ContainerError | None = None
        try:
            try:
                self._torn = self._torn_sidecars()
                with self._open() as archive:
                    archive.move_to(self._part.start)
                    grouping = _Grouping()
                    for member in _members(archive, self._part.stop):
                        if grouping.starts_new(member):
                            complete, group = group, _Group()
                            yield from self._emit(complete)
                        self._hold(group, member, archive)
            except ContainerError as error:
                damage = error
            complete, group = group, _Group()
            yield from self._emit(complete)
        finally:
            group.discard()
        yield from self._not_found(damage)
        if damage is not None:
            yield read_failure(self._container_item(), damage, is_container=True)
        elif self._num_items == 0 and self._is_whole() and self._reads_all:
            empty = ContainerError(f"{self._part.uri}: no member has an audio or video extension")
            yield read_failure(self._container_item(), empty, is_container=True)

    def _open(self) -> AbstractContextManager[_Archive]:
        part = self._part
        return _open_archive(part.url, part.uri, self._limits.max_expansion, stop=part.stop)

    def _hold(self, group: _Group, member: TarMember, archive: _Archive) -> None:
        if _is_sidecar(member) and len(group.sidecars) < _MAX_SIDECARS:
            group.sidecars[member.name] = _read_sidecar(archive, member, group.sidecar_bytes)
            group.sidecar_bytes += len(group.sidecars[member.name])
        if not is_item(member):
            self._say_left_aside(member)
            return
        self._seen[member.name] += 1
        occurrence = self._seen[member.name]
        if not self._reads_all and (printable(member.name), occurrence) not in self._wanted:
            return
        held = _Held(member, occurrence)
        if self._refusal(member) is None:
            what = printable(repr(member.name))
            if group.num_bytes + member.size > self._limits.spool_bytes:
                held.path = _spool(archive, member, what)
            else:
                held.data = archive.read_exactly(member.size, what)
                group.num_bytes += member.size
        group.held.append(held)

    def _refusal(self, member: TarMember) -> ReadError | None:
        """Why an audio member is not read; None if it is."""
        if member.kind == _LONG_NAME:
            return ReadError(
                f"the member's name has more than {_MAX_NAME_CHARS} characters, and is cut here; "
                "give it a shorter one"
            )
        if member.kind != "file":
            return ReadError(f"the member is a {member.kind}; only regular files are read")
        try:
            check_item_size(member.size, self._limits)
        except ReadError as error:
            return error
        return None

    def _say_left_aside(self, member: TarMember) -> None:
        """Once for each kind, or a thousand shards with the same siblings would drown all else."""
        ending = extension(member.name) or "(no extension)"
        if member.kind == "file" and not _is_sidecar(member) and ending not in _left_aside:
            _left_aside.add(ending)
            logger.info(
                "%s: members of other kinds are left aside: %s, the first is %r",
                for_terminal(self._part.uri),
                for_terminal(ending),
                for_terminal(member.name),
            )

    def _emit(self, group: _Group) -> Iterator[EncodedClip | Failure]:
        held = group.held
        try:
            while held:
                one = held[0]
                items = self._items_of(one, group)
                self._num_items += len(items)
                refusal = self._refusal(one.member)
                if refusal is not None:
                    yield from (read_failure(item, refusal) for item in items)
                elif one.data is not None:
                    yield from (EncodedClip(item, data=one.data) for item in items)
                else:
                    for item in items[:-1]:
                        copy = second_name(cast(str, one.path))
                        yield EncodedClip(item, path=copy, delete_path=True)
                    path, one.path = cast(str, one.path), None
                    yield EncodedClip(items[-1], path=path, delete_path=True)
                held.pop(0)
        finally:
            group.discard()

    def _items_of(self, one: _Held, group: _Group) -> list[Item]:
        """The items that a member stands for: one, or those that a manifest asked for."""
        part, name = self._part, one.member.name
        truth, metadata = self._describe(name, group)
        if self._reads_all:
            clip_id = make_clip_id(part.uri, name, one.occurrence)
            return [
                Item(
                    clip_id=clip_id,
                    uri=part.uri,
                    member=printable(name),
                    truth=truth,
                    metadata=metadata,
                    size=part.size,
                    version=part.version,
                )
            ]
        items = self._wanted.pop((printable(name), one.occurrence))
        return [_described(item, truth, metadata) for item in items]

    def _describe(self, name: str, group: _Group) -> tuple[tuple[str, ...] | None, str | None]:
        """Labels and metadata of the audio member ``name``, from its siblings."""
        key = _key_and_rest(name)[0]
        sidecars = {**self._read_torn(key), **group.sidecars}
        stems = {_stem(one.member.name) for one in group.held}
        values: dict[str, object] = {}
        truth = None
        # The audio's own sibling comes first, then those of the key as a whole.
        for sidecar in sorted(sidecars, key=lambda one: _stem(one) != _stem(name)):
            data = sidecars[sidecar]
            rest = _key_and_rest(sidecar)[1]
            own = _stem(sidecar) == _stem(name)
            if not own and "." in rest and _stem(sidecar) in stems:
                continue  # it is another member's
            is_plain = own or "." not in rest
            value = _parse_sidecar(extension(sidecar), data)
            if is_plain and extension(sidecar) == ".json" and isinstance(value, dict):
                values = {**value, **values}
                if truth is None:
                    truth = make_truth(value.get("labels"), value.get("label"))
            else:
                values.setdefault(extension(sidecar)[1:] if is_plain else rest, value)
        return truth, make_metadata(values)

    def _torn_sidecars(self) -> dict[str, list[TarMember]]:
        """Siblings that are not neighbours of their audio, by key; for a whole tar one can seek.

        A tar that is cut has none (``index_tar`` looks), and to look for them in a compressed or
        a remote one would mean to read it twice.
        """
        part = self._part
        if not self._is_whole() or not storage.is_local(part.url):
            return {}
        halves = _KeyHalves()
        sidecars: list[TarMember] = []
        with self._open() as archive:
            if not archive.can_seek:
                return {}
            with suppress(ContainerError):  # the pass that reads the items says so
                self._collect_halves(archive, halves, sidecars)
        keys = halves.torn()
        torn: dict[str, list[TarMember]] = {}
        for member in sidecars:
            key = _key_and_rest(member.name)[0]
            if key in keys:
                torn.setdefault(key, []).append(member)
        return torn

    def _read_torn(self, key: str) -> dict[str, bytes]:
        """The content of a key's siblings that are not neighbours of their audio."""
        found: dict[str, bytes] = {}
        if key not in self._torn:
            return found
        num_bytes = 0
        with self._open() as archive:
            for member in self._torn[key][:_MAX_SIDECARS]:
                with suppress(ContainerError):  # cut short: the pass that reads the items says so
                    archive.move_to(member.stop - _blocks(member.size))
                    found[member.name] = _read_sidecar(archive, member, num_bytes)
                    num_bytes += len(found[member.name])
        return found

    @staticmethod
    def _collect_halves(archive: _Archive, halves: _KeyHalves, sidecars: list[TarMember]) -> None:
        grouping, pending = _Grouping(), list[TarMember]()
        for member in _members(archive, None):
            if grouping.starts_new(member):
                halves.add(pending)
                pending = []
            pending.append(member)
            if _is_sidecar(member):
                sidecars.append(member)
        halves.add(pending)

    def _not_found(self, damage: ContainerError | None) -> Iterator[Failure]:
        until = "" if damage is None else ", as far as it can be read"
        for items in self._wanted.values():
            for item in items:
                text = f"{item.uri} has no audio member named {item.member!r}{until}"
                yield read_failure(item, ReadError(text))

    def _is_whole(self) -> bool:
        return self._part.start == 0 and self._part.stop is None

    def _container_item(self) -> Item:
        return container_item(self._part, "bytes")


def container_item(part: ContainerSlice, unit: str) -> Item:
    """The item that stands for a slice of a container which cannot be read to its end."""
    is_whole = part.start == 0 and part.stop is None
    stop = "" if part.stop is None else part.stop
    slice_name = None if is_whole else f"{unit}={part.start}-{stop}"
    return Item(
        clip_id=make_clip_id(part.uri, slice_name),
        uri=part.uri,
        url=part.url,
        size=part.size,
        version=part.version,
    )


def _described(item: Item, truth: tuple[str, ...] | None, metadata: str | None) -> Item:
    """A manifest's item with its siblings' description where the manifest gives none."""
    return Item(
        clip_id=item.clip_id,
        uri=item.uri,
        member=item.member,
        start_s=item.start_s,
        end_s=item.end_s,
        truth=truth if item.truth is None else item.truth,
        metadata=metadata if item.metadata is None else item.metadata,
        size=item.size,
        version=item.version,
    )


def _read_sidecar(archive: _Archive, member: TarMember, num_bytes: int) -> bytes:
    """A sibling's content, or how large it is where ``num_bytes`` leave no room for it."""
    if num_bytes + member.size > _MAX_SIDECAR_BYTES:
        return f"<{member.size} bytes>".encode()
    return archive.read_exactly(member.size, printable(repr(member.name)))


def _parse_sidecar(ending: str, data: bytes) -> object:
    text = data.decode("utf-8-sig", "replace").strip()
    if ending == ".json":
        try:
            value = json.loads(text)
            make_metadata({"value": value})  # nested too deeply to be written again?
        except (ValueError, RecursionError):
            return text
        return value
    if ending == ".cls" and text.isdigit() and len(text) < 18:
        return int(text)
    return text


def _spool(archive: _Archive, member: TarMember, what: str) -> str:
    return spool(member.name, lambda file: archive.copy_to(file, member.size, what))
