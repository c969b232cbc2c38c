"""Hostile hubs: wrong content, missing files and dangerous names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main as cli
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


def test_a_hub_that_lists_a_file_it_does_not_have_is_refused(
    model: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FakeHub.answer

    def answer(self: Any, with_body: bool) -> None:
        if self.path.endswith(WEIGHTS):
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            original(self, with_body)

    with serve_hub(model) as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr(hub, "answer", answer)
        words = refused("org/tiny")
    assert f"model org/tiny: cannot download {WEIGHTS} from the hub" in words
    assert "pass a local folder, or try again" in words


def test_names_in_a_listing_of_the_hub_are_never_paths_to_write_to(
    model: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a repository lists is never a path to write to: only known names are asked for.
    original = FakeHub.reply

    def reply(
        self: Any, status: int, body: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        if self.path.startswith("/api/"):
            info = json.loads(body)
            info["siblings"] += [{"rfilename": "../../../escaped"}, {"rfilename": "/etc/passwd"}]
            body = json.dumps(info).encode()
            length = len(body)
        original(self, status, body, headers, length)

    with serve_hub(model) as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr(hub, "reply", reply)
        out = str(tmp_path / "out")
        assert cli.main(["label", str(clip), "-o", out, "-m", "org/tiny", "-q"]) == 0
        assert not [request for request in hub.requests if "escaped" in request]
    assert not list(tmp_path.rglob("escaped"))
