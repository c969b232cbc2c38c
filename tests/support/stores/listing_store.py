"""A store that lists any number of objects, but holds no content except sparse archives.

``listing://NUMBER-of-BYTES-ENDING`` is a bucket of that many files of that many bytes, generated
while it is listed: ``listing://1000000-of-160044-wav`` has a million WAV files. Reading one raises
an error, so code that works on such a store reads the listing alone. ``add_tar`` puts archives of
any size, whose members are zeros, into the bucket ``tars``.

For tests, and for ``benchmarks/plan.py``.
"""

from __future__ import annotations

import bisect
import tarfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

PROTOCOL = "listing"
FILES_PER_FOLDER = 1000


def bucket_url(num_files: int, num_bytes: int, suffix: str = ".wav") -> str:
    """Return the URL of a bucket of this many files of this many bytes."""
    return f"{PROTOCOL}://{num_files}-of-{num_bytes}-{suffix.removeprefix('.')}"


@dataclass
class SparseTar:
    """An archive that holds only headers in memory: members of zeros, then zero blocks.

    Attributes:
        sizes: Size of each member in bytes.
        latency_s: Duration of each request.
        requests: Requests so far.
        most_at_once: Most requests at the same time.
    """

    sizes: Sequence[int]
    latency_s: float = 0.0
    requests: int = 0
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._now = 0
        self.starts = [0]
        for size in self.sizes:
            blocks = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            self.starts.append(self.starts[-1] + tarfile.BLOCKSIZE + blocks)
        self.size = self.starts[-1] + 2 * tarfile.BLOCKSIZE

    def header(self, number: int) -> bytes:
        """Return the header of a member."""
        info = tarfile.TarInfo(self.name(number))
        info.size = self.sizes[number]
        return info.tobuf(tarfile.GNU_FORMAT)

    def name(self, number: int) -> str:
        """Return the name of a member."""
        return f"{number // FILES_PER_FOLDER:06}/{number:09}.wav"

    def fetch(self, start: int, stop: int) -> bytes:
        """Return the bytes of a range."""
        with self._lock:
            self.requests += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(self.latency_s)
        with self._lock:
            self._now -= 1
        stop = min(stop, self.size)
        data = bytearray(max(0, stop - start))
        number = max(0, bisect.bisect_right(self.starts, start) - 1)
        while number < len(self.sizes) and self.starts[number] < stop:
            own = self.header(number)
            at = self.starts[number] - start
            piece = own[max(0, -at) : max(0, stop - start - at)]
            data[max(0, at) : max(0, at) + len(piece)] = piece
            number += 1
        return bytes(data)


class ListingFileSystem(AbstractFileSystem):
    """The store that the module describes."""

    protocol = PROTOCOL
    cachable = False
    tars: ClassVar[dict[str, SparseTar]] = {}

    @classmethod
    def add_tar(cls, name: str, tar: SparseTar) -> str:
        """Put an object into the bucket ``tars`` and return its URL."""
        cls.tars[f"tars/{name}"] = tar
        return f"{PROTOCOL}://tars/{name}"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix(f"{PROTOCOL}://").strip("/")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.tars:
            return {"name": path, "size": self.tars[path].size, "type": "file", "etag": "v1"}
        if "/" not in path and "-of-" in path:
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        bucket, _, folder = path.partition("/")
        number, _, rest = bucket.partition("-of-")
        num_bytes, _, ending = rest.partition("-")
        files = range(int(number))
        if not folder:
            folders = range(-(-len(files) // FILES_PER_FOLDER))
            return [
                {"name": f"{bucket}/{number:06}", "size": 0, "type": "directory"}
                for number in folders
            ]
        first = int(folder) * FILES_PER_FOLDER
        return [
            {
                "name": f"{bucket}/{folder}/{number:09}.{ending}",
                "size": int(num_bytes),
                "type": "file",
                "etag": f"{number:032x}",
            }
            for number in files[first : first + FILES_PER_FOLDER]
        ]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        path = self._strip_protocol(path)
        if path not in self.tars:
            raise AssertionError(f"{path} is read, and may only be listed")
        return _SparseFile(self, path, mode, **options)


class _SparseFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return ListingFileSystem.tars[self.path].fetch(start, end)


fsspec.register_implementation(PROTOCOL, ListingFileSystem, clobber=True)
