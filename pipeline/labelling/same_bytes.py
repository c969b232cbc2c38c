"""Files whose time has changed and whose bytes have not: after a copy, or a change of the clock.

Their rows are kept. Only local files outside of containers are compared, because only they have a
time for a version and a hash in their row. Only those of the same size are read, once each: their
commit then learns the new time.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress

from transforms.errors import OutputError
from transforms.records import Item
from transforms.results.commits import (
    Commit,
    LedgerItem,
    commit_url,
    item_version,
    read_part,
)
from transforms.sources.inputs import in_threads
from transforms.sources.read_unit import Found
from transforms.storage import reading, urls, writing


def find_renewed(found: Found, commits: Mapping[str, Commit], output: str) -> dict[str, Commit]:
    """Return the commits that list such files, by unit, with the files' new times.

    A file whose bytes have changed too, or cannot be read, keeps its old version there.
    """
    items = {item.clip_id: item for item in found.items}
    later = {
        unit_id: touched
        for unit_id, commit in commits.items()
        if (touched := dict(_touched(commit, items)))
    }
    versions = in_threads(lambda unit_id: _versions(output, unit_id, later[unit_id]), list(later))
    return {
        unit_id: _with_versions(commits[unit_id], new)
        for unit_id, new in zip(later, versions, strict=True)
        if new
    }


def count_renewed(commits: Mapping[str, Commit], renewed: Mapping[str, Commit]) -> int:
    """Return how many files have a new version in the renewed commits."""
    return sum(
        before != now
        for unit_id, commit in renewed.items()
        for before, now in zip(commits[unit_id].ledger.items, commit.ledger.items, strict=True)
    )


def write_renewed(output: str, renewed: Mapping[str, Commit]) -> None:
    """Replace the commits by the renewed ones; each vouches for the same parts as before.

    Raises:
        OSError: One cannot be written.
    """
    for unit_id, commit in renewed.items():
        writing.write_bytes(commit_url(output, unit_id), commit.to_json())


def _touched(commit: Commit, items: Mapping[str, Item]) -> Iterator[tuple[str, Item]]:
    """Yield the local files of a commit of which nothing but the time has changed."""
    if commit.ledger.container is not None:
        return
    for entry in commit.ledger.items:
        item = items.get(entry.clip_id)
        if item is None or not item.url or not urls.is_local(item.url):
            continue
        if item_version(item) == entry.version:
            continue
        _, _, time_and_digest = entry.version.partition(":")
        before = dataclasses.replace(item, version=time_and_digest.rpartition(":")[0])
        if item_version(before) == entry.version:
            yield entry.clip_id, item


def _versions(output: str, unit_id: str, touched: Mapping[str, Item]) -> dict[str, str]:
    """Return the new version of each file with the bytes that its row was made of, by clip id."""
    try:
        rows = read_part(output, "clips", unit_id, ["clip_id", "content_sha256"]).to_pylist()
    except (OSError, OutputError):  # the unit is done again
        return {}
    expected = {row["clip_id"]: row["content_sha256"] for row in rows}
    digests: dict[str, str | None] = {}  # a file may have several segments
    versions = {}
    for clip_id, item in touched.items():
        if clip_id not in expected:
            continue  # it failed: its row has no hash, so it is tried again
        if item.url not in digests:
            digests[item.url] = _sha256(item.url)
        if digests[item.url] == expected[clip_id]:
            versions[clip_id] = item_version(item)
    return versions


def _sha256(url: str) -> str | None:
    with suppress(OSError), reading.open_read(url) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    return None


def _with_versions(commit: Commit, versions: Mapping[str, str]) -> Commit:
    items = tuple(
        LedgerItem(entry.clip_id, versions.get(entry.clip_id, entry.version))
        for entry in commit.ledger.items
    )
    return dataclasses.replace(commit, ledger=dataclasses.replace(commit.ledger, items=items))
