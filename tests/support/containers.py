"""Tars and Parquet files, sound ones and hostile ones."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support import audio_factory

GOOD = audio_factory.encode(audio_factory.noise(0.3), 16_000, "wav")

# --- Tars ----------------------------------------------------------------------------------

Member = tuple[str, bytes]


def tar_bytes(
    members: Iterable[Member], mode: str = "w", format_: int = tarfile.PAX_FORMAT
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format_) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, data: bytes = GOOD, **changes: Any) -> bytes:
    """Make a member of a tar: headers, content, padding."""
    format_ = changes.pop("format", tarfile.PAX_FORMAT)
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(format_, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


END = bytes(1024)


def raw_member(data: bytes = GOOD, **fields: bytes) -> bytes:
    """Make a member with the given fields in its header and a correct checksum."""
    places = {"name": 0, "size": 124, "typeflag": 156}
    header = bytearray(tarfile.TarInfo("raw.wav").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"%011o\0" % len(data)
    for key, value in fields.items():
        header[places[key] : places[key] + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def pax(records: dict[str, str]) -> bytes:
    """Make a pax header for the next member."""
    data = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        data += str(length).encode() + rest
    return raw_member(data, typeflag=b"x")


# --- Parquet files -------------------------------------------------------------------------

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, table: pa.Table, **options: Any) -> bytes:
    pq.write_table(table, path, **options)
    return path.read_bytes()


def audio_table(*cells: Any) -> pa.Table:
    return pa.table({"audio": pa.array(list(cells), STRUCT)})


def parquet_bytes(table: pa.Table, rows_per_group: int = 1000, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows_per_group, **options)
    return buffer.getvalue()
