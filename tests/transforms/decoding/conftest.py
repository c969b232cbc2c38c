"""A decoder whose library misbehaves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HOSTILE_WORKER = """
import ctypes, os, signal, sys, time
from transforms.decoding import child

held = []

def decode(source, **options):
    mark = bytes(source[-8:]) if isinstance(source, bytes) else b""
    if mark == b"ABORT___":
        print("assertion failed: marked clip", file=sys.stderr, flush=True)
        os.abort()
    if mark == b"EXIT____":
        os._exit(7)
    for index, piece in enumerate(child.decode(source, **options)):
        print("noise on stdout")
        if mark == b"SEGFAULT":
            ctypes.string_at(0)
        if mark == b"NATIVE_S":
            ctypes.PyDLL(None).sleep(1000)  # in C, and no other Python thread can run
        if mark == b"SIGSTOP_":
            os.kill(os.getpid(), signal.SIGSTOP)
        if mark == b"LEAKS___":
            held.append(bytes(200 << 20))
        if mark == b"GREEDY__" and index == 2:
            held.append(bytes(1 << 30))
        yield piece
        if mark == b"LATE____" and index == 2:
            os.abort()
        if mark == b"STUCK___" and index == 2:
            time.sleep(1000)
        if mark == b"RAISE___" and index == 2:
            raise RuntimeError("the library stumbled")

child.serve(sys.argv[1:], decode)
"""


@pytest.fixture
def hostile_worker(tmp_path: Path) -> list[str]:
    """A command for decoders that misbehave on clips that end with a mark."""
    path = tmp_path / "hostile_worker.py"
    path.write_text(HOSTILE_WORKER)
    return [sys.executable, str(path)]
