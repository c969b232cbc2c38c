"""Manifests: formats, labels, segments, bad lines, and the tables that Earmark writes."""

from __future__ import annotations

import csv
import json
import re
from typing import Any

import pyarrow as pa
import pytest

from tests.support.containers import parquet_bytes, tar_bytes
from tests.support.sources import (
    WEBDATASET,
    as_dict,
    content,
    failures,
    manifest,
    plan,
    put,
    read,
    read_all,
)
from transforms.errors import InputError
from transforms.records import EncodedClip, Failure
from transforms.sources.manifests import ManifestRow, read_manifest
from transforms.sources.read_unit import (
    SourceSettings,
    find_inputs,
)
from transforms.sources.tables import text as text_tables
from transforms.storage import urls


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize(
    "column", ["uri", "path", "file", "audio_filepath", "filename", "file_name"]
)
def test_manifests_of_each_kind(folder: str, ending: str, column: str) -> None:
    for name in ("a.wav", "sub/b, c.wav"):
        put(folder, name, name)
    rows = [
        {column: "a.wav", "labels": "Dog; Bark", "place": "here", "note": None},
        {column: f"{folder}/sub/b, c.wav", "labels": None, "place": None, "note": 'say "x"\nnow'},
    ]
    items = read_all(manifest(folder, ending, rows))
    assert as_dict(items) == {
        f"{folder}/a.wav": b"a.wav",
        f"{folder}/sub/b, c.wav": b"sub/b, c.wav",
    }
    assert [one.item.truth for one in items] == [("Dog", "Bark"), None]
    assert [json.loads(one.item.metadata) for one in items] == [
        {"place": "here"},
        {"note": 'say "x"\nnow'},
    ]
    assert all(one.item.size and one.item.version for one in items)


@pytest.mark.parametrize(
    ("row", "truth"),
    [
        ({"labels": ["Dog", "Cat; wild", None]}, ("Dog", "Cat; wild")),
        ({"labels": "Dog;; Cat ;Dog"}, ("Dog", "Cat")),
        ({"labels": '["Dog", "Cat"]'}, ("Dog", "Cat")),
        ({"labels": "[Dog]"}, ("[Dog]",)),
        ({"labels": []}, ()),
        ({"labels": ""}, None),
        ({"label": "Dog, barking; loud"}, ("Dog, barking; loud",)),
        ({"label": 3}, ("3",)),
        ({}, None),
    ],
)
def test_labels_become_truth(folder: str, row: dict[str, Any], truth: Any) -> None:
    put(folder, "a.wav")
    found = find_inputs([manifest(folder, "jsonl", [{"uri": "a.wav", **row}])])
    assert found.items[0].truth == truth
    assert found.items[0].metadata is None


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_segments(folder: str, ending: str) -> None:
    put(folder, "a.wav")
    rows = [
        {"uri": "a.wav", "start_s": 1.5, "end_s": 3.0},
        {"uri": "a.wav", "start_s": 10, "end_s": None},
        {"uri": "a.wav", "end_s": 2.0},
        {"uri": "a.wav", "offset": 20.25, "duration": 5.0},
        {"uri": "a.wav", "offset": 30.0},
        {"uri": "a.wav", "duration": 44.0},
    ]
    found = find_inputs([manifest(folder, ending, rows)])
    uri = f"{folder}/a.wav"
    assert [(item.clip_id, item.start_s, item.end_s) for item in found.items] == [
        (f"{uri}@0.000-2.000", None, 2.0),
        (uri, None, None),
        (f"{uri}@1.500-3.000", 1.5, 3.0),
        (f"{uri}@10.000-", 10.0, None),
        (f"{uri}@20.250-25.250", 20.25, 25.25),
        (f"{uri}@30.000-", 30.0, None),
    ]
    # NeMo writes every file's length as "duration": alone it is no segment.
    assert json.loads(str(found.items[1].metadata))["duration"] in (44.0, "44.0")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_members_and_rows(folder: str, ending: str) -> None:
    put(folder, "x.tar", tar_bytes(WEBDATASET))
    put(folder, "t.parquet", parquet_bytes(pa.table({"audio": [b"r0", b"r1", b"r2"]}), 1))
    rows: list[dict[str, Any]] = [
        {"uri": "x.tar", "member": "d/b.wav", "label": "Bird"},
        {"uri": "x.tar", "member": "d/a.wav"},
        {"uri": "x.tar", "member": "d/x.2.wav"},
        {"uri": "x.tar", "member": "absent.wav"},
        {"uri": "t.parquet", "row": 2, "clip_id": "mine"},
        {"uri": "t.parquet", "row": 7},
        {"uri": "gone.tar", "member": "a.wav"},
    ]
    items = read_all(manifest(folder, ending, rows))
    clips = {one.item.clip_id: one for one in items if isinstance(one, EncodedClip)}
    assert {name: one.data for name, one in clips.items()} == {
        f"{folder}/x.tar#d/b.wav": b"B",
        f"{folder}/x.tar#d/a.wav": b"A",
        f"{folder}/x.tar#d/x.2.wav": b"X2",
        "mine": b"r2",
    }
    assert clips[f"{folder}/x.tar#d/b.wav"].item.truth == ("Bird",)
    assert clips[f"{folder}/x.tar#d/a.wav"].item.truth == ("Dog",)
    metadata = json.loads(str(clips[f"{folder}/x.tar#d/x.2.wav"].item.metadata))
    assert metadata == {"labels": ["Cat", "Purr"], "both": True}  # nothing of d/x.1.wav
    assert {(one.item.clip_id, one.is_container) for one in failures(items)} == {
        (f"{folder}/x.tar#absent.wav", False),
        (f"{folder}/t.parquet#row=7", False),
        (f"{folder}/gone.tar#a.wav", False),
        (f"{folder}/gone.tar", True),
    }


def test_members_of_a_large_tar_are_read_from_the_slices_that_hold_them(folder: str) -> None:
    members = [(f"{n % 30}.wav", bytes([n]) * 500) for n in range(60)]
    url = put(folder, "x.tar", tar_bytes(members))
    asked = [{"uri": "x.tar", "member": f"{n}.wav"} for n in (3, 4, 28)]
    asked += [{"uri": "x.tar", "member": "3.wav", "start_s": 1.0, "end_s": 2.0}]
    asked += [{"uri": "x.tar", "member": "5.wav", "clip_id": f"{url}#5.wav~2"}]
    using = SourceSettings(windows_per_unit=2, max_unit_bytes=20_000)
    units = plan(find_inputs([manifest(folder, "jsonl", asked)]), using)
    assert len(units) > 1
    assert all(unit.container and unit.container.start > 0 for unit in units)
    assert {one.item.clip_id.removeprefix(url): content(one)[:1] for one in read(units)} == {
        "#3.wav": bytes([3]),
        "#3.wav@1.000-2.000": bytes([3]),
        "#4.wav": bytes([4]),
        "#28.wav": bytes([28]),
        "#5.wav~2": bytes([35]),
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"uri": ', "line 2 of .* is not JSON"),
        ("[1]", "is a JSON list; expected an object"),
        ("[" * 100_000, "is not JSON"),
        ('{"uri": "a.wav", "x": ' + "[" * 900 + "]" * 900 + "}", "is nested too deeply"),
        ('{"label": "x"}', "names no file; expected one of uri"),
        ('{"uri": 3}', "has uri = 3; expected text"),
        ('{"uri": "a\\u0000.wav"}', "cannot be a name"),
        ('{"uri": "\\ud800.wav"}', "cannot be a name"),
        ('{"uri": "nope://x/a.wav"}', "whose protocol is not known"),
        ('{"uri": "x.tar"}', "names the container .*x.tar as a whole"),
        ('{"uri": "x.parquet"}', "names the container"),
        ('{"uri": "x.jsonl"}', "a manifest; give it as an input"),
        ('{"uri": "x.tar", "member": "a", "row": 1}', "both a member and a row"),
        ('{"uri": "x.parquet", "member": "a"}', "give row instead"),
        ('{"uri": "x.parquet", "row": -1}', "has row = -1; expected a whole number"),
        ('{"uri": "a.wav", "start_s": "soon"}', "has start_s = 'soon'; expected a number"),
        ('{"uri": "a.wav", "start_s": -1}', "starts at -1.0 s; must be at least 0"),
        ('{"uri": "a.wav", "start_s": 2, "end_s": 2}', "must be after its start"),
        ('{"uri": "a.wav", "end_s": Infinity}', "expected a finite number"),
    ],
)
def test_a_bad_line_is_a_failure_that_names_it(folder: str, line: str, message: str) -> None:
    put(folder, "a.wav")
    url = put(folder, "l.jsonl", f'{{"uri": "a.wav"}}\n{line}\n{{"uri": "b.wav"}}\n')
    found = find_inputs([url])
    assert [item.uri for item in found.items] == [f"{folder}/a.wav", f"{folder}/b.wav"]
    (failure,) = found.failures
    assert failure.item.clip_id == f"{url}#line=2"
    assert (failure.error_type, failure.is_container) == ("ReadError", False)
    assert re.search(message, failure.message)


def test_long_csv_fields_are_read_without_a_lasting_limit_for_the_process(folder: str) -> None:
    before = csv.field_size_limit()
    note = "n" * (2 * before)
    rows = read_manifest(put(folder, "list.csv", f"uri,note\na.wav,{note}\nb.wav,\n"))
    first = next(rows)
    assert isinstance(first, ManifestRow)
    assert json.loads(first.item.metadata or "") == {"note": note}
    assert csv.field_size_limit() == before  # while the manifest is still open
    assert len(list(rows)) == 1
    assert csv.field_size_limit() == before


def test_csv_lines_that_are_too_long_cost_themselves(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One alone, and one inside a quote that is never closed."""
    monkeypatch.setattr(text_tables, "_MAX_LINE_CHARS", 100)
    long = "x" * 250
    lines = ["uri,note", f"a.wav,{long}", "b.wav,", 'c.wav,"open', f"d.wav,{long}", "e.wav,"]
    rows = read_manifest(put(folder, "list.csv", "\n".join(lines)))
    names = []
    for row in rows:
        assert isinstance(row, ManifestRow | Failure)
        is_row = isinstance(row, ManifestRow)
        names.append((is_row, (row.where if is_row else row.message).partition(" of ")[0]))
    is_good = [False, True, False, False, True]
    assert names == [(good, f"line {n}") for n, good in enumerate(is_good, 2)]


def test_a_manifest_row_wins_over_the_bare_file(folder: str) -> None:
    url = put(folder, "a.wav")
    other = put(folder, "b.wav")
    rows = [{"uri": "a.wav", "label": "Dog"}, {"uri": "b.wav", "clip_id": "own"}]
    listed = manifest(folder, "jsonl", rows)
    for inputs in ([folder, listed], [listed, folder]):
        found = find_inputs(inputs)
        assert [(item.clip_id, item.truth) for item in found.items] == [
            (url, ("Dog",)),
            ("own", None),
        ]
        assert found.duplicates == 2
    assert find_inputs([listed, listed]).duplicates == 2
    assert other in {item.uri for item in found.items}


def test_rows_of_one_file_give_it_all_their_labels(folder: str) -> None:
    put(folder, "a.wav")
    put(folder, "b.wav")
    rows: list[dict[str, Any]] = [
        {"uri": "a.wav", "label": "Dog", "by": "first"},
        {"uri": "b.wav"},
        {"uri": "a.wav", "labels": ["Bark", "Dog"], "by": "second"},
        {"uri": "a.wav"},
        {"uri": "b.wav", "label": "Cat"},
    ]
    found = find_inputs([manifest(folder, "jsonl", rows)])
    assert [(item.truth, item.metadata) for item in found.items] == [
        (("Dog", "Bark"), '{"by": "first"}'),
        (("Cat",), None),
    ]
    assert found.duplicates == 3


def test_one_clip_id_for_two_items_is_refused(folder: str) -> None:
    for name in ("a.wav", "b.wav"):
        put(folder, name)
    rows = [{"uri": "a.wav", "clip_id": "x"}, {"uri": "b.wav", "clip_id": "x"}]
    with pytest.raises(InputError, match=r"two different items: .*a.wav \(line 1 .*b.wav \(line 2"):
        find_inputs([manifest(folder, "jsonl", rows)])
    rows = [{"uri": "a.wav", "clip_id": f"{folder}/b.wav"}]
    with pytest.raises(InputError, match="two different items"):
        find_inputs([manifest(folder, "jsonl", rows), f"{folder}/b.wav"])


def test_a_container_listed_whole_and_by_a_manifest_is_read_once(folder: str) -> None:
    url = put(folder, "x.tar", tar_bytes([("a.wav", b"1"), ("b.wav", b"2")]))
    rows = [
        {"uri": "x.tar", "member": "a.wav"},
        {"uri": "x.tar", "member": "b.wav", "start_s": 1.0},
    ]
    found = find_inputs([url, manifest(folder, "jsonl", rows)])
    clip_ids = [one.item.clip_id for one in read(plan(found))]
    assert sorted(clip_ids) == [f"{url}#a.wav", f"{url}#b.wav", f"{url}#b.wav@1.000-"]
    assert found.duplicates == 1
    assert any("listed as a whole" in note for note in found.notes)


ERROR_ROWS = {
    "stage": "decode",
    "error_type": "DecodeError",
    "message": "no",
    "unit_id": "0f",
}


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_the_errors_table_is_a_manifest(folder: str, ending: str) -> None:
    put(folder, "a.wav")
    put(folder, "x.tar", tar_bytes([("m.wav", b"1"), ("m.wav", b"2")]))
    place = dict.fromkeys(("member", "row", "start_s", "end_s"))
    rows = [
        {"clip_id": f"{folder}/a.wav", "uri": f"{folder}/a.wav", **place, **ERROR_ROWS}
        | {"truth": ["Dog"], "metadata": '{"k": [1, null]}'},
        {"clip_id": f"{folder}/x.tar#m.wav~2", "uri": f"{folder}/x.tar", **place, **ERROR_ROWS}
        | {"member": "m.wav", "truth": None, "metadata": None},
    ]
    manifest(urls.join(folder, "errors"), ending, rows)
    items = read_all(f"{folder}/errors/*.{ending}")
    assert as_dict(items) == {f"{folder}/a.wav": b"audio", f"{folder}/x.tar#m.wav~2": b"2"}
    assert (items[0].item.truth, items[0].item.metadata) == (("Dog",), '{"k": [1, null]}')
    assert (items[1].item.truth, items[1].item.metadata) == (None, None)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_the_errors_table_names_broken_containers_as_a_whole(folder: str, ending: str) -> None:
    for name in ("x.tar", "signed.tar"):
        put(folder, name, tar_bytes([("m.wav", b"1"), ("n.wav", b"2")]))
    put(folder, "t.parquet", parquet_bytes(pa.table({"audio": [b"r0", b"r1"]})))
    put(folder, "old.parquet", parquet_bytes(pa.table({"uri": ["a.wav"]})))
    names = ("x.tar#bytes=0-512", "x.tar#bytes=512-", "t.parquet", "gone.tar", "old.parquet#row=1")
    rows = [
        {"clip_id": f"{folder}/{name}", "uri": f"{folder}/{name.partition('#')[0]}"}
        | {"member": None, "row": None, **ERROR_ROWS}
        for name in names
    ]
    listed = manifest(urls.join(folder, "errors"), ending, rows)
    found = find_inputs([listed])
    assert (found.items, found.duplicates, dict(found.skipped_by_extension)) == ((), 0, {})
    items = read(plan(found))
    assert list(as_dict(items)) == [
        *(f"{folder}/t.parquet#row={row}" for row in (0, 1)),
        *(f"{folder}/x.tar#{name}.wav" for name in "mn"),
    ]
    (missing,) = failures(items)
    assert (missing.item.clip_id, missing.is_container) == (f"{folder}/gone.tar", True)
    (no_audio,) = found.failures
    assert f"names the container {folder}/old.parquet as a whole" in no_audio.message
    assert not no_audio.is_container


@pytest.mark.parametrize("is_there", [True, False])
def test_each_wanted_row_of_a_broken_parquet_file_is_one_failure(
    folder: str, is_there: bool
) -> None:
    if is_there:
        put(folder, "t.parquet", "not Parquet")
    put(folder, "a.wav")  # a manifest without any file would be refused
    rows = [{"uri": "a.wav"}, *({"uri": "t.parquet", "row": row} for row in (1, 3))]
    failed = failures(read_all(manifest(folder, "jsonl", rows)))
    assert [(one.item.row, one.is_container) for one in failed] == [(1, False), (3, False)]
    reason = "is not a whole Parquet file" if is_there else f"{folder}/t.parquet: "
    for row, failure in zip((1, 3), failed, strict=True):
        assert failure.message.startswith(f"row {row} cannot be read: {folder}/t.parquet")
        assert reason in failure.message
        assert is_there or failure.error_type == "FileNotFoundError"


def test_the_clips_table_is_a_manifest(folder: str) -> None:
    put(folder, "a.wav")
    row = {
        "clip_id": f"{folder}/a.wav@1.000-2.000",
        "uri": f"{folder}/a.wav",
        "member": None,
        "row": None,
        "start_s": 1.0,
        "end_s": 2.0,
        "duration_s": 1.0,
        "num_windows": 1,
        "content_sha256": "00",
        "truth": ["Dog"],
        "labels": [{"index": 0, "id": None, "name": "Speech", "score": 0.5}],
        "embedding": [0.0, 1.0],
        "metadata": None,
    }
    (item,) = find_inputs([manifest(folder, "parquet", [row])]).items
    assert (item.clip_id, item.start_s, item.end_s) == (row["clip_id"], 1.0, 2.0)
    assert (item.truth, item.metadata) == (("Dog",), None)
