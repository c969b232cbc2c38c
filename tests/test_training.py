"""The parts of a training that the command line does not show one by one."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.training.batches import BatchSettings, balancing_weights, order_of_epoch
from pipeline.training.clip_cache import SampleFile
from pipeline.training.dataset import ClipSet, LabelledClip, PackedClips, pack_clips
from pipeline.training.steps import Precision
from pipeline.training.validation import Scorer, score_clips
from tests.model_factory import write_tiny_model
from transforms.fbank import FbankSettings, KaldiFbank
from transforms.inference import InferenceSettings, TorchEngine
from transforms.records import Item
from transforms.spectrogram_transformer import ASTForAudioClassification
from transforms.windows import WindowSettings

NAMES = ("common", "rare", "never")


def clip_set(folder: Path, labels: list[tuple[int, ...]], num_samples: int = 8) -> ClipSet:
    """Clips of noise, one behind the other in a file."""
    rng = np.random.default_rng(0)
    samples = (0.1 * rng.standard_normal(len(labels) * num_samples)).astype("<f4")
    (folder / "samples.bin").write_bytes(samples.tobytes())
    return ClipSet(
        file=SampleFile(folder / "samples.bin", "float32"),
        sample_rate_hz=16_000,
        clips=tuple(
            LabelledClip(
                Item(clip_id=f"c{index}", uri=f"c{index}.wav", url=f"c{index}.wav"),
                of,
                index * num_samples,
                num_samples,
            )
            for index, of in enumerate(labels)
        ),
        label_names=NAMES,
    )


def test_packed_clips_are_the_same_clips(tmp_path: Path) -> None:
    clips = clip_set(tmp_path, [(0,), (), (0, 1), (0,)])
    packed: PackedClips = pickle.loads(pickle.dumps(pack_clips(clips)))
    assert len(packed) == 4
    order = np.array([2, 0, 1, 2])
    np.testing.assert_array_equal(packed.targets(order), clips.targets()[order])
    for index in range(4):
        np.testing.assert_array_equal(packed.samples(index, 2, 7), clips.samples(index, 2, 7))


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
    windows = WindowSettings.from_seconds(
        length_s=None, hop_s=None, min_tail_ratio=0.1, num_frames=64, sample_rate_hz=16_000
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clips = ClipSet(clips.file, 16_000, clips.clips, tuple(config.id2label.values()))
    ours = score_clips(model, clips, Scorer(fbank, windows, 3, "sigmoid", precision))
    for name, tensor in model.state_dict().items():  # its own weights are as they were
        assert torch.equal(tensor, before[name]), name
    waveforms = torch.from_numpy(np.stack([clips.samples(index) for index in range(3)]))
    features = fbank(waveforms, torch.full((3,), 10_480))
    settings = InferenceSettings(precision=precision, device="cpu")
    theirs = TorchEngine(model, "sigmoid", settings).predict(features.numpy())
    np.testing.assert_allclose(
        ours, np.stack([prediction.scores for prediction in theirs]), rtol=0, atol=1e-6
    )
