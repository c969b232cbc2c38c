"""The counts of what this process has done so far, for a progress display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class LiveCounts:
    """What the last step of this process has labelled and committed so far.

    ``clips`` are items that were labelled, and ``failures`` those that could not be. ``audio_s``
    counts each second once where windows overlap; at the end, it is the sum of the durations of
    clips. ``clip_windows`` are the windows of the clips that are done, without those of clips in
    progress. ``checked`` are the first windows, which are computed a second time to check the
    precision; it took ``check_s``, and ``checks_left`` are to be checked yet.
    """

    clips: int = 0
    windows: int = 0
    audio_s: float = 0.0
    failures: int = 0
    units: int = 0
    clip_windows: int = 0
    checked: int = 0
    check_s: float = 0.0
    checks_left: int = 0


@dataclass(frozen=True)
class UnitsSeen:
    """How far units are.

    ``open`` is the number of items done of each unit in progress, by its id. ``committed`` are the
    ids of the units that are done, in order; it only grows.
    """

    open: Mapping[str, int] = field(default_factory=dict)
    committed: Sequence[str] = ()


class LiveUnits:
    """The units of this process; one thread counts, others may look."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._committed: list[str] = []

    def add_item(self, unit_id: str) -> None:
        """Count an item of a unit as done."""
        self._open[unit_id] = self._open.get(unit_id, 0) + 1

    def commit(self, unit_id: str) -> None:
        """Count a unit as done."""
        self._committed.append(unit_id)
        self._open.pop(unit_id, None)

    def discard(self, unit_id: str) -> None:
        """Forget a unit that will not be committed."""
        self._open.pop(unit_id, None)

    @property
    def num_committed(self) -> int:
        """Number of units done by this process, in earlier runs too."""
        return len(self._committed)

    def seen(self, first: int = 0) -> UnitsSeen:
        """Return how far units are; of those committed, only from number ``first`` on."""
        return UnitsSeen(self._open.copy(), self._committed[first:])


live_counts = LiveCounts()
live_units = LiveUnits()
