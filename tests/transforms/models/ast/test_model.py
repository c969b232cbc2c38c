"""The model against transformers' own, with random weights in every parameter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from tests.transforms.models.ast.factory import TINY, assert_close, make_input, make_pair, randomise
from transforms.models.ast.config import ASTConfig
from transforms.models.ast.model import (
    ASTForAudioClassification,
    ASTModel,
    initialise_from_scratch,
    resize_position_embeddings,
)

SHAPES: dict[str, dict[str, Any]] = {
    "stride 10": {},
    "stride 16": {"frequency_stride": 16, "time_stride": 16},
    "uneven strides": {"frequency_stride": 12, "time_stride": 7, "max_length": 100},
    "other bins": {"num_mel_bins": 40, "max_length": 61},
    "small patches": {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 64},
    "no qkv bias": {"qkv_bias": False, "max_length": 64},
    "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1},
    "large epsilon": {"layer_norm_eps": 1e-2},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh", "max_length": 64},
    "new gelu": {"hidden_act": "gelu_new", "max_length": 64},
    "relu": {"hidden_act": "relu", "max_length": 64},
    "silu": {"hidden_act": "silu", "max_length": 64},
}


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


# --- Against transformers ------------------------------------------------------------------


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_those_of_transformers(fields: dict[str, Any], attention: str) -> None:
    ours, theirs = make_pair(attention, **fields)
    features = make_input(ours.config)
    expected = theirs(features).logits
    assert expected.std() > 0.1  # random weights must not make the comparison empty
    assert_close(ours(features).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), pytest.param(768, 12, marks=pytest.mark.slow)]
)
def test_twelve_layers_equal_those_of_transformers(width: int, heads: int) -> None:
    """Of the bundled model's width, and of the published models'."""
    ours, theirs = make_pair(
        hidden_size=width, num_hidden_layers=12, num_attention_heads=heads,
        intermediate_size=4 * width, max_length=1024, num_labels=527,
    )  # fmt: skip
    features = make_input(ours.config, batch_size=1)
    assert_close(ours(features).logits, theirs(features).logits, atol=5e-5)


def test_every_output_equals_that_of_transformers() -> None:
    ours, theirs = make_pair("eager")
    features = make_input(ours.config)
    asked = {"output_attentions": True, "output_hidden_states": True}
    found, expected = ours(features, **asked), theirs(features, **asked)
    assert_close(found.logits, expected.logits, atol=1e-5)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    assert len(found.attentions) == len(expected.attentions) == 2
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close(one, other, atol=1e-5)
    for one, other in zip(found.attentions, expected.attentions, strict=True):
        assert_close(one, other, atol=1e-6)


def test_the_base_model_equals_that_of_transformers() -> None:
    ours, theirs = make_pair()
    features = make_input(ours.config)
    found = ours.audio_spectrogram_transformer(features)
    expected = theirs.audio_spectrogram_transformer(features)
    assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    assert_close(found.pooler_output, expected.pooler_output, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_mask_means_what_it_means_in_transformers(attention: str) -> None:
    ours, theirs = make_pair(attention)
    features = make_input(ours.config)
    mask = torch.ones(3, ours.config.num_tokens, dtype=torch.long)
    mask[1, 50:] = 0
    mask[2, 2::2] = 0
    expected = theirs(features, attention_mask=mask).logits
    found = ours(features, attention_mask=mask, output_attentions=attention == "eager").logits
    assert_close(found, expected, atol=1e-5)
    assert (found - ours(features).logits).abs().max() > 1e-3


LOSSES: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "single label, by type": ({}, torch.tensor([0, 4, 2])),
    "several labels, by type": ({}, torch.tensor([[1.0, 0, 0, 1, 0]] * 3)),
    "regression, by count": ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
    "single label": ({"problem_type": "single_label_classification"}, torch.tensor([1, 3, 0])),
    "an ignored label": ({}, torch.tensor([1, -100, 0])),
    "several labels": (
        {"problem_type": "multi_label_classification"},
        torch.tensor([[0.1, 0.9, 0, 1, 0]] * 3),
    ),
    "regression": ({"problem_type": "regression"}, torch.linspace(-1, 1, 15).view(3, 5)),
}


@pytest.mark.parametrize(("fields", "labels"), LOSSES.values(), ids=LOSSES.keys())
def test_losses_equal_those_of_transformers(fields: dict[str, Any], labels: torch.Tensor) -> None:
    ours, theirs = make_pair(**fields)
    features = make_input(ours.config)
    before = ours.config.to_dict()
    assert_close(ours(features, labels).loss, theirs(features, labels=labels).loss, atol=1e-5)
    assert ours.config.to_dict() == before


def test_config_fields_and_defaults_are_those_of_transformers() -> None:
    theirs = transformers.ASTConfig()
    ours = ASTConfig()
    for name in ours.to_dict():
        assert getattr(theirs, name) == (
            "audio-spectrogram-transformer" if name == "model_type" else getattr(ours, name)
        )
    assert ours.num_labels == theirs.num_labels == 2


def test_transformers_reads_our_config_and_we_read_theirs() -> None:
    ours = ASTConfig(num_labels=3, time_stride=12, problem_type="multi_label_classification")
    theirs = transformers.ASTConfig.from_dict(ours.to_dict())
    assert (theirs.id2label, theirs.time_stride) == (ours.id2label, 12)
    assert ASTConfig.from_dict(theirs.to_dict()) == ours
    assert ASTConfig.from_dict(ours.to_dict()) == ours


# --- What ours adds ------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_embed_and_classifier_are_the_two_halves_of_the_model(layers: int) -> None:
    ours, theirs = make_pair(num_hidden_layers=layers)
    features = make_input(ours.config)
    embedding = ours.embed(features)
    pooled = theirs.audio_spectrogram_transformer(features).pooler_output
    assert_close(embedding, pooled, atol=1e-5)
    assert_close(ours.classifier(embedding), theirs(features).logits, atol=1e-5)


def test_the_base_runs_in_bfloat16_beside_a_float32_head() -> None:
    ours, theirs = make_pair()
    features = make_input(ours.config)
    ours.audio_spectrogram_transformer.to(torch.bfloat16)
    embedding = ours.embed(features.to(torch.bfloat16))
    logits = ours.classifier(embedding.float())
    assert (embedding.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    assert_close(logits, theirs(features).logits, atol=0.1)


def test_the_head_has_its_own_epsilon() -> None:
    fields = {**TINY, "layer_norm_eps": 1e-6, "head_layer_norm_eps": 0.5}
    model = ASTForAudioClassification(ASTConfig(**fields))
    assert model.classifier.layernorm.eps == 0.5
    assert model.audio_spectrogram_transformer.layernorm.eps == 1e-6
    alike = ASTForAudioClassification(ASTConfig(**{**fields, "head_layer_norm_eps": None}))
    assert alike.classifier.layernorm.eps == 1e-6


def test_the_published_models_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        audioset = ASTForAudioClassification(ASTConfig(num_labels=527))
        commands = ASTForAudioClassification(ASTConfig(num_labels=35, max_length=128))
    assert sum(p.numel() for p in audioset.parameters()) == 86_594_063
    assert sum(p.numel() for p in commands.parameters()) == 85_395_491


# strides, frames → tokens; YuanGongND/ast issues and arXiv:2104.01778
@pytest.mark.parametrize(
    ("stride", "frames", "tokens"),
    [(10, 1024, 1214), (12, 1024, 852), (14, 1024, 659), (16, 1024, 514), (10, 512, 602),
     (10, 128, 146)],
)  # fmt: skip
def test_the_number_of_tokens_is_that_of_the_paper(stride: int, frames: int, tokens: int) -> None:
    config = ASTConfig(frequency_stride=stride, time_stride=stride, max_length=frames)
    assert config.num_tokens == tokens


# --- Some of the patches -------------------------------------------------------------------


def draw_patches(config: ASTConfig, batch_size: int, count: int) -> torch.Tensor:
    """Indices of ``count`` patches of each clip, in any order."""
    order = torch.rand(
        batch_size, config.num_tokens - 2, generator=torch.Generator().manual_seed(2)
    )
    return order.argsort(dim=1)[:, :count]


@pytest.mark.parametrize("layers", [1, 2])
def test_keeping_some_patches_equals_a_mask_over_the_others(layers: int) -> None:
    ours, theirs = make_pair("eager", num_hidden_layers=layers)
    features = make_input(ours.config)
    kept = draw_patches(ours.config, 3, 40)
    mask = torch.zeros(3, ours.config.num_tokens, dtype=torch.long)
    mask[:, :2] = 1
    mask.scatter_(1, kept + 2, 1)
    expected = theirs(features, attention_mask=mask).logits
    assert_close(ours.compute_logits(features, kept), expected, atol=1e-5)
    tokens = ours.audio_spectrogram_transformer.forward_tokens(features, kept)
    of_all = theirs.audio_spectrogram_transformer(features, attention_mask=mask)
    index = torch.cat((torch.tensor([[0, 1]]).expand(3, -1), kept + 2), dim=1)
    wanted = of_all.last_hidden_state.gather(1, index[:, :, None].expand(-1, -1, 64))
    assert_close(tokens, wanted, atol=1e-5)
    assert (expected - ours(features).logits).abs().max() > 1e-3


def test_all_patches_are_kept_by_default() -> None:
    ours, _ = make_pair()
    features = make_input(ours.config)
    base = ours.audio_spectrogram_transformer
    assert torch.equal(base.forward_tokens(features), base(features).last_hidden_state)
    assert torch.equal(ours.compute_logits(features), ours.classifier(ours.embed(features)))
    every = torch.arange(ours.config.num_tokens - 2).expand(3, -1)
    assert torch.equal(ours.embed(features, every), ours.embed(features))


@pytest.mark.parametrize(
    "kept",
    [torch.zeros(2, 5, dtype=torch.long), torch.zeros(5, dtype=torch.long), torch.zeros(3, 5)],
)
def test_kept_patches_of_another_shape_or_type_are_refused(kept: torch.Tensor) -> None:
    ours, _ = make_pair()
    with pytest.raises(ValueError, match=r"kept is .*; expected int64 indices .* \(3, K\)"):
        ours.embed(make_input(ours.config), kept)


# --- Training ------------------------------------------------------------------------------


def gradients(
    model: ASTForAudioClassification, *, precise: bool = False
) -> dict[str, torch.Tensor]:
    """Of the mean loss of three clips, in bfloat16 or in float32."""
    features = make_input(model.config)
    with (
        torch.enable_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=not precise),
    ):
        logits = model.compute_logits(features)
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 3, 1]))
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Between two gradients, relative to the second's length."""
    assert ours.keys() == theirs.keys()
    one = torch.cat([gradient.flatten() for gradient in ours.values()])
    other = torch.cat([gradient.flatten() for gradient in theirs.values()])
    return float((one - other).norm() / other.norm())


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call of the fused attention."""
    calls: list[int] = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs),
    )
    return calls


def test_half_precision_trains_on_the_cpu_without_fused_attention(fused_calls: list[int]) -> None:
    ours, _ = make_pair()
    exact = gradients(ours.train(), precise=True)
    fused_in_evaluation = gradients(ours.eval())
    fused_calls.clear()
    in_steps = gradients(ours.train())
    assert fused_calls == []
    assert distance(in_steps, exact) < 0.02
    assert distance(in_steps, exact) < 1.2 * distance(fused_in_evaluation, exact)
    ours.eval()(make_input(ours.config))
    gradients(ours.train(), precise=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours.train()(make_input(ours.config))
    assert len(fused_calls) == 6  # two layers each


def test_many_tokens_are_fused_in_training_too(fused_calls: list[int]) -> None:
    ours, _ = make_pair(max_length=512, num_hidden_layers=1)
    assert ours.config.num_tokens == 602
    gradients(ours.train())
    assert len(fused_calls) == 1


# --- Fresh weights -------------------------------------------------------------------------


def make_fresh(seed: int = 0, **fields: Any) -> ASTForAudioClassification:
    model = ASTForAudioClassification(ASTConfig(**{**TINY, **fields}))
    initialise_from_scratch(model, generator=torch.Generator().manual_seed(seed))
    return model


def test_fresh_weights_have_the_requested_spread() -> None:
    model = make_fresh(hidden_size=192, intermediate_size=768)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "layernorm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif "projection" in name:  # torch's own for convolutions: U(±1/√fan-in)
            assert parameter.abs().max() <= 1 / 16, name
            assert parameter.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.02)
        else:
            assert parameter.abs().max() <= 0.04, name
            # Cut off at ±2 standard deviations, a normal keeps 0.8796 of its own.
            assert parameter.std().item() == pytest.approx(0.02 * 0.8796, rel=0.15), name


def test_fresh_weights_depend_on_the_generator_alone() -> None:
    torch.manual_seed(0)
    first = make_fresh(seed=3).state_dict()
    torch.manual_seed(1)
    again, other = make_fresh(seed=3).state_dict(), make_fresh(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.dense.weight"], other["classifier.dense.weight"])


def test_no_earlier_weight_remains() -> None:
    model = ASTForAudioClassification(ASTConfig(**TINY))
    randomise(model)
    initialise_from_scratch(model, generator=torch.Generator().manual_seed(0))
    expected = make_fresh(seed=0).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_the_two_prefix_tokens_differ_only_if_they_start_from_fresh_weights() -> None:
    def prefix_gradients(model: ASTForAudioClassification) -> tuple[torch.Tensor, torch.Tensor]:
        found = gradients(model.eval(), precise=True)
        prefix = "audio_spectrogram_transformer.embeddings."
        return found[prefix + "cls_token"], found[prefix + "distillation_token"]

    cls, distillation = prefix_gradients(ASTForAudioClassification(ASTConfig(**TINY)))
    assert_close(cls, distillation, atol=1e-9)
    cls, distillation = prefix_gradients(make_fresh())
    assert (cls - distillation).norm() > 0.1 * cls.norm()


# --- Properties ----------------------------------------------------------------------------


def test_dropout_acts_in_training_only() -> None:
    fields = {**TINY, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = ASTForAudioClassification(ASTConfig(**fields))
    randomise(model)
    features = make_input(model.config)
    for asked in ({}, {"output_attentions": True}):
        model.train()
        assert not torch.equal(model(features, **asked).logits, model(features, **asked).logits)
        model.eval()
        assert torch.equal(model(features, **asked).logits, model(features, **asked).logits)


def test_it_compiles_to_one_graph() -> None:
    ours, _ = make_pair()
    features = make_input(ours.config)
    compiled = torch.compile(ours.embed, fullgraph=True, backend="eager")
    assert_close(compiled(features), ours.embed(features), atol=1e-6)


# --- Outputs -------------------------------------------------------------------------------


def test_outputs_are_read_by_name_key_and_index() -> None:
    ours, _ = make_pair()
    features = make_input(ours.config)
    output = ours(features, torch.tensor([0, 1, 2]), output_hidden_states=True)
    assert list(output) == ["loss", "logits", "hidden_states"]
    assert output[0] is output.loss is output["loss"]
    assert output[1] is output.logits
    assert output[-1] is output.hidden_states
    assert output[:2] == (output.loss, output.logits)
    assert ours(features)[0] is not None
    assert ours(features).loss is None
    with pytest.raises(KeyError, match="'attentions'; this output holds loss, logits, hidden"):
        output["attentions"]
    with pytest.raises(IndexError):
        output[3]


def test_return_dict_false_gives_plain_tuples() -> None:
    ours, theirs = make_pair()
    features = make_input(ours.config)
    (logits,) = ours(features, return_dict=False)
    assert_close(logits, theirs(features, return_dict=False)[0], atol=1e-5)
    tokens, pooled = ours.audio_spectrogram_transformer(features, return_dict=False)
    assert (tokens.shape, pooled.shape) == ((3, 146, 64), (3, 64))


def test_the_config_sets_what_is_returned_by_default() -> None:
    config = ASTConfig(**TINY, output_attentions=True, output_hidden_states=True)
    model = ASTForAudioClassification(config)
    output = model(make_input(config))
    assert (len(output.attentions), len(output.hidden_states)) == (2, 3)
    assert model(make_input(config), output_attentions=False).attentions is None
    plain = ASTForAudioClassification(ASTConfig(**TINY, return_dict=False))
    assert isinstance(plain(make_input(config)), tuple)


# --- Errors --------------------------------------------------------------------------------


# transformers silently accepts 127 and 129 frames: the position embeddings happen to fit.
@pytest.mark.parametrize(
    "shape", [(2, 127, 128), (2, 129, 128), (2, 128, 127), (128, 128), (2, 1, 128, 128)]
)
def test_an_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    model = ASTModel(ASTConfig(**TINY))
    given = "shape " + str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=given + r"; expected \(batch, 128, 128\)"):
        model(torch.zeros(shape))
    with pytest.raises(ValueError, match="exactly max_length=128 frames"):
        model.embed(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 128), (1, 146), (3, 1, 146)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    model = ASTModel(ASTConfig(**TINY))
    with pytest.raises(ValueError, match=r"attention_mask.*expected \(3, 146\).*per token"):
        model(make_input(model.config), attention_mask=torch.ones(shape))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "768"}, r"hidden_size is '768' \(str\); expected a whole number"),
        ({"hidden_size": 768.0}, r"hidden_size is 768.0 \(float\); expected a whole number"),
        ({"num_hidden_layers": True}, r"num_hidden_layers is True \(bool\)"),
        ({"patch_size": [16, 16]}, r"patch_size is \[16, 16\] \(list\); expected a whole number"),
        ({"layer_norm_eps": 1}, r"layer_norm_eps is 1 \(int\); expected a float"),
        ({"head_layer_norm_eps": "1e-5"}, r"head_layer_norm_eps is '1e-5' \(str\)"),
        ({"qkv_bias": 1}, r"qkv_bias is 1 \(int\); expected True or False"),
        ({"hidden_act": None}, r"hidden_act is None \(NoneType\); expected one of"),
        ({"id2label": ["a", "b"]}, r"id2label is \['a', 'b'\]; expected a mapping"),
        ({"id2label": {"a": "b"}}, r"id2label holds 'a': 'b'; expected an index and a name"),
    ],
)
def test_a_config_value_of_another_type_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ASTConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; expected a whole number from 1"),
        ({"time_stride": -1}, "time_stride is -1; expected"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5; expected a number in"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"hidden_act": "geglu"}, "hidden_act is 'geglu'; expected one of .*'gelu'"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking'; expected None or one of"),
        ({"num_attention_heads": 7}, "num_attention_heads is 7; expected a divisor of hidden_size"),
        ({"max_length": 15}, "max_length is 15; expected at least patch_size, which is 16"),
        ({"num_mel_bins": 8}, "num_mel_bins is 8; expected at least patch_size"),
        ({"num_labels": 0}, "num_labels is 0; expected a whole number from 1"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels is 3; expected 1, the number of"),
        ({"id2label": {0: "a", 2: "b"}}, r"id2label has the indices \[0, 2\]; expected 0 to 1"),
        ({"id2label": {0: "a"}, "label2id": {"b": 0}}, "label2id is .*; expected the reverse"),
    ],
)  # fmt: skip
def test_a_config_value_out_of_range_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ASTConfig(**fields)


def test_a_config_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type is 'vit'; expected 'audio-spectrogram"):
        ASTConfig.from_dict({"model_type": "vit"})


def test_labels_from_json_are_ordered_by_index() -> None:
    config = ASTConfig.from_dict({"id2label": {"1": "b", "0": "a", "2": 7}, "label2id": {"x": "9"}})
    assert config.id2label == {0: "a", 1: "b", 2: "7"}
    assert config.label2id == {"a": 0, "b": 1, "7": 2}
    assert list(config.id2label) == [0, 1, 2]
    assert config.with_labels(["x"]).label2id == {"x": 0}


# --- Position embeddings -------------------------------------------------------------------


def resize_by_hand(grid: npt.NDArray[np.float64], axis: int, size: int) -> npt.NDArray[np.float64]:
    """Cut from the middle or interpolate, sample by sample; the original's rule re-derived."""
    source = grid.shape[axis]
    if size <= source:
        start = source // 2 - size // 2
        return np.take(grid, range(start, start + size), axis)
    samples = []
    for index in range(size):
        position = max(0.0, (index + 0.5) * source / size - 0.5)  # pixel centres are aligned
        low = int(position)
        high = min(low + 1, source - 1)
        share = position - low
        samples.append((1 - share) * grid.take(low, axis) + share * grid.take(high, axis))
    return np.stack(samples, axis)


@pytest.mark.parametrize("columns", [12, 23, 50, 99, 101, 150])
@pytest.mark.parametrize("rows", [5, 6, 12, 16])
@pytest.mark.parametrize("source", [(12, 101), (24, 24)], ids=["AudioSet", "ImageNet"])
def test_position_embeddings_are_resized_as_in_the_original(
    source: tuple[int, int], rows: int, columns: int
) -> None:
    embeddings = torch.randn(1, 2 + source[0] * source[1], 8, dtype=torch.float64)
    found = resize_position_embeddings(embeddings, source, (rows, columns))
    grid = embeddings[0, 2:].numpy().reshape(*source, 8)
    expected = resize_by_hand(resize_by_hand(grid, 1, columns), 0, rows).reshape(-1, 8)
    assert torch.equal(found[:, :2], embeddings[:, :2])
    np.testing.assert_allclose(found[0, 2:].numpy(), expected, atol=1e-6, rtol=0)


def test_position_embeddings_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 146, 8\); expected \(1, 1214, hidden_size\)"):
        resize_position_embeddings(torch.zeros(1, 146, 8), (12, 101), (12, 50))
