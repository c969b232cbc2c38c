"""The parts of a training that the command line does not show one by one."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import log_loss

from pipeline.training.data.batches import (
    BatchSettings,
    balancing_weights,
    order_of_epoch,
)
from pipeline.training.data.dataset import ClipSet, pack_clips
from pipeline.training.data.packed_clips import CachedClip, PackedClips, SampleFiles
from pipeline.training.display import EpochDisplay
from pipeline.training.history import draw_curves, history_table
from pipeline.training.stages.finetuning import Best, is_better
from pipeline.training.stages.loop import Row
from pipeline.training.stages.steps import Precision
from pipeline.training.stages.validation import Scorer, loss_of_scores, score_clips
from tests.support.model_factory import write_tiny_model
from transforms.features.fbank import FbankSettings, KaldiFbank
from transforms.features.windows import WindowSettings
from transforms.inference.backbones import InferenceSettings, TorchBackbone
from transforms.inference.engine import Engine
from transforms.models.ast.model import ASTForAudioClassification
from transforms.records import FloatArray, Item

NAMES = ("common", "rare", "never")


def clip_set(folder: Path, labels: list[tuple[int, ...]], num_samples: int = 8) -> ClipSet:
    """Clips of noise, one behind the other in a file."""
    rng = np.random.default_rng(0)
    samples = (0.1 * rng.standard_normal(len(labels) * num_samples)).astype("<f4")
    (folder / "all.samples").write_bytes(samples.tobytes())
    return ClipSet(
        files=SampleFiles(folder, ("all.samples",), (0,), "float32"),
        clips=tuple(
            CachedClip(
                Item(clip_id=f"c{index}", uri=f"c{index}.wav", url=f"c{index}.wav"),
                index * num_samples,
                num_samples,
                content_sha256=f"c{index}",
                labels=of,
            )
            for index, of in enumerate(labels)
        ),
        label_names=NAMES,
    )


def read(clips: ClipSet, index: int) -> FloatArray:
    return clips.files.read_clip(clips.clips[index])


def test_packed_clips_are_the_same_clips(tmp_path: Path) -> None:
    clips = clip_set(tmp_path, [(0,), (), (0, 1), (0,)])
    packed: PackedClips = pickle.loads(pickle.dumps(pack_clips(clips)))
    assert len(packed) == 4
    order = np.array([2, 0, 1, 2])
    np.testing.assert_array_equal(packed.targets(order), clips.targets[order])
    for index in range(4):
        np.testing.assert_array_equal(packed.samples(index, 2, 7), read(clips, index)[2:7])


def test_packed_clips_are_small_to_hand_to_a_process(tmp_path: Path) -> None:
    def size(num_clips: int) -> int:
        labels: list[tuple[int, ...]] = [(0, 1)] * num_clips
        return len(pickle.dumps(pack_clips(clip_set(tmp_path, labels))))

    # A place, a length and a bound of eight bytes, two labels of four; and pickle's own few.
    assert 32 <= (size(3000) - size(1000)) / 2000 < 32.1


def test_a_clip_weighs_as_much_as_its_labels_are_rare(tmp_path: Path) -> None:
    packed = pack_clips(clip_set(tmp_path, [(0,), (0, 1), (), (0,)]))
    common, rare = 1000 / 3.01, 1000 / 1.01
    np.testing.assert_allclose(
        balancing_weights(packed), [common, common + rare, 0.0, common], rtol=1e-12
    )


def test_balanced_draws_are_as_frequent_as_their_weights(tmp_path: Path) -> None:
    labels: list[tuple[int, ...]] = [(0,)] * 9_900 + [(1,)] * 99 + [()]
    packed = pack_clips(clip_set(tmp_path, labels))
    settings = BatchSettings(12, 8, "balanced", seed=0, stage=1)
    order = order_of_epoch(packed, settings, 0)
    assert order.shape == (10_000,)
    # Half of the draws are rare ones, give or take six standard deviations.
    assert abs(int((order >= 9_900).sum()) - 5_000) < 300
    assert 9_999 not in order
    np.testing.assert_array_equal(order, order_of_epoch(packed, settings, 0))
    assert (order != order_of_epoch(packed, settings, 1)).any()


def test_each_clip_comes_once_in_an_epoch_that_is_shuffled(tmp_path: Path) -> None:
    packed = pack_clips(clip_set(tmp_path, [(0,)] * 50))
    order = order_of_epoch(packed, BatchSettings(12, 8, "shuffle", seed=0, stage=1), 3)
    assert sorted(order) == list(range(50))
    assert list(order) != list(range(50))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_scores_are_those_that_label_gives(tmp_path: Path, precision: Precision) -> None:
    clips = clip_set(tmp_path, [(0,), (1,), (0,)], num_samples=10_480)
    model = ASTForAudioClassification.from_pretrained(
        write_tiny_model(tmp_path / "tiny", max_length=64)
    )
    config = model.config
    fbank = KaldiFbank(
        FbankSettings(num_mel_bins=config.num_mel_bins, num_frames=config.max_length)
    )
    windows = WindowSettings.from_seconds(fbank.settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clips = ClipSet(clips.files, clips.clips, tuple(config.id2label.values()))
    ours = score_clips(model, clips, Scorer(fbank, windows, 3, "sigmoid", precision))
    for name, tensor in model.state_dict().items():  # its own weights are as they were
        assert torch.equal(tensor, before[name]), name
    waveforms = torch.from_numpy(np.stack([read(clips, index) for index in range(3)]))
    features = fbank(waveforms, torch.full((3,), 10_480))
    settings = InferenceSettings(precision=precision, device="cpu")
    backbone = TorchBackbone(model.audio_spectrogram_transformer, settings, precision)
    theirs = Engine(backbone, model.classifier, "sigmoid").predict(features.numpy())
    np.testing.assert_allclose(
        ours, np.stack([prediction.scores for prediction in theirs]), rtol=0, atol=1e-6
    )


def test_the_loss_of_scores_is_sklearns() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((50, 4))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = rng.integers(4, size=50)
    one_each = np.eye(4, dtype=np.float32)[labels]
    assert loss_of_scores(shares, one_each, "softmax") == pytest.approx(
        log_loss(labels, shares, labels=range(4)), rel=1e-12
    )
    scores, several = 1 / (1 + np.exp(-logits)), (rng.random((50, 4)) < 0.3).astype(np.float32)
    of_labels = [log_loss(several[:, i], scores[:, i], labels=[0, 1]) for i in range(4)]
    assert loss_of_scores(scores, several, "sigmoid") == pytest.approx(
        np.mean(of_labels), rel=1e-12
    )


def test_scores_of_nothing_and_everything_have_a_finite_loss() -> None:
    surely_wrong = np.array([[0.0, 1.0]], np.float32)
    truth = np.array([[1.0, 0.0]], np.float32)
    assert loss_of_scores(surely_wrong, truth, "softmax") == pytest.approx(-np.log(1e-7))
    assert loss_of_scores(surely_wrong, truth, "sigmoid") == pytest.approx(-np.log(1e-7))
    assert loss_of_scores(truth, truth, "softmax") == pytest.approx(1e-7, rel=1e-6)


@pytest.mark.parametrize(("now", "before", "expected"), [
    (Best(2, 0.5, 9.0), None, True),
    (Best(2, 0.6, 9.0), Best(1, 0.5, 0.1), True),
    (Best(2, 0.4, 0.1), Best(1, 0.5, 9.0), False),
    (Best(2, 0.5, 0.3), Best(1, 0.5, 0.4), True),
    (Best(2, 0.5, 0.5), Best(1, 0.5, 0.4), False),
    (Best(2, 0.5, 0.4), Best(1, 0.5, 0.4), False),
])  # fmt: skip
def test_of_epochs_whose_metric_ties_the_one_with_the_lower_loss_is_better(
    now: Best, before: Best | None, expected: bool
) -> None:
    assert is_better(now, before) is expected


HISTORY: list[Row] = [
    {
        **{"stage": "training", "epoch": epoch, "learning_rate": 0.1, "seconds": 1.5},
        **{"train_loss": 1.0 / epoch, "validation_loss": 0.634, "validation_accuracy": 0.9},
        **{"averaged_loss": 0.5, "averaged_accuracy": 0.95},
    }
    for epoch in (1, 2)
]


def test_losses_of_validation_are_in_the_table_and_in_the_curves() -> None:
    header, first, _ = history_table(HISTORY).decode().splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert (row["validation_loss"], row["averaged_loss"]) == ("0.634", "0.5")
    for column in ("validation_loss", "averaged_loss"):
        without = [{k: v for k, v in row.items() if k != column} for row in HISTORY]
        assert draw_curves(without) != draw_curves(HISTORY)


def shown(clock: Any) -> tuple[EpochDisplay, io.StringIO, Any]:
    text = io.StringIO()
    stage: Any = SimpleNamespace(name="training", epochs=5)
    console = Console(file=text, highlight=False, soft_wrap=True)
    return EpochDisplay([stage], "accuracy", console=console, clock=clock), text, stage


def test_an_epoch_is_printed_in_one_line() -> None:
    display, text, stage = shown(lambda: 0.0)
    with display:
        display.on_epoch(stage, HISTORY[1], Best(1, 0.9333, 0.6))
    assert text.getvalue() == (
        "training, epoch 2 of 5: loss 0.5000, validation loss 0.6340, accuracy 0.9000 (best "
        "0.9333), averaged 0.9500, 1.5 s\n"
    )


def test_without_a_terminal_a_long_epoch_prints_a_line_a_minute() -> None:
    now_s = [0.0]
    display, text, stage = shown(lambda: now_s[0])
    with display:
        for step in range(1, 9_001):
            now_s[0] = step / 20  # 450 s in all
            display.on_step(stage, 1, step, 9_000, 0.0123)
    lines = text.getvalue().splitlines()
    assert lines[0] == "training, epoch 2 of 5: step 1,200 of 9,000, loss 0.0123"
    assert [line.split()[6] for line in lines] == [
        *("1,200", "2,400", "3,600", "4,800", "6,000", "7,200", "8,400"),
    ]


def test_the_line_of_an_epoch_postpones_the_next_one() -> None:
    now_s = [0.0]
    display, text, stage = shown(lambda: now_s[0])
    with display:
        now_s[0] = 59.0
        display.on_epoch(stage, HISTORY[0], None)
        now_s[0] = 118.0
        display.on_step(stage, 1, 1, 10, 0.5)
        assert "step" not in text.getvalue()
        now_s[0] = 119.0
        display.on_step(stage, 1, 2, 10, 0.5)
    assert text.getvalue().endswith("epoch 2 of 5: step 2 of 10, loss 0.5000\n")
