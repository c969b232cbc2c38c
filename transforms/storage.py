"""The only door to storage: local paths and fsspec URLs behind one set of functions.

Everything is named by text: an absolute local path without ``file://``, or a full URL
(``gs://…``, ``s3://…``, ``az://…``, ``https://…``, ``memory://…``). No other module imports fsspec.

Guarantees:
- **Writing is whole or not at all.** Locally: a temporary name in the same folder, fsync,
  ``os.replace``, fsync of the folder. Object stores: one upload, which shows the object only once
  it is complete. ``with fs.open(url, "wb")`` is never used: leaving it on an exception closes the
  file, and that publishes a truncated object.
- **Absent is not the same as unreachable.** Only "there is no such file" counts as absent; any
  other error is raised. (``fsspec``'s own ``exists`` says no to every error.)
- **Secrets stay out of messages**: errors name a URL by ``public_uri``, and whatever a library says
  has the URLs in it treated likewise.

Errors: what storage says at run time is an ``OSError`` (``FileNotFoundError``,
``PermissionError``, ``TimeoutError`` where it is one of these), because only the caller knows
whether it costs an item, a container or the run. What can never work (an unknown protocol, a
missing extra) is a ``UsageError``; writing to a read-only protocol is an ``OutputError``.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import re
import shutil
import stat as stat_module
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

import fsspec

from transforms.errors import OutputError, UsageError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(?:::.*)?://", re.DOTALL)
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>]+")
_READ_ONLY = frozenset({"http", "https"})
# One upload publishes the whole object, and listing a prefix is one flat request.
_OBJECT_STORES = frozenset(
    {"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "hf", "memory", "oci", "oss"}
)
_EXTRAS = {"s3": "s3", "s3a": "s3", "az": "azure", "abfs": "azure", "abfss": "azure"}
_STAT_THREADS = 32
_COPY_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 16
STAGING_FOLDER = "_staging"

# What signs a request, by cloud; compared in lower case. Names that mean something else elsewhere
# (``expires``, ``st``) only count beside the parameter that makes the URL a signed one.
_SECRET_PREFIXES = ("x-amz-", "x-goog-")
# fmt: off
_SECRET_NAMES = {
    "awsaccesskeyid", "googleaccessid", "key-pair-id", "signature", "sig", "token", "access_token",
    "access-token", "accesstoken", "auth_token", "auth-token", "authtoken", "id_token",
    "refresh_token", "oauth_token", "sas_token", "security_token", "session_token", "api_key",
    "api-key", "apikey",
}
_BESIDE_SIGNATURE = {
    "expires", "policy", "hash-algorithm", "security-token",
}
# Azure service, account and user-delegation SAS.
_BESIDE_SIG = {
    "se", "sp", "sv", "sr", "st", "spr", "sip", "ss", "srt", "si", "ses", "skoid", "sktid", "skt",
    "ske", "sks", "skv", "saoid", "suoid", "scid", "sdd", "sduoid", "skdutid", "rscc", "rscd",
    "rsce", "rscl", "rsct",
}
# fmt: on


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file, as its store describes it.

    Attributes:
        url: Absolute local path, or full URL (as it was asked for: it may carry a signature).
        size: Size in bytes, or None if the store does not say.
        version: What changes when the content does: generation, etag or modification time; None
            if the store gives none.
    """

    url: str
    size: int | None
    version: str | None


# --- Names ---------------------------------------------------------------------------------


def is_local(url: str) -> bool:
    """Whether ``url`` is a path on this machine (with or without ``file://``)."""
    is_url = "://" in url and _URL.match(url) is not None
    return not is_url or url.startswith(("file://", "local://"))


def protocol(url: str) -> str:
    """The URL's protocol in lower case, ``file`` for a local path."""
    return "file" if is_local(url) else re.split("::|://", url, maxsplit=1)[0].lower()


def normalise(text: str) -> str:
    """The name everything else uses: an absolute path, or the URL without a trailing slash.

    A relative path becomes absolute, ``~`` is expanded, ``.`` and ``..`` are resolved by name,
    ``file://`` goes. The path of a ``file://`` URL is taken as it stands; where nothing has that
    name, percent-encoding is undone. An ``http(s)`` URL is left as it is.
    """
    if not is_local(text):
        if protocol(text) in _READ_ONLY or text.endswith("://"):
            return text
        return re.sub(r"(?<![:/])/+$", "", text)
    path = text
    if text.startswith(("file://", "local://")):
        path = text.partition("://")[2]
        path = path.removeprefix("localhost") if path.startswith("localhost/") else path
        if not os.path.lexists(path) and os.path.lexists(unquote(path)):
            path = unquote(path)
    elif text.startswith("~"):
        path = os.path.expanduser(text)  # noqa: PTH111
    return os.path.abspath(path)  # noqa: PTH100


def local_path(url: str) -> str:
    """The path of a local ``url``.

    Raises:
        ValueError: ``url`` is not local.
    """
    if not is_local(url):
        raise ValueError(f"{public_uri(url)} is not a local path")
    return url if url.startswith("/") else normalise(url)


def join(base: str, *parts: str) -> str:
    """``base`` with ``parts`` below it, joined by single slashes."""
    head = base if base.endswith("://") else base.rstrip("/") + "/"
    return head + "/".join(part.strip("/") for part in parts)


def parent(url: str) -> str:
    """The folder that holds ``url``, without a query; the top is its own parent."""
    if is_local(url):
        return str(Path(local_path(url)).parent)
    head, tail = re.match(r"(.*?://)(.*)", _without_query(url), re.DOTALL).groups()  # type: ignore[union-attr]
    return cast(str, head + (tail.rpartition("/")[0] or tail))


def file_name(url: str) -> str:
    """The last part of ``url``, without a query."""
    return _without_query(url).rstrip("/").rpartition("/")[2]


def _without_query(url: str) -> str:
    # Only http has queries; elsewhere "?" may be part of an object's name.
    return re.split(r"[?#]", url, maxsplit=1)[0] if protocol(url) in _READ_ONLY else url


def public_uri(url: str) -> str:
    """``url`` without what signs it; fit to be written and printed.

    Drops the known signature parameters (AWS, Google Cloud, CloudFront, Azure SAS, tokens) and
    ``user:password@``. Nothing else: any other query string is part of the name. Local paths
    come back unchanged.
    """
    if is_local(url):
        return url
    url = re.sub(r"(://)[^/?#@]*:[^/?#@]*@", r"\1", url)
    url = re.sub(r"^(https?://)[^/?#@]*@", r"\1", url, flags=re.IGNORECASE)
    base, mark, query = url.partition("?")
    if not mark:
        return url
    query, hash_mark, fragment = query.partition("#")
    pairs = query.split("&")
    names = {_parameter_name(pair) for pair in pairs}
    secret = _SECRET_NAMES.copy()
    if names & {"signature", "key-pair-id"}:
        secret |= _BESIDE_SIGNATURE
    if "sig" in names:
        secret |= _BESIDE_SIG
    kept = [
        pair
        for pair in pairs
        if not (name := _parameter_name(pair)).startswith(_SECRET_PREFIXES) and name not in secret
    ]
    if len(kept) == len(pairs):
        return url
    return base + ("?" + "&".join(kept) if kept else "") + hash_mark + fragment


def _parameter_name(pair: str) -> str:
    return unquote(pair.partition("=")[0]).lower()


# --- Looking -------------------------------------------------------------------------------


def stat(url: str) -> FileInfo:
    """Size and version of one file.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: It is a folder.
        OSError: The store cannot say.
    """
    if is_local(url):
        path = local_path(url)
        status = os.stat(path)  # noqa: PTH116
        if stat_module.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder, a file was expected", path)
        return FileInfo(path, status.st_size, str(status.st_mtime_ns))
    with _told(url):
        details = _details(url)
    if details["type"] == "directory":
        raise IsADirectoryError(f"{public_uri(url)} is a folder, a file was expected")
    return FileInfo(url, details.get("size"), _version(details))


def stat_many(urls: Iterable[str]) -> dict[str, FileInfo | OSError]:
    """``stat`` of many files, remote ones at the same time; an error takes the place of its file.

    Returns:
        One entry per distinct URL, in the order given.
    """
    unique = list(dict.fromkeys(urls))
    if all(is_local(url) for url in unique):
        return {url: _stat_or_error(url) for url in unique}
    with ThreadPoolExecutor(min(_STAT_THREADS, len(unique)), "earmark-stat") as pool:
        return dict(zip(unique, pool.map(_stat_or_error, unique), strict=True))


def _stat_or_error(url: str) -> FileInfo | OSError:
    try:
        return stat(url)
    except OSError as error:
        return error


def exists(url: str) -> bool:
    """Whether there is a file or folder; an unreachable store raises ``OSError``, never "no"."""
    return _kind(url) is not None


def is_folder(url: str) -> bool:
    """Whether ``url`` is a folder (in an object store: a prefix with something below it)."""
    return _kind(url) == "directory"


def _kind(url: str) -> str | None:
    """``directory``, ``file`` (anything that is not a folder), or None where there is nothing."""
    try:
        if is_local(url):
            mode = os.stat(local_path(url)).st_mode  # noqa: PTH116
            return "directory" if stat_module.S_ISDIR(mode) else "file"
        with _told(url):
            return cast(str, _details(url)["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def list_files(url: str, on_error: Callable[[OSError], None] | None = None) -> Iterator[FileInfo]:
    """Every file below the folder ``url``, sorted by name.

    Locally, links to folders are followed, and each real folder is listed once, under its own
    path where that lies below ``url``; so a loop of links ends. A link to nothing is listed
    (reading it will say what is wrong); pipes, sockets and devices are not files.

    Args:
        url: The folder; nothing below it means no files.
        on_error: Called with the error of each folder that cannot be listed, and of each entry
            that leads nowhere for another reason (a link to itself); None raises it.

    Raises:
        OSError: There is such an error, and no ``on_error``.
    """
    report = on_error or _raise
    if is_local(url):
        found = sorted(_walk_local(local_path(url), report), key=lambda info: info.url)
        yield from found
        return
    fs, root = _filesystem(url)
    fs.invalidate_cache()
    if protocol(url) in _OBJECT_STORES:
        try:
            with _told(url):
                details = fs.find(root, detail=True)
        except OSError as error:
            report(error)
            return
    else:
        details = dict(_walk_remote(fs, url, root, report))
    for path in sorted(details):
        if details[path]["type"] == "file" and not path.endswith("/"):
            info = details[path]
            yield FileInfo(_below(url, root, path), info.get("size"), _version(info))


def _raise(error: OSError) -> None:
    raise error


def _walk_local(root: str, report: Callable[[OSError], None]) -> Iterator[FileInfo]:
    """Real folders first, then those that only links lead to; each real folder once."""
    seen: set[tuple[int, int]] = set()
    pending, links = [root], list[str]()
    while pending or links:
        folder = pending.pop() if pending else links.pop(0)
        try:
            status = os.stat(folder)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            report(error)
            continue
        for entry in children:
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else pending).append(entry.path)
                    continue
                info = _entry_info(entry)
            except OSError as error:
                report(error)
                continue
            if info is not None:
                yield info


def _entry_info(entry: os.DirEntry[str]) -> FileInfo | None:
    """A file, or a link to nothing; None for a pipe, a socket or a device."""
    if entry.is_file():
        status = entry.stat()
        return FileInfo(entry.path, status.st_size, str(status.st_mtime_ns))
    return FileInfo(entry.path, None, None) if entry.is_symlink() else None


def _walk_remote(
    fs: Any, url: str, root: str, report: Callable[[OSError], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    # fsspec's own walk passes over folders that cannot be listed without a word.
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            with _told(_below(url, root, folder)):
                children = fs.ls(folder, detail=True)
        except OSError as error:
            report(error)
            continue
        for child in children:
            if child["type"] == "directory":
                pending.append(child["name"])
            else:
                yield child["name"], child


def _below(url: str, root: str, path: str) -> str:
    """The URL of ``path``, which the file system listed below ``root``."""
    rest = path.removeprefix(root).strip("/")
    return join(url, rest) if rest else url


def is_glob(url: str) -> bool:
    """Whether ``url`` is a pattern; an ``http(s)`` URL never is (``?`` starts its query)."""
    return protocol(url) not in _READ_ONLY and glob.has_magic(url)


def glob_files(
    pattern: str, on_error: Callable[[OSError], None] | None = None
) -> Iterator[FileInfo]:
    """Every file that ``pattern`` matches, sorted by name.

    ``**`` matches folders of any depth. A folder that is matched stands for all files below it,
    as it does where a shell expands the pattern (with ``**``, they are matched anyway).

    Args:
        pattern: What names must look like.
        on_error: As for ``list_files``, of the folders that are matched.

    Raises:
        OSError: The store cannot say, or a folder cannot be listed and there is no ``on_error``.
    """
    folders: list[str] = []
    files: dict[str, FileInfo] = {}
    if is_local(pattern):
        for path in glob.iglob(local_path(pattern), recursive=True):  # noqa: PTH207
            if Path(path).is_dir():
                folders.append(path)
            elif Path(path).is_file():
                files[path] = stat(path)
    else:
        fs, root = _filesystem(pattern)
        fs.invalidate_cache()
        with _told(pattern):
            matches = fs.glob(root, detail=True)
        start = pattern[: pattern.index("://") + 3]
        for path, details in matches.items():
            url = start + path.lstrip("/")
            if details["type"] == "directory":
                folders.append(url)
            else:
                files[url] = FileInfo(url, details.get("size"), _version(details))
    if "**" not in pattern:
        for folder in folders:
            files.update((info.url, info) for info in list_files(folder, on_error))
    for url in sorted(files):
        yield files[url]


def list_names(folder_url: str) -> list[str]:
    """Names of the files directly in a folder, sorted; empty where there is no such folder."""
    try:
        if is_local(folder_url):
            with os.scandir(local_path(folder_url)) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        fs, root = _filesystem(folder_url)
        fs.invalidate_cache()
        with _told(folder_url):
            children = fs.ls(root, detail=True)
    except FileNotFoundError:
        return []
    paths = (child["name"] for child in children if child["type"] == "file")
    return sorted(name for path in paths if path != root and (name := path.rpartition("/")[2]))


def _details(url: str) -> dict[str, Any]:
    fs, path = _filesystem(url)
    fs.invalidate_cache()  # another process may have written since the last listing
    return cast(dict[str, Any], fs.info(path))


def _version(details: dict[str, Any]) -> str | None:
    """What changes when the content does, from the names that stores give it.

    Google's generation comes before its etag, which also changes with the metadata.
    """
    names = ("generation", "etag", "ETag", "Content-MD5", "mtime", "modified", "updated")
    for name in (*names, "LastModified", "last_modified", "Last-Modified", "created"):
        value = details.get(name)
        if value:
            value = value.timestamp() if isinstance(value, datetime) else value
            return str(value).removeprefix("W/").strip('"')
    return None


# --- Reading -------------------------------------------------------------------------------


def open_read(url: str, block_bytes: int | None = None) -> BinaryIO:
    """Open a file as a buffered stream of bytes, in bounded memory; close it after use.

    The stream can seek, except over ``http`` from a server that does not give a size.

    Args:
        url: The file.
        block_bytes: How much to ask a remote store for at once; small where one jumps about in a
            large file. None: the store's own choice.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It is not a regular file (reading a pipe would wait forever), or cannot be
            opened. Errors while reading are ``OSError`` too.
    """
    if is_local(url):
        path = _regular_file(url)
        return open(path, "rb")
    fs, path = _filesystem(url)
    with _told(url):
        if protocol(url) == "memory":
            # Its open files share one position; a copy has its own.
            return io.BufferedReader(io.BytesIO(fs.cat_file(path)))
        options = {} if block_bytes is None else {"block_size": block_bytes}
        file = _RemoteFile(fs.open(path, "rb", **options), url)
        return cast(BinaryIO, io.BufferedReader(file, _BUFFER_BYTES))


def read_bytes(url: str) -> bytes:
    """The whole content of a file. Raises as ``open_read`` does."""
    if is_local(url):
        return Path(_regular_file(url)).read_bytes()
    fs, path = _filesystem(url)
    with _told(url):
        return cast(bytes, fs.cat_file(path))


def get_file(url: str, target: str) -> None:
    """Copy a file to the local path ``target``; on an error nothing is left there."""
    try:
        with open_read(url) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink, _COPY_BYTES)
    except BaseException:
        Path(target).unlink(missing_ok=True)
        raise


def _regular_file(url: str) -> str:
    path = local_path(url)
    mode = os.stat(path).st_mode  # noqa: PTH116
    if stat_module.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, a file was expected", path)
    if not stat_module.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is a pipe, socket or device, a file was expected", path)
    return path


class _RemoteFile(io.RawIOBase):
    """A remote file whose errors are ``OSError`` and name no secret."""

    def __init__(self, file: Any, url: str) -> None:
        super().__init__()
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        with _told(self._url):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readall(self) -> bytes:
        with _told(self._url):
            return cast(bytes, self._file.read())

    def readinto(self, buffer: Any) -> int:
        with _told(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


# --- Writing -------------------------------------------------------------------------------


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
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(parent(path))
        return
    fs, path = _filesystem(url, to_write=True)
    with _told(url):
        _publish(fs, url, path, lambda target: fs.pipe_file(target, data))


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
    fs, path = _filesystem(url, to_write=True)
    with _told(url):
        _publish(fs, url, path, lambda target: fs.put_file(source, target))
    Path(source).unlink()


def _publish(fs: Any, url: str, path: str, upload: Callable[[str], None]) -> None:
    if protocol(url) in _OBJECT_STORES:
        upload(path)
        return
    # A remote file system (sftp, hdfs, …) shows a file while it grows.
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    temporary = _temporary_name(path)
    try:
        upload(temporary)
        fs.mv(temporary, path)
    except BaseException:
        with suppress(Exception):  # the first error is the one to tell
            fs.rm_file(temporary)
        raise


def _temporary_name(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name[:100]}.{uuid.uuid4().hex}.tmp"


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
    fs, path = _filesystem(url, to_write=True)
    if protocol(url) not in _OBJECT_STORES:
        with _told(url):
            fs.makedirs(path, exist_ok=True)


def remove(url: str) -> None:
    """Remove a file; nothing happens where there is none."""
    with suppress(FileNotFoundError):
        if is_local(url):
            Path(local_path(url)).unlink()
            return
        fs, path = _filesystem(url, to_write=True)
        with _told(url):
            fs.rm_file(path)


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
    file system; else in the system's temporary folder.
    """
    if is_local(output_url):
        folder = Path(local_path(output_url)) / STAGING_FOLDER / run_id
    else:
        folder = Path(tempfile.gettempdir()) / f"earmark-{run_id}"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


# --- fsspec --------------------------------------------------------------------------------


def _filesystem(url: str, *, to_write: bool = False) -> tuple[Any, str]:
    """The file system of ``url`` with its default options, and the path in its own terms.

    Raises:
        UsageError: The protocol is unknown, or needs an extra that is not installed.
        OutputError: It is asked to write where one can only read.
    """
    name = protocol(url)
    if to_write and name in _READ_ONLY:
        raise OutputError(
            f"{public_uri(url)}: {name}:// can be read, not written; give a local folder or an "
            "object store (gs://, s3://, az://)"
        )
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except ImportError as error:
        extra = _EXTRAS.get(name)
        advice = (
            f"needs the {extra} extra: pip install 'earmark[{extra}]'"
            if extra
            else f"needs a package that is not installed ({error})"
        )
        raise UsageError(f"{name}:// {advice}") from error
    except ValueError as error:
        raise UsageError(
            f"{public_uri(url)} cannot be opened: {_scrub(str(error), url)}; give a local path, "
            "or a URL such as gs://, s3://, az:// or https://"
        ) from None


def is_known(url: str) -> bool:
    """Whether ``url`` is local or has a protocol there is a file system for, installed or not."""
    name = protocol(url)
    return name == "file" or name in fsspec.registry or name in fsspec.available_protocols()


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn what a storage library raises into an ``OSError`` that names the file, no secret.

    Each library has exceptions of its own, so all are caught. The cause is left out: its text may
    hold the signed URL, and a traceback would print it.
    """
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except Exception as error:
        kind, reason = _explain(error, protocol(url))
        detail = _scrub(str(error), url)
        uri = public_uri(url)
        text = f"{uri}: {reason}" + (f" ({detail})" if detail not in ("", uri) else "")
        raise kind(text) from None


def _explain(error: Exception, name: str) -> tuple[type[OSError], str]:
    real = error
    if name in _READ_ONLY and isinstance(error.__cause__, Exception):
        # fsspec's http says "not found" to every failed request; the real answer is the cause.
        real = error.__cause__
    status = getattr(real, "status", None) or getattr(real, "code", None)
    if isinstance(real, PermissionError) or str(status) in ("401", "403"):
        return PermissionError, "access is denied; check the credentials"
    if isinstance(real, TimeoutError):
        return TimeoutError, "the store did not answer in time"
    if isinstance(real, IsADirectoryError):
        return IsADirectoryError, "is a folder, a file was expected"
    if isinstance(real, FileNotFoundError) or str(status) in ("404", "410"):
        return FileNotFoundError, "there is no such file"
    return OSError, f"cannot be reached: {type(real).__name__}"


def _scrub(text: str, url: str) -> str:
    text = text.replace(url, public_uri(url))
    return _URL_IN_TEXT.sub(lambda match: public_uri(match.group()), text).strip()
