"""Write files: whole or not at all, on any store.

Locally: a temporary name in the same folder, fsync, ``os.replace``, fsync of the folder. In object
stores: one upload, after which the object appears complete; the size that the store then has is
compared with what was written. ``with fs.open(url, "wb")`` is never used: an exception inside it
closes the file, which publishes a truncated object.
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

# Stores that refuse to replace an existing object with ``pipe_file(mode="create")``.
_EXCLUSIVE = frozenset({"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "memory"})
STAGING_FOLDER = "_staging"
_TEMPORARY = re.compile(r"\..{1,100}\.[0-9a-f]{32}\.tmp", re.DOTALL)  # as _temporary_name gives it
# Errors of ``link`` on file systems without hard links (FAT, some network mounts).
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file in one step, replacing an existing one; make folders as needed.

    Raises:
        OutputError: The protocol is read-only.
        OSError: It cannot be written; an existing file is unchanged.
    """
    if is_local(url):
        path = local_path(url)
        with _temporary_beside(path) as temporary:
            _write_synced(temporary, data)
            os.replace(temporary, path)  # noqa: PTH105
        _sync_folder(parent(path))
        return
    fs, path = open_filesystem(url, to_write=True)
    _publish(fs, url, path, len(data), lambda target: fs.pipe_file(target, data))


def create_bytes(url: str, data: bytes) -> bool:
    """Write a small file only if there is none, and return whether this call made it.

    If several processes try at once, one of them makes it, and it appears whole. That holds locally
    and in ``gs://``, ``s3://`` and ``az://``, where the store itself refuses to replace an object
    (an imitation of S3 without ``If-None-Match`` refuses only objects that existed before the
    call). On other stores, the file is first looked for and then written.

    ``data`` must be unique to this call: if the answer to a request is lost, it tells whose file it
    is.

    Raises:
        OutputError: The protocol is read-only.
        OSError: It cannot be written, or the store gives no answer.
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
        # A request whose answer was lost is sent again, and then finds its own object.
        try:
            return read_bytes(url) == data
        except FileNotFoundError:
            return False
    return True


def _create_object(fs: Any, path: str, data: bytes) -> None:
    try:
        fs.pipe_file(path, data, mode="create")
    except Exception as error:
        if status_of(error) == 412:  # s3fs looks for it in the answer's text, which may be empty
            raise FileExistsError(path) from error
        raise


def _create_local(path: str, data: bytes) -> bool:
    with _temporary_beside(path) as temporary:
        _write_synced(temporary, data)
        try:
            os.link(temporary, path)  # fails if the file exists, and shows it whole
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_link(path, data)
    _sync_folder(parent(path))
    return True


def _create_without_link(path: str, data: bytes) -> bool:
    try:
        _write_synced(path, data)
    except FileExistsError:
        return False
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    _sync_folder(parent(path))
    return True


def _write_synced(path: str, data: bytes) -> None:
    """Write a new file, and sync it to the disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# What to do about an error of the system.
_REMEDIES = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room there, or raise the quota",
    errno.EFBIG: "Raise the limit on file size (ulimit -f)",
    errno.EROFS: "Make it writable again",
    errno.EACCES: "Fix its permissions",
    errno.EPERM: "Fix its permissions",
    errno.ENOENT: "Restore it, or give another --output",
    errno.EIO: "Check the disk",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
}


@contextmanager
def writing_to(output_url: str) -> Iterator[None]:
    """Turn an ``OSError`` of the ``with`` block into one that ends the run and says what to do.

    Raises:
        WriteError: In place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        uri, number = public_uri(output_url), error.errno
        # Arrow's text holds the system's words, with neither an errno nor a file name apart.
        reason = os.strerror(number) if number else public_text(str(error))
        remedy = _REMEDIES.get(number or 0, "Fix that")
        raise WriteError(
            f"{uri} cannot be written: {reason}. {remedy}{_room(output_url)}, then run the same "
            "command again to resume: what is committed stays."
        ) from error


def _room(url: str) -> str:
    """Describe the free space on the disk of a local folder."""
    with suppress(OSError, ValueError):
        num_bytes = shutil.disk_usage(local_path(url)).free
        return f" ({num_bytes / 2**20:,.1f} MiB are free)"
    return ""


def put_file(source: str, url: str) -> None:
    """Move the finished local file ``source`` to ``url`` in one step.

    Raises:
        OutputError: The protocol is read-only.
        OSError: It cannot be written; ``source`` and an existing file at ``url`` are unchanged.
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
            with _temporary_beside(path) as temporary:
                shutil.copyfile(source, temporary)
                _sync_file(temporary)
                os.replace(temporary, path)  # noqa: PTH105
            Path(source).unlink()
        _sync_folder(parent(path))
        return
    fs, path = open_filesystem(url, to_write=True)
    size = os.path.getsize(source)  # noqa: PTH202
    _publish(fs, url, path, size, lambda target: fs.put_file(source, target))
    Path(source).unlink()


def _publish(fs: Any, url: str, path: str, size: int, upload: Callable[[str], None]) -> None:
    """Upload a file, and retry until the store has ``size`` bytes of it."""

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
            with suppress(Exception):  # the first error is the one to report
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
    # A 410 of Google is about an upload that took too long or is complete, not about the bucket.
    return may_pass(error) or status_of(error) == 410 or "upload_id=" in str(error)


def _temporary_name(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name[:100]}.{uuid.uuid4().hex}.tmp"


@contextmanager
def _temporary_beside(path: str) -> Iterator[str]:
    """Make the folder of ``path``, and give a name in it for a file that is gone afterwards."""
    make_folder(parent(path))
    temporary = _temporary_name(path)
    try:
        yield temporary
    finally:
        Path(temporary).unlink(missing_ok=True)


def is_temporary_name(name: str) -> bool:
    """Return whether a file of this name was being written when its process was killed."""
    return _TEMPORARY.fullmatch(name) is not None


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
    """Make a folder and its parents; do nothing in object stores, which need none."""
    if is_local(url):
        Path(local_path(url)).mkdir(parents=True, exist_ok=True)
        return
    fs, path = open_filesystem(url, to_write=True)
    if protocol(url) not in OBJECT_STORES:
        ask_store(url, lambda: fs.makedirs(path, exist_ok=True))


def remove(url: str) -> None:
    """Remove a file if it exists."""
    with suppress(FileNotFoundError):
        if is_local(url):
            Path(local_path(url)).unlink()
            return
        fs, path = open_filesystem(url, to_write=True)
        ask_store(url, lambda: fs.rm_file(path))


def remove_empty_folder(url: str) -> bool:
    """Remove an empty local folder, and return whether it is gone; True for object stores."""
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
    """Make and return a local folder for files that will be moved to ``output_url``.

    For a local output, it is inside the output, so that moving a file is a rename on the same file
    system. For a remote one, it is among this process's temporary files.
    """
    if is_local(output_url):
        folder = Path(local_path(output_url)) / STAGING_FOLDER / run_id
    else:
        folder = scratch_folder() / run_id
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
