"""Hostile containers, end to end: what is readable is labelled, the rest is a row that says why.

Every run here is watched: nothing is written outside the output and the scratch folder, nothing is
left there, and nothing is opened that the input does not name. ``benchmarks/reliability/
hostile_containers.py`` measures what the large ones take.
"""

from __future__ import annotations

import dataclasses
import gzip
import http.server
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main as cli
from pipeline.config.label import RunConfig
from pipeline.labelling.run import run_label
from pipeline.result.verify import run_verify
from tests.support import audio_factory
from tests.support.paths import ROOT
from transforms.errors import InputError
from transforms.process import temp_folders
from transforms.records import EncodedClip
from transforms.sources import manifests, parquet_pages, tar, tar_headers
from transforms.sources.clip_ids import for_terminal
from transforms.sources.read_unit import SourceSettings, find_inputs, plan_units, read_unit
from transforms.storage import writing as storage_writing

RATE_HZ = 16_000
GOOD = audio_factory.encode(audio_factory.noise(0.3), RATE_HZ, "wav")
SECRET = audio_factory.encode(audio_factory.noise(0.3, seed=7), RATE_HZ, "wav")

# Every file that this process opens while a run is watched; hooks cannot be taken away again.
_opened: list[tuple[str, bool]] = []
_is_watching = threading.Event()


def _note_opening(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _is_watching.is_set() and isinstance(arguments[0], str | bytes):
        writes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        _opened.append((os.fsdecode(arguments[0]), writes))


sys.addaudithook(_note_opening)


def snapshot(folder: Path, leave_out: Iterable[Path] = ()) -> dict[str, tuple[Any, ...]]:
    """Everything below a folder: kind, times and bytes."""
    found = {}
    for name in sorted(folder.rglob("*")):
        if any(name == other or other in name.parents for other in leave_out):
            continue
        status = name.lstat()
        data = name.read_bytes() if name.is_file() and not name.is_symlink() else b""
        found[str(name)] = (status.st_mode, status.st_mtime_ns, data)
    return found


@dataclasses.dataclass
class Label:
    """Labels what a test puts into ``inside``, and watches what else happens.

    Attributes:
        top: Holds everything else.
        inside: The input.
        outside: Holds ``secret.wav``, which is no input; hostile names lead here.
        out: The result.
    """

    top: Path
    inside: Path
    outside: Path
    out: Path
    model: Path

    def config(self, *inputs: Path | str, **changes: Any) -> RunConfig:
        return RunConfig(
            inputs=tuple(map(str, inputs or (self.inside,))),
            output=str(self.out),
            model={"name": str(self.model)},
            inference={"precision": "fp32", "device": "cpu"},
            **{
                "quiet": True,
                "max_failed": 1.0,  # so that 3 means a broken container and nothing else
                "decode": {"processes": 1, "stall_timeout_s": 20.0},
                **changes,
            },
        )

    def __call__(self, *inputs: Path | str, **changes: Any) -> int:
        """The exit code; the result is whole, and nothing else has changed."""
        config = self.config(*inputs, **changes)
        kept = (self.out, self.top / "scratch")
        before = snapshot(self.top, kept)
        _opened.clear()
        _is_watching.set()
        try:
            code = run_label(config, [])
        finally:
            _is_watching.clear()
        assert snapshot(self.top, kept) == before
        assert [path for path in (self.top / "scratch").rglob("*") if path.is_file()] == []
        here = [(path, writes) for path, writes in _opened if path.startswith(f"{self.top}/")]
        assert [path for path, writes in here if writes and not self._may_write(path)] == []
        assert [path for path, _ in here if path.startswith(f"{self.outside}/")] == []
        assert run_verify(str(self.out), quiet=True) == 0
        totals = json.loads((self.out / "run.json").read_text())["totals"]
        assert totals["found_items"] == len(self.rows("clips")) + len(self.rows("errors"))
        return code

    def _may_write(self, path: str) -> bool:
        return path.startswith((f"{self.out}/", f"{self.top}/scratch/"))

    def rows(self, part: str) -> dict[str, dict[str, Any]]:
        """Rows by clip id, without the input's folder."""
        rows = [
            row
            for path in (self.out / part).glob("*.parquet")
            for row in pq.read_table(path).to_pylist()
        ]
        found = {row["clip_id"].removeprefix(f"{self.inside}/"): row for row in rows}
        assert len(found) == len(rows)
        return found

    def labelled(self) -> set[str]:
        return set(self.rows("clips"))

    def errors(self) -> dict[str, tuple[str, str]]:
        """Type and message by clip id."""
        return {
            name: (row["error_type"], row["message"]) for name, row in self.rows("errors").items()
        }


@pytest.fixture
def label(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Label:
    for name in ("inside", "outside", "cwd", "scratch"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "secret.wav").write_bytes(SECRET)
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(temp_folders, "_scratch", temp_folders._Scratch())
    return Label(tmp_path, tmp_path / "inside", tmp_path / "outside", tmp_path / "out", tiny_model)


# --- Tars ----------------------------------------------------------------------------------


def member(name: str, data: bytes = GOOD, **changes: Any) -> bytes:
    """A member as it lies in a tar: headers, content, padding."""
    format_ = changes.pop("format", tarfile.PAX_FORMAT)
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(format_, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


END = bytes(1024)


def raw_member(data: bytes = GOOD, **fields: bytes) -> bytes:
    """A member whose header holds what the fields say, with a right checksum."""
    places = {"name": 0, "size": 124, "typeflag": 156}
    header = bytearray(tarfile.TarInfo("raw.wav").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"%011o\0" % len(data)
    for key, value in fields.items():
        header[places[key] : places[key] + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def pax(records: dict[str, str]) -> bytes:
    """A pax header that speaks of the member behind it."""
    data = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        data += str(length).encode() + rest
    return raw_member(data, typeflag=b"x")


def test_names_that_lead_out_of_a_tar_are_only_names(label: Label) -> None:
    names = [
        *("../../outside/secret.wav", "/etc/x.wav", r"C:\x.wav", "..", "a/../../b.wav"),
        *(f"{label.outside}/secret.wav", "./c.wav", "//d.wav", "~/e.wav", "-o.wav", "--help.wav"),
    ]
    tar = b"".join(member(name) for name in names) + END
    (label.inside / "x.tar").write_bytes(tar)
    (label.inside / "y.tar.gz").write_bytes(gzip.compress(tar))
    assert label() == 0
    audio = [name for name in names if name.endswith(".wav")]
    assert label.labelled() == {f"{tar}#{name}" for tar in ("x.tar", "y.tar.gz") for name in audio}
    assert {row["member"] for row in label.rows("clips").values()} == set(audio)
    assert label.errors() == {}


def test_members_that_are_no_files_are_rows(label: Label) -> None:
    secret = str(label.outside / "secret.wav")
    kinds = {
        "soft.wav": ("symbolic link", {"type": tarfile.SYMTYPE, "linkname": secret}),
        "hard.wav": ("hard link", {"type": tarfile.LNKTYPE, "linkname": secret}),
        "inner.wav": ("hard link", {"type": tarfile.LNKTYPE, "linkname": "good.wav"}),
        "char.wav": ("device", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
        "block.wav": ("device", {"type": tarfile.BLKTYPE, "devmajor": 8}),
        "pipe.wav": ("pipe", {"type": tarfile.FIFOTYPE}),
        "unknown.wav": ("special file", {"type": b"Z"}),
    }
    parts = [member(name, b"", **changes) for name, (_, changes) in kinds.items()]
    tar = member("good.wav") + b"".join(parts) + member("last.wav") + END
    (label.inside / "x.tar").write_bytes(tar)
    assert label() == 0
    assert label.labelled() == {"x.tar#good.wav", "x.tar#last.wav"}
    assert label.errors() == {
        f"x.tar#{name}": ("ReadError", f"the member is a {kind}; only regular files are read")
        for name, (kind, _) in kinds.items()
    }


def test_duplicate_members_are_items_of_their_own(label: Label) -> None:
    parts = [member("a.wav") for _ in range(70)] + [member("a.wav~2"), member("a.wav~3.wav")]
    (label.inside / "x.tar").write_bytes(b"".join(parts) + END)
    assert label() == 0
    again = {f"x.tar#a.wav~{number}" for number in range(2, 71)}
    assert label.labelled() == {"x.tar#a.wav", "x.tar#a.wav~3.wav", *again}


CUTS = {
    "header": -1024 - 300,  # counted from the end of the second member
    "before the data": -1024,
    "data": -700,
    "padding": -1,
    "no end": 0,
    "one end block": 512,
    "half an end block": 300,
}


def test_a_tar_cut_short_gives_what_is_whole_and_a_row(label: Label) -> None:
    data = GOOD[: len(GOOD) // 512 * 512 - 10]  # 10 bytes of padding
    parts = member("0.wav", data), member("1.wav", data)
    end = len(parts[0]) + len(parts[1])
    cuts = {
        name: len(parts[0]) + 300 if name == "header" else end + cut for name, cut in CUTS.items()
    }
    cuts["before the data"] = len(parts[0]) + 512
    for name, at in cuts.items():
        tar = (b"".join(parts) + END)[:at]
        (label.inside / f"{name}.tar").write_bytes(tar)
        (label.inside / f"{name}.tar.gz").write_bytes(gzip.compress(tar))
    assert label() == 3
    whole_members = {name: 2 if at >= end - 10 else 1 for name, at in cuts.items()}
    assert label.labelled() == {
        f"{name}.{ending}#{number}.wav"
        for ending in ("tar", "tar.gz")
        for name, count in whole_members.items()
        for number in range(count)
    }
    # One block of zeros is an end that everybody accepts.
    broken = {
        f"{name}.{ending}"
        for ending in ("tar", "tar.gz")
        for name in cuts
        if name != "one end block"
    }
    assert label.errors().keys() == broken
    for name, (error_type, message) in label.errors().items():
        assert error_type == "ContainerError", name
        assert "ends at byte" in message, name


def test_a_gzip_that_breaks_off_or_is_damaged_gives_what_comes_before(label: Label) -> None:
    noisy = np.random.default_rng(0).bytes(200_000)  # more than what gzip holds back
    tar = member("0.wav") + member("noise.bin", noisy) + member("1.wav") + END
    packed = gzip.compress(tar)
    (label.inside / "cut.tar.gz").write_bytes(packed[:-5000])
    (label.inside / "no_trailer.tar.gz").write_bytes(packed[:-4])
    damaged = bytearray(packed)
    damaged[-4000] ^= 0xFF
    (label.inside / "damaged.tar.gz").write_bytes(damaged)
    (label.inside / "tail.tar.gz").write_bytes(packed + b"no gzip")
    (label.inside / "two.tar.gz").write_bytes(packed + gzip.compress(member("2.wav") + END))
    assert label() == 3
    errors = label.errors()
    assert {"cut.tar.gz", "no_trailer.tar.gz", "damaged.tar.gz", "tail.tar.gz"} == set(errors)
    for name in (*errors, "two.tar.gz"):
        assert f"{name}#0.wav" in label.labelled()
    assert {"two.tar.gz#1.wav", "two.tar.gz#2.wav", "no_trailer.tar.gz#1.wav"} <= label.labelled()
    assert "cut.tar.gz#1.wav" not in label.labelled()


LONG = "x" * 1_000_000 + ".wav"


def test_headers_that_lie_cost_what_they_speak_of(label: Label) -> None:
    first, last = member("first.wav"), member("last.wav")
    sparse = raw_member(GOOD, typeflag=b"S", name=b"sparse.wav")
    lies = {
        "pax_size": pax({"size": str(10**15)}) + raw_member(),
        "pax_small": pax({"size": "0"}) + raw_member(b""),
        "pax_digits": pax({"size": "²"}) + raw_member(),
        "pax_negative": pax({"size": "-1"}) + raw_member(),
        "octal_size": raw_member(size=b"77777777777\0"),
        "base256_huge": raw_member(size=b"\x80" + b"\x7f" * 11),
        "base256_negative": raw_member(size=b"\xff" * 12),
        "no_digits": raw_member(size=b"not a number"),
        "pax_length": raw_member(b"99 path=x\n", typeflag=b"x") + raw_member(),
        "pax_text": raw_member(b"no record at all", typeflag=b"x") + raw_member(),
        "long_header": raw_member(bytes(2 << 20), typeflag=b"L") + raw_member(),
        "name_and_no_member": pax({"path": "b.wav"}) + END,
    }
    for name, lie in lies.items():
        (label.inside / f"{name}.tar").write_bytes(first + lie + last + END)
    fine = {"sparse": sparse, "long_name": pax({"path": LONG}) + raw_member()}
    fine["long_gnu"] = raw_member(b"y" * 900_000 + b".wav\0", typeflag=b"L") + raw_member()
    for name, lie in fine.items():
        (label.inside / f"{name}.tar").write_bytes(first + lie + last + END)
    joined = first + END + last + END
    (label.inside / "joined.tar").write_bytes(joined)
    assert label() == 3
    errors = label.errors()
    for name in lies:
        assert f"{name}.tar#first.wav" in label.labelled(), name
    # A member of no bytes is a member all the same.
    assert errors["pax_small.tar#raw.wav"][0] == "EmptyFile"
    broken = {name.removesuffix(".tar") for name in errors if name.endswith(".tar")}
    assert broken == lies.keys() - {"pax_small"}
    for name in (*fine, "joined"):
        assert {f"{name}.tar#first.wav", f"{name}.tar#last.wav"} <= label.labelled(), name
    assert errors["sparse.tar#sparse.wav"][1].startswith("the member is a sparse file")
    long = {name: told for name, told in errors.items() if name.startswith("long_")}
    assert "has 2097152 bytes; at most 1048576 are read" in long.pop("long_header.tar")[1]
    assert len(long) == 2
    for name, (_, message) in long.items():
        assert len(name) < 200
        assert message.startswith("the member's name has more than 4096 characters")
    assert label.rows("errors") and all(
        len(row["uri"]) < 300 for row in label.rows("errors").values()
    )


def test_a_pax_header_of_many_records_takes_no_time(label: Label) -> None:
    many = pax({f"SCHILY.xattr.{number}": "x" for number in range(43_000)})
    assert 900_000 < len(many) < 1 << 20
    (label.inside / "x.tar").write_bytes((many + member("a.wav")) * 5 + END)
    assert label() == 0
    assert len(label.labelled()) == 5


# --- Bombs ---------------------------------------------------------------------------------


def zeros_gz(prefix: bytes, name: str, num_bytes: int, suffix: bytes) -> bytes:
    """A compressed tar with a member of zeros; the content is never held as a whole."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as packed:
        info = tarfile.TarInfo(name)
        info.size = num_bytes
        packed.write(prefix + info.tobuf(tarfile.PAX_FORMAT))
        for start in range(0, num_bytes, 1 << 20):
            packed.write(bytes(min(1 << 20, num_bytes - start)))
        packed.write(bytes(-num_bytes % 512) + suffix)
    return buffer.getvalue()


def test_an_item_beyond_the_bound_is_never_unpacked(
    label: Label, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = 80 << 20  # more than what is kept in memory
    packed = zeros_gz(member("a.wav"), "bomb.wav", num_bytes, member("b.wav") + END)
    (label.inside / "x.tar.gz").write_bytes(packed)
    (label.inside / "x.tar").write_bytes(gzip.decompress(packed))
    spooled: list[str] = []
    monkeypatch.setattr(tar, "_spool", lambda *args: spooled.append(str(args)))
    assert label(decode={"processes": 1, "max_item_bytes": 1 << 20}) == 0
    endings = ("tar", "tar.gz")
    assert label.labelled() == {f"x.{ending}#{n}.wav" for ending in endings for n in "ab"}
    assert label.errors() == {
        f"x.{ending}#bomb.wav": (
            "ItemTooLarge",
            f"the item has {num_bytes} bytes; at most 1048576 are allowed; to allow more, raise "
            "decode.max_item_bytes",
        )
        for ending in endings
    }
    assert spooled == []


def test_a_gzip_bomb_ends_at_the_bound(label: Label, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_headers, "_MIN_EXPANDED_BYTES", 4 << 20)
    names = ("bomb.bin", "a.json", "bomb.wav")
    for name in names:
        packed = zeros_gz(member("a.wav"), name, 100 << 20, member("b.wav") + END)
        (label.inside / f"{name}.tar.gz").write_bytes(packed)
    assert label() == 3
    assert label.labelled() == {f"{name}.tar.gz#a.wav" for name in names}
    errors = label.errors()
    assert errors.keys() == {f"{name}.tar.gz" for name in names}
    for error_type, message in errors.values():
        assert error_type == "ContainerError"
        assert message.endswith(
            "at most 200 per byte are allowed; to allow more, raise read.max_expansion"
        )
    # Whoever knows better says so.
    shutil.rmtree(label.out)
    assert label(read={"max_expansion": 2000.0}) == 0
    assert {f"{name}.tar.gz#{n}.wav" for name in names for n in "ab"} <= label.labelled()


def test_siblings_without_end_are_told_by_their_size(label: Label) -> None:
    huge = b"[" + b"{}," * (3 << 20) + b"{}]"
    many = b"".join(member(f"m.{number}.txt", b"x") for number in range(1500))
    tar = member("a.json", huge) + member("a.wav") + many + member("m.wav")
    tar += member("inner.tar.gz", gzip.compress(member("hidden.wav") + END)) + member("z.wav") + END
    (label.inside / "x.tar").write_bytes(tar)
    assert label() == 0
    clips = label.rows("clips")
    assert clips.keys() == {"x.tar#a.wav", "x.tar#m.wav", "x.tar#z.wav"}
    assert json.loads(clips["x.tar#a.wav"]["metadata"]) == {"json": f"<{len(huge)} bytes>"}
    assert len(json.loads(clips["x.tar#m.wav"]["metadata"])) == 1000


# --- Parquet -------------------------------------------------------------------------------

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, table: pa.Table, **options: Any) -> bytes:
    pq.write_table(table, path, **options)
    return path.read_bytes()


def audio_table(*cells: Any) -> pa.Table:
    return pa.table({"audio": pa.array(list(cells), STRUCT)})


def test_parquet_of_wrong_types_is_refused_or_left_aside(label: Label) -> None:
    columns: dict[str, pa.Array] = {
        "ints": pa.array([1]),
        "lists": pa.array([[1, 2]]),
        "struct": pa.array([{"samples": [0.5], "rate": 1}]),
        "text": pa.array(["a.wav"]),
        "null": pa.nulls(1),
    }
    for name, column in columns.items():
        write(label.inside / f"{name}.parquet", pa.table({"audio": column}))
        with pytest.raises(InputError, match=r"has neither an audio column .* nor one that names"):
            label(label.inside / f"{name}.parquet")
        assert not label.out.exists()
    (label.inside / "good.wav").write_bytes(GOOD)
    assert label() == 0
    assert label.labelled() == {"good.wav"}
    # A text column with paths is audio by its manifest's names alone.
    write(label.inside / "list.parquet", pa.table({"uri": ["good.wav"], "x": [1]}))
    assert label(label.inside / "list.parquet") == 0


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
    """A Parquet file with some bytes of its footer replaced, each as often as is said."""
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8]
    for old, new, count in changes:
        assert footer.count(old) == count
        footer = footer.replace(old, new)
    footer = footer[:-1] + added + footer[-1:]
    return data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def varint(number: int) -> bytes:
    """As Thrift's compact protocol writes it."""
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def test_footers_that_lie_are_told(label: Label) -> None:
    table = pa.table({"audio": pa.array([GOOD] * 5, pa.binary())})
    whole = write(label.inside / "x.parquet", table, compression="zstd", use_dictionary=False)
    (label.inside / "x.parquet").unlink()

    def rows(number: int) -> tuple[bytes, bytes, int]:
        """The file's, the row group's and the column's number, all three."""
        return b"\x16" + varint(5 << 1), b"\x16" + varint(number << 1), 3

    def codec(number: int) -> tuple[bytes, bytes, int]:
        return b"\x15" + varint(6 << 1) + b"\x16", b"\x15" + varint(number << 1) + b"\x16", 1

    lies = {
        "billion": (rows(10**9), "is said to hold 1000000000 rows, and has"),
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
    words["nulls"] = words["nowhere"] = "is said to hold 2000000 rows, and has"
    assert label(label.inside, label.inside / "nowhere.parquet") == 3
    assert label.labelled() == {f"more.parquet#row={row}" for row in range(5)}
    errors = label.errors()
    assert errors.keys() == {f"{name}.parquet" for name in words}
    for name, told in words.items():
        assert errors[f"{name}.parquet"][0] == "ContainerError"
        assert told in errors[f"{name}.parquet"][1]


def test_what_a_footer_holds_besides_takes_no_memory() -> None:
    """A list of empty structs: a byte each in the file, a dict each where they are kept."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"audio": [GOOD]}), buffer)
    field = b"\x09" + varint(100 << 1) + b"\xfc" + varint(300_000) + bytes(300_000)
    data = with_footer(buffer.getvalue(), added=field)
    assert pq.ParquetFile(io.BytesIO(data)).metadata.num_rows == 1
    tracemalloc.start()
    try:
        (group,) = parquet_pages.read_footer(io.BytesIO(data))
        highest = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (group.num_rows, [chunk.name for chunk in group.chunks]) == (1, ["audio"])
    assert highest < 2 * len(data)


def test_a_footer_is_parsed_once_and_again_when_it_changes() -> None:
    streams = []
    for rows in ([GOOD], [GOOD, GOOD]):
        pq.write_table(pa.table({"audio": rows}), stream := io.BytesIO())
        streams.append(stream)
    first, second = map(parquet_pages.read_footer, streams)
    assert parquet_pages.read_footer(streams[0]) is first
    assert (first[0].num_rows, second[0].num_rows) == (1, 2)


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


def test_lists_without_end_are_not_read(label: Label) -> None:
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
    """A row without bytes names a file, anywhere, as the layout has it; only audio comes of it."""
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
    """Who can write a file in a bucket must not learn what lies where it is labelled."""
    secret = label.outside / "secret.wav"
    here = [
        *(str(secret), f"file://{secret}", f"local://{secret}", "~/secret.wav", "/dev/zero"),
        *(f"simplecache::file://{secret}", f"zip://a.wav::{secret}", f"dir://x::file://{secret}"),
    ]
    bucket = f"memory://{label.top.name}"
    there = ["beside.wav", "../up.wav", f"{bucket}/up.wav"]
    for name in ("in/beside.wav", "up.wav"):
        storage_writing.write_bytes(f"{bucket}/{name}", GOOD)
    buffer = io.BytesIO()
    cells = [{"bytes": None, "path": path} for path in (*here, *there)]
    pq.write_table(audio_table(*cells), buffer)
    storage_writing.write_bytes(f"{bucket}/in/x.parquet", buffer.getvalue())
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


# --- Playlists -----------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The URL of a WAV on this machine, and what was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(SECRET)))
            self.end_headers()
            self.wfile.write(SECRET)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listener.server_port}/secret.wav", asked
        listener.shutdown()
        thread.join()


def playlists(target: str) -> dict[str, str]:
    """Files that make players open other files."""
    segment = '<SegmentBase indexRange="0-9"/>'
    port = target.rpartition(":")[2].partition("/")[0] if target.startswith("http") else "9"
    return {
        "hls": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n"
        "#EXT-X-ENDLIST\n",
        "hls_key": f'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n'
        f"#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "m3u": f"#EXTM3U\n#EXTINF:1,a\n{target}\n",
        "ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
        "concat": f"concat:{target}|{target}",
        "subfile": f"subfile,,start,0,end,0,,:{target}",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m=audio {port} RTP/AVP 0\na=control:{target}\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="audio/mp4">'
        f'<Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL>{segment}'
        "</Representation></AdaptationSet></Period></MPD>",
        "asx": f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
        "pls": f"[playlist]\nFile1={target}\nNumberOfEntries=1\n",
        "reference": f"[Reference]\nRef1={target}\n",
        "xspf": f'<playlist version="1"><trackList><track><location>{target}</location></track>'
        "</trackList></playlist>",
    }


def put_playlists(label: Label, url: str) -> int:
    targets = {"file": str(label.outside / "secret.wav"), "relative": "secret.wav", "http": url}
    targets["file_url"] = f"file://{label.outside}/secret.wav"
    (label.top / "cwd" / "secret.wav").write_bytes(SECRET)
    texts = {f"{a}-{b}": t for a, url in targets.items() for b, t in playlists(url).items()}
    for number, (name, text) in enumerate(texts.items()):
        ending = ("wav", "mp3", "m4a", "ogg")[number % 4]
        (label.inside / f"{name}.{ending}").write_text(text)
    (label.inside / "x.tar").write_bytes(
        b"".join(member(f"{name}.wav", text.encode()) for name, text in texts.items()) + END
    )
    return 2 * len(texts)


def test_what_a_playlist_names_is_never_opened(label: Label, server: tuple[str, list[str]]) -> None:
    url, asked = server
    num_files = put_playlists(label, url)
    assert label() == 0
    assert label.labelled() == set()
    assert len(label.errors()) == num_files
    assert asked == []


# Those with a question mark are not on every machine.
SYSTEM_CALLS = "?open,?creat,openat,?openat2,connect,?unlink,unlinkat,?rename,?renameat,renameat2"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace sees what libraries open")
def test_decoders_open_nothing_but_their_input(
    label: Label, server: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, asked = server
    put_playlists(label, url)
    (label.inside / "good.mp3").write_bytes(
        audio_factory.encode(audio_factory.noise(0.5), RATE_HZ, "mp3")
    )
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-s", "4096", "-e", f"trace={SYSTEM_CALLS}"]
    command += ["-o", str(trace), sys.executable, "-m", "pipeline", "label", str(label.inside)]
    command += ["-o", str(label.out), "-m", str(label.model), "--device", "cpu", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "scratch")}
    kept = (label.out, trace, tmp_path / "scratch")
    before = snapshot(tmp_path, kept)
    done = subprocess.run(
        command, env=environment, cwd=tmp_path / "cwd", capture_output=True, text=True, check=False
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not look here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 3, done.stderr
    assert snapshot(tmp_path, kept) == before
    assert list((tmp_path / "scratch").glob("earmark*")) == []  # torch leaves an empty folder
    calls = trace.read_text(errors="replace")
    assert "good.mp3" in calls
    assert "secret.wav" not in calls
    assert f"htons({url.rpartition(':')[2].partition('/')[0]})" not in calls
    assert asked == []
    writing = [
        line
        for line in calls.splitlines()
        if ("O_WRONLY" in line or "O_RDWR" in line or "O_CREAT" in line) and "= -1" not in line
        if f'"{tmp_path}/' in line
    ]
    allowed = (f'"{label.out}/', f'"{tmp_path}/scratch/')
    assert [line for line in writing if not any(place in line for place in allowed)] == []
    assert label.labelled() == {"good.mp3"}


# --- Manifests -----------------------------------------------------------------------------


def test_bad_lines_cost_themselves(label: Label) -> None:
    (label.inside / "good.wav").write_bytes(GOOD)
    good = json.dumps({"uri": "good.wav", "clip_id": "the good one"}).encode()
    lines = [
        b"{oops",
        b'{"uri": "good.wav\xe9"}',  # latin-1
        b'{"uri": "a\x00b.wav"}',
        b'{"uri": "a\\u0000b.wav"}',
        b"[" * 100_000,
        b'{"uri": "x.wav", "n": ' + b"9" * 10_000 + b"}",
        b'{"uri": "x.wav", "start_s": 1e999}',
        b'{"uri": "x.wav", "start_s": 1e300}',
        b'{"uri": "x.wav", "row": 1e300}',
        b'{"uri": "x.parquet", "row": 99999999999999999999}',
        b'{"uri": "' + b"y" * 40_000 + b'.wav"}',
        b'{"uri": "good.wav", "clip_id": "' + b"z" * 40_000 + b'"}',
        b'{"uri": {"a": "' + b"w" * 40_000 + b'"}}',
        b'{"uri": "x.wav", "blob": "' + bytes(b"v" * (17 << 20)) + b'"}',
        good,
        b'{"uri": "good.wav", "uri": "absent.wav", "score": NaN, "most": Infinity}',
        b'{"uri": "FILE:///x.wav"}',
        b'{"uri": "reference://x"}',
    ]
    manifest = label.inside / "list.jsonl"
    manifest.write_bytes(b"\r\n".join(lines))
    assert label(manifest) == 0
    assert label.labelled() == {"the good one"}
    errors = label.errors()
    assert errors.keys() == {
        *(f"list.jsonl#line={number}" for number in (1, 3, 4, *range(5, 15), 17)),
        *("good.wav%E9", "absent.wav", "reference://x"),
    }
    assert all(len(message) < 1000 for _, message in errors.values())
    assert "is longer than 16777216 characters" in errors["list.jsonl#line=14"][1]
    assert "of 40004 characters; at most 32768 are read" in errors["list.jsonl#line=11"][1]
    metadata = label.rows("errors")["absent.wav"]["metadata"]
    assert json.loads(metadata) == {"score": None, "most": None}


def test_csv_that_lies_costs_its_lines(label: Label) -> None:
    for name in ("a.wav", "b.wav", "c.wav", "new\nline.wav", 'qu"ote.wav'):
        (label.inside / name).write_bytes(GOOD)
    text = '\ufeffuri,note\r\na.wav,fine\r\n"new\nline.wav","two\r\nlines"\r\n"qu""ote.wav",x\r\n'
    text += "c.wav," + "n" * (17 << 20) + "\r\n"
    text += 'c.wav,nul\0byte\r\na.wav,x,y\r\n"b.wav,never closed\r\nb.wav,x\r\n'
    manifest = label.inside / "list.csv"
    manifest.write_bytes(text.encode())
    assert label(manifest) == 0
    assert label.labelled() == {"a.wav", "c.wav", 'qu"ote.wav', "new\nline.wav", "b.wav"}
    told = {name: message.partition(" of ")[2] for name, (_, message) in label.errors().items()}
    expected = {
        7: "is longer than 16777216 characters",
        9: "has 3 fields, the header 2; quote the commas",
        10: "is not CSV: a quote is not closed, or not within 1000 lines",
    }
    assert told == {f"list.csv#line={n}": f"{manifest} {words}" for n, words in expected.items()}


def test_a_quote_that_is_never_closed_costs_one_line(label: Label) -> None:
    for number in range(3):
        (label.inside / f"{number}.wav").write_bytes(GOOD)
    lines = ["uri,note", "0.wav,x", '"1.wav,x', *(f"{n % 3}.wav,x" for n in range(5000))]
    manifest = label.inside / "list.csv"
    manifest.write_text("\n".join(lines))
    assert label(manifest) == 0
    assert label.labelled() == {"0.wav", "1.wav", "2.wav"}
    assert label.errors().keys() == {"list.csv#line=3"}


def test_a_record_of_many_long_lines_is_bounded(
    label: Label, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its fields and lines is below the bound, all of them together are not."""
    monkeypatch.setattr(manifests, "_MAX_LINE_CHARS", 1 << 16)
    for name in ("a.wav", "b.wav"):
        (label.inside / name).write_bytes(GOOD)
    lines = ["uri,x,y", "a.wav,x,y", f'a.wav,"{"x" * 40_000}', f'","{"y" * 40_000}', '"', "b.wav,,"]
    manifest = label.inside / "list.csv"
    manifest.write_text("\n".join(lines))
    assert label(manifest) == 0
    assert label.labelled() == {"a.wav", "b.wav"}
    message = label.errors()["list.csv#line=3"][1]
    assert message.endswith("is not CSV: a record of more than 65536 characters")


def test_a_quote_that_is_never_closed_in_a_tsv_costs_one_line(label: Label) -> None:
    for number in range(3):
        (label.inside / f"{number}.wav").write_bytes(GOOD)
    manifest = label.inside / "list.tsv"
    manifest.write_text('uri\tnote\n0.wav\t"closed\nhere"\n1.wav\t"never\n2.wav\tx\n')
    assert label(manifest) == 0
    assert label.labelled() == {"0.wav", "2.wav"}
    assert label.errors().keys() == {"list.tsv#line=4"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"), [("l.jsonl", '{"uri": "good.wav"}\n'), ("l.csv", "uri\ngood.wav\n")]
)
def test_a_manifest_in_utf16_is_refused_with_the_way_out(
    label: Label, name: str, text: str, encoding: str
) -> None:
    (label.inside / name).write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match="is not UTF-8 but probably UTF-16; convert it: iconv"):
        label(label.inside / name)
    assert not label.out.exists()


def test_a_manifest_cut_short_gives_its_rows_and_a_row_for_the_rest(label: Label) -> None:
    (label.inside / "good.wav").write_bytes(GOOD)
    table = pa.table({"uri": ["good.wav", "absent.wav"], "note": ["x" * 100, "y" * 100]})
    options: dict[str, Any] = {"row_group_size": 1, "use_dictionary": False, "compression": "none"}
    data = bytearray(write(label.inside / "list.parquet", table, **options))
    page = pq.ParquetFile(label.inside / "list.parquet").metadata.row_group(1).column(0)
    data[page.data_page_offset : page.data_page_offset + 10] = b"\xff" * 10
    (label.inside / "list.parquet").write_bytes(data)
    (label.inside / "cut.jsonl").write_text('{"uri": "good.wav", "clip_id": "mine"}\n{"uri": "go')
    assert label(label.inside / "list.parquet", label.inside / "cut.jsonl") == 3
    assert label.labelled() == {"good.wav", "mine"}
    assert "cannot be read past row 1" in label.errors()["list.parquet"][1]
    assert "line 2 of" in label.errors()["cut.jsonl#line=2"][1]


# --- Folders -------------------------------------------------------------------------------


def test_loops_links_pipes_and_sockets_in_folders(label: Label) -> None:
    inside = label.inside
    (inside / "sub").mkdir()
    (inside / "sub" / "good.wav").write_bytes(GOOD)
    (inside / "sub" / "up").symlink_to("..")
    (inside / "sub" / "here").symlink_to(".")
    (inside / "self.wav").symlink_to("self.wav")
    (inside / "ping.wav").symlink_to("pong.wav")
    (inside / "pong.wav").symlink_to("ping.wav")
    (inside / "gone.wav").symlink_to("nothing.wav")
    # Links are followed, out of the folder as well: whoever laid them meant what they lead to.
    linked = label.top / "linked"
    linked.mkdir()
    (linked / "far.wav").write_bytes(GOOD)
    (inside / "away").symlink_to(linked)
    (inside / "file.wav").symlink_to(linked / "far.wav")
    (inside / "zero.wav").symlink_to("/dev/zero")
    os.mkfifo(inside / "pipe.wav")
    os.mkfifo(inside / "pipe.tar")
    os.mkfifo(inside / "pipe.parquet")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(inside / "socket.wav"))
        assert label() == 3  # a tar or Parquet file may hold anything
    assert label.labelled() == {"sub/good.wav", "away/far.wav", "file.wav"}
    errors = label.errors()
    assert {"self.wav", "ping.wav", "pong.wav", "gone.wav"} <= errors.keys()
    assert "no such file" in errors["gone.wav"][1]
    for name in ("pipe.wav", "pipe.tar", "pipe.parquet", "socket.wav", "zero.wav"):
        assert "is a pipe, socket or device, a file was expected" in errors[name][1]


@pytest.mark.parametrize("pattern", ["", "/*", "/**"])
def test_pipes_are_found_by_their_names_as_files_are(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "good.wav").write_bytes(GOOD)
    os.mkfifo(tmp_path / "pipe.wav")
    os.mkfifo(tmp_path / "pipe.control")
    found = find_inputs([f"{tmp_path}{pattern}"])
    names = [str(tmp_path / "good.wav"), str(tmp_path / "pipe.wav")]
    assert [item.uri for item in found.items] == names
    assert found.skipped_by_extension == {".control": 1}


@pytest.mark.parametrize("name", ["pipe.wav", "pipe.tar", "pipe.parquet", "pipe.jsonl", "pipe.csv"])
def test_a_pipe_that_is_named_does_not_hang(label: Label, name: str) -> None:
    os.mkfifo(label.inside / name)
    try:
        code = label(label.inside / name)
    except InputError as error:
        assert "is a pipe, socket or device" in str(error) or "holds no rows" in str(error)
    else:
        ((_, message),) = label.errors().values()
        assert "pipe, socket or device" in message
        assert code == (0 if name.endswith(".wav") else 3)


# --- Names ---------------------------------------------------------------------------------

NAMES = [
    "with space.wav",
    "quote'.wav",
    'double".wav',
    "back\\slash.wav",
    "ha#sh.wav",
    "#.wav",
    "a#row=1.wav",
    "at@1.000-2.000.wav",
    "100%.wav",
    "%23.wav",
    "%25.wav",
    "a.wav~2.wav",
    "🎵 é ñ 日本.wav",
    "e\u0301.wav",
    "new\nline.wav",
    "carriage\rreturn.wav",
    "tab\t.wav",
    "bell\x07 esc\x1b[31m.wav",
    "right\u202eto left.wav",
    "--help.wav",
    "-.wav",
    "star*.wav",
    "quest?ion.wav",
    "[bracket].wav",
    "$(touch pwned).wav",
    "`touch pwned`.wav",
    ";touch pwned;.wav",
    "| touch pwned.wav",
    "{json}.wav",
    ",comma.wav",
    " lead.wav",
    ".hidden.wav",
    "x" * 251 + ".wav",
    "☃" * 83 + ".wav",
    os.fsdecode(b"latin-\xe9.wav"),
    os.fsdecode(b"\xff\xfe\x80.wav"),
]


def expected_id(name: str) -> str:
    """As the documentation says: ``%``, ``#`` and ``@`` encoded, and bytes that are not UTF-8."""
    name = name.replace("%", "%25").replace("#", "%23").replace("@", "%40")
    return "".join(
        f"%{ord(char) - 0xDC00:02X}" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in name
    )


def original(clip_id: str) -> bytes:
    """The name that a clip id stands for: percent-encoding undone."""
    return unquote_to_bytes(clip_id)


def test_files_of_all_names_come_back_exactly(label: Label) -> None:
    for name in NAMES:
        (label.inside / name).write_bytes(GOOD)
    assert label() == 0
    assert label.errors() == {}
    assert label.labelled() == {expected_id(name) for name in NAMES}
    assert {original(clip_id) for clip_id in label.labelled()} == {
        os.fsencode(name) for name in NAMES
    }
    told = {row["uri"].removeprefix(f"{label.inside}/") for row in label.rows("clips").values()}
    assert told == {
        expected_id(name).replace("%25", "%").replace("%23", "#").replace("%40", "@")
        if "\udcff" in name or "\udce9" in name
        else name
        for name in NAMES
    }
    # The result names its own items: labelled again from its table, they are the same ones.
    again = dataclasses.replace(label, out=label.top / "again")
    tables = sorted(map(str, (label.out / "clips").glob("*.parquet")))
    assert again(*tables) == 0
    plain = {name for name in label.labelled() if "\udcff" not in name}
    assert again.labelled() | again.errors().keys() == plain


def test_members_of_all_names_come_back_exactly(label: Label) -> None:
    parts = [member(name) for name in NAMES] + [member(name) for name in NAMES[:3]]
    tar = b"".join(parts) + END
    (label.inside / "x#1.tar").write_bytes(tar)
    (label.inside / "x#1.tar.gz").write_bytes(gzip.compress(tar))
    assert label() == 0
    assert label.errors() == {}
    expected = set[str]()
    for prefix in ("x%231.tar#", "x%231.tar.gz#"):
        ids = {prefix + expected_id(name) for name in NAMES}
        back = {original(clip_id.removeprefix(prefix)) for clip_id in ids}
        assert back == {os.fsencode(name) for name in NAMES}
        expected |= ids | {f"{prefix}{expected_id(name)}~2" for name in NAMES[:3]}
    assert label.labelled() == expected


def test_lines_of_all_names_come_back_exactly(label: Label) -> None:
    names = [name for name in NAMES if "\udcff" not in name and "\udce9" not in name]
    manifests = [label.inside / ending / f"list.{ending}" for ending in ("jsonl", "csv", "parquet")]
    for manifest in manifests:
        manifest.parent.mkdir()
        for name in names:
            (manifest.parent / name).write_bytes(GOOD)
    manifests[0].write_text("\n".join(json.dumps({"uri": name}) for name in names))
    rows = [f'"{name.replace(chr(34), chr(34) * 2)}"' for name in ["uri", *names]]
    manifests[1].write_bytes("\n".join(rows).encode())
    write(manifests[2], pa.table({"uri": names}))
    assert label(*manifests) == 0
    assert label.errors() == {}
    assert label.labelled() == {
        f"{manifest.parent.name}/{expected_id(name)}" for manifest in manifests for name in names
    }


# --- The terminal --------------------------------------------------------------------------


def has_commands(text: str) -> bool:
    """Whether there is anything that a terminal obeys, line ends aside."""
    return any(
        unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in "\u202e\u2066"
        for char in text.replace("\n", "")
    )


EVIL = "evil\x1b[2J\x1b]0;owned\x07\r\n\x9b31m\u202e\u2028name"


def test_names_do_not_command_the_terminal(
    label: Label, capsys: pytest.CaptureFixture[str]
) -> None:
    assert has_commands(EVIL)
    assert not has_commands(for_terminal(EVIL))
    folder = label.inside / EVIL
    folder.mkdir()
    (folder / f"{EVIL}.wav").write_bytes(b"no audio")
    (folder / f"{EVIL}.tar.gz").write_bytes(gzip.compress(member(f"{EVIL}.wav", b"none"))[:-20])
    (folder / f"x.{EVIL}").write_bytes(b"another kind")
    (folder / "list.jsonl").write_text(json.dumps({"uri": EVIL}) * 2)
    before = capsys.readouterr()
    assert before.err == ""
    evil = dataclasses.replace(label, out=label.top / f"out {EVIL}")
    inputs = (folder, folder / "list.jsonl", str(folder) + "/")
    assert evil(*inputs, quiet=False) == 3
    said = capsys.readouterr().err
    assert "evil\\x1b[2J" in said
    assert not has_commands(said)
    for line in said.splitlines():
        assert not line.startswith(("name", "evil")), line


@pytest.fixture
def _restore_logging() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level
    for package in ("pipeline", "transforms"):
        logging.getLogger(package).setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_restore_logging")
def test_errors_of_usage_do_not_command_the_terminal(
    label: Label, capsys: pytest.CaptureFixture[str]
) -> None:
    (label.inside / f"{EVIL}.txt").write_text("no sound")
    for name in (f"{EVIL}.txt", f"{EVIL}.wav", f"{EVIL}*"):
        words = ["label", str(label.inside / name), "-o", str(label.out)]
        assert cli.main([*words, "-m", str(label.model), "--device", "cpu"]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "evil\\x1b[2J" in said.err
        assert not has_commands(said.err)
        assert len(said.err.splitlines()) == 1, said.err


# --- Any bytes at all ----------------------------------------------------------------------


def corpus() -> dict[str, bytes]:
    tar = b"".join(member(f"{n}.wav", GOOD[:900]) + member(f"{n}.json", b"{}") for n in range(3))
    tar += member("é" * 120 + ".wav", b"x") + member("y" * 200 + ".wav", b"x", format=1) + END
    buffers = {}
    for name, options in (
        ("plain.parquet", {"compression": "none"}),
        ("zstd.parquet", {"compression": "zstd", "data_page_version": "2.0"}),
    ):
        buffer = io.BytesIO()
        cells = [{"bytes": bytes([n]) * 300, "path": None} for n in range(20)]
        table = pa.table({"audio": pa.array(cells, STRUCT), "tags": [["a", "b"]] * 20})
        pq.write_table(table, buffer, row_group_size=7, **options)
        buffers[name] = buffer.getvalue()
    lines = "\n".join(json.dumps({"uri": f"{n}.wav", "start_s": n, "x": [n]}) for n in range(9))
    return {
        "x.tar": tar,
        "x.tar.gz": gzip.compress(tar, mtime=0),
        **buffers,
        "list.jsonl": lines.encode(),
        "list.csv": b'uri,label\n"a.wav","x\ny"\nb.wav,z\n' * 5,
        "list.parquet": parquet_manifest(),
    }


def parquet_manifest() -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"uri": [f"{n}.wav" for n in range(9)], "labels": [["a"]] * 9})
    pq.write_table(table, buffer)
    return buffer.getvalue()


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(1 << int(rng.integers(0, 5))):
        # Footers are small and lie at the end: half of the changes go there.
        low = 0 if rng.integers(2) else max(0, len(changed) - 700)
        changed[int(rng.integers(low, len(changed)))] = int(rng.choice([0, 255, rng.integers(256)]))
    cut = int(rng.integers(1, len(changed) + 1)) if rng.integers(4) == 0 else len(changed)
    return bytes(changed[:cut])


READ_MUTANTS = """
import sys
from pathlib import Path
from transforms.errors import InputError
from transforms.sources.read_unit import SourceSettings, find_inputs, plan_units, read_unit
settings = SourceSettings(windows_per_unit=2, max_unit_bytes=3000)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    print(folder.name, flush=True)
    for path in sorted(folder.iterdir()):
        try:
            found = find_inputs([str(path)])
            units = plan_units(found.items, found.containers, settings)
            ends = [one for unit in units for one in read_unit(unit, settings)]
        except InputError:
            continue
        names = [one.item.clip_id for one in ends]
        assert len(set(names)) == len(names), (path, names)
"""


def read_mutants(folder: Path, numbers: range) -> None:
    for number in numbers:
        rng = np.random.default_rng(number)
        (folder / f"{number:06}").mkdir(parents=True)
        for name, data in corpus().items():
            (folder / f"{number:06}" / name).write_bytes(mutate(data, rng))
    done = subprocess.run(
        [sys.executable, "-c", READ_MUTANTS, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{last}: {done.stderr[-3000:]}"


def test_damaged_containers_never_end_the_run(tmp_path: Path) -> None:
    read_mutants(tmp_path, range(60))


@pytest.mark.slow
def test_thousands_of_damaged_containers_never_end_the_run(tmp_path: Path) -> None:
    read_mutants(tmp_path, range(60, 3000))


# --- A million lines -----------------------------------------------------------------------

PLAN_LINES = """
import resource, sys, time
from transforms.sources.read_unit import SourceSettings, find_inputs, plan_units
began = time.monotonic()
found = find_inputs([sys.argv[1]])
units = plan_units(found.items, found.containers, SourceSettings())
peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(len(found.items), len(units), peak_mb, time.monotonic() - began)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_million_lines_are_planned_in_bounded_memory(tmp_path: Path, ending: str) -> None:
    (tmp_path / "good.wav").write_bytes(GOOD)
    path = tmp_path / f"list.{ending}"
    with path.open("w") as file:
        if ending == "csv":
            file.write("uri,start_s,end_s\n")
        for number in range(1_000_000):
            start_s, end_s = number / 1000, number / 1000 + 0.5
            file.write(
                f"good.wav,{start_s},{end_s}\n"
                if ending == "csv"
                else f'{{"uri": "good.wav", "start_s": {start_s}, "end_s": {end_s}}}\n'
            )
    done = subprocess.run(
        [sys.executable, "-c", PLAN_LINES, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    num_items, num_units, peak_mb, seconds = map(float, done.stdout.split())
    assert (num_items, num_units) == (1_000_000, 3907)
    assert peak_mb < 3000
    assert seconds < 300


def test_every_mutation_is_the_same_every_time() -> None:
    make: Callable[[], bytes] = lambda: mutate(corpus()["x.tar"], np.random.default_rng(3))  # noqa: E731
    assert make() == make()
