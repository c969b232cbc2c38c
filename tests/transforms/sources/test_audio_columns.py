"""Which column of a Parquet file is audio, by its schema or first rows; and tars without any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.support.audio_factory import encode, noise
from tests.support.containers import parquet_bytes, tar_bytes
from tests.support.sources import as_dict, failures, plan, put, read, read_all
from transforms.errors import InputError
from transforms.sources.read_unit import find_inputs

WAV = encode(noise(0.1), 16_000, "wav")
FLAC = encode(noise(0.1), 16_000, "flac")
MP3 = encode(noise(0.1), 16_000, "mp3")
M4A = encode(noise(0.1), 16_000, "m4a")
OGG = encode(noise(0.1), 16_000, "ogg")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
JPEG = b"\xff\xd8\xff\xe0" + bytes(100)
WEBP = b"RIFF\x10\0\0\0WEBPVP8 " + bytes(100)
HEIC = b"\0\0\0\x18ftypheic" + bytes(100)
NUMBERS = bytes(range(1, 200))  # an embedding, or whatever else


def structs(*cells: bytes | str) -> list[dict[str, Any]]:
    """Cells of the Hugging Face layout: bytes, or the path of a file."""
    return [
        {"bytes": None, "path": cell} if isinstance(cell, str) else {"bytes": cell, "path": None}
        for cell in cells
    ]


def column(*cells: bytes | str) -> pa.Array:
    return pa.array(structs(*cells), pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def table(declared: dict[str, str] | None = None, **columns: Any) -> bytes:
    made = pa.table(columns)
    if declared is not None:
        features = {name: {"_type": kind} for name, kind in declared.items()}
        info = json.dumps({"info": {"features": features}})
        made = made.replace_schema_metadata({b"huggingface": info.encode()})
    return parquet_bytes(made)


@pytest.mark.parametrize(
    ("data", "chosen", "note"),
    [
        # Plain cases say nothing.
        (table(audio=column(WAV)), WAV, None),
        (table(sound=column(FLAC)), FLAC, None),
        (table(data=[MP3]), MP3, None),
        (table({"b": "Audio"}, a=column(WAV), b=column(OGG)), OGG, None),
        (table({"image": "Image"}, image=column(JPEG), sound=column(OGG)), OGG, None),
        (table(image=column(JPEG), sound=column(M4A)), M4A, None),
        (table(image=[WEBP], sound=[WAV]), WAV, None),
        (table(image=[HEIC], sound=[M4A]), M4A, None),
        (
            table(digest=[NUMBERS], sound=[FLAC]),
            FLAC,
            "'sound' is read, and not 'digest': it is the first with rows that begin like audio.",
        ),
        # Of several, the first one.
        (
            table({"a": "Audio", "b": "Audio"}, x=[1], a=column(WAV), b=column(OGG)),
            WAV,
            "column 'a' is read, and not 'b': it is the first that the schema declares as Audio.",
        ),
        (
            table(mix=column(WAV), audio=column(OGG), x=[WAV]),
            OGG,
            "'audio' is read, and not 'mix', 'x': it is the first with rows that begin like audio.",
        ),
        (table(one=[MP3], two=[WAV]), MP3, "'one' is read, and not 'two'"),
        # Nothing speaks against it, and little for it.
        (
            table(data=[NUMBERS]),
            NUMBERS,
            "column 'data' is read, though its first rows begin like no kind of audio.",
        ),
        # No column with audio.
        (table(image=column(PNG)), None, "column 'image' holds a PNG picture"),
        (table(image=column("a.jpg", "b.jpg")), None, "column 'image' holds files such as a.jpg"),
        (table(data=[JPEG]), None, "column 'data' holds a JPEG picture"),
        (table(data=[WEBP, PNG]), None, "column 'data' holds a"),
        (table(one=[NUMBERS], two=[NUMBERS]), None, None),
        (table({"image": "Image"}, image=column(JPEG)), None, None),
    ],
)
def test_the_audio_column_is_chosen_and_said(
    folder: str, data: bytes, chosen: bytes | None, note: str | None
) -> None:
    put(folder, "beside.wav", "beside")
    url = put(folder, "t.parquet", data)
    found = find_inputs([folder])
    if note is None or chosen is None:
        assert [text for text in found.notes if "is read" in text] == []
    if note is not None:
        (said,) = found.notes
        assert said.startswith(f"{url}: ") and note in said
    if chosen is None:
        assert (found.containers, found.skipped_by_extension) == ((), {".parquet": 1})
        with pytest.raises(
            InputError, match=r"has neither an audio column.*Name the one"
        ) as raised:
            find_inputs([url])
        assert note is None or note in str(raised.value)
    else:
        assert found.skipped_by_extension == {}
        items = read(plan(found))
        assert as_dict(items)[f"{url}#row=0"] == chosen
        assert failures(items) == []


def test_shards_of_one_kind_are_said_once(folder: str) -> None:
    for number in range(3):
        put(folder, f"{number}.parquet", table(one=[MP3], two=[WAV]))
    (note,) = find_inputs([folder]).notes
    assert note.startswith(f"{folder}/0.parquet and 2 others like it: column 'one' is read")


def test_rows_without_a_value_leave_no_doubt(folder: str) -> None:
    """Null values say nothing of a column, so what its type says stands."""
    nothing = pa.array([None, None], pa.binary())
    put(folder, "t.parquet", parquet_bytes(pa.table({"data": nothing})))
    found = find_inputs([folder])
    assert len(found.containers) == 1
    assert len(failures(read(plan(found)))) == 2


PICTURES = [("a.jpg", JPEG), ("a.json", b"{}")]


@pytest.mark.parametrize(
    ("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.tgz", "w:gz")]
)
def test_a_tar_without_audio_in_a_folder_is_left_aside(folder: str, name: str, mode: str) -> None:
    tar = tar_bytes(PICTURES, mode)
    put(folder, f"pictures/{name}", tar)
    put(folder, "sounds.tar", tar_bytes([*PICTURES, ("b.wav", b"sound")]))
    put(folder, "a.wav")
    for inputs in ([folder], [f"{folder}/*", f"{folder}/pictures/*"], [folder, f"{folder}/*"]):
        if inputs[-1].endswith("pictures/*"):
            with pytest.raises(InputError, match=r"nothing to label .*1 \.tar without audio"):
                find_inputs(inputs)
            continue
        found = find_inputs(inputs)
        assert [one.uri for one in found.containers] == [f"{folder}/sounds.tar"]
        assert found.skipped_by_extension[".tar without audio"] == len(inputs)


def test_a_tar_without_audio_given_by_name_is_said(folder: str) -> None:
    (failure,) = read_all(put(folder, "x.tar", tar_bytes(PICTURES)))
    assert "no member has an audio or video extension" in failure.message


def test_a_damaged_tar_in_a_folder_is_not_left_aside(tmp_path: Path) -> None:
    whole = tar_bytes(PICTURES)
    put(str(tmp_path), "cut.tar", whole[:700])
    put(str(tmp_path), "none.tar", b"no tar")
    put(
        str(tmp_path),
        "late.tar",
        tar_bytes([(f"{n}.txt", b"") for n in range(300)] + [("a.wav", b"x")]),
    )
    found = find_inputs([str(tmp_path)])
    assert len(found.containers) == 3
    assert found.skipped_by_extension == {}
