"""``earmark plan --segment-s``: a manifest that divides long recordings into segments.

``label MANIFEST`` makes each segment a clip of its own. Lengths come from headers, which a decoder
process reads, and a header may be wrong. So the last segment of a file has no end: it holds
everything that follows. An item whose length is not known stays whole.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.label import RunConfig, given_inputs
from pipeline.exit_codes import EXIT_DONE, EXIT_INCOMPLETE
from pipeline.labelling.headers import MIN_BYTES_PER_S, HeaderReader, fetch_headers
from pipeline.labelling.plan import describe_inputs, find_items, input_options
from pipeline.terminal.std_streams import answer
from pipeline.terminal.wording import counted
from transforms.decoding.settings import DecodeSettings
from transforms.errors import ConfigError, OutputError
from transforms.label_audio import read_items
from transforms.records import EncodedClip, Failure, Item
from transforms.sources.clip_ids import make_clip_id, occurrence_of
from transforms.sources.file_kinds import extension
from transforms.sources.read_unit import (
    Found,
    SourceSettings,
    plan_units,
)
from transforms.storage import filesystem, urls, writing
from transforms.storage.secrets import public_uri

ENDINGS = (".jsonl", ".csv", ".parquet")
MIN_SEGMENT_S = 1.0
MIN_LAST_RATIO = 0.1  # a shorter last segment is merged with the one before

COLUMNS = ("uri", "clip_id", "member", "row", "start_s", "end_s", "labels")
# Names that a manifest's reader takes for something else than metadata.
RESERVED = frozenset({*COLUMNS, "label", "offset", "duration"})


@dataclass(frozen=True)
class Division:
    """The inputs' items, with long ones divided.

    Attributes:
        items: Segments, and items that stay whole, in the order of the inputs.
        unknown: Items whose length is not known, and which therefore stay whole.
        failures: Lines of manifests, and containers, that could not be read.
    """

    items: tuple[Item, ...]
    num_found: int
    num_divided: int
    unknown: tuple[Item, ...]
    failures: tuple[Failure, ...]


def run_segments(config: RunConfig, segment_s: float | None, manifest: str | None) -> int:
    """Write a manifest of segments, and describe it.

    Return 0, or 3 if a part of the inputs could not be read. Raise ``UsageError`` if the command
    is not valid.
    """
    length_s, url = _check_options(segment_s, manifest, config.overwrite)
    options = input_options(config)
    sources, decode = options["sources"], options["decode"]
    output = None if config.output is None else urls.normalise(config.output)
    found = find_items(
        given_inputs(config), config.limit, sources, truth=config.truth, exclude=output
    )
    division = divide_found(found, length_s, sources, decode)
    try:
        writing.write_bytes(url, encode_manifest(division.items, extension(url)))
    except OSError as error:
        raise OutputError(
            f"{public_uri(url)} cannot be written: {error}. Give another --manifest, or "
            "correct its permissions."
        ) from error
    for line in (*describe_inputs(found), *describe_division(division, length_s, url)):
        answer(line)
    return EXIT_INCOMPLETE if division.failures else EXIT_DONE


def _check_options(
    segment_s: float | None, manifest: str | None, overwrite: bool
) -> tuple[float, str]:
    """Return the length of a segment and the URL of the manifest."""
    if segment_s is None or manifest is None:
        given, missing = (
            ("--manifest", "--segment-s SECONDS")
            if segment_s is None
            else ("--segment-s", "--manifest FILE")
        )
        raise ConfigError(f"{given} needs {missing} beside it.")
    if not MIN_SEGMENT_S <= segment_s < math.inf:
        raise ConfigError(f"--segment-s is {segment_s:g}; must be at least {MIN_SEGMENT_S:g}.")
    url = urls.normalise(manifest)
    if extension(url) not in ENDINGS:
        raise ConfigError(f"--manifest is {manifest}; must end in one of {', '.join(ENDINGS)}.")
    if not overwrite and filesystem.exists(url):
        raise OutputError(
            f"{public_uri(url)} exists; give another --manifest, or replace it with --overwrite."
        )
    return segment_s, url


def divide_found(
    found: Found, segment_s: float, sources: SourceSettings, decode: DecodeSettings
) -> Division:
    """Divide the items of the inputs; reads the headers of those that may be longer."""
    items: list[Item] = []
    unknown: list[Item] = []
    failures = list(found.failures)
    num_found = num_divided = 0
    with HeaderReader(decode) as headers:
        for item, length_s in _measured_items(found, segment_s, sources, headers, failures):
            if item.end_s is not None:
                length_s = item.end_s - (item.start_s or 0.0)
            segments = [item] if length_s is None else divide(item, length_s, segment_s)
            items += segments
            num_found += 1
            num_divided += len(segments) > 1
            if length_s is None:
                unknown.append(item)
    return Division(tuple(items), num_found, num_divided, tuple(unknown), tuple(failures))


def divide(item: Item, length_s: float, segment_s: float) -> list[Item]:
    """Divide an item into consecutive segments; the last has the end of the item, known or not.

    Only the last may be shorter or longer than ``segment_s``.
    """
    num_segments = max(1, math.floor(length_s / segment_s + 1 - MIN_LAST_RATIO))
    if num_segments == 1:
        return [item]
    first_s = item.start_s or 0.0
    starts = [first_s + index * segment_s for index in range(num_segments)]
    return [
        dataclasses.replace(
            item, clip_id=_segment_id(item, start_s, end_s), start_s=start_s, end_s=end_s
        )
        for start_s, end_s in zip(starts, [*starts[1:], item.end_s], strict=True)
    ]


def _segment_id(item: Item, start_s: float, end_s: float | None) -> str:
    occurrence = occurrence_of(item)
    place = item.uri, item.member, occurrence, item.row
    if item.clip_id == make_clip_id(*place, item.start_s, item.end_s):
        return make_clip_id(*place, start_s, end_s)
    return f"{item.clip_id}@{start_s:.3f}-" + ("" if end_s is None else f"{end_s:.3f}")


def _measured_items(
    found: Found,
    segment_s: float,
    sources: SourceSettings,
    headers: HeaderReader,
    failures: list[Failure],
) -> Iterator[tuple[Item, float | None]]:
    """Yield each item and its length by the header, None if not known.

    Adds to ``failures`` the containers that cannot be read to their end.
    """
    clips = fetch_headers([item for item in found.items if _needs_header(item, segment_s)])
    for item in found.items:
        is_needed = _needs_header(item, segment_s)
        yield item, headers.read_length_s(next(clips)) if is_needed else 0.0
    for unit in plan_units([], found.containers, sources):
        for clip in read_items(unit, sources):
            if isinstance(clip, EncodedClip):
                yield clip.item, headers.read_length_s(clip)
            elif clip.is_container:
                failures.append(clip)
            else:
                yield clip.item, None


def _needs_header(item: Item, segment_s: float) -> bool:
    """Return whether a file may have to be divided and only its header tells."""
    is_small = item.size is not None and item.size < MIN_BYTES_PER_S * segment_s
    return item.end_s is None and not is_small


def encode_manifest(items: Iterable[Item], ending: str) -> bytes:
    """Encode items as a manifest that gives the same items again, by the ending of its name."""
    rows = [_row_of(item) for item in items]
    if ending == ".jsonl":
        given = ({key: value for key, value in row.items() if value is not None} for row in rows)
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in given).encode()
    columns = dict.fromkeys((*COLUMNS, *(name for row in rows for name in row)))
    if ending == ".csv":
        return _encode_csv(rows, list(columns))
    table = pa.table({name: _column([row.get(name) for row in rows]) for name in columns})
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()


def _row_of(item: Item) -> dict[str, Any]:
    """Return the columns of an item: its place, its labels, and a column for each metadatum."""
    row: dict[str, Any] = {name: getattr(item, name) for name in COLUMNS if name != "labels"}
    row["labels"] = None if item.truth is None else list(item.truth)
    for name, value in _metadata_of(item).items():
        row[f"{name}_" if name in RESERVED else name] = value
    return row


def _metadata_of(item: Item) -> dict[str, Any]:
    with contextlib.suppress(ValueError):  # a table of results that was changed by hand
        metadata = json.loads(item.metadata or "{}")
        if isinstance(metadata, dict):
            return metadata
    return {"metadata": item.metadata}


def _encode_csv(rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _as_text(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode()


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _column(values: Sequence[Any]) -> pa.Array:
    """Return a column of the values' own type; of their text if they have several."""
    with contextlib.suppress(pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return pa.array(values)
    return pa.array([_as_text(value) for value in values])


def describe_division(division: Division, segment_s: float, url: str) -> list[str]:
    """Describe a manifest in a few lines, and say what to do with it."""
    manifest = public_uri(url)
    lines = [
        f"{manifest}: {counted(len(division.items), 'clip')}; {division.num_divided:,} of "
        f"{counted(division.num_found, 'item')} divided into segments of {segment_s:g} s."
    ]
    if division.unknown:
        lines.append(
            f"Kept whole, because no header tells the length: "
            f"{counted(len(division.unknown), 'item')}, such as {division.unknown[0].clip_id}."
        )
    if division.failures:
        first = division.failures[0]
        lines.append(
            f"Could not be read, and not in the manifest: "
            f"{counted(len(division.failures), 'line or container')}, such as "
            f"{first.item.clip_id}: {first.message}"
        )
    return [*lines, f"To label them: earmark label {manifest} --output DIR"]
