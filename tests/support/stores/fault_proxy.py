"""A local HTTP/1.1 proxy that injects faults into some of the requests to a store.

    with FaultProxy("127.0.0.1", 5000) as proxy:
        proxy.faults = Faults(rate=0.3, seed=7)
        ...  # requests to proxy.url
        assert proxy.counts.total() > 0

The seed and a request's number decide whether it is harmed, and how.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

# The faults:
STATUSES = ("429", "500", "503")  # the request is refused (429 with Retry-After)
RESETS = (
    "reset_before",  # the connection breaks before the store sees the request
    "reset_after",  # the connection breaks after the request is done, before the answer
    "cut_upload",  # the connection breaks in the body; a store drops such a request
)
CUTS = (
    "cut",  # the answer ends early, as its Content-Length shows
    "cut_chunked",  # the answer ends early: its last chunk is missing
    "cut_unframed",  # the answer ends early, and nothing shows it
)
KINDS = (*STATUSES, *RESETS, *CUTS, "slow")

_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "trailer",
    "expect",
    "upgrade",
}
_PIECES = 4


@dataclass(frozen=True)
class Faults:
    """The requests to harm.

    Attributes:
        rate: The share of requests harmed, 0 to 1.
        kinds: Their faults, equally likely; any HTTP status is one, too.
        seed: Another seed harms other requests.
        target: Returns whether a request may be harmed, given its method and path.
        down_after: The store is down after this many requests: all others are reset.
        slow_s: Duration of a slow answer.
        retry_after_s: The Retry-After header of a 429.
    """

    rate: float = 0.0
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    target: Callable[[str, str], bool] = lambda method, path: True
    down_after: int | None = None
    slow_s: float = 0.2
    retry_after_s: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer of the server.

    Attributes:
        method: The request's method.
        path: The request's path, with its query.
        start: The first byte of the range requested; None for the whole object.
        num_bytes: Length of the answer's body.
    """

    method: str
    path: str
    start: int | None
    num_bytes: int


class FaultProxy:
    """A proxy of a local server that harms some requests.

    Attributes:
        faults: Replace it at any time; that resets the counts.
        counts: Injected faults by kind (``down`` for a store that is down).
        num_requests: Requests so far.
        answers: Answers of the server, in order.
    """

    def __init__(self, host: str, port: int) -> None:
        self.upstream = (host, port)
        self.faults = Faults()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._faults = faults
        self.counts: Counter[str] = Counter()
        self.num_requests = 0
        self.answers: list[Answer] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def draw(self, method: str, path: str, has_body: bool) -> tuple[str | None, random.Random]:
        """Return the fault of the next request, and a random generator for it."""
        with self._lock:
            faults = self._faults
            chance = random.Random(f"{faults.seed}/{self.num_requests}")
            self.num_requests += 1
            kind = None
            if faults.down_after is not None and self.num_requests > faults.down_after:
                kind = "down"
            elif chance.random() < faults.rate and faults.target(method, path):
                kind = chance.choice(faults.kinds)
                if kind == "cut_upload" and not has_body:
                    kind = "reset_before"
                if kind in CUTS and method in ("HEAD", "DELETE"):  # no body to cut
                    kind = "reset_after"
            if kind is not None:
                self.counts[kind] += 1
            return kind, chance


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultProxy

    def shutdown_request(self, request: Any) -> None:
        # No socket.shutdown: its FIN would precede the reset.
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing; requests are counted."""

    def _serve(self) -> None:
        proxy = self.server.proxy
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        length = int(self.headers.get("Content-Length", 0))
        kind, chance = proxy.draw(self.command, self.path, chunked or length > 0)
        if kind == "cut_upload":
            self.rfile.read(chance.randrange(max(length, 1)))
        if kind in ("down", "reset_before", "cut_upload"):
            self._reset()
            return
        body = self._read_chunks() if chunked else self.rfile.read(length)
        if kind is not None and kind.isdecimal():
            self._refuse(int(kind))
            return
        status, headers, answer = self._pass_on(body)
        wanted = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        start = int(wanted) if wanted else None
        proxy.answers.append(Answer(self.command, self.path, start, len(answer)))
        if kind == "reset_after":
            self._reset()
        elif kind in CUTS and answer:
            length = chance.choice((0, chance.randrange(len(answer)), len(answer) - 1))
            self._cut(kind, status, headers, answer[:length], len(answer))
        else:
            self._answer(status, headers, answer, proxy.faults.slow_s if kind == "slow" else 0.0)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _serve  # noqa: N815

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _pass_on(self, body: bytes) -> tuple[int, HTTPMessage, bytes]:
        host, port = self.server.proxy.upstream
        connection = HTTPConnection(host, port, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                    connection.putheader(name, value)
            if body or self.command in ("PUT", "POST", "PATCH"):
                connection.putheader("Content-Length", str(len(body)))
            connection.putheader("Connection", "close")
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def _send_head(self, status: int, headers: HTTPMessage, framing: dict[str, str]) -> None:
        host, port = self.server.proxy.upstream
        own, others = self.server.proxy.url, (f"http://{host}:{port}", f"http://localhost:{port}")
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                for other in others:
                    value = value.replace(other, own)
                self.send_header(name, value)
        for name, value in framing.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, headers: HTTPMessage, body: bytes, slow_s: float) -> None:
        length = headers["Content-Length"] if self.command == "HEAD" else str(len(body))
        time.sleep(slow_s / 2)
        self._send_head(status, headers, {"Content-Length": length or "0"})
        size = -(-len(body) // _PIECES) or 1 if slow_s else len(body) or 1
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            time.sleep(slow_s / 2 / _PIECES)

    def _cut(
        self, kind: str, status: int, headers: HTTPMessage, start: bytes, whole_bytes: int
    ) -> None:
        framing = {
            "cut": {"Content-Length": str(whole_bytes)},
            "cut_chunked": {"Transfer-Encoding": "chunked"},
            "cut_unframed": {"Connection": "close"},
        }[kind]
        self._send_head(status, headers, framing)
        if kind == "cut_chunked" and start:
            start = b"%x\r\n%s\r\n" % (len(start), start)
        self.wfile.write(start)
        self.close_connection = True

    def _refuse(self, status: int) -> None:
        body = b"try later"
        self.send_response_only(status)
        if status == 429:
            self.send_header("Retry-After", str(self.server.proxy.faults.retry_after_s))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
