"""Hostile tars: what is readable is labelled, the rest is a row that says why."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile

import numpy as np
import pytest

from tests.support.containers import END, GOOD, member, pax, raw_member
from tests.support.watched_label import Label
from transforms.sources import tar, tar_headers


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
    ignored = member("folder.wav", b"", type=tarfile.DIRTYPE) + member("._shadow.wav", b"x")
    parts = [member(name, b"", **changes) for name, (_, changes) in kinds.items()]
    tar = member("good.wav") + b"".join(parts) + ignored + member("last.wav") + END
    (label.inside / "x.tar").write_bytes(tar)
    assert label() == 0
    assert label.labelled() == {"x.tar#good.wav", "x.tar#last.wav"}
    assert label.errors() == {
        f"x.tar#{name}": ("ReadError", f"the member is a {kind}; only regular files are read")
        for name, (kind, _) in kinds.items()
    }


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


def test_a_gzip_cut_short_or_damaged_gives_the_members_before(label: Label) -> None:
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


def test_false_headers_cost_their_members(label: Label) -> None:
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
        "headers_without_end": pax({"a": "x" * 600_000}) + pax({"b": "x" * 600_000}) + raw_member(),
        "name_and_no_member": pax({"path": "b.wav"}) + END,
        "after_the_end": END + b"garbage" * 100,
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
    assert (
        "has 2097152 bytes of extended headers; at most 1048576 are read"
        in long.pop("long_header.tar")[1]
    )
    assert len(long) == 2
    for name, (_, message) in long.items():
        assert len(name) < 200
        assert message.startswith("the member's name has more than 4096 characters")
    assert label.rows("errors") and all(
        len(row["uri"]) < 300 for row in label.rows("errors").values()
    )


def test_a_large_pax_header_takes_no_time(label: Label) -> None:
    many = pax({f"SCHILY.xattr.{number}": "x" for number in range(43_000)})
    assert 900_000 < len(many) < 1 << 20
    digits = pax({"digits": "1" * 1_000_000})
    headers = (many + member("a.wav")) * 5 + digits + member("b.wav")
    (label.inside / "x.tar").write_bytes(headers + END)
    assert label() == 0
    assert len(label.labelled()) == 6


# Bombs


def zeros_gz(prefix: bytes, name: str, num_bytes: int, suffix: bytes) -> bytes:
    """Make a compressed tar with a member of zeros, without holding its content."""
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
    monkeypatch.setattr(tar, "spool", lambda *args: spooled.append(str(args)))
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


def test_huge_siblings_are_reported_by_their_size(label: Label) -> None:
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
