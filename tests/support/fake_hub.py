"""A local model hub with just enough of the API for a download."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_averysecrettokenofthetests"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """A handler that answers like the hub. ``serve_hub`` makes a subclass that holds its state.

    Attributes:
        endpoint: The hub's address.
        repo_id: The only model, with the branches main and v1.
        root: The folder with that model's files.
        requests: Method, path and authorization header of every request so far.
        status: The status of every answer; 200 for the normal ones.
    """

    endpoint: str
    repo_id: str
    root: Path
    requests: list[str]
    status: int

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        type(self).requests.append(f"{self.command} {self.path} {self.headers['authorization']}")
        path, body, error = self.path.split("?")[0], b"", ""
        model = f"/api/models/{self.repo_id}"
        if self.status != 200:
            self.reply(self.status, b"", {"X-Error-Message": f"broken for {TOKEN}"})
            return
        revisions = (f"{model}/revision/{name}" for name in (COMMIT, "main", "v1"))
        if path in (model, *revisions):
            siblings = [{"rfilename": file.name} for file in sorted(self.root.iterdir())]
            info = {"id": self.repo_id, "sha": COMMIT, "siblings": siblings,
                    "cardData": {"license": "bsd-3-clause"}}  # fmt: skip
            body = json.dumps(info).encode()
        elif path.startswith(f"{model}/revision/"):
            error = "RevisionNotFound"
        elif path.startswith(
            tuple(f"/{self.repo_id}/resolve/{name}/" for name in (COMMIT, "main", "v1"))
        ):
            body = (self.root / path.rpartition("/")[2]).read_bytes()
        else:
            error = "RepoNotFound"
        etag = hashlib.sha256(body).hexdigest()
        headers = {"X-Error-Code": error} if error else {"X-Repo-Commit": COMMIT, "ETag": etag}
        self.reply(404 if error else 200, body if with_body else b"", headers, len(body))

    def reply(
        self, status: int, body: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def serve_hub(root: Path, repo_id: str = "org/tiny") -> Iterator[type[FakeHub]]:
    """Serve a hub with one model, whose files are in ``root``."""
    state = {"root": root, "repo_id": repo_id, "requests": [], "status": 200}
    handler = type("Handler", (FakeHub,), state)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(hub: type[FakeHub], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub at this hub, with the tests' token and this cache."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
