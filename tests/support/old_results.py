"""Results as the first version of the schema had them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq


def make_old(out: Path) -> None:
    """Rewrite a result of today as an earlier version of Earmark would have written it."""
    run = json.loads((out / "run.json").read_text())
    run["schema_version"] = 1
    for name in ("counted_clips", "labels", "warned_clips", "warnings", "errors"):
        del run["totals"][name]
    (out / "run.json").write_text(json.dumps(run))
    for path in (out / "_commits").glob("*.json"):
        commit = json.loads(path.read_text())
        del commit["counts"], commit["optional_columns"]
        for part, info in commit["parts"].items():
            file = out / part / f"{path.stem}.parquet"
            table = pq.read_table(file)
            footer = {**table.schema.metadata, b"earmark.schema_version": b"1"}
            if part == "clips":
                table = table.drop_columns(["warning_kinds"])
            pq.write_table(table.replace_schema_metadata(footer), file)
            info["num_bytes"] = file.stat().st_size
            info["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        path.write_text(json.dumps(commit))
