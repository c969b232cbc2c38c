"""Two runs on one output: one waits, or says why not; a dead one is told from a live one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.result import lock
from pipeline.result.lock import LOCK_FILE, hold_output
from transforms.errors import OutputError, OutputLostError
from transforms.storage import filesystem, reading, retries, urls, writing


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An output without a system's lock, and a heart that beats fast."""
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lock, "PATIENCE_S", 0.6)
    monkeypatch.setattr(lock, "POLL_S", 0.02)
    url = f"memory://lock-{uuid.uuid4().hex}/out"
    yield url
    writing.remove(urls.join(url, LOCK_FILE))


def holder_in(out: str) -> dict[str, object]:
    return dict(json.loads(reading.read_bytes(urls.join(out, LOCK_FILE))))


def leave_behind(out: str) -> None:
    """The file of a run that was killed on another machine."""
    left = lock._Holder("t" * 32, "elsewhere", 77, heartbeat=4)
    writing.write_bytes(urls.join(out, LOCK_FILE), left.to_json())


def test_a_remote_output_is_held_while_a_run_lasts_and_free_afterwards(out: str) -> None:
    with hold_output(out):
        assert holder_in(out)["process"] == os.getpid()
    assert not filesystem.exists(urls.join(out, LOCK_FILE))


def test_a_second_run_on_a_remote_output_is_refused_while_the_first_is_alive(out: str) -> None:
    with hold_output(out), pytest.raises(OutputError) as refused, hold_output(out):
        pytest.fail("both hold it")
    assert str(refused.value) == (
        f"another run (process {os.getpid()} on {os.uname().nodename}) is writing to {out}; wait "
        "for it or stop it, then run this command again, or give another --output."
    )
    with hold_output(out):
        pass  # the refused run has not taken the first one's file away for good


def test_what_a_run_elsewhere_left_is_taken_over_after_watching_it(
    out: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, lock.__name__)
    leave_behind(out)
    began_s = time.monotonic()
    with hold_output(out):
        assert time.monotonic() - began_s >= 0.6
        assert holder_in(out)["process"] == os.getpid()
    assert f"another run (process 77 on elsewhere) holds {out}, or was killed" in caplog.text


def test_of_two_that_watch_a_dead_run_the_first_to_take_over_keeps_the_output(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_behind(out)
    watch = lock._watch

    def watch_and_come_second(url: str, output: str, other: Any) -> None:
        watch(url, output, other)
        writing.write_bytes(url, b'{"token": "first", "machine": "elsewhere", "process": 8}')

    monkeypatch.setattr(lock, "_watch", watch_and_come_second)
    with pytest.raises(OutputError, match="process 8 on elsewhere"), hold_output(out):
        pytest.fail("both have taken it over")
    assert holder_in(out)["token"] == "first"


@pytest.mark.parametrize("left", [b"{}", b"[1]", b"\xff\xfe"])
def test_a_damaged_file_is_watched_like_any_other(out: str, left: bytes) -> None:
    writing.write_bytes(urls.join(out, LOCK_FILE), left)
    began_s = time.monotonic()
    with hold_output(out):
        assert time.monotonic() - began_s >= 0.6


TAKEN_OVER = """
import time
from pipeline.cli import main as cli
from pipeline.labelling.run import _interrupt_main_thread
from pipeline.result import lock as output_lock
from tests.pipeline.result.test_lock import holder_in, leave_behind

output_lock.HEARTBEAT_S = 0.05
OUT = "memory://lock/out"

def taken_over(*_):
    with output_lock.hold_output(OUT, on_lost=_interrupt_main_thread):
        leave_behind(OUT)
        time.sleep(30)
    return 0

cli._run = taken_over
began_s = time.monotonic()
code = cli.main(["label"])
print(code, time.monotonic() - began_s < 10, holder_in(OUT)["token"])
"""


def test_a_run_that_was_taken_for_dead_is_stopped_and_says_so() -> None:
    # In a process of its own, as a command is: what stops it is a signal to its main thread.
    done = subprocess.run([sys.executable, "-c", TAKEN_OVER], capture_output=True, text=True)
    assert done.stdout == f"1 True {'t' * 32}\n"  # the other run's file stays
    assert done.stderr.rpartition("earmark: ")[2].startswith(
        "another run has taken over memory://lock/out while this one was stuck; nothing is lost."
    )


def test_without_a_way_to_stop_it_the_run_learns_of_its_loss_at_the_end(out: str) -> None:
    with pytest.raises(OutputLostError), hold_output(out):
        leave_behind(out)
        time.sleep(0.3)


def test_a_store_that_fails_for_a_while_does_not_stop_the_heart(
    out: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with hold_output(out):
        with monkeypatch.context() as patch:
            patch.setattr(writing, "write_bytes", _fail)
            time.sleep(0.2)
        before = holder_in(out)["heartbeat"]
        time.sleep(0.3)
        assert holder_in(out)["heartbeat"] > before  # type: ignore[operator]
    assert "no heartbeat (the store is down)" in caplog.text


def test_an_output_that_cannot_be_written_is_refused(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "create_bytes", _fail)
    with pytest.raises(OutputError, match="cannot be written: the store is down"), hold_output(out):
        pass


def _fail(*_: object) -> None:
    raise OSError("the store is down")


def test_a_store_that_stays_silent_does_not_hold_up_the_end(
    out: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "STOP_S", 0.2)
    answers = threading.Event()
    real = writing.remove
    with monkeypatch.context() as patch, contextlib.ExitStack() as held:
        held.enter_context(hold_output(out))
        patch.setattr(writing, "remove", lambda url: (answers.wait(20), real(url)))
        began_s = time.monotonic()
        held.close()
        assert time.monotonic() - began_s < 5
    assert f"{out}/{LOCK_FILE} could not be removed (the store has not answered for 0 s)" in (
        caplog.text
    )
    answers.set()


def test_the_heart_asks_no_longer_than_until_its_next_beat(
    out: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(retries, "RETRY_S", 120.0)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 20.0)
    with monkeypatch.context() as patch, hold_output(out):
        patch.setattr(MemoryFileSystem, "rm_file", refuse)
        patch.setattr(MemoryFileSystem, "info", refuse)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 3
    assert "the next run will watch it" in caplog.text
    assert "cannot be reached: Connection refused" in caplog.text


# --- Local ---------------------------------------------------------------------------------


def test_a_folder_that_was_removed_while_it_was_opened_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "out"
    real, num_opened = os.open, 0

    def open_late(path: Any, *args: Any) -> int:
        nonlocal num_opened
        descriptor = real(path, *args)
        if str(path) == str(out):
            num_opened += 1
            if num_opened == 1:  # another run ends here, and its folders go
                out.rmdir()
                out.parent.rmdir()
        return descriptor

    monkeypatch.setattr(os, "open", open_late)
    with hold_output(str(out)):
        assert num_opened == 2
        with pytest.raises(OutputError, match="another run"), hold_output(str(out)):
            pytest.fail("both hold it")
        assert out.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_runs_that_come_to_nothing_at_the_same_time_never_hold_a_folder_together(
    tmp_path: Path,
) -> None:
    out, held, together = tmp_path / "out", threading.Semaphore(1), []

    def hold(_: int) -> int:
        try:
            with hold_output(str(out)):
                if not held.acquire(blocking=False):
                    together.append(1)
                    return 0
                held.release()
                return 1
        except OutputError:
            return 0

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(hold, range(2000))) > 0
    assert together == []


def test_a_link_to_a_folder_can_be_held(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with (
        hold_output(str(tmp_path / "link")),
        pytest.raises(OutputError, match="another run"),
        hold_output(str(tmp_path / "real")),
    ):
        pytest.fail("both hold it")
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 2500 + "b"], ids=["name", "path"])
def test_a_name_that_no_folder_can_have_is_refused_with_words(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError) as refused, hold_output(f"{tmp_path}/{name}"):
        pytest.fail("held")
    assert str(refused.value) == (
        f"{tmp_path}/{name} cannot be written: File name too long. Give another --output, or fix "
        "its permissions."
    )


def test_a_folder_that_one_may_not_enter_is_refused_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0)
    if os.geteuid() == 0:  # whom no permissions stop
        real = os.stat

        def stat(path: Any, **kwargs: Any) -> os.stat_result:
            if str(path).startswith(f"{folder}/"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, **kwargs)

        monkeypatch.setattr(os, "stat", stat)
    with (
        pytest.raises(OutputError, match=r"/closed/x cannot be written: Permission denied\. Give"),
        hold_output(f"{folder}/x"),
    ):
        pytest.fail("held")
