"""What a runner is given by Earmark, besides the user's own options."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

from transforms.process.temp_folders import scratch_folder


@contextlib.contextmanager
def temporary_files_in_scratch() -> Iterator[None]:
    """Have ``tempfile`` make its files in this process's scratch folder for a while.

    Beam's local runners stage files in folders that would stay if the run is killed.
    """
    before, tempfile.tempdir = tempfile.tempdir, str(scratch_folder())
    try:
        yield
    finally:
        tempfile.tempdir = before
