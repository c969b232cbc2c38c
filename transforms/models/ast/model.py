"""The whole Audio Spectrogram Transformer in a single file.

    features (B, 1024, 128) ─16×16 patches, stride 10─▶ 12·101 tokens ─┐
                                     class, distillation token ────────┴▶ (B, 1214, 768)
        ─12 × [x += attention(norm(x)); x += mlp(norm(x))]─norm─▶ last_hidden_state
        ─mean of the first two tokens─▶ pooler_output (B, 768) ─norm, linear─▶ logits (B, 527)

Guarantees: the names, fields, arguments and outputs of transformers' AST, and its numbers to
float32 rounding. It is stricter in one respect: an input must have exactly ``max_length`` frames
and ``num_mel_bins`` bins (transformers accepts up to nine frames more or fewer at stride 10, which
shifts the meaning of the position embeddings or silently cuts the input). It adds the original
code's two LayerNorm epsilons, attentions on request, and, for training, a pass over some of the
patches only.

Shapes in comments: B clips, T frames, F mel bins, N tokens, D hidden size, H heads, K head width.

Sources: Gong et al. 2021, arXiv:2104.01778; YuanGongND/ast src/models/ast_models.py; transformers
5.23 models/audio_spectrogram_transformer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from transforms.models.ast.config import ACTIVATIONS, ASTConfig
from transforms.models.ast.pretrained import PretrainedModel
from transforms.models.ast.tensor_names import BASE, NUM_PREFIX_TOKENS

# The most tokens for which training in half precision on a CPU attends step by step. The fused
# kernel's backward pass is slow there: for one block of 32 clips with 3 heads it takes 38 ms, the
# steps 12 ms, at 79 tokens, and 61 ms against 34 ms at 130 (one core, bfloat16, forward and
# backward). With more tokens, the scores that the steps keep (N² per head) cost more than that.
_MAX_STEPWISE_TOKENS = 320


class ModelOutput:
    """The output of ``forward``, read by name, by key, or as a tuple without the Nones."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None, in the order of the fields."""
        return tuple(getattr(self, name) for name in self.keys())

    def keys(self) -> tuple[str, ...]:
        """Return the names of the values that are not None."""
        names = (f.name for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return tuple(name for name in names if getattr(self, name) is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{key!r}; this output holds {', '.join(self.keys())}")
        return getattr(self, key)


@dataclass
class ASTModelOutput(ModelOutput):
    """The output of the transformer.

    Attributes:
        last_hidden_state: Every token after the final LayerNorm, shape (B, N, D).
        pooler_output: Mean of the first two tokens, shape (B, D): AST's embedding.
        hidden_states: The embedded input and each block's output, before the final LayerNorm;
            ``num_hidden_layers + 1`` tensors of shape (B, N, D). None unless requested.
        attentions: Each block's attention weights, shape (B, H, N, N). None unless requested.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """The output of the classifier.

    Attributes:
        loss: A scalar, if labels were given.
        logits: Shape (B, num_labels), before any activation.
    """

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ASTPatchEmbeddings(nn.Module):
    """Cuts features into overlapping patches and projects each onto a token."""

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        self.expected_shape = (config.max_length, config.num_mel_bins)
        self.projection = nn.Conv2d(
            1,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=(config.frequency_stride, config.time_stride),
        )

    def forward(self, input_values: Tensor) -> Tensor:
        """Turn features (B, T, F) into tokens (B, patches, D), frequency-major."""
        if input_values.ndim != 3 or tuple(input_values.shape[1:]) != self.expected_shape:
            frames, bins = self.expected_shape
            raise ValueError(
                f"input_values has the shape {tuple(input_values.shape)}; expected "
                f"(batch, {frames}, {bins}): exactly max_length={frames} frames of "
                f"num_mel_bins={bins} bins. ASTFeatureExtractor pads and cuts to that"
            )
        image = input_values.unsqueeze(1).transpose(2, 3)  # (B, 1, F, T)
        x: Tensor = self.projection(image)  # (B, D, patch rows, patch columns)
        return x.flatten(2).transpose(1, 2)  # (B, rows * columns, D)


class ASTEmbeddings(nn.Module):
    """Puts the class and distillation tokens before the patches, and adds positions."""

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = ASTPatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(
            torch.zeros(1, config.num_tokens, config.hidden_size)
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_values: Tensor, kept: Tensor | None = None) -> Tensor:
        """Turn features (B, T, F) into tokens (B, N, D), or (B, 2 + K, D) if K patches are kept."""
        patches = self.patch_embeddings(input_values)
        batch_size = patches.shape[0]
        prefix = (
            self.cls_token.expand(batch_size, -1, -1),
            self.distillation_token.expand(batch_size, -1, -1),
        )
        x = torch.cat((*prefix, patches), dim=1)  # (B, N, D)
        x = x + self.position_embeddings
        if kept is not None:  # only now, so that each patch has its own position embedding
            x = _keep_patches(x, kept)  # (B, 2 + K, D)
        embedded: Tensor = self.dropout(x)
        return embedded


def _keep_patches(x: Tensor, kept: Tensor) -> Tensor:
    """Keep the prefix tokens and some patches: (B, N, D) and indices (B, K) to (B, 2 + K, D)."""
    if kept.ndim != 2 or kept.shape[0] != x.shape[0] or kept.dtype != torch.int64:
        raise ValueError(
            f"kept is {kept.dtype} of the shape {tuple(kept.shape)}; expected int64 indices of "
            f"patches of the shape ({x.shape[0]}, K), K of them per clip"
        )
    index = kept.unsqueeze(2).expand(-1, -1, x.shape[2])  # (B, K, D)
    patches = x[:, NUM_PREFIX_TOKENS:].gather(1, index)
    return torch.cat((x[:, :NUM_PREFIX_TOKENS], patches), dim=1)


class ASTAttention(nn.Module):
    """Multi-head self-attention, fused or, if that trains faster or gives the weights, in steps."""

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        num_queries: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from the first ``num_queries`` (Q) tokens (None: all) to every token.

        Args:
            hidden_states: Shape (B, N, D).
            attention_mask: Booleans of shape (B, 1, 1, N), False for tokens to ignore; or None.
            output_attentions: Whether to return the weights too; the fused kernel has none.

        Returns:
            Tokens of shape (B, Q, D), and weights of shape (B, H, Q, N) or None.
        """
        query = self._split_heads(self.q_proj(hidden_states[:, :num_queries]))  # (B, H, Q, K)
        key = self._split_heads(self.k_proj(hidden_states))  # (B, H, N, K)
        value = self._split_heads(self.v_proj(hidden_states))  # (B, H, N, K)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if output_attentions or self._trains_faster_in_steps(key):
            weights = F.dropout(_attention_weights(query, key, attention_mask), dropout)
            context = weights @ value  # (B, H, Q, K)
        else:
            context = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, dropout_p=dropout
            )
        output = self.o_proj(context.transpose(1, 2).flatten(2))
        return output, weights if output_attentions else None

    def _trains_faster_in_steps(self, key: Tensor) -> bool:
        return (
            self.training
            and torch.is_grad_enabled()
            and key.device.type == "cpu"
            and key.dtype != torch.float32  # in float32 the fused kernel is as fast
            and key.shape[2] <= _MAX_STEPWISE_TOKENS
        )

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # (B, H, tokens, K)


def _attention_weights(query: Tensor, key: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Softmax of the scaled scores, in float32 whatever the model's type; (B, H, Q, N)."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)


class ASTMLP(nn.Module):
    """The two linear layers of a block."""

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map tokens (B, N, D) to tokens (B, N, D), each on its own."""
        x: Tensor = self.fc2(self.activation(self.fc1(hidden_states)))
        return x


class ASTLayer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        self.attention = ASTAttention(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ASTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        num_queries: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results as ``ASTAttention``'s."""
        x = hidden_states  # (B, N, D)
        attended, weights = self.attention(
            self.layernorm_before(x), attention_mask, output_attentions, num_queries
        )
        x = x[:, :num_queries] + self.dropout(attended)  # (B, Q, D)
        x = x + self.dropout(self.mlp(self.layernorm_after(x)))
        return x, weights


class ASTModel(PretrainedModel):
    """The transformer without a head: features in, tokens and their pooled embedding out."""

    name_prefix = BASE

    def __init__(self, config: ASTConfig) -> None:
        super().__init__(config)
        self.embeddings = ASTEmbeddings(config)
        self.layers = nn.ModuleList(ASTLayer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.apply(partial(_initialise, std=config.initializer_range))

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ASTModelOutput | tuple[Any, ...]:
        """Run the transformer.

        Args:
            input_values: Normalised features, exactly (B, max_length, num_mel_bins).
            attention_mask: Shape (B, num_tokens): per token, not per frame; 0 is ignored. AST is
                trained without a mask and sees the padding.
            output_attentions: Return the weights, at the price of unfused attention.
            output_hidden_states: Return the input and output of the blocks.
            return_dict: False for a tuple. None for these three means the config's value.

        Raises:
            ValueError: The input or the mask has another shape.
        """
        config = self.config
        output_attentions = _either(output_attentions, config.output_attentions)
        output_hidden_states = _either(output_hidden_states, config.output_hidden_states)
        mask = self._expand_mask(attention_mask, input_values.shape[0])

        x = self.embeddings(input_values)  # (B, N, D)
        hidden_states, attentions = [x], []
        for layer in self.layers:
            x, weights = layer(x, mask, output_attentions)
            if output_hidden_states:  # else each block's tokens are freed as soon as they are used
                hidden_states.append(x)
            attentions.append(weights)
        tokens = self.layernorm(x)

        output = ASTModelOutput(
            last_hidden_state=tokens,
            pooler_output=pool_tokens(tokens),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if _either(return_dict, config.return_dict) else output.to_tuple()

    def forward_tokens(self, input_values: Tensor, kept: Tensor | None = None) -> Tensor:
        """Compute ``last_hidden_state`` alone, of every patch or of some.

        Args:
            input_values: Normalised features, exactly (B, max_length, num_mel_bins).
            kept: Indices of the patches that each clip keeps, frequency-major from 0, shape
                (B, K), int64; None for all. The prefix tokens stay, and each patch keeps its own
                position embedding: the result equals that of a mask over the other patches, at
                the price of 2 + K tokens.

        Returns:
            Shape (B, 2 + K, D), patches in the order of ``kept``; (B, N, D) if it is None.

        Raises:
            ValueError: The input or ``kept`` has another shape.

        Source: patchout, Koutini et al. 2021, arXiv:2110.05069.
        """
        x = self.embeddings(input_values, kept)  # (B, tokens, D)
        for layer in self.layers:
            x, _ = layer(x)
        tokens: Tensor = self.layernorm(x)
        return tokens

    def embed(self, input_values: Tensor, kept: Tensor | None = None) -> Tensor:
        """Compute ``pooler_output`` alone, shape (B, D); arguments as ``forward_tokens``'s.

        In the last block, only the two tokens that are pooled pass the queries and the MLP: 7 %
        fewer operations at 1214 tokens, the same numbers.
        """
        x = self.embeddings(input_values, kept)  # (B, N, D)
        for layer in self.layers[:-1]:
            x, _ = layer(x)
        x, _ = self.layers[-1](x, num_queries=NUM_PREFIX_TOKENS)  # (B, 2, D)
        return pool_tokens(self.layernorm(x))

    def _expand_mask(self, attention_mask: Tensor | None, batch_size: int) -> Tensor | None:
        if attention_mask is None:
            return None
        expected = (batch_size, self.config.num_tokens)
        if tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}; expected "
                f"{expected}: one value per token, not per frame"
            )
        return attention_mask.to(torch.bool)[:, None, None, :]  # (B, 1, 1, N)


class ASTMLPHead(nn.Module):
    """Turns an embedding into logits; runs in its own weights' type, float32 in Earmark."""

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        own = config.head_layer_norm_eps
        eps = config.layer_norm_eps if own is None else own
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=eps)
        self.dense = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map embeddings (B, D) to logits (B, num_labels)."""
        logits: Tensor = self.dense(self.layernorm(embedding))
        return logits


class ASTForAudioClassification(PretrainedModel):
    """AST with its head; ``embed`` and ``classifier`` are its two halves, to run separately."""

    def __init__(self, config: ASTConfig) -> None:
        super().__init__(config)
        self.audio_spectrogram_transformer = ASTModel(config)
        self.classifier = ASTMLPHead(config)
        self.classifier.apply(partial(_initialise, std=config.initializer_range))

    def forward(
        self,
        input_values: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classify features; arguments and errors as ``ASTModel``'s.

        ``labels`` are the targets of the loss (``classification_loss``), or None for no loss.
        """
        hidden = self.audio_spectrogram_transformer(
            input_values, attention_mask, output_attentions, output_hidden_states, return_dict=True
        )
        logits = self.classifier(hidden.pooler_output)
        output = SequenceClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=hidden.hidden_states,
            attentions=hidden.attentions,
        )
        return output if _either(return_dict, self.config.return_dict) else output.to_tuple()

    def embed(self, input_values: Tensor, kept: Tensor | None = None) -> Tensor:
        """Compute the embedding alone, shape (B, D); ``classifier`` turns it into logits.

        Arguments and errors as ``ASTModel.forward_tokens``'s.
        """
        return self.audio_spectrogram_transformer.embed(input_values, kept)

    def compute_logits(self, input_values: Tensor, kept: Tensor | None = None) -> Tensor:
        """Compute the logits alone, shape (B, num_labels); arguments as ``embed``'s."""
        logits: Tensor = self.classifier(self.embed(input_values, kept))
        return logits


def pool_tokens(tokens: Tensor) -> Tensor:
    """AST's embedding: the mean of the class and distillation tokens; (B, N, D) to (B, D)."""
    return (tokens[:, 0] + tokens[:, 1]) / 2


def classification_loss(logits: Tensor, labels: Tensor, config: ASTConfig) -> Tensor:
    """Compute the loss that transformers computes, without changing the config.

    ``config.problem_type`` decides: mean squared error for regression, cross entropy for a single
    label, binary cross entropy for several. Where it is None: one output is regression, whole
    numbers are a single label, anything else several.

    Args:
        logits: Shape (B, num_labels).
        labels: Indices of shape (B,), or targets of shape (B, num_labels) in [0, 1]; targets of
            shape (B,) for a regression with one output.
    """
    labels = labels.to(logits.device)
    problem_type = config.problem_type
    if problem_type is None:
        if config.num_labels == 1:
            problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            problem_type = "single_label_classification"
        else:
            problem_type = "multi_label_classification"
    if problem_type == "regression":
        if config.num_labels == 1:
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        return F.mse_loss(logits, labels)
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


def resize_position_embeddings(
    position_embeddings: Tensor, source_grid: tuple[int, int], target_grid: tuple[int, int]
) -> Tensor:
    """Fit position embeddings to another patch grid, as the original code does.

    Per axis, time first: a smaller grid is cut from the middle, a larger one interpolated
    linearly. The two prefix tokens keep theirs.

    Args:
        position_embeddings: Shape (1, 2 + rows * columns, D) of the source grid; the result has
            the same shape of the target grid.
        source_grid: (frequency, time) patches, as ``ASTConfig.patch_grid``.
        target_grid: The same of the result.

    Raises:
        ValueError: The embeddings do not fit the source grid.

    Source: YuanGongND/ast src/models/ast_models.py, both the ImageNet and the AudioSet branch.
    """
    rows, columns = source_grid
    expected = NUM_PREFIX_TOKENS + rows * columns
    if position_embeddings.ndim != 3 or position_embeddings.shape[1] != expected:
        raise ValueError(
            f"position_embeddings has the shape {tuple(position_embeddings.shape)}; expected "
            f"(1, {expected}, hidden_size) for a grid of {rows} by {columns} patches"
        )
    prefix = position_embeddings[:, :NUM_PREFIX_TOKENS]
    patches = position_embeddings[:, NUM_PREFIX_TOKENS:]
    grid = patches.transpose(1, 2).reshape(1, -1, rows, columns)  # (1, D, rows, columns)
    grid = _resize_axis(grid, 3, target_grid[1])
    grid = _resize_axis(grid, 2, target_grid[0])
    return torch.cat((prefix, grid.flatten(2).transpose(1, 2)), dim=1)


def _resize_axis(grid: Tensor, axis: int, size: int) -> Tensor:
    source_size = grid.shape[axis]
    if size <= source_size:
        return grid.narrow(axis, source_size // 2 - size // 2, size)
    shape = [grid.shape[2], grid.shape[3]]
    shape[axis - 2] = size
    return F.interpolate(grid, size=shape, mode="bilinear", align_corners=False)


def _initialise(module: nn.Module, std: float) -> None:
    """Draw weights as in transformers: normal, zero biases; tokens and positions stay zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        if module.weight.is_meta:  # nothing to draw, and torch would load its compiler for it
            return
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def initialise_from_scratch(
    module: nn.Module, std: float = 0.02, generator: torch.Generator | None = None
) -> None:
    """Draw every weight again, in place, for training without a checkpoint.

    A fresh AST has tokens and position embeddings of zero, as in transformers, where a checkpoint
    fills them. It trains badly from there: the class and the distillation token are equal, get
    equal gradients and stay equal, and no patch knows its position before position embeddings have
    grown. So these are drawn too. The patch projection is drawn like torch's convolutions, by its
    fan-in, so that patches of any size give tokens of the same magnitude. Biases are zero.

    Args:
        std: Standard deviation of linear weights, tokens and position embeddings, before they are
            truncated at two standard deviations; above 0.
        generator: Source of randomness; None for torch's own.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            _draw_truncated(part.weight, std, generator)
        elif isinstance(part, nn.Conv2d):
            nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5), generator=generator)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        else:  # tokens and position embeddings stand in no layer
            for parameter in part.parameters(recurse=False):
                _draw_truncated(parameter, std, generator)
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)


def _draw_truncated(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)


def _either(argument: bool | None, default: bool) -> bool:
    return default if argument is None else argument
