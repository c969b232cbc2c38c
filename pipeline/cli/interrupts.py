"""Interrupts: SIGTERM is treated like Ctrl-C, and none is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Self

# Delay after which an interrupt that a callback swallowed is sent again.
RESEND_AFTER_S = 0.02


class Interrupts:
    """Raises ``KeyboardInterrupt`` for SIGINT and SIGTERM, and records that one came.

    Both leave a result that the same command resumes. An interrupt inside a step of the pipeline
    comes out as Beam's ``RuntimeError``, so the exception alone does not tell. One that falls into
    a callback of Python's own, of which imports have many, is lost there and is sent once more.
    """

    def __init__(self) -> None:
        self.came = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        self._handlers_before = {
            number: signal.signal(number, self._interrupt)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._resend
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook_before
        if self._timer is not None:
            self._timer.cancel()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt

    def _resend(self, lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            self._hook_before(lost)
            return
        # A moment later: whatever is raised in here is lost as well.
        self._timer = threading.Timer(RESEND_AFTER_S, os.kill, (os.getpid(), signal.SIGINT))
        self._timer.daemon = True
        self._timer.start()
