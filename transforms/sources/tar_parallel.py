"""A walk over the headers of a large remote tar that makes many requests at once.

A walk from header to header is a request for each member. Here, one walk begins in each part of the
archive, from the first block that looks like a header. Such a guess may be wrong, so its members
count only where the walk from the start of the archive reaches one of them. The result is that of a
single walk, whatever the members hold.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

from transforms.errors import ContainerError
from transforms.sources.tar_headers import (
    BLOCK_BYTES,
    SKIP_BYTES,
    Archive,
    TarMember,
    padded,
    walk_members,
)
from transforms.storage import urls

_MIN_PARALLEL_BYTES = 256 << 20  # below this, a single walk is fast enough
_MAX_SPANS = 128
_MIN_SPAN_BYTES = 16 << 20
_WALK_THREADS = 32
# How far to search for a header. In larger members, a single walk makes long steps.
_SCAN_BYTES = 64 << 20
_MAGIC = slice(257, 262)  # where a header has "ustar"


def is_slow_to_walk(url: str, size: int) -> bool:
    """Whether an archive is remote and large, and so takes many requests."""
    return size >= _MIN_PARALLEL_BYTES and not urls.is_local(url)


def walk_in_parallel(
    archive: Archive, open_another: Callable[[], AbstractContextManager[Archive]], size: int
) -> Iterator[TarMember]:
    """Yield the members of a whole archive, exactly as ``walk_members`` does.

    ``archive`` is at byte 0 and must be able to seek. ``open_another`` opens it once more.
    """
    step = padded(max(_MIN_SPAN_BYTES, -(-size // _MAX_SPANS)))
    bounds = [(low, low + step) for low in range(0, size, step)]
    pool = ThreadPoolExecutor(_WALK_THREADS, "earmark-tar")
    try:
        guesses = pool.map(lambda bound: _guess_members(open_another, *bound), bounds)
        position = 0  # where the next member is known to begin
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
class _GuessedMembers:
    """The members from a guessed header on, without a gap between them if the guess is right.

    ``is_end`` tells whether the archive ends after the last of them.
    """

    members: tuple[TarMember, ...] = ()
    is_end: bool = False


def _guess_members(
    open_another: Callable[[], AbstractContextManager[Archive]], low: int, high: int
) -> _GuessedMembers:
    """Find the members that seem to begin from byte ``low`` up to byte ``high``."""
    members: list[TarMember] = []
    is_end = True
    try:
        with open_another() as archive:
            start = _find_header(archive, low, min(high, low + _SCAN_BYTES))
            if start is None:
                return _GuessedMembers()
            archive.move_to(start)
            for member in walk_members(archive, None):
                if member.start >= high:
                    is_end = False
                    break
                members.append(member)
            if archive.global_headers:
                return _GuessedMembers()  # only the walk that is certain may count them
    except ContainerError:
        is_end = False  # the walk that is certain will report it
    return _GuessedMembers(tuple(members), is_end and bool(members))


def _find_header(archive: Archive, low: int, high: int) -> int | None:
    """Return the first block from byte ``low`` on that could be a header; None without one."""
    archive.move_to(low)
    while archive.position < high:
        start = archive.position
        data = archive.read(min(SKIP_BYTES, high - start))
        for at in range(0, len(data) - BLOCK_BYTES + 1, BLOCK_BYTES):
            block = data[at : at + BLOCK_BYTES]
            if block[_MAGIC] == b"ustar" and _is_header(block):
                return start + at
        if len(data) < SKIP_BYTES:
            return None
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
