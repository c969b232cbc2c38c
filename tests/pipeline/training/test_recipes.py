"""The recipes that ship: AST's own values, headed by commands that work."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli import main as cli
from pipeline.cli.options import TRAIN
from pipeline.config.load import config_folder, load_config
from pipeline.config.schema import flatten
from pipeline.config.train import TrainConfig
from pipeline.training.output import VALIDATION_NAME
from pipeline.training.stages.schedule import schedule_factor
from transforms.models.ast.public import AUDIOSET_STATS, PUBLIC_CHECKPOINTS, SPEECH_COMMANDS_STATS
from transforms.sources.manifests import ManifestRow, read_manifest
from transforms.storage.urls import normalise

FOLDER = config_folder() / "train"
FILES = sorted(FOLDER.glob("*.yaml"))
IMAGENET = "facebook/deit-base-distilled-patch16-384"
AUDIOSET = "MIT/ast-finetuned-audioset-10-10-0.4593"

# egs/*/run*.sh and src/run.py of github.com/YuanGongND/ast.
OF_ALL = {
    "optimizer.name": "adam",
    "optimizer.betas": [0.95, 0.999],
    "optimizer.weight_decay": 5e-7,
    "optimizer.max_gradient_norm": None,
    "schedule.kind": "multistep",
    "schedule.warmup_interval": 50,
    "augmentation.mixup_beta": 10.0,
    "training.head": "new",
    "training.trained_layers": None,
}
OF_AUDIOSET = {
    "model.name": IMAGENET,
    "model.labels": "audioset",
    "model.frequency_stride": 10,
    "model.time_stride": 10,
    "model.max_length": 1024,
    "model.mean": AUDIOSET_STATS[0],
    "model.std": AUDIOSET_STATS[1],
    "training.batch_size": 12,
    "training.loss": "binary_cross_entropy",
    "training.metric": "mean_average_precision",
    "training.keep": "averaged",
    "schedule.decay_factor": 0.5,
    "schedule.warmup_steps": 1000,
    "augmentation.masked_mels": 48,
    "augmentation.masked_frames": 192,
    "augmentation.mixup_ratio": 0.5,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "audioset_balanced": {
        **OF_AUDIOSET,
        "optimizer.learning_rate": 5e-5,
        "training.epochs": 25,
        "training.sampler": "shuffle",
        "schedule.decay_start_epoch": 10,
        "schedule.decay_every_epochs": 5,
        "averaging.first_epoch": 6,
        "averaging.last_epoch": 25,
    },
    "audioset_full": {
        **OF_AUDIOSET,
        "optimizer.learning_rate": 1e-5,
        "training.epochs": 5,
        "training.sampler": "balanced",
        "schedule.decay_start_epoch": 2,
        "schedule.decay_every_epochs": 1,
        "averaging.first_epoch": 1,
        "averaging.last_epoch": 5,
    },
    "esc50": {
        "model.name": AUDIOSET,
        "model.labels": None,
        "model.max_length": 512,
        "model.mean": -6.6268077,
        "model.std": 5.358466,
        "optimizer.learning_rate": 1e-5,
        "training.epochs": 25,
        "training.batch_size": 48,
        "training.loss": "cross_entropy",
        "training.metric": "accuracy",
        "training.sampler": "shuffle",
        "training.keep": "last",
        "schedule.decay_start_epoch": 5,
        "schedule.decay_every_epochs": 1,
        "schedule.decay_factor": 0.85,
        "schedule.warmup_steps": 0,
        "augmentation.masked_mels": 24,
        "augmentation.masked_frames": 96,
        "augmentation.mixup_ratio": 0.0,
    },
    "speech_commands": {
        "model.name": IMAGENET,
        "model.labels": "speech_commands",
        "model.frequency_stride": 10,
        "model.time_stride": 10,
        "model.max_length": 128,
        "model.mean": SPEECH_COMMANDS_STATS[0],
        "model.std": SPEECH_COMMANDS_STATS[1],
        "optimizer.learning_rate": 2.5e-4,
        "training.epochs": 30,
        "training.batch_size": 128,
        "training.loss": "binary_cross_entropy",
        "training.metric": "accuracy",
        "training.sampler": "shuffle",
        "training.keep": "best",
        "schedule.decay_start_epoch": 5,
        "schedule.decay_every_epochs": 1,
        "schedule.decay_factor": 0.85,
        "schedule.warmup_steps": 0,
        "augmentation.masked_mels": 48,
        "augmentation.masked_frames": 48,
        "augmentation.mixup_ratio": 0.6,
        "augmentation.feature_noise": 0.1,
        "augmentation.shift_frames": 10,
    },
}


def load(name: str) -> TrainConfig:
    return load_config(TrainConfig, name)


def head_of(path: Path) -> str:
    """The comment that a file begins with, without its signs."""
    found = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert found is not None
    return re.sub(r"^# ?", "", found.group(), flags=re.MULTILINE)


def commands_of(path: Path) -> list[list[str]]:
    """The words of every ``earmark`` command that heads a file."""
    text = head_of(path).replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^ +earmark (.*)$", text, re.MULTILINE)]


def script_of(name: str) -> str:
    """The Python that a recipe's head gives for writing manifests."""
    (script,) = re.findall(r'python3 -c "\n(.*?)\n *"', head_of(FOLDER / f"{name}.yaml"), re.DOTALL)
    lines = script.splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)


def run_script(name: str, folder: Path) -> str:
    """Run it as a shell does that has it between double quotes."""
    text = script_of(name)
    assert not set(text) & set('"$`')
    return subprocess.run(
        ["bash", "-c", f'{shlex.quote(sys.executable)} -c "\n{text}\n"'],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_values_and_no_others(name: str) -> None:
    values = flatten(load(name).resolved())
    defaults = flatten(TrainConfig().resolved())
    assert values == defaults | OF_ALL | PUBLISHED[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_begins_with_commands_that_are_right(path: Path) -> None:
    found: Any = typer.main.get_command(cli.app)
    commands = commands_of(path)
    assert commands
    assert "train" in {command for command, *_ in commands}
    for command, *words in commands:
        options = {
            spelling
            for parameter in found.commands[command].params
            for spelling in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in words if word.startswith("-")} <= options
        if command == "train":
            check_training(path, words)


def check_training(path: Path, words: list[str]) -> None:
    """The command's own options and assignments give a valid configuration."""
    pairs = list(pairwise(words))
    sets = [value for word, value in pairs if word == "--set"]
    names = [value for word, value in pairs if word == "--config"]
    assert names in ([], ["mine.yaml"]) if path.stem == "default" else names == [path.stem]
    as_given = {"--learning-rate": float, "--seed": int, "--train": lambda text: (text,)}
    keys = {option.origin: option.key for option in TRAIN if option.key is not None}
    options = [
        (keys[word], as_given.get(word, str)(value), word) for word, value in pairs if word in keys
    ]
    assert {"--train", "--output"} <= {flag for _, _, flag in options}
    validation = tuple(value for word, value in pairs if word == "--validation")
    options.append(("validation", validation, "--validation"))
    load_config(TrainConfig, str(path), sets, options)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("audioset_full", [1e-5, 1e-5, 5e-6, 2.5e-6, 1.25e-6]),
        ("audioset_balanced", [5e-5] * 10 + [2.5e-5] * 5 + [1.25e-5] * 5 + [6.25e-6] * 5),
        ("esc50", [1e-5] * 5 + [1e-5 * 0.85**n for n in range(1, 21)]),
        ("speech_commands", [2.5e-4] * 5 + [2.5e-4 * 0.85**n for n in range(1, 26)]),
    ],
)
def test_the_learning_rate_epoch_by_epoch_is_the_published_one(
    name: str, rates: list[float]
) -> None:
    config = load(name)
    epochs, num_steps = config.training.epochs, 2000  # more than the warm-up takes
    last_steps = [epoch * num_steps + num_steps - 1 for epoch in range(epochs)]
    found = [
        config.optimizer.learning_rate * schedule_factor(config.schedule, step, num_steps, epochs)
        for step in last_steps
    ]
    assert found == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize("name", ["audioset_balanced", "audioset_full"])
def test_audioset_warms_up_over_a_thousand_steps_fifty_at_a_time(name: str) -> None:
    config = load(name)
    factors = [
        schedule_factor(config.schedule, step, 2000, config.training.epochs) for step in range(1100)
    ]
    assert factors == [*(step // 50 * 50 / 1000 for step in range(1001)), *([1.0] * 99)]


def test_the_six_models_of_the_published_average_are_public() -> None:
    (text,) = re.findall(r"for name in (.*); do", head_of(FOLDER / "audioset_full.yaml"))
    names = [f"MIT/ast-finetuned-audioset-{name}" for name in text.split()]
    published = {entry.hub_id for entry in PUBLIC_CHECKPOINTS if entry.labels == "audioset"}
    assert len(names) == 6
    assert set(names) == published - {AUDIOSET}


def truths_of(manifest: Path) -> dict[str, tuple[tuple[str, ...] | None, str | None]]:
    """What a manifest says of each file: labels and metadata."""
    rows = list(read_manifest(normalise(str(manifest))))
    assert all(isinstance(row, ManifestRow) for row in rows)
    return {
        str(Path(row.item.uri).relative_to(manifest.parent)): (row.item.truth, row.item.metadata)
        for row in rows
        if isinstance(row, ManifestRow)
    }


@pytest.fixture
def esc50_folder(tmp_path: Path) -> Path:
    """A folder laid out as the dataset is."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text(
        "filename,fold,target,category,esc10,src_file,take\n"
        "1-100032-A-0.wav,1,0,dog,True,100032,A\n"
        "2-100038-A-14.wav,2,14,chirping_birds,False,100038,A\n"
        "3-110913-A-10.wav,3,10,rain,True,110913,A\n"
        "5-117118-A-0.wav,5,0,dog,True,117118,A\n"
    )
    return tmp_path


def test_the_manifest_of_esc50_is_made_as_its_recipe_says(esc50_folder: Path) -> None:
    manifest = esc50_folder / "esc50.csv"
    manifest.write_text(run_script("esc50", esc50_folder))
    assert truths_of(manifest) == {
        "audio/1-100032-A-0.wav": (("dog",), '{"fold": "1"}'),
        "audio/2-100038-A-14.wav": (("chirping_birds",), '{"fold": "2"}'),
        "audio/3-110913-A-10.wav": (("rain",), '{"fold": "3"}'),
        "audio/5-117118-A-0.wav": (("dog",), '{"fold": "5"}'),
    }


def test_the_manifest_of_esc10_has_its_own_names_and_leaves_out_a_fold(esc50_folder: Path) -> None:
    manifest = esc50_folder / "esc10.csv"
    manifest.write_text(run_script("esc10", esc50_folder))
    assert truths_of(manifest) == {
        "audio/1-100032-A-0.wav": (("dog_bark",), '{"fold": "1"}'),
        "audio/3-110913-A-10.wav": (("rain",), '{"fold": "3"}'),
    }


def test_the_recipe_of_esc10_gives_the_labels_of_the_dataset(
    esc50_folder: Path, shared_data: Path
) -> None:
    categories = (
        "dog rain sea_waves crying_baby clock_tick sneezing helicopter chainsaw rooster "
        "crackling_fire"
    ).split()
    (esc50_folder / "meta" / "esc50.csv").write_text(
        "filename,fold,target,category,esc10,src_file,take\n"
        + "".join(f"{name}.wav,1,0,{name},True,0,A\n" for name in categories)
    )
    manifest = esc50_folder / "esc10.csv"
    manifest.write_text(run_script("esc10", esc50_folder))
    with (shared_data / "esc10" / "esc10.csv").open(newline="") as lines:
        labels = {row["label"] for row in csv.DictReader(lines)}
    assert {truth[0] for truth, _ in truths_of(manifest).values() if truth} == labels


def expanded(name: str) -> list[list[str]]:
    """The commands of a recipe's first loop and the one behind it, as a shell runs them."""
    head = head_of(FOLDER / f"{name}.yaml")
    (loop,) = re.findall(
        r"^ +for [^\n]*; do\n.*?^ +done\n *earmark [^\n]*\n", head, re.DOTALL | re.MULTILINE
    )
    said = subprocess.run(
        ["bash", "-c", f"earmark() {{ echo $*; }}; {loop}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [line.split() for line in said.splitlines()]


@pytest.mark.parametrize(("name", "num_folds"), [("esc50", 5), ("esc10", 4)])
def test_the_folds_are_evaluated_together_as_they_were_held_out(name: str, num_folds: int) -> None:
    commands = expanded(name)
    assert [words[0] for words in commands] == [*["train", "label"] * num_folds, "evaluate"]
    labelled = []
    for fold, (train, label) in enumerate(zip(commands[:-1:2], commands[1::2], strict=True), 1):
        given = dict(pairwise(train))
        assert given["--hold-out"] == f"fold={fold}"
        assert given["--cache"] == "decoded"
        assert label[1] == f"{given['--output']}/{VALIDATION_NAME}"
        assert dict(pairwise(label))["--model"] == given["--output"]
        labelled.append(dict(pairwise(label))["--output"])
    assert commands[-1] == ["evaluate", *labelled]
    assert len(set(labelled)) == num_folds


def test_the_manifests_of_speech_commands_are_made_as_its_recipe_says(tmp_path: Path) -> None:
    for name in ("yes/a.wav", "yes/b.wav", "no/a.wav", "no/c.wav", "_background_noise_/x.wav"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "validation_list.txt").write_text("yes/b.wav\n")
    (tmp_path / "testing_list.txt").write_text("no/a.wav\n")
    run_script("speech_commands", tmp_path)
    found = {
        part: {name: truth for name, (truth, _) in truths_of(tmp_path / f"{part}.csv").items()}
        for part in ("training", "validation", "testing")
    }
    assert found == {
        "training": {"yes/a.wav": ("yes",), "no/c.wav": ("no",)},
        "validation": {"yes/b.wav": ("yes",)},
        "testing": {"no/a.wav": ("no",)},
    }


@pytest.mark.parametrize(
    ("name", "folder", "parts"),
    [
        ("audioset_balanced", "balanced", ["balanced"]),
        ("audioset_full", "training", ["balanced", "unbalanced"]),
    ],
)
def test_the_manifest_of_audioset_is_made_as_its_recipe_says(
    tmp_path: Path, name: str, folder: str, parts: list[str]
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "--4gqARaEJE.wav").touch()
    for part in parts:
        (tmp_path / f"{part}_train_segments.csv").write_text(
            "# Segments csv created at Sun Mar  5 10:54:31 2017\n"
            "# num_ytids=2, num_segs=2, num_unique_labels=4, num_positive_labels=5\n"
            "# YTID, start_seconds, end_seconds, positive_labels\n"
            + (
                '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\n'
                '--BfvyPmVMo, 20.000, 30.000, "/m/03l9g"\n'
                if part == parts[-1]
                else ""
            )
        )
    manifest = tmp_path / "made.csv"
    manifest.write_text(run_script(name, tmp_path))
    assert truths_of(manifest) == {f"{folder}/--4gqARaEJE.wav": (("/m/068hy", "/m/07q6cd_"), None)}
