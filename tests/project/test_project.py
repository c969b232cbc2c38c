"""What holds for the project as a whole: who imports whom, what the README shows."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import earmark
from tests.support.paths import ROOT

MODULES = sorted([*(ROOT / "transforms").glob("*.py"), *(ROOT / "pipeline").rglob("*.py")])
STEPS = [path for path in MODULES if path.parent.name == "transforms"]

# What each step may import of the others. Everyone may import errors and records; label_audio
# joins the steps and may import all of them.
EVERYONE = {"errors", "records"}
MAY_IMPORT: dict[str, set[str]] = {
    # Names that people import from the package itself, loaded when they are asked for.
    "__init__": {"decode_worker", "fbank", "label_audio", "spectrogram_transformer"},
    "errors": set(),
    "records": set(),
    "scratch": set(),
    "retries": set(),
    "web_pages": set(),
    "storage": {"retries", "scratch", "web_pages"},
    "labels": set(),
    # What there is to read: names, a file per kind of container, the inputs, the units cut from
    # them; sources joins them.
    "clip_ids": {"storage"},
    "spooling": {"storage", "scratch", "clip_ids"},
    "tar_headers": {"storage", "clip_ids", "spooling"},
    "tar_source": {"storage", "clip_ids", "spooling", "tar_headers"},
    "parquet_pages": set(),
    "parquet_source": {"storage", "clip_ids", "spooling", "parquet_pages", "tar_source"},
    "manifests": {"storage", "clip_ids", "spooling", "parquet_source"},
    "inputs": {"storage", "clip_ids", "spooling", "parquet_source", "manifests"},
    "units": {"storage", "clip_ids", "spooling", "tar_source", "inputs"},
    "sources": {
        *("storage", "clip_ids", "spooling"),
        *("tar_source", "parquet_source", "inputs", "units"),
    },
    # Decoding from the inside out: which library reads a file, the libraries, the process that
    # runs them, its parent's side, the pool of such processes.
    "audio_routes": set(),
    "audio_readers": {"audio_routes"},
    "decode_worker": {"audio_readers", "stage_clocks"},
    "decode_process": {"decode_worker", "stage_clocks"},
    "decode": {"decode_process", "decode_worker", "stage_clocks"},
    "windows": set(),
    "live_counts": set(),
    "stage_clocks": set(),
    "fbank_settings": set(),
    "feature_statistics": {"fbank", "live_counts"},
    # from_pretrained asks checkpoints where a folder or hub id lies, inside the method.
    "fbank": {"devices", "checkpoints", "fbank_settings", "stage_clocks"},
    "spectrogram_transformer": {"checkpoints"},
    # A checkpoint: which there are, which ship with Earmark, what its tensors are called, where its
    # files lie, whether its weights are sound, what an original file says; checkpoints joins them.
    "public_checkpoints": set(),
    "bundled": {"public_checkpoints"},
    "tensor_names": {"spectrogram_transformer"},
    "model_files": {"storage", "scratch", "bundled"},
    "model_weights": {"spectrogram_transformer", "tensor_names", "model_files"},
    "original_checkpoints": {
        *("storage", "labels", "spectrogram_transformer"),
        *("public_checkpoints", "tensor_names", "model_files", "model_weights"),
    },
    "checkpoints": {
        *("storage", "labels", "spectrogram_transformer", "original_checkpoints"),
        *("public_checkpoints", "tensor_names", "model_files", "model_weights"),
    },
    # An AST that starts from a transformer for images; for training alone.
    "image_checkpoints": {
        *("checkpoints", "spectrogram_transformer"),
        *("tensor_names", "model_files", "model_weights"),
    },
    # What runs the model: the interface and torch, OpenVINO, all engines; what is kept from run to
    # run, how far from float32 it is; inference joins them.
    "caches": set(),
    "devices": {"caches"},
    "backbones": {"spectrogram_transformer", "devices", "stage_clocks"},
    "openvino_engine": {
        *("backbones", "caches", "checkpoints", "devices", "spectrogram_transformer"),
    },
    "engines": {"backbones", "openvino_engine", "checkpoints", "spectrogram_transformer"},
    "precision_check": {"backbones", "caches", "devices"},
    "inference": {
        *("checkpoints", "spectrogram_transformer", "devices", "backbones", "engines"),
        *("precision_check", "stage_clocks"),
    },
    "rows": {"labels"},
    "ledger": {"storage", "stage_clocks"},
    "commit": {"storage", "rows", "ledger", "live_counts", "stage_clocks"},
    "label_audio": {path.stem for path in STEPS},
    # LabelAudio for Beam YAML.
    "yaml_provider": {"label_audio", "checkpoints", "backbones", "rows"},
}

# The only modules that may import a library: one door each.
DOORS = {
    "torchaudio": {"transforms/features/fbank.py"},
    "fsspec": {"transforms/storage/filesystem.py"},
    "openvino": set(),  # imported by name where it is used: it may not be installed
    "nncf": set(),
    "gcsfs": set(),
}


def imports_of(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Each import of a file: module, name in it (or ""), and whether it is done at import time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top = {id(node) for node in ast.walk(tree)}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_top -= {id(node) for node in ast.walk(function)}
        if isinstance(function, ast.If) and ast.unparse(function.test) == "TYPE_CHECKING":
            at_top -= {id(node) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", id(node) in at_top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, line {node.lineno}"
            for alias in node.names:
                yield node.module or "", alias.name, id(node) in at_top


def siblings_of(path: Path) -> set[str]:
    """The modules of ``transforms`` that a file imports."""
    stems = {step.stem for step in STEPS}
    found = set()
    for module, name, _ in imports_of(path):
        if module == "transforms":
            found.add(name)
        elif module.startswith("transforms."):
            found.add(module.split(".")[1])
    return found & stems


def test_every_step_has_its_place_in_the_table() -> None:
    assert {path.stem for path in STEPS} - set(MAY_IMPORT) == set()


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_steps_import_only_what_lies_before_them(path: Path) -> None:
    allowed = MAY_IMPORT[path.stem] | EVERYONE
    assert siblings_of(path) - allowed - {path.stem} == set()


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_transforms_never_import_the_pipeline(path: Path) -> None:
    assert [m for m, _, _ in imports_of(path) if m.split(".")[0] == "pipeline"] == []


def test_the_public_names_are_loaded_when_they_are_used() -> None:
    code = """
import sys, earmark
assert set(earmark.__all__) <= set(dir(earmark))
assert not [name for name in sys.modules if name.startswith(("transforms", "torch", "apache"))]
print([name for name in earmark.__all__ if not callable(getattr(earmark, name))])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_docs_import_public_names_and_no_others() -> None:
    imported: set[str] = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for block in code_blocks(page.read_text(encoding="utf-8")):
            assert re.findall(r"^ *(?:from|import) (?:transforms|pipeline)\b", block, re.M) == []
            for names in re.findall(r"^from earmark import (.+)$", block, re.MULTILINE):
                imported |= set(names.split(", "))
    assert len(imported) > 5
    assert imported <= set(earmark.__all__)


def test_the_docs_say_what_each_public_name_is() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == sorted(earmark.__all__)


@pytest.mark.parametrize("name", ["transforms.py", "transforms/__init__.py"])
def test_a_module_that_hides_ours_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "from earmark import ASTConfig"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    told = done.stderr.splitlines()[-1]
    assert told.startswith(f"ImportError: {tmp_path / name} hides the package 'transforms' of Ear")
    assert told.endswith("Rename it, or start Python in another folder")


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library: str) -> None:
    importers = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if any(module.split(".")[0] == library for module, _, _ in imports_of(path))
    }
    assert importers <= DOORS[library]


@pytest.mark.parametrize(
    ("module", "libraries"),
    [
        ("pipeline/cli/main.py", {"torch", "apache_beam", "pyarrow", "numpy", "rich"}),
        ("pipeline/config/label.py", {"torch", "apache_beam", "pyarrow", "numpy"}),
        ("pipeline/config/train.py", {"torch", "apache_beam", "pyarrow", "numpy"}),
        ("pipeline/training/data/packed_clips.py", {"torch", "apache_beam", "pyarrow"}),
        ("pipeline/training/data/batches.py", {"apache_beam", "pyarrow"}),
        ("pipeline/training/data/augmentation.py", {"apache_beam", "pyarrow"}),
        ("pipeline/terminal/progress.py", {"torch", "apache_beam", "pyarrow", "numpy"}),
        ("transforms/records.py", {"torch", "apache_beam", "pyarrow"}),
        ("transforms/storage/filesystem.py", {"torch", "apache_beam", "pyarrow"}),
        ("transforms/process/stage_times.py", {"torch", "apache_beam", "pyarrow", "numpy"}),
        ("transforms/models/labels.py", {"torch", "apache_beam"}),
        ("transforms/models/ast/public.py", {"torch", "apache_beam"}),
        ("transforms/models/ast/bundled.py", {"torch", "apache_beam"}),
        ("transforms/models/ast/files.py", {"torch", "apache_beam"}),
        ("transforms/features/fbank_settings.py", {"torch", "apache_beam", "pyarrow", "numpy"}),
        ("transforms/decoding/decode_audio.py", {"torch"}),
        ("transforms/decoding/pool.py", {"torch", "apache_beam"}),
        ("transforms/decoding/decode.py", {"torch", "apache_beam"}),
        ("transforms/decoding/ffmpeg_reader.py", {"torch", "apache_beam", "av"}),
    ],
)
def test_light_modules_import_nothing_heavy(module: str, libraries: set[str]) -> None:
    path = ROOT / module
    at_top = {name.split(".")[0] for name, _, is_at_top in imports_of(path) if is_at_top}
    assert at_top & libraries == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_code_checks_without_assert(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert lines == [], "python -O removes assert: raise an error with words"


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_readme_shows_how_to_start_and_how_to_test() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(code_blocks(text)) >= 2
    behind_marker = text.partition("<!-- test-command -->")[2]
    assert "pytest" in code_blocks(behind_marker)[0]


def test_ci_runs_the_readme_s_own_commands() -> None:
    """The shell's way to find them finds what a reader sees."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = re.search(r"^test_commands\(\) \{.*?^\}", script, flags=re.MULTILINE | re.DOTALL)
    assert function is not None
    found = subprocess.run(
        ["bash", "-c", f"{function.group()}\ntest_commands"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found == code_blocks(text.partition("<!-- test-command -->")[2])[0]


def test_ci_is_valid_bash_and_executable() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in told.stdout.splitlines()} == targets
