"""What a unit's rows say, in counts: clips by label and by warning, failed items by error.

They are part of the unit's commit, so that a run of any size can sum them up without reading rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

# Messages may be long; the errors table has them in full.
MAX_EXAMPLE_CHARS = 500

# The columns that are counted.
CLIP_COLUMNS = ("labels", "warning")
ERROR_COLUMNS = ("clip_id", "uri", "error_type", "message")


@dataclass(frozen=True)
class ErrorCount:
    """Failed items with one type of error, and the clip id and message of one of them."""

    items: int
    example: str

    def __add__(self, other: ErrorCount) -> ErrorCount:
        # The same one in whatever order units are summed.
        return ErrorCount(self.items + other.items, min(self.example, other.example))


@dataclass(frozen=True)
class RowCounts:
    """Counts of rows.

    Attributes:
        clips: Clips that were counted; fewer than there are if an earlier version labelled some.
        labels: Clips by the name of their best label.
        warned_clips: Clips with a warning.
        warnings: Clips by the kind of their warnings; a clip may have several.
        errors: Failed items by the type of their error.
    """

    clips: int = 0
    labels: Mapping[str, int] = field(default_factory=dict)
    warned_clips: int = 0
    warnings: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, ErrorCount] = field(default_factory=dict)

    def __add__(self, other: RowCounts) -> RowCounts:
        errors = dict(self.errors)
        for error_type, count in other.errors.items():
            errors[error_type] = errors[error_type] + count if error_type in errors else count
        return RowCounts(
            self.clips + other.clips,
            dict(Counter(self.labels) + Counter(other.labels)),
            self.warned_clips + other.warned_clips,
            dict(Counter(self.warnings) + Counter(other.warnings)),
            errors,
        )


def count_rows(clips: pa.Table, errors: pa.Table | None) -> RowCounts:
    """Count a unit's rows.

    Args:
        clips: ``CLIP_COLUMNS``, and ``warning_kinds`` if the result has it.
        errors: ``ERROR_COLUMNS``; None if the unit has no failures.
    """
    kinds: dict[str, int] = {}
    if "warning_kinds" in clips.column_names:
        kinds = _count_values(pc.list_flatten(clips["warning_kinds"]))
    return RowCounts(
        clips=clips.num_rows,
        labels=_count_values(pc.struct_field(best_labels(clips["labels"]), "name")),
        warned_clips=clips.num_rows - clips["warning"].null_count,
        warnings=kinds,
        errors={} if errors is None else _count_errors(errors),
    )


def best_labels(labels: pa.ChunkedArray) -> pa.Array:
    """Return the first label of each row that has one: a struct of index, id, name and score."""
    return pc.list_flatten(pc.list_slice(labels.combine_chunks(), 0, 1))


def _count_values(values: pa.Array) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(values).to_pylist()}


def _count_errors(errors: pa.Table) -> dict[str, ErrorCount]:
    counts: dict[str, ErrorCount] = {}
    for row in errors.select(ERROR_COLUMNS).to_pylist():
        count = ErrorCount(1, _example(row))
        known = counts.get(row["error_type"])
        counts[row["error_type"]] = count if known is None else known + count
    return counts


def _example(row: Mapping[str, str]) -> str:
    where = "" if row["message"].startswith(row["uri"]) else f"{row['clip_id']}: "
    text = f"{where}{row['message']}"
    return text if len(text) <= MAX_EXAMPLE_CHARS else f"{text[:MAX_EXAMPLE_CHARS]}…"
