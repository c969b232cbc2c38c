"""What is logged to standard error, and how."""

from __future__ import annotations

import logging
import os
import sys

# Logged by Beam in every run: about BigQuery, which Earmark does not use, about a memory figure
# that it could not read, and about options that are not its own.
NOISE = (
    "apitools not found",
    "Resource module is not available",
    "Discarding unparseable args",
)

# Their tracebacks are those of errors that reach ``main``, or of requests that are retried.
REPORTED_LATER = ("apache_beam.runners", "gcsfs")


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """A handler that logs to the current ``sys.stderr``, so that records appear above a live bar.

    Names in a record cannot command the terminal.
    """

    def __init__(self) -> None:
        from transforms.sources.clip_ids import for_terminal  # imports numpy, which --help need not

        logging.Handler.__init__(self)
        self._for_terminal = for_terminal

    @property
    def stream(self) -> object:
        """The current ``sys.stderr``: a live bar puts itself in its place."""
        return sys.stderr

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as text that is safe to print."""
        return self._for_terminal(super().format(record), keep_lines=True)


def configure_logging(quiet: bool) -> None:
    """Log Earmark's own messages from INFO on, other libraries' from WARNING on."""
    handler = StderrHandler()
    handler.addFilter(_is_worth_showing)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("pipeline", "transforms"):
        logging.getLogger(package).setLevel(logging.WARNING if quiet else logging.INFO)


def is_debugging() -> bool:
    """Return whether tracebacks are to be shown."""
    return bool(os.environ.get("EARMARK_DEBUG"))


def _is_worth_showing(record: logging.LogRecord) -> bool:
    if record.exc_info and record.exc_info[0] is KeyboardInterrupt:
        return False  # Beam logs where Ctrl-C met it
    if record.exc_info and record.name.startswith(REPORTED_LATER) and not is_debugging():
        return False
    return not record.getMessage().startswith(NOISE)
