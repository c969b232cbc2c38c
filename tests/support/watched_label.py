"""A command ``label`` that checks that nothing is written or opened where it should not be."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.config.label import RunConfig
from pipeline.labelling.run import run_label
from pipeline.result.verify import run_verify
from tests.support import audio_factory
from tests.support.labelling import read_rows, small_config

SECRET = audio_factory.encode(audio_factory.noise(0.3, seed=7), 16_000, "wav")

# Every file that this process opens while a run is watched; hooks cannot be taken away again.
_opened: list[tuple[str, bool]] = []
_is_watching = threading.Event()


def _note_opening(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _is_watching.is_set() and isinstance(arguments[0], str | bytes):
        writes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        _opened.append((os.fsdecode(arguments[0]), writes))


sys.addaudithook(_note_opening)


def snapshot(folder: Path, leave_out: Iterable[Path] = ()) -> dict[str, tuple[Any, ...]]:
    """Return kind, time and bytes of everything below a folder."""
    found = {}
    for name in sorted(folder.rglob("*")):
        if any(name == other or other in name.parents for other in leave_out):
            continue
        status = name.lstat()
        data = name.read_bytes() if name.is_file() and not name.is_symlink() else b""
        found[str(name)] = (status.st_mode, status.st_mtime_ns, data)
    return found


@dataclasses.dataclass
class Label:
    """Labels the files in ``inside``, and watches the rest of the disk.

    Attributes:
        top: Holds everything else.
        inside: The input.
        outside: Holds ``secret.wav``, which is no input; hostile names lead here.
        out: The result.
    """

    top: Path
    inside: Path
    outside: Path
    out: Path
    model: Path

    def config(self, *inputs: Path | str, **changes: Any) -> RunConfig:
        values = {
            "inference": {"precision": "fp32", "device": "cpu"},
            "units": {},
            "max_failed": 1.0,  # so that 3 means a broken container and nothing else
            "decode": {"processes": 1, "stall_timeout_s": 20.0},
            **changes,
        }
        return small_config(self.model, self.out, *(inputs or (self.inside,)), **values)

    def __call__(self, *inputs: Path | str, **changes: Any) -> int:
        """Label; return the exit code, after a check of the result and the rest of the disk."""
        config = self.config(*inputs, **changes)
        kept = (self.out, self.top / "scratch")
        before = snapshot(self.top, kept)
        _opened.clear()
        _is_watching.set()
        try:
            code = run_label(config, [])
        finally:
            _is_watching.clear()
        assert snapshot(self.top, kept) == before
        assert [path for path in (self.top / "scratch").rglob("*") if path.is_file()] == []
        here = [(path, writes) for path, writes in _opened if path.startswith(f"{self.top}/")]
        assert [path for path, writes in here if writes and not self._may_write(path)] == []
        assert [path for path, _ in here if path.startswith(f"{self.outside}/")] == []
        assert run_verify(str(self.out), quiet=True) == 0
        totals = json.loads((self.out / "run.json").read_text())["totals"]
        assert totals["found_items"] == len(self.rows("clips")) + len(self.rows("errors"))
        return code

    def _may_write(self, path: str) -> bool:
        return path.startswith((f"{self.out}/", f"{self.top}/scratch/"))

    def rows(self, part: str) -> dict[str, dict[str, Any]]:
        """Return rows by clip id, without the input's folder."""
        rows = read_rows(self.out, part)
        found = {row["clip_id"].removeprefix(f"{self.inside}/"): row for row in rows}
        assert len(found) == len(rows)
        return found

    def labelled(self) -> set[str]:
        return set(self.rows("clips"))

    def errors(self) -> dict[str, tuple[str, str]]:
        """Return error types and messages by clip id."""
        return {
            name: (row["error_type"], row["message"]) for name, row in self.rows("errors").items()
        }
