"""The sources: the inputs as work units, and the encoded clips of a unit.

Files, globs, folders, tars, Parquet files with audio and manifests all become the same two things:
loose **items**, and **containers** (a tar, a Parquet file) whose items are found while reading.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby

from transforms.records import EncodedClip, Failure, Item, WorkUnit
from transforms.sources.clip_ids import labelled_by_folder, make_clip_id, make_unit_id
from transforms.sources.fetching import Fetched, ReadLimits, clips_of, fetch
from transforms.sources.inputs import Container, Found, check_there, find_inputs
from transforms.sources.parquet import read_parquet
from transforms.sources.tables.columns import TableSettings
from transforms.sources.tar import TarReader
from transforms.sources.units import (
    RestOfContainer,
    SourceSettings,
    cut_container,
    cut_containers,
    limit_items,
    plan_units,
    windows_of,
)

__all__ = [
    "Container",
    "Found",
    "ReadLimits",
    "RestOfContainer",
    "SourceSettings",
    "TableSettings",
    "check_there",
    "cut_container",
    "cut_containers",
    "find_inputs",
    "limit_items",
    "make_clip_id",
    "make_unit_id",
    "plan_units",
    "read_unit",
    "windows_of",
]

_DEFAULT_SETTINGS = SourceSettings()


def read_unit(
    unit: WorkUnit, settings: SourceSettings = _DEFAULT_SETTINGS
) -> Iterator[EncodedClip | Failure]:
    """Yield the items of a unit, always in the same order.

    Memory is bounded: at most ``settings.read_ahead`` + 1 items of ``limits.spool_bytes`` each
    (larger ones go to a temporary file), and a few pages of a Parquet file. An item beyond
    ``limits.max_item_bytes`` is a failure, and its bytes are not kept. A container that is cut
    short gives the items up to there, then a failure of its own.
    """
    if unit.container is None:
        yield from _read_files(unit.items, settings)
    elif unit.kind == "tar":
        members = TarReader(unit.container, unit.items, settings.limits).read()
        if settings.tables.labels_from is None:
            yield from members
        else:
            for one in members:
                is_member = one.item.member is not None
                item = labelled_by_folder(one.item) if is_member else one.item
                yield dataclasses.replace(one, item=item)
    else:
        yield from read_parquet(unit.container, unit.items, settings.limits)


def _read_files(items: Sequence[Item], settings: SourceSettings) -> Iterator[EncodedClip | Failure]:
    """Yield local files by path, and remote ones prefetched once for all their segments."""
    groups = deque(
        (url, list(same)) for url, same in groupby(items, key=lambda item: item.url or item.uri)
    )
    fetching: deque[tuple[list[Item], Future[Fetched]]] = deque()
    with ThreadPoolExecutor(settings.read_ahead, "earmark-read") as pool:
        try:
            while groups or fetching:
                while groups and len(fetching) < settings.read_ahead:
                    url, same = groups.popleft()
                    future = pool.submit(fetch, url, same[0].size, settings.limits)
                    fetching.append((same, future))
                same, future = fetching.popleft()
                yield from clips_of(same, future.result())
        finally:
            for _, future in fetching:
                future.cancel()
            for _, future in fetching:
                if not future.cancelled():
                    future.result().discard()
