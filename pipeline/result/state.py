"""The state of a result on disk: what is committed, what is damaged, what is left over.

Planning reads it to know what is done. ``heal`` repairs it before work starts. ``verify`` checks
more of it. ``run.json`` is written when work starts (``status: running``) and again at the end of
the graph (``status: done``), followed by ``_SUCCESS``.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline import __version__
from pipeline.graph import RunTotals
from pipeline.terminal.count_report import totals_record
from pipeline.terminal.precision_report import checks_record
from pipeline.terminal.time_report import Startup, record_time
from transforms.errors import AccountingError, OutputError, in_words
from transforms.process.limits import usable_cores
from transforms.results.commits import (
    COMMITS,
    PARTS,
    RUN_FILE,
    Commit,
    are_commits_held,
    commit_url,
    list_unit_ids,
    part_url,
    read_commits,
    remove_unit,
)
from transforms.sources.clip_ids import printable
from transforms.storage import filesystem, listing, reading, urls, writing
from transforms.storage.secrets import public_uri
from transforms.storage.writing import writing_to

logger = logging.getLogger(__name__)

SUCCESS_FILE = "_SUCCESS"
WRITERS_PATIENCE_S = 60.0

# Earlier versions labelled a long file in parts, and kept these here until they were joined.
OLD_PARTS = "_parts"
_OLD_PART = re.compile(
    r"[0-9a-f]{16,64}/(windows|clips|errors|_commits)/"
    r"\.?[0-9a-f]{20}\.(parquet|json)(\.[0-9a-f]+\.tmp)?"
)

# The name of a unit's files: ``make_unit_id`` and an extension.
_UNIT_FILE = re.compile(r"^(?P<unit_id>[0-9a-f]{16,64})\.(parquet|json)$")

_VERSIONED = (
    *("apache-beam", "torch", "torchaudio", "soundfile", "av", "soxr"),
    *("numpy", "pyarrow", "fsspec", "safetensors", "openvino", "nncf"),
)


@dataclass(frozen=True)
class ResultState:
    """The content of an output folder.

    Attributes:
        run: ``run.json``, or None if there is none.
        commits: Commits whose parts exist in the committed size, by unit.
        damaged: Units whose commit cannot be read or whose parts are missing or of another
            size, with the reason.
        unreadable: Units whose commit the store does not return, with the reason. Nothing is
            known of them, so a run refuses to start.
        superseded: Units that another commit replaces and that still exist.
        orphans: Parts without a commit, as URLs.
        unfinished: Files that were being written when a run was killed, as URLs.
        foreign: Files in the result's folders that Earmark did not write, as URLs.
        old_parts: Files below ``_parts`` that an earlier version wrote, as URLs.
    """

    output: str
    run: Mapping[str, Any] | None = None
    commits: Mapping[str, Commit] = field(default_factory=dict)
    damaged: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    superseded: frozenset[str] = frozenset()
    orphans: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    old_parts: tuple[str, ...] = ()
    succeeded: bool = False

    @property
    def is_result(self) -> bool:
        """Whether Earmark has written here before."""
        return self.run is not None or any((self.commits, self.damaged, self.unreadable))


def read_result(output: str) -> ResultState:
    """Read the state of an output folder; an absent or empty folder gives an empty state.

    Raises:
        OutputError: The folder cannot be read or is a file, ``run.json`` is not Earmark's, or the
            result has another schema.
    """
    try:
        return _read_result(output)
    except OSError as error:
        raise OutputError(
            f"{in_words(error)}. Check the folder {public_uri(output)} and the rights to "
            "it, or give another."
        ) from error


def _read_result(output: str) -> ResultState:
    if not filesystem.exists(output):
        return ResultState(output)
    if not filesystem.is_folder(output):
        raise OutputError(
            f"{public_uri(output)} is a file; --output needs a folder. Give another path."
        )
    commits, without = read_commits(output)  # first: it checks the schema
    run = read_run(output)
    sizes, foreign = _list_parts(output)
    superseded = {old for commit in commits.values() for old in commit.replaces}
    superseded &= commits.keys() | without.keys()
    unreadable = {
        unit_id: f"its commit cannot be read: {error.strerror or error}"
        for unit_id, error in without.items()
        if isinstance(error, OSError)
    }
    damaged = dict.fromkeys(without.keys() - unreadable.keys(), "its commit cannot be read")
    for unit_id, commit in commits.items():
        reason = _missing_part(commit, sizes)
        if reason:
            damaged[unit_id] = reason
    known = commits.keys() | without.keys()
    # A part that its commit does not name (an ``errors`` part, after a change by hand) is an
    # orphan too.
    orphans = [
        part_url(output, part, unit_id)
        for part, unit_id in sizes
        if unit_id not in known or (unit_id in commits and part not in commits[unit_id].parts)
    ]
    return ResultState(
        output=output,
        run=run,
        commits={u: c for u, c in commits.items() if u not in damaged and u not in superseded},
        damaged={u: reason for u, reason in damaged.items() if u not in superseded},
        unreadable={u: reason for u, reason in unreadable.items() if u not in superseded},
        superseded=frozenset(superseded),
        orphans=tuple(sorted(orphans)),
        unfinished=tuple(_list_unfinished(output)),
        foreign=tuple(foreign),
        old_parts=tuple(_list_old_parts(output)),
        succeeded=filesystem.exists(urls.join(output, SUCCESS_FILE)),
    )


def read_run(output: str) -> Mapping[str, Any] | None:
    """Read ``run.json`` of a result; None if there is none.

    Raises:
        OutputError: It exists and is not Earmark's.
    """
    url = urls.join(output, RUN_FILE)
    if not filesystem.exists(url):
        return None
    try:
        run = json.loads(reading.read_bytes(url))
        if run["fingerprint"] and run["results"]:
            return dict(run)
    except (ValueError, KeyError, TypeError):
        pass
    raise OutputError(
        f"{public_uri(url)} was not written by Earmark, or is damaged; give another --output, or "
        "remove it."
    )


def _list_parts(output: str) -> tuple[dict[tuple[str, str], int], list[str]]:
    """Return the sizes of the parts, by part and unit, and the files that are not Earmark's."""
    sizes: dict[tuple[str, str], int] = {}
    foreign = []
    for part in PARTS:
        folder = urls.join(output, part)
        if not filesystem.exists(folder):
            continue
        for file in listing.list_files(folder):
            name = urls.file_name(file.url)
            match = _UNIT_FILE.match(name)
            if match and urls.parent(file.url) == folder:
                sizes[part, match["unit_id"]] = file.size or 0
            elif not writing.is_temporary_name(name):
                foreign.append(file.url)
    return sizes, foreign


def _list_unfinished(output: str) -> Iterator[str]:
    """Yield the files that were being written when a run was killed, wherever runs write."""
    for folder in (output, *(urls.join(output, name) for name in (*PARTS, COMMITS))):
        for name in listing.list_names(folder):
            if writing.is_temporary_name(name):
                yield urls.join(folder, name)


def _list_old_parts(output: str) -> Iterator[str]:
    """Yield the files below ``_parts`` whose names are Earmark's, commits first."""
    root = urls.join(output, OLD_PARTS)
    if not filesystem.exists(root):
        return
    files = [file.url for file in listing.list_files(root)]
    names = {url: url.removeprefix(f"{root}/") for url in files}
    ours = [url for url in files if _OLD_PART.fullmatch(names[url])]
    yield from sorted(ours, key=lambda url: (f"/{COMMITS}/" not in names[url], url))


def _remove_old_parts(state: ResultState) -> None:
    """Remove the parts of an earlier version, and the folders that are then empty."""
    folders = set()
    for url in state.old_parts:
        writing.remove(url)
        for _ in range(3):
            url = urls.parent(url)
            folders.add(url)
    for folder in sorted(folders, key=len, reverse=True):
        writing.remove_empty_folder(folder)


def _missing_part(commit: Commit, sizes: Mapping[tuple[str, str], int]) -> str | None:
    for part, info in commit.parts.items():
        size = sizes.get((part, commit.unit_id))
        if size is None:
            return f"its {part} part is missing"
        if size != info.num_bytes:
            return f"its {part} part has {size} bytes, and {info.num_bytes} were committed"
    return None


def wait_for_writers(output: str) -> None:
    """Wait for workers of a killed run: they may commit for some seconds before they notice.

    Raises:
        OutputError: They did not end.
    """
    if not are_commits_held(output):
        return
    logger.info(
        "waiting for processes of an earlier run that still write to %s", public_uri(output)
    )
    deadline = time.monotonic() + WRITERS_PATIENCE_S
    while are_commits_held(output):
        if time.monotonic() > deadline:
            raise OutputError(
                f"processes of an earlier run still write to {public_uri(output)}, and did not end "
                f"within {WRITERS_PATIENCE_S:g} s; stop them, then run this command again."
            )
        time.sleep(0.1)


def heal(state: ResultState) -> None:
    """Repair a result before work starts: remove what does not count.

    Removes damaged units, which are then done again, leftovers of replaced units, parts without a
    commit, files that were being written, staged files of killed runs, and parts of long files
    that an earlier version left. Touches nothing else.
    """
    for unit_id in (*state.damaged, *sorted(state.superseded)):
        remove_unit(state.output, unit_id)
    for url in (*state.orphans, *state.unfinished):
        writing.remove(url)
    _remove_old_parts(state)
    remove_staging(state.output)


def remove_staging(output: str) -> None:
    """Remove files on their way to a local output; only for the holder of its lock."""
    if urls.is_local(output):
        folder = urls.join(output, writing.STAGING_FOLDER)
        shutil.rmtree(urls.local_path(folder), ignore_errors=True)


def check_removable(state: ResultState) -> None:
    """Raise if ``--overwrite`` would remove what Earmark did not write.

    Raises:
        OutputError: The folder has files where parts belong, and no result of Earmark's.
    """
    others = (*state.foreign, *state.orphans)
    if not state.is_result and others:
        raise OutputError(
            f"{public_uri(state.output)} holds {public_uri(others[0])} but no run.json of Earmark; "
            "--overwrite removes only what Earmark wrote. Give another --output."
        )


def remove_result(state: ResultState) -> None:
    """Remove what Earmark wrote (``--overwrite``), and nothing else."""
    check_removable(state)
    writing.remove(urls.join(state.output, SUCCESS_FILE))
    for unit_id in (*state.commits, *state.unreadable):
        remove_unit(state.output, unit_id)
    heal(state)
    writing.remove(urls.join(state.output, RUN_FILE))
    for folder in (*PARTS, COMMITS):
        writing.remove_empty_folder(urls.join(state.output, folder))


def make_fingerprint(results: Mapping[str, Any]) -> str:
    """Return the hex digest of everything that changes results."""
    text = json.dumps(results, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_results(state: ResultState, results: Mapping[str, Any], model_name: str) -> None:
    """Raise if results of different models or settings would be mixed in one folder.

    Args:
        state: The folder's content.
        results: What changes results now.
        model_name: Name of the model now; a hash alone would tell people little.

    Raises:
        OutputError: The folder's commits were made with something else, or not all of them can be
            read; the message says what differs.
    """
    for unit_id, reason in state.unreadable.items():
        raise OutputError(
            f"{public_uri(commit_url(state.output, unit_id))}: {reason}. Make it readable "
            "(permissions, the network, the disk), give another --output, or start anew with "
            "--overwrite."
        )
    fingerprint = make_fingerprint(results)
    others = {commit.fingerprint for commit in state.commits.values()} - {fingerprint}
    if not others:
        return
    run = state.run or {"results": {}, "model": {}}
    before = run["results"]
    differences = describe_differences(before, results)
    if before.get("model_sha256") != results.get("model_sha256"):
        differences.insert(0, f"  model: {run['model'].get('name')} there, {model_name} now")
    if not differences:
        differences = [f"  fingerprint: {min(others)} there, {fingerprint} now"]
    raise OutputError(
        f"{public_uri(state.output)} was made with other settings that change results:\n"
        + "\n".join(differences)
        + "\nGive another --output, go back to those settings, or start anew with --overwrite."
    )


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that differs from what a folder was made with."""
    there, here = _flatten(before), _flatten(now)
    return [
        f"  {key}: {_short(there.get(key))} there, {_short(here.get(key))} now"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Join nested keys by dots, so that only what differs is named."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": item for inner, item in _flatten(value).items()}
        else:
            flat[key] = value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def software_versions() -> dict[str, str]:
    """Return the versions of Earmark, Python and the libraries that results depend on."""
    versions = {"earmark": __version__, "python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of an extra
            versions[name] = importlib.metadata.version(name)
    return versions


def utc_now() -> str:
    """Return the time in ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_run(output: str, run: Mapping[str, Any]) -> None:
    """Write ``run.json`` whole."""
    text = printable(json.dumps(run, indent=2, ensure_ascii=False))
    writing.write_bytes(urls.join(output, RUN_FILE), text.encode() + b"\n")


@dataclass(frozen=True)
class FinishRun:
    """The graph's last step: check the accounting, write ``run.json`` and ``_SUCCESS``.

    Attributes:
        run: ``run.json`` as it was written at the start.
        kept: Totals of the units that were committed before and stay.
        num_units: Units that this run has to do.
        carried_items: Rows that new units carry over from those they replace.
        vanished_items: Rows of items that are not in the input.
        vanished_failures: Failures of items that are not in the input.
        num_found_items: Items that planning found; None if containers had to be read to know.
    """

    output: str
    run: Mapping[str, Any]
    startup: Startup
    kept: RunTotals
    num_units: int
    carried_items: int
    vanished_items: int
    vanished_failures: int
    num_found_items: int | None

    def __call__(self, new: RunTotals) -> None:
        """Finish the run.

        Raises:
            AccountingError: Units, items and rows do not add up.
        """
        self._check(new)
        total = self.kept + new
        run = {
            **self.run,
            "status": "done",
            "finished_utc": utc_now(),
            "engines": list(total.engines),
            "checks": checks_record(total.checks),
            "totals": {
                **totals_record(total.totals, total.counts),
                "units": total.units,
                "new_units": new.units,
                "new_items": new.totals.items - self.carried_items,
                "found_items": total.totals.items - self.vanished_items,
                "found_failures": total.totals.failures - self.vanished_failures,
                "vanished_items": self.vanished_items,
            },
            "time": record_time(
                self.startup,
                new.seconds,
                new.engines,
                asked_precision=self.run["config"]["inference"]["precision"],
                num_cores=usable_cores(),
                num_processes=self.run["config"]["inference"]["workers"],
            ),
        }
        with writing_to(self.output):
            write_run(self.output, run)
            writing.write_bytes(urls.join(self.output, SUCCESS_FILE), b"")

    def _check(self, new: RunTotals) -> None:
        place = public_uri(self.output)
        if new.units != self.num_units:
            raise AccountingError(
                f"{self.num_units} units were planned and {new.units} came to their end; run the "
                "same command again to do the rest"
            )
        total = self.kept + new
        found_items = total.totals.items - self.vanished_items
        if self.num_found_items not in (None, found_items):
            raise AccountingError(
                f"planning found {self.num_found_items} items, and {found_items} rows were written "
                f"for them; see earmark verify {place}"
            )
        num_commits = len(list_unit_ids(self.output))
        if num_commits != total.units:
            raise AccountingError(
                f"{total.units} commits must be in {place}, and {num_commits} are; see "
                f"earmark verify {place}"
            )
