"""The wheel: it holds packages, configs, label lists and models, and works once installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import pipeline
from tests.support.model_factory import TINY_LABELS, write_tiny_model
from tests.support.paths import ROOT

MODEL_CARD = """---
license: cc0-1.0
model-index:
- results: [{dataset: {name: none}, metrics: [{type: accuracy, value: 0.2}]}]
---
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the tree: building leaves files behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "earmark.py"):
        shutil.copy(ROOT / name, source)
    for name in ("pipeline", "transforms", "configs"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    # A model of the tests' own beside those that ship.
    model = write_tiny_model(source / "transforms" / "models" / "ast" / "bundled_models" / "tiny")
    (model / "README.md").write_text(MODEL_CARD)
    target = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
         "--quiet", "--wheel-dir", str(target), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an unpacked wheel."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_below(folder: Path, root: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(root)) for path in files}


def test_the_wheel_holds_all_that_the_checkout_has(installed: Path) -> None:
    expected = {
        "earmark.py",
        *files_below(ROOT / "pipeline", ROOT),
        *files_below(ROOT / "transforms", ROOT),
        *(f"pipeline/{name}" for name in files_below(ROOT / "configs", ROOT)),
        *(
            f"transforms/models/ast/bundled_models/tiny/{name}"
            for name in "README.md config.json model.safetensors preprocessor_config.json".split()
        ),
    }
    assert "pipeline/configs/default.yaml" in expected
    assert "pipeline/configs/train/esc50.yaml" in expected
    assert "pipeline/training/__init__.py" in expected
    assert "transforms/models/label_lists/audioset.csv" in expected
    found = {name for name in files_below(installed, installed) if ".dist-info" not in name}
    assert found == expected


def test_the_wheel_says_what_it_is(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    metadata = message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert (metadata["Name"], metadata["Version"]) == ("earmark", pipeline.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    assert sorted(metadata.get_all("Provides-Extra")) == [
        *("azure", "dev", "gcp", "openvino", "s3", "yaml"),
    ]
    requirements = {line.replace(" ", "") for line in metadata.get_all("Requires-Dist")}
    assert {"apache-beam==2.77.*", "torchaudio==2.11.0", "torch<2.13,>=2.11"} <= requirements
    assert (info / "entry_points.txt").read_text(encoding="utf-8").split("\n")[:2] == [
        "[console_scripts]",
        "earmark = earmark:main",
    ]
    assert list(info.rglob("LICENSE"))


def run_from(folder: Path, elsewhere: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_installed_earmark_finds_its_configs_recipes_and_labels(
    installed: Path, tmp_path: Path
) -> None:
    code = """
from pipeline.config.label import RunConfig
from pipeline.config.load import find_config, load_config
from pipeline.config.train import TrainConfig
from transforms.models.labels import audioset_labels
print(find_config(RunConfig, "audioset"), load_config(RunConfig, "audioset").model.name)
print(find_config(TrainConfig, "esc50"), load_config(TrainConfig, "esc50").model.max_length)
print(len(audioset_labels()))
"""
    assert run_from(installed, tmp_path, code).splitlines() == [
        f"{installed}/pipeline/configs/audioset.yaml MIT/ast-finetuned-audioset-10-10-0.4593",
        f"{installed}/pipeline/configs/train/esc50.yaml 512",
        "527",
    ]


def test_an_installed_earmark_labels_with_the_models_it_holds(
    installed: Path, tmp_path: Path
) -> None:
    code = (
        "from transforms.models.ast.checkpoints import load_model, resolve_model;"
        "spec = resolve_model('tiny'); load_model(spec);"
        "print(spec.source, spec.license, len(spec.labels))"
    )
    assert run_from(installed, tmp_path, code) == f"bundled cc0-1.0 {len(TINY_LABELS)}"
