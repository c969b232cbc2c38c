"""``docs/guarantees.md``: every promise names an existing test or benchmark; so do other pages."""

from __future__ import annotations

import ast
import re

import pytest

from pipeline.config.label import RunConfig
from tests.support.paths import ROOT

GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
TESTS = [
    pair
    for page in (ROOT / "docs").rglob("*.md")
    for pair in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page.read_text(encoding="utf-8"))
]
SCRIPTS = re.findall(r"`(benchmarks/[\w/]+\.py)`", GUARANTEES)
ROWS = [line for line in GUARANTEES.splitlines() if line.startswith("|") and "---" not in line]


def functions_of(name: str) -> set[str]:
    (path,) = (ROOT / "tests").rglob(name)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "name"), sorted(set(TESTS)))
def test_tests_that_a_page_names_exist(file: str, name: str) -> None:
    assert name in functions_of(file)


@pytest.mark.parametrize("script", sorted(set(SCRIPTS)))
def test_benchmarks_that_hold_a_promise_exist_with_their_figures(script: str) -> None:
    assert (ROOT / script).is_file()
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert f"## {script.removeprefix('benchmarks/')}" in text


def test_every_promise_names_what_holds_it() -> None:
    promises = [row for row in ROWS if "held by" not in row]
    assert len(promises) > 30
    assert [row for row in promises if "test_" not in row and "benchmarks/" not in row] == []


def test_bounds_are_keys_with_the_defaults_of_the_config() -> None:
    bounds = re.findall(r"^\| [^|]+ \| `([a-z_.]+)` \| ([^|]+) \|", GUARANTEES, re.MULTILINE)
    defaults = RunConfig.defaults()
    told = {
        "64 GiB": 64 << 30,
        "7 days": 7 * 86_400,
        "10 s": 10,
        "60 s": 60,
        "2 GiB": 2 << 30,
        "1 GiB": 1 << 30,
        "200 times, beyond 1 GiB": 200,
    }
    assert len(bounds) == 7
    assert {key for key, _ in bounds} <= defaults.keys()
    assert {key: told[text.strip()] for key, text in bounds} == {
        key: defaults[key] for key, _ in bounds
    }
