"""The file systems of fsspec, behind one set of options, retries and errors.

Everything in storage is named by text: an absolute local path without ``file://``, or a full URL
(``gs://…``, ``s3://…``, ``az://…``, ``https://…``, ``memory://…``).

Guarantees:
- **Absent is not the same as unreachable.** Only "there is no such file" counts as absent; any
  other error is raised. (``fsspec``'s own ``exists`` says no to every error.)
- **Passing trouble passes.** What a store refuses for the moment (429, 5xx, a broken connection, no
  answer in time) is tried again (``retries``).
- **Secrets stay out of messages** (``secrets``).

Errors: what storage says at run time is an ``OSError`` (``FileNotFoundError``,
``PermissionError``, ``TimeoutError`` where it is one of these), because only the caller knows
whether it costs an item, a container or the run. What can never work (an unknown protocol, a
missing extra) is a ``UsageError``; writing to a read-only protocol is an ``OutputError``.
"""

from __future__ import annotations

import errno
import os
import re
import stat as stat_module
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from typing import Any, TypeVar, cast

import aiohttp
import fsspec

from transforms.errors import OutputError, UsageError
from transforms.storage.retries import ShortBodyError, ask, cause_words, may_pass, status_of
from transforms.storage.secrets import public_uri, scrub
from transforms.storage.urls import READ_ONLY, is_local, local_path, protocol, without_query

# gcsfs would first ask Google by gRPC what kind of bucket it is, which takes a minute where that
# is not to be had; Earmark needs nothing that depends on it. It reads this when it is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


_EXTRAS = {"s3": "s3", "s3a": "s3", "az": "azure", "abfs": "azure", "abfss": "azure"}
_T = TypeVar("_T")
_S3_WITH_BODY = {"ListObjectsV2", "CreateMultipartUpload", "CompleteMultipartUpload"}
_STAT_THREADS = 32


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
    details = ask_file(url, lambda: details_of(url))
    if details["type"] == "directory":
        raise IsADirectoryError(f"{public_uri(url)} is a folder, a file was expected")
    return FileInfo(url, details.get("size"), version_of(details))


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
        return cast(str, ask_file(url, lambda: details_of(url))["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def details_of(url: str) -> dict[str, Any]:
    """Ask once what a store says of a file or folder; ``type`` is ``file`` or ``directory``."""
    fs, path = open_filesystem(url)
    details = cast(dict[str, Any], fresh(fs).info(path))
    if protocol(url) in READ_ONLY and _is_index_page(details):
        return {**details, "type": "directory"}
    return details


def _is_index_page(details: dict[str, Any]) -> bool:
    """Whether it is what a web server shows of a folder: it leads whoever asks to the slash."""
    is_folder = without_query(str(details.get("url", ""))).endswith("/")
    return is_folder and details.get("mimetype") == "text/html"


def fresh(fs: Any) -> Any:
    """``fs`` without what it remembers: another process may have written since."""
    fs.invalidate_cache()
    return fs


def version_of(details: dict[str, Any]) -> str | None:
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


class ChangedError(OSError):
    """The file is not what it was when it was opened."""


def open_filesystem(url: str, *, to_write: bool = False) -> tuple[Any, str]:
    """The file system of ``url`` with its default options, and the path in its own terms.

    Raises:
        UsageError: The protocol is unknown, or needs an extra that is not installed.
        OutputError: It is asked to write where one can only read.
        OSError: The file system cannot be had.
    """
    name = protocol(url)
    if to_write and name in READ_ONLY:
        raise OutputError(
            f"{public_uri(url)}: {name}:// can be read, not written; give a local folder or an "
            "object store (gs://, s3://, az://)"
        )
    with storage_errors(url):  # a file system of an archive (zip://) opens it here
        try:
            return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **_options(name)))
        except ImportError as error:
            extra = _EXTRAS.get(name)
            advice = (
                f"needs the extra [{extra}]: run pip install '.[{extra}]' in Earmark's checkout"
                if extra
                else f"needs a package that is not installed ({error})"
            )
            raise UsageError(f"{name}:// {advice}") from error
        except ValueError as error:
            raise UsageError(
                f"{public_uri(url)} cannot be opened: {scrub(str(error), url)}; give a local "
                "path, or a URL such as gs://, s3://, az:// or https://"
            ) from None


def _options(name: str) -> dict[str, Any]:
    """What Earmark asks of a file system; what the user's fsspec configuration says wins.

    For how long a request may take, aiohttp has five minutes: too long for an answer that never
    begins, too short for an hour of audio that comes as one stream.
    """
    own = fsspec.config.conf.get(name, {})
    if name in READ_ONLY and "client_kwargs" not in own:
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


def ask_store(
    url: str,
    act: Callable[[], _T],
    may_pass: Callable[[BaseException], bool] = may_pass,
) -> _T:
    """Return what the store answers; retry errors that may pass. Raises as ``storage_errors``."""
    with storage_errors(url):
        return ask(_store(url), act, may_pass, describe=partial(_reason, url))


# By store, one file that it has given; to ask for it tells a store's trouble from another file's.
_given: dict[str, str] = {}


def ask_file(url: str, act: Callable[[], _T]) -> _T:
    """``ask_store`` for what reads one file: less patient where the store answers for others."""
    store = _store(url)
    with storage_errors(url):
        result = ask(
            store,
            act,
            may_pass,
            file=public_uri(url),
            other=partial(details_of, _given[store]) if store in _given else None,
            describe=partial(_reason, url),
        )
    _given[store] = url
    return result


def _store(url: str) -> str:
    return re.sub(r"(://[^/?#]*).*", r"\1", public_uri(url), count=1, flags=re.DOTALL)


def _reason(url: str, error: BaseException) -> str:
    return _explain(error, protocol(url))[1]


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
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
        detail = scrub(str(error), url)
        uri = public_uri(url)
        text = f"{uri}: {reason}" + (f" ({detail})" if detail not in ("", uri) else "")
        text += "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        raise kind(text) from None


def _explain(error: BaseException, name: str) -> tuple[type[OSError], str]:
    real = error
    if name in READ_ONLY and isinstance(error.__cause__, Exception):
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
