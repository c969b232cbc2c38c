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
- **Passing trouble passes.** What a store refuses for the moment (429, 5xx, a connection that
  breaks, no answer in time) is asked for again, as ``retries`` has it.
- **A file that changes while it is read is no patchwork.** Google's generation, S3's etag and a web
  server's validators are compared with every answer; elsewhere, only the version of a stream that
  broke and is opened again.
- **A short answer is never taken for the whole.** What is read is held against the size that the
  store gives, what is written against the size that it then has. Only where a web server gives no
  size and does not say where a body ends, nobody can tell.
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
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote, unquote

import aiohttp
import fsspec
from fsspec.utils import glob_translate

from transforms.errors import OutputError, UsageError, WriteError
from transforms.process.temp_folders import scratch_folder
from transforms.storage.retries import ShortBodyError, ask, cause_words, may_pass, status_of
from transforms.storage.web_pages import links_below

# gcsfs would first ask Google by gRPC what kind of bucket it is, which takes a minute where that
# is not to be had; Earmark needs nothing that depends on it. It reads this when it is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(?:::.*)?://", re.DOTALL)
# Without one of these there is nothing in a URL that could sign it.
_SIGNING_MARK = re.compile("[?#;@]")
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>]+")
_READ_ONLY = frozenset({"http", "https"})
# One upload publishes the whole object, and listing a prefix is one flat request.
_OBJECT_STORES = frozenset(
    {"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "hf", "memory", "oci", "oss"}
)
# Where ``pipe_file(mode="create")`` has the store itself refuse to replace what is there.
_EXCLUSIVE = frozenset({"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "memory"})
_EXTRAS = {"s3": "s3", "s3a": "s3", "az": "azure", "abfs": "azure", "abfss": "azure"}
_T = TypeVar("_T")
# What fsspec's files have that cannot be read at any place.
_NO_RANGES = fsspec.spec.AbstractBufferedFile._fetch_range
_S3_WITH_BODY = {"ListObjectsV2", "CreateMultipartUpload", "CompleteMultipartUpload"}
_STAT_THREADS = 32
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_COPY_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 16
_MAX_PAGE_BYTES = 64 << 20
_MAX_BLOCK_BYTES = 8 << 20  # what one request asks for; two of them are held at most
STAGING_FOLDER = "_staging"
_TEMPORARY = re.compile(r"\..{1,100}\.[0-9a-f]{32}\.tmp", re.DOTALL)  # as _temporary_name gives it
# What ``link`` says on file systems without hard links (FAT, some network mounts).
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

# What signs a request, by cloud; compared in lower case. Names that mean something else elsewhere
# (``expires``, ``st``) only count beside the parameter that makes the URL a signed one.
_SECRET_PREFIXES = ("x-amz-", "x-goog-")
# fmt: off
_SECRET_NAMES = {
    "awsaccesskeyid", "googleaccessid", "key-pair-id", "signature", "sig", "token", "access_token",
    "access-token", "accesstoken", "auth_token", "auth-token", "authtoken", "id_token",
    "refresh_token", "oauth_token", "sas_token", "security_token", "session_token", "api_token",
    "private_token", "api_key", "api-key", "apikey", "password", "passwd", "pwd", "secret",
    "client_secret", "jwt", "authorization", "jsessionid",
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
    """``base`` with ``parts`` below it, joined by single slashes.

    The query of an ``http(s)`` folder, which may sign what lies below it, stays at the end.
    """
    path = _without_query(base)
    query = base[len(path) :]
    head = path if path.endswith("://") else path.rstrip("/") + "/"
    return head + "/".join(part.strip("/") for part in parts) + query


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
    if "?" not in url and "#" not in url:
        return url
    return re.split(r"[?#]", url, maxsplit=1)[0] if protocol(url) in _READ_ONLY else url


def public_uri(url: str) -> str:
    """``url`` without what signs it; fit to be written and printed.

    Drops the known signature parameters (AWS, Google Cloud, CloudFront, Azure SAS, tokens,
    passwords) and ``user:password@``; over ``http(s)`` also those in a fragment (``#token=``) and
    in a path (``;sig=``). Nothing else: any other query string is part of the name. Local paths
    come back unchanged.
    """
    if _SIGNING_MARK.search(url) is None or is_local(url):
        return url
    url = re.sub(r"((?:^|::)https?://)[^/?#]*@", r"\1", url, flags=re.IGNORECASE)
    url = re.sub(r"(://)[^/?#@]*:[^/]*@", r"\1", url)
    is_web = re.match(r"(?:.*::)?https?://", url, re.IGNORECASE | re.DOTALL) is not None
    base, mark, query = url.partition("?")
    hash_mark = fragment = ""
    if mark:
        query, hash_mark, fragment = query.partition("#")
    elif is_web:
        base, hash_mark, fragment = base.partition("#")
    secret = _secret_names(re.split("[&;]", query))
    if is_web:
        base = re.sub(
            r";([^;/=]*)=[^;/]*", lambda pair: "" if _is_secret(pair[1], secret) else pair[0], base
        )
        fragment_left = _without_secrets(fragment, secret | _secret_names(fragment.split("&")))
        hash_mark, fragment = hash_mark if fragment_left or not fragment else "", fragment_left
    query_left = _without_secrets(query, secret)
    return base + (mark if query_left or not query else "") + query_left + hash_mark + fragment


def _secret_names(pairs: list[str]) -> set[str]:
    """What is a secret beside these parameters."""
    names = {_parameter_name(pair) for pair in pairs}
    secret = _SECRET_NAMES.copy()
    if names & {"signature", "key-pair-id"}:
        secret |= _BESIDE_SIGNATURE
    if "sig" in names:
        secret |= _BESIDE_SIG
    return secret


def _without_secrets(text: str, secret: set[str]) -> str:
    """Parameters as they were, each with what parts it from the one before, but the secret ones."""
    pairs = re.findall(r"(?:^|[&;])[^&;]*", text)
    kept = [pair for pair in pairs if not _is_secret(pair.lstrip("&;"), secret)]
    return text if len(kept) == len(pairs) else "".join(kept).lstrip("&;")


def _is_secret(pair: str, secret: set[str]) -> bool:
    name = _parameter_name(pair)
    return name.startswith(_SECRET_PREFIXES) or name in secret


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
    details = _ask_file(url, lambda: _details(url))
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
    """Whether ``url`` is a folder.

    In an object store: a prefix with something below it; on the web: an index page, whose URL ends
    with a slash, or leads to one that does.
    """
    return _kind(url) == "directory"


def _kind(url: str) -> str | None:
    """``directory``, ``file`` (anything that is not a folder), or None where there is nothing."""
    try:
        if is_local(url):
            mode = os.stat(local_path(url)).st_mode  # noqa: PTH116
            return "directory" if stat_module.S_ISDIR(mode) else "file"
        return cast(str, _ask_file(url, lambda: _details(url))["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def list_files(url: str, on_error: Callable[[OSError], None] | None = None) -> Iterator[FileInfo]:
    """Every file below the folder ``url``, sorted by name.

    Over ``http(s)``, what the server's index pages list. Locally, links to folders are followed,
    and each real folder is listed once, under its own path where that lies below ``url``; so a
    loop of links ends. Links to nothing, pipes, sockets and devices are listed, without a size
    (reading them will say what is wrong).

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
    if protocol(url) in _READ_ONLY:
        yield from _list_web(url, report)
        return
    fs, root = _filesystem(url)
    if protocol(url) in _OBJECT_STORES:
        try:
            details = _ask(url, lambda: _fresh(fs).find(root, detail=True))
        except OSError as error:
            report(error)
            return
    else:
        details = dict(_walk_remote(fs, url, root, report))
    for path in sorted(details):
        info = details.pop(path)  # what a store says of a million objects takes gigabytes
        if info["type"] == "file" and not path.endswith("/"):
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
            yield info


def _entry_info(entry: os.DirEntry[str]) -> FileInfo:
    """A file; or a link to nothing, a pipe, a socket or a device, without a size."""
    if entry.is_file():
        status = entry.stat()
        return FileInfo(entry.path, status.st_size, str(status.st_mtime_ns))
    return FileInfo(entry.path, None, None)


def _walk_remote(
    fs: Any, url: str, root: str, report: Callable[[OSError], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    # fsspec's own walk passes over folders that cannot be listed without a word.
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            list_it = partial(_fresh(fs).ls, folder, detail=True)
            children = _ask(_below(url, root, folder), list_it)
        except OSError as error:
            report(error)
            continue
        for child in children:
            if child["type"] == "directory":
                pending.append(child["name"])
            else:
                yield child["name"], child


def _list_web(url: str, report: Callable[[OSError], None]) -> Iterator[FileInfo]:
    """What the index page of a folder lists, and those of the folders in it."""
    top = _without_query(url)
    query = url[len(top) :]  # may sign what lies below, too
    pending, seen, files = [top.rstrip("/") + "/"], set[str](), list[str]()
    while pending:
        folder = pending.pop()
        seen.add(folder)
        try:
            links = links_below(_read_page(folder + query), folder)
        except OSError as error:
            report(error)
            continue
        pending += [link for link in links if link.endswith("/") and link not in seen]
        files += [link + query for link in links if not link.endswith("/")]
    for file, facts in stat_many(sorted(files)).items():
        # Reading one that the server does not tell of will say what is wrong.
        yield FileInfo(file, None, None) if isinstance(facts, OSError) else facts


def _read_page(url: str) -> str:
    with open_read(url) as file:
        data = file.read(_MAX_PAGE_BYTES + 1)
    if len(data) > _MAX_PAGE_BYTES:
        raise OSError(f"{public_uri(url)}: its index page has more than {_MAX_PAGE_BYTES} bytes")
    return data.decode("utf-8", "replace")


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
    any_depth = "**" in pattern.split("/")
    if is_local(pattern) and any_depth:
        # Python's own would follow links round and round.
        wanted = local_path(pattern)
        matches_pattern = re.compile(glob_translate(wanted)).match
        top = re.split(r"[*?[]", wanted, maxsplit=1)[0].rpartition("/")[0] or "/"
        for info in list_files(top, on_error) if Path(top).is_dir() else ():
            is_hidden = "/." in info.url[len(top) :] and "/." not in wanted[len(top) :]
            if not is_hidden and matches_pattern(info.url):
                files[info.url] = info
    elif is_local(pattern):
        for path in glob.iglob(local_path(pattern)):  # noqa: PTH207
            if Path(path).is_dir():
                folders.append(path)
            elif Path(path).is_file():
                files[path] = stat(path)
            else:  # as in a folder
                files[path] = FileInfo(path, None, None)
    else:
        fs, root = _filesystem(pattern)
        matches = _ask(pattern, lambda: _fresh(fs).glob(root, detail=True))
        start = pattern[: pattern.index("://") + 3]
        for path, details in matches.items():
            url = start + path.lstrip("/")
            if details["type"] == "directory":
                folders.append(url)
            else:
                files[url] = FileInfo(url, details.get("size"), _version(details))
    if not any_depth:
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
        children = _ask(folder_url, lambda: _fresh(fs).ls(root, detail=True))
    except FileNotFoundError:
        return []
    paths = (child["name"] for child in children if child["type"] == "file")
    return sorted(name for path in paths if path != root and (name := path.rpartition("/")[2]))


def _details(url: str) -> dict[str, Any]:
    fs, path = _filesystem(url)
    details = cast(dict[str, Any], _fresh(fs).info(path))
    if protocol(url) in _READ_ONLY and _is_index_page(details):
        return {**details, "type": "directory"}
    return details


def _is_index_page(details: dict[str, Any]) -> bool:
    """Whether it is what a web server shows of a folder: it leads whoever asks to the slash."""
    is_folder = _without_query(str(details.get("url", ""))).endswith("/")
    return is_folder and details.get("mimetype") == "text/html"


def _fresh(fs: Any) -> Any:
    """``fs`` without what it remembers: another process may have written since."""
    fs.invalidate_cache()
    return fs


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


def open_read(
    url: str,
    block_bytes: int | None = None,
    stop: int | None = None,
    *,
    only_ranges: bool = False,
) -> BinaryIO:
    """Open a file as a buffered stream of bytes, in bounded memory; close it after use.

    The stream can seek, except over ``http`` from a server that does not give a size. Of a file in
    an object store or on the web, at most 16 MiB are held.

    Args:
        url: The file.
        block_bytes: How much to ask a remote store for at once; small where one jumps about in a
            large file. None: what is read in order is asked for in ever larger pieces, the next
            one while the last is being used.
        stop: The byte before which reading in order will end; nothing from there on is asked for
            ahead. None: the file's end.
        only_ranges: Of a file on the web or in an object store, never read more than is asked for:
            an error rather than all that comes before, where a server gives no ranges, or all of
            it, where a store unpacks it on the way.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It is not a regular file (reading a pipe would wait forever), or cannot be
            opened. Errors while reading are ``OSError`` too.
    """
    if is_local(url):
        path = _regular_file(url)
        return open(path, "rb")
    raw = cast(io.RawIOBase, _open_remote(url, block_bytes, stop, only_ranges))
    return cast(BinaryIO, io.BufferedReader(raw, _BUFFER_BYTES))


def read_bytes(url: str) -> bytes:
    """The whole content of a file. Raises as ``open_read`` does."""
    if is_local(url):
        return Path(_regular_file(url)).read_bytes()
    with open_read(url) as file:
        return file.read()


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


def _open_remote(
    url: str, block_bytes: int | None, stop: int | None, only_ranges: bool
) -> io.RawIOBase | io.BytesIO:
    fs, path = _filesystem(url)
    options: dict[str, Any] = {} if block_bytes is None else {"block_size": block_bytes}
    if protocol(url) == "memory":
        # Its open files share one position; a copy has its own.
        return io.BytesIO(_ask_file(url, lambda: fs.cat_file(path)))
    content = _WebContent()
    if protocol(url) in _READ_ONLY:
        options["raise_for_status"] = content.check
    file = _ask_file(url, lambda: _fresh(fs).open(path, "rb", **options))
    details = getattr(file, "details", None) or {}
    if details.get("type") == "directory":
        file.close()
        raise IsADirectoryError(f"{public_uri(url)} is a folder, a file was expected")
    if details.get("contentEncoding") == "gzip":
        # It is unpacked on the way: the size that Google gives is that of something else.
        file.close()
        if only_ranges:
            raise _no_ranges(url)
        return _open_unpacked(fs, url, path)
    size = getattr(file, "size", None)
    has_ranges = getattr(type(file), "_fetch_range", None) not in (None, _NO_RANGES)
    if size is not None and has_ranges:
        content.size = size
        if protocol(url) in _OBJECT_STORES | _READ_ONLY:
            pace = _Pace(block_bytes, size if stop is None else min(stop, size))
        else:  # one connection, for one request at a time
            pace = _Pace(block_bytes or int(file.blocksize), size)
        return _RangedFile(file, url, size, content, pace, only_ranges)
    file.close()
    if only_ranges and protocol(url) in _READ_ONLY:
        raise _no_ranges(url)
    details = _ask_file(url, lambda: _details(url))
    content.version = None if protocol(url) in _READ_ONLY else _version(details)
    return _StreamedFile(url, details.get("size"), content)


def _no_ranges(url: str) -> OSError:
    return OSError(f"{public_uri(url)}: its server gives it only from start to end")


def _open_unpacked(fs: Any, url: str, path: str) -> io.FileIO:
    """The whole content in a local file, which goes when it is closed."""
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        target = f"{folder}/unpacked"
        # With headers of its own gcsfs asks for it in one stream, else in ranges of the packed one.
        _ask_file(url, lambda: fs.get_file(path, target, headers={}))
        return io.FileIO(target)


class ChangedError(OSError):
    """The file is not what it was when it was opened."""


class _WebContent:
    """What the answers to the requests of one open file must agree on.

    Answers are compared with each other, and not with what ``HEAD`` said: some servers have that
    answered by another, which knows the file by another etag.

    Attributes:
        size: Of the whole file, in bytes; None if nobody has said.
        version: Of a file that is not on the web, as ``_version`` has it; None if there is none.
    """

    def __init__(self) -> None:
        self.size: int | None = None
        self.version: str | None = None
        self._validators: dict[str, str] = {}

    async def check(self, response: Any) -> None:
        """Look at an answer before its body; aiohttp calls this.

        Raises:
            ChangedError: It is about another content than the ones before.
        """
        if response.method == "HEAD" or response.status not in (200, 206, 416):
            return
        self._check_size(_whole_size(response))
        if response.status == 416:
            return
        for name in ("ETag", "Last-Modified"):
            found = _comparable(response.headers.get(name))
            known = self._validators.setdefault(name, found) if found else found
            if found != known:
                raise ChangedError(f"its {name} was {known}, and is {found}")

    def _check_size(self, size: int | None) -> None:
        if size is None:
            return
        if self.size is None:
            self.size = size
        if size != self.size:
            raise ChangedError(f"it had {self.size} bytes, and has {size}")

    def check_version(self, details: dict[str, Any]) -> None:
        """Look at what a store other than the web says of it, when it is opened again.

        Raises:
            ChangedError: It is another.
        """
        found = _version(details)
        if None not in (found, self.version) and found != self.version:
            raise ChangedError(f"its version was {self.version}, and is {found}")


def _whole_size(response: Any) -> int | None:
    """The size of the file that an answer is about, if it says so, and means the file itself."""
    if response.headers.get("Content-Encoding", "identity") not in ("identity", ""):
        return None
    if response.status == 200:
        length = response.headers.get("Content-Length", "")
    else:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(length) if length.isdecimal() else None


def _comparable(validator: str | None) -> str | None:
    """Without what says how the content was packed on its way: it is the same content."""
    return validator and re.sub(r'^W/|"|[-;](?:gzip|br|zstd|deflate)(?="?$)', "", validator)


@dataclass
class _Pace:
    """How much to ask for at once, and whether to ask for what comes next.

    Read in order, pieces double up to 8 MiB; a jump begins anew with what is asked for. Once as
    much has been read in a row as a piece has, the next piece is fetched ahead: so what is fetched
    in vain is never more than what was read before it.

    Attributes:
        fixed_bytes: Ask for at least this much each time, and nothing ahead; None: as above.
        stop: Where reading in order ends.
    """

    fixed_bytes: int | None
    stop: int
    _piece_bytes: int = field(default=0, init=False)
    _bytes_in_a_row: int = field(default=0, init=False)

    def jump(self) -> None:
        """What is read next does not follow what was read last."""
        self._piece_bytes = self._bytes_in_a_row = 0

    def end_of(self, start: int, num_bytes: int, size: int) -> int:
        """Where the piece ends that begins at ``start``, of which ``num_bytes`` are wanted now."""
        if self.fixed_bytes is not None:
            return min(start + min(max(num_bytes, self.fixed_bytes), _MAX_BLOCK_BYTES), size)
        if start >= self.stop:
            return min(start + min(num_bytes, _MAX_BLOCK_BYTES), size)
        self._piece_bytes = min(max(num_bytes, 2 * self._piece_bytes), _MAX_BLOCK_BYTES)
        return min(start + self._piece_bytes, self.stop)

    def has_read(self, num_bytes: int) -> None:
        """A piece of so many bytes is being used."""
        self._bytes_in_a_row += num_bytes

    def wants_ahead(self, start: int) -> bool:
        """Whether the piece that begins at ``start`` is to be fetched before it is asked for."""
        is_in_order = self._bytes_in_a_row >= _MAX_BLOCK_BYTES
        return self.fixed_bytes is None and is_in_order and start < self.stop


class _Ahead:
    """A piece of a file that is fetched while the one before is used, in a thread of its own.

    The thread keeps nobody from ending: whoever drops the piece does not wait for it.
    """

    def __init__(self, start: int, end: int, fetch: Callable[[int, int], bytes | None]) -> None:
        self.start, self.end = start, end
        self._fetch = fetch
        self._piece: Future[bytes | None] = Future()
        threading.Thread(target=self._run, name="earmark-read-ahead", daemon=True).start()

    def _run(self) -> None:
        try:
            self._piece.set_result(self._fetch(self.start, self.end))
        except BaseException as error:  # for whoever asks for the piece
            self._piece.set_exception(error)

    def result(self) -> bytes | None:
        """What ``fetch`` gives or raises, once it is there."""
        return self._piece.result()


class _RangedFile(io.RawIOBase):
    """A remote file, fetched piece by piece; only the last one is kept, and the next if it is due.

    Each piece is asked for until it is whole. fsspec's own caches would keep a short one. From a
    web server that turns out to give no ranges, the rest comes as a stream.
    """

    def __init__(
        self,
        file: Any,
        url: str,
        size: int,
        content: _WebContent,
        pace: _Pace,
        only_ranges: bool = False,
    ) -> None:
        super().__init__()
        self._file, self._url, self._size, self._content = file, url, size, content
        self._pace = pace
        self._only_ranges = only_ranges
        self._position = 0
        self._start, self._block = 0, b""
        self._ahead: _Ahead | None = None
        self._stream: _StreamedFile | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "a position before the start of the file")
        self._position = start + offset
        return self._position

    def readall(self) -> bytes:
        return b"".join(iter(partial(self.read, _MAX_BLOCK_BYTES), b""))

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        if not 0 <= self._position - self._start < len(self._block):
            self._load(len(buffer))
        at = self._position - self._start
        data = memoryview(self._block)[at : at + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _load(self, num_bytes: int) -> None:
        """Have the piece that holds the position, and the next one on its way."""
        ahead, self._ahead = self._ahead, None
        end = self._start + len(self._block)
        self._block = b""  # before the next is there, so that two are held at most
        if ahead is not None and ahead.start <= self._position < ahead.end:
            self._start = ahead.start
            self._block = self._read_piece(ahead.start, ahead.end, ahead)
        else:
            if self._position != end:
                self._pace.jump()
            self._start = self._position
            end = self._pace.end_of(self._position, num_bytes, self._size)
            self._block = self._read_piece(self._position, end)
        self._pace.has_read(len(self._block))
        start = self._start + len(self._block)
        if self._stream is None and self._pace.wants_ahead(start):
            self._ahead = _Ahead(start, self._pace.end_of(start, 0, self._size), self._ask_for)

    def _ask_for(self, start: int, end: int) -> bytes | None:
        return _ask_file(self._url, lambda: self._fetch(start, end))

    def _read_piece(self, start: int, end: int, ahead: _Ahead | None = None) -> bytes:
        if self._stream is None:
            piece = ahead.result() if ahead is not None else self._ask_for(start, end)
            if piece is not None:
                return piece
            if self._only_ranges:
                raise _no_ranges(self._url)
        if self._stream is None or self._stream.tell() != start:
            self._close_stream()
            self._stream = _StreamedFile(self._url, self._size, self._content, start)
        return self._stream.read(end - start) or b""

    def _fetch(self, start: int, end: int) -> bytes | None:
        """Bytes ``start`` to ``end``, all of them; None if the server gives no ranges."""
        generation = (getattr(self._file, "details", None) or {}).get("generation")
        if generation:  # Google's; with it, another object of the same name is not found
            fs, path = self._file.fs, self._file.path
            try:
                data = fs.cat_file(path, start=start, end=end, generation=generation)
            except FileNotFoundError:
                raise FileNotFoundError("it has been changed or removed meanwhile") from None
        else:
            try:
                data = self._file._fetch_range(start, end)
            except ValueError:
                if protocol(self._url) in _READ_ONLY and start > 0:
                    return None
                raise
        if len(data) != end - start:
            raise ShortBodyError(
                f"of bytes {start} to {end} of {self._size}, {len(data)} have come"
            )
        return cast(bytes, data)

    def close(self) -> None:
        if not self.closed:
            self._block, self._ahead = b"", None
            self._close_stream()
            self._file.close()
        super().close()

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _StreamedFile(io.RawIOBase):
    """A remote file that comes as one stream, up to its ``size`` if that is known.

    A stream that breaks is opened anew and wound on to where it broke; a file that is not the same
    by then is an error.
    """

    def __init__(self, url: str, size: int | None, content: _WebContent, position: int = 0) -> None:
        super().__init__()
        self._url, self._size, self._content = url, size, content
        self._position = position
        self._file = _ask_file(url, self._open)

    def _open(self) -> Any:
        fs, path = _filesystem(self._url)
        is_web = protocol(self._url) in _READ_ONLY
        options = {"block_size": 0, "raise_for_status": self._content.check} if is_web else {}
        file = fs.open(path, "rb", **options)
        try:
            if not is_web and self._content.version is not None:
                self._content.check_version(_details(self._url))
            if self.seekable():
                file.seek(self._position)
                return file
            left = self._position
            while left:
                data = file.read(min(left, _COPY_BYTES))
                if not data:
                    raise ShortBodyError(f"ended {left} bytes before byte {self._position}")
                left -= len(data)
        except BaseException:
            file.close()
            raise
        return file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return protocol(self._url) not in _READ_ONLY

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if not self.seekable():
            raise _no_ranges(self._url)
        with _told(self._url):
            self._position = int(self._file.seek(offset, whence))
        return self._position

    def readall(self) -> bytes:
        return b"".join(iter(partial(self.read, _COPY_BYTES), b""))

    def readinto(self, buffer: Any) -> int:
        data = _ask_file(self._url, lambda: self._next(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _next(self, num_bytes: int) -> bytes:
        if self._file is None:
            self._file = self._open()
        try:
            data = self._file.read(num_bytes)
            if not data and self._size is not None and self._position < self._size:
                raise ShortBodyError(f"ended after {self._position} of {self._size} bytes")
        except BaseException:
            file, self._file = self._file, None
            file.close()
            raise
        return cast(bytes, data)

    def close(self) -> None:
        if not self.closed and self._file is not None:
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
            _write_synced(os.open(temporary, _NEW_FILE, 0o666), data)
            os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(parent(path))
        return
    fs, path = _filesystem(url, to_write=True)
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
    fs, path = _filesystem(url, to_write=True)
    if exists(url):
        return False
    if protocol(url) not in _EXCLUSIVE:
        write_bytes(url, data)
        return True
    try:
        _ask(url, lambda: _create_object(fs, path, data))
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
    fs, path = _filesystem(url, to_write=True)
    size = os.path.getsize(source)  # noqa: PTH202
    _publish(fs, url, path, size, lambda target: fs.put_file(source, target))
    Path(source).unlink()


def _publish(fs: Any, url: str, path: str, size: int, upload: Callable[[str], None]) -> None:
    """Upload until the store has ``size`` bytes of it."""

    def once() -> None:
        if protocol(url) in _OBJECT_STORES:
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

    _ask(url, once, _upload_may_pass)


def _check_size(fs: Any, path: str, size: int) -> None:
    try:
        stored = _fresh(fs).info(path)["size"]
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
    fs, path = _filesystem(url, to_write=True)
    if protocol(url) not in _OBJECT_STORES:
        _ask(url, lambda: fs.makedirs(path, exist_ok=True))


def remove(url: str) -> None:
    """Remove a file; nothing happens where there is none."""
    with suppress(FileNotFoundError):
        if is_local(url):
            Path(local_path(url)).unlink()
            return
        fs, path = _filesystem(url, to_write=True)
        _ask(url, lambda: fs.rm_file(path))


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


# --- fsspec --------------------------------------------------------------------------------


def _filesystem(url: str, *, to_write: bool = False) -> tuple[Any, str]:
    """The file system of ``url`` with its default options, and the path in its own terms.

    Raises:
        UsageError: The protocol is unknown, or needs an extra that is not installed.
        OutputError: It is asked to write where one can only read.
        OSError: The file system cannot be had.
    """
    name = protocol(url)
    if to_write and name in _READ_ONLY:
        raise OutputError(
            f"{public_uri(url)}: {name}:// can be read, not written; give a local folder or an "
            "object store (gs://, s3://, az://)"
        )
    with _told(url):  # a file system of an archive (zip://) opens it here
        try:
            return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **_options(name)))
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
                f"{public_uri(url)} cannot be opened: {_scrub(str(error), url)}; give a local "
                "path, or a URL such as gs://, s3://, az:// or https://"
            ) from None


def _options(name: str) -> dict[str, Any]:
    """What Earmark asks of a file system; what the user's fsspec configuration says wins.

    For how long a request may take, aiohttp has five minutes: too long for an answer that never
    begins, too short for an hour of audio that comes as one stream.
    """
    own = fsspec.config.conf.get(name, {})
    if name in _READ_ONLY and "client_kwargs" not in own:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=30)
        return {"client_kwargs": {"timeout": timeout}}
    if name in ("gs", "gcs") and "requests_timeout" not in own:
        return {"requests_timeout": aiohttp.ClientTimeout(sock_connect=30, sock_read=30, total=600)}
    if name in ("s3", "s3a") and not own.keys() & {"session", "profile"}:
        return {"session": _s3_session()}
    return {}


@cache
def _s3_session() -> Any:
    from aiobotocore.session import AioSession

    session = AioSession()
    session.register("after-call.s3", _refuse_empty_answer)
    return session


def _refuse_empty_answer(http_response: Any, parsed: Any, model: Any, **event: Any) -> None:
    """To botocore an answer whose body has got lost is a listing, or a page of one, of nothing."""
    is_empty = parsed.keys() <= {"ResponseMetadata", "RequestCharged"}
    if is_empty and http_response.status_code == 200 and model.name in _S3_WITH_BODY:
        raise ShortBodyError(f"{model.name} was answered without a word")


def is_known(url: str) -> bool:
    """Whether ``url`` is local or has a protocol there is a file system for, installed or not."""
    if is_local(url):
        return True
    name = re.split("::|://", url, maxsplit=1)[0]  # fsspec knows it in lower case alone
    return name in fsspec.registry or name in fsspec.available_protocols()


def _ask(
    url: str,
    act: Callable[[], _T],
    may_pass: Callable[[BaseException], bool] = may_pass,
) -> _T:
    """What the store answers, asked again while its trouble may pass; errors as ``_told``."""
    with _told(url):
        return ask(_store(url), act, may_pass, describe=partial(_reason, url))


# By store, one file that it has given; to ask for it tells a store's trouble from another file's.
_given: dict[str, str] = {}


def _ask_file(url: str, act: Callable[[], _T]) -> _T:
    """``_ask`` for what reads one file: less patient where the store answers for others."""
    store = _store(url)
    with _told(url):
        result = ask(
            store,
            act,
            may_pass,
            file=public_uri(url),
            other=partial(_details, _given[store]) if store in _given else None,
            describe=partial(_reason, url),
        )
    _given[store] = url
    return result


def _store(url: str) -> str:
    return re.sub(r"(://[^/?#]*).*", r"\1", public_uri(url), count=1, flags=re.DOTALL)


def _reason(url: str, error: BaseException) -> str:
    return _explain(error, protocol(url))[1]


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
        text += "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        raise kind(text) from None


def _explain(error: BaseException, name: str) -> tuple[type[OSError], str]:
    real = error
    if name in _READ_ONLY and isinstance(error.__cause__, Exception):
        # fsspec's http says "not found" to every failed request; the real answer is the cause.
        real = error.__cause__
    status = status_of(real)
    # gcsfs tells a 403 by its words alone.
    forbidden = status in (401, 403) or str(real).startswith("Forbidden: ")
    if isinstance(real, PermissionError) or forbidden:
        return PermissionError, "access is denied; check the credentials"
    if isinstance(real, TimeoutError):
        return TimeoutError, "the store did not answer in time"
    if isinstance(real, IsADirectoryError):
        return IsADirectoryError, "is a folder, a file was expected"
    if isinstance(real, FileExistsError):
        return FileExistsError, "is there already"
    if isinstance(real, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError, "there is no such file"
    if isinstance(real, ShortBodyError):
        return OSError, "came or went only in part"
    if isinstance(real, ChangedError):
        return OSError, "has been changed while it was read"
    if status is not None:
        return OSError, f"the store answered {status}"
    return OSError, f"cannot be reached: {cause_words(real)}"


def public_text(text: str) -> str:
    """``text`` with every URL in it as ``public_uri`` has it."""
    if "://" not in text:
        return text
    return _URL_IN_TEXT.sub(lambda match: public_uri(match.group()), text)


def _scrub(text: str, url: str) -> str:
    """What a library says of ``url``, without what signs it, however the library writes it."""
    text = text.replace(url, public_uri(url))
    for secret in _secret_values(url):
        # Where a store takes the query for a part of the object's name, it is encoded once more.
        for written in (secret, quote(secret, safe=""), quote(secret), unquote(secret)):
            text = text.replace(written, "…")
    return public_text(text).strip()


def _secret_values(url: str) -> list[str]:
    """The values of the parameters that ``public_uri`` drops; those too short to tell are none."""
    pairs = re.split("[?&;#]", url)[1:]
    secret = _secret_names(pairs)
    values = [pair.partition("=")[2] for pair in pairs if _is_secret(pair, secret)]
    return sorted((value for value in values if len(value) >= 6), key=len, reverse=True)
