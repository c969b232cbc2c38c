"""A disk cache from run to run of what takes long to make: converted models, measured figures.

    <root>/<kind>/<key>/        a folder of files, and their hashes (``keep_folder``)
    <root>/<kind>/<key>.json    a few figures (``keep_figures``)

The root is $EARMARK_CACHE, else $XDG_CACHE_HOME/earmark, else ~/.cache/earmark. A key is the digest
of everything that its entry depends on. Guarantees: the cache never ends a run. An entry that is
damaged, unreadable or cannot be written counts as absent. Entries appear whole or not at all, and
several processes may make the same one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SUMS = "sha256.json"

# A model of AST base takes 350 MB. Of each kind, the last used folders are kept.
MAX_FOLDERS = 8


def cache_root() -> Path:
    """Return the folder of the cache, which need not exist."""
    own = os.environ.get("EARMARK_CACHE")
    if own:
        return Path(own)
    given = os.environ.get("XDG_CACHE_HOME")
    if given and Path(given).is_absolute():  # required by the XDG specification
        return Path(given) / "earmark"
    try:
        return Path.home() / ".cache" / "earmark"
    except RuntimeError:  # the user has no home, so nothing can be cached
        return Path(os.devnull) / "earmark"


def make_key(values: Mapping[str, Any]) -> str:
    """Return an entry's key: the digest of everything that it depends on."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def find_folder(kind: str, key: str) -> Path | None:
    """Return a cached folder; None if it is absent or damaged."""
    folder = cache_root() / kind / key
    try:
        sums = json.loads((folder / SUMS).read_text())
        if all(_sha256(folder / name) == digest for name, digest in sums.items()):
            os.utime(folder)
            return folder
        logger.info("%s is damaged and will be made again", folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        logger.info("%s cannot be read (%s) and will be made again", folder, error)
    return None


def keep_folder(kind: str, key: str, write: Callable[[Path], None]) -> Path | None:
    """Cache a folder of files, which ``write`` writes into the folder that it is given.

    Returns:
        The cached folder; None if it cannot be written, whatever ``write`` or the disk raises.
    """
    folder = cache_root() / kind / key
    staging = folder.with_name(f".{key}-{uuid.uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
        write(staging)
        sums = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
        (staging / SUMS).write_text(json.dumps(sums))
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or made by another process just now
        staging.rename(folder)
        _prune(folder.parent)
    except Exception as error:  # libraries raise exceptions of their own for a full disk
        logger.info("%s cannot be cached (%s)", folder, error)
        shutil.rmtree(staging, ignore_errors=True)
        return find_folder(kind, key)  # another process may have made it
    return folder


def _prune(parent: Path) -> None:
    """Remove all but the last used folders, and the leftovers of killed processes."""
    with contextlib.suppress(OSError):
        folders = [path for path in parent.iterdir() if path.is_dir()]
        folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in folders[MAX_FOLDERS:]:
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_figures(kind: str, key: str) -> dict[str, Any]:
    """Return cached figures; none if they are absent or damaged."""
    try:
        figures = json.loads((cache_root() / kind / f"{key}.json").read_text())
    except (OSError, ValueError):
        return {}
    return figures if isinstance(figures, dict) else {}


def keep_figures(kind: str, key: str, figures: Mapping[str, Any], most: int) -> None:
    """Add figures to an entry, and keep the last ``most`` of them."""
    path = cache_root() / kind / f"{key}.json"
    joined = read_figures(kind, key)
    joined = {name: value for name, value in joined.items() if name not in figures} | dict(figures)
    text = json.dumps(dict(list(joined.items())[-most:]))
    staging = path.with_name(f".{key}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.write_text(text)
        staging.replace(path)
    except OSError as error:
        logger.info("%s cannot be cached (%s)", path, error)
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
