"""Phrases that several commands print."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: ``1 unit``, ``2,000 units``, ``3 files or segments``."""
    if number != 1:
        noun = " or ".join(f"{word}s" for word in noun.split(" or "))
    return f"{number:,} {noun}"
