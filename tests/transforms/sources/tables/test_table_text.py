"""Text tables: encodings, gzip, separators, quotes in tab-separated text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.support.sources import as_dict, put, read_all
from transforms.errors import InputError
from transforms.records import Failure
from transforms.sources.read_unit import TableSettings, find_inputs

CSV = "uri,label\nä.wav,Größe\n"
JSONL = '{"uri": "ä.wav", "label": "Größe"}\n'
TEXTS = pytest.mark.parametrize(("name", "text"), [("l.csv", CSV), ("l.jsonl", JSONL)])


@TEXTS
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_utf8_and_utf16_are_read(
    folder: str, name: str, text: str, is_packed: bool, encoding: str
) -> None:
    data = text.encode(encoding)
    listed = put(
        folder, f"{name}.gz" if is_packed else name, gzip.compress(data) if is_packed else data
    )
    (item,) = find_inputs([listed]).items
    assert (item.uri, item.truth) == (f"{folder}/ä.wav", ("Größe",))


@TEXTS
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "gb18030", "utf-32", "utf-32-le"])
def test_another_encoding_is_refused_until_it_is_named(
    tmp_path: Path, name: str, text: str, encoding: str
) -> None:
    listed = put(str(tmp_path), name, text.encode(encoding))
    with pytest.raises(InputError, match=r"not text in UTF-8 or UTF-16: .*--set manifest\.encodin"):
        find_inputs([listed])
    (item,) = find_inputs([listed], tables=TableSettings(encoding=encoding)).items
    assert (Path(item.uri).name, item.truth) == ("ä.wav", ("Größe",))


def test_the_line_that_is_in_another_encoding_is_named(tmp_path: Path) -> None:
    text = "uri,label\n" + "a.wav,x\n" * 5000 + "b.wav,Größe\n"
    listed = put(str(tmp_path), "l.csv", text.encode("latin-1"))
    with pytest.raises(InputError, match="line 5002 has the byte 0xF6"):
        find_inputs([listed])
    with pytest.raises(InputError, match="cannot be read as ascii"):
        find_inputs([listed], tables=TableSettings(encoding="ascii"))


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_are_recognised(tmp_path: Path, ending: str, separator: str) -> None:
    lines = [["uri", "label", "note"], ["a.wav", "Dog", '"x, y; z\tw"'], ["b.wav", "Cat", ""]]
    text = "".join(f"{separator.join(line)}\n" for line in lines)
    found = find_inputs([put(str(tmp_path), f"l.{ending}", text)])
    assert [(Path(item.uri).name, item.truth) for item in found.items] == [
        ("a.wav", ("Dog",)),
        ("b.wav", ("Cat",)),
    ]
    assert json.loads(str(found.items[0].metadata)) == {"note": "x, y; z\tw"}
    assert found.failures == ()


@pytest.mark.parametrize(
    ("ending", "text"),
    [("tsv", "path\na, b.wav\nc; d.wav\n"), ("csv", 'path\n"a, b.wav"\nc; d.wav\n')],
)
def test_a_single_column_is_divided_by_what_the_ending_says(
    tmp_path: Path, ending: str, text: str
) -> None:
    found = find_inputs([put(str(tmp_path), f"l.{ending}", text)])
    assert [Path(item.uri).name for item in found.items] == ["a, b.wav", "c; d.wav"]


def test_a_row_with_too_many_fields_names_the_separator(tmp_path: Path) -> None:
    found = find_inputs([put(str(tmp_path), "l.csv", "uri;label\na.wav;x;y\n")])
    (failure,) = found.failures
    assert "has 3 fields, the header 2; quote the semicolons" in failure.message


def test_quotes_in_tab_separated_text_are_text_where_each_line_is_whole(tmp_path: Path) -> None:
    """Common Voice writes sentences as they are."""
    lines = [
        "path\tsentence\tup",
        'a.mp3\t"Hello" he said\t1',
        'b.mp3\t"never closed\t2',
        "c.mp3\tplain\t3",
        'd.mp3\tclosed"\t4',
        'e.mp3\t"quoted ""twice"""\t5',
        'f.mp3\t"two\nlines"\t6',
        'g.mp3\tlast "open\t7',
    ]
    found = find_inputs([put(str(tmp_path), "train.tsv", "\n".join(lines))])
    assert found.failures == ()
    sentences = {
        Path(item.uri).stem: json.loads(str(item.metadata))["sentence"] for item in found.items
    }
    assert sentences == {
        "a": "Hello he said",
        "b": '"never closed',
        "c": "plain",
        "d": 'closed"',
        "e": 'quoted "twice"',
        "f": "two\nlines",
        "g": 'last "open',
    }


def test_packed_manifests_are_found_by_a_glob_and_skipped_in_a_folder(folder: str) -> None:
    put(folder, "a.wav")
    put(folder, "l.csv.gz", gzip.compress(b"uri\na.wav\n"))
    assert list(as_dict(read_all(f"{folder}/*.csv.gz"))) == [f"{folder}/a.wav"]
    assert dict(find_inputs([folder]).skipped_by_extension) == {".csv.gz": 1}


@pytest.mark.parametrize("damage", [slice(0, -20), slice(0, 5)])
def test_a_packed_manifest_cut_short_is_a_container_that_failed(
    tmp_path: Path, damage: slice
) -> None:
    rows = b"".join(b'{"uri": "%d.wav", "x": "%d"}\n' % (n, n**9) for n in range(3000))
    listed = put(str(tmp_path), "l.jsonl.gz", gzip.compress(rows)[damage])
    found = find_inputs([listed])
    (failure,) = [one for one in found.failures if one.is_container]
    assert isinstance(failure, Failure)
    assert (failure.item.clip_id, failure.error_type) == (listed, "EOFError")


def test_what_is_not_gzip_is_a_container_that_failed(tmp_path: Path) -> None:
    listed = put(str(tmp_path), "l.csv.gz", "uri\na.wav\n")
    (failure,) = find_inputs([listed]).failures
    assert (failure.is_container, failure.error_type) == (True, "BadGzipFile")
