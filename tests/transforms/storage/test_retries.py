"""Which errors are retried, how long, and when a store or a file is given up on."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest
import requests

from tests.support.fake_stores import HttpError
from transforms.storage import retries


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        *((HttpError(status, ""), True) for status in (408, 425, 429, 500, 502, 503, 504, 599)),
        *((HttpError(status, ""), False) for status in (400, 401, 403, 404, 409, 410, 412, 416)),
        *((HttpError(status, ""), False) for status in (501, 505)),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (ConnectionRefusedError(111, "Connection refused"), True),
        (TimeoutError(), True),
        (retries.ShortBodyError("3 of 9"), True),
        (json.JSONDecodeError("Expecting value", "", 0), True),
        (aiohttp.ClientPayloadError("Response payload is not completed"), True),
        (aiohttp.ServerDisconnectedError(), True),
        (requests.exceptions.ConnectionError(), True),
        (aiohttp.InvalidURL("http://["), False),
        (OSError(28, "No space left on device"), False),
        (PermissionError(13, "Permission denied"), False),
        (FileNotFoundError("x"), False),
        (ValueError("x"), False),
    ],
    ids=repr,
)
def test_which_errors_may_pass(error: Exception, may_pass: bool) -> None:
    assert retries.may_pass(error) is may_pass
    wrapped = FileNotFoundError("http says so to everything")
    wrapped.__cause__ = error
    assert retries.may_pass(wrapped) is may_pass


def test_a_store_is_asked_again_until_it_answers_or_patience_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 0.2)
    errors: list[Exception] = [TimeoutError("a")] * 4

    def act() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert retries.ask("store", act, retries.may_pass) == "done"
    assert caplog.records == []
    errors = [TimeoutError("b")] * 100_000
    with pytest.raises(TimeoutError, match="b") as caught:
        retries.ask("store", act, retries.may_pass)
    (note,) = caught.value.__notes__
    assert re.fullmatch(r"tried \d+ times in 0 s; check the network, and try again later", note)
    left = len(errors)
    with pytest.raises(TimeoutError, match="b"):
        retries.ask("store", act, retries.may_pass)
    assert left - len(errors) == 1  # it was given up on a moment ago
    time.sleep(0.25)
    with pytest.raises(TimeoutError, match="b"):
        retries.ask("store", act, retries.may_pass)
    assert left - len(errors) > 2


def test_who_has_never_answered_is_given_up_on_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 0.4)
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 0.05)

    def seconds_until_given_up(store: str, *errors: Exception) -> float:
        left = list(errors)

        def act() -> None:
            raise left.pop(0) if len(left) > 1 else left[0]

        began_s = time.monotonic()
        with pytest.raises(type(errors[-1])):
            retries.ask(store, act, retries.may_pass)
        return time.monotonic() - began_s

    refused = ConnectionRefusedError("refused")
    assert seconds_until_given_up("never", refused) < 0.3
    tls = OSError("certificate")
    tls.__cause__ = type("ClientSSLError", (Exception,), {})()
    with pytest.raises(OSError, match="certificate"):  # lasting, and no answer of the store
        retries.ask("unsafe", lambda: _raise(tls), retries.may_pass)
    assert seconds_until_given_up("unsafe", refused) < 0.3
    # An answer is an answer, whatever it says.
    assert seconds_until_given_up("busy", HttpError(503, "busy"), refused) > 0.3
    with pytest.raises(FileNotFoundError):
        retries.ask("there", Path("/nowhere/at/all").read_bytes, retries.may_pass)
    assert seconds_until_given_up("there", refused) > 0.3


def _raise(error: Exception) -> None:
    raise error


def test_who_stays_silent_at_first_contact_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 60.0)
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 0.05)
    tries = itertools.count(1)

    def time_out() -> None:
        next(tries)
        time.sleep(0.06)
        raise TimeoutError("silent")

    with pytest.raises(TimeoutError) as caught:
        retries.ask("silent", time_out, retries.may_pass)
    assert next(tries) == 2
    assert caught.value.__notes__ == ["check the address and the network"]


def test_waiting_for_a_store_is_logged_once_and_starts_no_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 60.0)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.01)
    monkeypatch.setattr(retries, "NOTICE_S", 0.1)

    # What refuses is named by what lies at the bottom of the error.
    refused = FileNotFoundError("http says so to everything")
    refused.__cause__ = ConnectionRefusedError(111, "Connect call failed")
    until = time.monotonic() + 0.3

    def refuse() -> str:
        if time.monotonic() < until:
            raise refused
        return "done"

    def ask(number: int) -> str:
        return retries.ask("off", refuse, retries.may_pass, file="off/a", describe=describe)

    describe = lambda error: f"cannot be reached: {retries.cause_words(error)}"  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == {"done"}
        assert {thread.name for thread in threading.enumerate() if "Timer" in thread.name} == set()
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"off/a: cannot be reached: Connection refused \(tried \d+ times in 0 s\); "
        r"trying again for up to 15 s",
        said,
    )


def test_a_file_that_fails_while_its_store_answers_is_given_up_on_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 1.0)
    monkeypatch.setattr(retries, "FILE_S", 0.01)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.01)
    is_up = True

    def other() -> None:
        if not is_up:
            raise ConnectionRefusedError("down")

    def tries_until_given_up(file: str, status: int = 500) -> tuple[int, str]:
        tries = itertools.count()

        def fail() -> None:
            next(tries)
            raise HttpError(status, "broken")

        with pytest.raises(HttpError) as caught:
            retries.ask("store", fail, retries.may_pass, file=file, other=other)
        return next(tries), caught.value.__notes__[-1]

    num_tries, note = tries_until_given_up("a")
    assert retries.FILE_TRIES <= num_tries < 20
    assert note.endswith("its store answers for other files; check this one, and try again later")
    assert tries_until_given_up("a")[0] == 1  # for a while, as a store would be
    assert retries.FILE_TRIES <= tries_until_given_up("b")[0] < 20
    # Too many requests are no trouble of one file, and a store that is down is none, either.
    assert tries_until_given_up("c", 429)[0] > 40
    retries._gave_up_at.clear()
    is_up = False
    assert tries_until_given_up("d")[0] > 40
    assert tries_until_given_up("e")[0] == 1


def test_others_that_are_answered_meanwhile_tell_a_files_trouble_from_the_stores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 60.0)
    monkeypatch.setattr(retries, "FILE_S", 0.01)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.01)
    tries = itertools.count()

    def fail() -> None:
        if next(tries) == 3:
            retries.ask("store", lambda: None, retries.may_pass, file="good")
        raise HttpError(500, "broken")

    with pytest.raises(HttpError):
        retries.ask("store", fail, retries.may_pass, file="bad")
    assert next(tries) < 20
    assert "store" not in retries._gave_up_at


def test_whoever_has_little_patience_asks_once_and_gives_up_on_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 60.0)
    tries = itertools.count(1)

    def fail() -> None:
        next(tries)
        raise TimeoutError("silent")

    with pytest.raises(TimeoutError), retries.patient_for(0):
        retries.ask("store", fail, retries.may_pass)
    assert next(tries) == 2
    assert retries._gave_up_at == {}
