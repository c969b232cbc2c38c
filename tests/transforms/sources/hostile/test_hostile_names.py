"""Hostile folders and names, which come back exactly and do not command the terminal."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
import socket
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pytest

from pipeline.cli import main as cli
from tests.support.containers import END, GOOD, member, write
from tests.support.watched_label import Label
from transforms.errors import InputError
from transforms.sources.clip_ids import for_terminal
from transforms.sources.read_unit import find_inputs


def test_loops_links_pipes_and_sockets_in_folders(label: Label) -> None:
    inside = label.inside
    (inside / "sub").mkdir()
    (inside / "sub" / "good.wav").write_bytes(GOOD)
    (inside / "sub" / "up").symlink_to("..")
    (inside / "sub" / "here").symlink_to(".")
    (inside / "0-again").symlink_to("sub")  # a folder is listed under its own path
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
def test_a_named_pipe_does_not_hang(label: Label, name: str) -> None:
    os.mkfifo(label.inside / name)
    try:
        code = label(label.inside / name)
    except InputError as error:
        assert "is a pipe, socket or device" in str(error) or "holds no rows" in str(error)
    else:
        ((_, message),) = label.errors().values()
        assert "pipe, socket or device" in message
        assert code == (0 if name.endswith(".wav") else 3)


# Names


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
    """Encode ``%``, ``#``, ``@`` and bytes that are not UTF-8, as the documentation says."""
    name = name.replace("%", "%25").replace("#", "%23").replace("@", "%40")
    return "".join(
        f"%{ord(char) - 0xDC00:02X}" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in name
    )


def original(clip_id: str) -> bytes:
    """Decode the name in a clip id."""
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


# The terminal


def has_commands(text: str) -> bool:
    """Whether a text has anything but line ends that a terminal obeys."""
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
