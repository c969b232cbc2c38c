"""Fixtures of the command line's tests."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.support.fake_commands import Calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stands in for the work of every command."""
    calls = Calls()
    for module, name in (
        ("pipeline.labelling.run", "run_label"),
        ("pipeline.labelling.estimate", "run_plan"),
        ("pipeline.result.verify", "run_verify"),
        ("pipeline.result.export", "run_export"),
        ("pipeline.evaluation.evaluate", "run_evaluate"),
        ("pipeline.training.run", "run_train"),
    ):
        fake = ModuleType(module)
        setattr(fake, name, calls.take)
        monkeypatch.setitem(sys.modules, module, fake)
    return calls


@pytest.fixture(autouse=True)
def _restore_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("EARMARK_DEBUG", raising=False)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level
    for package in ("pipeline", "transforms"):
        logging.getLogger(package).setLevel(logging.NOTSET)
