"""The configuration of a training: its values, and its rules between keys."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.config.label import RunConfig
from pipeline.config.load import config_folder, find_config, load_config
from pipeline.config.schema import flatten
from pipeline.config.train import TrainConfig
from transforms.errors import ConfigError

DEFAULT_YAML = config_folder() / "train" / "default.yaml"


def load(*sets: str, **arguments: Any) -> TrainConfig:
    return load_config(TrainConfig, sets=sets, **arguments)


def problems(*sets: str, **arguments: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*sets, **arguments)
    return [
        line.removeprefix("  - ")
        for line in str(caught.value).splitlines()
        if not line.startswith("Every key") and " problems in the " not in line
    ]


BETAS = "must be a list of two numbers in [0, 1), like [0.95, 0.999]"


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("training.epochs", "0", "must be at least 1"),
        ("training.seed", "-1", "must be at least 0"),
        ("training.seed", "1.5", "must be a whole number"),
        ("training.loss", "mse", "must be 'cross_entropy' or 'binary_cross_entropy'"),
        ("training.loader_processes", "-1", "must be at least 0"),
        ("optimizer.learning_rate", "0", "must be greater than 0"),
        ("optimizer.weight_decay", "-1", "must be at least 0"),
        ("optimizer.betas", "[0.9]", BETAS),
        ("optimizer.betas", "[0.9, 1.0]", BETAS),
        ("optimizer.betas", "[0.9, .nan]", BETAS),
        ("optimizer.betas", "[0.9, true]", BETAS),
        ("optimizer.betas", "0.9", BETAS),
        ("schedule.decay_factor", "0", "must be greater than 0"),
        ("schedule.decay_factor", "1.5", "must be at most 1"),
        ("augmentation.mixup_ratio", "1.5", "must be at most 1"),
        ("augmentation.patch_drop", "1", "must be less than 1"),
        ("augmentation.speed", "1", "must be less than 1"),
        ("augmentation.masked_mels", "1.5", "must be a whole number"),
        ("augmentation.circular_shift", "1", "must be true or false"),
        ("architecture.hidden_dropout_prob", "1", "must be less than 1"),
        ("averaging.moving_decay", "1", "must be less than 1"),
        ("averaging.moving_decay", "0", "must be greater than 0"),
        ("pretraining.masked_ratio", "1", "must be less than 1"),
        ("train", "3", "must be a list of text"),
        ("cache.dtype", "int8", "must be 'float32' or 'int16'"),
    ],
)
def test_a_wrong_value_is_told_with_what_it_must_be(key: str, value: str, wanted: str) -> None:
    assert problems(f"{key}={value}") == [f"{key} is {value} (--set {key}={value}); {wanted}"]


@pytest.mark.parametrize("key", ["model.activation", "beam.runner", "labels.top_k"])
def test_what_only_labelling_knows_is_no_key(key: str) -> None:
    (problem,) = problems(f"{key}=x")
    assert problem.startswith(f"{key} (--set {key}=x) is not a key")


def test_a_problem_names_the_file_that_documents_training() -> None:
    with pytest.raises(ConfigError, match=re.escape(f"is described in {DEFAULT_YAML}.")):
        load("training.epochs=0")


SCRATCH = "model.name="


CHECKPOINT = "model.name=m"


@pytest.mark.parametrize(
    ("sets", "key", "wanted"),
    [
        (["train=a", "training.keep=best"], "training.keep", "--hold-out COLUMN=VALUE"),
        (["hold_out=a=1", "validation=b"], "hold_out", "use one of them"),
        (["hold_out=a"], "hold_out", "COLUMN=VALUE"),
        (["hold_out='=1'"], "hold_out", "COLUMN=VALUE"),
        (["hold_out=a="], "hold_out", "COLUMN=VALUE"),
        (["train=[a, '']", "training.keep=last"], "train", "no empty text"),
        (["validation=''"], "validation", "no empty text"),
        (["output=' '"], "output", "must not be empty"),
        (["cache.folder=''"], "cache.folder", "must not be empty"),
        (["cache.folder=gs://b/c"], "cache.folder", "a local folder"),
        (["decode.channel=each"], "decode.channel", "must be mix, first, loudest or a number"),
        (["training.keep=averaged"], "training.keep", "averaging.moving_decay"),
        (["averaging.first_epoch=1"], "averaging.last_epoch", "given as well"),
        (["averaging.last_epoch=1"], "averaging.first_epoch", "given as well"),
        (
            ["averaging.first_epoch=3", "averaging.last_epoch=2"],
            "averaging.first_epoch",
            "at most 2 (averaging.last_epoch)",
        ),
        (
            ["averaging.first_epoch=1", "averaging.last_epoch=4", "training.epochs=3"],
            "averaging.last_epoch",
            "at most 3 (training.epochs)",
        ),
        (
            [
                "averaging.first_epoch=1",
                "averaging.last_epoch=2",
                "averaging.moving_decay=0.9",
            ],
            "averaging.moving_decay",
            "use one of them",
        ),
        (["training.head=keep", SCRATCH], "training.head", "must be auto or new without"),
        (["training.trained_layers=0", SCRATCH], "training.trained_layers", "must be null"),
        (
            ["training.trained_layers=0", CHECKPOINT, "pretraining.epochs=20"],
            "training.trained_layers",
            "pretraining changes every layer",
        ),
        (["training.precision=fp16", "training.device=cpu"], "training.precision", "bf16"),
        (["model.num_attention_heads=3", SCRATCH], "model.num_attention_heads", "architecture"),
        (["model.layer_norm_eps=1e-6", SCRATCH], "model.layer_norm_eps", "must be null"),
        (["model.head_layer_norm_eps=1e-5", SCRATCH], "model.head_layer_norm_eps", "must be null"),
        (["architecture.hidden_size=96", CHECKPOINT], "architecture.hidden_size", "must be 192"),
        (
            ["architecture.intermediate_size=96", CHECKPOINT],
            "architecture.intermediate_size",
            "must be null, its default, with model.name: m",
        ),
        (
            ["architecture.num_attention_heads=5", SCRATCH],
            "architecture.num_attention_heads",
            "must divide 192 (architecture.hidden_size)",
        ),
        (["architecture.patch_size=129", SCRATCH], "architecture.patch_size", "at most 128"),
        (["architecture.patch_size=16", "model.max_length=8"], "architecture.patch_size", "most 8"),
        (["augmentation.masked_mels=129", SCRATCH], "augmentation.masked_mels", "at most 128"),
        (
            ["augmentation.masked_frames=600", "model.max_length=512", CHECKPOINT],
            "augmentation.masked_frames",
            "at most 512",
        ),
        (["schedule.warmup_steps=20"], "schedule.warmup_interval", "at most 20"),
        (
            ["schedule.kind=cosine", "schedule.decay_factor=0.5"],
            "schedule.decay_factor",
            "must be 0.85, its default, with schedule.kind: cosine",
        ),
        (
            ["schedule.kind=cosine", "schedule.decay_start_epoch=2"],
            "schedule.decay_start_epoch",
            "must be 5",
        ),
        (["pretraining.epochs=10"], "pretraining.warmup_epochs", "less than 10"),
        (["window.length_s=5", "window.hop_s=6"], "window.hop_s", "must be in (0, 5]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_keys_that_do_not_go_together_are_refused(sets: list[str], key: str, wanted: str) -> None:
    (problem,) = problems(*sets)
    assert problem.startswith(f"{key} is ")
    assert wanted in problem


@pytest.mark.parametrize(
    "sets",
    [
        ["train=a", "training.keep=best", "hold_out=a=1"],
        ["train=a", "training.keep=best", "validation=b"],
        ["train=a", "training.keep=last"],
        ["train=a", "training.keep=averaged", "averaging.moving_decay=0.9"],
        ["averaging.first_epoch=25", "averaging.last_epoch=25", "training.keep=averaged"],
        ["training.head=keep", CHECKPOINT],
        ["training.trained_layers=0", CHECKPOINT],
        ["training.precision=fp16", "training.device=auto"],
        ["training.precision=bf16", "training.device=cpu"],
        ["model.num_attention_heads=3", CHECKPOINT],
        ["architecture.hidden_size=96", "architecture.num_attention_heads=2"],
        ["architecture.hidden_dropout_prob=0.1", CHECKPOINT],
        ["architecture.num_attention_heads=3", CHECKPOINT],
        ["augmentation.masked_mels=500", CHECKPOINT],  # what it takes is not known here
        ["augmentation.masked_mels=128", SCRATCH],
        ["augmentation.masked_frames=2000", "model.max_length=2000"],
        ["schedule.warmup_steps=50"],
        ["schedule.kind=cosine", "schedule.decay_factor=0.85"],
        ["pretraining.epochs=1", "pretraining.warmup_epochs=0"],
        ["cache.folder=/tmp/cache"],
        ["hold_out=a=b=c"],
    ],
    ids=" ".join,
)
def test_what_goes_together_is_taken(sets: list[str]) -> None:
    load(*sets)


def test_a_config_of_labelling_is_none_of_training() -> None:
    with pytest.raises(ConfigError, match=r"audioset is one for earmark label\. Did you mean"):
        load(path="audioset")
    assert find_config(TrainConfig, "default") == DEFAULT_YAML
    assert find_config(RunConfig, "default") == config_folder() / "default.yaml"


def test_a_resolved_config_holds_no_signature() -> None:
    signed = "https://bucket.example/a.csv?X-Amz-Signature=secret&v=2"
    config = TrainConfig.model_validate(
        {
            "train": [signed],
            "validation": [signed],
            "output": signed,
            "model": {"name": signed, "labels": signed, "preprocessor": signed},
        }
    )
    resolved = flatten(config.resolved())
    assert config.train == (signed,)
    assert resolved["train"] == resolved["validation"] == ["https://bucket.example/a.csv?v=2"]
    for key in ("output", "model.name", "model.labels", "model.preprocessor"):
        assert resolved[key] == "https://bucket.example/a.csv?v=2"
    assert "secret" not in str(resolved)
