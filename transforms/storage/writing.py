"""Write files: whole or not at all, on any store.

Locally: a temporary name in the same folder, fsync, ``os.replace``, fsync of the folder. Object
stores: one upload, which shows the object only once it is complete; the size that the store then
has is compared with what was written. ``with fs.open(url, "wb")`` is never used: leaving it on an
exception closes the file, and that publishes a truncated object.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transforms.errors import WriteError
from transforms.process.temp_folders import scratch_folder
from transforms.storage.filesystem import ask_store, exists, fresh, open_filesystem
from transforms.storage.reading import read_bytes
from transforms.storage.retries import ShortBodyError, may_pass, status_of
from transforms.storage.secrets import public_text, public_uri
from transforms.storage.urls import OBJECT_STORES, is_local, local_path, parent, protocol

# Where ``pipe_file(mode="create")`` has the store itself refuse to replace what is there.
_EXCLUSIVE = frozenset({"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "memory"})
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
STAGING_FOLDER = "_staging"
_TEMPORARY = re.compile(r"\..{1,100}\.[0-9a-f]{32}\.tmp", re.DOTALL)  # as _temporary_name gives it
# What ``link`` says on file systems without hard links (FAT, some network mounts).
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file in one step, over one that is there; folders are made as needed.

    Raises:
        OutputError: The protocol is read-only.
        OSError: It cannot be written; what was there before is still there.
    """
    if is_local(url):
        path = local_path(url)
        make_folder(parent(path))
        temporary = _temporary_name(path)
        try:
            _write_synced(os.open(temporary, _NEW_FILE, 0o666), data)
            os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(parent(path))
        return
    fs, path = open_filesystem(url, to_write=True)
    _publish(fs, url, path, len(data), lambda target: fs.pipe_file(target, data))


def create_bytes(url: str, data: bytes) -> bool:
    """Write a small file only if there is none yet; whether this call made it.

    Of several that try at once, one makes it, and it appears whole: locally, and in ``gs://``,
    ``s3://`` and ``az://``, where the store itself refuses to replace what is there (an imitation
    of S3 that knows no ``If-None-Match`` refuses only what was there before). Anywhere else the
    file is looked for and then written.

    Args:
        url: The file.
        data: Its content, unlike what anyone else would write there: where an answer got lost on
            the way, the content says whose file it is.

    Raises:
        OutputError: The protocol is read-only.
        OSError: It cannot be written, or the store cannot say.
    """
    if is_local(url):
        return _create_local(local_path(url), data)
    fs, path = open_filesystem(url, to_write=True)
    if exists(url):
        return False
    if protocol(url) not in _EXCLUSIVE:
        write_bytes(url, data)
        return True
    try:
        ask_store(url, lambda: _create_object(fs, path, data))
    except FileExistsError:
        # A request whose answer is lost is sent again, and then finds its own work.
        try:
            return read_bytes(url) == data
        except FileNotFoundError:
            return False
    return True


def _create_object(fs: Any, path: str, data: bytes) -> None:
    try:
        fs.pipe_file(path, data, mode="create")
    except Exception as error:
        if status_of(error) == 412:  # s3fs looks for it in the answer's text, which may be lost
            raise FileExistsError(path) from error
        raise


def _create_local(path: str, data: bytes) -> bool:
    make_folder(parent(path))
    temporary = _temporary_name(path)
    try:
        _write_synced(os.open(temporary, _NEW_FILE, 0o666), data)
        try:
            os.link(temporary, path)  # fails where there is one, and shows the file whole
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_link(path, data)
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(parent(path))
    return True


def _create_without_link(path: str, data: bytes) -> bool:
    try:
        descriptor = os.open(path, _NEW_FILE, 0o666)
    except FileExistsError:
        return False
    try:
        _write_synced(descriptor, data)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    _sync_folder(parent(path))
    return True


def _write_synced(descriptor: int, data: bytes) -> None:
    """Write a new file, close it, and have it on the disk."""
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# What the system says, and what to do about it.
_REMEDIES = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room there, or have the quota raised",
    errno.EFBIG: "Raise the limit for the size of files (ulimit -f)",
    errno.EROFS: "Make it writable again",
    errno.EACCES: "Mend its permissions",
    errno.EPERM: "Mend its permissions",
    errno.ENOENT: "Bring it back, or give another --output",
    errno.EIO: "Check the disk",
    errno.EMFILE: "Raise the limit for open files (ulimit -n)",
}


@contextmanager
def writing_to(output_url: str) -> Iterator[None]:
    """Say of what goes wrong meanwhile that it ends the run, where that was, and what helps.

    Raises:
        WriteError: In place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        uri, number = public_uri(output_url), error.errno
        # Arrow's text has the system's words in it, and neither the file nor its name apart.
        reason = os.strerror(number) if number else public_text(str(error))
        remedy = _REMEDIES.get(number or 0, "Mend that")
        raise WriteError(
            f"{uri} cannot be written: {reason}. {remedy}{_room(output_url)}, and run the same "
            "command again: what is committed stays, and it goes on from there."
        ) from error


def _room(url: str) -> str:
    """How much is left on the disk that holds a local folder."""
    with suppress(OSError, ValueError):
        left = shutil.disk_usage(local_path(url)).free
        return f" ({left / 2**20:,.1f} MiB are free)"
    return ""


def put_file(source: str, url: str) -> None:
    """Move the finished local file ``source`` to ``url`` in one step; ``source`` is then gone.

    Raises:
        OutputError: The protocol is read-only.
        OSError: It cannot be written; what was at ``url`` before, and ``source``, are still there.
    """
    if is_local(url):
        path = local_path(url)
        make_folder(parent(path))
        _sync_file(source)
        try:
            os.replace(source, path)  # noqa: PTH105
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy_across(source, path)
        _sync_folder(parent(path))
        return
    fs, path = open_filesystem(url, to_write=True)
    size = os.path.getsize(source)  # noqa: PTH202
    _publish(fs, url, path, size, lambda target: fs.put_file(source, target))
    Path(source).unlink()


def _publish(fs: Any, url: str, path: str, size: int, upload: Callable[[str], None]) -> None:
    """Upload until the store has ``size`` bytes of it."""

    def once() -> None:
        if protocol(url) in OBJECT_STORES:
            upload(path)
            _check_size(fs, path, size)
            return
        # A remote file system (sftp, hdfs, …) shows a file while it grows.
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        temporary = _temporary_name(path)
        try:
            upload(temporary)
            _check_size(fs, temporary, size)
            fs.mv(temporary, path)
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                fs.rm_file(temporary)
            raise

    ask_store(url, once, _upload_may_pass)


def _check_size(fs: Any, path: str, size: int) -> None:
    try:
        stored = fresh(fs).info(path)["size"]
    except FileNotFoundError:
        stored = "none"
    if stored != size:
        raise ShortBodyError(f"{size} bytes were written, and the store has {stored} of them")


def _upload_may_pass(error: BaseException) -> bool:
    # Google forgets an upload that goes on for too long, or that it has completed; not the bucket.
    return may_pass(error) or status_of(error) == 410 or "upload_id=" in str(error)


def _temporary_name(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name[:100]}.{uuid.uuid4().hex}.tmp"


def is_temporary_name(name: str) -> bool:
    """Whether a file of this name is one that was being written when its process was killed."""
    return _TEMPORARY.fullmatch(name) is not None


def _copy_across(source: str, path: str) -> None:
    temporary = _temporary_name(path)
    try:
        shutil.copyfile(source, temporary)
        _sync_file(temporary)
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    Path(source).unlink()


def _sync_file(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: str) -> None:
    with suppress(OSError):  # some file systems cannot sync a folder; the file itself is synced
        _sync_file(path)


def make_folder(url: str) -> None:
    """Make a folder and those above it; object stores have none, and need none."""
    if is_local(url):
        Path(local_path(url)).mkdir(parents=True, exist_ok=True)
        return
    fs, path = open_filesystem(url, to_write=True)
    if protocol(url) not in OBJECT_STORES:
        ask_store(url, lambda: fs.makedirs(path, exist_ok=True))


def remove(url: str) -> None:
    """Remove a file; nothing happens where there is none."""
    with suppress(FileNotFoundError):
        if is_local(url):
            Path(local_path(url)).unlink()
            return
        fs, path = open_filesystem(url, to_write=True)
        ask_store(url, lambda: fs.rm_file(path))


def remove_empty_folder(url: str) -> bool:
    """Remove a folder if nothing is in it; whether it is gone (object stores have none)."""
    if not is_local(url):
        return True
    try:
        Path(local_path(url)).rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def staging_path(output_url: str, run_id: str) -> str:
    """A local folder for files on their way to ``output_url``; made if need be.

    For a local output it lies inside it, so that moving a file into place is a rename on the same
    file system; else among this process's temporary files (``scratch``).
    """
    if is_local(output_url):
        folder = Path(local_path(output_url)) / STAGING_FOLDER / run_id
    else:
        folder = scratch_folder() / run_id
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
