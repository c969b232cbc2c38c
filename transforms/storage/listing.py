"""List the files below a folder, or those that a pattern matches."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.utils import glob_translate

from transforms.storage.filesystem import (
    FileInfo,
    ask_store,
    fresh,
    open_filesystem,
    stat,
    stat_many,
    version_of,
)
from transforms.storage.reading import open_read
from transforms.storage.secrets import public_uri
from transforms.storage.urls import (
    OBJECT_STORES,
    READ_ONLY,
    is_local,
    join,
    local_path,
    protocol,
    split_url,
    without_query,
)
from transforms.storage.web_pages import links_below

_MAX_PAGE_BYTES = 64 << 20


def _raise(error: OSError) -> None:
    raise error


def list_files(url: str, on_error: Callable[[OSError], None] = _raise) -> Iterator[FileInfo]:
    """Yield every file below the folder ``url``, sorted by name.

    Over ``http(s)``, these are the links of the server's index pages. Locally, links to folders are
    followed. Each real folder is listed once, under its own path if that is below ``url``, so a
    loop of links ends. Broken links, pipes, sockets and devices are listed without a size; reading
    them raises the error.

    Args:
        url: The folder; an absent one has no files.
        on_error: Called with the error of each folder that cannot be listed and of each entry that
            cannot be resolved (a link to itself); by default, it is raised.
    """
    if is_local(url):
        yield from sorted(_walk_local(local_path(url), on_error), key=lambda info: info.url)
        return
    if protocol(url) in READ_ONLY:
        yield from _list_web(url, on_error)
        return
    fs, root = open_filesystem(url)
    if protocol(url) in OBJECT_STORES:
        try:
            details = ask_store(url, lambda: fresh(fs).find(root, detail=True))
        except OSError as error:
            on_error(error)
            return
    else:
        details = dict(_walk_remote(fs, url, root, on_error))
    for path in sorted(details):
        info = details.pop(path)  # the facts of a million objects take gigabytes
        if info["type"] == "file" and not path.endswith("/"):
            yield FileInfo(_below(url, root, path), info.get("size"), version_of(info))


def _walk_local(root: str, report: Callable[[OSError], None]) -> Iterator[FileInfo]:
    """Yield the files of real folders first, then of linked ones; each real folder once."""
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
                info = FileInfo(entry.path, None, None)  # a broken link, pipe, socket or device
                if entry.is_file():
                    status = entry.stat()
                    info = FileInfo(entry.path, status.st_size, str(status.st_mtime_ns))
            except OSError as error:
                report(error)
                continue
            yield info


def _walk_remote(
    fs: Any, url: str, root: str, report: Callable[[OSError], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    # fsspec's own walk skips folders that cannot be listed, without an error.
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            list_it = partial(fresh(fs).ls, folder, detail=True)
            children = ask_store(_below(url, root, folder), list_it)
        except OSError as error:
            report(error)
            continue
        for child in children:
            if child["type"] == "directory":
                pending.append(child["name"])
            else:
                yield child["name"], child


def _list_web(url: str, report: Callable[[OSError], None]) -> Iterator[FileInfo]:
    """Yield the files of a folder's index page, and of the index pages below it."""
    top = without_query(url)
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
        # If the server gives no facts, reading the file raises the error.
        yield FileInfo(file, None, None) if isinstance(facts, OSError) else facts


def _read_page(url: str) -> str:
    with open_read(url) as file:
        data = file.read(_MAX_PAGE_BYTES + 1)
    if len(data) > _MAX_PAGE_BYTES:
        raise OSError(f"{public_uri(url)}: its index page has more than {_MAX_PAGE_BYTES} bytes")
    return data.decode("utf-8", "replace")


def _below(url: str, root: str, path: str) -> str:
    """Return the URL of ``path``, which the file system listed below ``root``."""
    rest = path.removeprefix(root).strip("/")
    return join(url, rest) if rest else url


def glob_files(pattern: str, on_error: Callable[[OSError], None] = _raise) -> Iterator[FileInfo]:
    """Yield every file that ``pattern`` matches, sorted by name.

    ``**`` matches folders of any depth. A matched folder stands for all files below it, as if a
    shell had expanded the pattern (``**`` matches them anyway).

    Args:
        pattern: A local path or URL with ``*``, ``?``, ``[…]`` or ``**``.
        on_error: As for ``list_files``, of the matched folders.

    Raises:
        OSError: The store gives no answer.
    """
    folders: list[str] = []
    files: dict[str, FileInfo] = {}
    any_depth = "**" in pattern.split("/")
    if is_local(pattern) and any_depth:
        # Python's own glob would follow loops of links.
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
        fs, root = open_filesystem(pattern)
        matches = ask_store(pattern, lambda: fresh(fs).glob(root, detail=True))
        start, _, _, inner = split_url(pattern)
        for path, details in matches.items():
            url = start + path.lstrip("/") + inner
            if details["type"] == "directory":
                folders.append(url)
            else:
                files[url] = FileInfo(url, details.get("size"), version_of(details))
    if not any_depth:
        for folder in folders:
            files.update((info.url, info) for info in list_files(folder, on_error))
    for url in sorted(files):
        yield files[url]


def list_names(folder_url: str) -> list[str]:
    """Return the names of the files directly in a folder, sorted; none if it does not exist."""
    try:
        if is_local(folder_url):
            with os.scandir(local_path(folder_url)) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        fs, root = open_filesystem(folder_url)
        children = ask_store(folder_url, lambda: fresh(fs).ls(root, detail=True))
    except FileNotFoundError:
        return []
    paths = (child["name"] for child in children if child["type"] == "file")
    return sorted(name for path in paths if path != root and (name := path.rpartition("/")[2]))
