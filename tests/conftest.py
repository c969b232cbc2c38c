"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


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
