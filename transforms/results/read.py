"""Read a result as Arrow tables."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from transforms.errors import OutputError
from transforms.results.commits import read_commits, read_part
from transforms.storage.secrets import public_uri

TABLES = ("windows", "clips", "errors")


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
    if table not in TABLES:
        raise ValueError(f"table is {table!r}; expected one of {', '.join(TABLES)}")
    commits, unreadable = read_commits(output)
    for unit_id, error in unreadable.items():
        raise OutputError(f"the commit of {unit_id} cannot be read: {error}") from error
    if not commits:
        raise OutputError(
            f"{public_uri(output)} has no commits; expected the --output of earmark label"
        )
    wanted = None if columns is None else list(columns)
    parts = [
        read_part(output, table, unit_id, wanted).replace_schema_metadata(None)
        for unit_id, commit in sorted(commits.items())
        if table in commit.parts
    ]
    return pa.concat_tables(parts) if parts else pa.table({})
