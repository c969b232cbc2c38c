"""A pool of decoders where the system allows no more threads, processes, files or memory."""

from __future__ import annotations

import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.audio_factory import clip, wav
from transforms.decoding import process
from transforms.decoding.pool import DecodePool
from transforms.decoding.settings import DecodeSettings
from transforms.errors import EarmarkError


@pytest.mark.parametrize("name", ["earmark-decode-feeder", "earmark-decoder"])
def test_a_thread_that_cannot_be_started_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    message = r"^the thread .* cannot be started: can't start new thread; raise the system's limit"
    with (
        pytest.raises(EarmarkError, match=message),
        DecodePool(DecodeSettings(num_processes=2)) as pool,
    ):
        list(pool.stream("u", [clip("a.wav", wav(0.5)), clip("b.wav", wav(0.5))]))


def test_a_failed_reading_thread_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(DecodePool, "_enqueue", fail)
    with (
        pytest.raises(EarmarkError, match=r"the thread that reads clips failed: MemoryError\(\)"),
        DecodePool(DecodeSettings(num_processes=1)) as pool,
    ):
        list(pool.stream("u", [clip("a.wav", wav(0.5))]))


def test_a_process_that_cannot_be_forked_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    message = r"no decoder process could be started: .*unavailable; raise the system's limit"
    with (
        pytest.raises(EarmarkError, match=message),
        DecodePool(DecodeSettings(num_processes=2)) as pool,
    ):
        list(pool.stream("u", [clip("a.wav", wav(0.5))]))


@pytest.fixture
def few_open_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_open_files")
def test_too_few_open_files_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EarmarkError, match=r"Too many open files; raise the system's limit"):
        process.start_decoder(DecodeSettings())


def test_where_memory_runs_out_the_system_kills_a_decoder_first() -> None:
    score = Path("/proc/self/oom_score_adj")
    if not score.is_file():
        pytest.skip("not Linux")
    child = process.start_decoder(DecodeSettings())
    try:
        assert Path(f"/proc/{child._process.pid}/oom_score_adj").read_text() == "1000\n"
        assert score.read_text() != "1000\n"
    finally:
        child.close()
