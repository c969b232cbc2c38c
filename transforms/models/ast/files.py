"""The location of a model, and its files on this machine.

A model is one that ships with Earmark, an id on the hub, a local or remote folder, or an original
``.pth`` file: ``locate_model`` tells which. ``ModelFiles`` finds the files, and downloads them if
it must.

Guarantees: a hub revision is pinned to its commit. Files from a remote folder are deleted after
use; files from the hub stay in the hub's own cache. Names and messages never hold a token or a
signature.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import huggingface_hub
from huggingface_hub import errors as hub_errors

from transforms.errors import ModelError, first_line
from transforms.models.ast.bundled import bundled_model, bundled_names
from transforms.process.temp_folders import scratch_folder
from transforms.storage import filesystem, reading, urls
from transforms.storage.secrets import public_uri

Source = Literal["bundled", "hub", "folder", "original"]

CONFIG_NAME = "config.json"
FEATURES_NAME = "preprocessor_config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"

# Configs have a few kB, an index of weights a few hundred: far above both, far below the memory.
MAX_JSON_BYTES = 64 << 20
_HUB_TIMEOUT_S = 30.0
# Everything a request to the hub can raise, whichever HTTP library the hub's client uses.
_HUB_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    hub_errors.HfHubHTTPError,
    *hub_errors.HfHubHTTPError.__bases__,
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelLocation:
    """The place of a model that was found but not read yet.

    Attributes:
        name: What the user gave, without secrets.
        url: Bundled model's name, hub id, folder or ``.pth`` file; may carry a signature.
        revision: Commit on the hub, or None.
        listing: Names of a hub model's files; None if only the local cache could be searched, and
            for models that are not on the hub.
        notes: What the user should know of how it was found.
    """

    name: str
    source: Source
    url: str
    revision: str | None = None
    license: str | None = None
    listing: frozenset[str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Folder of its files, or the folder that a ``.pth`` file is in."""
        if self.source == "bundled":
            # By name: Earmark may be installed elsewhere on a worker.
            return urls.normalise(str(bundled_model(self.url).folder))
        return urls.parent(self.url) if self.source == "original" else self.url

    def fail(self, text: str, cause: BaseException | None = None) -> NoReturn:
        """Raise ``ModelError`` with the model's name before the text."""
        raise ModelError(f"model {self.name}: {text}") from cause


def locate_model(
    name: str, revision: str | None = None, wanted: str = CONFIG_NAME
) -> ModelLocation:
    """Find out what kind of model a name is; local files take precedence over the hub.

    The name of a bundled model always means that model, even in a directory with a folder of the
    same name, so that a command means the same everywhere; ``./name`` is the folder.

    Args:
        name: Name of a bundled model (``esc10``), hub id (``org/name`` or ``org/name@revision``),
            local or remote folder, or original ``.pth`` file.
        revision: Revision on the hub, instead of the one in the name; ignored for other sources.
        wanted: The file that must be in the hub's local cache to work without a network.

    Raises:
        ModelError: There is no such model, or the hub cannot be reached.
    """
    public = public_uri(name)
    if not name:
        raise ModelError("model is empty; give a hub id (org/name), a folder or a .pth file")
    if name in bundled_names():
        note = f"{name} is the model that ships with Earmark; the folder here is ./{name}"
        license_name = bundled_model(name).license
        notes = (note,) if filesystem.is_folder(name) else ()
        return ModelLocation(name, "bundled", name, license=license_name, notes=notes)
    if urls.file_name(name).endswith((".pth", ".pt")):
        return ModelLocation(public, "original", urls.normalise(name))
    if not urls.is_local(name) or filesystem.is_folder(name):
        return ModelLocation(public, "folder", urls.normalise(name))
    hub_id, _, revision_in_name = name.partition("@")
    if filesystem.exists(name):
        raise ModelError(
            f"model {public}: is a file; expected a folder with {CONFIG_NAME} and the weights, or "
            "an original checkpoint that ends in .pth"
        )
    if name.startswith((".", "/", "~", "file:")) or not _HUB_ID.fullmatch(hub_id):
        raise ModelError(
            f"model {public}: there is no such folder. Legal names: a hub id (org/name or "
            "org/name@revision), a local or remote folder, an original .pth file"
            + "".join(f", {known} (ships with Earmark)" for known in bundled_names())
        )
    return _locate_on_hub(public, hub_id, revision or revision_in_name or None, wanted)


def _locate_on_hub(name: str, hub_id: str, revision: str | None, wanted: str) -> ModelLocation:
    try:
        info = huggingface_hub.HfApi().model_info(hub_id, revision=revision, timeout=_HUB_TIMEOUT_S)
    except hub_errors.RevisionNotFoundError:
        raise ModelError(
            f"model {name}: the hub has no revision {revision!r} of {hub_id}; give a branch, tag "
            "or commit that its page lists"
        ) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise ModelError(
            f"model {name}: there is no such folder here, and the hub has no model {hub_id} that "
            "you may see; check the name, or log in (hf auth login) if it is private"
        ) from None
    except _HUB_ERRORS as error:
        return _locate_in_cache(name, hub_id, revision, wanted, error)
    license_name = getattr(info.card_data, "license", None)
    listing = frozenset(sibling.rfilename for sibling in info.siblings or ())
    return ModelLocation(
        name, "hub", hub_id, info.sha, str(license_name) if license_name else None, listing
    )


def _locate_in_cache(
    name: str, hub_id: str, revision: str | None, wanted: str, error: Exception
) -> ModelLocation:
    """Fall back on a revision that an earlier run downloaded and pinned."""
    cached = huggingface_hub.try_to_load_from_cache(hub_id, wanted, revision=revision)
    if cached is None and revision is None:
        cached = _newest_in_cache(hub_id, wanted)
    if not isinstance(cached, str):
        # The library's text may hold the request's headers: so no cause, and the token removed.
        raise ModelError(
            f"model {name}: cannot reach the hub for {hub_id}: {_without_token(error)}; pass a "
            "local folder, or try again where there is a network"
        ) from None
    commit = Path(cached).parent.name
    note = f"the hub cannot be reached; using commit {commit[:12]} from its local cache"
    return ModelLocation(name, "hub", hub_id, commit, notes=(note,))


def _newest_in_cache(hub_id: str, wanted: str) -> str | None:
    """Find the latest download, since a pinned commit does not record the branch it is from."""
    try:
        repos = huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE).repos
    except huggingface_hub.errors.CacheNotFound:
        return None
    snapshots = [
        (revision.last_modified, str(file.file_path))
        for repo in repos
        if repo.repo_id == hub_id and repo.repo_type == "model"
        for revision in repo.revisions
        for file in revision.files
        if file.file_name == wanted
    ]
    return max(snapshots)[1] if snapshots else None


def _without_token(error: Exception) -> str:
    text = f"{type(error).__name__}: {first_line(error)}"
    token = huggingface_hub.get_token()
    return text.replace(token, "***") if token else text


class ModelFiles(ExitStack[None]):
    """A model's files on this machine; files from a remote folder are deleted at exit."""

    def __init__(self, location: ModelLocation) -> None:
        super().__init__()
        self.location = location
        self._found: dict[str, Path | None] = {}

    def find(self, file_name: str) -> Path | None:
        """Return the local path of a file, or None if the checkpoint has no such file."""
        if file_name not in self._found:  # a remote file is downloaded once
            is_on_hub = self.location.source == "hub"
            look = self._find_on_hub if is_on_hub else self._find_in_folder
            self._found[file_name] = look(file_name)
        return self._found[file_name]

    def _find_in_folder(self, file_name: str) -> Path | None:
        location = self.location
        url = urls.join(location.folder, file_name)
        if location.source == "original" and file_name == urls.file_name(location.url):
            url = location.url  # with its query, which may sign it
        try:
            if not filesystem.exists(url):
                return None
            if not urls.is_local(url):
                folder = self.enter_context(tempfile.TemporaryDirectory(dir=scratch_folder()))
                path = Path(folder) / urls.file_name(url)
                reading.get_file(url, str(path))
                return path
            with reading.open_read(url):  # raises for a pipe, which would block forever
                return Path(urls.local_path(url))
        except OSError as error:
            location.fail(
                f"{file_name} cannot be read: {error.strerror or error}. Check permissions, "
                "network and disk, or give another --model",
                error,
            )

    def need(self, file_name: str) -> Path:
        """Return the local path of a file that the model cannot do without."""
        path = self.find(file_name)
        if path is None:
            self.location.fail(f"{file_name} does not exist (any more)")
        return path

    def read_json(self, file_name: str) -> dict[str, Any] | None:
        """Read the object in a JSON file; None if there is no such file."""
        path = self.find(file_name)
        if path is None:
            return None
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            self.location.fail(
                f"{file_name} has {size} bytes; expected at most {MAX_JSON_BYTES}. Is it a config?"
            )
        try:
            values = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
        except (ValueError, OSError, RecursionError) as error:
            self.location.fail(f"{file_name} cannot be read as JSON: {error}. Get it again", error)
        if not isinstance(values, dict):
            self.location.fail(
                f"{file_name} holds a {type(values).__name__}; expected a JSON object"
            )
        return values

    def _find_on_hub(self, file_name: str) -> Path | None:
        location = self.location
        if location.listing is not None and file_name not in location.listing:
            return None
        cached = huggingface_hub.try_to_load_from_cache(
            location.url, file_name, revision=location.revision
        )
        if isinstance(cached, str):
            return Path(cached)
        if location.listing is None:
            return None
        return _download(location, file_name)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate keys, of which JSON would silently keep the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return values


def _download(location: ModelLocation, file_name: str) -> Path:
    try:
        return Path(
            huggingface_hub.hf_hub_download(location.url, file_name, revision=location.revision)
        )
    except hub_errors.GatedRepoError:
        location.fail(
            "is gated: accept its terms on its page, then log in (hf auth login), or pass a "
            "local folder"
        )
    except _HUB_ERRORS as error:
        text, advice = _without_token(error), "pass a local folder, or try again"
        if isinstance(error, PermissionError):  # a user without a home, as in some containers
            advice = "name a folder for the hub's cache that can be written: HF_HOME=FOLDER"
    raise ModelError(
        f"model {location.name}: cannot download {file_name} from the hub for {location.url}: "
        f"{text}; {advice}"
    )


def find_weight_files(files: ModelFiles) -> tuple[str, ...]:
    """Return the names of the files with a model's weights; safetensors before a pickle."""
    location = files.location
    if location.source == "original":
        name = urls.file_name(location.url)
        if files.find(name) is None:
            location.fail("there is no such file")
        return (name,)
    if files.find(WEIGHTS_NAME) is not None:
        return (WEIGHTS_NAME,)
    index = files.read_json(INDEX_NAME)
    if index is not None:
        return _shard_names(location, index)
    if files.find(PICKLE_NAME) is None:
        location.fail(
            f"has no weights; expected {WEIGHTS_NAME}, {INDEX_NAME} with its parts, or "
            f"{PICKLE_NAME}"
        )
    return (PICKLE_NAME,)


def _shard_names(location: ModelLocation, index: Mapping[str, Any]) -> tuple[str, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        location.fail(f"{INDEX_NAME} has no weight_map from tensor to file")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            location.fail(
                f"{INDEX_NAME} names the file {name!r}; expected a .safetensors beside it"
            )
    return tuple(sorted(set(weight_map.values())))


def hash_files(files: ModelFiles, names: Sequence[str]) -> str:
    """Return the hex SHA-256 of a file, or of the sorted lines ``name digest`` of several."""
    digests = {}
    for name in names:
        with files.need(name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
