"""Parquet files: the audio column, row groups, remote reading, and damage."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from tests.support.containers import parquet_bytes, write
from tests.support.sources import as_dict, content, described, failures, plan, put, read, read_all
from tests.support.stores.fault_proxy import FaultProxy
from tests.support.stores.web_server import serve_folder
from transforms.sources import fetching
from transforms.sources.read_unit import (
    ReadLimits,
    SourceSettings,
    find_inputs,
)


def hf_table() -> pa.Table:
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "audio": pa.array(
                [
                    {"bytes": b"one", "path": "orig.wav"},
                    {"bytes": None, "path": "beside.wav"},
                    {"bytes": None, "path": None},
                    None,
                    {"bytes": None, "path": "absent.wav"},
                ],
                audio,
            ),
            "label": pa.array([1, 0, -1, 1, 0]),
            "tags": pa.array([[0, 1], [], None, [1], [0]], pa.list_(pa.int64())),
            "score": pa.array([0.5, float("nan"), None, 1.0, 2.0]),
            "image": pa.array([b"png"] * 5),
        }
    )
    names = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    features = {
        "audio": {"_type": "Audio"},
        "label": names,
        "tags": {"_type": "List", "feature": names},
    }
    info = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({b"huggingface": info.encode()})


def test_the_hugging_face_layout(folder: str) -> None:
    put(folder, "beside.wav", "file")
    url = put(folder, "data.parquet", parquet_bytes(hf_table()))
    items = read_all(url)
    assert as_dict(items) == {f"{url}#row=0": b"one", f"{url}#row=1": b"file"}
    assert described(items)["row=0"] == (
        ("dog",),
        {
            "label": "dog",
            "tags": ["cat", "dog"],
            "score": 0.5,
            "image": "<3 bytes>",
            "path": "orig.wav",
        },
    )
    assert described(items)["row=1"][0] == ("cat",)
    assert described(items)["row=2"] == (None, {"image": "<3 bytes>"})
    assert [(one.item.row, one.error_type) for one in failures(items)] == [
        (2, "ReadError"),
        (3, "ReadError"),
        (4, "FileNotFoundError"),
    ]
    told = [one.message for one in failures(items)]
    assert told[:2] == [f"row {row} has neither bytes nor a path" for row in (2, 3)]
    assert told[2].startswith("row 4 has no bytes, and its path 'absent.wav': ")
    assert "there is no such file" in told[2] and f"{folder}/absent.wav" in told[2]
    assert url not in told[2]


@pytest.mark.slow
def test_the_schema_of_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "audio": datasets.Audio(decode=False),
            "label": datasets.ClassLabel(names=["rain", "wind"]),
        }
    )
    rows = {"audio": [{"bytes": b"w", "path": None}, {"bytes": b"r", "path": "r"}], "label": [1, 0]}
    table = pa.table(rows, schema=features.arrow_schema)
    url = put(str(tmp_path), "hf.parquet", parquet_bytes(table))
    items = read_all(url)
    assert as_dict(items) == {f"{url}#row=0": b"w", f"{url}#row=1": b"r"}
    assert [one.item.truth for one in items] == [("wind",), ("rain",)]


@pytest.mark.parametrize(
    ("table", "is_audio"),
    [
        (pa.table({"audio": [b"x"], "other": [b"y"]}), True),
        (pa.table({"data": [b"x"], "name": ["n"]}), True),
        (pa.table({"data": pa.array([b"x"], pa.large_binary())}), True),
        (pa.table({"one": [b"x"], "two": [b"y"]}), False),
        (pa.table({"uri": ["a.wav"], "digest": [b"y"]}), False),
        (pa.table({"audio": [1]}), False),
        (pa.table({"audio": [[1, 2]]}), False),
        (pa.table({"audio": [{"samples": [0.5], "rate": 1}]}), False),
        (pa.table({"audio": ["a.wav"]}), False),
        (pa.table({"audio": pa.nulls(1)}), False),
    ],
)
def test_which_columns_are_audio(folder: str, table: pa.Table, is_audio: bool) -> None:
    put(folder, "a.wav")
    put(folder, "t.parquet", parquet_bytes(table))
    found = find_inputs([folder])
    assert len(found.containers) == is_audio
    assert found.skipped_by_extension == ({} if is_audio else {".parquet": 1})
    if is_audio:
        assert content(read_all(f"{folder}/t.parquet")[0]) == b"x"


@pytest.mark.parametrize("rows_per_unit", [1, 3, 7, 100])
def test_parquet_is_cut_at_row_groups(folder: str, rows_per_unit: int) -> None:
    table = pa.table({"audio": [bytes([n]) for n in range(20)]})
    url = put(folder, "t.parquet", parquet_bytes(table, 3))
    using = SourceSettings(windows_per_unit=rows_per_unit)
    found = find_inputs([url])
    units = plan(found, using)
    parts = [unit.container for unit in units if unit.container]
    assert all(part.start % 3 == 0 for part in parts)
    assert len(parts) == {1: 7, 3: 7, 7: 3, 100: 1}[rows_per_unit]
    assert [content(clip) for clip in read(units)] == [bytes([n]) for n in range(20)]
    assert sum(unit.estimated_windows for unit in units) == 20
    covered = [(part.start, part.stop) for part in parts[::2]]
    assert plan(found, using, covered={url: covered}) == units[1::2]
    assert plan(found, using, covered={url: [(0, None)]}) == []


@pytest.mark.parametrize("is_held", [True, False])
@pytest.mark.parametrize(
    ("page_bytes", "row_group"), [(16 << 10, 200), (2 << 20, 200), (2 << 20, 50)]
)
def test_no_byte_of_a_remote_parquet_file_is_requested_twice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    page_bytes: int,
    row_group: int,
    is_held: bool,
) -> None:
    """If row groups are too large to be held, only the headers of their pages are."""
    if not is_held:
        monkeypatch.setattr(fetching, "_MAX_HELD_BYTES", 0)
    cells = [{"bytes": os.urandom(100_000), "path": f"{n}.wav"} for n in range(200)]
    options = {"data_page_size": page_bytes, "write_batch_size": 1, "use_dictionary": False}
    table = pa.table({"audio": cells, "note": [f"note {n}" for n in range(200)]})
    size = len(write(tmp_path / "t.parquet", table, row_group_size=row_group, **options))
    with serve_folder(tmp_path) as web, FaultProxy("127.0.0.1", web.port) as proxy:
        url = f"{proxy.url}/t.parquet"
        items = read_all(url, units=SourceSettings())
        answers = [one.num_bytes for one in proxy.answers if one.method == "GET"]
    assert as_dict(items) == {f"{url}#row={n}": cell["bytes"] for n, cell in enumerate(cells)}
    # Pages of 100 kB lie closer together than the blocks in which headers are asked for.
    assert sum(answers) < size * (1.05 if is_held else 1.2 if page_bytes > 1 << 20 else 2)
    assert len(answers) < (40 if is_held else 300)


def test_held_ranges_read_like_the_file(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    url = put(f"memory://held-{tmp_path.name}", "x", data)
    with fetching.RangeReader(url) as reader:
        for ranges in ([], [(0, 10)], [(5, 9), (7, 20), (100_000, 900_000)], [(-5, 3), (9, 4)]):
            assert reader.hold(ranges)
            for start, length in ((0, 300_000), (3, 30), (99_990, 20), (299_999, 5), (300_000, 1)):
                reader.seek(start)
                got = b"".join(iter(lambda: reader.read(4096), b""))[:length]
                assert got == data[start : start + length]
        assert not reader.hold([(0, 1 << 40)])
        assert reader.seek(-4, io.SEEK_END) == len(data) - 4
        assert reader.read() == data[-4:]


def test_row_groups_are_read_even_if_the_disk_is_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fetching, "_HELD_IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(fetching, "scratch_folder", lambda: tmp_path / "gone")
    cells = [os.urandom(5000) for _ in range(4)]
    url = put(
        f"memory://no-room-{tmp_path.name}", "t.parquet", parquet_bytes(pa.table({"audio": cells}))
    )
    assert [content(clip) for clip in read_all(url)] == cells


def test_a_value_without_a_python_equivalent_costs_no_rows(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"fine", b"\xff", None]).buffers())
    table = pa.table({"uri": ["a.wav", "b.wav", "c.wav"], "note": broken})
    url = put(str(tmp_path), "list.parquet", parquet_bytes(table))
    (tmp_path / "a.wav").touch()  # a table none of whose files is there would be refused
    first, second, third = find_inputs([url]).items
    assert (first.metadata, third.metadata) == ('{"note": "fine"}', None)
    assert second.metadata is not None and "<cannot be read: " in second.metadata


def test_large_cells_are_spooled_and_refused_beyond_the_bound(tmp_path: Path) -> None:
    table = pa.table({"audio": [b"x" * 500, b"y" * 1500, b"z" * 2500]})
    url = put(str(tmp_path), "t.parquet", parquet_bytes(table))
    using = SourceSettings(limits=ReadLimits(spool_bytes=1000, max_item_bytes=2000))
    small, large, failure = read_all(url, units=using)
    assert (small.data, small.path) == (b"x" * 500, None)
    assert large.data is None and large.delete_path
    assert content(large) == b"y" * 1500
    assert (failure.error_type, failure.item.row) == ("ItemTooLarge", 2)
    assert "the item has 2500 bytes; at most 2000 are allowed" in failure.message
