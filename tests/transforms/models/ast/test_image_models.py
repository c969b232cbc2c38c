"""An AST that starts from an image transformer: transformers' own DeiT and ViT are the oracle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from tests.support.fake_hub import COMMIT, serve_hub, use_hub
from tests.transforms.models.ast.factory import (
    assert_close,
    edit_json,
    edit_weights,
    make_input,
    randomise,
    states_equal,
)
from transforms.errors import ModelError
from transforms.models.ast.checkpoints import resolve_model, save_pretrained
from transforms.models.ast.config import ASTConfig
from transforms.models.ast.files import ModelFiles, locate_model
from transforms.models.ast.image_models import (
    _read_config,
    is_image_model,
    load_image_model,
    resolve_image_model,
)

# Images of 32 by 32 pixels, in 4 by 4 patches.
IMAGE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}
NAMES = ("dog", "rain", "rooster")
NAME_OF_POSITIONS = "audio_spectrogram_transformer.embeddings.position_embeddings"


def save_image_model(folder: Path, kind: str = "DeiTModel", **fields: Any) -> Any:
    """Save transformers' model of this class with random weights everywhere, and give it."""
    config_class = transformers.DeiTConfig if kind.startswith("DeiT") else transformers.ViTConfig
    model = getattr(transformers, kind)(config_class(**{**IMAGE, **fields})).eval()
    randomise(model)
    model.save_pretrained(folder)
    return model


def make_config(name: Path, **fields: Any) -> ASTConfig:
    """An AST whose spectrogram has the size of the image, so that the positions are the same."""
    config = resolve_image_model(str(name)).config
    return dataclasses.replace(config, **fields).with_labels(NAMES)


def as_image(features: torch.Tensor) -> torch.Tensor:
    """Features (B, T, F) as an image of three equal colours (B, 3, F, T)."""
    return features.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A distilled DeiT, whole and valid."""
    save_image_model(tmp_path / "deit")
    return tmp_path / "deit"


# --- Against transformers ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "inner"),
    [
        ("DeiTModel", ""),
        ("DeiTForImageClassification", "deit"),
        ("DeiTForImageClassificationWithTeacher", "deit"),
        ("DeiTForMaskedImageModeling", "deit"),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"qkv_bias": False, "hidden_act": "gelu_new"}])
def test_a_gray_image_gives_the_tokens_that_transformers_deit_gives(
    tmp_path: Path, kind: str, inner: str, fields: dict[str, Any]
) -> None:
    theirs = save_image_model(tmp_path, kind, **fields)
    config = make_config(tmp_path)
    ours = load_image_model(str(tmp_path), config).eval()
    features = make_input(config)
    with torch.no_grad():
        tokens = ours.audio_spectrogram_transformer(features).last_hidden_state
        expected = (getattr(theirs, inner) if inner else theirs)(as_image(features))
    assert expected.last_hidden_state.std() > 0.1
    assert_close(tokens, expected.last_hidden_state, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "inner"), [("ViTModel", ""), ("ViTForImageClassification", "vit")]
)
def test_a_vit_gives_its_class_token_twice(tmp_path: Path, kind: str, inner: str) -> None:
    theirs = save_image_model(tmp_path, kind)
    config = make_config(tmp_path)
    ours = load_image_model(str(tmp_path), config).eval().audio_spectrogram_transformer
    features = make_input(config)
    mask = torch.ones(3, config.num_tokens)
    mask[:, 1] = 0  # where nobody looks at the second, all else is as in the ViT
    with torch.no_grad():
        embedded = ours.embeddings(features)
        tokens = ours(features, attention_mask=mask).last_hidden_state
        expected = (getattr(theirs, inner) if inner else theirs)(as_image(features))
    assert torch.equal(embedded[:, 0], embedded[:, 1])
    assert torch.equal(tokens[:, 0], tokens[:, 1])
    assert_close(tokens[:, 1:], expected.last_hidden_state, atol=1e-5)
    (note,) = resolve_image_model(str(tmp_path)).notes
    assert note.startswith("It has no distillation token: AST's starts as a copy of the class tok")


@pytest.mark.parametrize(
    ("fields", "height", "width"),
    [({"num_channels": 1}, 32, 32), ({"image_size": [16, 40]}, 16, 40)],
    ids=["one colour", "rectangular"],
)
def test_images_of_one_colour_or_a_rectangle_give_the_same_tokens(
    tmp_path: Path, fields: dict[str, Any], height: int, width: int
) -> None:
    theirs = save_image_model(tmp_path, **fields)
    config = make_config(tmp_path)
    assert (config.num_mel_bins, config.max_length) == (height, width)
    ours = load_image_model(str(tmp_path), config).eval().audio_spectrogram_transformer
    features = make_input(config)
    with torch.no_grad():
        tokens = ours(features).last_hidden_state
        image = as_image(features)[:, : theirs.config.num_channels]
        expected = theirs(image).last_hidden_state
    assert_close(tokens, expected, atol=1e-5)


def test_names_in_memory_of_transformers_5_are_read(folder: Path, tmp_path: Path) -> None:
    config = make_config(folder)
    expected = load_image_model(str(folder), config).audio_spectrogram_transformer
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    model = save_image_model(tmp_path / "again")
    assert set(model.state_dict()) != set(tensors)  # transformers 5 renames what it loads
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    again = load_image_model(str(folder), config).audio_spectrogram_transformer
    assert states_equal(again, expected)


# --- The AST that comes out ----------------------------------------------------------------


def test_positions_are_cut_from_the_middle_or_interpolated_as_by_the_authors(folder: Path) -> None:
    """Of 4 by 4 patches: two rows of the middle, and seven columns instead of four."""
    config = make_config(folder, num_mel_bins=16, max_length=60)
    assert config.patch_grid == (2, 7)
    positions = load_image_model(str(folder), config).state_dict()[NAME_OF_POSITIONS]
    source = safetensors.torch.load_file(folder / "model.safetensors")[
        "embeddings.position_embeddings"
    ]
    grid = source[0, 2:].reshape(4, 4, 48)  # rows, columns, D
    middle = grid[1:3]
    # torch's linear interpolation, in one dimension: an oracle apart from the bilinear one.
    stretched = F.interpolate(middle.transpose(1, 2), size=7, mode="linear").transpose(1, 2)
    assert torch.equal(positions[0, :2], source[0, :2])
    assert_close(positions[0, 2:].reshape(2, 7, 48), stretched, atol=1e-6)


def test_patch_kernels_are_summed_over_the_colours(folder: Path) -> None:
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    kernel = stored["embeddings.patch_embeddings.projection.weight"]
    model = load_image_model(str(folder), make_config(folder))
    ours = model.audio_spectrogram_transformer.embeddings.patch_embeddings.projection.weight
    assert ours.shape == (48, 1, 8, 8)
    assert_close(ours[:, 0], kernel[:, 0] + kernel[:, 1] + kernel[:, 2], atol=1e-6)


def test_the_head_is_new_and_has_the_requested_labels(tmp_path: Path) -> None:
    """Also where the image model's own labels have the same names."""
    save_image_model(tmp_path / "deit", "DeiTForImageClassification", num_labels=3)
    config = make_config(tmp_path / "deit")
    first = json.loads((tmp_path / "deit" / "config.json").read_text())["id2label"]
    config = config.with_labels(list(first.values()))
    torch.manual_seed(0)
    model = load_image_model(str(tmp_path / "deit"), config)
    assert model.classifier.dense.weight.shape == (3, 48)
    assert torch.equal(model.classifier.layernorm.weight, torch.ones(48))
    assert torch.equal(model.classifier.dense.bias, torch.zeros(3))
    assert 0.01 < model.classifier.dense.weight.std() < 0.03  # initializer_range is 0.02


def test_the_published_geometry_follows_from_the_published_config(tmp_path: Path) -> None:
    """What transformers writes for the DeiT that the authors of AST took."""
    transformers.DeiTConfig(image_size=384).save_pretrained(tmp_path)
    with ModelFiles(locate_model(str(tmp_path))) as files:
        config, num_channels = _read_config(files)
    image = {"num_mel_bins": 384, "max_length": 384, "frequency_stride": 16, "time_stride": 16}
    assert (config, num_channels) == (ASTConfig(**image), 3)
    assert config.patch_grid == (24, 24)


# --- What it is, and what can be wrong -----------------------------------------------------


def test_an_image_model_is_distinguished_from_an_ast(folder: Path, tmp_path: Path) -> None:
    assert is_image_model(str(folder))
    save_image_model(tmp_path / "vit", "ViTModel")
    assert is_image_model(str(tmp_path / "vit"))
    model = load_image_model(str(folder), make_config(folder))
    save_pretrained(model, tmp_path / "ast", mean=0.0, std=1.0)
    assert not is_image_model(str(tmp_path / "ast"))
    assert not is_image_model(str(tmp_path / "none.pth"))
    (tmp_path / "empty").mkdir()
    assert not is_image_model(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"model_type in config\.json is 'audio-spec.*; expected"):
        resolve_image_model(str(tmp_path / "ast"))
    with pytest.raises(ModelError, match=r"'deit', a transformer for images; .*\(earmark train"):
        resolve_model(str(folder))


def test_an_image_model_is_described(folder: Path) -> None:
    image = resolve_image_model(str(folder))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (image.source, image.name, image.sha256) == ("folder", str(folder), digest)
    assert (image.revision, image.notes) == (None, ())
    assert (image.config.patch_grid, image.config.hidden_size) == ((4, 4), 48)


def test_an_image_model_of_the_hub_is_pinned(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub(folder) as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        assert is_image_model("org/tiny")
        image = resolve_image_model("org/tiny")
        assert (image.source, image.revision) == ("hub", COMMIT)
        config = make_config(folder)
        model = load_image_model(image.location, config, image.revision)
        expected = load_image_model(str(folder), config)
    ours, theirs = (m.audio_spectrogram_transformer.state_dict() for m in (model, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


KEY = "encoder.layer.1.attention.attention.key.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(KEY), rf"no tensor '{KEY}', one of 1 missing; .*layers=2, qkv_bias"),
        (lambda t: t.pop("embeddings.cls_token"), r"no tensor 'embeddings\.cls_token', nor one wi"),
        (lambda t: t.update(extra=torch.ones(1)), r"the tensor 'extra', one of 1 .* not part of a"),
        (
            lambda t: t.update({KEY: torch.ones(48, 47)}),
            rf"'{KEY}' has the shape \(48, 47\); expected \(48, 48\)\. Its config\.json describes",
        ),
        (
            lambda t: t.update({"embeddings.position_embeddings": torch.ones(1, 17, 48)}),
            r"position_embeddings' has the shape \(1, 17, 48\); expected \(1, 18, 48\)",
        ),
        (
            lambda t: t.pop("embeddings.distillation_token"),
            r"position_embeddings' has the shape \(1, 18, 48\); expected \(1, 17, 48\)",
        ),
        (
            lambda t: t["layernorm.bias"].fill_(float("nan")),
            r"layernorm\.bias' holds 48 values that are NaN or infinite, of 48; its training",
        ),
        (
            lambda t: t.update({"layernorm.bias": torch.ones(48, dtype=torch.int8)}),
            r"layernorm\.bias' is torch\.int8; expected a float type",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    config = make_config(folder)
    edit_weights(folder, edit)
    with pytest.raises(ModelError, match=message):
        resolve_image_model(str(folder))
    with pytest.raises(ModelError, match=message):
        load_image_model(str(folder), config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "swin"}, r"model_type in config\.json is 'swin'; expected deit or vit"),
        ({"model_type": None}, r"model_type in config\.json is None; expected deit or vit"),
        ({"image_size": "32"}, r"image_size in config\.json is '32'; expected a whole number"),
        ({"image_size": 4}, r"max_length is 4; expected at least patch_size, which is 8"),
        ({"patch_size": [8, 4]}, r"patch_size in config\.json is \[8, 4\]; expected a square"),
        ({"patch_size": 0}, r"patch_size in config\.json is 0; expected a whole number from 1"),
        ({"hidden_act": "mish"}, r"hidden_act is 'mish'; expected one of \["),
    ],
)
def test_a_setting_that_does_not_fit_is_named(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=rf"model {re.escape(str(folder))}: .*{message}"):
        resolve_image_model(str(folder))


def test_an_ast_with_other_blocks_cannot_start_from_an_image_model(folder: Path) -> None:
    config = make_config(folder, num_hidden_layers=3)
    with pytest.raises(
        ModelError, match="num_hidden_layers is 2, and the model to fine-tune has 3"
    ):
        load_image_model(str(folder), config)
