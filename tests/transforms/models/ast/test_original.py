"""Original ``.pth`` checkpoints: completed, or refused with everything that is missing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.label import CheckpointSection
from pipeline.config.train import ArchitectureSection
from pipeline.training.initial import build_model, resolve_initial
from tests.transforms.models.ast.factory import (
    NAMES,
    STATS,
    TINY,
    assert_close,
    make_input,
    make_model,
    states_equal,
    write_pth,
)
from transforms.errors import ModelError
from transforms.models.ast.checkpoints import (
    ModelOverrides,
    load_model,
    resolve_model,
)
from transforms.models.ast.config import ASTConfig
from transforms.models.labels import audioset_labels, speech_commands_labels

GIVEN = ModelOverrides(labels="audioset", mean=-4.25, std=4.5, frequency_stride=10, time_stride=10)


def test_an_original_checkpoint_gives_the_original_logits(shared_data: Path) -> None:
    data = shared_data / "original_ast"
    spec = resolve_model(str(data / "audio_model.pth"), GIVEN)
    info = json.loads((data / "info.json").read_text())
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size",
                 "layer_norm_eps", "head_layer_norm_eps"):  # fmt: skip
        assert getattr(spec.config, name) == info[name]
    assert (spec.source, spec.activation, spec.num_frames) == ("original", "sigmoid", 1024)
    assert spec.labels == audioset_labels()
    assert spec.notes[0].startswith("max_length: 1024, the published window among 1016 to 1025")
    features = torch.from_numpy(np.load(data / "input.npy")).float()
    with torch.no_grad():
        logits = load_model(spec)(features).logits
    expected = torch.from_numpy(np.load(data / "logits.npy"))
    assert expected.std() > 0.1
    assert_close(logits, expected, atol=2e-5)


def test_everything_missing_from_an_original_checkpoint_is_named(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "audio_model.pth", make_model())
    with pytest.raises(ModelError) as raised:
        resolve_model(str(path))
    for name in ("labels", "mean", "std", "frequency_stride", "time_stride", "max_length"):
        assert f"model.{name} (" in str(raised.value)
    assert "it has 5 outputs" in str(raised.value)
    assert "--set model.frequency_stride=" in str(raised.value)
    some = ModelOverrides(frequency_stride=10, time_stride=10, mean=0.0)
    with pytest.raises(ModelError, match=r"Missing: model\.labels \([^;]*; it[^;]*; model\.std \("):
        resolve_model(str(path), some)


def test_an_original_checkpoint_needs_no_labels_if_its_head_is_discarded(
    tmp_path: Path,
) -> None:
    model = make_model(num_labels=7, layer_norm_eps=1e-6, head_layer_norm_eps=1e-5)
    path = write_pth(tmp_path / "audio_model.pth", model)
    shape = {"frequency_stride": 10, "time_stride": 10, "num_attention_heads": 4}
    given = ModelOverrides(**shape, mean=-3.5, std=2.5, max_length=128)
    spec = resolve_model(str(path), given, needs_labels=False)
    assert [label.name for label in spec.labels] == [f"LABEL_{index}" for index in range(7)]
    assert states_equal(load_model(spec), model)
    # Anything else missing is still an error, and labels that are given must be right.
    with pytest.raises(ModelError, match=r"Missing: model\.mean \([^;]*; model\.std \([^;]*$"):
        resolve_model(str(path), ModelOverrides(**shape, max_length=128), needs_labels=False)
    wrong = dataclasses.replace(given, labels="audioset")
    with pytest.raises(ModelError, match="has 527 labels, and the classifier has 7 outputs"):
        resolve_model(str(path), wrong, needs_labels=False)


ORIGINAL: dict[str, Any] = {
    "num_attention_heads": 3,
    "frequency_stride": 10,
    "time_stride": 10,
    "max_length": 1024,
    "mean": -4.25,
    "std": 4.5,
}


@pytest.mark.parametrize("labels", [None, "cat\ndog\n"])
def test_a_training_with_a_new_head_needs_no_names_for_the_old_one_s_outputs(
    shared_data: Path, tmp_path: Path, labels: str | None
) -> None:
    path = shared_data / "original_ast" / "audio_model.pth"
    if labels is not None:
        (tmp_path / "labels.txt").write_text(labels)
    wanted = None if labels is None else str(tmp_path / "labels.txt")
    section = CheckpointSection(name=str(path), labels=wanted, **ORIGINAL)
    initial = resolve_initial(section, ArchitectureSection(), keeps_head=False)
    assert initial.wanted_labels == (None if labels is None else ("cat", "dog"))
    assert not any(note.startswith("Scores are") for note in initial.notes)
    started = build_model(initial, ("cat", "dog"), "cross_entropy", 0, keeps_head=False)
    assert started.classifier.dense.weight.shape == (2, 192)
    theirs = load_model(resolve_model(str(path), ModelOverrides(labels="audioset", **ORIGINAL)))
    assert states_equal(started.audio_spectrogram_transformer, theirs.audio_spectrogram_transformer)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, r"Missing: model\.labels \(.*; it has 527 outputs\)\. Give each"),
        ("cat\ndog\n", r"has 2 labels, and the classifier has 527 outputs"),
    ],
)
def test_a_training_that_keeps_the_head_needs_the_names_of_its_outputs(
    shared_data: Path, tmp_path: Path, labels: str | None, words: str
) -> None:
    if labels is not None:
        (tmp_path / "labels.txt").write_text(labels)
    section = CheckpointSection(
        name=str(shared_data / "original_ast" / "audio_model.pth"),
        labels=None if labels is None else str(tmp_path / "labels.txt"),
        **ORIGINAL,
    )
    with pytest.raises(ModelError, match=words):
        resolve_initial(section, ArchitectureSection(), keeps_head=True)


def test_a_window_of_no_published_recipe_must_be_given(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(NAMES))
    path = write_pth(tmp_path / "model.pth", make_model(max_length=300, num_attention_heads=1))
    given = {"labels": str(labels), "mean": 0.0, "std": 1.0, "frequency_stride": 10,
             "time_stride": 10}  # fmt: skip
    with pytest.raises(ModelError, match=r"Missing: model\.max_length \(296 to 305 by its posit"):
        resolve_model(str(path), ModelOverrides(**given))
    spec = resolve_model(str(path), ModelOverrides(**given, max_length=300))
    assert (spec.num_frames, [label.name for label in spec.labels]) == (300, list(NAMES))
    with pytest.raises(ModelError, match=r"'module\.v\.pos_embed' has the shape.*time_stride=10"):
        resolve_model(str(path), ModelOverrides(**given, max_length=400))


def test_the_number_of_heads_is_derived_from_a_published_width(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "model.pth", make_model(hidden_size=96))
    with pytest.raises(ModelError, match=r"model\.num_attention_heads \(a divisor of hidden_size"):
        resolve_model(str(path), GIVEN)
    path = write_pth(tmp_path / "model.pth", make_model(hidden_size=128))
    config = ASTConfig(**{**TINY, "hidden_size": 128}, time_stride=10)
    config = config.with_labels(NAMES)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": config.to_dict()["id2label"]}))
    given = ModelOverrides(mean=0.0, std=1.0, frequency_stride=10, time_stride=10)
    assert resolve_model(str(path), given).config.num_attention_heads == 2


def test_strides_that_do_not_divide_the_positions_are_refused(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "model.pth", make_model())
    overrides = ModelOverrides(frequency_stride=11, time_stride=11)
    with pytest.raises(ModelError, match="144 position embeddings do not divide into the 11 rows"):
        resolve_model(str(path), overrides)


def test_a_config_beside_an_original_checkpoint_completes_it(tmp_path: Path) -> None:
    model = make_model(layer_norm_eps=1e-6, head_layer_norm_eps=1e-5)
    path = write_pth(tmp_path / "best.pth", model)
    values = {"frequency_stride": 10, "time_stride": 10, "max_length": 128, **STATS,
              "num_attention_heads": 4, "id2label": dict(enumerate(NAMES)),
              "problem_type": "multi_label_classification"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    spec = resolve_model(str(path))
    assert (spec.mean, spec.std, spec.activation) == (-3.5, 2.5, "sigmoid")
    assert states_equal(load_model(spec), model)
    features = make_input(model.config)
    with torch.no_grad():
        assert torch.equal(load_model(spec)(features).logits, model(features).logits)


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_published_file_name_completes_the_file(
    tmp_path: Path, prefix: str, dtype: torch.dtype
) -> None:
    model = make_model(num_labels=35, num_attention_heads=1).to(dtype)
    path = write_pth(tmp_path / "speechcommands_10_10_0.9812.pth", model)
    tensors = torch.load(path, weights_only=True)
    torch.save({prefix + name.removeprefix("module."): t for name, t in tensors.items()}, path)
    spec = resolve_model(str(path))
    assert (spec.mean, spec.std, spec.num_frames) == (-6.845978, 5.5654526, 128)
    assert (spec.labels, spec.activation) == (speech_commands_labels(), "softmax")
    assert spec.license == "BSD-3-Clause"
    assert states_equal(load_model(spec), model.float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], r"holds a list; expected a dict from name to tensor"),
        ({0: torch.zeros(2)}, r"holds 0, a Tensor; expected only tensors, as state_dict"),
        ({"model": {"a": torch.zeros(2)}}, r"holds 'model', a dict; expected only tensors"),
        ({"conv.weight": torch.zeros(2)}, r"no tensor 'module\.v\.cls_token'; expected the state"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ModelError, match=message):
        resolve_model(str(tmp_path / "model.pth"))
