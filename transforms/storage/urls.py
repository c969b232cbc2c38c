"""Names of files and folders: absolute local paths, and URLs that fsspec reads.

A URL may be chained, ``zip://a.wav::gs://bucket/x.zip``: then its first part names the file, and
what follows ``::`` says where that part is read from. Functions here work on the first part that
has a path and leave the others as they are.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(?:::.*)?://", re.DOTALL)
# What follows, in a chained URL, the part that names the file.
_INNER = re.compile(r"::(?=/|[A-Za-z][A-Za-z0-9+.\-]*:)")
READ_ONLY = frozenset({"http", "https"})
# Tables, texts, archives and pages. Not any dot: folders are called ``run.2`` too.
_FILE_ENDINGS = (
    *(".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather"),
    *(".xlsx", ".sqlite", ".db", ".duckdb", ".html", ".md", ".yaml", ".yml", ".tar", ".gz", ".zip"),
)
# One upload publishes the whole object, and listing a prefix is one flat request.
OBJECT_STORES = frozenset(
    {"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "hf", "memory", "oci", "oss"}
)


def is_local(url: str) -> bool:
    """Return whether ``url`` is a path on this machine (with or without ``file://``)."""
    is_url = "://" in url and _URL.match(url) is not None
    return not is_url or url.startswith(("file://", "local://"))


def protocol(url: str) -> str:
    """Return the URL's protocol in lower case, ``file`` for a local path."""
    return "file" if is_local(url) else re.split("::|://", url, maxsplit=1)[0].lower()


def normalise(text: str) -> str:
    """Return the name that everything else uses: an absolute path, or a URL.

    A relative path becomes absolute, ``~`` is expanded, ``.`` and ``..`` are resolved by name, and
    ``file://`` goes. The path of a ``file://`` URL is taken as it stands; where nothing has that
    name, percent-encoding is undone. In any path that nothing has, ``%XX`` may stand for a byte
    that is not UTF-8, as in results. A URL loses its trailing slash, but an ``http(s)`` URL is left
    as it is.
    """
    if not is_local(text):
        if protocol(text) in READ_ONLY or text.endswith("://"):
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
    path = os.path.abspath(path)  # noqa: PTH100
    return _with_bytes(path) if "%" in path else path


# How results write a byte of a name that is not UTF-8; no byte below 80 is one.
_ENCODED_BYTE = re.compile("%([89A-F][0-9A-F])")


def _with_bytes(path: str) -> str:
    """Return the existing path that a result writes as ``path``; else ``path`` itself."""
    with_bytes = _ENCODED_BYTE.sub(lambda match: chr(0xDC00 + int(match[1], 16)), path)
    if with_bytes == path or os.path.lexists(path) or not os.path.lexists(with_bytes):
        return path
    return with_bytes


def local_path(url: str) -> str:
    """Return the path of a local ``url``.

    Raises:
        ValueError: ``url`` is not local.
    """
    if not is_local(url):
        raise ValueError(f"a path on this machine was expected, not one of {protocol(url)}://")
    return url if url.startswith("/") else normalise(url)


class SplitUrl(NamedTuple):
    """A URL in four parts; only ``path`` names a file below another.

    Attributes:
        start: Wrappers and the protocol: ``simplecache::gs://``.
        path: The path, without a query.
        query: An ``http(s)`` query or fragment, with its mark.
        inner: What a chained URL reads from: ``::gs://…``.
    """

    start: str
    path: str
    query: str = ""
    inner: str = ""


def split_url(url: str) -> SplitUrl:
    """Split a URL or an absolute path around its path; a path has no other part."""
    if is_local(url):
        return SplitUrl("", url)
    end = url.index("://") + len("://")
    start, rest = url[:end], url[end:]
    if start[: -len("://")].rpartition("::")[2].lower() in READ_ONLY:
        # Only http has queries; elsewhere "?" may be part of an object's name.
        path = re.split("[?#]", rest, maxsplit=1)[0] if "?" in rest or "#" in rest else rest
        return SplitUrl(start, path, query=rest[len(path) :])
    inner = _INNER.search(rest) if "::" in rest else None
    stop = len(rest) if inner is None else inner.start()
    return SplitUrl(start, rest[:stop], inner=rest[stop:])


def join(base: str, *parts: str) -> str:
    """Return ``base`` with ``parts`` below it, joined by single slashes.

    The query of an ``http(s)`` folder, which may sign what lies below it, stays at the end.
    """
    start, path, query, inner = split_url(base)
    head = path.rstrip("/") + "/" if path or not start else ""
    return start + head + "/".join(part.strip("/") for part in parts) + query + inner


def parent(url: str) -> str:
    """Return the folder that holds ``url``, without a query; the top is its own parent."""
    if is_local(url):
        return str(Path(local_path(url)).parent)
    start, path, _, inner = split_url(url)
    return start + (path.rpartition("/")[0] or path) + inner


def file_name(url: str) -> str:
    """Return the last part of the path of ``url``."""
    return split_url(url).path.rstrip("/").rpartition("/")[2]


def names_file(url: str) -> bool:
    """Return whether a name ends like that of a file that tools write, such as ``labels.csv``."""
    return file_name(url).lower().endswith(_FILE_ENDINGS)


def without_query(url: str) -> str:
    """Return ``url`` without an ``http(s)`` query or fragment."""
    start, path, _, inner = split_url(url)
    return start + path + inner


def is_glob(url: str) -> bool:
    """Return whether ``url`` is a pattern; an ``http(s)`` URL never is (``?`` starts its query)."""
    return protocol(url) not in READ_ONLY and glob.has_magic(split_url(url).path)
