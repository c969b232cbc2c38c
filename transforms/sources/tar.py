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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field

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
    with_description,
)
from transforms.sources.fetching import Fetched, ReadLimits, check_item_size, clips_of, spool
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
from transforms.storage.secrets import public_uri

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


def _grouped(members: Iterable[TarMember]) -> Iterator[list[TarMember]]:
    """Yield the groups, items or not; if the walk fails, the last one before the error too."""
    grouping, group = _Grouping(), list[TarMember]()
    try:
        for member in members:
            if grouping.starts_new(member):
                yield group
                group = []
            group.append(member)
    except ContainerError:
        yield group
        raise
    yield group


def is_item(member: TarMember) -> bool:
    """Return whether a member is an item: audio by its name, whatever its kind."""
    return member.kind != "folder" and is_audio_name(member.name)


def _is_sidecar(member: TarMember) -> bool:
    return member.kind == "file" and extension(member.name) in SIDECAR_EXTENSIONS


_Half = tuple[str, bool]


def _half_of(group: Sequence[TarMember]) -> set[_Half]:
    """Return the key of a group that is only audio (True) or only siblings; else nothing."""
    has_audio = any(map(is_item, group))
    if has_audio == any(map(_is_sidecar, group)):
        return set()
    return {(_key_and_rest(group[0].name)[0], has_audio)}


def _torn_keys(halves: set[_Half]) -> set[str]:
    """Return the keys whose audio and siblings are not neighbours, as in an unsorted folder."""
    return {key for key, has_audio in halves if (key, not has_audio) in halves}


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
    halves: set[_Half] = set()
    damage = None
    has_global_headers = False
    try:
        open_it = functools.partial(open_archive, url, uri, max_expansion, to_walk=True)
        with open_it() as archive:
            num_items = 0
            members = walk_members(archive, None)
            if is_slow_to_walk(url, size) and archive.can_seek and max_items is None:
                members = walk_in_parallel(archive, open_it, size)
            for group in _grouped(members):
                groups += _index_group(group, estimate)
                halves |= _half_of(group)
                has_global_headers = archive.global_headers
                num_items += sum(map(is_item, group))
                if max_items is not None and num_items > max_items:
                    break
    except ContainerError as error:
        damage = str(error)
    can_cut = not has_global_headers and not _torn_keys(halves)
    return TarIndex(tuple(groups), can_cut, damage)


# A remote tar, where each header may be a request, is read if its first members leave a doubt, and
# so is a compressed one.
_MAX_MEMBERS_BEFORE = 200
_MAX_BYTES_BEFORE = 1 << 30


def may_hold_audio(url: str, uri: str) -> bool:
    """Return whether a tar holds audio, by the names of its members; True if that is not clear.

    The walk ends with the first audio member, usually one of the first. A tar that cannot be read
    may hold audio: reading its items reports the error.
    """
    try:
        with open_archive(url, uri, ReadLimits().max_expansion, to_walk=True) as archive:
            for number, member in enumerate(walk_members(archive, None)):
                is_slow = not urls.is_local(url) and number >= _MAX_MEMBERS_BEFORE
                is_slow |= not archive.can_seek and archive.position >= _MAX_BYTES_BEFORE
                if is_item(member) or is_slow:
                    return True
    except ContainerError:
        return True
    return False


def _index_group(members: Sequence[TarMember], estimate: WindowEstimate) -> list[TarGroup]:
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


# --- Reading -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Held:
    """An audio member whose group is not complete yet; ``fetched`` may be why it is not read."""

    member: TarMember
    occurrence: int
    fetched: Fetched


@dataclass(slots=True)
class _Group:
    """A group while it is read; ``stems`` are those of its audio members."""

    held: list[_Held] = field(default_factory=list)
    stems: set[str] = field(default_factory=set)
    sidecars: dict[str, bytes] = field(default_factory=dict)
    num_bytes: int = 0
    sidecar_bytes: int = 0

    def discard(self) -> None:
        for one in self.held:
            one.fetched.discard()


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
            yield read_failure(container_item(self._part, "bytes"), damage, is_container=True)
        elif self._num_items == 0 and self._is_whole() and self._reads_all:
            empty = ContainerError(f"{self._part.uri}: no member has an audio or video extension")
            yield read_failure(container_item(self._part, "bytes"), empty, is_container=True)

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
        group.stems.add(_stem(member.name))
        self._seen[member.name] += 1
        occurrence = self._seen[member.name]
        if not self._reads_all and (printable(member.name), occurrence) not in self._wanted:
            return
        try:
            self._check_can_read(member)
        except ReadError as error:
            group.held.append(_Held(member, occurrence, Fetched(error=error)))
            return
        what = printable(repr(member.name))
        if group.num_bytes + member.size > self._limits.spool_bytes:
            path = spool(member.name, lambda file: archive.copy_to(file, member.size, what))
            fetched = Fetched(path=path, is_temporary=True)
        else:
            fetched = Fetched(data=archive.read_exactly(member.size, what))
            group.num_bytes += member.size
        group.held.append(_Held(member, occurrence, fetched))

    def _check_can_read(self, member: TarMember) -> None:
        """Raise ``ReadError`` if an audio member is not to be read."""
        if member.kind == LONG_NAME:
            raise ReadError(
                f"the member's name has more than {MAX_NAME_CHARS} characters, and is cut here; "
                "give it a shorter one"
            )
        if member.kind != "file":
            raise ReadError(f"the member is a {member.kind}; only regular files are read")
        check_item_size(member.size, self._limits)

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
        try:
            while group.held:
                items = self._items_of(group.held[0], group)
                self._num_items += len(items)
                yield from clips_of(items, group.held.pop(0).fetched)
        finally:
            group.discard()

    def _items_of(self, one: _Held, group: _Group) -> list[Item]:
        """Return a member's items: one, or those that a manifest lists."""
        part, name = self._part, one.member.name
        truth, metadata = self._describe(name, group)
        if self._reads_all:
            clip_id = make_clip_id(public_uri(part.url), name, one.occurrence)
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
        return [with_description(item, truth, metadata) for item in items]

    def _describe(self, name: str, group: _Group) -> tuple[tuple[str, ...] | None, str | None]:
        """Return the labels and metadata of the audio member ``name`` from its siblings."""
        key = _key_and_rest(name)[0]
        sidecars = {**self._read_torn(key), **group.sidecars}
        values: dict[str, object] = {}
        truth = None
        # The siblings with the audio's own stem come first, then those of the whole key.
        for sidecar in sorted(sidecars, key=lambda one: _stem(one) != _stem(name)):
            data = sidecars[sidecar]
            rest = _key_and_rest(sidecar)[1]
            own = _stem(sidecar) == _stem(name)
            if not own and "." in rest and _stem(sidecar) in group.stems:
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
        halves: set[_Half] = set()
        sidecars: list[TarMember] = []
        with self._open() as archive:
            if not archive.can_seek:
                return {}
            with suppress(ContainerError):  # the pass that reads the items reports it
                for group in _grouped(walk_members(archive, None)):
                    halves |= _half_of(group)
                    sidecars += filter(_is_sidecar, group)
        torn: dict[str, list[TarMember]] = {key: [] for key in _torn_keys(halves)}
        for member in sidecars:
            key = _key_and_rest(member.name)[0]
            if key in torn:
                torn[key].append(member)
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

    def _not_found(self, damage: ContainerError | None) -> Iterator[Failure]:
        until = "" if damage is None else ", as far as it can be read"
        for items in self._wanted.values():
            for item in items:
                text = f"{item.uri} has no audio member named {item.member!r}{until}"
                yield read_failure(item, ReadError(text))

    def _is_whole(self) -> bool:
        return self._part.start == 0 and self._part.stop is None


def container_item(part: ContainerSlice, unit: str) -> Item:
    """Make the item for the failure of a slice that cannot be read to its end."""
    is_whole = part.start == 0 and part.stop is None
    stop = "" if part.stop is None else part.stop
    slice_name = None if is_whole else f"{unit}={part.start}-{stop}"
    clip_id = make_clip_id(public_uri(part.url), slice_name)
    return Item(clip_id, part.uri, part.url, size=part.size, version=part.version)


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
