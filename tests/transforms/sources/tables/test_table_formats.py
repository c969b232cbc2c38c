"""The tables of other tools: audiofolder, Kaldi, lhotse, NeMo, AudioSet; labels from folders."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.containers import tar_bytes
from tests.support.sources import SMALL_UNITS, described, plan, put, read
from transforms.errors import InputError
from transforms.records import Item
from transforms.sources.read_unit import Found, SourceSettings, TableSettings, find_inputs


def find(*inputs: str, **settings: Any) -> Found:
    return find_inputs(inputs, tables=TableSettings(**settings))


def span(item: Item) -> tuple[str, float | None, float | None]:
    return item.uri.rpartition("/")[2], item.start_s, item.end_s


def metadata(item: Item) -> dict[str, Any]:
    return dict(json.loads(item.metadata or "{}"))


def jsonl(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# --- audiofolder ---------------------------------------------------------------------------


@pytest.fixture
def audiofolder(folder: str) -> str:
    put(folder, "data/train/a.wav")
    put(folder, "data/train/b.wav")
    put(folder, "data/test/c.wav")
    put(folder, "data/train/metadata.csv", "file_name,label\na.wav,Dog\n")
    put(folder, "data/test/metadata.jsonl", jsonl({"file_name": "c.wav", "label": "Cat"}))
    return f"{folder}/data"


def test_an_audio_folder_is_read_with_its_tables(audiofolder: str) -> None:
    found = find(audiofolder, format="audiofolder")
    truths = {item.uri.removeprefix(audiofolder): item.truth for item in found.items}
    assert truths == {"/train/a.wav": ("Dog",), "/train/b.wav": None, "/test/c.wav": ("Cat",)}
    assert found.notes == ()


def test_a_folder_says_that_its_table_was_not_read(audiofolder: str) -> None:
    found = find(audiofolder)
    assert [item.truth for item in found.items] == [None, None, None]
    (note,) = found.warnings
    assert note.startswith(f"{audiofolder}/test/metadata.jsonl (and 1 more) lies in the folder and")
    assert "--format audiofolder" in note
    listed = f"{audiofolder}/train/metadata.csv"
    assert find(audiofolder, listed, f"{audiofolder}/test/metadata.jsonl").warnings == ()


def test_the_table_of_an_audio_folder_is_recognised(audiofolder: str) -> None:
    found = find(f"{audiofolder}/train/metadata.csv")
    assert [(item.uri, item.truth) for item in found.items] == [
        (f"{audiofolder}/train/a.wav", ("Dog",))
    ]
    (note,) = found.notes
    assert "is read as the metadata of a Hugging Face audio folder" in note


@pytest.mark.parametrize("name", ["audiofolder", "kaldi"])
def test_a_folder_without_the_table_of_the_format_is_refused(folder: str, name: Any) -> None:
    put(folder, "a.wav")
    with pytest.raises(InputError, match=f"holds no .*, which --format {name} reads"):
        find(folder, format=name)


@pytest.mark.parametrize(
    ("name", "text", "format_", "message"),
    [
        ("l.csv", "uri\na.wav\n", "lhotse", r"l\.csv is not a lhotse manifest, .*ends in \.json"),
        ("l.jsonl", '{"uri": "a.wav"}', "audioset", "is not AudioSet's segments"),
        ("l.csv", "uri\na.wav\n", "kaldi", r"is not a Kaldi wav\.scp"),
        ("l.csv", "uri\na.wav\n", "audiofolder", "has no column file_name"),
    ],
)
def test_a_table_that_is_not_of_the_named_format_is_refused(
    tmp_path: Path, name: str, text: str, format_: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        find(put(str(tmp_path), name, text), format=format_)


# --- Kaldi ---------------------------------------------------------------------------------


def test_kaldi_recordings_with_what_lies_beside(folder: str) -> None:
    put(folder, "audio/a b.wav")
    put(folder, "data/wav.scp", f"rec1 ../audio/a b.wav\nrec2\t{folder}/audio/c.wav\n\n")
    put(folder, "data/text", "rec1 HELLO  WORLD\n")
    put(folder, "data/utt2spk", "rec1 alice\nrec2 bob\n")
    found = find(f"{folder}/data/wav.scp")
    assert [span(item) for item in found.items] == [("a b.wav", None, None), ("c.wav", None, None)]
    assert [metadata(item) for item in found.items] == [
        {"utterance": "rec1", "text": "HELLO  WORLD", "speaker": "alice"},
        {"utterance": "rec2", "speaker": "bob"},
    ]
    (note,) = found.notes
    assert "wav.scp is read as a Kaldi wav.scp" in note
    assert [item.uri for item in find(f"{folder}/data", format="kaldi").items] == [
        item.uri for item in found.items
    ]


def test_kaldi_segments_and_lines_that_are_none(folder: str) -> None:
    put(folder, "wav.scp", "r1 a.wav\nr2 sph2pipe -f wav x.sph |\nr3 raw.ark:17\nr4\n")
    segments = "u1 r1 0.5 1.25\nu2 r1 2 -1\nu3 r2 0 1\nu4 r9 0 1\nu5 r1 0\nu6 r1 3 2\n"
    put(folder, "segments", segments)
    found = find(f"{folder}/wav.scp")
    assert [span(item) for item in found.items] == [("a.wav", 0.5, 1.25), ("a.wav", 2.0, None)]
    assert metadata(found.items[0]) == {"utterance": "u1", "recording": "r1"}
    told = {one.item.clip_id.partition("#")[2]: one.message for one in found.failures}
    for name, words in {
        "line=2": "is a command (sph2pipe -f wav x.sph |), and a table never runs one",
        "line=3": "names a place in a Kaldi archive",
        "line=4": "names no file",
        "segments=line=3": "is of r2, whose line in wav.scp is an error",
        "segments=line=4": "is of r9, which wav.scp does not have",
        "segments=line=5": "has 3 fields",
        "segments=line=6": "must be after its start",
    }.items():
        assert words in told.pop(name)
    assert told == {}
    same = find(f"{folder}/segments", format="kaldi")
    assert same.items == found.items


# --- lhotse --------------------------------------------------------------------------------


def recording(source: Any, kind: str = "file", **changes: Any) -> dict[str, Any]:
    sources = [{"type": kind, "channels": [0], "source": source}]
    facts = {"sampling_rate": 16_000, "num_samples": 80_000, "duration": 5.0, "channel_ids": [0]}
    return {"id": "r", "sources": sources, **facts, **changes}


def test_lhotse_recordings(folder: str) -> None:
    data = jsonl(recording("a.wav"), recording("https://x.org/b.wav", "url"))
    found = find(put(folder, "recordings.jsonl.gz", gzip.compress(data)))
    assert {span(item) for item in found.items} == {("a.wav", None, None), ("b.wav", None, None)}
    assert metadata(found.items[0]) == {"id": "r"}
    (note,) = found.notes
    assert note.endswith("recordings.jsonl.gz is read as a lhotse manifest.")


def test_lhotse_cuts_with_their_supervision(folder: str) -> None:
    supervision = {"id": "s", "recording_id": "r", "start": 0, "duration": 2.5, "channel": 0}
    supervision |= {"speaker": "alice", "custom": {"category": "Dog", "fold": 2}}
    cut = {"id": "c", "start": 1.5, "duration": 2.5, "channel": 0, "type": "MonoCut"}
    cut |= {"recording": recording("a.wav"), "supervisions": [supervision]}
    whole = {**cut, "id": "w", "start": 0, "duration": 5.0, "supervisions": []}
    listed = put(folder, "cuts.jsonl", jsonl(cut, whole))
    found = find(listed, columns=(("label", "category"),))
    assert [(span(item), item.truth) for item in found.items] == [
        (("a.wav", None, None), None),
        (("a.wav", 1.5, 4.0), ("Dog",)),
    ]
    assert metadata(found.items[1]) == {
        "id": "c",
        "channel": 0,
        "recording_id": "r",
        "speaker": "alice",
        "fold": 2,
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (recording("cat /etc/passwd", "command"), "is a command .*, and a table never runs one"),
        (recording("AAAA", "memory"), "has a source of type memory"),
        (recording("a.wav", transforms=[{"name": "Speed"}]), "has transforms"),
        (recording("a.wav", sources=[]), "has 0 sources"),
        ({"type": "MixedCut", "tracks": [{}]}, "is a MixedCut without a recording of its own"),
        ({"type": "PaddingCut", "duration": 3}, "is a PaddingCut without"),
        ({"id": "s", "text": "x"}, "is not a recording or a cut of lhotse"),
        ({"recording": recording("a.wav"), "start": "x", "duration": 1}, "has start_s = 'x'"),
    ],
)
def test_what_is_no_span_of_a_file_is_an_error(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    found = find(put(str(tmp_path), "x.jsonl", jsonl(recording("good.wav"), row)))
    assert [span(item)[0] for item in found.items] == ["good.wav"]
    (failure,) = found.failures
    assert failure.item.clip_id.endswith("#line=2")
    assert re.search(message, failure.message)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("wav.scp", b"r touch PROOF |\nr2 | touch PROOF\n"),
        ("x.jsonl", jsonl(recording("touch PROOF", "command"))),
        ("x.csv", b"uri\ntouch PROOF |\n"),
    ],
)
def test_no_table_runs_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    found = find(put(str(tmp_path), name, data))
    items = [*found.failures, *read(plan(found))]
    assert items
    assert all(one.error_type in ("CommandInTable", "FileNotFoundError") for one in items)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# --- NeMo and AudioSet ---------------------------------------------------------------------


def test_nemo_manifests_are_recognised(folder: str) -> None:
    rows = [
        {"audio_filepath": "a.wav", "duration": 4.0, "label": "Dog"},
        {"audio_filepath": "a.wav", "offset": 1.0, "duration": 2.0, "label": "Cat"},
    ]
    found = find(put(folder, "manifest.json", jsonl(*rows)))
    assert [(span(item), item.truth) for item in found.items] == [
        (("a.wav", None, None), ("Dog",)),
        (("a.wav", 1.0, 3.0), ("Cat",)),
    ]
    (note,) = found.notes
    assert note.endswith("manifest.json is read as a NeMo manifest.")


SEGMENTS = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=6, num_segs=6, num_unique_labels=3, num_positive_labels=6
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw"
-2PDE7hUArE, 30.000, 40.000, "/m/0k4j"
absent_____, 0.000, 10.000, "/m/0k4j"
twice______, 0.000, 10.000, "/m/0k4j"
broken line
"""


def test_audiosets_segments_are_the_files_of_their_names(folder: str) -> None:
    names = ("--PJHxphWEs.wav", "x/Y-0RWZT-miFs.flac", "-2PDE7hUArE_30.000_40.000.ogg")
    for name in (*names, "twice______.wav", "x/twice______.mp3", "other.wav"):
        put(folder, f"audio/{name}")
    listed = put(folder, "eval_segments.csv", SEGMENTS)
    found = find(listed, root=f"{folder}/audio")
    truths = {item.uri.removeprefix(f"{folder}/audio/"): item.truth for item in found.items}
    assert truths == {
        "--PJHxphWEs.wav": ("/m/09x0r", "/t/dd00088"),
        "x/Y-0RWZT-miFs.flac": ("/m/03v3yw",),
        "-2PDE7hUArE_30.000_40.000.ogg": ("/m/0k4j",),
    }
    assert all((item.start_s, item.end_s) == (None, None) for item in found.items)
    assert metadata(found.items[0])["start_seconds"] == 30.0
    told = [one.message.partition(".csv ")[2] for one in found.failures]
    assert told[0].startswith("has no file called absent_____ below")
    assert told[1].startswith("has 2 files called twice______: ")
    assert told[2] == "does not have the four fields of a segment"
    (note,) = found.notes
    assert "is read as AudioSet's segments" in note


def test_audiosets_segments_by_a_pattern(folder: str) -> None:
    found = find(
        put(folder, "s.csv", SEGMENTS.replace("broken line\n", "")), pattern="wav/{YTID}.wav"
    )
    assert found.failures == ()
    assert f"{folder}/wav/--PJHxphWEs.wav" in {item.uri for item in found.items}


# --- Labels from folders -------------------------------------------------------------------


def test_labels_from_folders(folder: str) -> None:
    for name in ("Dog/a.wav", "Sea Waves/deep/b.wav"):
        put(folder, name)
    members = [("Cat/m.wav", b"1"), ("n.wav", b"2"), ("Cat/o.wav", b"3")]
    put(folder, "x/t.tar", tar_bytes(members))
    listed = put(folder, "l.csv", "uri,label\nDog/a.wav,Poodle\nDog/c.wav,\n")
    settings = TableSettings(labels_from="folder")
    found = find_inputs([folder, listed], tables=settings)
    truths = {item.uri.removeprefix(folder): item.truth for item in found.items}
    assert truths == {
        "/Dog/a.wav": ("Poodle",),  # what a table says
        "/Dog/c.wav": ("Dog",),
        "/Sea Waves/deep/b.wav": ("deep",),
    }
    using = SourceSettings(windows_per_unit=SMALL_UNITS.windows_per_unit, tables=settings)
    inside = described(read(plan(dataclasses.replace(found, items=())), using))
    assert {name: truth for name, (truth, _) in inside.items()} == {
        "Cat/m.wav": ("Cat",),
        "n.wav": None,
        "Cat/o.wav": ("Cat",),
    }
