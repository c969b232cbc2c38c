"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import SHARED_DATA
from tests.support.stores import object_store

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Return what ``-n auto`` means: the usable cores. By default psutil counts the machine's."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else CORES


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores between parallel test processes, before torch is imported.

    With a thread for each core in each process, torch spends half of its time on waiting.
    """
    if hasattr(config, "workerinput"):
        num_threads = max(1, CORES // config.workerinput["workercount"])
        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))


def pytest_report_header() -> str:
    """Name the emulators of object stores in use. Tests of the others are skipped."""
    return f"stores: {', '.join(object_store.describe(name) for name in ('s3', 'gs'))}"


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on stores after three tries in a row instead of two minutes."""
    from transforms.storage import retries

    monkeypatch.setattr(retries, "RETRY_S", 0.0)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "_gave_up_at", {})
    monkeypatch.setattr(retries, "_have_answered", set())
    monkeypatch.setattr(retries, "_answered_at", {})
    monkeypatch.setattr(retries, "_said_at", {})


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what outlives a run in a folder of this session, for child processes too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EARMARK_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def without_openvino() -> Iterator[None]:
    """Hide OpenVINO by default, so that the engine ``auto`` is torch.

    ``openvino_as_installed`` restores it. Child processes see what is installed.
    """
    from transforms.inference import openvino

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(openvino, "is_installed", lambda name: False)
        yield


@pytest.fixture(scope="module")
def openvino_as_installed(without_openvino: None) -> Iterator[None]:
    """Let tests see whether OpenVINO is installed."""
    from importlib.util import find_spec

    from transforms.inference import openvino

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(openvino, "is_installed", lambda name: find_spec(name) is not None)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real recordings beside the checkout; skip without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"there are no recordings beside the checkout: {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def esc10(shared_data: Path) -> list[Path]:
    """Return the 320 ESC-10 clips of folds 1 to 4, sorted by name."""
    return sorted((shared_data / "esc10" / "audio").glob("*.ogg"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small AST with random weights and five labels (sigmoid)."""
    from tests.support.model_factory import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def needs_gpu() -> None:
    """Skip without a CUDA device, or fail if ``REQUIRE_GPU=1``."""
    import torch

    if not torch.cuda.is_available():
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail("REQUIRE_GPU=1, and there is no CUDA device")
        pytest.skip("there is no CUDA device")
