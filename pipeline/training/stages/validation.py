"""Score clips with a model in training, as ``earmark label`` would with the finished one.

Windows, features, precision and aggregate are the same: a clip's scores are the maximum over its
windows if labels are independent, and the mean if they exclude each other. So ``earmark evaluate``
finds the figures that an epoch printed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.evaluation.metrics import Metrics, compute_metrics
from pipeline.training.data.dataset import ClipSet
from pipeline.training.stages.steps import IF_DIVERGED, Precision
from transforms.errors import TrainingError
from transforms.features.fbank import KaldiFbank
from transforms.features.windows import WindowSettings, cut_windows
from transforms.inference.backbones import TORCH_DTYPES
from transforms.models.ast.model import ASTForAudioClassification, ASTModel

# Windows in memory at once; 10 s of float32 are 0.64 MB.
_WINDOWS_AT_ONCE = 256
# Scores are kept this far from 0 and 1, where the logarithm would be infinite.
_SCORE_MARGIN = 1e-7


@dataclass(frozen=True)
class Scorer:
    """Everything that scoring clips needs besides the model.

    Features of ``fbank`` are normalised, on the model's device. ``batch_size`` counts windows;
    ``activation`` also decides the aggregate; ``precision`` is that of the backbone.
    """

    fbank: KaldiFbank
    windows: WindowSettings
    batch_size: int
    activation: Literal["sigmoid", "softmax"]
    precision: Precision


class Validation(NamedTuple):
    """The figures of a model on clips whose labels are known; see ``loss_of_scores``."""

    metrics: Metrics
    loss: float


def validate(
    model: ASTForAudioClassification,
    clips: ClipSet,
    scorer: Scorer,
    columns: Sequence[int] | None = None,
) -> Validation:
    """Measure a model on labelled clips; raise ``TrainingError`` if a score is NaN or infinite.

    ``columns`` are the model's outputs for the labels of the clips; None if it has just these.
    """
    scores = score_clips(model, clips, scorer)
    scores = scores if columns is None else scores[:, columns]
    is_bad = ~np.isfinite(scores).all(axis=1)
    if is_bad.any():
        first = clips.clips[int(is_bad.argmax())].item.clip_id
        raise TrainingError(
            f"{int(is_bad.sum()):,} of {len(clips):,} validation clips have scores that are NaN or "
            f"infinite, in {scorer.precision}: {first} is the first; expected finite numbers. "
            f"{IF_DIVERGED}"
        )
    return Validation(
        compute_metrics(clips.targets > 0, scores, clips.label_names),
        loss_of_scores(scores, clips.targets, scorer.activation),
    )


def loss_of_scores(
    scores: npt.NDArray[np.float32],
    targets: npt.NDArray[np.float32],
    activation: Literal["sigmoid", "softmax"],
) -> float:
    """Compute the mean loss of clips from scores in [0, 1]; both arrays have shape (clips, labels).

    ``targets`` are 1 where a clip has a label, else 0; with ``softmax`` each row has a single 1.
    With ``softmax`` the loss is cross-entropy: -ln(score of the true label). With ``sigmoid`` it is
    binary cross-entropy, the mean over the labels. It is at most about 16.1, because scores are
    kept 1e-7 from 0 and 1.
    """
    likely = np.clip(scores.astype(np.float64), _SCORE_MARGIN, 1.0 - _SCORE_MARGIN)
    has_label = targets > 0
    if activation == "softmax":
        return float(-np.log(likely[has_label]).mean())
    return float(-np.log(np.where(has_label, likely, 1.0 - likely)).mean())


def score_clips(
    model: ASTForAudioClassification, clips: ClipSet, scorer: Scorer
) -> npt.NDArray[np.float32]:
    """Score every clip for every label of the model; shape (clips, labels)."""
    scores = np.empty((len(clips), model.config.num_labels), np.float32)
    was_training = model.training
    model.eval()
    backbone = model.audio_spectrogram_transformer
    if scorer.precision != "fp32":  # as ``earmark label`` runs it: the weights too
        backbone = copy.deepcopy(backbone).to(TORCH_DTYPES[scorer.precision])
    for first, samples, counts in _groups(clips, scorer.windows):
        rows = _score_windows(model, backbone, samples, scorer)
        start = 0
        for clip, count in enumerate(counts, start=first):
            rows_of_clip = rows[start : start + count]
            is_max = scorer.activation == "sigmoid"
            scores[clip] = rows_of_clip.max(axis=0) if is_max else rows_of_clip.mean(axis=0)
            start += count
    model.train(was_training)
    return scores


def _groups(
    clips: ClipSet, windows: WindowSettings
) -> Iterator[tuple[int, list[npt.NDArray[np.float32]], list[int]]]:
    """Group whole clips to about ``_WINDOWS_AT_ONCE``: first clip, windows, windows of each."""
    first, samples, counts = 0, list[npt.NDArray[np.float32]](), list[int]()
    for index, clip in enumerate(clips.clips):
        cuts = cut_windows(clips.files.read_clip(clip), windows)
        samples += [cut.samples for cut in cuts]
        counts.append(len(cuts))
        if len(samples) >= _WINDOWS_AT_ONCE:
            yield first, samples, counts
            first, samples, counts = index + 1, [], []
    if counts:
        yield first, samples, counts


@torch.no_grad()
def _score_windows(
    model: ASTForAudioClassification,
    backbone: ASTModel,
    samples: list[npt.NDArray[np.float32]],
    scorer: Scorer,
) -> npt.NDArray[np.float32]:
    weight = next(backbone.parameters())
    rows = []
    for start in range(0, len(samples), scorer.batch_size):
        windows = samples[start : start + scorer.batch_size]
        padded = np.zeros((len(windows), scorer.windows.window_samples), np.float32)
        for row, window in zip(padded, windows, strict=True):
            row[: window.size] = window
        lengths = torch.tensor([window.size for window in windows], device=weight.device)
        features = scorer.fbank(torch.from_numpy(padded).to(weight.device), lengths)
        logits = model.classifier(backbone.embed(features.to(weight.dtype)).float())
        is_sigmoid = scorer.activation == "sigmoid"
        rows.append((logits.sigmoid() if is_sigmoid else logits.softmax(dim=1)).cpu().numpy())
    return np.concatenate(rows)
