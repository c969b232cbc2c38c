"""Local object stores: an emulator of S3 or of Google Cloud Storage behind a proxy.

    with open_store("s3") as store:  # s3:// leads to the emulator, through store.proxy
        store.proxy.faults = Faults(rate=0.05)
        storage.write_bytes(f"{store.url}/a", b"...")
        assert store.objects() == {"a": b"..."}  # past the proxy

S3 is moto's server. Google's is fake-gcs-server, which supports preconditions, if it is installed
(``tests/support/stores/provision_stores.sh``), and gcp-storage-emulator otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import fsspec

from tests.support.stores.fault_proxy import FaultProxy
from transforms.errors import EarmarkError
from transforms.results.commits import Commit

BUCKET = "earmark-test"
START_S = 30.0
_XML = "{http://s3.amazonaws.com/doc/2006-03-01/}"


@dataclass(frozen=True)
class ObjectStore:
    """A bucket of an emulator.

    Attributes:
        protocol: ``s3`` or ``gs``.
        port: The emulator's port.
        proxy: The proxy to which the protocol leads.
        is_exclusive: Whether it can refuse to replace an object.
    """

    protocol: str
    port: int
    proxy: FaultProxy
    is_exclusive: bool

    @property
    def url(self) -> str:
        """URL of the bucket for Earmark."""
        return f"{self.protocol}://{BUCKET}"

    @property
    def http_url(self) -> str:
        """Plain HTTP URL of the bucket, through the proxy; append an object's name."""
        folder = BUCKET if self.protocol == "s3" else f"download/storage/v1/b/{BUCKET}/o"
        return f"{self.proxy.url}/{folder}"

    def objects(self) -> dict[str, bytes]:
        """Return all objects, past the proxy."""
        return {name: self.get(name) for name in self.names()}

    def names(self) -> list[str]:
        """Return the names of all objects, past the proxy."""
        if self.protocol == "s3":
            root = ET.fromstring(self._request("GET", f"/{BUCKET}?list-type=2&max-keys=10000"))
            return [str(key.text) for key in root.iter(f"{_XML}Key")]
        listing = json.loads(self._request("GET", f"/storage/v1/b/{BUCKET}/o?maxResults=10000"))
        return [entry["name"] for entry in listing.get("items", [])]

    def clear(self) -> None:
        """Remove all objects."""
        for name in self.names():
            self.remove(name)

    def remove(self, name: str) -> None:
        """Remove an object past the proxy."""
        self._request("DELETE", self._path(name))

    def put(self, name: str, data: bytes, content_encoding: str = "") -> None:
        """Store an object past the proxy; ``gs://`` unpacks a content encoding on the way."""
        if self.protocol == "s3":
            self._request("PUT", self._path(name), data)
            return
        quoted = urllib.parse.quote(name, safe="")
        path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quoted}"
        encoding = f"&contentEncoding={content_encoding}" if content_encoding else ""
        self._request("POST", path + encoding, data)

    def get(self, name: str) -> bytes:
        """Return an object's content, past the proxy."""
        path = self._path(name)
        return self._request("GET", path if self.protocol == "s3" else f"/download{path}?alt=media")

    def _path(self, name: str) -> str:
        if self.protocol == "s3":
            return f"/{BUCKET}/{urllib.parse.quote(name)}"
        return f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}"

    def _request(self, method: str, path: str, data: bytes | None = None, acl: str = "") -> bytes:
        url = f"http://127.0.0.1:{self.port}{path}"
        headers = {"Content-Type": "application/octet-stream"} | ({"x-amz-acl": acl} if acl else {})
        request = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())


def damaged_commits(store: ObjectStore, output: str) -> list[str]:
    """Return what is wrong with the committed parts of a result, read past the proxy."""
    objects, found = store.objects(), []
    for name, data in objects.items():
        if not name.startswith(f"{output}/_commits/"):
            continue
        try:
            commit = Commit.from_json(data)
        except (ValueError, TypeError, KeyError, EarmarkError) as error:
            found.append(f"{name}: {error}")
            continue
        for part, info in commit.parts.items():
            content = objects.get(f"{output}/{part}/{commit.unit_id}.parquet")
            if content is None or len(content) != info.num_bytes:
                found.append(f"{commit.unit_id}.{part}: {content and len(content)} bytes")
            elif hashlib.sha256(content).hexdigest() != info.sha256:
                found.append(f"{commit.unit_id}.{part}: another content")
    return found


def missing(protocol: str) -> str | None:
    """Return why such a store cannot be opened here; None if it can."""
    needed = ("moto", "flask", "flask_cors", "s3fs") if protocol == "s3" else ()
    if protocol == "gs" and _fake_gcs_server() is None:
        needed = ("gcp_storage_emulator",)
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{protocol}:// needs {', '.join(absent)}: pip install -e '.[dev]'" if absent else None


def describe(protocol: str) -> str:
    """Name the emulator of a store, for people."""
    if missing(protocol):
        return f"none of {protocol}://"
    if protocol == "s3":
        return "moto"
    return "fake-gcs-server" if _fake_gcs_server() else "gcp-storage-emulator"


@contextlib.contextmanager
def open_store(protocol: str) -> Iterator[ObjectStore]:
    """Open an empty bucket, and let the protocol lead to it meanwhile.

    Raises:
        RuntimeError: The emulator is not installed (check with ``missing``) or does not start.
    """
    if absent := missing(protocol):
        raise RuntimeError(absent)
    port = _free_port()
    server = subprocess.Popen(
        _command(protocol, port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with FaultProxy("127.0.0.1", port) as proxy:
            is_exclusive = protocol == "s3" or _fake_gcs_server() is not None
            store = ObjectStore(protocol, port, proxy, is_exclusive)
            _make_bucket(store, server)
            with _environment(protocol, proxy.url):
                yield store
    finally:
        server.terminate()
        server.wait(START_S)


def _command(protocol: str, port: int) -> list[str]:
    if protocol == "s3":
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    if fake := _fake_gcs_server():
        address = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        return [fake, "-backend", "memory", *address]
    options = ["--host=127.0.0.1", f"--port={port}", "--in-memory"]
    return [sys.executable, "-m", "gcp_storage_emulator", "start", *options]


def _fake_gcs_server() -> str | None:
    found = shutil.which("fake-gcs-server")
    home = Path(os.environ.get("GOPATH", Path.home() / "go")) / "bin" / "fake-gcs-server"
    return found or (str(home) if home.exists() else None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _make_bucket(store: ObjectStore, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if store.protocol == "s3":
                # Objects inherit the permission: tests read them without signing.
                store._request("PUT", f"/{BUCKET}", acl="public-read")
            else:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{store.port}/storage/v1/b?project=test",
                    json.dumps({"name": BUCKET}).encode(),
                    {"Content-Type": "application/json"},
                    method="POST",
                )
                urllib.request.urlopen(request, timeout=30).close()
            return
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"the emulator cannot make a bucket: {error}") from error
        except OSError as error:
            if time.monotonic() > deadline or server.poll() is not None:
                raise RuntimeError(f"the emulator of {store.protocol} does not start") from error
            time.sleep(0.1)


def environment(protocol: str, endpoint: str) -> dict[str, str]:
    """Return the environment in which the protocol leads to ``endpoint``."""
    if protocol == "s3":
        return {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    return {"STORAGE_EMULATOR_HOST": endpoint, "FSSPEC_GS_TOKEN": "anon"}


@contextlib.contextmanager
def _environment(protocol: str, endpoint: str) -> Iterator[None]:
    with (
        patch.dict(os.environ, environment(protocol, endpoint)),
        patch.dict(fsspec.config.conf, {"gs": {"token": "anon"}}),
    ):
        _forget(protocol)
        yield
    _forget(protocol)


def _forget(protocol: str) -> None:
    """Forget cached file systems, which keep the endpoint they were made with."""
    fsspec.get_filesystem_class(protocol).clear_instance_cache()
