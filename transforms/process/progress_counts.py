"""The counts of what this process has done so far, for a progress display."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LiveCounts:
    """What the last step of this process has labelled and committed so far.

    ``clips`` are items that were labelled, and ``failures`` those that could not be. ``audio_s``
    counts each second once where windows overlap; at the end, it is the sum of the durations of
    clips.
    """

    clips: int = 0
    windows: int = 0
    audio_s: float = 0.0
    failures: int = 0
    units: int = 0


live_counts = LiveCounts()
