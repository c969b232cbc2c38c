"""What people get wrong, through the command line: the exit code, the words, what is on disk.

Whatever is wrong with the command is exit code 2, names the thing and the next step, and writes
nothing. Whatever is wrong with an item is a row, and the rows add up.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from pipeline.cli import main as cli
from tests.support import audio_factory
from tests.support.containers import audio_table, tar_bytes

RATE_HZ = 16_000
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


@dataclasses.dataclass
class Said:
    """What a command gave back."""

    code: int
    words: str


class Earmark:
    """Runs ``earmark label`` with what is right; a test says what is wrong."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.model, self.capsys = folder, model, capsys
        self.out = folder / "out"
        self.good = audio_factory.write(folder / "good.wav", audio_factory.noise(1.0), RATE_HZ)

    def __call__(self, *arguments: Path | str, **options: Path | str) -> Said:
        given = {"model": self.model, "output": self.out, "device": "cpu", **options}
        flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        self.capsys.readouterr()
        code = cli.main(["label", *map(str, arguments), *flags, "--quiet"])
        out, words = self.capsys.readouterr()
        assert out == ""
        assert "Traceback" not in words
        return Said(code, words)

    def refuses(self, message: str, *arguments: Path | str, **options: Path | str) -> str:
        """The command is wrong: exit code 2, a message, and not a trace in the output."""
        before = set(self.folder.rglob("*"))
        said = self(*arguments, **options)
        assert said.code == 2, said.words
        assert re.search(message, said.words), said.words
        assert set(self.folder.rglob("*")) == before
        return said.words

    def rows(self, part: str) -> dict[str, dict[str, Any]]:
        rows = [
            row
            for path in (self.out / part).glob("*.parquet")
            for row in pq.read_table(path).to_pylist()
        ]
        return {row["clip_id"].removeprefix(f"{self.folder}/"): row for row in rows}

    def check_accounting(self, num_items: int) -> None:
        """Every item is a clip or a row that says why not, and the result is whole."""
        clips, errors = self.rows("clips"), self.rows("errors")
        assert not clips.keys() & errors.keys()
        totals = json.loads((self.out / "run.json").read_text())["totals"]
        counts = (totals["found_items"], totals["clips"], totals["failures"])
        assert counts == (num_items, len(clips), len(errors))
        assert num_items == len(clips) + len(errors)
        assert cli.main(["verify", str(self.out), "--quiet"]) == 0


@pytest.fixture
def earmark(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Earmark]:
    return Earmark(tmp_path, tiny_model, capsys)


# --- The input -----------------------------------------------------------------------------


def test_an_input_that_is_not_there(earmark: Earmark, tmp_path: Path) -> None:
    earmark.refuses(r"none\.wav does not exist; check the path", tmp_path / "none.wav")
    earmark.refuses(r"none/\*\.wav: the pattern matches no file; check it", tmp_path / "none/*.wav")
    # As an unset variable of the shell gives it; it must not mean the current folder.
    earmark.refuses(r"inputs is \['', a\.wav\] \(INPUT\); must hold no empty text", "", "a.wav")
    earmark.refuses(r"foo://x.* Protocol not known: foo; give a local path, or a URL", "foo://x")


def test_a_folder_that_holds_no_audio(earmark: Earmark, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    earmark.refuses("folder holds nothing to label; give files with audio", folder)
    (folder / "notes.txt").write_text("no sound")
    (folder / "list.csv").write_text("uri\na.wav\n")
    kinds = r"files of other kinds: 1 \.\w+, 1 \.\w+\); .*manifests count only when they are named"
    earmark.refuses(f"folder holds nothing to label .{kinds}", folder)


def test_files_that_cannot_be_an_input(earmark: Earmark, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no sound")
    earmark.refuses(r"notes\.txt is not audio.*must be renamed, or listed", tmp_path / "notes.txt")
    pq.write_table(pa.table({"x": [1], "y": ["a"]}), tmp_path / "numbers.parquet")
    words = r"numbers\.parquet has neither an audio column .*uri.*its columns: x, y\. Name the one"
    earmark.refuses(words, tmp_path / "numbers.parquet")
    (tmp_path / "list.csv").write_text("name\na.wav\n")
    words = r"list\.csv: no column names the files; expected one of uri, .*found name"
    earmark.refuses(words, tmp_path / "list.csv")
    (tmp_path / "empty.jsonl").write_text("")
    earmark.refuses(r"the manifest .*empty\.jsonl holds no rows", tmp_path / "empty.jsonl")
    earmark.out.mkdir()
    shutil.copy(earmark.good, earmark.out)
    earmark.refuses(r"lies in the output folder .*give another --output", earmark.out / "good.wav")


def test_containers_that_give_nothing_are_rows(earmark: Earmark, tmp_path: Path) -> None:
    folder = tmp_path / "containers"
    folder.mkdir()
    (folder / "no_audio.tar").write_bytes(tar_bytes([("a.txt", b"no sound")]))
    (folder / "fake.tar").write_bytes(b"this is no tar" * 1000)
    (folder / "zero.tar").write_bytes(b"")
    (folder / "fake.tar.gz").write_bytes(b"this is no gzip" * 1000)
    (folder / "fake.parquet").write_bytes(b"PAR1 but not really")
    said = earmark(folder)
    assert said.code == 3
    assert "1 .tar without audio" in said.words
    assert "4 of 4 items could not be labelled" in said.words
    assert "Among the failures: 4 containers (tar, Parquet, manifest) not read" in said.words
    causes = "2 ContainerError (not readable to its end), 2 InvalidHeaderError (not a tar archive)"
    assert f"Failures by cause: {causes}." in said.words
    errors = {Path(name).name: row["message"] for name, row in earmark.rows("errors").items()}
    for name, message in (
        ("fake.tar", "what is at byte 0 is not a tar header"),
        ("zero.tar", "ends at byte 0 without the zero blocks that end an archive"),
        ("fake.tar.gz", "what is at byte 0 is not a tar header"),
        ("fake.parquet", "is not a whole Parquet file"),
    ):
        assert message in errors.pop(name)
    assert errors == {}
    earmark.check_accounting(4)


def test_damaged_audio_is_labelled_with_a_warning_or_is_a_row(
    earmark: Earmark, tmp_path: Path
) -> None:
    folder = tmp_path / "mix"
    folder.mkdir()
    for name in ("wav", "flac", "ogg", "mp3"):
        whole = audio_factory.encode(audio_factory.noise(5.0), RATE_HZ, name)
        (folder / f"cut.{name}").write_bytes(whole[: len(whole) // 2])
    (folder / "random.wav").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "zero.wav").write_bytes(b"")
    audio_factory.write(folder / "short.wav", audio_factory.noise(0.01), RATE_HZ)
    samples = audio_factory.noise(2.0)
    samples[100] = np.nan
    soundfile.write(folder / "nan.wav", samples, RATE_HZ, subtype="FLOAT")
    said = earmark(folder)
    assert said.code == 3
    assert "4 of 8 items could not be labelled; the reasons are in" in said.words
    assert "--retry-failed" not in said.words
    assert "Failures by cause: 1 EmptyFile (no bytes), 1 NonFiniteSamples (samples" in said.words
    assert re.search(r"\n  EmptyFile, for example \S+zero\.wav: ", said.words)
    assert re.search(r"4 of 4 clips with a warning: \d cut_short", said.words)
    assert "That is more than --max-failed allows (0.05 of the items)." in said.words
    clips = earmark.rows("clips")
    assert sorted(clips) == ["mix/cut.flac", "mix/cut.mp3", "mix/cut.ogg", "mix/cut.wav"]
    for row in clips.values():
        assert 1.5 < row["duration_s"] < 3.0
        assert re.search(r"decoded \d\.\d of 5\.\d s|may have been cut short", row["warning"])
    errors = earmark.rows("errors")
    assert {name: row["error_type"] for name, row in errors.items()} == {
        "mix/random.wav": "NotAudio",
        "mix/zero.wav": "EmptyFile",
        "mix/short.wav": "TooShort",
        "mix/nan.wav": "NonFiniteSamples",
    }
    assert {row["stage"] for row in errors.values()} == {"decode"}
    earmark.check_accounting(8)


def test_bad_items_of_containers_are_tried_again_and_counted_once(
    earmark: Earmark, tmp_path: Path
) -> None:
    good = earmark.good.read_bytes()
    data = (good, b"no audio", good)
    inputs = tmp_path / "shard.tar", tmp_path / "shard.parquet"
    inputs[0].write_bytes(tar_bytes(zip(("a.wav", "b.wav", "c.wav"), data, strict=True)))
    pq.write_table(audio_table(*({"bytes": of_row} for of_row in data)), inputs[1])
    assert earmark(*inputs).code == 3
    names = {"shard.tar#b.wav", "shard.parquet#row=1"}
    assert earmark.rows("errors").keys() == names
    earmark.check_accounting(6)
    clips = earmark.rows("clips")
    assert earmark(*inputs, "--retry-failed").code == 3
    earmark.check_accounting(6)
    assert earmark.rows("errors").keys() == names
    assert earmark.rows("clips") == clips


# --- The model -----------------------------------------------------------------------------


def test_a_model_folder_that_is_wrong(earmark: Earmark, tmp_path: Path) -> None:
    folder = shutil.copytree(earmark.model, tmp_path / "spoilt")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    words = r"model\.safetensors cannot be read .*cut short or damaged; get it again"
    assert f"model {folder}: " in earmark.refuses(words, earmark.good, model=folder)
    shutil.rmtree(folder)
    words = "there is no such folder. Legal names: a hub id"
    assert f"model {folder}: " in earmark.refuses(words, earmark.good, model=folder)


def test_a_hub_that_cannot_be_reached(
    earmark: Earmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    earmark.refuses(
        "model org/unknown: cannot reach the hub .*; pass a local folder, or try again where",
        earmark.good,
        model="org/unknown",
    )


# --- The output ----------------------------------------------------------------------------


def test_an_output_that_cannot_be_written(earmark: Earmark, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    earmark.refuses(r"file is a file; --output needs a folder\. Give another path", earmark.good,
                    output=tmp_path / "file")  # fmt: skip
    earmark.refuses(r"output is '' \(--output\); must not be empty", earmark.good, output="")
    step = r"cannot be written: .*Give another --output, or fix its permissions"
    earmark.refuses(rf"file/out {step}", earmark.good, output=tmp_path / "file" / "out")
    read_only = f"{NOWHERE}/x: http:// can be read, not written; give a local folder"
    earmark.refuses(read_only, earmark.good, output=f"{NOWHERE}/x")
    earmark.refuses(r"foo://x .*Protocol not known: foo", earmark.good, output="foo://x")
    if Path("/proc/version").exists():  # nobody may write there, root neither
        earmark.refuses(f"/proc/earmark {step}", earmark.good, output="/proc/earmark")


def test_a_folder_of_somebody_else_s_is_not_taken_for_a_result(
    earmark: Earmark, tmp_path: Path
) -> None:
    earmark.out.mkdir()
    (earmark.out / "run.json").write_text('{"mine": true}')
    words = r"run\.json was not written by Earmark, or is damaged; give another --output"
    earmark.refuses(words, earmark.good)


# --- Options and keys ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--hop-s 11", r"window\.hop_s is 11\.0; must be in \(0, 10\.255\]"),
        ("--window-s 20", r"window\.length_s is 20\.0; must be in \[0\.025, 10\.255\]"),
        (
            "--precision int8",
            r"precision is int8 .*openvino: not installed: .*torch: it has no int8; use --prec",
        ),
    ],
)
def test_options_and_keys_that_are_wrong(earmark: Earmark, arguments: str, message: str) -> None:
    earmark.refuses(message, earmark.good, *arguments.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(earmark: Earmark) -> None:
    words = r"device is cuda; this machine has .*Use --device auto"
    earmark.refuses(words, earmark.good, device="cuda")
