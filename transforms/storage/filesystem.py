"""The file systems of fsspec, behind one set of options, retries and errors.

Everything in storage is named by text: an absolute local path without ``file://``, or a full URL
(``gs://…``, ``s3://…``, ``az://…``, ``https://…``, ``memory://…``).

Guarantees:
- **Absent is not the same as unreachable.** Only "there is no such file" counts as absent. Any
  other error is raised. (``fsspec``'s own ``exists`` returns False for every error.)
- **Transient errors are retried** (``retries``): 429, 5xx, a broken connection, a timeout.
- **Secrets stay out of messages** (``secrets``).

Errors of a store are ``OSError`` (``FileNotFoundError``, ``PermissionError``, ``TimeoutError``
where one of these fits), because only the caller knows whether it costs an item, a container or the
run. What can never work (an unknown protocol, a missing extra) is a ``UsageError``. Writing to a
read-only protocol is an ``OutputError``.
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

# gcsfs would first ask Google by gRPC what kind of bucket it is, which takes a minute where gRPC is
# not available. Earmark needs nothing that depends on it. gcsfs reads this when it is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


_EXTRAS = {"s3": "s3", "s3a": "s3", "az": "azure", "abfs": "azure", "abfss": "azure"}
_T = TypeVar("_T")
_S3_WITH_BODY = {"ListObjectsV2", "CreateMultipartUpload", "CompleteMultipartUpload"}
_STAT_THREADS = 32


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file, as its store describes it.

    Attributes:
        url: Absolute local path, or full URL as requested; it may carry a signature.
        size: Size in bytes; None if the store does not say.
        version: Generation, etag or modification time, which changes with the content; None if the
            store has none.
    """

    url: str
    size: int | None
    version: str | None


def stat(url: str) -> FileInfo:
    """Return the size and version of one file.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: It is a folder.
        OSError: The store gives no answer.
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
    """Return ``stat`` of many files, of remote ones in parallel; errors are returned, not raised.

    Returns:
        ``FileInfo`` or the error by distinct URL, in the order given.
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
    """Return whether there is a file or folder; an unreachable store raises ``OSError``."""
    return _kind(url) is not None


def is_folder(url: str) -> bool:
    """Return whether ``url`` is a folder.

    In an object store, that is a prefix of objects. On the web, it is an index page, whose URL ends
    with a slash or redirects to one that does.
    """
    return _kind(url) == "directory"


def _kind(url: str) -> str | None:
    """Return ``directory``, ``file`` (anything that is not a folder), or None if it is absent."""
    try:
        if is_local(url):
            mode = os.stat(local_path(url)).st_mode  # noqa: PTH116
            return "directory" if stat_module.S_ISDIR(mode) else "file"
        return cast(str, ask_file(url, lambda: details_of(url))["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def details_of(url: str) -> dict[str, Any]:
    """Ask a store once for a file's or folder's facts; ``type`` is ``file`` or ``directory``."""
    fs, path = open_filesystem(url)
    details = cast(dict[str, Any], fresh(fs).info(path))
    if protocol(url) in READ_ONLY and _is_index_page(details):
        return {**details, "type": "directory"}
    return details


def _is_index_page(details: dict[str, Any]) -> bool:
    """Return whether this is a web server's index of a folder: it redirected to a final slash."""
    is_folder = without_query(str(details.get("url", ""))).endswith("/")
    return is_folder and details.get("mimetype") == "text/html"


def fresh(fs: Any) -> Any:
    """Return ``fs`` with empty caches: another process may have written since."""
    fs.invalidate_cache()
    return fs


def version_of(details: dict[str, Any]) -> str | None:
    """Return what changes with the content, under the names that stores give it.

    Google's generation comes before its etag, which changes with the metadata too.
    """
    names = ("generation", "etag", "ETag", "Content-MD5", "mtime", "modified", "updated")
    for name in (*names, "LastModified", "last_modified", "Last-Modified", "created"):
        value = details.get(name)
        if value:
            value = value.timestamp() if isinstance(value, datetime) else value
            return str(value).removeprefix("W/").strip('"')
    return None


class ChangedError(OSError):
    """The file has changed since it was opened."""


def open_filesystem(url: str, *, to_write: bool = False) -> tuple[Any, str]:
    """Return the file system of ``url``, and its path in that file system's terms.

    Raises:
        UsageError: The protocol is unknown, or needs an extra that is not installed.
        OutputError: ``to_write`` is set, and the protocol is read-only.
        OSError: The file system cannot be opened.
    """
    name = protocol(url)
    if to_write and name in READ_ONLY:
        raise OutputError(
            f"{public_uri(url)}: {name}:// can be read, not written; give a local folder or an "
            "object store (gs://, s3://, az://)"
        )
    with storage_errors(url):  # opens the archive of a chained URL (zip://)
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
    """Return Earmark's options for a file system; the user's fsspec configuration wins.

    aiohttp's default timeout of five minutes is too long for an answer that never begins, and too
    short for an hour of audio that comes as one stream.
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
    """Raise for an answer without its body, which botocore takes for an empty listing."""
    is_empty = parsed.keys() <= {"ResponseMetadata", "RequestCharged"}
    if is_empty and http_response.status_code == 200 and model.name in _S3_WITH_BODY:
        raise ShortBodyError(f"{model.name} was answered without a body")


def is_known(url: str) -> bool:
    """Return whether ``url`` is local, or fsspec has a file system for it, installed or not."""
    if is_local(url):
        return True
    name = re.split("::|://", url, maxsplit=1)[0]  # fsspec accepts it in lower case only
    return name in fsspec.registry or name in fsspec.available_protocols()


def ask_store(
    url: str,
    act: Callable[[], _T],
    may_pass: Callable[[BaseException], bool] = may_pass,
) -> _T:
    """Return the result of ``act``, retrying transient errors. Raises as ``storage_errors``."""
    with storage_errors(url):
        return ask(
            _store(url), act, may_pass, describe=lambda error: _explain(error, protocol(url))[1]
        )


# A file that was read, by store. Asking for it again tells a store's failure from a file's.
_given: dict[str, str] = {}


def ask_file(url: str, act: Callable[[], _T]) -> _T:
    """Do as ``ask_store`` for one file: give up sooner if the store answers for others."""
    store = _store(url)
    with storage_errors(url):
        result = ask(
            store,
            act,
            may_pass,
            file=public_uri(url),
            other=partial(details_of, _given[store]) if store in _given else None,
            describe=lambda error: _explain(error, protocol(url))[1],
        )
    _given[store] = url
    return result


def _store(url: str) -> str:
    return re.sub(r"(://[^/?#]*).*", r"\1", public_uri(url), count=1, flags=re.DOTALL)


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn any exception of a storage library into an ``OSError`` that names the file.

    All exceptions are caught, because each library has its own. The cause is left out: its text may
    hold the signed URL, which a traceback would print.
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
        # fsspec's http raises FileNotFoundError for every failed request; the cause is the error.
        real = error.__cause__
    status = status_of(real)
    # Only its text tells a 403 of gcsfs.
    forbidden = status in (401, 403) or str(real).startswith("Forbidden: ")
    if isinstance(real, PermissionError) or forbidden:
        return PermissionError, "access is denied; check the credentials"
    if isinstance(real, TimeoutError):
        return TimeoutError, "the store did not answer in time"
    if isinstance(real, IsADirectoryError):
        return IsADirectoryError, "is a folder, a file was expected"
    if isinstance(real, FileExistsError):
        return FileExistsError, "already exists"
    if isinstance(real, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError, "there is no such file"
    if isinstance(real, ShortBodyError):
        return OSError, "was transferred only in part"
    if isinstance(real, ChangedError):
        return OSError, "was changed while it was read"
    if status is not None:
        return OSError, f"the store answered {status}"
    return OSError, f"cannot be reached: {cause_words(real)}"
