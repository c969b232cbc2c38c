"""Label lists: in order, with AudioSet's ids where they belong."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from transforms.errors import ModelError
from transforms.models.labels import (
    Label,
    audioset_labels,
    labels_from_names,
    read_labels,
    speech_commands_labels,
)


def write(folder: Path, text: str, name: str = "labels.csv", encoding: str = "utf-8") -> str:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return str(path)


def names_of(labels: tuple[Label, ...]) -> list[str]:
    return [label.name for label in labels]


def test_audioset_has_its_527_labels_in_order() -> None:
    labels = audioset_labels()
    assert [label.index for label in labels] == list(range(527))
    assert labels[0] == Label(0, "/m/09x0r", "Speech")
    assert labels[345] == Label(345, "/m/08j51y", "Dental drill, dentist's drill")
    assert labels[526] == Label(526, "/m/07hvw1", "Field recording")
    assert len({label.id for label in labels}) == len({label.name for label in labels}) == 527
    assert sum("," in label.name for label in labels) == 75
    assert read_labels("audioset") == labels


def test_speech_commands_has_its_35_labels_without_ids() -> None:
    labels = speech_commands_labels()
    assert len(labels) == 35
    assert labels[0] == Label(0, None, "backward")
    assert labels[34] == Label(34, None, "one")
    assert read_labels("speech_commands") == labels


@pytest.mark.parametrize(
    ("file_name", "labels"),
    [
        ("class_labels_indices.csv", audioset_labels()),
        ("speechcommands_class_labels_indices.csv", speech_commands_labels()),
    ],
)
def test_the_lists_are_the_published_ones(
    shared_data: Path, file_name: str, labels: tuple[Label, ...]
) -> None:
    path = shared_data / "audioset" / file_name
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["index"]), row["display_name"]) for row in rows] == [
        (label.index, label.name) for label in labels
    ]
    assert read_labels(str(path)) == labels
    if labels[0].id is not None:
        assert [row["mid"] for row in rows] == [label.id for label in labels]


def test_ids_come_with_audiosets_names_in_audiosets_order_only() -> None:
    names = names_of(audioset_labels())
    assert labels_from_names(names) == audioset_labels()
    for other in (names[::-1], names[:-1], [*names, "one more"], ["Speech"], []):
        assert {label.id for label in labels_from_names(other)} <= {None}


def test_spelling_variants_of_audiosets_names_keep_their_own_spelling() -> None:
    names = [name.upper().replace("'", "’") + " " for name in names_of(audioset_labels())]
    labels = labels_from_names(names)
    assert [label.id for label in labels] == [label.id for label in audioset_labels()]
    assert names_of(labels) == names


@pytest.mark.parametrize(
    "text",
    [
        'index,mid,display_name\n0,/m/1,"Rain, heavy"\n1,/m/2,Dog\n',
        'index,id,name\n1,,Dog\n0,,"Rain, heavy"\n',
        'name,colour\r\n"Rain, heavy",blue\r\nDog,brown\r\n',
        '\ufeffname\n"Rain, heavy"\n\nDog\n',
        'index, name\n0,"Rain, heavy"\n1, Dog \n',
    ],
    ids=["mid", "unordered", "no index, CRLF", "one column, BOM, blank line", "spaces"],
)
def test_a_csv_is_read_by_its_columns(tmp_path: Path, text: str) -> None:
    labels = read_labels(write(tmp_path, text))
    assert labels == (Label(0, None, "Rain, heavy"), Label(1, None, "Dog"))


def test_a_csv_is_known_by_its_header_too(tmp_path: Path) -> None:
    path = write(tmp_path, 'index,name\n0,"Rain, heavy"\n', "labels.txt")
    assert names_of(read_labels(path)) == ["Rain, heavy"]


def test_a_text_file_has_a_name_per_line(tmp_path: Path) -> None:
    path = write(tmp_path, "Rain, heavy\n  Dog \nÉcho\r\n\n", "labels.txt")
    assert names_of(read_labels(path)) == ["Rain, heavy", "Dog", "Écho"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"begins with the columns \[\]; expected name or display_name"),
        ("index,label\n0,Dog\n", r"begins with the columns \['index', 'label'\]; expected name"),
        ("index,name\n", r"labels\.csv is empty; expected a name per output"),
        ("index,name\n0,Rain, heavy\n", r"line 2 has 3 columns; expected 2\. A name with a comma"),
        ("index,name\nzero,Dog\n", r"line 2 has the index 'zero'; expected a whole number"),
        ("index,name\n0,Dog\n0,Cat\n", r"line 3 has the index '0'; expected .* no other line"),
        ("index,name\n1,Dog\n2,Cat\n", r"has no index 0; expected 0 to 1, each once"),
        ("index,name\n0,\n", r"has no name for index 0"),
        ("index,name\n0,Dog\n1,Dog\n", r"names 'Dog' twice, for index 0 and 1"),
    ],
)
def test_a_list_that_is_not_one_name_per_index_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read_labels(write(tmp_path, text))


def test_a_blank_line_between_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no name for index 1"):
        read_labels(write(tmp_path, "Dog\n\nCat\n", "labels.txt"))


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'nowhere\.txt', which cannot be read .*; expected audi"):
        read_labels("nowhere.txt")
    with pytest.raises(ModelError, match=r"labels\.csv is not UTF-8 text"):
        read_labels(write(tmp_path, "name\nÉcho\n", encoding="latin-1"))
