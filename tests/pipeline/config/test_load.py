"""The layers of a configuration: what wins, what is reported, and the YAML files that ship."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.label import RunConfig
from pipeline.config.load import config_folder, find_config, load_config, shipped_configs
from pipeline.config.schema import flatten
from transforms.errors import ConfigError


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(**arguments: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, **arguments)
    return [
        line.removeprefix("  - ")
        for line in str(caught.value).splitlines()
        if not line.startswith("Every key") and " problems in the " not in line
    ]


def test_nothing_given_is_the_defaults() -> None:
    assert load_config(RunConfig) == RunConfig()


def test_the_command_line_wins_over_set_over_yaml_over_default(tmp_path: Path) -> None:
    path = write(tmp_path, "window: {length_s: 8, hop_s: 4}\nlabels: {top_k: 3}\nlimit: 7\n")
    config = load_config(
        RunConfig,
        path,
        ["window.length_s=6", "labels.top_k=4"],
        [("window.length_s", 5.0, "--window-s")],
    )
    assert (config.window.length_s, config.window.hop_s) == (5.0, 4.0)
    assert (config.labels.top_k, config.limit) == (4, 7)
    assert config.window.min_tail == RunConfig().window.min_tail


def test_a_later_set_of_the_same_key_wins() -> None:
    assert load_config(RunConfig, sets=["limit=1", "limit=2"]).limit == 2


def test_options_are_told_as_false_too(tmp_path: Path) -> None:
    path = write(tmp_path, "labels: {scores: true}\n")
    assert (
        load_config(RunConfig, path, options=[("labels.scores", False, "--scores")]).labels.scores
        is False
    )


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("model.activation=softmax", "model.activation", "softmax"),
        ("model.activation=", "model.activation", None),
        ("model.layer_norm_eps=1e-6", "model.layer_norm_eps", 1e-6),
        ("model.mean=-4.25", "model.mean", -4.25),
        ("window.length_s=5", "window.length_s", 5.0),
        ("labels.scores=true", "labels.scores", True),
        ("inputs=a.wav", "inputs", ["a.wav"]),
        ("inputs=[a.wav, b=c.wav]", "inputs", ["a.wav", "b=c.wav"]),
        ("beam.num_workers=4", "beam.num_workers", 4),
        ("beam.experiments=[a, b]", "beam.experiments", ["a", "b"]),
        ("decode.channel=loudest", "decode.channel", "loudest"),
        ("decode.channel=2", "decode.channel", 2),
    ],
)
def test_set_reads_values_as_yaml(assignment: str, key: str, value: object) -> None:
    assert flatten(load_config(RunConfig, sets=[assignment]).resolved())[key] == value


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        ("window.hop_s=0", "window.hop_s is 0 (--set window.hop_s=0); must be greater than 0"),
        ("max_failed=1.5", "max_failed is 1.5 (--set max_failed=1.5); must be at most 1"),
        ("max_failed=-1", "max_failed is -1 (--set max_failed=-1); must be at least 0"),
        ("max_failed=.nan", "max_failed is .nan (--set max_failed=.nan); must be a finite number"),
        ("limit=true", "limit is true (--set limit=true); must be a whole number"),
        ("limit=1.5", "limit is 1.5 (--set limit=1.5); must be a whole number"),
        ("window.hop_s=x", "window.hop_s is x (--set window.hop_s=x); must be a number"),
        ("quiet=1", "quiet is 1 (--set quiet=1); must be true or false"),
        ("inputs=3", "inputs is 3 (--set inputs=3); must be a list of text"),
        (
            "output=2024-05-01",
            "output is 2024-05-01 (--set output=2024-05-01); must be text "
            "(in quotes, if YAML takes it for something else)",
        ),
        (
            "embedding.dtype=half",
            "embedding.dtype is half (--set embedding.dtype=half); must be 'float32' or 'float16'",
        ),
        (
            "decode.channel=left",
            "decode.channel is left (--set decode.channel=left); must be 'mix', 'first', 'loudest' "
            "or 'each' or a whole number",
        ),
        (
            "decode.channel=0",
            "decode.channel is 0 (--set decode.channel=0); must be 'mix', 'first', 'loudest' or "
            "'each' or at least 1",
        ),
        (
            "beam.x={a: 1}",
            "beam.x is {a: 1} (--set beam.x={a: 1}); "
            "must be a number, text, true, false, null, or a list of these",
        ),
        ("limit", "--set limit has no '='; must be key=value, like window.hop_s=5"),
        (
            "output=2024-13-45",
            "--set output=2024-13-45 is not valid YAML after '=': month must be in 1..12; "
            "text may have to be in quotes",
        ),
        (
            "window=5",
            "window (--set window=5) is a section; must be a key of it, like window.length_s",
        ),
    ],
)
def test_a_wrong_value_is_told_with_what_it_must_be(assignment: str, problem: str) -> None:
    assert problems(sets=[assignment]) == [problem]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("window.hops_s", "window.hop_s"),
        ("hop_s", "window.hop_s"),
        ("windw.hop_s", "window.hop_s"),
        ("top-k", "labels.top_k"),
        ("model.nmae", "model.name"),
        ("retry_faild", "retry_failed"),
    ],
)
def test_an_unknown_key_names_the_closest(key: str, meant: str) -> None:
    assert problems(sets=[f"{key}=1"]) == [
        f"{key} (--set {key}=1) is not a key; did you mean {meant}?"
    ]


def test_every_problem_is_told_at_once_with_its_origin(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "windows:\n  hop_s: 1\nmodel:\n  std: -1\nlabels: 3\nlimit: 1\nlimit: 2\n",
    )
    assert problems(
        path=path,
        sets=["nothing", "max_failed=2"],
        options=[("window.length_s", 5.0, "--window-s"), ("window.hop_s", 12.0, "--hop-s")],
    ) == [
        f"windows ({path}:1) is not a key; did you mean window?",
        f"labels is 3 ({path}:5); must hold keys and values",
        f"limit ({path}:7) is given twice; keep one of them",
        "--set nothing has no '='; must be key=value, like window.hop_s=5",
        "max_failed is 2 (--set max_failed=2); must be at most 1",
        f"model.std is -1 ({path}:4); must be greater than 0",
        "window.hop_s is 12.0 (--hop-s); must be in (0, 5] (window.length_s), "
        "else audio between windows is lost",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1\n", "is not valid YAML"),
        ("- a\n- b\n", "holds no keys"),
        ("\t", "is not valid YAML"),
        ("output: 2024-13-45\n", "is not valid YAML"),
        ("output: !!python/name:os.system\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, text)
    assert problem in "\n".join(problems(path=path))


@pytest.mark.parametrize("text", ["", "# nothing\n", "window:\n", "window:\n  # hop_s: 5\n"])
def test_a_file_that_sets_nothing_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(RunConfig, write(tmp_path, text)) == RunConfig()


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(RunConfig, str(path))


@pytest.mark.parametrize("name", ["audioset", "audioset.yaml"])
def test_a_shipped_config_goes_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert find_config(RunConfig, name) == config_folder() / "audioset.yaml"


def test_a_recipe_for_training_is_none_for_labelling() -> None:
    with pytest.raises(ConfigError, match=r"esc50 is one for earmark train\.$"):
        load_config(RunConfig, "esc50")


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "limit: 5\n", "audioset.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config(RunConfig, "audioset.yaml").limit == 5


def test_a_config_that_is_nowhere_lists_what_there_is() -> None:
    with pytest.raises(
        ConfigError, match=r"audioset, .*, default, local, .*Did you mean audioset\?"
    ):
        load_config(RunConfig, "audiset")


@pytest.mark.parametrize("path", sorted(config_folder().glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads_and_begins_with_a_command(path: Path) -> None:
    load_config(RunConfig, str(path))
    text = path.read_text(encoding="utf-8")
    head = re.match(r"(#.*\n)+", text)
    assert head is not None
    assert "earmark label" in head.group()


def test_the_configs_that_ship() -> None:
    assert shipped_configs() == [
        *("audioset", "dataflow_cpu", "dataflow_gpu", "default", "local", "speech_commands"),
    ]
    assert (
        load_config(RunConfig, "audioset").model.name == "MIT/ast-finetuned-audioset-10-10-0.4593"
    )
    assert (
        load_config(RunConfig, "speech_commands").model.name
        == "MIT/ast-finetuned-speech-commands-v2"
    )


def test_a_resolved_config_is_a_config(tmp_path: Path) -> None:
    config = load_config(
        RunConfig,
        sets=["inputs=[a, b]", "beam.runner=PrismRunner", "beam.x=[1, b]", "window.length_s=3"],
    )
    path = write(tmp_path, yaml.safe_dump(config.resolved()))
    assert load_config(RunConfig, path) == config
