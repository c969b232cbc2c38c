"""Models that ship with Earmark: found by name, described by their own files, without a network."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open

from pipeline.cli import main as cli
from pipeline.config.label import RunConfig
from pipeline.config.load import load_config
from pipeline.config.train import TrainConfig
from pipeline.labelling.plan import RunPlan, describe_plan, make_plan
from tests.support.audio_factory import write
from tests.support.model_factory import MEAN, STD, TINY_LABELS, write_tiny_model
from tests.support.paths import ROOT
from transforms.errors import ModelError
from transforms.models.ast import bundled
from transforms.models.ast.bundled import (
    bundled_folder,
    bundled_models,
    bundled_names,
    describe_default,
)
from transforms.models.ast.checkpoints import load_model, resolve_model
from transforms.models.ast.config_files import load_features
from transforms.models.ast.model import ASTForAudioClassification

CARD = """\
---
license: cc-by-nc-4.0
model-index:
- name: tiny
  results:
  - task: {type: audio-classification}
    dataset: {name: Five Sounds, type: none}
    metrics:
    - {type: accuracy, value: 0.875}
    - {type: f1, value: 0.5}
---
# A tiny model

---
license: of something else
"""


def write_bundled(folder: Path, name: str, **changes: object) -> Path:
    """A bundled model's folder, card and all."""
    write_tiny_model(folder / name, **changes)  # type: ignore[arg-type]
    (folder / name / "README.md").write_text(CARD)
    return folder / name


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is bundled, for a test: a tiny esc10; and no hub that could be asked."""
    folder = tmp_path / "bundled_models"
    write_bundled(folder, "esc10")
    (folder / "no_model").mkdir()
    monkeypatch.setattr(bundled, "BUNDLED_FOLDER", folder)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    return folder


def test_a_bundled_model_is_resolved_and_loaded_by_its_name(shelf: Path) -> None:
    spec = resolve_model("esc10")
    digest = hashlib.sha256((shelf / "esc10" / "model.safetensors").read_bytes()).hexdigest()
    assert (spec.name, spec.source, spec.revision, spec.sha256) == (
        "esc10", "bundled", None, digest,
    )  # fmt: skip
    assert (spec.license, spec.notes) == ("cc-by-nc-4.0", ())
    assert (spec.mean, spec.std, spec.activation) == (MEAN, STD, "sigmoid")
    assert [label.name for label in spec.labels] == list(TINY_LABELS)
    features = torch.zeros(1, 1024, 128)
    expected = load_model(resolve_model(str(shelf / "esc10")))
    with torch.no_grad():
        wanted = expected(features).logits
        assert torch.equal(load_model(spec)(features).logits, wanted)
        assert torch.equal(
            ASTForAudioClassification.from_pretrained("esc10")(features).logits, wanted
        )
    assert load_features("esc10")["mean"] == MEAN


def test_a_worker_uses_the_model_of_its_own_installation(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = pickle.loads(pickle.dumps(resolve_model("esc10")))
    assert str(shelf) not in repr(vars(spec))
    elsewhere = tmp_path / "elsewhere"
    shelf.rename(elsewhere)
    monkeypatch.setattr(bundled, "BUNDLED_FOLDER", elsewhere)
    assert load_model(spec).config == spec.config
    write_bundled(elsewhere, "esc10", seed=1)
    with pytest.raises(ModelError, match="model esc10: its weights have changed since the run was"):
        load_model(spec)
    (elsewhere / "esc10").rename(elsewhere / "speech")
    with pytest.raises(
        ModelError,
        match=r"model esc10: not in this installation of Earmark, which has speech\. Inst",
    ):
        load_model(spec)


def test_a_bundled_model_takes_precedence_over_a_folder_of_its_name(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "here" / "esc10", seed=1)
    monkeypatch.chdir(tmp_path / "here")
    spec, other = resolve_model("esc10"), resolve_model("./esc10")
    assert (spec.source, other.source) == ("bundled", "folder")
    assert spec.sha256 != other.sha256
    assert spec.notes == ("esc10 is the model that ships with Earmark; the folder here is ./esc10",)


@pytest.mark.parametrize("name", ["ESC10", "esc10/", "no_model", "esc-10"])
def test_only_the_exact_name_is_the_bundled_model(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert bundled_folder(name) is None
    with pytest.raises(ModelError, match=r"an original \.pth file, esc10 \(ships with Earmark\)$"):
        resolve_model(name)


def test_a_bundled_model_is_described_by_its_files(shelf: Path) -> None:
    write_bundled(shelf, "a_second", max_length=128)
    assert bundled_names() == ("a_second", "esc10")
    second, model = bundled_models()
    assert (second.name, second.window_s) == ("a_second", 1.295)
    assert (model.name, model.folder) == ("esc10", shelf / "esc10")
    assert (model.labels, model.num_labels, model.window_s) == (TINY_LABELS, 5, 10.255)
    assert (model.dataset, model.metric, model.value) == ("Five Sounds", "accuracy", 0.875)
    assert model.license == "cc-by-nc-4.0"


def test_bundled_models_are_listed_first(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    first, *others = json.loads(capsys.readouterr().out)
    assert first == {
        "name": "esc10",
        "source": "bundled",
        "max_length": 1024,
        "window_s": 10.255,
        "labels": "Five Sounds",
        "num_labels": 5,
        "metric": "accuracy",
        "published": 0.875,
        "license": "cc-by-nc-4.0",
    }
    assert {entry["source"] for entry in others} == {"hub"}
    assert cli.main(["models"]) == 0
    table = capsys.readouterr().out
    assert table.index(" esc10 ") < table.index(" MIT/")
    assert "Source: inside Earmark for esc10, the Hugging Face hub for the others." in table


def test_the_default_is_described_in_a_line(shelf: Path) -> None:
    assert describe_default() == (
        "No model is given: using esc10, which ships with Earmark and knows 5 sounds (dog, rain, "
        "rooster, helicopter, clock tick). For AudioSet's 527: --config audioset, which needs the "
        "network once, or --model with a downloaded copy"
    )


def test_without_a_model_the_default_is_used_and_printed(
    shelf: Path, tmp_path: Path, tiny_model: Path
) -> None:
    write(tmp_path / "a.wav", np.zeros(16_000, np.float32), 16_000)

    def plan(**model: object) -> RunPlan:
        config = {"inputs": [str(tmp_path / "a.wav")], "model": model}
        return make_plan(RunConfig.model_validate(config), needs_output=False)

    first, note, *_ = describe_plan(plan(std=3.0))
    assert first.startswith("Model: esc10, 5 labels (sigmoid), windows of ")
    assert note == describe_default()
    assert plan(std=3.0).resolved.label.model.std == 3.0
    assert plan().resolved.run["model"]["name"] == "esc10"
    for name in (str(tiny_model), "esc10"):
        assert describe_default() not in describe_plan(plan(name=name))


@pytest.mark.parametrize("command", ["label", "plan"])
def test_a_missing_bundled_model_is_found_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setattr(bundled, "BUNDLED_FOLDER", tmp_path / "none")
    assert cli.main([command, str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "model esc10: not in this installation of Earmark" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def edit_config(**changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_card(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "README.md").write_text(CARD.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "README.md").unlink(), r"FileNotFoundError"),
        (lambda f: (f / "config.json").write_bytes(b"{"), r"JSONDecodeError"),
        (edit_config(id2label={"1": "a"}), r"KeyError\('0'\)"),
        (edit_config(id2label=None), r"TypeError"),
        (edit_config(max_length="long"), r"ValueError\(.*'long'"),
        (edit_card("---", "-"), r"ValueError\('not enough values"),
        (edit_card("license: cc", "license: ["), r"ParserError|ScannerError"),
        (edit_card("model-index", "models"), r"KeyError\('model-index'\)"),
        (edit_card(CARD[4:], "a\n---\n"), r"TypeError"),
    ],
)
def test_a_damaged_installation_is_named(
    shelf: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(shelf / "esc10")
    with pytest.raises(ModelError, match=message) as raised:
        bundled_models()
    assert re.match(r"model esc10, which ships with Earmark: its files are", str(raised.value))
    assert str(raised.value).endswith("Install Earmark again")


@pytest.mark.parametrize("name", bundled_names())
def test_every_bundled_model_is_complete_and_described(name: str) -> None:
    (model,) = (model for model in bundled_models() if model.name == name)
    spec = resolve_model(name)
    assert spec.source == "bundled"
    assert tuple(label.name for label in spec.labels) == model.labels
    assert (spec.window_s, spec.license) == (model.window_s, model.license)
    assert load_model(spec).config == spec.config


ESC10_LOG = ROOT / "docs" / "esc10"
MAX_BYTES = 12_000_000


def test_esc10_is_small_and_in_half_precision() -> None:
    folder = bundled.BUNDLED_FOLDER / "esc10"
    assert sum(path.stat().st_size for path in folder.iterdir()) < MAX_BYTES
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_esc10_has_the_shape_and_labels_of_its_recipe() -> None:
    recipe = load_config(TrainConfig, "esc10")
    spec = resolve_model("esc10")
    shape = recipe.model.model_dump() | recipe.architecture.model_dump()
    for name in (
        *("num_mel_bins", "max_length", "frequency_stride", "time_stride", "patch_size"),
        *("hidden_size", "num_hidden_layers", "num_attention_heads"),
    ):
        assert getattr(spec.config, name) == shape[name], name
    assert spec.activation == "softmax"
    assert [label.name for label in spec.labels] == sorted(label.name for label in spec.labels)


def test_the_card_of_esc10_has_the_measured_figures() -> None:
    found = json.loads((ESC10_LOG / "evaluation.json").read_text())
    card = (bundled.BUNDLED_FOLDER / "esc10" / "README.md").read_text()
    assert bundled_models()[0].value == round(found["accuracy"], 4)
    rows = re.findall(r"^\| `(\w+)` \| (\d+) of (\d+) \| (0\.\d+|1\.\d+) \|$", card, re.MULTILINE)
    assert {
        name: (int(right), int(clips), float(precision)) for name, right, clips, precision in rows
    } == {
        entry["name"]: (
            round(entry["recall"] * entry["positives"]),
            entry["positives"],
            round(entry["precision"], 3),
        )
        for entry in found["classes"]
    }


def test_the_log_of_esc10_adds_up() -> None:
    """What training says of each fold is what ``evaluate`` says of all of them."""
    found = json.loads((ESC10_LOG / "evaluation.json").read_text())
    figures = []
    for fold in range(1, 5):
        with (ESC10_LOG / f"history_fold{fold}.csv").open(newline="") as lines:
            *_, last = csv.DictReader(lines)
        assert int(last["epoch"]) == load_config(TrainConfig, "esc10").training.epochs
        figures.append(float(last["averaged_accuracy"]))
    assert found["counts"]["clips"] == 320
    assert sum(figures) / 4 == pytest.approx(found["accuracy"], abs=1e-9)


def test_every_training_clip_of_esc10_is_credited(shared_data: Path) -> None:
    def facts(path: Path) -> set[tuple[str, ...]]:
        columns = ("filename", "licence", "author", "source_title")
        with path.open(newline="", encoding="utf-8") as lines:
            return {tuple(row[name] for name in columns) for row in csv.DictReader(lines)}

    given = facts(bundled.BUNDLED_FOLDER / "esc10" / "attribution.csv")
    assert given == facts(shared_data / "esc10" / "esc10.csv")


def test_esc10_knows_the_clips_of_every_fold_that_it_has_learnt_from(
    shared_data: Path, tmp_path: Path
) -> None:
    """With no --model for ``evaluate`` either: the result knows which one it took."""
    folder, out = shared_data / "esc10", str(tmp_path / "out")
    with (folder / "esc10.csv").open(newline="") as lines:
        clips = list(csv.DictReader(lines))[::4]
    assert {clip["label"] for clip in clips} == {x.name for x in resolve_model("esc10").labels}
    assert {clip["fold"] for clip in clips} == {"1", "2", "3", "4"}
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text(
        "".join(
            json.dumps({"uri": str(folder / "audio" / clip["filename"]), "label": clip["label"]})
            + "\n"
            for clip in clips
        )
    )
    assert cli.main(["label", str(manifest), "-o", out, "--device", "cpu", "--quiet"]) == 0
    assert cli.main(["evaluate", out, "--quiet"]) == 0
    evaluation = json.loads((tmp_path / "out" / "evaluation" / "evaluation.json").read_text())
    assert evaluation["accuracy"] > 0.9
