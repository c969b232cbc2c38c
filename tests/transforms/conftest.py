"""Fixtures of the tests of storage and sources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem


@pytest.fixture
def empty_memory() -> Iterator[None]:
    """Empty fsspec's ``memory://`` at the end."""
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, empty_memory: None) -> str:
    """The URL of an empty folder, on the disk and in a store."""
    is_local = request.param == "local"
    return f"{tmp_path}/in" if is_local else f"memory://{tmp_path.name}/in"
