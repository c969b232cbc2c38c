"""Fakes of remote file systems, and of the errors that they raise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class DiskFileSystem(LocalFileSystem):
    """A remote file system that shows files while they grow, as sftp does."""

    protocol = "disk"
    fails = False

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:  # type: ignore[override]
        if self.fails:
            Path(self._strip_protocol(rpath)).write_bytes(b"trunca")
            raise RuntimeError("connection lost")
        super().put_file(lpath, rpath, **kwargs)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:  # type: ignore[override]
        return "/" + str(path).removeprefix("disk://").strip("/")


fsspec.register_implementation("disk", DiskFileSystem, clobber=True)


class HttpError(Exception):
    """An error that carries a status, as those of web libraries do."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
