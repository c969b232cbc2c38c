"""Counts the steps of a process on disk, to kill it at an exact one.

Python reports every step by an audit event (``sys.addaudithook``), so the product needs no hooks of
its own. A step is counted just before it is taken.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

# Events that change files, and the positions of paths in their arguments.
_CHANGES = {
    "os.rename": (0, 1),
    "os.link": (0, 1),
    "os.symlink": (0, 1),
    "os.remove": (0,),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.truncate": (0,),
    "shutil.rmtree": (0,),
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def on_each_step(folder: Path, call: Callable[[int], None]) -> None:
    """Call ``call`` with the number of each step (from 1) below ``folder``, just before it.

    An audit hook cannot be removed, so use this only in processes that end afterwards.
    """
    count = 0
    root = os.fspath(folder)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in _CHANGES or event == "open":
            places = _CHANGES.get(event) or _opened_to_write(arguments)
            if any(_is_below(arguments, place, root) for place in places):
                count += 1
                call(count)

    sys.addaudithook(hook)


def _opened_to_write(arguments: tuple[object, ...]) -> tuple[int, ...]:
    flags = arguments[2]
    return (0,) if isinstance(flags, int) and flags & _WRITING else ()


def _is_below(arguments: tuple[object, ...], place: int, root: str) -> bool:
    path = arguments[place]
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.fsdecode(path)
    descriptor = arguments[-1]  # the folder in which ``shutil.rmtree`` works
    if not text.startswith("/") and isinstance(descriptor, int) and descriptor >= 0:
        text = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), text)  # noqa: PTH115, PTH118
    return text == root or text.startswith(root + "/")
