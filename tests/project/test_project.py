"""The rules of the whole project: who imports whom, how large files are, what the docs show."""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import earmark
from tests.support.paths import ROOT

# What the files of each folder may import of the other folders of their package ("." is its root).
# The pipeline may import all of transforms, and transforms nothing of the pipeline.
MAY_IMPORT = {
    # One ladder: process → storage, decoding, features → sources, models → inference → results.
    # Every step may also import errors and records, which import no folder.
    "transforms/process": "",
    "transforms/storage": "process",
    "transforms/decoding/formats": "",
    "transforms/decoding": "process decoding/formats",
    "transforms/features": "process",
    "transforms/sources/tables": "process storage",
    "transforms/sources": ("process storage decoding decoding/formats features sources/tables"),
    "transforms/models": "process storage decoding features",
    "transforms/models/ast": "process storage decoding features models",
    "transforms/inference": "process storage decoding features sources models models/ast",
    "transforms/results": "process storage decoding features sources models models/ast inference",
    "transforms": "process storage decoding features sources models models/ast inference results",
    # The application. Its root holds the graph and the command's entry.
    "pipeline/config": "",
    "pipeline/terminal": "",
    "pipeline/runners": "config terminal",
    "pipeline/result": ". terminal",
    "pipeline/labelling": ". config terminal runners result",
    "pipeline/evaluation": "config terminal result labelling",
    "pipeline/training/data": "config terminal labelling",
    "pipeline/training/stages": "config terminal evaluation training/data",
    "pipeline/training": "config terminal result labelling training/data training/stages",
    "pipeline/cli": ". config terminal runners result labelling evaluation training",
    "pipeline": "cli",
}
EVERY_STEP_IMPORTS = {"transforms.errors", "transforms.records"}

# The one file or folder that may import a library. OpenVINO, nncf and gcsfs are imported by name
# where they are used, since they may not be installed.
DOORS = {
    "torchaudio": "transforms/features/fbank.py",
    "fsspec": "transforms/storage/",
    "openvino": None,
    "nncf": None,
    "gcsfs": None,
}

# What must be quick to import, and the libraries that importing it must not load.
LIGHT = {
    "pipeline.cli.main": {"torch", "apache_beam", "pyarrow", "numpy", "rich"},
    "pipeline.cli.commands": {"torch", "apache_beam", "pyarrow", "numpy", "rich"},
    "pipeline.config.schema": {"torch", "apache_beam", "pyarrow", "numpy"},
    "pipeline.config.load": {"torch", "apache_beam", "pyarrow", "numpy"},
    "pipeline.config.label": {"torch", "apache_beam", "pyarrow", "numpy"},
    "pipeline.config.train": {"torch", "apache_beam", "pyarrow", "numpy"},
    "pipeline.training.data.packed_clips": {"torch", "apache_beam", "pyarrow"},
    "pipeline.training.data.batches": {
        *("apache_beam", "pyarrow", "torchaudio", "sklearn", "matplotlib", "rich", "fsspec")
    },
    "pipeline.training.data.augmentation": {"apache_beam", "pyarrow"},
    "pipeline.terminal.progress": {"torch", "apache_beam", "pyarrow"},
    "pipeline.terminal.time_report": {"rich"},
    "transforms.records": {"torch", "apache_beam", "pyarrow"},
    "transforms.storage.filesystem": {"torch", "apache_beam", "pyarrow"},
    "transforms.process.stage_times": {"torch", "apache_beam", "pyarrow", "numpy"},
    "transforms.models.labels": {"torch", "apache_beam"},
    "transforms.models.ast.public": {"torch", "apache_beam"},
    "transforms.models.ast.bundled": {"torch", "apache_beam"},
    "transforms.models.ast.files": {"torch", "apache_beam"},
    "transforms.features.fbank_settings": {"torch", "apache_beam", "pyarrow", "numpy"},
    "transforms.decoding.decode_audio": {"torch"},
    "transforms.decoding.pool": {"torch", "apache_beam"},
    "transforms.decoding.decode": {"torch", "apache_beam"},
    "transforms.decoding.ffmpeg_reader": {"torch", "apache_beam", "av"},
}

MAX_LINES = 650
MAX_FILES = 14

FILES = sorted(path for name in ("pipeline", "transforms") for path in (ROOT / name).rglob("*.py"))
PRODUCT = [*FILES, *ROOT.glob("*.py")]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in [*FILES, ROOT / "earmark.py"]}


class Import(NamedTuple):
    """A module that a file imports, and whether importing the file imports it too."""

    module: str
    is_immediate: bool


@functools.cache
def imports_of(path: Path) -> frozenset[Import]:
    """Return what a file imports: at its top, inside functions and for the type checker."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    deferred: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            deferred.update(ast.walk(node))
    return frozenset(
        Import(module, node not in deferred)
        for node in ast.walk(tree)
        for module in modules_named(node, path)
    )


def modules_named(node: ast.AST, path: Path) -> Iterator[str]:
    """Yield the modules that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, f"{path}: a relative import, line {node.lineno}"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            yield submodule if submodule in MODULES else node.module


def folder_of(module: str) -> str:
    return MODULES[module].parent.relative_to(ROOT).as_posix()


def own_imports(module: str) -> set[str]:
    """Return the modules of this project that a module imports."""
    return {name for name, _ in imports_of(MODULES[module])} & MODULES.keys() - {module}


def may_import(importer: str, imported: str) -> bool:
    folder, other = folder_of(importer), folder_of(imported)
    package = folder.split("/")[0]
    if other == folder or imported in EVERY_STEP_IMPORTS:
        return True
    if package == "pipeline" and other.split("/")[0] == "transforms":
        return True
    return other in {(Path(package) / name).as_posix() for name in MAY_IMPORT[folder].split()}


def test_every_folder_with_modules_has_a_row_in_the_table() -> None:
    assert {folder_of(module_of(path)) for path in FILES if path.name != "__init__.py"} == set(
        MAY_IMPORT
    )


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_the_table_allows(folder: str) -> None:
    modules = [module for module in MODULES if folder_of(module) == folder]
    assert modules != []
    found = sorted((module, name) for module in modules for name in own_imports(module))
    assert [" → ".join(pair) for pair in found if not may_import(*pair)] == []


def test_errors_and_records_import_no_step() -> None:
    for module in EVERY_STEP_IMPORTS:
        assert own_imports(module) <= EVERY_STEP_IMPORTS


def test_imports_are_seen_in_functions_and_for_the_type_checker() -> None:
    assert "transforms.records" in own_imports("transforms.decoding.pool")
    assert "pipeline.cli.main" in own_imports("pipeline.__main__")  # inside a function
    assert "transforms.label_audio" in own_imports("earmark")  # under TYPE_CHECKING
    assert not may_import("transforms.decoding.pool", "transforms.inference.engine")
    assert not may_import("transforms.decoding.pool", "pipeline.graph")
    assert not may_import("pipeline.graph", "earmark")


def test_no_modules_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter({name: own_imports(name) for name in MODULES}).prepare()


@pytest.mark.parametrize(
    "package", [path for path in FILES if path.name == "__init__.py"], ids=module_of
)
def test_packages_import_none_of_their_modules(package: Path) -> None:
    assert own_imports(module_of(package)) == set()


def test_no_file_is_too_long() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in PRODUCT
    }
    assert max(lines.values()) > 200
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_no_folder_has_too_many_files() -> None:
    files = Counter(path.parent for path in PRODUCT if path.name != "__init__.py")
    assert max(files.values()) > 5
    assert {str(folder): count for folder, count in files.items() if count > MAX_FILES} == {}


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
    importers = [
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(module.split(".")[0] == library for module, _ in imports_of(path))
    ]
    door = DOORS[library]
    assert [path for path in importers if door is None or not path.startswith(door)] == []
    assert bool(importers) == bool(door)


def loaded_by(module: str) -> set[str]:
    """Return every module that importing a module imports, at first or second hand."""
    found: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        found.add(name)
        if name in MODULES:
            immediate = {one for one, is_immediate in imports_of(MODULES[name]) if is_immediate}
            waiting |= immediate - found
    return found


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    assert {name.split(".")[0] for name in loaded_by(module)} & LIGHT[module] == set()


def test_code_checks_without_assert() -> None:
    """``python -O`` removes asserts: the code raises errors with messages."""
    assert len(FILES) > 100
    assert [
        f"{path}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ] == []


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in told.stdout.splitlines()} == targets
