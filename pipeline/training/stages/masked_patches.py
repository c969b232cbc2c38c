"""Teach an AST to fill in the hidden parts of a spectrogram, before it learns any label.

A masked autoencoder. The encoder is the AST itself, which sees the class and distillation tokens
and the kept patches. The decoder is small and is discarded afterwards. Training with labels then
starts from the encoder's weights.

Sources: He et al. 2021, arXiv:2111.06377; for spectrograms Huang et al. 2022, arXiv:2207.06405, and
Baade et al. 2022, arXiv:2203.16691.

Shapes in comments: B clips, T frames, F mel bins, N patches, K of them kept, D hidden size of the
encoder, W width of the decoder.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from transforms.models.ast.config import ASTConfig
from transforms.models.ast.model import ASTLayer, ASTModel, initialise_from_scratch
from transforms.models.ast.tensor_names import NUM_PREFIX_TOKENS

# Approximate width of the decoder's attention heads.
_DECODER_HEAD_WIDTH = 32
# Added to a patch's variance, so that silence does not become loud noise.
_VARIANCE_OFFSET = 1e-2


class MaskedPatchDecoder(nn.Module):
    """Predicts the values of every patch from the tokens of the kept ones, with tokens W wide.

    ``generator`` draws the initial weights; None for torch's own.
    """

    def __init__(
        self,
        config: ASTConfig,
        width: int,
        num_layers: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_patches = config.num_tokens - NUM_PREFIX_TOKENS
        block = dataclasses.replace(
            config,
            hidden_size=width,
            num_attention_heads=_num_heads(width),
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.projection = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.layers = nn.ModuleList(ASTLayer(block) for _ in range(num_layers))
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.output = nn.Linear(width, config.patch_size**2)
        initialise_from_scratch(self, generator=generator)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """Predict all patches, shape (B, N, patch_size²), values normalised per patch.

        ``tokens`` are the encoder's output for the prefix tokens and the kept patches, shape
        (B, 2 + K, D); ``kept`` are the indices of these patches, shape (B, K), int64.
        """
        x = self.projection(tokens)  # (B, 2 + K, W)
        index = kept.unsqueeze(2).expand(-1, -1, x.shape[2])  # (B, K, W)
        patches = self.mask_token.to(x.dtype).expand(x.shape[0], self.num_patches, -1)
        patches = patches.scatter(1, index, x[:, NUM_PREFIX_TOKENS:])  # (B, N, W)
        x = torch.cat((x[:, :NUM_PREFIX_TOKENS], patches), dim=1) + self.position_embeddings
        for layer in self.layers:
            x, _ = layer(x)
        guessed: Tensor = self.output(self.layernorm(x[:, NUM_PREFIX_TOKENS:]))
        return guessed


def _num_heads(width: int) -> int:
    """Return the largest number of heads that divides the width and leaves each wide enough."""
    most = max(1, width // _DECODER_HEAD_WIDTH)
    return next(number for number in range(most, 0, -1) if width % number == 0)


def patches_of(features: Tensor, config: ASTConfig) -> Tensor:
    """Cut features (B, T, F) into the patches that the model's tokens represent.

    They overlap if the strides are smaller than the patches. Shape (B, N, patch_size²): patches
    frequency-major, and so are the values in each.
    """
    side = config.patch_size
    image = features.transpose(1, 2)  # (B, F, T)
    patches = image.unfold(1, side, config.frequency_stride).unfold(2, side, config.time_stride)
    return patches.reshape(features.shape[0], -1, side * side)  # from (B, rows, columns, …)


def draw_kept(num_clips: int, num_patches: int, ratio: float, rng: np.random.Generator) -> Tensor:
    """Draw the patches that each clip keeps when a share of them is hidden or dropped.

    ``ratio`` is the share to drop, in [0, 1), rounded to whole patches; at least one is kept.
    Indices are in ascending order, shape (B, kept patches), int64, on the CPU.
    """
    num_kept = max(1, num_patches - round(ratio * num_patches))
    order = rng.random((num_clips, num_patches)).argsort(axis=1)
    return torch.from_numpy(np.sort(order[:, :num_kept], axis=1))


def masked_patch_loss(
    model: ASTModel, decoder: MaskedPatchDecoder, features: Tensor, kept: Tensor
) -> Tensor:
    """Compute the mean squared error of the predicted hidden patches: a scalar, always float32.

    Each patch is normalised by its own mean and variance first, so that the model must predict its
    content rather than its loudness. Predicting 0 everywhere has a loss of just under 1.

    ``features`` are normalised, shape (B, T, F). ``kept`` are indices of the patches that the
    encoder sees, shape (B, K), int64, same device; ``ValueError`` if they leave none hidden.
    """
    if kept.shape[1] >= decoder.num_patches:
        raise ValueError(
            f"kept has {kept.shape[1]} of {decoder.num_patches} patches, so none is hidden; "
            "expected fewer. Raise pretraining.masked_ratio."
        )
    guessed = decoder(model.forward_tokens(features, kept), kept).float()
    errors = (guessed - _normalised(patches_of(features.float(), model.config))).square()
    is_hidden = torch.ones(errors.shape[:2], device=errors.device).scatter(1, kept, 0.0)  # (B, N)
    # Multiplied rather than indexed: indexing would wait for the device.
    loss: Tensor = (errors.mean(dim=2) * is_hidden).sum() / is_hidden.sum()
    return loss


def _normalised(patches: Tensor) -> Tensor:
    """Normalise each patch by its own mean and standard deviation; (B, N, values)."""
    centred = patches - patches.mean(dim=2, keepdim=True)
    variance = patches.var(dim=2, keepdim=True)
    return centred / (variance + _VARIANCE_OFFSET).sqrt()
