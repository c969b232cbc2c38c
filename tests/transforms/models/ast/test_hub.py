"""Models on the hub: pinned, downloaded once, and found again without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers

from tests.support.fake_hub import COMMIT, TOKEN, FakeHub, serve_hub, use_hub
from tests.transforms.models.ast.factory import (
    make_model,
    states_equal,
)
from transforms.errors import ModelError
from transforms.models.ast.checkpoints import (
    load_model,
    resolve_model,
)
from transforms.models.ast.config import ASTConfig
from transforms.models.ast.model import (
    ASTForAudioClassification,
)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    """A hub on this machine, and an empty cache."""
    with serve_hub(folder) as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        yield hub


def test_a_hub_model_is_pinned_and_loaded(hub: type[FakeHub], folder: Path) -> None:
    spec = resolve_model("org/tiny")
    assert (spec.source, spec.location, spec.revision) == ("hub", "org/tiny", COMMIT)
    assert (spec.name, spec.license) == ("org/tiny", "bsd-3-clause")
    assert spec.sha256 == resolve_model(str(folder)).sha256
    assert any(TOKEN in request for request in hub.requests)
    assert TOKEN not in repr(spec)
    asked = len(hub.requests)
    assert states_equal(load_model(spec), make_model())
    assert len(hub.requests) == asked  # from the cache, without asking again


def test_a_worker_fetches_the_pinned_revision(
    hub: type[FakeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = resolve_model("org/tiny@v1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    assert states_equal(load_model(spec), make_model())
    assert f"/org/tiny/resolve/{COMMIT}/model.safetensors" in hub.requests[-1]
    assert not any("config.json" in request for request in hub.requests[-2:])


def test_a_worker_fetches_every_part_of_a_hub_model(
    hub: type[FakeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = transformers.ASTForAudioClassification.from_pretrained(hub.root)
    (hub.root / "model.safetensors").unlink()
    theirs.save_pretrained(hub.root, max_shard_size="100KB")
    spec = resolve_model("org/tiny")
    assert len(spec.weight_files) > 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    assert states_equal(load_model(spec), make_model())


def test_a_revision_can_be_named_from_python(hub: type[FakeHub]) -> None:
    for name in ("org/tiny", "org/tiny@v9"):  # the argument wins
        model = ASTForAudioClassification.from_pretrained(name, revision="v1")
        assert states_equal(model, make_model())
    assert any("/revision/v1" in request for request in hub.requests)
    assert ASTConfig.from_pretrained("org/tiny") == model.config


def test_a_folder_has_no_revision(folder: Path) -> None:
    model = ASTForAudioClassification.from_pretrained(folder, revision="v9")
    assert states_equal(model, make_model())


def test_a_model_or_revision_missing_from_the_hub_is_named(hub: type[FakeHub]) -> None:
    with pytest.raises(ModelError, match="the hub has no revision 'v9' of org/tiny; give a branch"):
        resolve_model("org/tiny@v9")
    with pytest.raises(ModelError, match="the hub has no model org/other that you may see"):
        resolve_model("org/other")
    (hub.root / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="model org/tiny: has no weights"):
        resolve_model("org/tiny")


@pytest.mark.parametrize("refuses_connection", [False, True])
def test_an_unreachable_hub_is_named_without_the_token(
    hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, refuses_connection: bool
) -> None:
    hub.status = 500
    if refuses_connection:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError) as raised:
        resolve_model("org/tiny")
    text = str(raised.value)
    assert "cannot reach the hub for org/tiny: " in text
    assert "pass a local folder" in text
    assert TOKEN not in text
    assert raised.value.__cause__ is None


def test_a_download_that_fails_is_named(
    hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*arguments: Any, **options: Any) -> str:
        raise ConnectionResetError(f"reset while sending Bearer {TOKEN}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", break_off)
    with pytest.raises(ModelError, match=r"cannot download config\.json .*reset") as raised:
        resolve_model("org/tiny")
    assert TOKEN not in str(raised.value)


def test_a_downloaded_model_is_found_without_a_network(hub: type[FakeHub]) -> None:
    before = resolve_model("org/tiny")
    hub.status = 503
    for name in ("org/tiny", f"org/tiny@{COMMIT}"):
        after = resolve_model(name)
        assert (after.revision, after.sha256) == (before.revision, before.sha256)
        assert (
            after.notes[0]
            == f"the hub cannot be reached; using commit {COMMIT[:12]} from its local cache"
        )
        assert states_equal(load_model(after), make_model())
    with pytest.raises(ModelError, match="cannot reach the hub"):
        resolve_model("org/tiny@v1")  # which commit that branch was is not known
    with pytest.raises(ModelError, match="cannot reach the hub"):
        resolve_model("org/other")


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        ("model.safetensors", lambda body: body[:-100]),
        ("model.safetensors", lambda body: b"\0" * len(body)),
        ("config.json", lambda body: b"<html>please log in</html>".ljust(len(body))),
        ("config.json", lambda body: body[:-10]),
    ],
)
def test_a_hub_that_sends_other_content_is_refused(
    hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, name: str, lie: Callable[[bytes], bytes]
) -> None:
    def reply(self: Any, status: int, body: bytes, *arguments: Any) -> None:
        FakeHub.reply(self, status, lie(body) if self.path.endswith(name) else body, *arguments)

    monkeypatch.setattr(hub, "reply", reply)
    with pytest.raises(ModelError, match=rf"model org/tiny: .*{name}") as raised:
        resolve_model("org/tiny")
    assert TOKEN not in str(raised.value)
