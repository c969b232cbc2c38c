"""``docs/pipelines.md`` as it stands, Beam YAML, and what every transform says of its types."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
import yaml
from apache_beam.testing import test_pipeline
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.typehints import Optional, TypeCheckError, typehints

import pipeline
import transforms
from tests.support import audio_factory
from tests.support.docs import marked_block
from tests.support.paths import ROOT
from transforms.beam_yaml import LabelAudioRows, row_of, row_type, uri_of
from transforms.errors import InputError
from transforms.label_audio import make_settings
from transforms.models.ast.checkpoints import resolve_model
from transforms.results.rows import clips_schema, errors_schema

DOCUMENT = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")


def block(marker: str) -> str:
    return marked_block(DOCUMENT, marker)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with ``uris.txt``: two clips, and one that is not there."""
    for index in range(2):
        audio_factory.write(tmp_path / f"{index}.wav", audio_factory.noise(1.0), 16_000)
    names = ["0.wav", "1.wav", "none.wav"]
    (tmp_path / "uris.txt").write_text("".join(f"{tmp_path}/{name}\n" for name in names))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of(folder: Path, pattern: str) -> list[dict[str, Any]]:
    texts = [path.read_text() for path in sorted(folder.glob(pattern))]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    return sorted(rows, key=lambda row: str(row["clip_id"]))


def test_the_examples_in_python_write_rows_to_sinks_of_their_own(
    here: Path, tiny_model: Path
) -> None:
    first, second = block("json-lines"), block("avro")
    code = first.partition("settings =")[2]
    assert len(code.splitlines()) <= 10
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(first.replace("MODEL", str(tiny_model)), "docs/pipelines.md", "exec"), names)
    rows = lines_of(here, "clips-*.jsonl")
    assert [row["clip_id"] for row in rows] == [f"{here}/0.wav", f"{here}/1.wav"]
    assert [len(row["labels"]) for row in rows] == [3, 3]
    exec(compile(second, "docs/pipelines.md", "exec"), names)
    with test_pipeline.TestPipeline(runner="FnApiRunner") as reading:
        read = reading | beam.io.ReadFromAvro(f"{here}/clips-*.avro")
        found = [{name: row[name] for name in ("clip_id", "duration_s")} for row in rows]
        without = beam.Map(lambda row: {k: v for k, v in row.items() if k != "embedding"})
        assert_that(read | without, equal_to(found))


# --- Beam YAML -------------------------------------------------------------------------------


def test_the_example_in_yaml_runs_as_the_document_says(
    here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apache_beam.yaml import main

    install, command = block("beam-yaml").replace("\\\n", "").split("\n", 1)
    assert install == "pip install '.[yaml]'"
    (variables,) = re.findall(r"--jinja_variables='(.*)'", command)
    values = json.loads(variables.replace("MODEL", str(tiny_model)))
    values |= {name: f"{here}/{values[name]}" for name in ("uris", "output")}
    options = re.findall(r"--(?:runner|yaml_pipeline_file)=\S+", command)
    assert command.startswith("python -m apache_beam.yaml.main ")
    monkeypatch.chdir(ROOT)
    main.run([*options, f"--jinja_variables={json.dumps(values)}"])
    clips = lines_of(here / "labels", "clips.jsonl*")
    assert [row["clip_id"] for row in clips] == [f"{here}/0.wav", f"{here}/1.wav"]
    assert {*clips[0]} == {"clip_id", "label", "score"}
    assert clips[0]["label"] in {"dog", "rain", "rooster", "helicopter", "clock tick"}
    assert 0 < clips[0]["score"] < 1
    (failure,) = lines_of(here / "labels", "failures.jsonl*")
    assert (failure["clip_id"], failure["stage"]) == (f"{here}/none.wav", "read")


def test_the_provider_names_the_transform() -> None:
    (provider,) = yaml.safe_load((ROOT / "deploy/beam_yaml/providers.yaml").read_text())
    module, _, name = provider["transforms"]["LabelAudio"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is LabelAudioRows
    parameters = inspect.signature(LabelAudioRows).parameters
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
    listed = DOCUMENT.partition("`LabelAudio` takes `model`")[2].partition("describes them")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(parameters) - {"model"}


def test_rows_keep_their_values_and_say_their_types(tiny_model: Path) -> None:
    schema = clips_schema(make_settings(resolve_model(str(tiny_model))).rows)
    values: dict[str, Any] = {field.name: None for field in schema} | {
        "clip_id": "a",
        "labels": [{"index": 0, "id": None, "name": "dog", "score": 0.5}],
        "embedding": [1.0, 2.0],
    }
    row = row_of(values)
    assert row.as_dict().keys() == values.keys()
    assert row.labels == [beam.Row(index=0, id=None, name="dog", score=0.5)]
    assert (row.clip_id, row.embedding, row.truth) == ("a", [1.0, 2.0], None)
    types = dict(row_type(errors_schema())._fields)
    assert (types["clip_id"], types["row"]) == (str, Optional[int])


@pytest.mark.parametrize("row", [beam.Row(other="a"), beam.Row(uri=None), beam.Row(uri=3)])
def test_a_row_without_a_uri_is_an_error_that_names_the_column(row: beam.Row) -> None:
    with pytest.raises(InputError, match=r"uri is .*; must be the URI of an audio file"):
        uri_of(row, "uri")


# --- Types -----------------------------------------------------------------------------------


def our_transforms() -> Iterator[type[beam.PTransform[Any, Any]]]:
    """Every PTransform that Earmark defines."""
    for package in (transforms, pipeline):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name.endswith("__main__") or ".configs" in found.name:
                continue
            module = importlib.import_module(found.name)
            for _, kind in inspect.getmembers(module, inspect.isclass):
                if kind.__module__ == found.name and issubclass(kind, beam.PTransform):
                    yield kind


OURS = sorted(our_transforms(), key=lambda kind: kind.__name__)


def test_there_are_transforms_to_look_at() -> None:
    names = {kind.__name__ for kind in OURS}
    assert {"DecodeAudio", "CutWindows", "ExtractFbank", "AssembleRows", "SkipCommitted",
            "CommitUnits", "LabelUnits", "LabelAudio", "MeasureFeatures"} <= names  # fmt: skip


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_a_transform_says_what_it_takes_and_gives(kind: type[Any]) -> None:
    hints = kind.get_type_hints(kind.__new__(kind))
    for name, found in (("takes", hints.input_types), ("gives", hints.output_types)):
        assert found is not None, f"{kind.__name__} does not say what it {name}"
        types = [*found[0], *found[1].values()]
        assert types, f"{kind.__name__} does not say what it {name}"
        assert not any(text in (Any, object, typehints.Any) for text in types), (
            f"{kind.__name__} {name} anything"
        )


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_what_it_is_given_is_checked_when_the_pipeline_is_drawn(kind: type[Any]) -> None:
    """The hints reach Beam: a wrong element type is refused before anything runs."""
    transform = kind.__new__(kind)
    beam.PTransform.__init__(transform)
    wrong = beam.pvalue.PCollection(beam.Pipeline(), element_type=bytes)
    with pytest.raises(TypeCheckError, match="Input type hint violation"):
        transform.type_check_inputs(wrong)
