"""Files are read whole, each reader at its own position."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from transforms.storage import filesystem, reading, writing


def test_reading_a_pipe_or_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(OSError, match="pipe, socket or device"):
        reading.open_read(str(tmp_path / "pipe.wav"))
    with pytest.raises(IsADirectoryError):
        reading.read_bytes(str(tmp_path))
    with pytest.raises(IsADirectoryError):
        filesystem.stat(str(tmp_path))


def test_two_readers_of_a_memory_file_have_their_own_position() -> None:
    writing.write_bytes("memory://two/a", b"abc")
    with reading.open_read("memory://two/a") as one, reading.open_read("memory://two/a") as two:
        assert (one.read(2), two.read(1), one.read()) == (b"ab", b"a", b"c")
