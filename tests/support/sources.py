"""Helpers for inputs: putting them into folders, planning and reading them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.support.containers import parquet_bytes
from transforms.records import EncodedClip, Failure, WorkUnit
from transforms.sources.read_unit import (
    Found,
    SourceSettings,
    find_inputs,
    plan_units,
    read_unit,
)
from transforms.storage import urls, writing

SMALL_UNITS = SourceSettings(windows_per_unit=2)


def put(folder: str, name: str, data: bytes | str = b"audio") -> str:
    url = urls.join(folder, name)
    writing.write_bytes(url, data.encode() if isinstance(data, str) else data)
    return url


WEBDATASET = [
    ("d/a.wav", b"A"),
    ("d/a.json", b'{"speaker": 7, "label": "Dog"}'),
    ("d/a.txt", b"a dog barks\n"),
    ("d/b.cls", b"3"),
    ("d/b.wav", b"B"),
    ("d/c.jpg", b"picture"),
    ("d/x.1.wav", b"X1"),
    ("d/x.1.txt", b"of x.1 alone"),
    ("d/x.2.wav", b"X2"),
    ("d/x.2.json", b'{"labels": ["Cat", "Purr"]}'),
    ("d/x.json", b'{"both": true}'),
    ("d/a.wav", b"A again"),
]


def content(clip: EncodedClip) -> bytes:
    if clip.data is not None:
        return clip.data
    path = Path(str(clip.path))
    data = path.read_bytes()
    if clip.delete_path:
        path.unlink()
    return data


def plan(found: Found, units: SourceSettings = SMALL_UNITS, **kwargs: Any) -> list[WorkUnit]:
    return plan_units(found.items, found.containers, units, **kwargs)


def read(units: Iterable[WorkUnit], using: SourceSettings = SMALL_UNITS) -> list[Any]:
    return [one for unit in units for one in read_unit(unit, using)]


def read_all(*inputs: str, units: SourceSettings = SMALL_UNITS) -> list[Any]:
    return read(plan(find_inputs(inputs), units), units)


def as_dict(read_items: Iterable[Any]) -> dict[str, bytes]:
    clips = [one for one in read_items if isinstance(one, EncodedClip)]
    return {clip.item.clip_id: content(clip) for clip in clips}


def failures(read_items: Iterable[Any]) -> list[Failure]:
    return [one for one in read_items if isinstance(one, Failure)]


def described(items: Iterable[Any]) -> dict[str, tuple[Any, Any]]:
    return {
        one.item.clip_id.partition("#")[2]: (
            one.item.truth,
            json.loads(one.item.metadata) if one.item.metadata else None,
        )
        for one in items
    }


def manifest(folder: str, ending: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if ending == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows)
        return put(folder, "list.jsonl", "\ufeff" + text)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if ending == "parquet":
        table = pa.table({name: [row.get(name) for row in rows] for name in columns})
        return put(folder, "list.parquet", parquet_bytes(table, 2))
    buffer = io.StringIO()
    delimiter = "\t" if ending == "tsv" else ","
    writer = csv.DictWriter(buffer, columns, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return put(folder, f"list.{ending}", "\ufeff" + buffer.getvalue())
