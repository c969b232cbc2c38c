"""The entry of the ``earmark`` command, also ``python -m pipeline``.

Importing the command line takes a while. An interrupt in that time must not show a traceback, so
this module imports next to nothing before it has set its signal handlers.
"""

import atexit
import contextlib
import os
import signal
import sys
from types import FrameType

from pipeline.exit_codes import EXIT_INTERRUPTED, INTERRUPTED


def main() -> int:
    """Run the command line and return its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_at_once)
    from pipeline.cli.main import main as run

    code = run()
    if code == EXIT_INTERRUPTED:
        _end_without_waiting()
    return code


def _end_without_waiting() -> None:
    """End although threads of a runner may still be inside a bundle, which nothing can stop.

    Python's own shutdown would wait for some of them, and tear others out of a library that then
    aborts. What they print about decoders that are being closed is of no use to anyone.

    Python has no public function that calls the exit functions at once. Where the private one is
    missing, this returns, and Python calls them after it has waited for those threads.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    call_exit_functions = getattr(atexit, "_run_exitfuncs", None)
    if call_exit_functions is not None:
        call_exit_functions()
        os._exit(EXIT_INTERRUPTED)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """Handle an interrupt before ``cli`` has set its own handlers, and after it is done."""
    with contextlib.suppress(OSError):  # standard error may be closed
        os.write(2, f"earmark: {INTERRUPTED}\n".encode())
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
