"""``earmark train`` from the command line to the model's folder, with models of a few thousand
weights that learn to tell tones from noise."""

from __future__ import annotations

import csv
import dataclasses
import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from pipeline.cli import main as cli
from pipeline.training import display, output
from pipeline.training import run as train_module
from pipeline.training.data import clip_cache
from pipeline.training.stages import finetuning, loop
from pipeline.training.stages.validation import Validation
from tests.support import audio_factory
from tests.support.model_factory import TINY_LABELS, write_tiny_model
from transforms.sources.read_unit import SourceSettings
from transforms.storage import filesystem, writing

RATE_HZ = 16_000
KINDS = ("tone", "clicks", "noise")
NUM_PER_KIND = 8

# Small enough for a second per training, and able to learn these sounds by heart.
SMALL = {
    "architecture.hidden_size": 32,
    "architecture.num_hidden_layers": 2,
    "architecture.num_attention_heads": 2,
    "model.max_length": 64,
    "model.num_mel_bins": 64,
    "training.epochs": 6,
    "training.batch_size": 6,
    "training.precision": "fp32",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 0.003,
    "schedule.kind": "cosine",
}
AUGMENTED = {
    "augmentation.mixup_ratio": 0.5,
    "augmentation.masked_mels": 8,
    "augmentation.masked_frames": 8,
    "augmentation.circular_shift": "true",
    "augmentation.gain_db": 3.0,
    "augmentation.speed": 0.1,
    "augmentation.equalizer_db": 1.0,
    "augmentation.invert": "true",
    "augmentation.patch_drop": 0.25,
    "augmentation.feature_noise": 0.1,
    "augmentation.shift_frames": 2,
    "architecture.hidden_dropout_prob": 0.1,
}


class Said(NamedTuple):
    code: int
    out: str
    err: str


Train = Callable[..., Said]


def sound(kind: str, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Half a second of one kind, each time another."""
    noise = rng.standard_normal(RATE_HZ // 2)
    if kind == "noise":
        return 0.3 * noise
    if kind == "tone":
        frequency_hz = 1000 * rng.uniform(0.9, 1.1)
        time_s = np.arange(noise.size) / RATE_HZ
        return 0.4 * np.sin(2 * np.pi * frequency_hz * time_s) + 0.02 * noise
    return 0.5 * noise * (np.arange(noise.size) % 2000 < 100) * rng.uniform(0.8, 1.2)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sounds with labels; every fourth clip is of fold 1."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "label", "fold"])
        for kind in KINDS:
            for index in range(NUM_PER_KIND):
                samples = sound(kind, rng)
                name = f"{kind}{index}.wav"
                audio_factory.write(folder / name, samples.astype(np.float32), RATE_HZ)
                writer.writerow([name, kind, index % 4])
    return folder / "clips.csv"


@pytest.fixture
def train(capfd: pytest.CaptureFixture[str], manifest: Path) -> Train:
    """Runs ``earmark train`` on the manifest with the small model; settings may be changed."""

    def run(output: Path, *options: object, **changes: object) -> Said:
        """Options win over the usual ones; changes are keys with __ for the dot."""
        settings = with_changes(SMALL, changes)
        if "--model" in options:  # the shape is the checkpoint's
            given = {key.replace("__", ".") for key in changes}
            fixed = ("architecture", "model")
            settings = {
                key: value
                for key, value in settings.items()
                if key in given or not key.startswith(fixed)
            }
        arguments = ["train", "-o", str(output), *sets_of(settings), *map(str, options)]
        if "--train" not in options:
            arguments += ["--train", str(manifest)]
        if not {"--validation", "--hold-out"} & set(options):
            arguments += ["--hold-out", "fold=1"]
        code = cli.main(arguments)
        return Said(code, *capfd.readouterr())

    return run


def with_changes(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**settings, **{key.replace("__", "."): value for key, value in changes.items()}}


def sets_of(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def as_keywords(settings: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in settings.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def history(folder: Path) -> list[dict[str, str]]:
    """The table without the times, which differ from run to run."""
    with (folder / "history.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_learns_and_label_and_evaluate_find_what_training_said(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = train(tmp_path / "model", training__epochs=30)
    assert said.code == 0, said.err
    rows = history(tmp_path / "model")
    assert [int(row["epoch"]) for row in rows] == list(range(1, 31))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) / 4
    record = json.loads((tmp_path / "model" / "train.json").read_text())
    assert (record["status"], record["labels"]) == ("done", sorted(KINDS))
    assert record["clips"] == {"train": 18, "validation": 6}
    assert record["best"]["accuracy"] == max(float(row["validation_accuracy"]) for row in rows)
    assert record["best"]["accuracy"] == 1.0
    ties = [row for row in rows if float(row["validation_accuracy"]) == 1.0]
    assert len(ties) > 1
    lowest = min(float(row["validation_loss"]) for row in ties)
    assert record["best"]["loss"] == lowest
    best_epoch = record["best"]["epoch"]
    assert float(rows[best_epoch - 1]["validation_loss"]) == lowest
    assert f"The model has the weights of the best epoch ({best_epoch})." in said.out
    assert_same_weights(tmp_path / "model", tmp_path / "model" / "best")

    model, result = tmp_path / "model", tmp_path / "result"
    held_out = model / "validation.jsonl"
    assert cli.main(["label", str(held_out), "-o", str(result), "-m", str(model), "-q"]) == 0
    assert cli.main(["evaluate", str(result), "-q"]) == 0
    figures = json.loads((result / "evaluation" / "evaluation.json").read_text())
    best = rows[record["best"]["epoch"] - 1]
    assert figures["accuracy"] == float(best["validation_accuracy"])
    assert figures["mean_average_precision"] == pytest.approx(
        float(best["validation_mean_average_precision"]), rel=1e-9
    )
    assert "accuracy 1.0000" in capfd.readouterr().out


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_transformers_gives_the_same_scores(train: Train, tmp_path: Path, loss: str) -> None:
    import transformers

    from transforms.models.ast.model import ASTForAudioClassification

    assert train(tmp_path / "model", training__loss=loss, training__epochs=2).code == 0
    ours = ASTForAudioClassification.from_pretrained(tmp_path / "model")
    theirs = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "model").eval()
    extractor = transformers.ASTFeatureExtractor.from_pretrained(tmp_path / "model")
    problem = {"cross_entropy": "single_label", "binary_cross_entropy": "multi_label"}[loss]
    assert theirs.config.problem_type == f"{problem}_classification"
    assert [theirs.config.id2label[i] for i in range(3)] == sorted(KINDS)
    clip = (0.1 * np.random.default_rng(1).standard_normal(RATE_HZ // 2)).astype(np.float32)
    features = extractor(clip, sampling_rate=RATE_HZ, return_tensors="pt")["input_values"]
    assert tuple(features.shape) == (1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(features).logits, theirs(features).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("stops_after", [1, 3])
def test_an_interrupted_training_ends_like_an_uninterrupted_one(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_after: int
) -> None:
    settings: dict[str, Any] = {
        **as_keywords(AUGMENTED),
        "pretraining__epochs": 2,
        "pretraining__warmup_epochs": 1,
        "averaging__moving_decay": 0.9,
        "training__epochs": 4,
    }
    assert train(tmp_path / "whole", **settings).code == 0
    real = loop.save_progress
    epochs = []

    def save_and_stop(*arguments: Any) -> None:
        real(*arguments)
        epochs.append(1)
        if len(epochs) == stops_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_progress", save_and_stop)
    said = train(tmp_path / "resumed", **settings)
    assert said.code == 130
    assert (tmp_path / "resumed" / loop.STATE_NAME).exists()
    assert not (tmp_path / "resumed" / "config.json").exists()
    assert len(history(tmp_path / "resumed")) == stops_after
    monkeypatch.setattr(loop, "save_progress", real)
    assert train(tmp_path / "resumed", **settings).code == 0
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")
    for folder in ("", "best", "averaged", "last"):
        assert_same_weights(tmp_path / "resumed" / folder, tmp_path / "whole" / folder)
    assert not (tmp_path / "resumed" / loop.STATE_NAME).exists()


@pytest.mark.parametrize("dies", ["before the state is written", "before best/ is written"])
def test_the_best_weights_are_of_an_epoch_in_the_saved_state(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """An epoch done again may have another result (on a GPU), and not be the best any more."""
    assert train(tmp_path / "whole", training__epochs=3).code == 0
    best = json.loads((tmp_path / "whole" / "train.json").read_text())["best"]["epoch"]
    killed = tmp_path / "killed"
    save, write_model = loop.save_progress, output.Recorder.write_model

    def save_or_die(progress: loop.Progress, *others: Any) -> None:
        if dies == "before the state is written" and progress.epoch == best:
            raise KeyboardInterrupt
        save(progress, *others)

    def write_or_die(self: Any, model: Any, folder: str) -> None:
        done = len(history(killed))
        if dies == "before best/ is written" and (folder, done) == ("best", best):
            raise KeyboardInterrupt
        write_model(self, model, folder)

    monkeypatch.setattr(loop, "save_progress", save_or_die)
    monkeypatch.setattr(output.Recorder, "write_model", write_or_die)
    assert train(killed, training__epochs=3).code == 130
    whole = weights(tmp_path / "whole" / "best")
    name = "classifier.dense.weight"
    is_there = (killed / "best").exists()
    assert not is_there or not torch.equal(weights(killed / "best")[name], whole[name])
    monkeypatch.undo()
    if dies == "before best/ is written":
        real = finetuning.validate

        def much_worse(*arguments: Any) -> Validation:
            validation = real(*arguments)
            metrics = dataclasses.replace(validation.metrics, accuracy=0.0)
            return Validation(metrics, 99.0)

        monkeypatch.setattr(finetuning, "validate", much_worse)
    assert train(killed, training__epochs=3).code == 0
    assert json.loads((killed / "train.json").read_text())["best"]["epoch"] == best
    assert_same_weights(killed / "best", tmp_path / "whole" / "best")
    assert_same_weights(killed, tmp_path / "whole" / "best")


@pytest.mark.slow
def test_a_killed_training_ends_like_an_uninterrupted_one(
    train: Train, manifest: Path, tmp_path: Path
) -> None:
    settings = {**SMALL, **AUGMENTED, "training.epochs": 60}
    assert train(tmp_path / "whole", **as_keywords(settings)).code == 0
    command = [sys.executable, "-m", "pipeline", "train", "--train", str(manifest), "-q"]
    command += sets_of(settings)
    command += ["--hold-out", "fold=1", "-o", str(tmp_path / "killed")]
    for num_epochs in (5, 25):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        table = tmp_path / "killed" / "history.csv"
        deadline_s = time.monotonic() + 120
        while not (table.exists() and len(history(tmp_path / "killed")) >= num_epochs):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, check=False).returncode == 0
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(
    train: Train, tmp_path: Path
) -> None:
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        assert train(tmp_path / name, training__epochs=1, training__seed=seed).code == 0
    assert_same_weights(tmp_path / "one", tmp_path / "same")
    name = "classifier.dense.weight"
    assert not torch.equal(weights(tmp_path / "one")[name], weights(tmp_path / "other")[name])


def test_processes_that_make_batches_change_nothing(train: Train, tmp_path: Path) -> None:
    for name, number in (("none", 0), ("two", 2)):
        said = train(
            tmp_path / name,
            training__epochs=2,
            training__loader_processes=number,
            **as_keywords(AUGMENTED),
        )
        assert said.code == 0, said.err
    assert_same_weights(tmp_path / "none", tmp_path / "two")


def test_the_mean_over_epochs_is_the_mean_of_their_weights(train: Train, tmp_path: Path) -> None:
    # A rate that does not depend on how many epochs there will be.
    constant = {"schedule__kind": "multistep", "schedule__decay_start_epoch": 99}
    after = []
    for epochs in (2, 3):
        folder = tmp_path / f"{epochs}"
        said = train(folder, training__epochs=epochs, training__keep="last", **constant)
        assert said.code == 0, said.err
        after.append(weights(folder))
    said = train(
        tmp_path / "mean",
        training__keep="averaged",
        training__epochs=3,
        averaging__first_epoch=2,
        averaging__last_epoch=3,
        **constant,
    )
    assert said.code == 0, said.err
    for name, mean in weights(tmp_path / "mean").items():
        torch.testing.assert_close(mean, (after[0][name] + after[1][name]) / 2)
    for column in ("averaged_accuracy", "averaged_loss"):
        is_given = [row[column] != "" for row in history(tmp_path / "mean")]
        assert is_given == [False, True, True]
    assert "The model has the average of the weights after the epochs 2 to 3." in said.out


def changed_tensors(before: Path, after: Path) -> set[str]:
    """Names of tensors that are there before and after, in the same shape, and differ."""
    old, new = weights(before), weights(after)
    same_shape = {name for name in old if name in new and old[name].shape == new[name].shape}
    return {name for name in same_shape if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize(("trained_layers", "learning"), [
    (0, ("classifier.",)),
    (1, ("classifier.", "layer.1.", "transformer.layernorm.")),
])  # fmt: skip
def test_frozen_weights_stay_and_the_others_learn(
    train: Train, tmp_path: Path, trained_layers: int, learning: tuple[str, ...]
) -> None:
    checkpoint = write_tiny_model(tmp_path / "tiny")
    said = train(
        tmp_path / "out",
        *("--model", checkpoint),
        training__trained_layers=trained_layers,
        training__epochs=1,
        training__keep="last",
    )
    assert said.code == 0, said.err
    changed = changed_tensors(checkpoint, tmp_path / "out")
    assert {name for name in changed if not any(part in name for part in learning)} == set()
    for part in learning:
        assert any(part in name for name in changed), part


def test_other_strides_and_lengths_start_from_resized_position_embeddings(
    train: Train, tmp_path: Path
) -> None:
    checkpoint = write_tiny_model(tmp_path / "tiny")
    said = train(
        tmp_path / "out",
        *("--model", checkpoint),
        training__trained_layers=0,
        training__epochs=1,
        model__max_length=128,
        model__time_stride=8,
    )
    assert said.code == 0, said.err
    from transforms.models.ast.model import resize_position_embeddings

    name = "audio_spectrogram_transformer.embeddings.position_embeddings"
    expected = resize_position_embeddings(weights(checkpoint)[name], (8, 64), (8, 15))
    torch.testing.assert_close(weights(tmp_path / "out")[name], expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["max_length"], config["time_stride"]) == (128, 8)


def test_a_kept_head_starts_with_the_weights_of_the_checkpoint(
    train: Train, tmp_path: Path, manifest: Path
) -> None:
    names = ("noise", "other", "clicks", "tone", "last")
    checkpoint = write_tiny_model(tmp_path / "tiny", id2label=dict(enumerate(names)), label2id={})
    said = train(
        tmp_path / "out",
        *("--model", checkpoint),
        training__head="keep",
        training__epochs=1,
        optimizer__learning_rate=1e-12,
    )
    assert said.code == 0, said.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["id2label"].values()) == [*names]
    name = "classifier.dense.weight"
    torch.testing.assert_close(weights(tmp_path / "out")[name], weights(checkpoint)[name])


def test_statistics_are_measured_if_none_are_given(
    train: Train, tmp_path: Path, manifest: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "model", training__epochs=1).code == 0
    training = tmp_path / "training.csv"
    rows = list(csv.DictReader(manifest.open(newline="")))
    lines = [f"{manifest.parent / row['uri']}\n" for row in rows if row["fold"] != "1"]
    training.write_text("uri\n" + "".join(lines))
    shape = ["--set", "model.max_length=64", "--set", "model.num_mel_bins=64"]
    assert cli.main(["stats", str(training), "-o", str(tmp_path / "stats"), *shape]) == 0
    names = ("mean", "std", "max_length", "num_mel_bins", "sampling_rate")
    trained, measured = (
        json.loads((tmp_path / folder / "preprocessor_config.json").read_text())
        for folder in ("model", "stats")
    )
    assert {name: trained[name] for name in names} == {
        name: pytest.approx(measured[name], rel=1e-9) for name in names
    }
    said = train(tmp_path / "given", training__epochs=1, model__preprocessor=tmp_path / "stats")
    assert said.code == 0, said.err
    assert_same_weights(tmp_path / "given", tmp_path / "model")


def test_statistics_are_measured_once(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.save_progress

    def save_and_stop(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_progress", save_and_stop)
    said = train(tmp_path / "out", training__epochs=2)
    assert said.code == 130
    assert said.err.count("Measuring mean and standard deviation of 18 clips…\n") == 1
    monkeypatch.undo()
    before = json.loads((tmp_path / "out" / "train.json").read_text())

    def measure(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(train_module, "measure_statistics", measure)
    said = train(tmp_path / "out", training__epochs=2)
    assert said.code == 0, said.err
    assert "Measuring" not in said.err
    after = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (after["mean"], after["std"]) == (before["mean"], before["std"])


@pytest.mark.parametrize(("start", "rate"), [("scratch", 1e-3), ("checkpoint", 1e-4)])
def test_the_learning_rate_follows_what_training_starts_from(
    train: Train, tmp_path: Path, start: str, rate: float
) -> None:
    model = ("--model", write_tiny_model(tmp_path / "tiny")) if start == "checkpoint" else ()
    out = tmp_path / "out"
    said = train(out, *model, training__epochs=1, optimizer__learning_rate="null")
    assert said.code == 0, said.err
    assert f", learning rate {rate:g}.\n" in said.err
    record = json.loads((out / "train.json").read_text())
    assert record["results"]["optimizer"]["learning_rate"] == rate
    assert record["config"]["optimizer"]["learning_rate"] is None
    assert float(history(out)[0]["learning_rate"]) <= rate
    said = train(out, *model, training__epochs=1, optimizer__learning_rate=rate)
    assert (said.code, "is already trained" in said.out) == (0, True)


def test_clips_decoded_for_another_training_are_reused_and_announced(
    train: Train, tmp_path: Path
) -> None:
    cache = ("--cache", tmp_path / "cache")
    first = train(tmp_path / "first", *cache, training__epochs=1)
    second = train(tmp_path / "second", *cache, training__epochs=1)
    assert (first.code, second.code) == (0, 0)
    assert "decoding 24 clips\n" in first.err
    assert "24/24 clips · 12 s of audio" in first.err
    assert "Already decoded" not in first.err
    assert "Already decoded: 24 clips.\n" in second.err
    assert "decoding" not in second.err
    assert "/24" not in second.err


def test_interrupted_decoding_is_resumed(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Windows so short that the clips make three units.
    monkeypatch.setattr(clip_cache, "_CUT", SourceSettings(window_s=0.003, hop_s=0.003))
    real, calls = display.DecodingDisplay.on_clip, itertools.count(1)

    def stop(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        if next(calls) == 15:  # in the second unit
            raise KeyboardInterrupt

    monkeypatch.setattr(display.DecodingDisplay, "on_clip", stop)
    assert train(tmp_path / "out", training__epochs=1).code == 130
    monkeypatch.setattr(display.DecodingDisplay, "on_clip", real)
    said = train(tmp_path / "out", training__epochs=1)
    assert said.code == 0, said.err
    kept = re.search(r"Resuming decoding: (\d+) items already decoded\.\n", said.err)
    decoded = re.search(r"(\d+)/(\d+) clips", said.err)
    assert kept and decoded, said.err
    assert 0 < int(kept[1]) < 15
    assert int(decoded[1]) == int(decoded[2]) == 24 - int(kept[1])


def test_a_resumed_training_keeps_the_time_when_it_was_started(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, times = loop.save_progress, itertools.count(1)

    def save_and_stop(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "utc_now", lambda: f"{next(times)} o'clock")
    monkeypatch.setattr(loop, "save_progress", save_and_stop)
    for _ in range(2):
        assert train(tmp_path / "out", training__epochs=3).code == 130
    monkeypatch.setattr(loop, "save_progress", real)
    assert train(tmp_path / "out", training__epochs=3).code == 0
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (record["status"], record["started"]) == ("done", "1 o'clock")
    assert train(tmp_path / "out", "--overwrite", training__epochs=1).code == 0
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["started"] == "2 o'clock"


def test_half_precision_halves_the_file_and_rounds_the_weights(
    train: Train, tmp_path: Path
) -> None:
    for name, dtype in (("full", "float32"), ("half", "float16")):
        assert train(tmp_path / name, training__epochs=1, training__saved_dtype=dtype).code == 0
    full, half = (tmp_path / name / "model.safetensors" for name in ("full", "half"))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    for name, tensor in weights(tmp_path / "full").items():
        assert torch.equal(weights(tmp_path / "half")[name], tensor.half()), name


def test_a_finished_training_is_not_done_again(
    train: Train, manifest: Path, tmp_path: Path
) -> None:
    assert train(tmp_path / "model", training__epochs=1).code == 0
    before = everything_in(tmp_path / "model")
    said = train(tmp_path / "model", training__epochs=1)
    assert (said.code, "is already trained" in said.out) == (0, True)
    assert everything_in(tmp_path / "model") == before
    assert not (tmp_path / "model" / "cache").exists()
    for path in manifest.parent.glob("*.wav"):
        path.touch()  # the same clips, as far as anyone can hear
    said = train(tmp_path / "model", training__epochs=1)
    assert (said.code, "is already trained" in said.out) == (0, True)
    assert everything_in(tmp_path / "model") == before
    assert train(tmp_path / "model", "--overwrite", training__epochs=2).code == 0
    assert len(history(tmp_path / "model")) == 2


def test_a_new_head_is_new_though_the_labels_are_the_same(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path / "first", training__epochs=1).code == 0
    still = {"training__epochs": 1, "optimizer__learning_rate": 1e-12}
    for head in ("new", "keep"):
        said = train(tmp_path / head, "--model", tmp_path / "first", training__head=head, **still)
        assert said.code == 0, said.err
    name = "classifier.dense.weight"
    first, kept, new = (weights(tmp_path / folder)[name] for folder in ("first", "keep", "new"))
    torch.testing.assert_close(kept, first)
    assert not torch.allclose(new, first, atol=1e-3)


def test_an_original_checkpoint_is_described_by_the_config(
    train: Train, manifest: Path, tmp_path: Path, shared_data: Path
) -> None:
    names = tmp_path / "names.txt"
    others = [f"other {index}" for index in range(527 - len(KINDS))]
    names.write_text("\n".join([*KINDS, *others]))
    said = train(
        tmp_path / "out",
        *("--model", shared_data / "original_ast" / "audio_model.pth", "--labels", names),
        *("--limit", 4, "--train", manifest, "--hold-out", "fold=3"),
        model__num_attention_heads=3,
        model__frequency_stride=10,
        model__time_stride=10,
        model__mean=-4.2677393,
        model__std=4.5689974,
        training__head="keep",
        training__trained_layers=0,
        training__epochs=1,
        optimizer__learning_rate=1e-12,
    )
    assert said.code == 0, said.err
    original = torch.load(shared_data / "original_ast" / "audio_model.pth", weights_only=True)
    trained = weights(tmp_path / "out")
    torch.testing.assert_close(
        trained["classifier.dense.weight"], original["module.mlp_head.1.weight"].float()
    )


def test_resuming_is_announced(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.save_progress

    def save_and_stop(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_progress", save_and_stop)
    assert train(tmp_path / "out", training__epochs=3).code == 130
    monkeypatch.undo()
    said = train(tmp_path / "out", training__epochs=3)
    assert (said.code, "Resuming training: 1 of 3 epochs already done." in said.err) == (
        0,
        True,
    )


# --- What is wrong is said, and nothing is overwritten -------------------------------------


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


def test_a_missing_device_is_named_by_the_key_of_the_training(train: Train, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    said = train(tmp_path / "out", "--device", "cuda", training__epochs=1)
    assert (said.code, "training.device is cuda; this machine has" in said.err) == (2, True)


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


@pytest.mark.parametrize(
    ("hold_out", "said_of_it"),
    [
        ("Fold=1", "no clip has a column Fold; the existing columns are: fold"),
        ("fold=7", "no clip has this value; fold has 4 values: 0, 1, 2, 3"),
    ],
)
def test_an_impossible_hold_out_is_refused_before_decoding(
    train: Train, tmp_path: Path, hold_out: str, said_of_it: str
) -> None:
    said = train(tmp_path / "out", "--hold-out", hold_out, training__epochs=1)
    assert (said.code, said_of_it in said.err) == (2, True), said.err
    assert "decoding" not in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "said_of_it"), [
    ({"training__precision": "fp16"}, "training.precision is fp16, and the device is the CPU"),
    ({"training__trained_layers": 9}, "training.trained_layers is 9; the model has 2 layers"),
])  # fmt: skip
def test_settings_beyond_the_device_or_the_model_are_refused(
    train: Train, tmp_path: Path, changes: dict[str, Any], said_of_it: str
) -> None:
    checkpoint = write_tiny_model(tmp_path / "tiny")
    said = train(tmp_path / "out", "--model", checkpoint, training__epochs=1, **changes)
    assert (said.code, said_of_it in said.err) == (2, True), said.err
    assert not (tmp_path / "out").exists()


def test_samples_of_another_type_are_another_training(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path / "model", training__epochs=1).code == 0
    said = train(tmp_path / "model", training__epochs=1, cache__dtype="int16")
    assert (said.code, 'cache.dtype: "float32" there, "int16" now' in said.err) == (2, True), (
        said.err
    )


def test_another_training_is_left_alone(train: Train, tmp_path: Path, manifest: Path) -> None:
    assert train(tmp_path / "model", training__epochs=1).code == 0
    before = everything_in(tmp_path / "model")
    said = train(tmp_path / "model", training__epochs=1, optimizer__learning_rate=0.5)
    assert said.code == 2
    assert "holds another training:\n  optimizer.learning_rate: 0.003 there, 0.5 now" in said.err
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


@pytest.mark.parametrize(
    ("rows", "said_of_it"),
    [
        ("uri,fold\ntone0.wav,0\nclicks0.wav,1\n", "none of 2 training clips has a label"),
        (
            "uri,label,fold\ntone0.wav,tone,0\ntone1.wav,tone,1\nclicks0.wav,clicks,0\n"
            "noise0.wav,noise,0\nnoise1.wav,noise,1\n",
            "which cannot be used for both training and validation: clicks",
        ),
        ("uri,label,fold\ntone0.wav,tone,0\nempty.wav,tone,1\nclicks0.wav,clicks,0\n", "empty.wav"),
    ],
    ids=["no labels", "a class with one clip", "empty audio"],
)
def test_clips_that_cannot_be_learnt_from_are_named(
    train: Train, manifest: Path, tmp_path: Path, rows: str, said_of_it: str
) -> None:
    bad = manifest.with_name(f"bad{len(rows)}.csv")
    bad.write_text(rows)
    audio_factory.write(manifest.with_name("empty.wav"), np.zeros(0, np.float32), RATE_HZ)
    said = train(tmp_path / "out", "--train", bad, "--hold-out", "fold=1", training__epochs=1)
    assert said.code == 2
    assert said_of_it in said.err
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
