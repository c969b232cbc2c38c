"""Where a process stands with what it does on disk, and killing it at an exact step of that.

Python tells of every step that it takes on disk (``sys.addaudithook``), so that nothing in the
product has to be prepared for it. A step is counted just before it is taken.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

# Events that change what is on disk, and where in their arguments paths stand.
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
    """Have ``call`` called with the number of each step (from 1) on what is below ``folder``.

    A hook cannot be taken away again: this is for processes that are not needed afterwards.
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
    descriptor = arguments[-1]  # of the folder that ``shutil.rmtree`` is in
    if not text.startswith("/") and isinstance(descriptor, int) and descriptor >= 0:
        text = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), text)  # noqa: PTH115, PTH118
    return text == root or text.startswith(root + "/")
