"""What is installed: the wheel holds the packages, the configs and the label lists, and works."""

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

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree, so that building leaves nothing in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pipeline", "transforms", "configs"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
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
    """The wheel unpacked, as an installer would."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_all_that_the_checkout_has(installed: Path) -> None:
    expected = {
        *(f"pipeline/{path.name}" for path in (ROOT / "pipeline").glob("*.py")),
        *(f"transforms/{path.name}" for path in (ROOT / "transforms").glob("*.py")),
        *(f"pipeline/configs/{path.name}" for path in (ROOT / "configs").iterdir()),
        *(
            f"transforms/label_lists/{path.name}"
            for path in (ROOT / "transforms" / "label_lists").iterdir()
        ),
    }
    assert "pipeline/configs/default.yaml" in expected
    assert "transforms/label_lists/audioset.csv" in expected
    found = {
        str(path.relative_to(installed))
        for path in installed.rglob("*")
        if path.is_file() and ".dist-info" not in str(path)
    }
    assert found == expected


def test_the_wheel_says_what_it_is(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    metadata = message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert (metadata["Name"], metadata["Version"]) == ("earmark", pipeline.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    assert sorted(metadata.get_all("Provides-Extra")) == ["azure", "dev", "gcp", "openvino", "s3"]
    requirements = {line.replace(" ", "") for line in metadata.get_all("Requires-Dist")}
    assert {"apache-beam==2.77.*", "torchaudio==2.11.*", "torch<2.13,>=2.11"} <= requirements
    assert (info / "entry_points.txt").read_text(encoding="utf-8").split("\n")[:2] == [
        "[console_scripts]",
        "earmark = pipeline.__main__:main",
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


def test_an_installed_earmark_finds_its_configs(installed: Path, tmp_path: Path) -> None:
    code = (
        "from pipeline.config import config_folder, load_config;"
        "print(config_folder(), load_config('audioset').model.name)"
    )
    assert run_from(installed, tmp_path, code) == (
        f"{installed}/pipeline/configs MIT/ast-finetuned-audioset-10-10-0.4593"
    )


def test_a_checkout_finds_its_configs(tmp_path: Path) -> None:
    code = "from pipeline.config import config_folder; print(config_folder())"
    assert run_from(ROOT, tmp_path, code) == str(ROOT / "configs")


def test_an_installed_earmark_finds_its_label_lists(installed: Path, tmp_path: Path) -> None:
    code = "from transforms.labels import audioset_labels; print(len(audioset_labels()))"
    assert run_from(installed, tmp_path, code) == "527"
