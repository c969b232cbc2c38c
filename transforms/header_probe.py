"""How long a file is by its header, which a decoder process reads, with a decoder's limits.

    this process ─ size ───────────────────────▶ decoder process
      storage ◀──── wanted: block n ────────────   audio_readers.probe_duration_s
          └───────── 64 KiB ───────────────────▶
                  ◀─ the length, or none ───────

No byte of the file is looked at here. A header that crashes the libraries, hangs them or makes them
ask for too much memory costs that process, and the length is not known: whoever decodes the file
has the same limits, and says what is wrong. A length that lies far into the file is not known
either: of no file, wherever it lies, is more read than ``MAX_HEADER_BYTES``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import BinaryIO

from transforms.decoding.decode import BLOCK_BYTES
from transforms.decoding.pool import DecodeSettings
from transforms.decoding.process import (
    WORKER_COMMAND,
    DecoderLostError,
    DecoderProcess,
    start_decoder,
)
from transforms.errors import DecodeError
from transforms.records import Item
from transforms.storage import reading

# A few blocks are enough for a header; a picture may lie before it.
MAX_HEADER_BYTES = 16 << 20


class HeaderProbe:
    """Reads lengths of files, one at a time, in a process of its own that starts with the first.

    Args:
        settings: Bounds of a decoder.
        worker_command: Starts a decoder; tests put one that crashes here.
    """

    def __init__(
        self, settings: DecodeSettings, *, worker_command: Sequence[str] = WORKER_COMMAND
    ) -> None:
        self._settings = settings
        self._worker_command = tuple(worker_command)
        self._process: DecoderProcess | None = None

    def __enter__(self) -> HeaderProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read_duration_s(self, item: Item) -> float | None:
        """Seconds of audio in a whole file, by its header.

        What the store refuses for the moment is asked for again, as in all reading.

        Returns:
            The length; None where the header does not say so within the bounds, cannot be read, or
            where reading would start at the beginning whatever the place (FFmpeg).

        Raises:
            EarmarkError: No decoder process could be started.
        """
        try:
            with reading.open_read(item.url or item.uri, BLOCK_BYTES, only_ranges=True) as file:
                return self._probe(file, file.seek(0, os.SEEK_END))
        except OSError:  # who reads it will say
            return None

    def _probe(self, file: BinaryIO, size: int) -> float | None:
        process = self._living_process()
        try:
            return process.probe(file, size, MAX_HEADER_BYTES // BLOCK_BYTES)
        except (DecodeError, DecoderLostError):  # who decodes it will say
            self.close()  # it may hold what a library has leaked
            return None
        except OSError:
            self.close()  # it waits for a block
            raise

    def _living_process(self) -> DecoderProcess:
        if self._process is not None and not self._process.is_usable():
            self.close()
        if self._process is None:
            self._process = start_decoder(self._settings.of_process, self._worker_command)
        return self._process

    def close(self) -> None:
        """End the process; the next file starts another."""
        if self._process is not None:
            self._process.close()
            self._process = None
