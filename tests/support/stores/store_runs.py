"""Whole runs from a store into the store: the inputs, the command, and the rows."""

from __future__ import annotations

import functools
import io
import json
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cli.main import main
from tests.support.audio_factory import encode, noise
from tests.support.containers import parquet_bytes, tar_bytes


class Place(Protocol):
    """A place for files, named below ``url``; all but ``url`` bypasses Earmark's storage."""

    @property
    def url(self) -> str: ...
    def put(self, name: str, data: bytes) -> None: ...
    def get(self, name: str) -> bytes: ...
    def names(self) -> list[str]: ...
    def remove(self, name: str) -> None: ...


def wav(seed: int, seconds: float = 1.0) -> bytes:
    return encode(noise(seconds, seed=seed), 16_000)


@functools.cache
def dataset(num_each: int) -> dict[str, bytes]:
    """Return loose files in folders, a tar with labels, a Parquet file, segments in a manifest."""
    numbers = range(num_each)
    members = [
        (f"member-{number}.{ending}", data)
        for number in numbers
        for ending, data in (("wav", wav(100 + number)), ("json", b'{"label": "dog"}'))
    ]
    audio = [{"bytes": wav(200 + number), "path": f"row-{number}.wav"} for number in numbers]
    segments = [
        {"uri": "elsewhere/long.wav", "start_s": n / 2, "end_s": n / 2 + 0.75, "label": "rain"}
        for n in numbers
    ]
    return {
        **{f"in/deep/a b/loose-{number}.wav": wav(number) for number in numbers},
        "in/notes.txt": b"of another kind",
        "in/rows.parquet": parquet_bytes(
            pa.table({"audio": audio, "label": ["dog"] * num_each}), 2
        ),
        "in/shard.tar": tar_bytes(members),
        "elsewhere/long.wav": wav(300, num_each + 1.0),
        "list.jsonl": "\n".join(map(json.dumps, segments)).encode(),
    }


def fill(place: Place, num_each: int = 2) -> list[str]:
    """Put a data set of ``4 * num_each`` clips into a place; return the arguments that name it."""
    for name, data in dataset(num_each).items():
        place.put(name, data)
    return [f"{place.url}/in", f"{place.url}/list.jsonl"]


def run(command: str, inputs: list[str], output: str, model: Any, *more: str) -> int:
    options = ["--device=cpu", "--precision=fp32", "--batch-size=2"]
    sets = ["--set=units.windows=4", "--set=decode.processes=1"]
    return main([command, *inputs, "-o", output, "-m", str(model), *options, *sets, *more])


def label(inputs: list[str], output: str, model: Any, *more: str) -> int:
    return run("label", inputs, output, model, "--quiet", *more)


def rows_of(place: Place, output: str, part: str, base: str | None = None) -> list[dict[str, Any]]:
    """Return the sorted rows of a part, with names below ``base`` (the place, by default)."""
    rows = [
        row
        for name in place.names()
        if name.startswith(f"{output}/{part}/")
        for row in pq.read_table(io.BytesIO(place.get(name))).to_pylist()
    ]
    for row in rows:
        for name in {"clip_id", "uri"} & row.keys():
            text = row[name].replace(f"{base or place.url}/", "")
            row[name] = text.replace("%2520", " ").replace("%20", " ")
    return sorted(rows, key=lambda row: (row["clip_id"], row.get("window_index", 0)))
