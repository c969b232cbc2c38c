"""Retries: which errors of a store are transient, how long to wait, and when to give up.

One policy serves every store. fsspec's libraries have their own as well (gcsfs tries six times,
s3fs five, http once). This one is limited by time, so that the two do not multiply.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tenacity

logger = logging.getLogger(__name__)

# Google's own client gives up after the same time.
RETRY_S = 120.0
# A store that has never answered this process is more likely misspelt or switched off than busy. A
# try that hangs is not interrupted: it ends with its own timeout, and is then the last.
FIRST_CONTACT_S = 15.0
# A request that hangs until its timeout may use up RETRY_S, and is retried all the same.
MIN_TRIES = 3
# If a store answers for other files, the failing file itself is the cause. Where every third
# request fails, one file in ten thousand fails this often by chance.
FILE_S = 15.0
FILE_TRIES = 8
# Exponential back-off with full jitter: each wait is random between zero and a bound that doubles
# from the first value up to the second, so that workers do not return all at once.
FIRST_WAIT_S = 0.5
MAX_WAIT_S = 20.0
MAX_RETRY_AFTER_S = 60.0
NOTICE_S = 10.0

# Too early, too many, too slow, or an error of the server; but not what it does not support (501,
# 505).
_PASSING_STATUSES = {408, 425, 429, 500, 502, 503, 504, *range(506, 600)}
# S3's codes for errors whose status means something else: a body cut or damaged in transfer, a
# concurrent write, a completed upload whose answer was lost.
_PASSING_CODES = {
    *("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
    *("OperationAborted", "ConditionalRequestConflict", "NoSuchUpload"),
}
# By name, because most belong to optional packages: aiohttp, botocore, requests, urllib3,
# http.client, google.auth, azure.core.
_PASSING_NAMES = {
    *("ClientConnectionError", "ClientPayloadError", "ServerDisconnectedError"),
    *("HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "ResponseParserError"),
    *("ConnectionError", "Timeout", "ChunkedEncodingError", "ContentDecodingError"),
    *("IncompleteRead", "ProtocolError", "TransportError", "ServiceRequestError"),
    *("ServiceResponseError", "ChecksumError", "FlexibleChecksumError", "FSTimeoutError"),
}
_LASTING_NAMES = {
    *("FileExpired", "ClientSSLError", "SSLError", "InvalidURL", "ClientConnectorDNSError")
}

# Errors after an answer has begun.
_ANSWERING_NAMES = {
    *("ClientPayloadError", "ChunkedEncodingError", "ContentDecodingError"),
    *("IncompleteRead", "IncompleteReadError", "ResponseStreamingError", "ShortBodyError"),
}

_T = TypeVar("_T")
# By store, or by file if only the file was given up on; in seconds of ``time.monotonic``.
_gave_up_at: dict[str, float] = {}
_said_at: dict[str, float] = {}
_saying = threading.Lock()
_answered_at: dict[str, float] = {}
# Stores that have answered this process, even with an error.
_have_answered: set[str] = set()
_patience_of_caller_s: contextvars.ContextVar[float | None] = contextvars.ContextVar(
    "patience_of_caller_s", default=None
)


class ShortBodyError(OSError):
    """Fewer bytes were received or stored than there are."""


@contextlib.contextmanager
def patient_for(patience_s: float) -> Iterator[None]:
    """Limit retries of this thread to ``patience_s`` seconds within the ``with`` block; 0 for none.

    For requests that are not worth a wait. Their failure does not count against the store.
    """
    token = _patience_of_caller_s.set(patience_s)
    try:
        yield
    finally:
        _patience_of_caller_s.reset(token)


def ask(
    store: str,
    act: Callable[[], _T],
    may_pass: Callable[[BaseException], bool],
    *,
    file: str | None = None,
    other: Callable[[], object] | None = None,
    describe: Callable[[BaseException], str] = lambda error: cause_words(error),
) -> _T:
    """Return the result of ``act``, retrying transient errors.

    The error is raised, with a note of the number of tries and the next step, after

    - ``FIRST_CONTACT_S`` for a store that has never answered, even with an error,
    - ``FILE_S`` and ``FILE_TRIES`` for a file whose store answers for others meanwhile,
    - ``RETRY_S`` and ``MIN_TRIES`` otherwise.

    After that, the store or file is tried only once per call, until it answers or ``RETRY_S`` have
    passed: a run with many items must not wait for each of them.

    Args:
        store: Whose patience and answers count.
        act: One request or several; must be safe to repeat.
        may_pass: Tells transient errors; ``may_pass`` below, or a wider one.
        file: The file that ``act`` reads, if it reads one; None for the full patience.
        other: Asks the store for another file that it has served before; None if there is none.
        describe: Describes an error without secrets.
    """
    call = _Call(store, file, other, describe)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=_wait_s,
        stop=call.is_enough,
        before_sleep=call.say,
        retry_error_callback=call.give_up,
    )
    try:
        result = retrying(act)
    except Exception as error:
        if is_answer(error) and not may_pass(error):
            call.remember_answer()
        raise
    call.remember_answer()
    return result


class _Call:
    """The state of one call of ``ask``."""

    def __init__(
        self,
        store: str,
        file: str | None,
        other: Callable[[], object] | None,
        describe: Callable[[BaseException], str],
    ) -> None:
        self._store, self._file, self._other, self._describe = store, file, other, describe
        self._began_s = time.monotonic()
        self._is_the_files = False

    def is_enough(self, state: tenacity.RetryCallState) -> bool:
        """Return whether to stop after this error."""
        error = _error_of(state)
        if is_answer(error):
            _have_answered.add(self._store)
        elapsed_s = (state.seconds_since_start or 0.0) + state.upcoming_sleep
        own_s = _patience_of_caller_s.get()
        if own_s is not None:
            return elapsed_s > own_s
        if _was_given_up_on(self._store) or _was_given_up_on(self._file):
            return True
        if elapsed_s > self._patience_s():
            return state.attempt_number >= MIN_TRIES or self._store not in _have_answered
        has_tried = elapsed_s > FILE_S and state.attempt_number >= FILE_TRIES
        self._is_the_files = has_tried and self._fails_alone(error)
        return self._is_the_files

    def _patience_s(self) -> float:
        return RETRY_S if self._store in _have_answered else min(RETRY_S, FIRST_CONTACT_S)

    def _fails_alone(self, error: BaseException) -> bool:
        """Return whether the store answers for other files; ask it for one if no other call did."""
        # After 429, the store is overloaded, not the file broken.
        if self._file is None or status_of(error) == 429:
            return False
        if _answered_at.get(self._store, self._began_s) > self._began_s:
            return True
        if self._other is None:
            return False
        try:
            self._other()
        except Exception as others:
            return is_answer(others) and not may_pass(others)
        return True

    def give_up(self, state: tenacity.RetryCallState) -> Any:
        """Raise the last error, and remember whether the store or the file failed."""
        error, elapsed_s = _error_of(state), state.seconds_since_start or 0.0
        key = self._file if self._is_the_files and self._file is not None else self._store
        is_new = not (_was_given_up_on(self._store) or _was_given_up_on(self._file))
        if is_new and _patience_of_caller_s.get() is None:
            _gave_up_at[key] = time.monotonic()
        tries = f"tried {state.attempt_number} times in {elapsed_s:.0f} s; "
        error.add_note((tries if state.attempt_number > 1 else "") + self._next_step(error))
        raise error

    def _next_step(self, error: BaseException) -> str:
        if self._is_the_files:
            return "its store answers for other files; check this one, and try again later"
        if self._store not in _have_answered:
            return "check the address and the network"
        return "try again later" if is_answer(error) else "check the network, and try again later"

    def remember_answer(self) -> None:
        """Record that the store and the file are available."""
        _gave_up_at.pop(self._store, None)
        if self._file is not None:
            _gave_up_at.pop(self._file, None)
        _have_answered.add(self._store)
        _answered_at[self._store] = time.monotonic()

    def say(self, state: tenacity.RetryCallState) -> None:
        """Log why the run waits, once for all calls that wait for the same store."""
        now_s = time.monotonic()
        elapsed_s = now_s - self._began_s
        if elapsed_s < NOTICE_S or _patience_of_caller_s.get() is not None:
            return
        with _saying:
            if now_s - _said_at.get(self._store, -RETRY_S) < RETRY_S:
                return
            _said_at[self._store] = now_s
        logger.warning(
            "%s: %s (tried %d times in %.0f s); trying again for up to %.0f s",
            self._file or self._store,
            self._describe(_error_of(state)),
            state.attempt_number,
            elapsed_s,
            self._patience_s(),
        )


def _was_given_up_on(key: str | None) -> bool:
    at = _gave_up_at.get(key) if key is not None else None
    return at is not None and time.monotonic() - at < RETRY_S


def is_answer(error: BaseException) -> bool:
    """Return whether the error comes from the store itself, not from the network."""
    links = list(_chain(error))
    if status_of(error) is not None:
        return True
    if any(kind.__name__ in _ANSWERING_NAMES for link in links for kind in type(link).__mro__):
        return True
    # fsspec's http raises FileNotFoundError for everything; the cause is the error.
    answers = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError)
    return isinstance(links[-1], answers)


def cause_words(error: BaseException) -> str:
    """Describe an error's root cause: the system's text, or its class name."""
    cause = list(_chain(error))[-1]
    real = getattr(cause, "os_error", cause)
    if isinstance(real, socket.gaierror):
        return str(real.strerror or "no such host")
    if isinstance(real, OSError) and real.errno is not None and real.errno in errno.errorcode:
        return os.strerror(real.errno)
    return type(cause).__name__


def may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed a little later."""
    chain = list(_chain(error))
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if names & _LASTING_NAMES:
        return any(isinstance(link, OSError) and _is_dns_trouble(link) for link in chain)
    passing = (ConnectionError, TimeoutError, ShortBodyError, json.JSONDecodeError)
    if names & _PASSING_NAMES or any(isinstance(link, passing) for link in chain):
        return True
    if any(_response(link).get("Error", {}).get("Code") in _PASSING_CODES for link in chain):
        return True
    return status_of(error) in _PASSING_STATUSES


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the error or its causes; None if there is none."""
    for link in _chain(error):
        named = (getattr(link, name, None) for name in ("status", "status_code", "code"))
        for value in itertools.chain(
            (_response(link).get("ResponseMetadata", {}).get("HTTPStatusCode"),), named
        ):
            if str(value).isdecimal() and 100 <= int(str(value)) < 600:
                return int(str(value))
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        # The cause of aiohttp's error for a broken body has a status that no server sent.
        link = None if type(link).__name__ == "ClientPayloadError" else link.__cause__


def _is_dns_trouble(error: OSError) -> bool:
    """Return whether the name server failed temporarily; an unknown name stays unknown."""
    real = getattr(error, "os_error", error)
    return isinstance(real, OSError) and real.errno == socket.EAI_AGAIN


def _response(error: BaseException) -> dict[str, Any]:
    """Return botocore's facts about an answer."""
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def _retry_after_s(error: BaseException) -> float:
    """Return how long the server asks to wait; 0 if it does not say (gcsfs drops it)."""
    for link in _chain(error):
        headers = (
            getattr(link, "headers", None)
            or _response(link).get("ResponseMetadata", {}).get("HTTPHeaders")
            or {}
        )
        value = str(headers.get("retry-after", "")) if hasattr(headers, "get") else ""
        if value.isdecimal():
            return min(float(value), MAX_RETRY_AFTER_S)
    return 0.0


def _error_of(state: tenacity.RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome is not None else None
    if error is None:
        raise ValueError("retried without an error")
    return error


def _wait_s(state: tenacity.RetryCallState) -> float:
    drawn = tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=MAX_WAIT_S)(state)
    return max(drawn, _retry_after_s(_error_of(state)))
