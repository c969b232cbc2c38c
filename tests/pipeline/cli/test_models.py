"""``earmark models``: every model, named whole."""

from __future__ import annotations

import json
import re

import pytest

from pipeline.cli import main as cli
from transforms.models.ast.public import PUBLIC_CHECKPOINTS


def test_models_lists_the_public_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    table = capsys.readouterr().out
    assert cli.main(["models", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    from_hub = [entry["hub_id"] for entry in entries if entry["source"] == "hub"]
    assert from_hub == [e.hub_id for e in PUBLIC_CHECKPOINTS]
    for entry in entries:
        assert {"window_s", "num_labels", "license", "published"} <= set(entry)
        line = next(line for line in table.splitlines() if f" {entry['name']} " in line)
        assert entry["license"] in line
        assert f"{entry['window_s']:.3f} s" in line


@pytest.mark.parametrize("width", [30, 80, 160])
def test_models_are_named_whole_on_a_terminal_of_any_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["models"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    words = text.split()
    for entry in PUBLIC_CHECKPOINTS:
        assert entry.hub_id in words
        assert f"{entry.published:.4f}" in words
    assert words.count("BSD-3-Clause") == len(PUBLIC_CHECKPOINTS)
    assert ("Public models" in text) == (width == 160)  # a table where there is room for one
    if width >= 80:
        assert all(len(line) <= width for line in text.splitlines())
