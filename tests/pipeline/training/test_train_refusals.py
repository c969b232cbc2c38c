"""``earmark train`` refuses what is wrong, and overwrites nothing."""

from __future__ import annotations

import csv
import errno
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.training.stages import loop
from tests.pipeline.training.small_trainings import (
    RATE_HZ,
    Train,
    assert_same_weights,
    everything_in,
    history,
)
from tests.support import audio_factory
from tests.support.model_factory import TINY_LABELS, write_tiny_model
from transforms.storage import filesystem, writing


def test_overwriting_removes_no_model_that_no_training_wrote(train: Train, tmp_path: Path) -> None:
    foreign = write_tiny_model(tmp_path / "mine")
    before = everything_in(foreign)
    said = train(foreign, "--overwrite", training__epochs=1)
    assert said.code == 2
    assert "no train.json" in said.err
    assert everything_in(foreign) == before


@pytest.mark.parametrize("part", ["", "best"])
def test_overwriting_does_not_remove_what_training_starts_from(
    train: Train, tmp_path: Path, part: str
) -> None:
    assert train(tmp_path / "model", training__epochs=1).code == 0
    before = everything_in(tmp_path / "model")
    said = train(
        tmp_path / "model", "--overwrite", "--model", tmp_path / "model" / part, training__epochs=1
    )
    assert said.code == 2
    assert "which --overwrite removes" in said.err
    assert everything_in(tmp_path / "model") == before


def test_a_metric_that_cannot_be_computed_is_refused_before_training(
    train: Train, manifest: Path, tmp_path: Path
) -> None:
    several = manifest.with_name("several.csv")
    rows = list(csv.DictReader(manifest.open(newline="")))
    lines = [
        f"{row['uri']},{row['label']}{';noise' if row['label'] == 'tone' else ''},{row['fold']}\n"
        for row in rows
    ]
    several.write_text("uri,labels,fold\n" + "".join(lines))
    settings = {"training__loss": "binary_cross_entropy", "training__epochs": 1}
    said = train(tmp_path / "out", "--train", several, **settings)
    assert said.code == 2
    assert (
        "which needs exactly one label per clip; 2 of 6 validation clips have more or none"
        in said.err
    )
    assert "training.metric=mean_average_precision" in said.err
    assert not (tmp_path / "out" / "train.json").exists()
    said = train(
        tmp_path / "out",
        *("--train", several),
        training__metric="mean_average_precision",
        training__sampler="balanced",
        **settings,
    )
    assert said.code == 0, said.err
    assert [row["validation_accuracy"] for row in history(tmp_path / "out")] == [""]


def test_weights_that_the_last_step_ruins_are_not_saved(train: Train, tmp_path: Path) -> None:
    said = train(
        tmp_path / "out",
        optimizer__learning_rate=1e37,
        optimizer__weight_decay=1e6,
        training__epochs=1,
        training__batch_size=100,
        training__keep="last",
    )
    assert said.code == 1
    assert "NaN or infinite by the end of epoch 1" in said.err
    assert not (tmp_path / "out" / loop.STATE_NAME).exists()
    assert not (tmp_path / "out" / "last").exists()


@pytest.mark.parametrize("which", ["--train", "--validation"])
def test_a_folder_without_labels_is_refused_before_it_is_decoded(
    train: Train, tmp_path: Path, which: str
) -> None:
    folder = tmp_path / "birds"
    folder.mkdir()
    (folder / "broken.wav").write_bytes(b"what no decoder takes")
    (folder / "birds.csv").write_text("uri,label\nbroken.wav,wren\n")
    (folder / "notes.txt").write_text("heard at dawn")
    said = train(tmp_path / "out", which, folder, training__epochs=1)
    assert said.code == 2
    name = {"--train": "training", "--validation": "validation"}[which]
    assert f"none of 1 {name} clip has a label; expected a manifest" in said.err
    assert "Files in the folder that were skipped: 1 .csv. Manifests count only when" in said.err
    assert "give that file instead of the folder" in said.err
    assert ".txt" not in said.err.partition("were skipped:")[2]
    assert not (tmp_path / "out").exists()


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hold-out", "Fold=1"], "no clip has a column Fold; the existing columns are: fold"),
        (["--hold-out", "fold=7"], "no clip has this value; fold has 4 values: 0, 1, 2, 3"),
        pytest.param(
            ["--device", "cuda"], "training.device is cuda; this machine has", marks=NO_GPU
        ),
        pytest.param(
            ["--precision", "fp16"],
            "training.precision is fp16, and the device is the CPU",
            marks=NO_GPU,
        ),
        (
            ["--set", "training.trained_layers=9"],
            "training.trained_layers is 9; the model has 2 layers",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_decoding(
    train: Train, tmp_path: Path, options: list[str], words: str
) -> None:
    checkpoint = write_tiny_model(tmp_path / "tiny")
    said = train(tmp_path / "out", "--model", checkpoint, *options, training__epochs=1)
    assert (said.code, words in said.err) == (2, True), said.err
    assert "decoding" not in said.err
    assert not (tmp_path / "out").exists()


def test_another_training_is_left_alone(train: Train, tmp_path: Path, manifest: Path) -> None:
    assert train(tmp_path / "model", training__epochs=1).code == 0
    before = everything_in(tmp_path / "model")
    said = train(tmp_path / "model", training__epochs=1, optimizer__learning_rate=0.5)
    assert said.code == 2
    assert "holds another training:\n  optimizer.learning_rate: 0.003 there, 0.5 now" in said.err
    said = train(tmp_path / "model", training__epochs=1, cache__dtype="int16")
    assert (said.code, 'cache.dtype: "float32" there, "int16" now' in said.err) == (2, True)
    said = train(tmp_path / "model", "--hold-out", "fold=2", training__epochs=1)
    assert (said.code, "fold=1" in said.err and "fold=2" in said.err) == (2, True)
    rows = manifest.read_text().splitlines()
    fewer = manifest.with_name("fewer.csv")
    fewer.write_text("\n".join(rows[:-1]) + "\n")
    said = train(tmp_path / "model", "--train", fewer, training__epochs=1)
    assert (said.code, "data.train" in said.err) == (2, True)
    kept = everything_in(tmp_path / "model")
    assert {name: kept[name] for name in before} == before


def test_a_folder_of_something_else_is_left_alone(train: Train, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all my work")
    for options in ((), ("--overwrite",)):
        said = train(tmp_path, *options, training__epochs=1)
        assert (tmp_path / "thesis.txt").read_text() == "all my work"
        if not options:
            assert said.code == 2
            assert "thesis.txt" in said.err
            assert everything_in(tmp_path) == {"thesis.txt": b"all my work"}


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_what_was_saved(
    train: Train, tmp_path: Path
) -> None:
    said = train(tmp_path / "model", optimizer__learning_rate=1e30, training__epochs=3)
    assert said.code == 1
    assert "the loss of training is nan in epoch" in said.err.lower()
    assert "optimizer.learning_rate" in said.err
    assert not (tmp_path / "model" / "config.json").exists()


def test_a_full_disk_is_reported_and_training_resumes_once_there_is_room(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = writing.write_bytes, [True]

    def write(url: str, data: bytes) -> None:
        if full and url.endswith(loop.STATE_NAME) and filesystem.exists(url):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as writing itself says it
        real(url, data)

    monkeypatch.setattr(writing, "write_bytes", write)
    said = train(tmp_path / "model", training__epochs=3)
    assert said.code == 1
    assert "No space left on device" in said.err
    assert f"{tmp_path / 'model' / loop.STATE_NAME} cannot be written" in said.err
    full.clear()
    assert train(tmp_path / "model", training__epochs=3).code == 0
    monkeypatch.undo()
    assert train(tmp_path / "whole", training__epochs=3).code == 0
    assert_same_weights(tmp_path / "model", tmp_path / "whole")


def test_empty_audio_is_named(train: Train, manifest: Path, tmp_path: Path) -> None:
    bad = manifest.with_name("bad.csv")
    bad.write_text("uri,label,fold\ntone0.wav,tone,0\nempty.wav,tone,1\nclicks0.wav,clicks,0\n")
    audio_factory.write(manifest.with_name("empty.wav"), np.zeros(0, np.float32), RATE_HZ)
    said = train(tmp_path / "out", "--train", bad, training__epochs=1)
    assert (said.code, "empty.wav" in said.err) == (2, True), said.err
    assert not (tmp_path / "out" / "train.json").exists()


def test_a_label_that_the_model_does_not_know_is_named(
    train: Train, manifest: Path, tmp_path: Path
) -> None:
    checkpoint = write_tiny_model(tmp_path / "tiny")
    said = train(tmp_path / "out", "--model", checkpoint, training__head="keep")
    assert said.code == 2
    assert "'tone'" in said.err
    assert f"{len(TINY_LABELS)} label" in said.err
    assert not (tmp_path / "out" / "train.json").exists()


def test_an_item_that_cannot_be_read_is_a_row(train: Train, manifest: Path, tmp_path: Path) -> None:
    broken = manifest.with_name("broken.csv")
    broken.write_text(manifest.read_text() + "gone.wav,tone,0\n")
    # However quiet it is to be.
    said = train(tmp_path / "out", "--train", broken, "-q", training__epochs=1)
    assert said.code == 0, said.err
    assert "1 item could not be decoded" in said.err
    rows = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert [Path(row["uri"]).name for row in rows] == ["gone.wav"]
