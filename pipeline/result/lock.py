"""The lock of an output: two runs that repair and write one folder would undo each other's work.

For a local folder, the system locks the folder itself. That needs no file, and ends with the
process. Object stores have no locks. There, a run creates a small file that names it, unless one
exists, and rewrites it every few seconds: its heartbeat. If the file has not changed for a while,
its run is dead. Clocks of different machines are never compared: a run that finds a file watches it
for that while, which is also longer than workers outlive a killed run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transforms.errors import OutputError, OutputLostError
from transforms.process.locks import try_lock
from transforms.process.temp_folders import is_still
from transforms.storage import reading, urls, writing
from transforms.storage.retries import patient_for
from transforms.storage.secrets import public_uri

logger = logging.getLogger(__name__)

LOCK_FILE = "_lock.json"
HEARTBEAT_S = 10.0
# A holder that is stuck (a silent store, a swapping machine) may miss four heartbeats before it is
# taken for dead.
PATIENCE_S = 50.0
POLL_S = 2.0
# The longest wait for the file's removal at the end of a run.
STOP_S = 10.0
MAKE_TRIES = 5


@contextlib.contextmanager
def hold_output(output: str, on_lost: Callable[[], None] | None = None) -> Iterator[None]:
    """Lock an output for this run within the ``with`` block.

    A local folder is made if needed, and removed again if the run leaves it empty.

    Args:
        output: The normalised URL of the result's folder.
        on_lost: Called from another thread when another run has taken over a remote output while
            this one was stuck; must stop this run. None lets the run continue.

    Raises:
        OutputError: Another run holds the output, or it cannot be written.
        OutputLostError: Another run has taken over the output. Raised at the end, in place of any
            other exception.
    """
    if urls.is_local(output):
        with _hold_folder(Path(urls.local_path(output)), output):
            yield
    else:
        with _hold_remote(output, on_lost):
            yield


# --- Local ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _hold_folder(path: Path, output: str) -> Iterator[None]:
    made: list[Path] = []
    descriptor = _locked_folder(path, output, made)
    try:
        yield
    finally:
        # Before the lock is released: the next holder must see that the folder is gone.
        _remove_empty(made)
        os.close(descriptor)


def _locked_folder(path: Path, output: str, made: list[Path]) -> int:
    """Return a descriptor that holds the lock; add the folders made for it to ``made``."""
    while True:
        descriptor = _open_folder(path, made)
        try:
            _lock(descriptor, output)
            # Another run may have removed the folder after it was opened here. A lock on it would
            # then keep no one out.
            if is_still(path, descriptor, follow_symlinks=True):
                return descriptor
        except BaseException:
            os.close(descriptor)
            _remove_empty(made)
            raise
        os.close(descriptor)


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()  # only if it is empty


def _lock(descriptor: int, output: str) -> None:
    try:
        is_locked = try_lock(descriptor)
    except OSError as error:
        # Some network file systems have no locks. There, users must keep runs apart.
        logger.warning("%s cannot be locked (%s): start no second run on it.", output, error)
    else:
        if not is_locked:
            raise OutputError(_words_for_held(output, "another run"))


def _open_folder(path: Path, made: list[Path]) -> int:
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; --output needs a folder. Give another path.")
        for _ in range(MAKE_TRIES - 1):
            with contextlib.suppress(FileNotFoundError):  # removed by another run just now
                return _make_and_open(path, made)
        return _make_and_open(path, made)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}. Give another --output, or fix "
            "its permissions."
        ) from error


def _make_and_open(path: Path, made: list[Path]) -> int:
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    made[:] = sorted({*made, *missing}, reverse=True)  # the deepest first
    path.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def _words_for_held(output: str, holder: str) -> str:
    return (
        f"{holder} is writing to {public_uri(output)}; wait for it or stop it, then run "
        "this command again, or give another --output."
    )


# --- Remote --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Holder:
    """The run that holds an output.

    Attributes:
        token: Unique to the run.
        machine: The name of its machine.
        process: Its process id there.
        heartbeat: How often the file has been written.
    """

    token: str
    machine: str
    process: int
    heartbeat: int = 0

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> _Holder:
        try:
            return _Holder(**json.loads(data))
        except (ValueError, TypeError):
            return _Holder("?", "?", 0)  # a damaged file is watched like any other

    def describe(self) -> str:
        return f"another run (process {self.process} on {self.machine})"


@contextlib.contextmanager
def _hold_remote(output: str, on_lost: Callable[[], None] | None) -> Iterator[None]:
    url = urls.join(output, LOCK_FILE)
    holder = _Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid())
    try:
        writing.make_folder(output)  # its error names the output, not the lock file
        _acquire(url, output, holder)
    except OSError as error:
        raise OutputError(
            f"{public_uri(output)} cannot be written: {error}. Give another --output, or fix its "
            "permissions."
        ) from error
    heart = _Heart(url, holder, on_lost)
    heart.start()
    try:
        yield
    finally:
        heart.stop()
        if heart.lost:
            raise OutputLostError(
                f"another run has taken over {public_uri(output)} while this one was stuck; "
                "nothing is lost. Let that run end, then run this command again."
            )
        if heart.left_because is not None:
            logger.warning(
                "%s could not be removed (%s): the next run will watch it for %.0f s.",
                public_uri(url),
                heart.left_because,
                PATIENCE_S,
            )


def _acquire(url: str, output: str, holder: _Holder) -> None:
    if writing.create_bytes(url, holder.to_json()):
        return
    other = _read_holder(url)
    if other is not None:
        _watch(url, output, other)
        # Another run that watched the same file may have taken over just now.
        now = _read_holder(url)
        if now is not None and now != other:
            raise OutputError(_words_for_held(output, now.describe()))
    writing.remove(url)
    if not writing.create_bytes(url, holder.to_json()):
        raise OutputError(_words_for_held(output, "another run"))


def _watch(url: str, output: str, other: _Holder) -> None:
    """Return once ``other`` has ended or shown no sign of life for long enough.

    Raises:
        OutputError: It is alive, or another run has taken its place.
    """
    logger.info(
        "%s holds %s, or was killed while it held it; watching it for up to %.0f s.",
        other.describe(),
        public_uri(output),
        PATIENCE_S,
    )
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        now = _read_holder(url)
        if now is None:
            return  # it has ended
        if now != other:
            raise OutputError(_words_for_held(output, now.describe()))


def _read_holder(url: str) -> _Holder | None:
    try:
        return _Holder.from_json(reading.read_bytes(url))
    except FileNotFoundError:
        return None


class _Heart(threading.Thread):
    """A thread that rewrites the lock file until it is stopped, and then removes it.

    It also ends if it finds another run's file. No other thread touches the file, so no late
    heartbeat restores it, and no thread waits for a silent store. Failed requests are retried until
    the next heartbeat is due.

    Attributes:
        lost: Whether another run's file was found.
        left_because: Why the file still exists at the end; None if it is removed.
    """

    def __init__(self, url: str, holder: _Holder, on_lost: Callable[[], None] | None) -> None:
        super().__init__(name="earmark-heartbeat", daemon=True)
        self._url = url
        self._holder = holder
        self._on_lost = on_lost
        self._stopped = threading.Event()
        self.lost = False
        self.left_because: str | None = None

    def run(self) -> None:
        with patient_for(HEARTBEAT_S):
            while not self._stopped.wait(HEARTBEAT_S):
                try:
                    if not self._beat():
                        return
                except OSError as error:
                    # If the error persists, the run itself will fail.
                    logger.warning("%s: no heartbeat (%s).", public_uri(self._url), error)
            try:
                writing.remove(self._url)
            except OSError as error:
                self.left_because = str(error)

    def _beat(self) -> bool:
        found = _read_holder(self._url)
        if found is not None and found.token != self._holder.token:
            self.lost = True
            if self._on_lost is not None:
                self._on_lost()
            return False
        heartbeat = self._holder.heartbeat + 1
        self._holder = dataclasses.replace(self._holder, heartbeat=heartbeat)
        writing.write_bytes(self._url, self._holder.to_json())
        return True

    def stop(self) -> None:
        """Stop the heartbeat and wait for the file's removal, for ``STOP_S`` at most."""
        self._stopped.set()
        self.join(STOP_S)
        if self.is_alive():
            self.left_because = f"the store has not answered for {STOP_S:.0f} s"
