"""Masked-patch pre-training: which patches, what is guessed of them, and that it can be learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.training.stages.masked_patches import (
    MaskedPatchDecoder,
    draw_kept,
    masked_patch_loss,
    patches_of,
)
from transforms.models.ast.config import ASTConfig
from transforms.models.ast.model import ASTModel, initialise_from_scratch

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "frequency_stride": 16,
    "time_stride": 16,
    "max_length": 64,
    "num_mel_bins": 32,
    "layer_norm_eps": 1e-6,
}  # 2 by 4 patches


def make_pair(seed: int = 0, **fields: Any) -> tuple[ASTModel, MaskedPatchDecoder]:
    generator = torch.Generator().manual_seed(seed)
    config = ASTConfig(**{**TINY, **fields})
    model = ASTModel(config)
    initialise_from_scratch(model, generator=generator)
    return model, MaskedPatchDecoder(config, width=32, num_layers=1, generator=generator)


def make_features(config: ASTConfig, batch_size: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, config.max_length, config.num_mel_bins, generator=generator)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"frequency_stride": 10, "time_stride": 7},
        {"patch_size": 8, "frequency_stride": 8, "time_stride": 5, "max_length": 61},
    ],
)
def test_patches_are_what_the_model_s_projection_sees(fields: dict[str, Any]) -> None:
    config = ASTConfig(**{**TINY, **fields})
    model = ASTModel(config)
    features = make_features(config)
    patches = patches_of(features, config)
    assert patches.shape == (3, config.num_tokens - 2, config.patch_size**2)
    projection = model.embeddings.patch_embeddings.projection
    by_hand = patches @ projection.weight.flatten(1).T + projection.bias
    torch.testing.assert_close(
        by_hand, model.embeddings.patch_embeddings(features), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("ratio", "num_patches", "num_kept"),
    [(0.7, 256, 77), (0.5, 8, 4), (0.0, 8, 8), (0.99, 8, 1), (0.7, 1, 1), (0.75, 512, 128)],
)
def test_as_many_patches_are_kept_as_the_ratio_says(
    ratio: float, num_patches: int, num_kept: int
) -> None:
    kept = draw_kept(5, num_patches, ratio, np.random.default_rng(0))
    assert (kept.shape, kept.dtype) == ((5, num_kept), torch.int64)
    assert (kept.diff(dim=1) > 0).all()  # each once, in order
    assert kept.min() >= 0
    assert kept.max() < num_patches


def test_each_clip_keeps_patches_of_its_own_and_every_patch_as_often() -> None:
    kept = draw_kept(4000, 8, 0.5, np.random.default_rng(0))
    counts = torch.bincount(kept.flatten(), minlength=8)
    assert (counts - 2000).abs().max() < 130  # four standard deviations of a fair draw
    assert len({tuple(row) for row in kept.tolist()}) == 70  # every choice of 4 of 8


class Guesses(torch.nn.Module):
    """A decoder that gives what it is told."""

    def __init__(self, guesses: torch.Tensor) -> None:
        super().__init__()
        self.guesses = guesses
        self.num_patches = guesses.shape[1]

    def forward(self, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return self.guesses


def normalised_by_hand(patches: torch.Tensor) -> torch.Tensor:
    values = patches.double().numpy()
    mean = values.mean(axis=2, keepdims=True)
    return torch.from_numpy(
        (values - mean) / np.sqrt(values.var(axis=2, ddof=1, keepdims=True) + 1e-2)
    )


def test_only_hidden_patches_count_each_normalised_by_itself() -> None:
    model, _ = make_pair()
    features = make_features(model.config) * 3 + 5
    kept = torch.tensor([[0, 1, 2], [0, 3, 7], [4, 5, 6]])
    hidden = [[3, 4, 5, 6, 7], [1, 2, 4, 5, 6], [0, 1, 2, 3, 7]]
    guesses = torch.randn(3, 8, 256, generator=torch.Generator().manual_seed(2))
    errors = (guesses - normalised_by_hand(patches_of(features, model.config))) ** 2
    expected = torch.stack([errors[clip, rows] for clip, rows in enumerate(hidden)]).mean()
    loss = masked_patch_loss(model, Guesses(guesses), features, kept)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_predicting_zero_has_a_loss_of_just_under_one_and_none_for_silence() -> None:
    model, _ = make_pair()
    features = make_features(model.config)
    kept = draw_kept(3, 8, 0.7, np.random.default_rng(0))
    zeros: Any = Guesses(torch.zeros(3, 8, 256))
    assert 0.97 < masked_patch_loss(model, zeros, features, kept).item() < 1.0
    silence = torch.full_like(features, -1.278)
    assert masked_patch_loss(model, zeros, silence, kept).item() == pytest.approx(0.0, abs=1e-9)


def test_a_hidden_patch_has_no_influence_on_the_predictions() -> None:
    model, decoder = make_pair()
    features = make_features(model.config, batch_size=1)
    kept = torch.tensor([[0, 2, 5]])
    changed = features.clone()
    changed[:, 16:32, :16] = 9.0  # patch 1: frames of the second column, bins of the first row
    guesses = decoder(model.forward_tokens(features, kept), kept)
    assert torch.equal(decoder(model.forward_tokens(changed, kept), kept), guesses)
    changed[:, 32:48, :16] = 9.0  # patch 2, which is kept
    assert not torch.equal(decoder(model.forward_tokens(changed, kept), kept), guesses)


def test_the_order_of_the_kept_patches_does_not_matter() -> None:
    model, decoder = make_pair()
    features = make_features(model.config)
    kept = torch.tensor([[0, 2, 5], [1, 3, 4], [5, 6, 7]])
    loss = masked_patch_loss(model, decoder, features, kept)
    other = masked_patch_loss(model, decoder, features, kept.flip(1))
    assert loss.item() == pytest.approx(other.item(), rel=1e-5)


def test_the_loss_is_float32_under_autocast() -> None:
    model, decoder = make_pair()
    features = make_features(model.config)
    kept = draw_kept(3, 8, 0.7, np.random.default_rng(0))
    exact = masked_patch_loss(model, decoder, features, kept)
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_patch_loss(model, decoder, features, kept)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)


@pytest.mark.parametrize(("width", "heads"), [(96, 3), (32, 1), (1, 1), (100, 2), (97, 1)])
def test_any_width_of_the_decoder_has_heads_that_divide_it(width: int, heads: int) -> None:
    decoder = MaskedPatchDecoder(ASTConfig(**TINY), width, num_layers=2)
    assert [layer.attention.num_heads for layer in decoder.layers] == [heads, heads]


def test_hiding_nothing_is_refused() -> None:
    model, decoder = make_pair()
    kept = draw_kept(3, 8, 0.01, np.random.default_rng(0))
    with pytest.raises(ValueError, match="kept has 8 of 8 patches, so none is hidden"):
        masked_patch_loss(model, decoder, make_features(model.config), kept)


def make_stripes(config: ASTConfig) -> torch.Tensor:
    """Clips that hum and clips that tick, four each: any patch tells what the others look like."""
    noise = 0.1 * make_features(config, batch_size=8)
    hum = torch.sin(torch.arange(config.num_mel_bins) * torch.pi / 4).expand(config.max_length, -1)
    tick = torch.sin(torch.arange(config.max_length) * torch.pi / 4)[:, None].expand_as(hum)
    return noise + torch.stack([hum, tick] * 4)


def test_a_tiny_model_learns_to_fill_in_hidden_patches() -> None:
    model, decoder = make_pair()
    features = make_stripes(model.config)
    parameters = [*model.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(30):
        loss = masked_patch_loss(model, decoder, features, draw_kept(8, 8, 0.5, rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0, abs=0.1)  # as good as guessing 0
    # Without looking at what is kept, guessing the mean of hum and tick leaves 0.5.
    assert np.mean(losses[-5:]) < 0.2


def test_every_weight_learns() -> None:
    model, decoder = make_pair()
    kept = draw_kept(3, 8, 0.7, np.random.default_rng(0))
    masked_patch_loss(model, decoder, make_features(model.config), kept).backward()
    for part in (model, decoder):
        without = [
            name for name, p in part.named_parameters() if p.grad is None or not p.grad.any()
        ]
        assert without == []
