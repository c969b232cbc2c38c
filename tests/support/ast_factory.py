"""Small ASTs with random weights, ours and transformers', and folders of them to damage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from transforms.models.ast.config import ASTConfig
from transforms.models.ast.model import ASTForAudioClassification
from transforms.models.ast.tensor_names import to_layout

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_length": 128,
    "num_labels": 5,
}
NAMES = ("dog", "rain", "sea, waves", "crying baby", "clock")
STATS = {"mean": -3.5, "std": 2.5}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Random values in every parameter: transformers starts tokens and positions at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layernorm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 1
                parameter.copy_(noise / math.sqrt(fan_in) if fan_in > 1 else 0.2 * noise)
        for name, parameter in model.named_parameters():
            if name.endswith(("_token", "position_embeddings")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def make_pair(
    attention: str = "sdpa", **fields: Any
) -> tuple[ASTForAudioClassification, transformers.ASTForAudioClassification]:
    """Ours and transformers' model with the same weights, loaded by name, strictly."""
    settings = {**TINY, **fields}
    theirs = transformers.ASTForAudioClassification(
        transformers.ASTConfig(**settings, attn_implementation=attention)
    ).eval()
    randomise(theirs)
    ours = ASTForAudioClassification(ASTConfig(**settings)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def make_input(config: ASTConfig, batch_size: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, config.max_length, config.num_mel_bins, generator=generator)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def make_model(seed: int = 0, **fields: Any) -> ASTForAudioClassification:
    settings = {**TINY, "id2label": dict(enumerate(NAMES)), **fields}
    del settings["id2label" if "num_labels" in fields else "num_labels"]
    model = ASTForAudioClassification(ASTConfig(**settings)).eval()
    randomise(model, seed)
    return model


def edit_json(path: Path, **changes: Any) -> None:
    """Change values of a JSON file; None takes one out."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def write_pth(path: Path, model: ASTForAudioClassification, **extra: torch.Tensor) -> Path:
    """Save a model as the original code does, the unused DeiT heads included."""
    tensors = to_layout(model.state_dict(), model.config, "original")
    width = model.config.hidden_size
    tensors["module.v.head.weight"] = torch.randn(1000, width)
    tensors["module.v.head_dist.bias"] = torch.randn(1000)
    torch.save({**tensors, **extra}, path)
    return path


def states_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
