"""Hostile Parquet files: what is readable is labelled, the rest is a row that says why."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.containers import GOOD, audio_table, write
from tests.support.watched_label import Label
from transforms.records import EncodedClip
from transforms.sources import parquet_pages
from transforms.sources.read_unit import SourceSettings, find_inputs, plan_units, read_unit
from transforms.storage import writing


def test_nulls_and_damage_in_parquet_are_rows(label: Label) -> None:
    good = {"bytes": GOOD, "path": None}
    cells = (good, None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}, good)
    whole = write(label.inside / "nulls.parquet", audio_table(*cells))
    (label.inside / "cut.parquet").write_bytes(whole[:-20])
    (label.inside / "half.parquet").write_bytes(whole[: len(whole) // 2])
    (label.inside / "text.parquet").write_text("no Parquet at all")
    (label.inside / "empty.parquet").write_bytes(b"")
    (label.inside / "sealed.parquet").write_bytes(b"PARE" + whole[4:-4] + b"PARE")
    footer = int.from_bytes(whole[-8:-4], "little")
    long_footer = whole[:-8] + (1 << 30).to_bytes(4, "little") + b"PAR1"
    (label.inside / "long_footer.parquet").write_bytes(long_footer)
    # The footer is whole, the bytes it speaks of are not there.
    (label.inside / "hollow.parquet").write_bytes(b"PAR1" + whole[-footer - 8 :])
    (label.inside / "zeros.parquet").write_bytes(
        b"PAR1" + bytes(len(whole) - footer - 12) + whole[-footer - 8 :]
    )
    assert label() == 3
    assert label.labelled() == {"nulls.parquet#row=0", "nulls.parquet#row=4"}
    errors = label.errors()
    for row in (1, 2):
        assert errors.pop(f"nulls.parquet#row={row}") == (
            "ReadError",
            f"row {row} has neither bytes nor a path",
        )
    assert errors.pop("nulls.parquet#row=3")[0] == "EmptyFile"
    assert errors.keys() == {
        *("cut.parquet", "half.parquet", "text.parquet", "empty.parquet", "sealed.parquet"),
        *("long_footer.parquet", "hollow.parquet", "zeros.parquet"),
    }
    for name in ("hollow.parquet", "zeros.parquet"):
        assert "rows 0 to 4 cannot be read" in errors.pop(name)[1]
    assert all("is not a whole Parquet file" in message for _, message in errors.values())


def with_footer(data: bytes, *changes: tuple[bytes, bytes, int], added: bytes = b"") -> bytes:
    """Replace bytes of a Parquet file's footer, each the given number of times."""
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8]
    for old, new, count in changes:
        assert footer.count(old) == count
        footer = footer.replace(old, new)
    footer = footer[:-1] + added + footer[-1:]
    return data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def varint(number: int) -> bytes:
    """Encode a number for Thrift's compact protocol."""
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def test_false_footers_are_reported(label: Label) -> None:
    table = pa.table({"audio": pa.array([GOOD] * 5, pa.binary())})
    whole = write(label.inside / "x.parquet", table, compression="zstd", use_dictionary=False)
    (label.inside / "x.parquet").unlink()

    def rows(number: int) -> tuple[bytes, bytes, int]:
        """Change the number of rows of the file, the row group and the column."""
        return b"\x16" + varint(5 << 1), b"\x16" + varint(number << 1), 3

    def codec(number: int) -> tuple[bytes, bytes, int]:
        return b"\x15" + varint(6 << 1) + b"\x16", b"\x15" + varint(number << 1) + b"\x16", 1

    lies = {
        "billion": (rows(10**9), "its footer declares 1000000000 rows, but the file has"),
        "more": (rows(7), "rows 5 to 6 cannot be read: a row group of 7 rows ends after 5"),
        "fewer": (rows(3), "column audio has 5 values in a row group of 3 rows"),
        "lzo": (codec(3), "LZO"),
        "next_codec": (
            codec(8),
            "rows 0 to 4 cannot be read: column audio has the unknown codec 8",
        ),
        "no_codec": (codec(-1 & 0xFFFF), "column audio has the unknown codec 65535"),
    }
    for name, (change, _) in lies.items():
        (label.inside / f"{name}.parquet").write_bytes(with_footer(whole, change))
    # These are in the file: two million nulls have a few kilobytes.
    write(label.inside / "nulls.parquet", pa.table({"audio": pa.nulls(2_000_000, pa.binary())}))
    write(label.inside / "nowhere.parquet", pa.table({"uri": pa.nulls(2_000_000, pa.string())}))
    words = {name: told for name, (_, told) in lies.items()}
    words["nulls"] = words["nowhere"] = "its footer declares 2000000 rows, but the file has"
    assert label(label.inside, label.inside / "nowhere.parquet") == 3
    assert label.labelled() == {f"more.parquet#row={row}" for row in range(5)}
    errors = label.errors()
    assert errors.keys() == {f"{name}.parquet" for name in words}
    for name, told in words.items():
        assert errors[f"{name}.parquet"][0] == "ContainerError"
        assert told in errors[f"{name}.parquet"][1]


def test_unused_fields_of_a_footer_take_no_memory() -> None:
    """An empty struct in a list takes a byte in the file, but a dict if it is kept."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"audio": [GOOD]}), buffer)
    field = b"\x09" + varint(100 << 1) + b"\xfc" + varint(300_000) + bytes(300_000)
    data = with_footer(buffer.getvalue(), added=field)
    assert pq.ParquetFile(io.BytesIO(data)).metadata.num_rows == 1
    tracemalloc.start()
    try:
        ((chunk,),) = parquet_pages.read_chunks(io.BytesIO(data))
        highest = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert chunk.num_values == 1
    assert highest < 2 * len(data)


def test_a_footer_is_parsed_once_and_again_when_it_changes() -> None:
    streams = []
    for rows in ([GOOD], [GOOD, GOOD]):
        pq.write_table(pa.table({"audio": rows}), stream := io.BytesIO())
        streams.append(stream)
    first, second = map(parquet_pages.read_chunks, streams)
    assert parquet_pages.read_chunks(streams[0]) is first
    assert (first[0][0].num_values, second[0][0].num_values) == (1, 2)


def test_pages_that_expand_beyond_the_bound_are_a_row_and_the_rest_is_read(label: Label) -> None:
    bomb = {"bytes": bytes(32 << 20), "path": None}
    good = {"bytes": GOOD, "path": None}
    writer = pq.ParquetWriter(
        label.inside / "x.parquet", audio_table(good).schema, compression="zstd"
    )
    with writer:
        for cells in ((good, good), (good, bomb), (good,)):
            writer.write_table(audio_table(*cells))
    assert (label.inside / "x.parquet").stat().st_size < 100_000
    assert label(read={"max_page_bytes": 1 << 20}) == 3
    assert label.labelled() == {f"x.parquet#row={row}" for row in (0, 1, 4)}
    ((clip_id, (_, message)),) = label.errors().items()
    assert clip_id == "x.parquet"
    assert "rows 2 to 3 cannot be read: a page, or a column of lists, has 33" in message
    assert "at most 1048576 are allowed; to allow more, raise read.max_page_bytes" in message


def test_a_dictionary_of_large_cells_is_read_a_row_at_a_time(label: Label) -> None:
    """Every row is the same 8 MB: the file has a few kilobytes, its rows 2 GB."""
    cell = GOOD + bytes(8 << 20)
    indices = pa.array(np.zeros(250, np.int32))
    table = pa.table({"audio": pa.DictionaryArray.from_arrays(indices, pa.array([cell]))})
    schema = pa.schema([("audio", pa.binary())])
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30}
    with pq.ParquetWriter(label.inside / "x.parquet", schema, **options) as writer:
        for start in range(0, 250, 50):
            writer.write_table(table.slice(start, 50).cast(schema))
    assert (label.inside / "x.parquet").stat().st_size < 300_000
    settings = SourceSettings()
    units = plan_units((), find_inputs([str(label.inside)]).containers, settings)
    before = pa.total_allocated_bytes()
    highest = number = 0
    for clip in (one for unit in units for one in read_unit(unit, settings)):
        number += 1
        assert isinstance(clip, EncodedClip) and clip.data is not None
        assert len(clip.data) == len(cell)
        highest = max(highest, pa.total_allocated_bytes() - before)
    assert number == 250
    assert highest < 100 << 20


def test_huge_lists_are_not_read(label: Label) -> None:
    """A run of equal values has a few bytes however long it is."""
    table = pa.table({"audio": [GOOD, GOOD], "flags": [[0] * 5_000_000, [1]]})
    write(label.inside / "x.parquet", table, compression="zstd")
    assert label(read={"max_page_bytes": 16 << 20}) == 3
    assert "a column of lists, has" in label.errors()["x.parquet"][1]


def test_columns_of_one_name_are_one_and_segments_share_a_row(label: Label) -> None:
    table = pa.Table.from_arrays(
        [pa.array([GOOD]), pa.array(["x"]), pa.array(["y"])], names=["audio", "note", "note"]
    )
    write(label.inside / "x.parquet", table)
    assert label() == 0
    assert json.loads(label.rows("clips")["x.parquet#row=0"]["metadata"]) == {"note": "x"}
    lines = [{"uri": "x.parquet", "row": 0, "start_s": 0, "end_s": end} for end in (0.1, 0.2)]
    manifest = label.inside / "list.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    segments = dataclasses.replace(label, out=label.top / "segments")
    assert segments(manifest) == 0
    assert segments.labelled() == {f"x.parquet#row=0@0.000-{end}00" for end in (0.1, 0.2)}


def test_paths_in_rows_are_read_as_audio_or_not_at_all(label: Label) -> None:
    """A row without bytes may name any file, but only audio is labelled."""
    (label.inside / "beside.wav").write_bytes(GOOD)
    os.mkfifo(label.inside / "pipe.wav")
    elsewhere = label.top / "elsewhere.wav"
    elsewhere.write_bytes(GOOD)
    text = label.top / "passwd"
    text.write_text("root:x:0:0:secret words\n")
    paths = [
        *("beside.wav", "../elsewhere.wav", str(elsewhere), "../passwd", str(text), "absent.wav"),
        *("pipe.wav", "/dev/zero", "..", "x\0y", "nope://x", "reference://x", "FILE:///x.wav"),
        f"zip://a.wav::{text}",
    ]
    cells = [{"bytes": None, "path": path} for path in paths]
    write(label.inside / "x.parquet", audio_table(*cells))
    assert label(label.inside / "x.parquet") == 0
    assert label.labelled() == {f"x.parquet#row={row}" for row in range(3)}
    errors = label.errors()
    assert errors["x.parquet#row=3"][0] == errors["x.parquet#row=4"][0] == "NotAudio"
    assert "is a pipe, socket or device" in errors["x.parquet#row=6"][1]
    assert "is a pipe, socket or device" in errors["x.parquet#row=7"][1]
    assert "reference://x: cannot be reached: TypeError" in errors["x.parquet#row=11"][1]
    assert "cannot be reached: BadZipFile" in errors["x.parquet#row=13"][1]
    assert len(errors) == 11
    for path in label.out.rglob("*"):
        assert path.is_dir() or b"secret words" not in path.read_bytes()


def test_a_parquet_file_from_elsewhere_names_nothing_here(label: Label) -> None:
    """Someone who can write to a bucket must not learn what is on the machine that labels it."""
    secret = label.outside / "secret.wav"
    here = [
        *(str(secret), f"file://{secret}", f"local://{secret}", "~/secret.wav", "/dev/zero"),
        *(f"simplecache::file://{secret}", f"zip://a.wav::{secret}", f"dir://x::file://{secret}"),
    ]
    bucket = f"memory://{label.top.name}"
    there = ["beside.wav", "../up.wav", f"{bucket}/up.wav"]
    for name in ("in/beside.wav", "up.wav"):
        writing.write_bytes(f"{bucket}/{name}", GOOD)
    buffer = io.BytesIO()
    cells = [{"bytes": None, "path": path} for path in (*here, *there)]
    pq.write_table(audio_table(*cells), buffer)
    writing.write_bytes(f"{bucket}/in/x.parquet", buffer.getvalue())
    assert label(f"{bucket}/in/x.parquet") == 0
    prefix = f"{bucket}/in/x.parquet#row="
    assert label.labelled() == {f"{prefix}{len(here) + row}" for row in range(len(there))}
    assert label.errors() == {
        f"{prefix}{row}": (
            "ReadError",
            f"row {row} has no bytes, and its path {path!r} lies on this machine, where a file "
            "from elsewhere cannot point; copy the Parquet file here to allow it",
        )
        for row, path in enumerate(here)
    }
