"""Small ASTs with random weights, in folders that transformers reads as well."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transforms.models.ast.checkpoints import save_pretrained
from transforms.models.ast.config import ASTConfig
from transforms.models.ast.model import ASTForAudioClassification

TINY_LABELS = ("dog", "rain", "rooster", "helicopter", "clock tick")
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "frequency_stride": 16,
    "time_stride": 16,
    "problem_type": "multi_label_classification",
}
MEAN, STD = -4.2677393, 4.5689974


def tiny_config(**changes: object) -> ASTConfig:
    """Return two layers of width 32 for 1024 frames and five labels; large strides keep it fast."""
    config = ASTConfig(**TINY).with_labels(TINY_LABELS)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Set every parameter to a random value: zeros (class tokens, biases) would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * scale
            is_norm_weight = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + noise if is_norm_weight else noise)


def write_tiny_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write a model folder: config.json, model.safetensors, preprocessor_config.json."""
    model = ASTForAudioClassification(tiny_config(**changes)).eval()
    randomise(model, seed)
    save_pretrained(model, folder, mean=MEAN, std=STD)
    return folder


def write_transformers_model(
    folder: Path, seed: int = 0, scale: float = 0.2, **changes: object
) -> Path:
    """Let transformers write a model of the shape of ``tiny_config``."""
    import transformers

    labels = dict(enumerate(TINY_LABELS))
    config = transformers.ASTConfig(**{**TINY, "id2label": labels, **changes})
    model = transformers.ASTForAudioClassification(config).eval()
    randomise(model, seed, scale)
    model.save_pretrained(folder)
    transformers.ASTFeatureExtractor(mean=MEAN, std=STD).save_pretrained(folder)
    return folder
