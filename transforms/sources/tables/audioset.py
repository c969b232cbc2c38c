"""AudioSet's segments: comments, then ``YTID, start_seconds, end_seconds, "mid,mid"`` per clip.

The table names videos, not files. Tools that fetch the clips name them in several ways.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transforms.errors import ReadError
from transforms.sources.tables.text import CsvLines

_SEGMENT_COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")
_MAX_COMMENTS = 10


@dataclass(frozen=True, slots=True)
class Segment:
    """A line of the table: ten seconds of a video, and its labels' mids."""

    video: str
    start_s: float
    end_s: float
    labels: tuple[str, ...]

    def stems(self) -> Iterator[str]:
        """Yield the file names, without extension, that tools which fetch the clips use."""
        video, start_s, end_s = self.video, self.start_s, self.end_s
        for prefix in ("", "Y"):
            yield f"{prefix}{video}"
            yield f"{prefix}{video}_{start_s:.3f}_{end_s:.3f}"
            yield f"{prefix}{video}_{start_s:g}_{end_s:g}"
            yield f"{prefix}{video}_{start_s * 1000:.0f}_{end_s * 1000:.0f}"
            yield f"{prefix}{video}_{start_s * 1000:.0f}"


def is_audioset(csv_lines: CsvLines) -> bool:
    """Return whether the next lines are the comments that AudioSet's tables begin with."""
    comments = [line for line in csv_lines.peek(_MAX_COMMENTS) if line.startswith("#")]
    return any(
        tuple(name.strip() for name in line.lstrip("# ").split(",")) == _SEGMENT_COLUMNS
        for line in comments
    )


def read_segments(csv_lines: CsvLines) -> Iterator[tuple[str, Segment | ReadError]]:
    """Yield each line's name with its segment, or with what is wrong with it."""
    while True:
        csv_lines.record.clear()
        try:
            line = next(csv_lines, None)
        except ReadError as error:
            yield f"line {csv_lines.number}", error
            continue
        if line is None:
            return
        if line.strip() and not line.startswith("#"):
            yield f"line {csv_lines.number}", _segment_of(line)


def _segment_of(line: str) -> Segment | ReadError:
    try:
        fields: Sequence[str] = next(csv.reader([line], skipinitialspace=True))
        video, start_s, end_s, labels = fields
        names = tuple(name.strip() for name in labels.split(",") if name.strip())
        return Segment(video, float(start_s), float(end_s), names)
    except (ValueError, csv.Error):
        return ReadError("does not have the four fields of a segment")
