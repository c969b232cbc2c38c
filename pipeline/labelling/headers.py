"""Lengths of recordings from their headers, without decoding them.

A decoder process reads the headers. Of a remote file, only the beginning and the end are fetched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Self

from transforms.decoding.process import (
    WORKER_COMMAND,
    DecoderLostError,
    DecoderProcess,
    start_decoder,
)
from transforms.decoding.settings import DecodeSettings
from transforms.errors import DecodeError
from transforms.records import EncodedClip, Failure, Item
from transforms.sources.fetching import spool
from transforms.storage import reading, urls

# Only digital silence takes fewer bytes (Opus 750, AMR 600). Smaller files are not opened, and a
# header that promises more audio is not believed.
MIN_BYTES_PER_S = 500
# What is fetched of a remote file, at its start and at its end: where headers and indexes lie.
EDGE_BYTES = 4 << 20
HEADERS_AHEAD = 16

# Without a length in its header, a file of this size is decoded to measure it.
MAX_DECODED_BYTES = 4 << 20


def fetch_headers(items: Sequence[Item]) -> Iterator[EncodedClip | Failure]:
    """Yield each item's file as far as its header needs; remote ones are fetched in parallel."""
    if all(urls.is_local(item.url or item.uri) for item in items):
        yield from map(_fetch_header, items)
        return
    with ThreadPoolExecutor(HEADERS_AHEAD, "earmark-headers") as threads:
        for start in range(0, len(items), HEADERS_AHEAD):
            yield from threads.map(_fetch_header, items[start : start + HEADERS_AHEAD])


def _fetch_header(item: Item) -> EncodedClip | Failure:
    """Return a local file as it is; of a remote one, a file of its size that holds its edges."""
    url = item.url or item.uri
    if urls.is_local(url):
        return EncodedClip(item, path=urls.local_path(url))
    try:
        with reading.open_read(url, EDGE_BYTES, only_ranges=True) as file:
            path = spool(url, lambda target: _copy_edges(file, target))
    except OSError as error:
        return Failure(item, "read", type(error).__name__, str(error))
    return EncodedClip(item, path=path, delete_path=True)


def _copy_edges(source: BinaryIO, target: BinaryIO) -> None:
    size = source.seek(0, os.SEEK_END)
    target.truncate(size)  # a hole, which takes no room
    for start in sorted({0, max(0, size - EDGE_BYTES)}):
        source.seek(start)
        target.seek(start)
        target.write(source.read(EDGE_BYTES))


class HeaderReader:
    """Reads lengths from headers, in a decoder process that starts with the first.

    A header that crashes the process, hangs it or needs too much memory costs that process; the
    length is then not known. Tests pass a ``worker_command`` that crashes.
    """

    def __init__(
        self, settings: DecodeSettings, *, worker_command: Sequence[str] = WORKER_COMMAND
    ) -> None:
        self._settings = settings
        self._worker_command = worker_command
        self._process: DecoderProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def read_length_s(self, clip: EncodedClip | Failure) -> float | None:
        """Return the seconds from the item's start to the end of its file; None if not known.

        Removes the clip's temporary file.
        """
        if isinstance(clip, Failure):
            return None
        try:
            return self._promised_s(clip, num_encoded_bytes(clip))
        except (DecodeError, OSError):  # labelling it will say why
            return None
        finally:
            remove_temporary(clip)

    def measure_s(self, clip: EncodedClip | Failure) -> float | None:
        """Return the same, of a small file without a length in its header by decoding it.

        The length is 0.0 if the item cannot be decoded. Removes the clip's temporary file.
        """
        if isinstance(clip, Failure):
            return 0.0
        try:
            num_bytes = num_encoded_bytes(clip)
            length_s = self._promised_s(clip, num_bytes)
            if length_s is None and num_bytes <= MAX_DECODED_BYTES:
                for _, facts in self._living_process().decode(clip):
                    length_s = None if facts is None else facts.duration_s
            return length_s
        except DecoderLostError:
            return None
        except (DecodeError, OSError):
            return 0.0
        finally:
            remove_temporary(clip)

    def count_channels(self, clip: EncodedClip | Failure) -> int:
        """Return the channels of a clip by its first second; 1 if they are not known."""
        if isinstance(clip, Failure):
            return 1
        start_s = clip.item.start_s or 0.0
        item = dataclasses.replace(clip.item, start_s=start_s, end_s=start_s + 1.0)
        beginning = dataclasses.replace(clip, item=item)
        with contextlib.suppress(DecodeError, OSError):
            for _, facts in self._living_process().decode(beginning, channel=1):
                if facts is not None:
                    return facts.channels
        return 1

    def _promised_s(self, clip: EncodedClip, num_bytes: int) -> float | None:
        length_s = self._living_process().read_length_s(clip)
        if length_s is None or length_s * MIN_BYTES_PER_S > num_bytes:
            return None
        return length_s - (clip.item.start_s or 0.0)

    def _living_process(self) -> DecoderProcess:
        if self._process is not None and not self._process.is_usable():
            self._close()
        if self._process is None:
            self._process = start_decoder(self._settings, self._worker_command)
        return self._process

    def _close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


def num_encoded_bytes(clip: EncodedClip) -> int:
    """Return the bytes of a clip, in memory or in a file."""
    return Path(clip.path).stat().st_size if clip.path is not None else len(clip.data or b"")


def remove_temporary(clip: EncodedClip) -> None:
    """Remove the file of a clip, if it is its own."""
    if clip.path is not None and clip.delete_path:
        Path(clip.path).unlink(missing_ok=True)
