"""``earmark verify DIR``: is a result whole?

Every commit is checked against its parts: present, of the committed size, hash and row count,
readable to the last page, with the footer of the same fingerprint. Every part belongs to a
commit, every clip occurs once, every window belongs to a clip, and the totals of ``run.json``
are those of the commits. Each finding names the file and the next step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from pipeline.result import RUN_FILE, ResultState, read_result
from transforms import storage
from transforms.errors import InputError
from transforms.ledger import (
    Commit,
    PartInfo,
    UnitTotals,
    file_sha256,
    open_part,
    part_url,
    read_part,
)

EXIT_WHOLE = 0
EXIT_DAMAGED = 3


@dataclass(frozen=True)
class Finding:
    """Something wrong with a result.

    Attributes:
        name: The file or unit.
        problem: What is wrong with it.
    """

    name: str
    problem: str


def run_verify(folder: str, quiet: bool = False) -> int:
    """Check a result and print what is wrong.

    Returns:
        0 if the result is whole, 3 if it is damaged.

    Raises:
        InputError: The folder holds no result of Earmark's.
    """
    output = storage.normalise(folder)
    console = Console(stderr=False, highlight=False, soft_wrap=True)
    state = read_result(output)
    if not state.is_result:
        raise InputError(
            f"{output} holds no result of Earmark: no {RUN_FILE} and no commits. "
            "Give the folder that was --output."
        )
    findings = list(verify_result(state))
    for finding in findings:
        console.print(f"[bold red]damaged[/] {finding.name}: {finding.problem}", markup=True)
    totals = sum((commit.totals for commit in state.commits.values()), UnitTotals())
    if findings:
        console.print(
            f"{len(findings)} problems in {output}. Run the same `earmark label` command again: "
            "it redoes what is damaged and keeps the rest."
        )
        return EXIT_DAMAGED
    if not quiet:
        console.print(
            f"{output} is whole: {len(state.commits)} units, {totals.clips} clips, "
            f"{totals.windows} windows, {totals.failures} failures."
        )
    return EXIT_WHOLE


def verify_result(state: ResultState) -> Iterator[Finding]:
    """Everything that is wrong with a result."""
    for unit_id, reason in state.damaged.items():
        yield Finding(unit_id, reason)
    for unit_id in sorted(state.superseded):
        yield Finding(unit_id, "it has been replaced by another unit, and is still there")
    for url in state.orphans:
        yield Finding(url, "no commit vouches for it")
    for url in state.foreign:
        yield Finding(url, "Earmark did not write it")
    yield from _check_run(state)
    with ThreadPoolExecutor(8) as threads:
        checked = threads.map(lambda c: check_unit(state.output, c), state.commits.values())
        clip_ids: Counter[str] = Counter()
        for commit, (findings, unit_clips) in zip(state.commits.values(), checked, strict=True):
            yield from findings
            for clip_id in unit_clips:
                clip_ids[clip_id] += 1
                if clip_ids[clip_id] == 2:
                    yield Finding(
                        clip_id, f"it is there twice, the second time in {commit.unit_id}"
                    )


def _check_run(state: ResultState) -> Iterator[Finding]:
    url = storage.join(state.output, RUN_FILE)
    if state.run is None:
        yield Finding(url, "it is missing")
        return
    fingerprint = state.run["fingerprint"]
    for unit_id, commit in state.commits.items():
        if commit.fingerprint != fingerprint:
            yield Finding(unit_id, "it was made with other settings than run.json says")
    if not state.succeeded:
        yield Finding(url, "the last run did not come to its end: there is no _SUCCESS")
        return
    if state.damaged or state.superseded:
        return  # the sums cannot agree, and the reason has been given
    counted = sum((commit.totals for commit in state.commits.values()), UnitTotals())
    written = state.run.get("totals") or {}
    for name in ("items", "clips", "failures", "windows"):
        if written.get(name) != getattr(counted, name):
            yield Finding(
                url,
                f"it says {written.get(name)} {name}, and the commits hold "
                f"{getattr(counted, name)}",
            )


def check_unit(output: str, commit: Commit) -> tuple[list[Finding], list[str]]:
    """Check one commit against its parts.

    Returns:
        What is wrong, and the ids of the unit's items (clips and failures).
    """
    findings: list[Finding] = []
    tables: dict[str, pa.Table] = {}
    for part, info in commit.parts.items():
        url = part_url(output, part, commit.unit_id)
        try:
            problem = _check_file(url, info)
            if problem is None:
                tables[part], problem = _read_checked(output, part, commit, info)
        except (OSError, pa.ArrowException) as error:
            problem = f"it cannot be read: {error}"
        if problem is not None:
            findings.append(Finding(url, problem))
    if not findings:
        findings += _check_rows(commit, tables)
    return findings, [
        clip_id
        for part in ("clips", "errors")
        if part in tables
        for clip_id in tables[part]["clip_id"].to_pylist()
    ]


def _check_file(url: str, info: PartInfo) -> str | None:
    with storage.open_read(url) as file:
        digest = file_sha256(file)
    if digest != info.sha256:
        return f"its content has changed: sha256 is {digest}, and {info.sha256} was committed"
    return None


_COLUMNS = {
    "windows": ["clip_id", "window_index"],
    "clips": ["clip_id", "num_windows"],
    "errors": ["clip_id"],
}


def _read_checked(
    output: str, part: str, commit: Commit, info: PartInfo
) -> tuple[pa.Table, str | None]:
    """The columns of a part that are checked further, and what is wrong with the part."""
    table = read_part(output, part, commit.unit_id, _COLUMNS[part])
    with open_part(output, part, commit.unit_id) as file:
        footer = file.schema_arrow.metadata or {}
    if table.num_rows != info.num_rows:
        return table, f"it has {table.num_rows} rows, and {info.num_rows} were committed"
    fingerprint = footer.get(b"earmark.fingerprint", b"").decode()
    if fingerprint != commit.fingerprint:
        return table, f"its footer's fingerprint is {fingerprint!r}, not {commit.fingerprint!r}"
    return table, None


def _check_rows(commit: Commit, tables: dict[str, pa.Table]) -> Iterator[Finding]:
    totals = commit.totals
    num_failures = tables["errors"].num_rows if "errors" in tables else 0
    if (tables["clips"].num_rows, num_failures) != (totals.clips, totals.failures):
        yield Finding(
            commit.unit_id,
            f"it has {tables['clips'].num_rows} clips and {num_failures} failures, and its commit "
            f"says {totals.clips} and {totals.failures}",
        )
    expected = dict(
        zip(
            tables["clips"]["clip_id"].to_pylist(),
            tables["clips"]["num_windows"].to_pylist(),
            strict=True,
        )
    )
    counted = {
        row["values"]: row["counts"]
        for row in pc.value_counts(tables["windows"]["clip_id"]).to_pylist()
    }
    for clip_id in sorted({*expected, *counted}):
        if expected.get(clip_id, 0) != counted.get(clip_id, 0):
            yield Finding(
                clip_id,
                f"it has {counted.get(clip_id, 0)} windows in {commit.unit_id}, and its clip says "
                f"{expected.get(clip_id, 0)}",
            )
