"""``earmark verify DIR``: is a result whole?

Every commit is checked against its parts: they exist, with the committed size, hash and row count,
can be read to the last page, and have a footer with the same fingerprint. Every part belongs to a
commit, every clip occurs once, every window belongs to a clip, and the totals of ``run.json`` are
those of the commits. Each finding names the file, and its kind decides the advice at the end: a run
does not read existing parts, so it repairs less than is found here.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.exit_codes import EXIT_DONE, EXIT_INCOMPLETE
from pipeline.result.state import SUCCESS_FILE, ResultState, read_result
from pipeline.terminal.count_report import describe_errors, describe_warnings, totals_record
from pipeline.terminal.std_streams import answer
from pipeline.terminal.wording import counted
from transforms.errors import InputError, OutputError
from transforms.results.commits import (
    COMMITS,
    RUN_FILE,
    Commit,
    PartInfo,
    UnitTotals,
    check_schema,
    commit_url,
    count_items,
    item_ids,
    list_unit_ids,
    part_url,
    read_part,
)
from transforms.results.counts import CLIP_COLUMNS, ERROR_COLUMNS, RowCounts, count_rows
from transforms.storage import reading, urls
from transforms.storage.secrets import public_uri


class Kind(Enum):
    """The kind of a finding, as printed; the advice depends on it.

    Attributes:
        INCOMPLETE: The next run notices it too, and redoes the unit (or rewrites ``run.json``).
        CHANGED: The next run does not notice it: the unit's commit must be removed first.
        UNREADABLE: The store does not return it, so nothing is known of it.
        LEFTOVER: It does not count, and the next run removes it.
        UNFINISHED: The last run did not finish.
        FOREIGN: Not Earmark's, but tools that read the folder read it too.
        STRAY: Not Earmark's, and harmless.
    """

    INCOMPLETE = "damaged"
    CHANGED = "changed"
    UNREADABLE = "unreadable"
    LEFTOVER = "left over"
    UNFINISHED = "unfinished"
    FOREIGN = "foreign"
    STRAY = "note"


@dataclass(frozen=True)
class Finding:
    """Something wrong with a result.

    Attributes:
        name: The file, unit or clip.
        problem: What is wrong with it.
        kind: Its kind.
        unit_id: The unit to redo, where a run does not notice that.
    """

    name: str
    problem: str
    kind: Kind = Kind.INCOMPLETE
    unit_id: str | None = None


def run_verify(folder: str, quiet: bool = False) -> int:
    """Check a result, and print what is wrong and what to do.

    Returns:
        0 if the result is whole, 3 if it is damaged or unfinished.

    Raises:
        InputError: The folder holds no result of Earmark's.
        OutputError: The result cannot be read, or has another schema.
    """
    output = urls.normalise(folder)
    name = public_uri(output)
    with contextlib.suppress(OSError):  # reported below
        check_schema(output)
    try:
        state = read_result(output)
    except OutputError as error:
        if not _has_commits(output):
            raise
        is_unreadable = isinstance(error.__cause__, OSError)
        kind = Kind.UNREADABLE if is_unreadable else Kind.INCOMPLETE
        answer(str(error), kind=kind.value)
        return EXIT_INCOMPLETE
    if not state.is_result:
        raise InputError(
            f"{name} holds no result of Earmark: no {RUN_FILE} and no commits. "
            "Give the folder that was --output."
        )
    findings = list(verify_result(state))
    for finding in findings:
        if finding.kind is not Kind.STRAY or not quiet:
            where = public_uri(finding.name)
            answer(f"{where}: {finding.problem}", kind=finding.kind.value)
    kinds = {finding.kind for finding in findings} - {Kind.STRAY}
    totals = _totals(state)
    counts = _in_words(len(state.commits), totals)
    if kinds:
        is_unfinished = Kind.UNFINISHED in kinds <= {Kind.UNFINISHED, Kind.LEFTOVER}
        word = "unfinished: what is committed is whole," if is_unfinished else "damaged; it holds"
        answer(f"{name} is {word} {counts}.")
        _answer_counts(totals, quiet)
        for advice in make_advice(output, findings):
            answer(advice)
        return EXIT_INCOMPLETE
    if not quiet:
        answer(f"{name} is whole: {counts}.")
    _answer_counts(totals, quiet)
    return EXIT_DONE


def _has_commits(output: str) -> bool:
    try:
        return bool(list_unit_ids(output))
    except OSError:  # a folder that exists must be reported
        return urls.is_local(output) and os.path.lexists(
            urls.local_path(urls.join(output, COMMITS))
        )


def _totals(state: ResultState) -> dict[str, Any]:
    """Return the sums over the commits, named as in ``run.json``."""
    commits = state.commits.values()
    totals = sum((commit.totals for commit in commits), UnitTotals())
    counts = sum((commit.counts for commit in commits), RowCounts())
    return totals_record(totals, counts)


def _in_words(num_units: int, totals: Mapping[str, Any]) -> str:
    return (
        f"{counted(num_units, 'unit')}, {counted(totals['clips'], 'clip')}, "
        f"{counted(totals['windows'], 'window')}, {counted(totals['failures'], 'failure')}"
    )


def _answer_counts(totals: Mapping[str, Any], quiet: bool) -> None:
    if not quiet:
        for line in (*describe_warnings(totals), *describe_errors(totals)):
            answer(line)


def make_advice(output: str, findings: Iterable[Finding]) -> list[str]:
    """Return the advice for findings, in order; each line once, however many findings need it."""
    findings = list(findings)
    kinds = {finding.kind for finding in findings}
    lines = []
    if Kind.UNREADABLE in kinds:
        lines.append(
            "Make readable what cannot be read (permissions, the network, the disk), and verify "
            "again."
        )
    if Kind.FOREIGN in kinds:
        lines.append("Move the foreign files away: tools that read the folder read them too.")
    unit_ids = sorted({finding.unit_id for finding in findings if finding.unit_id})
    if unit_ids:
        lines.append(
            "A run does not see changed content; remove the commits of these units, and it "
            "redoes them:"
        )
        lines += [f"  {_removal(commit_url(output, unit_id))}" for unit_id in unit_ids]
    if kinds & {Kind.INCOMPLETE, Kind.CHANGED, Kind.LEFTOVER, Kind.UNFINISHED}:
        then = "Then run" if lines else "Run"
        lines.append(
            f"{then} the same earmark label command again: it does what is missing, removes what "
            "is left over, and keeps the rest."
        )
    return lines


def _removal(url: str) -> str:
    """Return the command that removes a file, or words where there is no single command."""
    if urls.is_local(url):
        return f"rm {shlex.quote(urls.local_path(url))}"
    return f"remove {public_uri(url)}"


def verify_result(state: ResultState) -> Iterator[Finding]:
    """Yield everything that is wrong with a result, and the files that are not Earmark's."""
    for unit_id, reason in state.damaged.items():
        yield Finding(unit_id, reason)
    for unit_id, reason in state.unreadable.items():
        yield Finding(commit_url(state.output, unit_id), reason, Kind.UNREADABLE)
    for unit_id in sorted(state.superseded):
        yield Finding(
            unit_id, "it has been replaced by another unit, and is still there", Kind.LEFTOVER
        )
    for url in state.orphans:
        yield Finding(url, "no commit vouches for it", Kind.LEFTOVER)
    for folder in sorted({urls.parent(urls.parent(url)) for url in state.old_parts}):
        yield Finding(
            folder,
            "parts of a long file, from an earlier version; the next earmark label removes them "
            "and labels the file if it is not labelled yet",
            Kind.LEFTOVER,
        )
    for url in state.foreign:
        is_read = url.lower().endswith(".parquet")
        yield Finding(url, "Earmark did not write it", Kind.FOREIGN if is_read else Kind.STRAY)
    yield from _check_run(state)
    with ThreadPoolExecutor(8) as threads:
        checked = threads.map(lambda c: check_unit(state.output, c), state.commits.values())
        clip_ids: Counter[str] = Counter()
        for commit, (findings, unit_clips) in zip(state.commits.values(), checked, strict=True):
            yield from findings
            for clip_id in unit_clips:
                clip_ids[clip_id] += 1
                if clip_ids[clip_id] == 2:
                    problem = f"it is there twice, the second time in {commit.unit_id}"
                    yield Finding(clip_id, problem, Kind.CHANGED, commit.unit_id)


def _check_run(state: ResultState) -> Iterator[Finding]:
    url = urls.join(state.output, RUN_FILE)
    if state.run is None:
        yield Finding(url, "it is missing")
        return
    fingerprint = state.run["fingerprint"]
    for unit_id, commit in state.commits.items():
        if commit.fingerprint != fingerprint:
            yield Finding(
                unit_id,
                "it was made with other settings than run.json says",
                Kind.CHANGED,
                unit_id,
            )
    if not state.succeeded:
        yield Finding(
            url,
            f"the last run did not come to its end, or is still on: there is no {SUCCESS_FILE}",
            Kind.UNFINISHED,
        )
        return
    if state.damaged or state.unreadable or state.superseded:
        return  # the sums cannot agree, and the reason has been given
    from_commits = sum((commit.totals for commit in state.commits.values()), UnitTotals())
    written = state.run.get("totals") or {}
    for name in ("items", "clips", "failures", "windows"):
        if written.get(name) != getattr(from_commits, name):
            yield Finding(
                url,
                f"it says {written.get(name)} {name}, and the commits hold "
                f"{getattr(from_commits, name)}",
            )


def check_unit(output: str, commit: Commit) -> tuple[list[Finding], list[str]]:
    """Check one commit against its parts.

    Returns:
        The findings, and the ids of the unit's items (clips and failures).
    """
    findings: list[Finding] = []
    tables: dict[str, pa.Table] = {}
    for part, info in commit.parts.items():
        url = part_url(output, part, commit.unit_id)
        kind, problem = Kind.CHANGED, None
        try:
            problem = _find_change(url, info)
            if problem is None:
                tables[part], problem = _read_checked(output, part, commit, info)
        except pa.ArrowException as error:
            problem = f"it cannot be read: {error}"
        except OSError as error:
            kind, problem = Kind.UNREADABLE, f"it cannot be read: {error.strerror or error}"
        if problem is not None:
            unit_id = commit.unit_id if kind is Kind.CHANGED else None
            findings.append(Finding(url, problem, kind, unit_id))
    if not findings:
        findings += _check_rows(commit, tables)
    return findings, _row_ids(tables)


def _row_ids(tables: dict[str, pa.Table]) -> list[str]:
    """Return the ids of a unit's clips and failed items."""
    parts = (tables[part] for part in ("clips", "errors") if part in tables)
    return [clip_id for table in parts for clip_id in table["clip_id"].to_pylist()]


def _find_change(url: str, info: PartInfo) -> str | None:
    """Return how a part's file differs from what was committed, or None; reads all of it."""
    with reading.open_read(url) as file:
        # BinaryIO does not name readinto, which every buffered file has.
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if digest == info.sha256:
        return None
    return f"its content has changed: sha256 is {digest}, and {info.sha256} was committed"


_COLUMNS = {
    "windows": ["clip_id", "window_index"],
    "clips": ["clip_id", "num_windows", "duration_s", *CLIP_COLUMNS],
    "errors": list(ERROR_COLUMNS),
}


def _read_checked(
    output: str, part: str, commit: Commit, info: PartInfo
) -> tuple[pa.Table, str | None]:
    """Return the columns of a part that are checked further, and what is wrong with the part."""
    columns = list(_COLUMNS[part])
    if part == "clips":
        columns += commit.optional_columns
    table = read_part(output, part, commit.unit_id, columns)
    footer = table.schema.metadata or {}
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        return table, f"it has no column {missing[0]}, and was committed with it"
    if table.num_rows != info.num_rows:
        return table, f"it has {table.num_rows} rows, and {info.num_rows} were committed"
    fingerprint = footer.get(b"earmark.fingerprint", b"").decode()
    if fingerprint != commit.fingerprint:
        return table, f"its footer's fingerprint is {fingerprint!r}, not {commit.fingerprint!r}"
    return table, None


def _miscounted(commit: Commit, tables: dict[str, pa.Table]) -> str | None:
    """Return which of a commit's totals its rows contradict, or None."""
    totals = commit.totals
    num_clips = tables["clips"].num_rows
    num_failures = tables["errors"].num_rows if "errors" in tables else 0
    num_labelled = count_items(tables["clips"]["clip_id"], each_channel=commit.each_channel)
    audio_s = pc.sum(tables["clips"]["duration_s"]).as_py() or 0.0
    for name, found, said in (
        ("clips", num_clips, totals.clips),
        ("failures", num_failures, totals.failures),
        ("items", num_labelled + num_failures, totals.items),
        ("windows", tables["windows"].num_rows, totals.windows),
    ):
        if found != said:
            return f"it has {found} {name}, and its commit says {said}"
    if not math.isclose(audio_s, totals.audio_s, rel_tol=1e-9, abs_tol=1e-6):
        return f"it has {audio_s} s of audio, and its commit says {totals.audio_s}"
    counted = count_rows(tables["clips"], tables.get("errors"))
    if commit.counts not in (counted, RowCounts()):  # an earlier version counted nothing
        return "its labels, warnings or errors are not those that its commit counts"
    return None


def _unlisted(commit: Commit, tables: dict[str, pa.Table]) -> str | None:
    """Return which item has no row, or no entry in the ledger: a run would skip it or redo it."""
    labelled = item_ids(tables["clips"]["clip_id"], each_channel=commit.each_channel)
    failed = tables["errors"]["clip_id"].to_pylist() if "errors" in tables else []
    there = {*labelled.to_pylist(), *failed}
    listed = {entry.clip_id for entry in commit.ledger.items}
    if listed - there:
        return f"its commit lists {min(listed - there)}, which has no row"
    # A container that could not be read to its end has a row beside those of its items.
    if listed and commit.ledger.container is None and there - listed:
        return f"it has a row of {min(there - listed)}, which its commit does not list"
    return None


def _check_rows(commit: Commit, tables: dict[str, pa.Table]) -> Iterator[Finding]:
    if problem := _miscounted(commit, tables) or _unlisted(commit, tables):
        yield Finding(commit.unit_id, problem, Kind.CHANGED, commit.unit_id)
    expected = Counter({row["clip_id"]: row["num_windows"] for row in tables["clips"].to_pylist()})
    counted = Counter(tables["windows"]["clip_id"].to_pylist())
    for clip_id in sorted({*expected, *counted}):
        if expected[clip_id] != counted[clip_id]:
            yield Finding(
                clip_id,
                f"it has {counted[clip_id]} windows in {commit.unit_id}, and its clip says "
                f"{expected[clip_id]}",
                Kind.CHANGED,
                commit.unit_id,
            )
