"""Tars: their index, which tells where they can be cut, and the items of a slice.

Nothing is extracted by name: links, devices and folders are not followed, and a member's name is
only a name.

Siblings (``.json``, ``.txt``, ``.cls``) belong to the audio with the same WebDataset key: the
name up to the first dot after its last slash. Neighbours with the same key make a **group**, and an
archive is only cut between groups.

Memory is bounded whatever the headers say: an item that is too large is skipped without being
kept, and there are bounds for names, for the siblings of a group and for the expansion of a
compressed tar.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from transforms.errors import ContainerError, ReadError
from transforms.records import ContainerSlice, EncodedClip, Failure, Item
from transforms.sources.clip_ids import (
    for_terminal,
    make_clip_id,
    make_metadata,
    make_truth,
    occurrence_of,
    printable,
    read_failure,
)
from transforms.sources.fetching import ReadLimits, check_item_size, second_name, spool
from transforms.sources.file_kinds import (
    SIDECAR_EXTENSIONS,
    WindowEstimate,
    extension,
    is_audio_name,
)
from transforms.sources.tar_headers import (
    LONG_NAME,
    MAX_NAME_CHARS,
    Archive,
    TarMember,
    open_archive,
    padded,
    walk_members,
)
from transforms.sources.tar_parallel import is_slow_to_walk, walk_in_parallel
from transforms.storage import urls

logger = logging.getLogger(__name__)

# Of a group's siblings. The metadata gives only the size of those beyond it.
_MAX_SIDECAR_BYTES = 4 << 20
_MAX_SIDECARS = 1000
# Files named like "take1.5_001.wav" all have the key "take1". Past this many audio members, a
# group ends where the name without its last extension changes, or with the next audio.
_MAX_GROUP = 64


@dataclass(frozen=True, slots=True)
class TarGroup:
    """Neighbours with the same key, at least one of which is an item.

    ``starts`` are the bytes where each item's member begins, and ``size`` is that of the items.
    """

    start: int
    names: tuple[str, ...]
    starts: tuple[int, ...]
    windows: int
    size: int


@dataclass(frozen=True, slots=True)
class TarIndex:
    """The groups of a tar, in order.

    ``can_cut`` tells whether its slices, read separately, give the same items as the whole.
    ``damage`` is the error that ended the walk over the headers.
    """

    groups: tuple[TarGroup, ...]
    can_cut: bool
    damage: str | None


# --- Groups and the index -------------------------------------------------------------------


def _key_and_rest(name: str) -> tuple[str, str]:
    """Return WebDataset's key and the rest: ``a/b.c/d.e.wav`` → ``a/b.c/d``, ``e.wav``."""
    folder, slash, base = name.rpartition("/")
    key, _, rest = base.partition(".")
    return folder + slash + key, rest


def _stem(name: str) -> str:
    return name[: len(name) - len(extension(name))]


class _Grouping:
    """Finds the ends of groups, the same in planning and in reading, from any boundary on."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._stem = ""
        self._num_items = 0

    def starts_new(self, member: TarMember) -> bool:
        """Return whether ``member`` begins a new group; to be called for all in order."""
        key, stem = _key_and_rest(member.name)[0], _stem(member.name)
        is_new = self._key is not None and (
            key != self._key
            or (self._num_items >= _MAX_GROUP and (stem != self._stem or is_item(member)))
        )
        self._num_items = (0 if is_new else self._num_items) + is_item(member)
        self._key, self._stem = key, stem
        return is_new


def is_item(member: TarMember) -> bool:
    """Return whether a member is an item: audio by its name, whatever its kind."""
    return member.kind != "folder" and is_audio_name(member.name)


def index_tar(
    url: str,
    uri: str,
    estimate: WindowEstimate,
    max_items: int | None = None,
    *,
    size: int = 0,
    max_expansion: float = ReadLimits().max_expansion,
) -> TarIndex:
    """Walk over the headers of a tar and index its items; a compressed tar is read for that.

    A large remote tar, by its ``size``, is walked with parallel requests. Damage ends the walk, and
    so do more than ``max_items`` items; the index then holds the groups up to there.
    """
    groups: list[TarGroup] = []
    pending: list[TarMember] = []
    whole_keys = _KeyHalves()
    damage = None
    has_global_headers = False
    try:
        open_it = functools.partial(open_archive, url, uri, max_expansion, to_walk=True)
        with open_it() as archive:
            grouping, num_items = _Grouping(), 0
            members = walk_members(archive, None)
            if is_slow_to_walk(url, size) and archive.can_seek and max_items is None:
                members = walk_in_parallel(archive, open_it, size)
            for member in members:
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
    """Finds keys whose audio and siblings are not neighbours, as in a tar of an unsorted folder."""

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
    return member.kind == "file" and extension(member.name) in SIDECAR_EXTENSIONS


# --- Reading -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Held:
    """An audio member whose group is not complete yet."""

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


_logged_extensions: set[str] = set()


class TarReader:
    """Reads the items of one slice, in one pass; an empty ``wanted`` means all."""

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
        """Yield the items of the slice, then failures of missing items and of the container."""
        group = _Group()
        damage: ContainerError | None = None
        try:
            try:
                self._torn = self._torn_sidecars()
                with self._open() as archive:
                    archive.move_to(self._part.start)
                    grouping = _Grouping()
                    for member in walk_members(archive, self._part.stop):
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

    def _open(self) -> AbstractContextManager[Archive]:
        part = self._part
        return open_archive(part.url, part.uri, self._limits.max_expansion, stop=part.stop)

    def _hold(self, group: _Group, member: TarMember, archive: Archive) -> None:
        if _is_sidecar(member) and len(group.sidecars) < _MAX_SIDECARS:
            group.sidecars[member.name] = _read_sidecar(archive, member, group.sidecar_bytes)
            group.sidecar_bytes += len(group.sidecars[member.name])
        if not is_item(member):
            self._log_ignored(member)
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
        """Return why an audio member is not read; None if it is."""
        if member.kind == LONG_NAME:
            return ReadError(
                f"the member's name has more than {MAX_NAME_CHARS} characters, and is cut here; "
                "give it a shorter one"
            )
        if member.kind != "file":
            return ReadError(f"the member is a {member.kind}; only regular files are read")
        try:
            check_item_size(member.size, self._limits)
        except ReadError as error:
            return error
        return None

    def _log_ignored(self, member: TarMember) -> None:
        """Log an ignored member once for each extension: a data set may have many shards."""
        ending = extension(member.name) or "(no extension)"
        if member.kind == "file" and not _is_sidecar(member) and ending not in _logged_extensions:
            _logged_extensions.add(ending)
            logger.info(
                "%s: members of other kinds are ignored: %s, the first is %r",
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
        """Return a member's items: one, or those that a manifest lists."""
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
        """Return the labels and metadata of the audio member ``name`` from its siblings."""
        key = _key_and_rest(name)[0]
        sidecars = {**self._read_torn(key), **group.sidecars}
        stems = {_stem(one.member.name) for one in group.held}
        values: dict[str, object] = {}
        truth = None
        # The siblings with the audio's own stem come first, then those of the whole key.
        for sidecar in sorted(sidecars, key=lambda one: _stem(one) != _stem(name)):
            data = sidecars[sidecar]
            rest = _key_and_rest(sidecar)[1]
            own = _stem(sidecar) == _stem(name)
            if not own and "." in rest and _stem(sidecar) in stems:
                continue  # it belongs to another member
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
        """Find siblings that are not neighbours of their audio, by key, in a whole local tar.

        ``index_tar`` lets no tar with such siblings be cut. A compressed or remote tar would have
        to be read twice.
        """
        part = self._part
        if not self._is_whole() or not urls.is_local(part.url):
            return {}
        halves = _KeyHalves()
        sidecars: list[TarMember] = []
        with self._open() as archive:
            if not archive.can_seek:
                return {}
            with suppress(ContainerError):  # the pass that reads the items reports it
                self._collect_halves(archive, halves, sidecars)
        keys = halves.torn()
        torn: dict[str, list[TarMember]] = {}
        for member in sidecars:
            key = _key_and_rest(member.name)[0]
            if key in keys:
                torn.setdefault(key, []).append(member)
        return torn

    def _read_torn(self, key: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        if key not in self._torn:
            return found
        num_bytes = 0
        with self._open() as archive:
            for member in self._torn[key][:_MAX_SIDECARS]:
                with suppress(ContainerError):  # the pass that reads the items reports it
                    archive.move_to(member.stop - padded(member.size))
                    found[member.name] = _read_sidecar(archive, member, num_bytes)
                    num_bytes += len(found[member.name])
        return found

    @staticmethod
    def _collect_halves(archive: Archive, halves: _KeyHalves, sidecars: list[TarMember]) -> None:
        grouping, pending = _Grouping(), list[TarMember]()
        for member in walk_members(archive, None):
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
    """Make the item for the failure of a slice that cannot be read to its end."""
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
    """Return a manifest's item with its siblings' labels and metadata where it has none."""
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


def _read_sidecar(archive: Archive, member: TarMember, num_bytes: int) -> bytes:
    """Read a sibling, or return its size if the siblings before it have ``num_bytes``."""
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


def _spool(archive: Archive, member: TarMember, what: str) -> str:
    return spool(member.name, lambda file: archive.copy_to(file, member.size, what))
