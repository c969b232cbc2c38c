"""Models that ship with Earmark: found by name, described by their own files, without a network."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

from pipeline import cli
from tests.model_factory import MEAN, STD, TINY_LABELS, write_tiny_model
from transforms import bundled
from transforms.bundled import bundled_folder, bundled_models, bundled_names, describe_default
from transforms.checkpoints import ModelOverrides, load_features, load_model, resolve_model
from transforms.errors import ModelError
from transforms.spectrogram_transformer import ASTForAudioClassification

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


def test_a_worker_takes_the_model_of_its_own_installation(
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
        ModelError, match=r"model esc10: this inst.* does not hold it; it holds speech\. Install"
    ):
        load_model(spec)


def test_the_bundled_one_wins_over_a_folder_of_its_name_and_says_so(
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


def test_overrides_apply_to_a_bundled_model(shelf: Path) -> None:
    spec = resolve_model("esc10", ModelOverrides(activation="softmax", mean=0.0))
    assert (spec.activation, spec.mean, spec.std) == ("softmax", 0.0, STD)


def test_what_is_known_of_a_bundled_model_is_what_its_files_say(shelf: Path) -> None:
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
    words = "esc10 10.255 s Five Sounds (5 labels) accuracy 0.8750 cc-by-nc-4.0"
    rows = [" ".join(re.sub("[│┃]", " ", line).split()) for line in table.splitlines()]
    assert words in rows
    assert rows.index(words) < next(n for n, row in enumerate(rows) if row.startswith("MIT/"))
    assert (
        "Source: inside Earmark for esc10, the Hugging Face hub for the others. A folder" in table
    )


@pytest.mark.parametrize("width", ["40", "160"])
def test_a_bundled_model_is_named_whole_on_a_terminal_of_any_width(
    shelf: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: str,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", width)
    assert cli.main(["models"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert {"esc10", "cc-by-nc-4.0", "0.8750"} <= set(text.split())


def test_the_default_is_described_in_a_line(shelf: Path) -> None:
    assert describe_default() == (
        "No model is given: taking esc10, which ships with Earmark and knows 5 sounds (dog, rain, "
        "rooster, helicopter, clock tick). For AudioSet's 527: --config audioset, which needs the "
        "network once, or --model with a downloaded copy"
    )


def test_an_installation_without_models_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "BUNDLED_FOLDER", tmp_path / "none")
    assert bundled_models() == ()
    with pytest.raises(ModelError, match=r"model esc10: .* not hold it; it holds none at all\. In"):
        describe_default()


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
        (lambda f: (f / "README.md").unlink(), r"README\.md cannot be read as a model card: "),
        (lambda f: (f / "config.json").write_bytes(b"{"), r"config\.json cannot be read as an AST"),
        (edit_config(id2label={"1": "a"}), r"config\.json .*: ValueError\('id2label or max_leng"),
        (edit_config(id2label=None), r"config\.json cannot be read as an AST's: AttributeError"),
        (edit_config(max_length="long"), r"config\.json cannot be read as an AST's: ValueError"),
        (edit_card("---", "-"), r"there is no front matter between two lines ---"),
        (edit_card("license: cc", "license: ["), r"README\.md cannot be read as a model card"),
        (edit_card("license", "licence"), r"license in README\.md is None; expected its name"),
        (edit_card("model-index", "models"), r"no model-index with a result's .*'model-index'"),
        (edit_card("0.875", "87.5"), r"is 'Five Sounds', 'accuracy', 87\.5; expected a name, a"),
        (edit_card("0.875", "'0.875'"), r"'0\.875'; expected a name, a metric and a number in \[0"),
        (edit_card(CARD[4:], "a\n---\n"), r"front matter of README\.md is 'a'; expected keys"),
    ],
)
def test_a_damaged_installation_is_named(
    shelf: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(shelf / "esc10")
    with pytest.raises(ModelError, match=message) as raised:
        bundled_models()
    assert re.match(r"model esc10, which ships with Earmark: ", str(raised.value))
    assert str(raised.value).endswith("Install Earmark again")


@pytest.mark.parametrize("name", bundled_names())
def test_what_ships_is_whole_and_tells_what_it_is(name: str) -> None:
    (model,) = (model for model in bundled_models() if model.name == name)
    spec = resolve_model(name)
    assert spec.source == "bundled"
    assert tuple(label.name for label in spec.labels) == model.labels
    assert (spec.window_s, spec.license) == (model.window_s, model.license)
    assert load_model(spec).config == spec.config
