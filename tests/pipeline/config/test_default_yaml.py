"""What holds for every configuration: its default.yaml, and the options that set its keys."""

from __future__ import annotations

import re

import pytest
import yaml

from pipeline.cli.options import LABEL, TRAIN, Option
from pipeline.config.label import RunConfig
from pipeline.config.load import config_folder
from pipeline.config.schema import Config, flatten
from pipeline.config.train import TrainConfig

Schema = type[Config]
DEFAULT_YAML = {
    RunConfig: config_folder() / "default.yaml",
    TrainConfig: config_folder() / "train" / "default.yaml",
}
OPTIONS = {RunConfig: LABEL, TrainConfig: TRAIN}

pytestmark = pytest.mark.parametrize("schema", [RunConfig, TrainConfig])


def options_of(schema: Schema) -> list[Option]:
    """The options that set a key."""
    return [option for option in OPTIONS[schema] if option.key is not None]


def test_default_yaml_has_every_key_and_its_default_in_order(schema: Schema) -> None:
    written = flatten(yaml.safe_load(DEFAULT_YAML[schema].read_text(encoding="utf-8")))
    assert list(written.items()) == list(schema.defaults().items())


def test_default_yaml_explains_every_key(schema: Schema) -> None:
    lines = DEFAULT_YAML[schema].read_text(encoding="utf-8").splitlines()
    is_key = re.compile(r"\s*[a-z_]+:")
    unexplained = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if is_key.match(line) and not before.strip().startswith("#")
    ]
    assert unexplained == []


def test_default_yaml_names_every_option(schema: Schema) -> None:
    text = DEFAULT_YAML[schema].read_text(encoding="utf-8")
    named = set(re.findall(r"--[a-z-]+|INPUT", text))
    assert [option.origin for option in options_of(schema) if option.origin not in named] == []


def test_every_option_sets_a_key_of_its_own(schema: Schema) -> None:
    keys = [option.key for option in options_of(schema)]
    assert len(keys) == len(set(keys))
    assert set(keys) <= schema.defaults().keys()
