"""Web servers on this machine: of a folder, and of whatever a handler answers."""

from __future__ import annotations

import functools
import http.server
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """A handler that prints nothing, with the answers that most servers give."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Answer GET or HEAD."""
        raise NotImplementedError

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] = {}) -> None:
        """Answer with a body, or to HEAD with its length."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_content(self, content: bytes, headers: Mapping[str, str] = {}) -> None:
        """Answer with a file, or with the range of it that is asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.reply(200, content, {"Accept-Ranges": "bytes", **headers})
            return
        start, size = int(asked[1]), len(content)
        if start >= size:
            self.reply(416, b"", {"Content-Range": f"bytes */{size}"})
            return
        part = content[start : int(asked[2]) + 1 if asked[2] else None]
        span = f"bytes {start}-{start + len(part) - 1}/{size}"
        self.reply(206, part, {"Content-Range": span, **headers})


class _FolderHandler(http.server.SimpleHTTPRequestHandler):
    """A folder with its index pages, in ranges if ``server`` has them."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, web: WebServer, **options: Any) -> None:
        self._web = web
        super().__init__(*args, directory=str(web.folder), **options)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def parse_request(self) -> bool:
        is_request = super().parse_request()
        if is_request:
            self._web.requests.append(f"{self.command} {self.path}")
        return is_request

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not self._web.has_ranges or not path.is_file():
            super().do_GET()
            return
        size = path.stat().st_size
        start, end = int(wanted[1]), min(int(wanted[2]) + 1, size)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            while start < end and (data := file.read(min(64 << 10, end - start))):
                self.wfile.write(data)
                start += len(data)


@dataclass
class WebServer:
    """A folder behind a web server.

    Attributes:
        requests: Method and path of every request so far.
    """

    folder: Path
    has_ranges: bool = True
    port: int = 0
    requests: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """URL of the folder."""
        return f"http://127.0.0.1:{self.port}"


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have closed the connection."""


@contextmanager
def serve(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    """Start a server, and give its port."""
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serve_folder(folder: Path, *, has_ranges: bool = True) -> Iterator[WebServer]:
    """Serve a folder."""
    web = WebServer(folder, has_ranges)
    with serve(functools.partial(_FolderHandler, web=web)) as web.port:
        yield web
