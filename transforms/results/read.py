"""Read a result as Arrow tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from transforms.errors import OutputError
from transforms.results.commits import PARTS, Commit, open_part, read_commits, read_part
from transforms.storage.secrets import public_uri

BATCH_ROWS = 4096


def read_result(
    output: str, table: str = "clips", columns: Sequence[str] | None = None
) -> pa.Table:
    """Read the committed rows of a result, of all its units.

    Args:
        output: The result's folder, a local path or an fsspec URL.
        table: ``windows``, ``clips`` or ``errors``.
        columns: Names of the columns to read; None reads all.

    Returns:
        The rows in the order of the unit ids. Empty, without columns, if no unit has such rows.

    Raises:
        ValueError: There is no table of that name.
        OutputError: There is no result, a commit cannot be read, or the result has another schema.
    """
    if table not in PARTS:
        raise ValueError(f"table is {table!r}; expected one of {', '.join(PARTS)}")
    commits = read_current_commits(output)
    if not commits:
        raise OutputError(
            f"{public_uri(output)} has no commits; expected the --output of earmark label"
        )
    parts = [
        read_part(output, table, unit_id, columns).replace_schema_metadata(None)
        for unit_id, commit in commits.items()
        if table in commit.parts
    ]
    return pa.concat_tables(parts) if parts else pa.table({})


def read_current_commits(output: str) -> dict[str, Commit]:
    """Read the commits of a result in the order of the unit ids.

    A unit that another replaces is left out: a run was killed before it could remove it.

    Raises:
        OutputError: A commit is damaged or cannot be read.
        OSError: The commits cannot be listed.
    """
    commits, unreadable = read_commits(output)
    replaced = {unit_id for commit in commits.values() for unit_id in commit.replaces}
    missing = sorted(unreadable.keys() - replaced)
    if missing:
        raise OutputError(
            f"{public_uri(output)}: {len(missing)} commits are damaged or cannot be read, the "
            f"first is {missing[0]}.json; run earmark verify"
        ) from unreadable[missing[0]]
    return {unit_id: commits[unit_id] for unit_id in sorted(commits.keys() - replaced)}


def read_batches(
    output: str, table: str, unit_id: str, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Read some columns of a unit's rows, a few thousand rows at a time."""
    with open_part(output, table, unit_id) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False):
            yield pa.Table.from_batches([batch])
