"""What ``docs/walkthrough.md`` tells people to do, done: its commands, its Python, its SQL."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pytest
import typer

from pipeline.cli import main as cli
from pipeline.config.load import load_config
from pipeline.config.train import TrainConfig
from tests.support.bird_factory import write_birds
from tests.support.paths import ROOT
from transforms.models.ast.bundled import DEFAULT_MODEL, bundled_names

WALKTHROUGH = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
LEFT_OUT = "…"

needs_model = pytest.mark.skipif(
    DEFAULT_MODEL not in bundled_names(),
    reason=f"this checkout does not hold the model {DEFAULT_MODEL}, which the walkthrough uses",
)


class Block(NamedTuple):
    """A block of code, and the lines that it is said to print."""

    language: str
    code: str
    expected: tuple[str, ...]


def blocks_of(part: str) -> list[Block]:
    """The blocks of a part, in order; those of no language, which only show something, left out."""
    (text,) = re.findall(rf"^## {part}\n(.*?)(?=^## |\Z)", WALKTHROUGH, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks: list[Block] = []
    for language, code in found:
        if language == "text":
            blocks[-1] = blocks[-1]._replace(expected=tuple(code.splitlines()))
        elif language:
            blocks.append(Block(language, code, ()))
    return blocks


def commands_of(block: Block) -> Iterator[list[str]]:
    for line in block.code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "earmark"
        yield arguments


def run_block(block: Block, names: dict[str, Any]) -> None:
    """Do what a block says; Python keeps its names from block to block."""
    if block.language == "bash":
        for arguments in commands_of(block):
            assert cli.main(arguments) == 0
    elif block.language == "python":
        exec(compile(block.code, "docs/walkthrough.md", "exec"), names)
    else:
        assert block.language == "sql"
        print(duckdb.sql(block.code))


def pattern_of(line: str) -> str:
    """A regular expression for a line: ``…`` is anything, and so is what follows a point."""
    parts = [re.escape(part) for part in re.split(rf"{LEFT_OUT}|\d+\.\d+(?:e-\d+)?", blur(line))]
    gaps = re.findall(rf"{LEFT_OUT}|\d+\.\d+(?:e-\d+)?", blur(line))
    figure = r"(?:\d+\.\d+(?:e-\d+)?|nan|inf)"
    wild = [".*" if gap == LEFT_OUT else figure for gap in gaps]
    return "".join(text for pair in zip(parts, [*wild, ""], strict=True) for text in pair)


def blur(line: str) -> str:
    return " ".join(line.split())


def missing_lines(expected: Sequence[str], *streams: str) -> list[str]:
    """The expected lines that are in none of the streams, behind those found before in it."""
    left = [[blur(line) for line in stream.splitlines()] for stream in streams]
    missing = []
    for line in expected:
        pattern = re.compile(pattern_of(line))
        if line == LEFT_OUT:
            continue
        for lines in left:
            at = next((n for n, text in enumerate(lines) if pattern.fullmatch(text)), None)
            if at is not None:
                del lines[: at + 1]
                break
        else:
            missing.append(line)
    return missing


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with ``samples/`` and ``birds/``."""
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    write_birds(tmp_path / "birds")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_part(part: str, capfd: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "walkthrough"}
    capfd.readouterr()
    for block in blocks_of(part):
        run_block(block, names)
        out, err = capfd.readouterr()
        assert missing_lines(block.expected, out, err) == [], f"{block.code}\n{out}\n{err}"


@needs_model
def test_one_clip_in_python(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_part("One clip, in Python", capfd)


@needs_model
def test_a_folder_from_the_command_line(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_part("A folder, from the command line", capfd)
    track = here / "labelled" / "export" / "audacity" / "rooster.flac.txt"
    assert re.fullmatch(r"0\.0+\t5\.0+\trooster \(0\.\d+\)\n", track.read_text())


@pytest.mark.slow
@needs_model
def test_a_dataset_of_one_s_own(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_part("A dataset of your own", capfd)
    with (here / "birds-model" / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) / 2
    record = json.loads((here / "birds-model" / "train.json").read_text())
    measured = json.loads((here / "birds-stats" / "preprocessor_config.json").read_text())
    assert (record["mean"], record["std"]) == (measured["mean"], measured["std"])
    figures = json.loads((here / "held-out" / "evaluation" / "evaluation.json").read_text())
    assert figures["accuracy"] == record["best"]["accuracy"] == 1.0


def test_the_manifest_is_the_one_that_is_shown(here: Path) -> None:
    (shown,) = re.findall(r"^```\n(uri,.*?)…\n```$", WALKTHROUGH, re.MULTILINE | re.DOTALL)
    text = (here / "birds" / "birds.csv").read_text()
    assert text.startswith(shown)
    assert text.count("\n") == 1 + 24


def test_every_command_is_there_with_its_options() -> None:
    """Also where the model that the blocks need is not there."""
    parts = re.findall(r"^## (.*)$", WALKTHROUGH, re.MULTILINE)
    commands: Any = typer.main.get_command(cli.app)
    lines = [
        arguments
        for part in parts
        for block in blocks_of(part)
        if block.language == "bash"
        for arguments in commands_of(block)
    ]
    assert {line[0] for line in lines} == {"label", "export", "plan", "stats", "train", "evaluate"}
    for name, *arguments in lines:
        known = {
            option for parameter in commands.commands[name].params for option in parameter.opts
        }
        assert {word for word in arguments if word.startswith("--")} <= known


def test_every_setting_that_is_advised_exists() -> None:
    advised = re.findall(r"`(?:--set )?(\w+\.\w+)(?:=([\w.]+))?`", WALKTHROUGH)
    advised = [(key, value) for key, value in advised if TrainConfig.has_key(key) or value]
    assert len(advised) > 12
    settings = [f"{key}={value}" for key, value in advised if value]
    settings += ["train=birds.csv", "hold_out=fold=1", f"model.name={DEFAULT_MODEL}"]
    load_config(TrainConfig, sets=settings)


@pytest.mark.parametrize(
    ("expected", "printed", "is_there"),
    [
        (["loss 1.25, epoch 3"], "loss 0.5, epoch 3", True),
        (["loss 1.25, epoch 3"], "loss 0.5, epoch 4", False),
        (["Written: …/a", "…", "done"], "Written: /b/a\nmore\ndone", True),
        (["done", "Written: …/a"], "Written: /b/a\ndone", False),
        (["one (of 2)"], "one (of 2) more", False),
        (["a", "a"], "a", False),
    ],
)
def test_lines_are_found_in_order(expected: list[str], printed: str, is_there: bool) -> None:
    assert (missing_lines(expected, printed) == []) == is_there
