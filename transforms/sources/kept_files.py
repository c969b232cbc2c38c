"""Remote files that are read in parts: fetched once by a process, and kept from part to part.

Part of ``sources``. Parts of several long files come to a process in any order, and each would
else fetch the whole of its file again. What is kept lies in the scratch folder, and goes with it;
whoever reads it is given another name of it (a link), and removes that.

Guarantees: threads that want the same file wait for one fetch, those that want others do not. At
most ``MAX_FILES`` are kept, and together they take no more room than they leave free; those used
longest ago go first. A file that is being read stays, and one that is fetched is fetched however
little it leaves.
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from transforms.errors import ReadError
from transforms.process.temp_folders import scratch_folder
from transforms.sources.fetching import Fetched, ReadLimits, fetch, second_name
from transforms.storage import urls
from transforms.storage.secrets import public_uri

# The room on the disk is what bounds long files; this is for a disk that is all but empty.
MAX_FILES = 16

_IS_FULL = (errno.ENOSPC, errno.EDQUOT)

_Key = tuple[str, int | None, str | None]


@dataclass(eq=False, slots=True)
class _Kept:
    """A file that is kept, or being fetched.

    Attributes:
        lock: Held by the thread that fetches it, or makes another name of it.
        path: Where it lies; None while it is not there.
        num_bytes: Its size; as far as it is known while it is not there.
        num_users: Threads that want it and have no name of it yet.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    path: str | None = None
    num_bytes: int = 0
    num_users: int = 0

    def is_in_use(self) -> bool:
        """Whether somebody wants it, or has another name of it: removing it would free nothing."""
        if self.num_users:
            return True
        try:
            return Path(str(self.path)).stat().st_nlink > 1
        except FileNotFoundError:  # people and their machines clear temporary folders
            return False


class KeptFiles:
    """The long files of a process.

    Args:
        max_files: How many are kept.
    """

    def __init__(self, max_files: int = MAX_FILES) -> None:
        self._max_files = max_files
        self._lock = threading.Lock()  # for the rest; never held while something is fetched
        self._kept: dict[_Key, _Kept] = {}  # the one used last is the last

    def fetch(self, url: str, size: int | None, version: str | None, limits: ReadLimits) -> Fetched:
        """The bytes of a file; see ``fetch_long``."""
        if urls.is_local(url):
            return fetch(url, size, limits)
        limits = dataclasses.replace(limits, spool_bytes=1)  # whatever its size, in a file
        with self._wanting((url, size, version)) as kept:
            fetched = self._take(kept, url, size, limits)
            if _is_full(fetched) and self._drop_unused():
                fetched = self._take(kept, url, size, limits)
            if _is_full(fetched):
                with suppress(OSError):
                    fetched = Fetched(error=_no_room(url, size))
            return fetched

    @contextmanager
    def _wanting(self, key: _Key) -> Iterator[_Kept]:
        """A file for this thread alone, which is not dropped meanwhile."""
        with self._lock:
            kept = self._kept.pop(key) if key in self._kept else _Kept()
            self._kept[key] = kept
            kept.num_users += 1
        try:
            with kept.lock:
                yield kept
        finally:
            with self._lock:
                kept.num_users -= 1
                if kept.path is None and not kept.num_users:
                    del self._kept[key]

    def _take(self, kept: _Kept, url: str, size: int | None, limits: ReadLimits) -> Fetched:
        """Another name of a file, which is fetched if it is not there."""
        try:
            if kept.path is not None:
                with suppress(FileNotFoundError):  # it has been cleared away
                    return Fetched(path=second_name(kept.path), is_temporary=True)
            kept.path, kept.num_bytes = None, size or 0
            self._keep_bounds()
            fetched = fetch(url, size, limits)
            if fetched.path is None:
                return fetched
            kept.path, kept.num_bytes = fetched.path, Path(fetched.path).stat().st_size
            self._keep_bounds()  # its size may not have been known before
            return Fetched(path=second_name(kept.path), is_temporary=True)
        except OSError as error:
            return Fetched(error=error)

    def _keep_bounds(self) -> None:
        with self._lock:
            files = self._kept.values()
            to_come = sum(kept.num_bytes for kept in files if kept.path is None)
            room = shutil.disk_usage(scratch_folder()).free - to_come
            too_much = sum(kept.num_bytes for kept in files) - room
            while too_much > 0 or len(self._kept) > self._max_files:
                dropped = self._drop_one()
                if dropped is None:
                    return
                too_much -= 2 * dropped.num_bytes  # less is kept, and more is free

    def _drop_unused(self) -> int:
        """Drop all that nobody uses; how many that were."""
        with self._lock:
            before = len(self._kept)
            while self._drop_one():
                pass
            return before - len(self._kept)

    def _drop_one(self) -> _Kept | None:
        """Drop what was used longest ago, of what nobody uses."""
        for key, kept in self._kept.items():
            if not kept.is_in_use():
                del self._kept[key]
                Path(str(kept.path)).unlink(missing_ok=True)
                return kept
        return None


_long_files = KeptFiles()


def fetch_long(url: str, size: int | None, version: str | None, limits: ReadLimits) -> Fetched:
    """The bytes of a file that is read in parts; a remote one is kept for other parts.

    Args:
        url: The file.
        size: Its size as far as it is known.
        version: What tells a changed file from an unchanged one.
        limits: What it may take.
    """
    return _long_files.fetch(url, size, version, limits)


def _is_full(fetched: Fetched) -> bool:
    return isinstance(fetched.error, OSError) and fetched.error.errno in _IS_FULL


def _no_room(url: str, size: int | None) -> ReadError:
    folder = scratch_folder().parent
    needed = "an unknown number of" if size is None else str(size)
    return ReadError(
        f"no room in {folder} for {public_uri(url)}, which is fetched whole because it is "
        f"labelled in parts: it needs {needed} bytes, and {shutil.disk_usage(folder).free} are "
        "free on the disk. Make room there, raise the quota if there is one, or set TMPDIR to a "
        "folder on a larger disk; then run the same command with --retry-failed",
        error_type="NoRoom",
    )
