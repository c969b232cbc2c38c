"""Items of a training that could not be decoded: how many may fail, and their table."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.terminal.wording import counted
from pipeline.training.data.clip_cache import CachedClips
from transforms.errors import InputError
from transforms.records import Failure, ItemFailure
from transforms.results.rows import errors_table
from transforms.storage import writing


def check_failures(cached: CachedClips, max_failed: float) -> None:
    """Raise ``InputError`` if more than ``max_failed`` of the items could not be decoded, or all.

    ``max_failed`` is in [0, 1]. Below 1, every container must have been read to its end, because
    nobody knows how much of a broken one is missing.
    """
    num_failed = len(cached.failures)
    if not num_failed:
        return
    num_items = num_failed + len(cached.clips)
    broken = [event.failure for event in cached.failures if event.failure.is_container]
    failure = broken[0] if broken else cached.failures[0].failure
    example = f"one of them: {failure.item.clip_id}: {failure.message}"
    if not cached.clips:
        raise InputError(f"none of {counted(num_items, 'item')} could be decoded; {example}")
    if broken and max_failed < 1:
        raise InputError(
            f"{counted(len(broken), 'container')} could not be read to the end, so it is not known "
            f"how many clips are missing; {example}. Repair or leave out what is broken, or train "
            "on what could be read with --max-failed 1."
        )
    if num_failed > max_failed * num_items:
        raise InputError(
            f"{num_failed:,} of {counted(num_items, 'item')} could not be decoded, and max_failed "
            f"allows {max_failed:g} of them; {example}. Repair or leave out what is broken, or "
            "raise --max-failed."
        )


def write_errors(failures: Sequence[ItemFailure], url: str) -> None:
    """Write the failures as a table that is a manifest too; remove the file if there are none."""
    by_unit: dict[str, list[Failure]] = defaultdict(list)
    for event in failures:
        by_unit[event.unit_id].append(event.failure)
    if not by_unit:
        writing.remove(url)
        return
    tables = [errors_table(same, unit_id) for unit_id, same in by_unit.items()]
    target = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), target, compression="zstd")
    writing.write_bytes(url, target.getvalue())
