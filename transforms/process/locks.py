"""File locks of the operating system, which end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_NEW_OR_EXISTING_FILE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


def try_lock(descriptor: int) -> bool:
    """Take an exclusive lock on an open file or folder, without waiting, until it is closed.

    Returns:
        Whether the lock was taken; False if another descriptor has one.

    Raises:
        OSError: The file system has no locks, as some network mounts.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_shared(descriptor: int) -> None:
    """Take a shared lock; wait while another descriptor has an exclusive one.

    Raises:
        OSError: The file system has no locks, as some network mounts.
    """
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def open_locked(path: Path) -> int | None:
    """Open or make a file, and lock it without waiting.

    Returns:
        The descriptor that holds the lock; None if another descriptor has it.

    Raises:
        OSError: The file cannot be opened, or the file system has no locks.
    """
    descriptor = os.open(path, _NEW_OR_EXISTING_FILE, 0o600)
    try:
        if try_lock(descriptor):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
