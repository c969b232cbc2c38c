"""The README and the pages it leads to: their commands, SQL and Python run as they stand."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import draw_labels
from pipeline.cli import main as cli
from pipeline.config.label import RunConfig
from pipeline.config.load import load_config, shipped_configs
from pipeline.runners.options import pipeline_options
from tests.support.bird_factory import write_birds
from tests.support.docs import COMMANDS, marked_block, options_of, unknown_options
from tests.support.fake_hub import serve_hub
from tests.support.model_factory import write_tiny_model
from tests.support.paths import ROOT
from transforms.models.ast.bundled import DEFAULT_MODEL, bundled_model, describe_default
from transforms.models.labels import audioset_labels

README = (ROOT / "README.md").read_text(encoding="utf-8")
# The README and the pages that continue it.
PAGES = "\n".join(
    (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "docs/label.md",
        "docs/train.md",
        "docs/python.md",
        "samples/README.md",
    )
)
MODEL = "MIT/ast-finetuned-audioset-10-10-0.4593"
SAMPLES = sorted(
    path.name
    for path in (ROOT / "samples").iterdir()
    if path.suffix in {".wav", ".flac", ".ogg", ".mp3"}
)
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def block(marker: str) -> str:
    return marked_block(PAGES, marker)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return an environment with a local hub, whose model is small but as wide as the real one."""
    folder = tmp_path_factory.mktemp("hub")
    model = write_tiny_model(
        folder / "model",
        hidden_size=768,
        num_hidden_layers=1,
        intermediate_size=64,
        problem_type=None,
        id2label=dict(enumerate(label.name for label in audioset_labels())),
        label2id={},
        num_labels=527,
    )
    kept = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    with serve_hub(model, MODEL) as hub:
        yield {
            **kept,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def label_samples(command: str, out: Path, environment: dict[str, str]) -> str:
    """Run a command of the README into another folder and return its messages."""
    program, *arguments = shlex.split(command)
    assert (program, arguments[:2]) == (".venv/bin/earmark", ["label", "samples/"])
    assert arguments[-2] == "--output"
    done = run([sys.executable, "-m", "pipeline", *arguments[:-1], str(out)], environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Label the samples with the README's first command, without a hub."""
    out: Path = tmp_path_factory.mktemp("readme") / "out"
    install, command = block("label-command").splitlines()
    assert install == "python3 -m venv .venv && .venv/bin/pip install ."
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(out.parent / "home")}
    said = label_samples(command, out, {**os.environ, **nowhere, "PYTHONPATH": str(ROOT)})
    assert describe_default() in said
    return out


def clips_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the labels of each sample by file name."""
    assert not list(out.glob("errors/*"))
    rows = pq.read_table(out / "clips", columns=["clip_id", "labels"]).to_pylist()
    return {Path(row["clip_id"]).name: row["labels"] for row in rows}


def test_the_first_command_labels_every_sample_without_a_network(labelled: Path) -> None:
    clips = clips_of(labelled)
    assert sorted(clips) == SAMPLES
    assert len(SAMPLES) == 10
    names = set(bundled_model(DEFAULT_MODEL).labels)
    for labels in clips.values():
        assert {label["name"] for label in labels} == names
        assert sum(label["score"] for label in labels) == pytest.approx(1.0, abs=1e-4)


def samples_table() -> dict[str, list[tuple[str, float]]]:
    """Return the two best labels of each sample from the table of the samples."""
    table = PAGES.split("<!-- samples-table -->\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    labels = {name: [text.split() for text in texts] for name, *texts in rows}
    return {
        name.strip("`"): [(word, float(score)) for word, score in pairs]
        for name, pairs in labels.items()
    }


def test_the_table_of_the_samples_shows_the_result(labelled: Path) -> None:
    clips = clips_of(labelled)
    assert list(samples_table()) == SAMPLES
    for name, pairs in samples_table().items():
        for (word, score), label in zip(pairs, clips[name], strict=False):
            assert word == label["name"]
            # Half precision rounds differently on another chip.
            assert score == pytest.approx(label["score"], abs=0.03)


def labels_in(picture: Path) -> dict[str, list[tuple[str, float]]]:
    """Return the two best labels of each clip from a picture's metadata."""
    with Image.open(picture) as image:
        labels = json.loads(image.info["labels"])
    return {name: list(scores.items())[:2] for name, scores in labels.items()}


def test_the_picture_shows_the_labels_of_the_table(labelled: Path, tmp_path: Path) -> None:
    assert labels_in(ROOT / "docs" / "labels.png") == samples_table()
    draw_labels.main([str(labelled), str(tmp_path / "labels.png")])
    drawn = labels_in(tmp_path / "labels.png")
    assert {name: [word for word, _ in pairs] for name, pairs in drawn.items()} == {
        name: [word for word, _ in pairs] for name, pairs in samples_table().items()
    }


def test_the_command_with_audiosets_labels_works(
    environment: dict[str, str], tmp_path: Path
) -> None:
    label_samples(block("audioset-command").strip(), tmp_path / "out", environment)
    clips = clips_of(tmp_path / "out")
    assert sorted(clips) == SAMPLES
    names = {label.name for label in audioset_labels()}
    for labels in clips.values():
        assert len(labels) == 10
        assert {label["name"] for label in labels} <= names
        assert all(label["id"].startswith("/") for label in labels)


def test_the_output_is_what_the_readme_draws(labelled: Path) -> None:
    tree = PAGES.split("```\nout/\n")[1].split("```")[0]
    drawn = {line.split()[0].split("/")[0] for line in tree.splitlines()}
    assert {path.name for path in labelled.iterdir()} - {"_staging"} == drawn - {"errors"}


def test_the_queries_find_something(labelled: Path) -> None:
    text = (block("query") + block("first-query")).replace("'out/", f"'{labelled}/")
    best, nearest, counts = (
        duckdb.sql(statement).fetchall() for statement in text.split(";") if statement.strip()
    )
    assert sorted(Path(row[0]).name for row in best) == SAMPLES
    assert [row[2] for row in best] == sorted((row[2] for row in best), reverse=True)
    assert len(nearest) == 3
    assert not any("rain" in Path(name).name for name, _ in nearest)
    assert [row[1] for row in nearest] == sorted((row[1] for row in nearest), reverse=True)
    assert sum(row[1] for row in counts) == 10
    assert counts[0][0] == "rain"


def test_the_python_example_prints_the_labels_of_a_sound(environment: dict[str, str]) -> None:
    done = run([sys.executable, "-c", block("python")], environment)
    assert done.returncode == 0, done.stderr
    assert len(block("python").replace("\n\n", "\n").splitlines()) == 5
    best = ast.literal_eval(done.stdout)
    assert len(best) == 3
    assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)
    assert {name for name, _ in best} <= {label.name for label in audioset_labels()}


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder, with a ``birds.csv`` of five folds."""
    folder = tmp_path / "birds"
    write_birds(folder, num_folds=5)
    monkeypatch.chdir(folder)
    return folder


def run_here(command: list[str], model: Path) -> None:
    """Run a command of the README in this process, with a small model and two epochs."""
    program, *arguments = [str(model) if word == MODEL else word for word in command]
    assert program == "earmark"
    short = ["--epochs", "2"] if arguments[0] == "train" else []
    assert cli.main([*arguments, *short]) == 0


def test_the_training_commands_go_from_a_manifest_to_a_figure(
    birds: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    commands = block("train-commands").replace("\\\n", " ").splitlines()
    assert [shlex.split(line)[1] for line in commands] == ["stats", "train", "label", "evaluate"]
    for line in commands:
        run_here(shlex.split(line), tiny_model)
    record = json.loads((birds / "birds-model" / "train.json").read_text())
    measured = json.loads((birds / "birds-stats" / "preprocessor_config.json").read_text())
    assert (record["mean"], record["std"]) == (measured["mean"], measured["std"])
    assert record["clips"] == {"train": 18, "validation": 6}
    figures = json.loads((birds / "held-out" / "evaluation" / "evaluation.json").read_text())
    assert figures["counts"]["clips"] == 6
    assert figures["accuracy"] == record["best"]["accuracy"]
    assert f"accuracy {figures['accuracy']:.4f}" in capfd.readouterr().out

    tree = PAGES.split("<!-- train-output -->\n```\nbirds-model/\n")[1].split("```")[0]
    drawn = {name for line in tree.splitlines() for name in re.split(r" {2,}", line)[1].split()}
    written = {path.name + "/" * path.is_dir() for path in (birds / "birds-model").iterdir()}
    assert drawn - written == {"averaged/", "errors.parquet"}
    assert written <= drawn


@pytest.mark.slow
def test_the_loop_of_a_cross_validation_gives_one_figure_over_all_clips(
    birds: Path, tiny_model: Path
) -> None:
    shell = f'earmark() {{ printf "%s\\n" "earmark $*"; }}\n{block("cross-validation")}'
    lines = run(["bash", "-euc", shell], dict(os.environ)).stdout.splitlines()
    assert len(lines) == 11
    for line in lines:
        run_here(shlex.split(line), tiny_model)
    (evaluation,) = birds.glob("*/evaluation/evaluation.json")
    figures = json.loads(evaluation.read_text())
    assert figures["counts"]["clips"] == 24
    assert figures["combined"] == "5 results without a clip in common, taken together"
    assert len(list((birds / "decoded").iterdir())) == 1


def test_the_recipes_are_those_that_ship_with_the_figures_that_they_name() -> None:
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(\.\./configs/train/(\w+)\.yaml\) .* \| (mAP|accuracy) (0\.\d{4}) \|$",
        PAGES,
        re.MULTILINE,
    )
    assert [name for name, _, _, _ in rows] == sorted(set(shipped_configs("train")) - {"default"})
    for name, file, metric, figure in rows:
        assert name == file
        head = (ROOT / "configs" / "train" / f"{file}.yaml").read_text(encoding="utf-8")
        assert (figure if metric == "mAP" else f"{100 * float(figure):.2f} %") in head


def test_every_option_in_the_pages_exists() -> None:
    text = PAGES.replace("--index-url", "")  # pip's
    known = {"--help"}.union(*map(options_of, COMMANDS))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - {"--runner"}
    assert mentioned <= known
    assert len(mentioned) > 5


def test_every_command_in_the_readme_exists() -> None:
    assert set(re.findall(r"(?:`|/)earmark ([a-z]+)", README)) == set(COMMANDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_commands_that_head_a_config_are_right(path: Path) -> None:
    head = re.sub(r" \\\n#\s+", " ", path.read_text(encoding="utf-8"))
    lines = re.findall(r"^#   earmark (.*)$", head, re.MULTILINE)
    assert lines
    for line in lines:
        (command, *arguments), beam_options = cli.split_beam_options(shlex.split(line))
        pipeline_options(RunConfig(), beam_options)  # refuses what Beam does not know
        assert unknown_options(command, *arguments) == set()
        named = arguments[arguments.index("--config") + 1] if "--config" in arguments else None
        if named not in (None, "mine.yaml"):
            assert named == path.stem
        if path.name != "default.yaml":
            assert load_config(RunConfig, named) == load_config(RunConfig, str(path))
        for key in re.findall(r"--set (\S+)=", line):
            load_config(RunConfig, sets=[f"{key}=0.25"])


PAGE_FILES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    links = re.findall(
        r"\]\((?!https?://)([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")
    )
    for name, anchor in links:
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors_of(target), f"{name}#{anchor}"
