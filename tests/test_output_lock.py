"""Two runs on one output: one waits, or says why not; a dead one is told from a live one."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator

import pytest

from pipeline import cli, output_lock
from pipeline.output_lock import LOCK_FILE, hold_output
from transforms import storage
from transforms.errors import OutputError, OutputLostError


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An output without a system's lock, and a heart that beats fast."""
    monkeypatch.setattr(output_lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(output_lock, "PATIENCE_S", 0.6)
    monkeypatch.setattr(output_lock, "POLL_S", 0.02)
    url = f"memory://lock-{uuid.uuid4().hex}/out"
    yield url
    storage.remove(storage.join(url, LOCK_FILE))


def holder_in(out: str) -> dict[str, object]:
    return dict(json.loads(storage.read_bytes(storage.join(out, LOCK_FILE))))


def leave_behind(out: str) -> None:
    """The file of a run that was killed on another machine."""
    left = output_lock._Holder("t" * 32, "elsewhere", 77, heartbeat=4)
    storage.write_bytes(storage.join(out, LOCK_FILE), left.to_json())


def test_a_remote_output_is_held_while_a_run_lasts_and_free_afterwards(out: str) -> None:
    with hold_output(out):
        assert holder_in(out)["process"] == os.getpid()
    assert not storage.exists(storage.join(out, LOCK_FILE))


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
    caplog.set_level(logging.INFO)
    leave_behind(out)
    began_s = time.monotonic()
    with hold_output(out):
        assert time.monotonic() - began_s >= 0.6
        assert holder_in(out)["process"] == os.getpid()
    assert f"another run (process 77 on elsewhere) holds {out}, or was killed" in caplog.text


@pytest.mark.parametrize("left", [b"", b"{}", b"[1]", b'{"token": 1', b"\xff\xfe"])
def test_a_damaged_file_is_watched_like_any_other(out: str, left: bytes) -> None:
    storage.write_bytes(storage.join(out, LOCK_FILE), left)
    began_s = time.monotonic()
    with hold_output(out):
        assert time.monotonic() - began_s >= 0.6


def test_a_run_that_was_taken_for_dead_is_stopped_and_says_so(
    out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken_over(*_: object) -> int:
        with hold_output(out, on_lost=run_interrupt):
            leave_behind(out)
            time.sleep(30)
        return 0

    from pipeline.run import _interrupt_main_thread as run_interrupt

    monkeypatch.setattr(cli, "_run", taken_over)
    began_s = time.monotonic()
    assert cli.main(["label"]) == 1
    assert time.monotonic() - began_s < 10
    assert capsys.readouterr().err.startswith(
        f"earmark: another run has taken {out} over while this one was stuck; nothing is lost."
    )
    assert holder_in(out)["token"] == "t" * 32  # the other run's file stays


def test_without_a_way_to_stop_it_the_run_learns_of_its_loss_at_the_end(out: str) -> None:
    with pytest.raises(OutputLostError), hold_output(out):
        leave_behind(out)
        time.sleep(0.3)


def test_a_store_that_fails_for_a_while_does_not_stop_the_heart(
    out: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with hold_output(out):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", _fail)
            time.sleep(0.2)
        before = holder_in(out)["heartbeat"]
        time.sleep(0.3)
        assert holder_in(out)["heartbeat"] > before  # type: ignore[operator]
    assert "no heartbeat (the store is down)" in caplog.text


def test_an_output_that_cannot_be_written_is_refused(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "create_bytes", _fail)
    with pytest.raises(OutputError, match="cannot be written: the store is down"), hold_output(out):
        pass


def _fail(*_: object) -> None:
    raise OSError("the store is down")
