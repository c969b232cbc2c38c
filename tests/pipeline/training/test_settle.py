"""What a training decides about small sets and known labels, and what it says of its result."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cli import main as cli
from pipeline.config.train import TrainConfig, TrainingSection
from pipeline.training.settle import (
    Settled,
    Start,
    settle_training,
    warn_of_few_steps,
    warn_of_result,
)
from pipeline.training.stages import loop
from pipeline.training.stages.finetuning import Best
from tests.pipeline.training.small_trainings import (
    KINDS,
    Train,
    assert_same_weights,
    history,
    weights,
)
from tests.support.model_factory import write_tiny_model

HEAD = "classifier.dense.weight"


# --- Batches and epochs --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_clips", "batch_size", "epochs"),
    [(10, 8, 100), (24, 8, 67), (45, 8, 34), (60, 8, 25), (120, 16, 25), (250, 32, 25),
     (400, 48, 25), (100_000, 48, 25)],
)  # fmt: skip
def test_few_clips_get_small_batches_and_enough_steps(
    num_clips: int, batch_size: int, epochs: int
) -> None:
    settled = settle_training(TrainingSection(), num_clips, keeps_head=True, epochs_before=None)
    assert settled == (batch_size, epochs, "keep")
    assert settled.num_steps(num_clips) >= 200
    assert warn_of_few_steps(settled, num_clips) == []


def test_what_is_given_wins_and_what_a_training_had_is_kept() -> None:
    given = TrainingSection(batch_size=48, epochs=2)
    assert settle_training(given, 60, keeps_head=False, epochs_before=1) == (48, 2, "new")
    (line,) = warn_of_few_steps(Settled(48, 2, "new"), 60)
    assert line.startswith("4 optimizer steps in all are few to learn from.")
    assert "--batch-size 8 --epochs 25" in line
    assert settle_training(TrainingSection(), 60, keeps_head=False, epochs_before=50)[1] == 50


# --- What is said of the result --------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "before", "best", "last", "words"),
    [
        ("best", 0.9, Best(3, 0.95, 0.1), 0.8, None),
        ("best", 0.9, Best(3, 0.9, 0.1), 0.8, None),
        ("best", None, Best(3, 0.5, 0.1), 0.5, None),
        ("best", 0.9, Best(0, 0.9, 0.1), 0.8, "No epoch was better than the start"),
        ("best", 0.9, Best(3, 0.5, 0.1), 0.5, "was 0.9000 before and is 0.5000 after it"),
        ("last", 0.9, Best(3, 0.95, 0.1), 0.8, "was 0.9000 before and is 0.8000 after it"),
        ("averaged", 0.9, Best(3, 0.95, 0.1), 0.8, "was 0.9000 before and is 0.7000 after it"),
        ("best", 0.9, Best(4, 0.95, 0.1), 0.95, "--epochs 8 extends this training"),
        ("last", None, None, None, None),
    ],
)
def test_a_result_that_is_worse_or_unfinished_is_said_with_what_to_change(
    keep: str, before: float | None, best: Best | None, last: float | None, words: str | None
) -> None:
    changes: dict[str, Any] = {"training": {"keep": keep}, "averaging": {"moving_decay": 0.9}}
    figures = {"accuracy": before, "mean_average_precision": None, "loss": 0.1}
    row: Any = {"epoch": 4, "validation_accuracy": last, "averaged_accuracy": 0.7}
    lines = warn_of_result(
        TrainConfig.model_validate(changes),
        None if before is None else Start(figures, is_kept=False),
        best,
        row,
        learning_rate=1e-4,
    )
    assert len(lines) == (words is not None)
    assert words is None or words in lines[0]
    assert words is None or "extends" in words or "--learning-rate 3e-05" in lines[0]


# --- From the command line -------------------------------------------------------------------


@pytest.fixture
def learnt(train: Train, tmp_path: Path) -> Path:
    """A model that tells the three kinds of sounds apart."""
    assert train(tmp_path / "learnt", training__epochs=30).code == 0
    return tmp_path / "learnt"


def small_checkpoint(folder: Path, names: tuple[str, ...]) -> Path:
    labels = {"id2label": dict(enumerate(names)), "label2id": {}, "num_labels": len(names)}
    return write_tiny_model(folder / "tiny", **labels)


@pytest.mark.parametrize(
    ("names", "is_kept"),
    [
        (("tone", "noise", "clicks"), True),
        (("Tone", "noise", "CLICKS"), True),
        (("tone", "noise", "clicks", "other"), False),
        (("tone", "noise", "other"), False),
    ],
)
def test_labels_that_equal_the_checkpoints_keep_its_head(
    train: Train, tmp_path: Path, names: tuple[str, ...], is_kept: bool
) -> None:
    checkpoint = small_checkpoint(tmp_path, names)
    out = tmp_path / "out"
    settings: dict[str, Any] = {"training__epochs": 1, "optimizer__learning_rate": 1e-12}
    said = train(out, "--model", checkpoint, **settings)
    assert said.code == 0, said.err
    record = json.loads((out / "train.json").read_text())
    assert record["config"]["training"]["head"] == ("keep" if is_kept else "new")
    assert record["labels"] == (list(names) if is_kept else sorted(KINDS))
    is_same = weights(out)[HEAD].shape == weights(checkpoint)[HEAD].shape and torch.allclose(
        weights(out)[HEAD], weights(checkpoint)[HEAD], atol=1e-5
    )
    assert is_same == is_kept
    assert ("whose head is kept" in said.err) == is_kept
    knows_all = set(KINDS) < set(names)
    assert ("knows all of these labels; to keep its own" in said.err) == knows_all
    assert ("Before training: accuracy" in said.err) == (is_kept or knows_all)
    # The same command again, and one that says what was chosen.
    for changes in ({}, {"training__head": "keep" if is_kept else "new"}):
        again = train(out, "--model", checkpoint, **settings, **changes)
        assert (again.code, "is already trained" in again.out) == (0, True), again.err
    other = train(
        out, "--model", checkpoint, **settings, training__head="new" if is_kept else "keep"
    )
    assert (other.code, "training.head" in other.err) == (2, True)


def test_a_training_that_only_spoils_the_model_gives_the_model_that_it_began_with(
    train: Train, learnt: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = train(out, "--model", learnt, training__epochs=2, optimizer__learning_rate=0.3)
    assert said.code == 0, said.err
    assert "Before training: accuracy 1.0000" in said.err
    assert "The model has the weights that it started with." in said.out
    assert "No epoch was better than the start" in said.out
    assert_same_weights(out, learnt)
    record = json.loads((out / "train.json").read_text())
    assert (record["best"]["epoch"], record["best"]["accuracy"]) == (0, 1.0)
    assert record["start"]["figures"]["accuracy"] == 1.0
    assert len(record["warnings"]) == 1


def test_a_new_head_that_is_worse_than_the_old_one_is_said(
    train: Train, learnt: Path, tmp_path: Path
) -> None:
    said = train(
        tmp_path / "out",
        *("--model", learnt),
        training__head="new",
        training__epochs=1,
        optimizer__learning_rate=1e-12,
    )
    assert said.code == 0, said.err
    assert "Training has made the model worse: validation accuracy was 1.0000 before" in said.out
    assert "--set training.head=keep" in said.out
    assert "3 optimizer steps in all are few to learn from" in said.err


def test_more_epochs_extend_a_training_that_has_ended(train: Train, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schedule__kind": "multistep", "schedule__decay_start_epoch": 2}
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert train(out, **settings, training__epochs=3).code == 0
    said = train(out, **settings, training__epochs=5)
    assert said.code == 0, said.err
    assert "Resuming training: 3 of 5 epochs already done." in said.err
    assert train(whole, **settings, training__epochs=5).code == 0
    assert history(out) == history(whole)
    for folder in ("", "best", "last"):
        assert_same_weights(out / folder, whole / folder)
    assert json.loads((out / "train.json").read_text())["status"] == "done"
    fewer = train(out, **settings, training__epochs=4)
    assert (fewer.code, "training.epochs: 5 there, 4 now" in fewer.err) == (2, True)
    (out / loop.STATE_NAME).unlink()
    more = train(out, **settings, training__epochs=6)
    assert more.code == 2
    assert f"cannot be extended from 5 to 6 epochs: {out / loop.STATE_NAME}" in more.err
    assert_same_weights(out, whole)


def test_a_table_without_its_option_is_told_the_option(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "own.csv", "--output", "model"]) == 2
    assert "The clips to learn from are given as --train own.csv" in capfd.readouterr().err


@pytest.mark.slow
def test_sixty_clips_of_known_labels_do_not_make_the_bundled_model_worse(
    tmp_path: Path, shared_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shared_data / "esc10"
    with (folder / "esc10.csv").open(newline="") as file:
        rows = random.Random(0).sample(list(csv.DictReader(file)), 60)
    table = tmp_path / "own.csv"
    lines = [f"{folder}/audio/{row['filename']},{row['label']},{row['fold']}\n" for row in rows]
    table.write_text("uri,label,fold\n" + "".join(lines))
    arguments = ["--train", str(table), "--hold-out", "fold=1", "--model", "esc10"]
    assert cli.main(["train", *arguments, "-o", str(tmp_path / "model")]) == 0
    record = json.loads((tmp_path / "model" / "train.json").read_text())
    assert record["config"]["training"]["head"] == "keep"
    assert record["best"]["accuracy"] >= record["start"]["figures"]["accuracy"]
