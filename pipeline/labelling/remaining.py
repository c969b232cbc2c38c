"""The remaining work: the items found, compared with those in the commits.

An item is identified by its clip id and its version (size, etag or time, truth and metadata). A
container is identified by its URI, its version and its committed slices.

    found and committed, same version   kept
    found and not committed             goes into a new unit
    found, another version committed    its unit is redone whole, and the new one replaces it
    committed and not found             vanished: counted apart, its rows are kept
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transforms.errors import InputError
from transforms.records import Carried, ContainerSlice, Failure, Item, UnitKind, WorkUnit
from transforms.results.commits import (
    Commit,
    LedgerItem,
    LedgerSlice,
    container_version,
    item_version,
    read_failures,
)
from transforms.sources.clip_ids import same_name
from transforms.sources.read_unit import (
    Container,
    Found,
    RestOfContainer,
    SourceSettings,
    cut_containers,
    make_clip_id,
    make_unit_id,
    plan_units,
    windows_of,
)

# The committed slices [start, stop) of whole containers, by container.
Covered = dict[str, list[tuple[int, int | None]]]

# Maximum number of bad manifest lines in a unit of failures.
FAILURES_PER_UNIT = 1024


@dataclass(frozen=True)
class RemainingWork:
    """The units to do, and the committed ones that stay.

    Attributes:
        rests: Containers to do that are not cut into units yet.
        found_kept_items: Items of the kept units that are in the input.
        vanished_kept_items: Items of the kept units that are not in the input.
        vanished_carried_items: Items not in the input whose rows units to do take over from the
            units they replace.
        found_carried_items: Items in the input whose rows units to do take over, because only
            failed or changed items of their unit are done again.
        num_redone: Units to do that replace one with a changed item.
        num_retried: Failed items to retry.
    """

    units: tuple[WorkUnit, ...]
    rests: tuple[RestOfContainer, ...] = ()
    kept_units: tuple[str, ...] = ()
    found_kept_items: int = 0
    vanished_kept_items: int = 0
    vanished_carried_items: int = 0
    found_carried_items: int = 0
    num_redone: int = 0
    num_retried: int = 0

    @property
    def vanished_items(self) -> int:
        """Items labelled earlier that are not in this input."""
        return self.vanished_kept_items + self.vanished_carried_items

    @property
    def num_items(self) -> int | None:
        """Number of items to do; None if containers must be read to know."""
        if self.rests or any(unit.container is not None and not unit.items for unit in self.units):
            return None
        return sum(len(unit.items) + len(unit.failures) for unit in self.units)

    def cut(self, settings: SourceSettings) -> RemainingWork:
        """Return the same work with all containers cut into units."""
        units = (*self.units, *cut_containers(self.rests, settings))
        return dataclasses.replace(self, units=units, rests=())


def find_remaining(
    found: Found,
    commits: Mapping[str, Commit],
    settings: SourceSettings,
    *,
    retry_from: str | None = None,
    renewed: Mapping[str, Commit] | None = None,
) -> RemainingWork:
    """Compare the items found with the valid commits; new containers are not cut yet.

    ``retry_from`` is the result whose failed items to retry, or None. ``renewed`` are the commits
    of files with other times and the same bytes: of their units, only changed items are redone.
    Raise ``InputError`` if items would be in the result twice.
    """
    renewed = renewed or {}
    commits = {**commits, **renewed}
    inventory = _Inventory(found)
    _check_once(inventory, commits.values())
    changed = [commit for commit in commits.values() if inventory.is_changed(commit)]
    changed_ids = {commit.unit_id for commit in changed}
    same = {unit_id: commit for unit_id, commit in commits.items() if unit_id not in changed_ids}
    covered: Covered = defaultdict(list)
    for commit in same.values():
        if part := _whole_slice(commit):
            covered[part.uri].append((part.start, part.stop))
    partly = renewed if retry_from is None else {}
    redone = _redo(changed, partly, inventory, covered, settings)
    retried = [] if retry_from is None else _retry(retry_from, same.values(), inventory, settings)
    retried_from = [same[unit.replaces[0]].totals for unit in retried]
    known = {
        entry.clip_id
        for commit in commits.values()
        for entry in commit.ledger.items
        if not inventory.has_moved(entry.clip_id, commit)
    }
    changed_containers = {part.uri for commit in changed if (part := _whole_slice(commit))}
    # Retried slices are in `retried`, not in `fresh`.
    fresh, rests = _plan_fresh(found, known, covered, changed_containers, settings)
    replaced = {unit.replaces[0] for unit in retried}
    kept = {unit_id: commit for unit_id, commit in same.items() if unit_id not in replaced}
    found_kept = sum(inventory.num_found(commit) for commit in kept.values())
    return RemainingWork(
        units=(*redone, *retried, *fresh),
        rests=tuple(rests),
        kept_units=tuple(kept),
        found_kept_items=found_kept,
        vanished_kept_items=sum(commit.totals.items for commit in kept.values()) - found_kept,
        vanished_carried_items=sum(
            len(unit.carried.clip_ids - inventory.items.keys())
            for unit in (*redone, *retried)
            if unit.carried is not None and unit.carried.clip_ids is not None
        ),
        found_carried_items=sum(
            commits[unit.carried.unit_id].totals.items
            - commits[unit.carried.unit_id].totals.failures
            if unit.carried.clip_ids is None
            else len(unit.carried.clip_ids & inventory.items.keys())
            for unit in (*redone, *retried)
            if unit.carried is not None
        ),
        num_redone=len(redone),
        num_retried=sum(
            len(unit.items) + len(unit.failures) or totals.failures
            for unit, totals in zip(retried, retried_from, strict=True)
        ),
    )


def find_units(found: Found, settings: SourceSettings) -> tuple[WorkUnit, ...]:
    """Return the units of everything that was found, where nothing is committed."""
    return find_remaining(found, {}, settings).cut(settings).units


def count_found_items(found: Found) -> int | None:
    """Return the number of items in the input; None if containers must be read to know."""
    inventory = _Inventory(found)
    return None if inventory.wholes else len(inventory.items)


def count_vanished_failures(found: Found, commits: Mapping[str, Commit], output: str) -> int:
    """Return how many of a result's failed items are not in the input."""
    inventory = _Inventory(found)
    count = 0
    for commit in commits.values():
        if not commit.totals.failures or inventory.num_found(commit) == commit.totals.items:
            continue
        if _whole_slice(commit) is not None:
            count += commit.totals.failures
            continue
        rows = read_failures(output, commit.unit_id)
        count += sum(row["clip_id"] not in inventory.items for row in rows)
    return count


def _whole_slice(commit: Commit) -> LedgerSlice | None:
    """Return the slice of a whole container that a commit covers; None if it lists items."""
    return None if commit.ledger.items else commit.ledger.container


class _Inventory:
    def __init__(self, found: Found) -> None:
        self.failures = {failure.item.clip_id: failure for failure in found.failures}
        self.items = {item.clip_id: item for item in found.items}
        self.items |= {clip_id: failure.item for clip_id, failure in self.failures.items()}
        self.wholes: dict[str, Container] = {}
        self.asked: dict[str, Container] = {}
        for container in found.containers:
            if container.items:
                self.asked[container.uri] = container
                self.items |= {item.clip_id: item for item in container.items}
            else:
                self.wholes[container.uri] = container

    def is_changed(self, commit: Commit) -> bool:
        """Return whether the input has another version of something that the commit covers."""
        part = _whole_slice(commit)
        if part is not None:
            whole = self.wholes.get(part.uri)
            return (
                whole is not None and container_version(whole.size, whole.version) != part.version
            )
        return any(self.has_changed(entry, commit) for entry in commit.ledger.items)

    def has_changed(self, entry: LedgerItem, commit: Commit) -> bool:
        """Return whether the input has another version of an item of a commit."""
        item = self.items.get(entry.clip_id)
        return item is not None and (
            item_version(item) != entry.version or self.has_moved(entry.clip_id, commit)
        )

    def has_moved(self, clip_id: str, commit: Commit) -> bool:
        """Return whether an item has moved into a container, or out of one, since its commit.

        Its clip id then stays the same only if a manifest gives it.
        """
        item = self.items.get(clip_id)
        if item is None:
            return False
        before = commit.ledger.container.uri if commit.ledger.container else None
        now = None if item.member is None and item.row is None else item.uri
        return before != now

    def num_found(self, commit: Commit) -> int:
        """Return how many items of an unchanged commit are in the input."""
        part = _whole_slice(commit)
        if part is not None:
            return commit.totals.items if part.uri in self.wholes else 0
        return sum(entry.clip_id in self.items for entry in commit.ledger.items)


def _check_once(inventory: _Inventory, commits: Iterable[Commit]) -> None:
    """Refuse a whole container beside single items of it in one result."""
    for commit in commits:
        part = commit.ledger.container
        if part is None:
            continue
        if commit.ledger.items:
            was, now = "by items that a manifest names", "as a whole"
            names = [entry.clip_id for entry in commit.ledger.items]
            clashing = part.uri in inventory.wholes
        else:
            was, now = "as a whole", "by items that a manifest names"
            asked = inventory.asked.get(part.uri)
            names = [item.clip_id for item in asked.items] if asked is not None else []
            clashing = True
        if clashing and any(_is_named_by(part.uri, name) for name in names):
            raise InputError(
                f"{part.uri} was labelled {was} before, and is now given {now}: its items would be "
                "in the result twice. Give another --output, or the same input as before."
            )


def _is_named_by(uri: str, clip_id: str) -> bool:
    """Return whether a clip id is the default one of a container's item, not that of a segment.

    ``make_clip_id`` encodes the marks where they are part of a name.
    """
    prefix, name = same_name(f"{make_clip_id(uri)}#"), same_name(clip_id)
    return name.startswith(prefix) and "@" not in name.removeprefix(prefix)


def _redo(
    changed: Sequence[Commit],
    renewed: Mapping[str, Commit],
    inventory: _Inventory,
    covered: Covered,
    settings: SourceSettings,
) -> list[WorkUnit]:
    """Return the units that replace those with a changed item or container."""
    units = []
    slices: dict[str, list[str]] = defaultdict(list)
    for commit in changed:
        part = _whole_slice(commit)
        if part is not None:
            slices[part.uri].append(commit.unit_id)
            continue
        names = [
            entry.clip_id
            for entry in commit.ledger.items
            if commit.unit_id not in renewed or inventory.has_changed(entry, commit)
        ]
        units.append(_unit_of(commit, names, inventory, settings))
    for uri, replaced in slices.items():
        first, *rest = plan_units([], [inventory.wholes[uri]], settings, covered=covered)
        unit_id = make_unit_id(first.kind, first.items, first.container, replaces=replaced)
        first = dataclasses.replace(first, unit_id=unit_id, replaces=tuple(replaced))
        units += [first, *rest]
    return units


def _retry(
    output: str, kept: Iterable[Commit], inventory: _Inventory, settings: SourceSettings
) -> list[WorkUnit]:
    """Return the units that retry failed items and take over the good rows beside them."""
    units = []
    for commit in kept:
        if not commit.totals.failures:
            continue
        rows = read_failures(output, commit.unit_id)
        part = _whole_slice(commit)
        if part is not None:
            whole = inventory.wholes.get(part.uri)
            if whole is not None:
                units.append(_retried_slice(commit, part, whole, rows, settings))
            continue
        names = [row["clip_id"] for row in rows if row["clip_id"] in inventory.items]
        if names:
            units.append(_unit_of(commit, names, inventory, settings))
    return units


def _retried_slice(
    commit: Commit,
    part: LedgerSlice,
    whole: Container,
    rows: Sequence[Mapping[str, Any]],
    settings: SourceSettings,
) -> WorkUnit:
    """Return a unit of a slice's failed items; of all items if the container broke off."""
    container = _slice_of(whole, part.start, part.stop)
    if commit.totals.broken_containers:
        return _rebuilt(commit, whole.kind, settings, container=container)
    items = tuple(
        Item(
            clip_id=row["clip_id"],
            uri=row["uri"],
            member=row["member"],
            row=row["row"],
            truth=None if row["truth"] is None else tuple(row["truth"]),
            metadata=row["metadata"],
            size=whole.size,
            version=whole.version,
        )
        for row in rows
    )
    # A tar is read from its start, so that the second member of a name is recognised.
    container = _slice_of(whole, 0 if whole.kind == "tar" else part.start, part.stop)
    carried = Carried(commit.unit_id)
    return _rebuilt(commit, whole.kind, settings, items, container=container, carried=carried)


def _unit_of(
    commit: Commit, names: Sequence[str], inventory: _Inventory, settings: SourceSettings
) -> WorkUnit:
    """Return a unit of the named items that are in the input, which replaces the commit's unit.

    It takes over the rows of all other items of the commit, the failed ones included: each item
    that a ledger lists has a row. Items that have moved go to units of their own.
    """
    moved = {e.clip_id for e in commit.ledger.items if inventory.has_moved(e.clip_id, commit)}
    found = [name for name in names if name in inventory.items and name not in moved]
    others = frozenset(entry.clip_id for entry in commit.ledger.items).difference(found, moved)
    failures = tuple(inventory.failures[name] for name in found if name in inventory.failures)
    items = tuple(inventory.items[name] for name in found if name not in inventory.failures)
    container, kind = None, commit.ledger.kind
    if commit.ledger.container is not None and items:
        container = _slice_of(inventory.asked[commit.ledger.container.uri], 0, None)
    elif commit.ledger.container is not None:
        kind = "files"  # nothing to read: the rows are taken over, or there are none
    carried = Carried(commit.unit_id, others) if others else None
    return _rebuilt(commit, kind, settings, items, failures, container, carried)


def _rebuilt(
    commit: Commit,
    kind: UnitKind,
    settings: SourceSettings,
    items: tuple[Item, ...] = (),
    failures: tuple[Failure, ...] = (),
    container: ContainerSlice | None = None,
    carried: Carried | None = None,
) -> WorkUnit:
    named = (*items, *(failure.item for failure in failures))
    windows = sum(windows_of(item, settings) for item in items)
    return WorkUnit(
        unit_id=make_unit_id(kind, named, container, replaces=(commit.unit_id,)),
        kind=kind,
        items=items,
        container=container,
        estimated_windows=max(1, windows if named else commit.totals.windows),
        replaces=(commit.unit_id,),
        carried=carried,
        failures=failures,
    )


def _slice_of(container: Container, start: int, stop: int | None) -> ContainerSlice:
    return ContainerSlice(
        container.uri,
        container.url,
        container.size,
        container.version,
        start,
        stop,
        column=container.column,
    )


def _plan_fresh(
    found: Found,
    known: set[str],
    covered: Covered,
    redone_containers: set[str],
    settings: SourceSettings,
) -> tuple[list[WorkUnit], list[RestOfContainer]]:
    """Return units of the items that no commit covers, and the remaining parts of containers."""
    items = [item for item in found.items if item.clip_id not in known]
    containers = []
    for container in found.containers:
        if container.items:
            asked = tuple(item for item in container.items if item.clip_id not in known)
            if asked:
                containers.append(dataclasses.replace(container, items=asked))
        elif container.uri not in redone_containers:
            containers.append(container)
    units = plan_units(items, [], settings)
    failures = [failure for failure in found.failures if failure.item.clip_id not in known]
    for start in range(0, len(failures), FAILURES_PER_UNIT):
        group = tuple(failures[start : start + FAILURES_PER_UNIT])
        unit_id = make_unit_id("files", [failure.item for failure in group])
        units.append(WorkUnit(unit_id, "files", failures=group))
    return units, [RestOfContainer.of(container, covered) for container in containers]
