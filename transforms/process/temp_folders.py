"""A folder for this process's temporary files, which does not outlive a killed process for long.

    <system's temporary folder>/earmark-scratch-<user id>-XXXXXXXX/

It is made on first use and removed when the process ends. The folder of a killed process is removed
by the next process. Each process holds a lock on its folder, which the system releases when the
process ends, so a folder that can be locked belongs to a dead process.

Guarantees: only folders of this user with this prefix are removed, and none of a living process,
not even one made a moment ago (``_make`` checks whether another process removed it). An
unpredictable name and mode 0700 keep other users out.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from transforms.process.locks import try_lock


def _prefix() -> str:
    return f"earmark-scratch-{os.geteuid()}-"


@dataclass(frozen=True)
class _Held:
    path: Path
    descriptor: int  # holds the lock


class _Scratch:
    """The scratch folder of one process, made on first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: _Held | None = None

    def folder(self) -> Path:
        with self._lock:
            # Users and systems clear temporary folders during a run of weeks.
            if self._held is not None and not self._held.path.is_dir():
                self.forget()
            if self._held is None:
                sweep()
                self._held = _make()
            return self._held.path

    def remove(self) -> None:
        with self._lock:
            if self._held is not None:
                shutil.rmtree(self._held.path, ignore_errors=True)
                self.forget()

    def forget(self) -> None:
        if self._held is not None:
            os.close(self._held.descriptor)
            self._held = None


_scratch = _Scratch()


def scratch_folder() -> Path:
    """Return the folder of this process; it is removed when the process ends.

    Raises:
        OSError: The system's temporary folder cannot be written.
    """
    return _scratch.folder()


def sweep() -> None:
    """Remove the folders of this user's killed processes."""
    for path in _siblings():
        with contextlib.suppress(OSError):
            descriptor = _open(path)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid() and try_lock(descriptor):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _root() -> Path:
    """Return the system's temporary folder."""
    folder = Path(tempfile.gettempdir())
    return folder.parent if _is_ours(folder) else folder


def _is_ours(path: Path) -> bool:
    name = re.escape(_prefix()) + r"\w{8}"  # added by ``mkdtemp``
    return re.fullmatch(name, path.name) is not None


def _siblings() -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in _root().iterdir() if _is_ours(path)]
    return []


def _make() -> _Held:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_prefix(), dir=_root()))
        try:
            descriptor = _open(path)
        except FileNotFoundError:
            continue  # removed before it was locked
        try:
            is_locked = True  # also on a file system without locks
            with contextlib.suppress(OSError):
                is_locked = try_lock(descriptor)
            if is_locked and is_still(path, descriptor):
                return _Held(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another process is removing it


def is_still(path: Path, descriptor: int, *, follow_symlinks: bool = False) -> bool:
    """Return whether an open folder still has this path."""
    with contextlib.suppress(FileNotFoundError):
        now = path.stat(follow_symlinks=follow_symlinks)
        return os.path.samestat(now, os.fstat(descriptor))
    return False


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _start_anew() -> None:
    global _scratch
    _scratch.forget()  # after a fork, only the parent's descriptor may hold the lock
    _scratch = _Scratch()  # the old one's lock may be held by a thread of the parent


atexit.register(lambda: _scratch.remove())
os.register_at_fork(after_in_child=_start_anew)
