"""``earmark train`` from the command line to the model's folder, with models of a few thousand
weights that learn to tell tones from noise."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cli import main as cli
from pipeline.training import display, output
from pipeline.training import run as train_module
from pipeline.training.data import clip_cache
from pipeline.training.stages import finetuning, loop
from pipeline.training.stages.validation import Validation
from tests.pipeline.training.small_trainings import (
    AUGMENTED,
    KINDS,
    RATE_HZ,
    SMALL,
    Train,
    as_keywords,
    assert_same_weights,
    everything_in,
    history,
    sets_of,
    weights,
)
from tests.support.model_factory import write_tiny_model
from transforms.sources.read_unit import SourceSettings


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


@contextlib.contextmanager
def stopping_after(num_epochs: int) -> Iterator[None]:
    """Interrupt trainings once the state of so many epochs is saved."""
    real, epochs = loop.save_progress, itertools.count(1)

    def save_and_stop(*arguments: Any) -> None:
        real(*arguments)
        if next(epochs) == num_epochs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_progress", save_and_stop)
        yield


@pytest.mark.parametrize("stops_after", [1, 3])
def test_an_interrupted_training_ends_like_an_uninterrupted_one(
    train: Train, tmp_path: Path, stops_after: int
) -> None:
    settings: dict[str, Any] = {
        **as_keywords(AUGMENTED),
        "pretraining__epochs": 2,
        "pretraining__warmup_epochs": 1,
        "averaging__moving_decay": 0.9,
        "training__epochs": 4,
    }
    assert train(tmp_path / "whole", **settings).code == 0
    with stopping_after(stops_after):
        said = train(tmp_path / "resumed", **settings)
    assert said.code == 130
    assert (tmp_path / "resumed" / loop.STATE_NAME).exists()
    assert not (tmp_path / "resumed" / "config.json").exists()
    assert len(history(tmp_path / "resumed")) == stops_after
    assert train(tmp_path / "resumed", **settings).code == 0
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")
    for folder in ("", "best", "averaged", "last"):
        assert_same_weights(tmp_path / "resumed" / folder, tmp_path / "whole" / folder)


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


def test_the_same_seed_gives_the_same_weights_rounded_in_a_file_of_half_precision(
    train: Train, tmp_path: Path
) -> None:
    for name, seed, dtype in (
        ("one", 3, "float32"),
        ("half", 3, "float16"),
        ("other", 4, "float32"),
    ):
        settings = {"training__epochs": 1, "training__seed": seed, "training__saved_dtype": dtype}
        assert train(tmp_path / name, **settings).code == 0
    one, half, other = (weights(tmp_path / name) for name in ("one", "half", "other"))
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in one.items())
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "one")]
    assert sizes[0] < 0.6 * sizes[1]
    assert not torch.equal(one["classifier.dense.weight"], other["classifier.dense.weight"])


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


@pytest.mark.parametrize(
    ("head", "names"),
    [("keep", ("noise", "other", "clicks", "tone", "last")), ("keep", KINDS), ("new", KINDS)],
)
def test_only_a_kept_head_starts_with_the_weights_of_the_checkpoint(
    train: Train, tmp_path: Path, head: str, names: tuple[str, ...]
) -> None:
    names = names if len(names) > 3 else tuple(sorted(names))  # the order of new labels
    checkpoint = write_tiny_model(
        tmp_path / "tiny", id2label=dict(enumerate(names)), label2id={}, num_labels=len(names)
    )
    said = train(
        tmp_path / "out",
        *("--model", checkpoint),
        training__head=head,
        training__epochs=1,
        optimizer__learning_rate=1e-12,
    )
    assert said.code == 0, said.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["id2label"].values()) == [*names]
    name = "classifier.dense.weight"
    before, after = (weights(folder)[name] for folder in (checkpoint, tmp_path / "out"))
    assert torch.allclose(before, after, atol=1e-5) == (head == "keep")


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


def test_a_resumed_training_says_so_and_keeps_its_statistics_and_its_start(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, times, settings = tmp_path / "out", itertools.count(1), {"training__epochs": 2}
    monkeypatch.setattr(output, "utc_now", lambda: f"{next(times)} o'clock")
    with stopping_after(1):
        said = train(out, **settings)
    assert said.code == 130
    assert said.err.count("Measuring mean and standard deviation of 18 clips…\n") == 1
    before = json.loads((out / "train.json").read_text())

    def measure(*arguments: Any) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "measure_statistics", measure)
        said = train(out, **settings)
    assert said.code == 0, said.err
    assert "Resuming training: 1 of 2 epochs already done." in said.err
    assert "Measuring" not in said.err
    after = json.loads((out / "train.json").read_text())
    assert (after["mean"], after["std"]) == (before["mean"], before["std"])
    assert (after["status"], before["started"], after["started"]) == ("done", *["1 o'clock"] * 2)
    assert train(out, "--overwrite", training__epochs=1).code == 0
    assert json.loads((out / "train.json").read_text())["started"] == "2 o'clock"


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
