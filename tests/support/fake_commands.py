"""Stand-ins for the work of every command: what it was called with, and what comes of it."""

from __future__ import annotations

from typing import Any

REQUIRED = ["in", "-o", "out", "-m", "model"]


TRAINING = ["train", "-t", "in", "-o", "out", "--hold-out", "fold=1"]


class Calls(list[tuple[Any, ...]]):
    """What the commands were called with; raises or returns what it is told to."""

    result: int = 0
    error: BaseException | None = None

    def take(self, *arguments: Any, **named: Any) -> int:
        self.append((*arguments, *named.values()))
        if self.error is not None:
            raise self.error
        return self.result
