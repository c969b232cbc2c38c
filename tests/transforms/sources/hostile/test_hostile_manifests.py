"""Hostile manifests: a bad line costs itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.containers import GOOD, write
from tests.support.paths import ROOT
from tests.support.watched_label import Label
from transforms.errors import InputError
from transforms.sources.tables import text as text_tables


def test_bad_lines_cost_themselves(label: Label) -> None:
    (label.inside / "good.wav").write_bytes(GOOD)
    good = json.dumps({"uri": "good.wav", "clip_id": "the good one"}).encode()
    lines = [
        b"{oops",
        b'{"uri": "good.wav\xc3\xa9"}',
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
        *("good.wavé", "absent.wav", "reference://x"),
    }
    assert all(len(message) < 1000 for _, message in errors.values())
    assert "is longer than 16777216 characters" in errors["list.jsonl#line=14"][1]
    assert "of 40004 characters; at most 32768 are read" in errors["list.jsonl#line=11"][1]
    metadata = label.rows("errors")["absent.wav"]["metadata"]
    assert json.loads(metadata) == {"score": None, "most": None}


def test_bad_csv_records_cost_themselves(label: Label) -> None:
    for name in ("a.wav", "b.wav", "c.wav", "new\nline.wav", 'qu"ote.wav'):
        (label.inside / name).write_bytes(GOOD)
    text = '\ufeffuri,note\r\na.wav,fine\r\n"new\nline.wav","two\r\nlines"\r\n"qu""ote.wav",x\r\n'
    text += "c.wav," + "n" * (17 << 20) + "\r\n"
    text += 'c.wav,nul\0byte\r\na.wav,x,y\r\n\r\n"b.wav,never closed\r\nb.wav,x\r\n'
    manifest = label.inside / "list.csv"
    manifest.write_bytes(text.encode())
    assert label(manifest) == 0
    assert label.labelled() == {"a.wav", "c.wav", 'qu"ote.wav', "new\nline.wav", "b.wav"}
    told = {name: message.partition(" of ")[2] for name, (_, message) in label.errors().items()}
    expected = {
        7: "is longer than 16777216 characters",
        9: "has 3 fields, the header 2; quote the commas",
        11: "is not CSV: a quote is not closed, or not within 1000 lines",
    }
    assert told == {f"list.csv#line={n}": f"{manifest} {words}" for n, words in expected.items()}


LONG = "x" * 40_000


@pytest.mark.parametrize(
    ("name", "text", "labelled", "bad_lines"),
    [
        ("list.csv", 'uri,note\n0.wav,x\n"1.wav,x\n' + "2.wav,x\n1.wav,x\n" * 2500, "012", [3]),
        ("list.tsv", 'uri\tnote\n0.wav\t"two\nlines"\n1.wav\t"never\n2.wav\tx\n', "012", []),
        # Each field and line is below the bound, but all of them together are not.
        ("long.csv", f'uri,x,y\n0.wav,"{LONG}\n","{LONG}\n"\n1.wav,,\n', "1", [2, 3, 4]),
    ],
)
def test_a_record_that_does_not_end_costs_its_lines(
    label: Label,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: str,
    labelled: str,
    bad_lines: list[int],
) -> None:
    monkeypatch.setattr(text_tables, "_MAX_LINE_CHARS", 1 << 16)
    for number in range(3):
        (label.inside / f"{number}.wav").write_bytes(GOOD)
    (label.inside / name).write_text(text)
    assert label(label.inside / name) == 0
    assert label.labelled() == {f"{number}.wav" for number in labelled}
    errors = label.errors()
    assert errors.keys() == {f"{name}#line={number}" for number in bad_lines}
    if not bad_lines:
        return
    reason = (
        "a record of more than 65536 characters"
        if name == "long.csv"
        else "a quote is not closed, or not within 1000 lines"
    )
    assert errors[f"{name}#line={bad_lines[0]}"][1].endswith(f"is not CSV: {reason}")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"), [("l.jsonl", '{"uri": "é.wav"}\n'), ("l.csv", "uri\né.wav\n")]
)
def test_a_manifest_in_another_encoding_is_refused_with_the_way_out(
    label: Label, name: str, text: str, encoding: str
) -> None:
    (label.inside / name).write_bytes(text.encode(encoding))
    with pytest.raises(
        InputError, match=r"not text in UTF-8 or UTF-16: .*--set manifest\.encoding"
    ):
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


# A million lines


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
