"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import object_store
from tests.support.paths import SHARED_DATA


def pytest_report_header() -> str:
    """Which emulators of object stores there are: tests of the others are skipped."""
    return f"stores: {', '.join(object_store.describe(name) for name in ('s3', 'gs'))}"


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores are given up on after three tries in a row, rather than after two minutes."""
    from transforms.storage import retries

    monkeypatch.setattr(retries, "RETRY_S", 0.0)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "_gave_up_at", {})
    monkeypatch.setattr(retries, "_have_answered", set())
    monkeypatch.setattr(retries, "_answered_at", {})
    monkeypatch.setattr(retries, "_said_at", {})


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is kept from run to run lies in a folder of these tests', for child processes too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EARMARK_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def without_openvino() -> Iterator[None]:
    """Where a test says nothing else, OpenVINO is not installed: ``auto`` is torch.

    ``openvino_as_installed`` gives it back. Child processes see what is installed.
    """
    from transforms.inference import openvino

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(openvino, "is_installed", lambda name: False)
        yield


@pytest.fixture(scope="module")
def openvino_as_installed(without_openvino: None) -> Iterator[None]:
    """OpenVINO is what it is on this machine."""
    from importlib.util import find_spec

    from transforms.inference import openvino

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(openvino, "is_installed", lambda name: find_spec(name) is not None)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real recordings beside the checkout; skips where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the recordings kept beside the checkout are not there: {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def esc10(shared_data: Path) -> list[Path]:
    """The 320 ESC-10 clips of folds 1 to 4, sorted by name."""
    return sorted((shared_data / "esc10" / "audio").glob("*.ogg"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small AST with random weights and five labels (sigmoid)."""
    from tests.support.model_factory import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def needs_gpu() -> None:
    """Skips without a CUDA device; with REQUIRE_GPU=1 that is a failure."""
    import torch

    if not torch.cuda.is_available():
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail("REQUIRE_GPU=1, and there is no CUDA device")
        pytest.skip("there is no CUDA device")
