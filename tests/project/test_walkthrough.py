"""``docs/walkthrough.md``: its commands, Python and SQL run and print what it shows."""

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

from pipeline.cli import main as cli
from pipeline.config.load import load_config
from pipeline.config.train import TrainConfig
from tests.support.bird_factory import write_birds
from tests.support.docs import unknown_options
from tests.support.paths import ROOT
from transforms.models.ast.bundled import DEFAULT_MODEL, bundled_names

WALKTHROUGH = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
LEFT_OUT = "…"

needs_model = pytest.mark.skipif(
    DEFAULT_MODEL not in bundled_names(),
    reason=f"this checkout does not hold the model {DEFAULT_MODEL}, which the walkthrough uses",
)


class Block(NamedTuple):
    """A block of code, and the lines that the page says it prints."""

    language: str
    code: str
    expected: tuple[str, ...]


def blocks_of(part: str) -> list[Block]:
    """Return the blocks of a part that have a language, in order."""
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
    """Run a block. Python keeps its names from block to block."""
    if block.language == "bash":
        for arguments in commands_of(block):
            assert cli.main(arguments) == 0
    elif block.language == "python":
        exec(compile(block.code, "docs/walkthrough.md", "exec"), names)
    else:
        assert block.language == "sql"
        print(duckdb.sql(block.code))


def pattern_of(line: str) -> str:
    """Return a regular expression for a line: ``…`` matches anything, a figure any figure."""
    figure = r"(?:\d+\.\d+(?:e-\d+)?|nan|inf)"
    pattern = re.sub(r"\d+\\\.\d+(?:e\\-\d+)?", lambda _: figure, re.escape(blur(line)))
    return pattern.replace(LEFT_OUT, ".*")


def blur(line: str) -> str:
    return " ".join(line.split())


def missing_lines(expected: Sequence[str], *streams: str) -> list[str]:
    """Return the expected lines that no stream has after the lines found before."""
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
    """Change to a working folder with ``samples/`` and ``birds/``."""
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
def test_a_dataset_of_your_own(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_part("A dataset of your own", capfd)
    with (here / "birds-model" / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) / 2
    record = json.loads((here / "birds-model" / "train.json").read_text())
    measured = json.loads((here / "birds-stats" / "preprocessor_config.json").read_text())
    assert (record["mean"], record["std"]) == (measured["mean"], measured["std"])
    figures = json.loads((here / "held-out" / "evaluation" / "evaluation.json").read_text())
    assert figures["accuracy"] == record["best"]["accuracy"] == 1.0


def test_the_page_shows_the_manifest(here: Path) -> None:
    (shown,) = re.findall(r"^```\n(uri,.*?)…\n```$", WALKTHROUGH, re.MULTILINE | re.DOTALL)
    text = (here / "birds" / "birds.csv").read_text()
    assert text.startswith(shown)
    assert text.count("\n") == 1 + 24


def test_commands_and_their_options_exist() -> None:
    """Check the options even without the model that the blocks need."""
    parts = re.findall(r"^## (.*)$", WALKTHROUGH, re.MULTILINE)
    lines = [
        arguments
        for part in parts
        for block in blocks_of(part)
        if block.language == "bash"
        for arguments in commands_of(block)
    ]
    assert {line[0] for line in lines} == {
        *("label", "summary", "export", "plan", "stats", "train", "evaluate")
    }
    assert [line for line in lines if unknown_options(*line)] == []


def test_recommended_settings_exist() -> None:
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
