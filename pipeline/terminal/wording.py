"""Numbers in words, as every command prints them. Imports nothing: workers load it too."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: ``1 unit``, ``2,000 units``, ``3 files or segments``."""
    if number != 1:
        noun = " or ".join(f"{word}s" for word in noun.split(" or "))
    return f"{number:,} {noun}"


def percent(share: float) -> str:
    """Return a share in [0, 1] as ``93 %``."""
    return f"{100 * share:.0f} %"


def format_duration(seconds: float) -> str:
    """Return ``42 s``, ``3:07`` (minutes) or ``2:03:07`` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def format_audio(seconds: float) -> str:
    """Return an amount of audio as ``12.3 h``; minutes or seconds while it is less."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
