"""Columns of tables: names, patterns, roots, look-alikes, contradictions, labels in a text."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.support.sources import manifest, put
from transforms.errors import InputError
from transforms.sources.read_unit import Found, TableSettings, find_inputs


def find(listed: str, **settings: Any) -> Found:
    return find_inputs([listed], tables=TableSettings(**settings))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_columns_are_mapped_and_the_tables_own_stay_metadata(folder: str, ending: str) -> None:
    put(folder, "a.wav")
    row = {"name": "a.wav", "category": "Dog", "label": "7", "from": "1.5", "to": "2.5", "fold": 1}
    columns = {"uri": "name", "label": "category", "start_s": "from", "end_s": "to"}
    (item,) = find(manifest(folder, ending, [row]), columns=tuple(columns.items())).items
    assert item.uri == f"{folder}/a.wav"
    assert (item.truth, item.start_s, item.end_s) == (("Dog",), 1.5, 2.5)
    assert {name: str(value) for name, value in json.loads(str(item.metadata)).items()} == {
        "label": "7",
        "fold": "1",
    }


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_mapped_column_that_is_absent_is_refused(folder: str, ending: str) -> None:
    listed = manifest(folder, ending, [{"uri": "a.wav", "kind": "Dog"}])
    with pytest.raises(InputError, match=r"no column is called category, .* are uri, kind\. Corre"):
        find(listed, columns=(("label", "category"),))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_pattern_makes_a_path_of_cells_below_the_root(folder: str, ending: str) -> None:
    for name in ("data/fold1/a.wav", "data/fold2/b c.wav"):
        put(folder, name)
    rows = [
        {"slice": "a", "fold": 1, "label": "Dog"},
        {"slice": "b c", "fold": 2, "label": "Cat"},
        {"slice": None, "fold": 2, "label": "Cat"},
    ]
    found = find(
        manifest(folder, ending, rows), root=f"{folder}/data", pattern="fold{fold}/{slice}.wav"
    )
    assert [(item.uri, item.truth) for item in found.items] == [
        (f"{folder}/data/fold1/a.wav", ("Dog",)),
        (f"{folder}/data/fold2/b c.wav", ("Cat",)),
    ]
    assert json.loads(str(found.items[0].metadata))["slice"] == "a"
    (failure,) = found.failures
    assert "has nothing in the column slice" in failure.message
    with pytest.raises(InputError, match=r"no column is called folds, which manifest\.pattern"):
        find(manifest(folder, ending, rows), pattern="{folds}.wav")


def test_relative_paths_start_from_the_root_and_others_do_not(folder: str) -> None:
    put(folder, "audio/a.wav")
    put(folder, "b.wav")
    listed = manifest(folder, "csv", [{"file": "a.wav"}, {"file": f"{folder}/b.wav"}])
    found = find(listed, root=f"{folder}/audio/")
    assert [item.uri for item in found.items] == [f"{folder}/audio/a.wav", f"{folder}/b.wav"]
    assert all(item.size for item in found.items)


@pytest.mark.parametrize(
    ("columns", "settings", "note"),
    [
        (
            "uri,start,stop",
            {},
            "start, stop look like times, .*--column start_s=start --column end_s",
        ),
        (
            "uri,Begin Time (s)",
            {},
            r"Begin Time \(s\) looks like .*it: --column start_s='Begin Time",
        ),
        ("uri,category,target", {}, "category, target look like labels"),
        ("uri,primary_label", {}, "it: --column label=primary_label"),
        ("uri,start,start_s", {}, None),
        ("uri,category,label", {}, None),
        ("uri,category,target", {"columns": (("label", "category"),)}, None),
        ("uri,start", {"columns": (("start_s", ""),)}, None),
        ("uri,starting,classy", {}, None),
    ],
)
def test_columns_that_look_like_times_or_labels_are_named(
    tmp_path: Any, columns: str, settings: Any, note: str | None
) -> None:
    put(str(tmp_path), "a.wav")
    listed = put(str(tmp_path), "l.csv", f"{columns}\na.wav{',1' * columns.count(',')}\n")
    notes = find(listed, **settings).warnings
    if note is None:
        assert notes == ()
    else:
        (said,) = notes
        assert re.search(note, said)


@pytest.mark.parametrize(
    ("row", "span"),
    [
        ({"start_s": 1, "duration": 2}, (1.0, 3.0)),
        ({"start_s": 1, "end_s": 3, "duration": 2.004}, (1.0, 3.0)),
        ({"start_s": 1, "offset": 1.0, "duration": 2}, (1.0, 3.0)),
        ({"offset": 0, "duration": 2}, (0.0, 2.0)),
        ({"end_s": 2, "duration": 9}, (None, 2.0)),
        ({"duration": 9}, (None, None)),
        ({"start_s": "nan", "end_s": "None", "duration": "nan"}, (None, None)),
    ],
)
def test_a_span_is_a_start_and_an_end_or_a_length(tmp_path: Any, row: Any, span: Any) -> None:
    put(str(tmp_path), "a.wav")
    (item,) = find(manifest(str(tmp_path), "jsonl", [{"uri": "a.wav", **row}])).items
    assert (item.start_s, item.end_s) == span


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"start_s": 1.0, "end_s": 3.0, "duration": 5.0},
        {"offset": 1.0, "end_s": 3.0, "duration": 5.0},
        {"start_s": 1.0, "offset": 2.0},
    ],
)
def test_columns_that_contradict_each_other_are_refused(
    tmp_path: Any, ending: str, row: dict[str, float]
) -> None:
    rows = [{"uri": "b.wav", "start_s": 0.0, "end_s": 1.0}, {"uri": "a.wav", **row}]
    listed = manifest(str(tmp_path), ending, rows)
    named = ", ".join(f"{name} = {value:g}" for name, value in row.items())
    with pytest.raises(InputError, match=f"has {named}, which contradict each other; .*--column"):
        find(listed)


def test_a_duration_that_is_no_length_of_a_segment_can_be_left_as_metadata(tmp_path: Any) -> None:
    row = {"uri": "a.wav", "start_s": 1.0, "end_s": 3.0, "duration": 5.0}
    listed = manifest(str(tmp_path), "jsonl", [row])
    (item,) = find(listed, columns=(("duration", ""),)).items
    assert (item.end_s, item.metadata) == (3.0, '{"duration": 5.0}')


@pytest.mark.parametrize(
    ("row", "truth"),
    [
        ({"labels": "['dog', 'cat']"}, ("dog", "cat")),
        ({"labels": "['dog' 'cat']"}, ("dog", "cat")),  # numpy's print
        ({"labels": '["it\'s", \'a "b"\']'}, ("it's", 'a "b"')),
        ({"labels": "['it\\'s']"}, ("it's",)),
        ({"labels": "['dog', None, nan]"}, ("dog",)),
        ({"labels": "[]"}, None),
        ({"label": "['dog', 'cat']"}, ("dog", "cat")),
        ({"label": "[dog]"}, ("[dog]",)),
        ({"label": "[[1]]"}, ("[[1]]",)),
        ({"label": "nan"}, None),
        ({"label": "None"}, None),
        ({"label": float("nan")}, None),
        ({"labels": "dog; nan;None;"}, ("dog",)),
        ({"labels": ["dog", None, float("nan"), ""]}, ("dog",)),
        ({"label": "none"}, ("none",)),
    ],
)
def test_labels_in_a_text_and_missing_labels(tmp_path: Any, row: Any, truth: Any) -> None:
    (item,) = find(manifest(str(tmp_path), "jsonl", [{"uri": "a.wav", **row}])).items
    assert item.truth == truth


def test_commas_between_labels_are_said_and_can_divide_them(tmp_path: Any) -> None:
    rows = [{"uri": "a.wav", "labels": "Bark,Dog"}, {"uri": "b.wav", "labels": "Speech, music"}]
    listed = manifest(str(tmp_path), "csv", rows)
    found = find(listed)
    assert [item.truth for item in found.items] == [("Bark,Dog",), ("Speech, music",)]
    (note,) = found.warnings
    assert "labels hold commas in 1 rows, such as 'Bark,Dog'" in note
    found = find(listed, label_separator=",")
    assert [item.truth for item in found.items] == [("Bark", "Dog"), ("Speech", "music")]
    assert found.warnings == ()
