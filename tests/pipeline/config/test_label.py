"""The configuration of a run: its rules between keys, and what is written of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.label import NOT_WRITTEN, RunConfig
from pipeline.config.load import load_config
from transforms.errors import ConfigError


def load(*sets: str) -> RunConfig:
    return load_config(RunConfig, sets=sets)


def problem_of(*sets: str) -> str:
    """The one problem that is reported."""
    with pytest.raises(ConfigError) as caught:
        load(*sets)
    first, second = str(caught.value).splitlines()
    assert second.startswith("Every key is described in ")
    return first


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["window.length_s=5", "window.hop_s=5.5"], "window.hop_s"),
        (["retry_failed=true", "overwrite=true"], "retry_failed"),
        (["inference.engine=openvino", "inference.device=cuda"], "inference.engine"),
        (["inference.precision=int8", "inference.engine=torch"], "inference.precision"),
        (["inference.precision=int8", "inference.device=mps"], "inference.precision"),
    ],
)
def test_keys_that_exclude_each_other_are_refused(sets: list[str], key: str) -> None:
    problem = problem_of(*sets)
    assert problem.startswith(f"{key} is ")
    for assignment in sets:
        load(assignment)  # each alone is fine


def test_rules_between_keys_hold_without_a_file_too() -> None:
    with pytest.raises(ValidationError, match=r"window\.hop_s is 6\.0; must be in \(0, 5\]"):
        RunConfig.model_validate({"window": {"length_s": 5.0, "hop_s": 6.0}})


def test_one_input_may_have_blanks_in_its_name() -> None:
    assert load("inputs=a b.wav").inputs == ("a b.wav",)
    problem = problem_of("inputs=[a, ' ']")
    assert problem.startswith("inputs is [a, ' '] (--set inputs=[a, ' ']); must hold no empty text")


def test_a_hop_as_long_as_the_window_is_fine() -> None:
    assert load("window.length_s=5", "window.hop_s=5").window.hop_s == 5.0


def test_a_resolved_config_holds_no_signature() -> None:
    signed = "https://bucket.example/a.wav?X-Amz-Signature=secret&v=2"
    config = RunConfig.model_validate(
        {"inputs": [signed], "output": signed, "model": {"name": signed}}
    )
    resolved = config.resolved()
    assert config.inputs == (signed,)
    assert resolved["inputs"] == ["https://bucket.example/a.wav?v=2"]
    assert resolved["output"] == resolved["model"]["name"] == resolved["inputs"][0]


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("s3_secret_access_key", "abc", NOT_WRITTEN),
        ("Some_PASSWORD", 1234, NOT_WRITTEN),
        ("google_application_credentials", ["a", "b"], NOT_WRITTEN),
        ("use_token", True, True),
        ("secret", None, None),
        ("experiments", ["a", 1, "https://h/x?sig=S&v=2"], ["a", 1, "https://h/x?v=2"]),
        ("max_workers", 3, 3),
    ],
)
def test_beams_options_are_written_without_secrets(name: str, value: Any, written: Any) -> None:
    resolved = RunConfig(beam={name: value}).resolved()
    assert resolved["beam"] == {name: written}
    assert RunConfig.model_validate(resolved).resolved() == resolved
