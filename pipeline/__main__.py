"""The command's entry, also as ``python -m pipeline``: an interrupt is one from the first line on.

Importing the command line takes a while, and whoever presses Ctrl-C meanwhile shall not see a
traceback. So this module imports next to nothing.
"""

import atexit
import contextlib
import os
import signal
import sys
from types import FrameType

EXIT_INTERRUPTED = 130
INTERRUPTED = "interrupted; the same command goes on from here"


def main() -> int:
    """Run the command line; gives the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_at_once)
    from pipeline.cli.main import main as run

    code = run()
    if code == EXIT_INTERRUPTED:
        _end_without_waiting()
    return code


def _end_without_waiting() -> None:
    """End while threads that a runner works in may still be at a bundle, which none can stop.

    Python's own end would wait for some of them and tear others out of a library, which then
    aborts; and what they say of decoders that are being closed tells nobody anything.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    atexit._run_exitfuncs()
    os._exit(EXIT_INTERRUPTED)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """Before ``cli`` has set handlers of its own, and once it has done its work."""
    with contextlib.suppress(OSError):  # standard error may be closed
        os.write(2, f"earmark: {INTERRUPTED}\n".encode())
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
