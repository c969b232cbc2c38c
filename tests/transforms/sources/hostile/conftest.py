"""Fixtures for the tests of hostile inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.watched_label import SECRET, Label
from transforms.process import temp_folders


@pytest.fixture
def label(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Label:
    """A watched command ``label``, with a file outside the input that hostile names lead to."""
    for name in ("inside", "outside", "cwd", "scratch"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "secret.wav").write_bytes(SECRET)
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(temp_folders, "_scratch", temp_folders._Scratch())
    return Label(tmp_path, tmp_path / "inside", tmp_path / "outside", tmp_path / "out", tiny_model)
