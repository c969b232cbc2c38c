"""This process's own folder for temporary files, which no death of the process can leave behind.

    <system's temporary folder>/earmark-scratch-<user id>-XXXXXXXX/

It is made when it is first asked for, and removed when the process ends. A process that is killed
cannot do that: the next one does. Whoever lives holds a lock on its folder, and the system ends the
lock with the process, however that ends; so a folder that can be locked is a dead one's.

Guarantees: only folders of this user are removed, only those with our name, and none whose process
lives, not even one made a moment ago (``_make`` looks whether it was taken for dead). A name that
nobody can foresee and mode 0700 keep others out.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transforms.process.locks import try_lock


def _prefix() -> str:
    return f"earmark-scratch-{os.geteuid()}-"


@dataclass(frozen=True)
class _Held:
    """A folder and the descriptor that carries its lock."""

    path: Path
    descriptor: int


class _Scratch:
    """The folder of one process, once it has one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: _Held | None = None

    def folder(self) -> Path:
        with self._lock:
            # People and their machines clear temporary folders while a run goes on for weeks.
            if self._held is not None and not self._held.path.is_dir():
                self._forget()
            if self._held is None:
                sweep()
                self._held = _make()
            return self._held.path

    def remove(self) -> None:
        with self._lock:
            if self._held is not None:
                shutil.rmtree(self._held.path, ignore_errors=True)
                self._forget()

    def leave_to_parent(self) -> None:
        """After a fork: the folder is the parent's, and must not look alive when that has died."""
        if self._held is not None:
            self._forget()

    def _forget(self) -> None:
        if self._held is not None:
            os.close(self._held.descriptor)
            self._held = None


_scratch = _Scratch()


def scratch_folder() -> Path:
    """The folder of this process, made if need be; it is emptied and removed when the process ends.

    Raises:
        OSError: The system's temporary folder cannot be written.
    """
    return _scratch.folder()


def sweep() -> None:
    """Remove the folders that processes of this user have left by being killed."""
    for path in _siblings():
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            if os.fstat(descriptor).st_uid == os.geteuid() and try_lock(descriptor):
                shutil.rmtree(path, ignore_errors=True)


def _root() -> Path:
    """The system's temporary folder."""
    folder = Path(tempfile.gettempdir())
    return folder.parent if _is_ours(folder) else folder


def _is_ours(path: Path) -> bool:
    name = re.escape(_prefix()) + r"\w{8}"  # as ``mkdtemp`` ends it
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
            continue  # swept before it could be locked
        try:
            if _lock_if_supported(descriptor) and is_still(path, descriptor):
                return _Held(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # being swept just now


def _lock_if_supported(descriptor: int) -> bool:
    """Take the lock; where the file system has none, do without."""
    try:
        return try_lock(descriptor)
    except OSError:
        return True


def is_still(path: Path, descriptor: int, *, follow_symlinks: bool = False) -> bool:
    """Whether what was opened is what has this name now; a folder may have been removed since."""
    with contextlib.suppress(FileNotFoundError):
        now = path.stat(follow_symlinks=follow_symlinks)
        return os.path.samestat(now, os.fstat(descriptor))
    return False


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = _open(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _start_anew() -> None:
    global _scratch
    _scratch.leave_to_parent()
    _scratch = _Scratch()  # its lock may be held by a thread that is not here


atexit.register(lambda: _scratch.remove())
os.register_at_fork(after_in_child=_start_anew)
