"""The options: which key each sets, what the help says of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli import main as cli
from pipeline.cli.options import LABEL, TRAIN
from pipeline.config.label import RunConfig
from pipeline.config.load import shipped_configs
from pipeline.config.schema import Config, flatten
from pipeline.config.train import TrainConfig
from tests.support.fake_commands import REQUIRED, TRAINING, Calls

# The key that each option sets, by its flag.
KEYS = {
    schema: {option.origin: option.key for option in table if option.key is not None}
    for schema, table in ((RunConfig, LABEL), (TrainConfig, TRAIN))
}


def command_of(name: str) -> Any:
    return typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]


def label_config(calls: Calls, *arguments: str) -> RunConfig:
    assert cli.main(["label", *arguments]) == 0
    return calls[-1][0]


def words_of(given: dict[str, str | None]) -> list[str]:
    return [word for pair in given.items() for word in pair if word is not None]


def check_values(config: Config, given: dict[str, str | None], lists: dict[str, list[str]]) -> None:
    """Check that each flag has set its key, the lists theirs, and nothing else is changed."""
    schema = type(config)
    values = flatten(config.resolved())
    expected = {
        key: True if given[flag] is None else type(values[key])(given[flag])
        for flag, key in KEYS[schema].items()
        if flag in given
    }
    assert values == flatten(schema().resolved()) | expected | lists


def test_every_option_reaches_its_key(calls: Calls) -> None:
    given = {
        "--output": "out",
        "--model": "m",
        "--top-k": "3",
        "--scores": None,
        "--precision": "bf16",
        "--device": "cpu",
        "--engine": "torch",
        "--workers": "2",
        "--batch-size": "16",
        "--window-s": "5",
        "--hop-s": "2.5",
        "--format": "nemo",
        "--label-separator": ",",
        "--limit": "7",
        "--retry-failed": None,
        "--max-failed": "0.5",
        "--quiet": None,
    }
    config = label_config(calls, "a.wav", "b/", *words_of(given))
    check_values(config, given, {"inputs": ["a.wav", "b/"]})


def test_every_option_of_train_reaches_its_key(calls: Calls) -> None:
    given = {
        "--hold-out": "fold=1",
        "--output": "out",
        "--model": "m",
        "--labels": "audioset",
        "--epochs": "3",
        "--batch-size": "16",
        "--learning-rate": "0.5",
        "--seed": "7",
        "--device": "cpu",
        "--precision": "bf16",
        "--cache": "c",
        "--format": "nemo",
        "--label-separator": ",",
        "--limit": "9",
        "--overwrite": None,
        "--max-failed": "0.5",
        "--quiet": None,
    }
    assert cli.main(["train", "-t", "a.csv", "--train", "b.tar", *words_of(given)]) == 0
    check_values(calls[-1][0], given, {"train": ["a.csv", "b.tar"]})
    assert set(given) == set(KEYS[TrainConfig]) - {"--train", "--validation", "--column"}


def test_the_label_column_of_train_is_one_of_the_columns(calls: Calls) -> None:
    assert cli.main([*TRAINING, "--label-column", "category"]) == 0
    assert cli.main([*TRAINING, "--column", "uri=clip", "--label-column", "category"]) == 0
    assert [config.manifest.columns for (config,) in calls] == [
        ("label=category",),
        ("uri=clip", "label=category"),
    ]


def test_train_takes_several_validation_inputs(calls: Calls) -> None:
    assert cli.main([*TRAINING[:5], "-v", "x.csv", "--validation", "y.csv"]) == 0
    (config,) = calls[-1]
    assert config.validation == ("x.csv", "y.csv")


@pytest.mark.parametrize(
    ("command", "rest"), [("label", ["in", "-o", "out"]), ("train", TRAINING[1:])]
)
def test_columns_of_tables_are_given_in_three_ways(
    calls: Calls, tmp_path: Path, command: str, rest: list[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("manifest: {columns: {label: kind, end_s: }}\n")
    assert cli.main([command, *rest, "-c", str(path)]) == 0
    assert cli.main([command, *rest, "--column", "label=a=b", "--column", "uri=my file"]) == 0
    assert cli.main([command, *rest, "--set", "manifest.columns={label: kind}"]) == 0
    assert [config.manifest.pairs() for config, *_ in calls] == [
        (("label", "kind"), ("end_s", "")),
        (("label", "a=b"), ("uri", "my file")),
        (("label", "kind"),),
    ]


def test_evaluate_reads_the_truth_as_it_is_told(calls: Calls) -> None:
    assert cli.main("evaluate x -t t.csv --column label=kind --set manifest.root=y".split()) == 0
    manifest = calls[-1][-1]
    assert (manifest.pairs(), manifest.root) == ((("label", "kind"),), "y")


def test_what_is_trained_on_can_come_from_the_yaml(calls: Calls, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: a.csv\nvalidation: [b.csv]\noutput: y\ntraining: {epochs: 2}\n")
    assert cli.main(["train", "-c", str(path), "--epochs", "4"]) == 0
    (config,) = calls[-1]
    assert (config.train, config.validation, config.output) == (("a.csv",), ("b.csv",), "y")
    assert config.training.epochs == 4


def test_overwrite_reaches_its_key(calls: Calls) -> None:
    assert label_config(calls, *REQUIRED, "--overwrite").overwrite is True


@pytest.mark.parametrize("name", ["label", "plan"])
def test_label_and_plan_take_every_option_of_the_table(name: str) -> None:
    flags = {flag for parameter in command_of(name).params for flag in parameter.opts}
    assert {*KEYS[RunConfig], "--config", "--set"} - flags == {"INPUT"}
    assert {"inputs", "-o", "-m", "-c", "-q"} <= flags


@pytest.mark.parametrize(
    ("name", "schema"), [("label", RunConfig), ("train", TrainConfig)], ids=["label", "train"]
)
def test_the_help_names_the_defaults_of_the_configuration(name: str, schema: type[Config]) -> None:
    told = {
        KEYS[schema][parameter.opts[0]]: match.group(1)
        for parameter in command_of(name).params
        if (match := re.search(r"\(default ([\w.-]*\w|;)", parameter.help or ""))
    }
    assert told == {
        key: "no" if value is False else str(value)
        for key in KEYS[schema].values()
        if (value := schema.defaults()[key]) not in (None, [])
    }


def test_the_help_of_train_names_every_recipe() -> None:
    (option,) = [
        parameter for parameter in command_of("train").params if "--config" in parameter.opts
    ]
    assert set(shipped_configs("train")) - {"default"} <= set(re.findall(r"\w+", option.help))


def test_the_yaml_gives_what_the_command_line_leaves_out(calls: Calls, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("inputs: [x/]\noutput: y\nmodel: {name: z}\nlabels: {top_k: 2, scores: true}\n")
    config = label_config(calls, "-c", str(path), "--set", "limit=3", "--no-scores", "--top-k", "4")
    assert (config.inputs, config.output, config.model.name) == (("x/",), "y", "z")
    assert (config.labels.top_k, config.labels.scores, config.limit) == (4, False, 3)


def test_plan_needs_no_output(calls: Calls) -> None:
    assert cli.main(["plan", "in", "-m", "model"]) == 0
    assert calls[-1][0].output is None


def test_verify_and_export_hand_their_arguments_on(calls: Calls) -> None:
    cli.main(["verify", "x", "--quiet"])
    cli.main(["export", "x", "--format", "csv"])
    cli.main("export x -f raven -o y --threshold 0.5 --top-k 2 --one-table -q".split())
    cli.main("export x -f list -o - -l Dog --label Cat --per clip -0".split())
    assert calls == [
        ("x", True),
        ("x", "csv", None, (), None, None, None, False, False, False),
        ("x", "raven", "y", (), 0.5, 2, None, False, True, True),
        ("x", "list", "-", ["Dog", "Cat"], None, None, "clip", True, False, False),
    ]
