"""Work units: the input, cut into pieces of about the same work.

A unit depends only on its content. So the same input gives the same units, and once some are
committed, the remaining input gives the remaining units.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from transforms.records import ContainerSlice, Item, WorkUnit
from transforms.sources.clip_ids import make_unit_id, occurrence_of, printable
from transforms.sources.fetching import ReadLimits
from transforms.sources.file_kinds import DEFAULT_BYTES_PER_S, WindowEstimate
from transforms.sources.inputs import Container, Found, in_threads, plan_order
from transforms.sources.tables.columns import TableSettings
from transforms.sources.tar import TarIndex, index_tar
from transforms.storage import urls

Range = tuple[int, int | None]


@dataclass(frozen=True)
class SourceSettings:
    """The settings for cutting the input into units and reading it.

    Attributes:
        windows_per_unit: Approximate; at least 1.
        max_unit_bytes: A unit ends once it holds this many encoded bytes.
        window_s: For estimates.
        hop_s: From one window's start to the next's in seconds, for estimates.
        read_ahead: Remote files fetched in parallel, ahead of their turn.
        tables: How manifests are read, and labels found.
    """

    windows_per_unit: int = 256
    max_unit_bytes: int = 1 << 30
    window_s: float = 10.255
    hop_s: float = 10.255
    read_ahead: int = 4
    limits: ReadLimits = field(default_factory=ReadLimits)
    tables: TableSettings = field(default_factory=TableSettings)

    def __post_init__(self) -> None:
        for name in ("windows_per_unit", "max_unit_bytes", "read_ahead"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; must be at least 1")
        for name in ("window_s", "hop_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; must be above 0")

    @property
    def estimate(self) -> WindowEstimate:
        """The estimate of windows from sizes."""
        return WindowEstimate(self.window_s, self.hop_s)

    def is_full(self, windows: int, num_bytes: int) -> bool:
        """Return whether a unit of this size is full."""
        return windows >= self.windows_per_unit or num_bytes >= self.max_unit_bytes


def limit_items(found: Found, limit: int, settings: SourceSettings) -> Found:
    """Keep exactly the first ``limit`` items: loose ones, failures of planning, then containers'.

    A container that cannot be read counts as one item: its failure.
    """
    items = found.items[:limit]
    failures = found.failures[: limit - len(items)]
    left = limit - len(items) - len(failures)
    containers = []
    for container in found.containers:
        if left <= 0:
            break
        cut, num_items = _limit_container(container, left, settings)
        containers.append(cut)
        left -= num_items
    return dataclasses.replace(found, items=items, containers=tuple(containers), failures=failures)


def _limit_container(
    container: Container, limit: int, settings: SourceSettings
) -> tuple[Container, int]:
    """Cut a container after ``limit`` items; return it and the items that it then gives."""
    if container.items:
        items = tuple(sorted(container.items, key=_inside_order))[:limit]
        return dataclasses.replace(container, items=items), len(items)
    if container.kind == "parquet":
        num_rows = sum(rows for rows, _ in container.row_groups)
        if num_rows <= limit:
            return container, max(1, num_rows)
        return dataclasses.replace(container, stop=limit), limit
    index = _index(container, settings, limit)
    starts = [start for group in index.groups for start in group.starts]
    if len(starts) <= limit:
        return container, len(starts) + (index.damage is not None or not starts)
    # Between groups if possible, so that siblings stay together.
    after = starts[limit]
    stop = next((group.start for group in index.groups if group.starts[0] == after), after)
    return dataclasses.replace(container, stop=stop), limit


def _index(
    container: Container, settings: SourceSettings, max_items: int | None = None
) -> TarIndex:
    return index_tar(
        container.url,
        container.uri,
        settings.estimate,
        max_items,
        size=container.size or 0,
        max_expansion=settings.limits.max_expansion,
    )


def plan_units(
    items: Sequence[Item],
    containers: Sequence[Container],
    settings: SourceSettings,
    *,
    covered: Mapping[str, Sequence[Range]] | None = None,
) -> list[WorkUnit]:
    """Cut the remaining input into units of about the same work.

    A unit ends with the item that fills it, whatever comes next. So when whole units have been
    committed, the rest is cut into the same units as before.

    Args:
        items: Loose items that are not committed.
        containers: Containers; their ``items``, if any, are those that are not committed.
        covered: Committed ranges [start, stop) of containers that are read as a whole, in their
            present version, by uri; None as stop means to the end.
    """
    units = [
        WorkUnit(make_unit_id("files", group), "files", tuple(group), estimated_windows=windows)
        for group, windows in _cut_items(sorted(items, key=plan_order), settings)
    ]
    rests = [RestOfContainer.of(container, covered or {}) for container in containers]
    return units + cut_containers(rests, settings)


@dataclass(frozen=True)
class RestOfContainer:
    """The rest of a container; ``covered`` is committed, if it is read as a whole."""

    container: Container
    covered: tuple[Range, ...] = ()

    @staticmethod
    def of(container: Container, covered: Mapping[str, Sequence[Range]]) -> RestOfContainer:
        """Make the rest of a container from the committed ranges by uri."""
        ranges = () if container.items else tuple(covered.get(container.uri, ()))
        return RestOfContainer(container, ranges)


def cut_containers(rests: Sequence[RestOfContainer], settings: SourceSettings) -> list[WorkUnit]:
    """Cut several containers in parallel; the units are in order."""
    cut = in_threads(lambda rest: list(cut_container(rest, settings)), rests)
    return [unit for units in cut for unit in units]


def _cut_items(
    items: Sequence[Item], settings: SourceSettings, row_bytes: int = 0
) -> Iterator[tuple[list[Item], int]]:
    """Yield the items of each unit and its windows; ``row_bytes`` is 0 where items are not rows."""
    group: list[Item] = []
    windows = num_bytes = 0
    for item in items:
        expected = windows_of(item, settings)
        group.append(item)
        windows += expected
        num_bytes += row_bytes or _bytes_of(item, expected, settings)
        if settings.is_full(windows, num_bytes):
            yield group, windows
            group, windows, num_bytes = [], 0, 0
    if group:
        yield group, windows


def windows_of(item: Item, settings: SourceSettings) -> int:
    """Estimate the windows of an item from its size; 1 for an item of a container."""
    start_s = item.start_s or 0.0
    if item.end_s is not None:
        return settings.estimate.of_duration(item.end_s - start_s)
    if item.member is not None or item.row is not None:
        return 1
    whole = settings.estimate.of_file(urls.file_name(item.uri), item.size)
    return max(1, whole - int(start_s / settings.hop_s))


def _bytes_of(item: Item, windows: int, settings: SourceSettings) -> int:
    """Return the bytes of a file, or a segment's share of them."""
    size = item.size or 0
    if item.start_s is None and item.end_s is None:
        return size
    whole = settings.estimate.of_file(urls.file_name(item.uri), size)
    return size * min(windows, whole) // whole


def cut_container(rest: RestOfContainer, settings: SourceSettings) -> Iterator[WorkUnit]:
    """Cut the rest of a container into units; reads the headers of a large tar."""
    container, covered = rest.container, rest.covered
    gaps = list(_gaps(covered, container.stop))
    if not gaps:
        return
    if container.kind == "parquet":
        if container.items:
            yield from _plan_rows(container, settings)
        else:
            yield from _plan_row_groups(container, gaps, settings)
        return
    size = container.size or 0
    windows = settings.estimate.of_duration(size / DEFAULT_BYTES_PER_S)
    if not container.can_split or (not covered and not settings.is_full(windows, size)):
        windows = len(container.items) or windows
        for start, stop in gaps:
            yield _container_unit(container, start, stop, windows, items=container.items)
        return
    index = _index(container, settings)
    if container.items:
        yield from _plan_members(container, index, settings)
    else:
        yield from _plan_slices(container, index, gaps, settings)


def _gaps(covered: Sequence[Range], stop: int | None) -> Iterator[Range]:
    """Yield the ranges of [0, stop) that are not covered."""
    position = 0
    for low, high in sorted(covered, key=lambda one: one[0]):
        low = low if stop is None else min(low, stop)
        if low > position:
            yield position, low
        if high is None:
            return
        position = max(position, high)
    if stop is None or position < stop:
        yield position, stop


def _container_unit(
    container: Container,
    start: int,
    stop: int | None,
    windows: int,
    *,
    items: Sequence[Item] = (),
    seen_names: Mapping[str, int] | None = None,
) -> WorkUnit:
    part = ContainerSlice(
        uri=container.uri,
        url=container.url,
        size=container.size,
        version=container.version,
        start=start,
        stop=stop,
        seen_names=dict(seen_names or {}),
        column=container.column,
    )
    return WorkUnit(
        unit_id=make_unit_id(container.kind, items, part),
        kind=container.kind,
        items=tuple(items),
        container=part,
        estimated_windows=max(1, windows),
    )


def _plan_row_groups(
    container: Container, gaps: Sequence[Range], settings: SourceSettings
) -> Iterator[WorkUnit]:
    """Cut gaps into slices of whole row groups; a gap may begin or end inside one."""
    num_rows = sum(rows for rows, _ in container.row_groups)
    for low, high in gaps:
        if container.row_groups and low >= num_rows:
            continue
        start, windows, size = low, 0, 0
        first = 0
        for rows, num_bytes in container.row_groups:
            stop = first + rows
            inside = max(0, min(stop, num_rows if high is None else high) - max(first, low))
            first = stop
            if not inside:
                continue
            seconds = num_bytes / rows / DEFAULT_BYTES_PER_S
            windows += settings.estimate.of_duration(seconds) * inside
            size += num_bytes * inside // rows
            if settings.is_full(windows, size) and stop < min(num_rows, high or num_rows):
                yield _container_unit(container, start, stop, windows)
                start, windows, size = stop, 0, 0
        yield _container_unit(container, start, high, windows)


def _inside_order(item: Item) -> tuple[int, str, float, str]:
    row = -1 if item.row is None else item.row
    return (row, item.member or "", item.start_s or 0.0, item.clip_id)


def _plan_rows(container: Container, settings: SourceSettings) -> Iterator[WorkUnit]:
    """Cut the rows that a manifest lists into units that read only what they need."""
    items = sorted(container.items, key=_inside_order)
    num_rows = sum(rows for rows, _ in container.row_groups)
    row_bytes = sum(num_bytes for _, num_bytes in container.row_groups) // max(1, num_rows)
    for group, windows in _cut_items(items, settings, max(1, row_bytes)):
        rows = [item.row or 0 for item in group]
        yield _container_unit(container, min(rows), max(rows) + 1, windows, items=group)


def _plan_slices(
    container: Container, index: TarIndex, gaps: Sequence[Range], settings: SourceSettings
) -> Iterator[WorkUnit]:
    """Cut gaps into slices that end between groups of members."""
    slices: list[tuple[int, int | None, int]] = []
    for low, high in gaps:
        groups = [
            group
            for group in index.groups
            if low <= group.starts[-1] and (high is None or group.start < high)
        ]
        start, windows, size = low, 0, 0
        for group, following in pairwise(groups):
            windows += group.windows
            size += group.size
            if index.can_cut and settings.is_full(windows, size):
                slices.append((start, following.start, windows))
                start, windows, size = following.start, 0, 0
        slices.append((start, high, windows + sum(group.windows for group in groups[-1:])))
    names = _seen_names(index, [(start, stop) for start, stop, _ in slices])
    for (start, stop, windows), seen in zip(slices, names, strict=True):
        yield _container_unit(container, start, stop, windows, seen_names=seen)


def _seen_names(index: TarIndex, slices: Sequence[Range]) -> list[dict[str, int]]:
    """Count how often the names in each slice occur before it; the slices are in order."""
    seen: Counter[str] = Counter()
    found: list[dict[str, int]] = [{} for _ in slices]
    number = 0
    for group in index.groups:
        for name, at in zip(group.names, group.starts, strict=True):
            while number < len(slices) and (stop := slices[number][1]) is not None and at >= stop:
                number += 1
            if number < len(slices) and at >= slices[number][0]:
                found[number].setdefault(name, seen[name])
            seen[name] += 1
    return [{name: count for name, count in names.items() if count} for names in found]


def _plan_members(
    container: Container, index: TarIndex, settings: SourceSettings
) -> Iterator[WorkUnit]:
    """Cut the members that a manifest lists into units that read only what they need."""
    asked: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in sorted(container.items, key=_inside_order):
        asked[item.member or "", occurrence_of(item)].append(item)
    if not index.can_cut or index.damage is not None:
        windows = sum(group.windows for group in index.groups)
        items = [item for same in asked.values() for item in same]
        yield _container_unit(container, 0, None, windows, items=items)
        return
    parts = _cut_members(index, asked, settings)
    missing = [item for same in asked.values() for item in same]
    if missing:
        start, stop, items = parts.pop() if parts else (0, None, [])
        parts.append((start, stop, items + missing))
    names = _seen_names(index, [(start, stop) for start, stop, _ in parts])
    for (start, stop, items), seen in zip(parts, names, strict=True):
        windows = sum(windows_of(item, settings) for item in items)
        yield _container_unit(container, start, stop, windows, items=items, seen_names=seen)


def _cut_members(
    index: TarIndex, asked: dict[tuple[str, int], list[Item]], settings: SourceSettings
) -> list[tuple[int, int | None, list[Item]]]:
    """Return slices and their items, and remove those items from ``asked``."""
    parts: list[tuple[int, int | None, list[Item]]] = []
    occurrences: Counter[str] = Counter()
    start, windows, size = 0, 0, 0
    items: list[Item] = []
    for number, group in enumerate(index.groups):
        stop = index.groups[number + 1].start if number + 1 < len(index.groups) else None
        wanted = []
        for name in group.names:
            occurrences[name] += 1
            wanted += asked.pop((printable(name), occurrences[name]), [])
        if not wanted:
            continue
        start = start if items else group.start
        items += wanted
        windows += max(group.windows, sum(windows_of(item, settings) for item in wanted))
        size += group.size
        last = (start, stop, items)
        if settings.is_full(windows, size):
            parts.append(last)
            items, windows, size = [], 0, 0
    if items:
        parts.append(last)
    return parts
