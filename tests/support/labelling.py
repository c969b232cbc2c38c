"""Label runs with small settings, and the rows that they write."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config.label import RunConfig

PATIENCE_S = 120.0

Row = dict[str, Any]


def small_config(model: Path, output: Path, /, *inputs: Path | str, **changes: Any) -> RunConfig:
    """Return settings for float32 on the CPU with one decoder; two windows a unit and a batch."""
    values: dict[str, Any] = {
        "inputs": tuple(map(str, inputs)),
        "output": str(output),
        "quiet": True,
        "model": {"name": str(model)},
        "inference": {"precision": "fp32", "device": "cpu", "batch_size": 2},
        "units": {"windows": 2},
        "decode": {"processes": 1},
    }
    return RunConfig.model_validate(values | changes)


def read_rows(output: Path, part: str) -> list[Row]:
    """Return the rows of a result's part, sorted by clip and window."""
    rows = [
        row for path in (output / part).glob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    return sorted(rows, key=lambda row: (row["clip_id"], row.get("window_index", 0)))


def rows_by_name(output: Path, part: str) -> dict[tuple[str, int], Row]:
    """Return the rows of a result's part by file name and window."""
    return {
        (Path(row["clip_id"]).name, row.get("window_index", 0)): row
        for row in read_rows(output, part)
    }


def assert_same_rows(
    found: Iterable[Row], expected: Iterable[Row], tolerance: float = 1e-5
) -> None:
    """Compare the facts of rows exactly, and scores and embeddings within a tolerance."""
    found, expected = list(found), list(expected)
    assert [facts(row) for row in found] == [facts(row) for row in expected]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(numbers(mine), numbers(theirs), rtol=0, atol=tolerance)


def facts(row: Row) -> Row:
    """Return a row without what the model computed, but with the labels in their order."""
    labels = [label["name"] for label in row.get("labels", ())]
    return {**row, "embedding": None, "labels": labels}


def numbers(row: Row) -> list[float]:
    """Return a row's embedding and scores."""
    scores = [label["score"] for label in row.get("labels", ())]
    return [*row.get("embedding", ()), *scores]


def check_commits(out: Path) -> int:
    """Check every commit's parts to the last bit; return the number of commits."""
    commits = list((out / "_commits").glob("*.json"))
    for path in commits:
        for part, info in json.loads(path.read_bytes())["parts"].items():
            content = (out / part / f"{path.stem}.parquet").read_bytes()
            assert len(content) == info["num_bytes"]
            assert hashlib.sha256(content).hexdigest() == info["sha256"]
    return len(commits)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, looking every few milliseconds; fail after two minutes."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"waited {PATIENCE_S:g} s in vain for {what}")
        time.sleep(0.01)
