"""Hostile hubs: wrong content, missing files and dangerous names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_hub import TOKEN, FakeHub, serve_hub, use_hub
from tests.transforms.models.ast.conftest import Refused

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        (WEIGHTS, lambda body: body[:-100]),
        (WEIGHTS, lambda body: b"\0" * len(body)),
        (CONFIG, lambda body: b"<html>please log in</html>".ljust(len(body))),
        (CONFIG, lambda body: body[:-10]),
    ],
)
def test_a_hub_that_sends_other_content_is_refused(
    model: Path,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    lie: Callable[[bytes], bytes],
) -> None:
    def reply(
        self: Any, status: int, body: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        if self.path.endswith(name):
            body = lie(body)
        FakeHub.reply(self, status, body, headers, length)

    with serve_hub(model) as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr(hub, "reply", reply)
        words = refused("org/tiny")
    assert "model org/tiny: " in words
    assert name in words
    assert TOKEN not in words
