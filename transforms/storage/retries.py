"""Asking a store again: which of its errors may pass, how long to wait, when to give up.

One policy for every store. fsspec's libraries have some of their own (gcsfs asks up to six times,
s3fs five, http never); those stay, and this one goes by time, so that the two do not multiply.
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

# Google's own client gives up after this long, too.
RETRY_S = 120.0
# Who has never answered this process is more likely misspelt or switched off than busy. A try that
# hangs is not interrupted: it ends with its own timeout, and is then the last.
FIRST_CONTACT_S = 15.0
# A request that hangs until its timeout may take up all of RETRY_S; it is still asked again.
MIN_TRIES = 3
# A file that fails while its store answers for others is its own trouble. Of ten thousand files one
# would fail this often by chance where every third request does.
FILE_S = 15.0
FILE_TRIES = 8
# Half a second at first, then twice as long each time, up to this; each wait is drawn at random
# from zero up to that, so that many workers do not come back all at once.
FIRST_WAIT_S = 0.5
MAX_WAIT_S = 20.0
MAX_RETRY_AFTER_S = 60.0
NOTICE_S = 10.0

# Too early, too many, too slow, or the server's own trouble; but not what it will never be able
# to do (501, 505).
_PASSING_STATUSES = {408, 425, 429, 500, 502, 503, 504, *range(506, 600)}
# What S3 says with a status that means something else: a body that was cut or damaged on its way,
# another write at the same time, an upload that was completed and whose answer got lost.
_PASSING_CODES = {
    *("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
    *("OperationAborted", "ConditionalRequestConflict", "NoSuchUpload"),
}
# By name, as most of these belong to packages that need not be there: aiohttp, botocore, requests,
# urllib3, http.client, google.auth, azure.core; and answers that end in the middle of their text.
_PASSING_NAMES = {
    *("ClientConnectionError", "ClientPayloadError", "ServerDisconnectedError"),
    *("HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "ResponseParserError"),
    *("ConnectionError", "Timeout", "ChunkedEncodingError", "ContentDecodingError"),
    *("IncompleteRead", "ProtocolError", "TransportError", "ServiceRequestError"),
    *("ServiceResponseError", "ChecksumError", "FlexibleChecksumError", "FSTimeoutError"),
}
_LASTING_NAMES = {
    "FileExpired",
    "ClientSSLError",
    "SSLError",
    "InvalidURL",
    "ClientConnectorDNSError",
}

# An answer has begun, whatever then became of it.
_ANSWERING_NAMES = {
    *("ClientPayloadError", "ChunkedEncodingError", "ContentDecodingError"),
    *("IncompleteRead", "IncompleteReadError", "ResponseStreamingError", "ShortBodyError"),
}

_T = TypeVar("_T")
# By store, or by file where only that was given up on; in seconds of ``time.monotonic``.
_gave_up_at: dict[str, float] = {}
_said_at: dict[str, float] = {}
_saying = threading.Lock()
_answered_at: dict[str, float] = {}
# Those that have answered this process, be it with an error.
_have_answered: set[str] = set()
_patience_of_caller_s: contextvars.ContextVar[float | None] = contextvars.ContextVar(
    "patience_of_caller_s", default=None
)


class ShortBodyError(OSError):
    """Fewer bytes have come, or been stored, than there are."""


@contextlib.contextmanager
def patient_for(patience_s: float) -> Iterator[None]:
    """While it lasts, what this thread asks is asked again for so long at most; 0 is asked once.

    For what does not matter enough to wait for. No store is given up on for it.
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
    """The result of ``act``, tried again while its error may pass.

    The error is raised, with a note of how often it was tried and what to do, after

    - ``FIRST_CONTACT_S``, for a store that has never answered, be it with an error,
    - ``FILE_S`` and ``FILE_TRIES``, for a file whose store answers for others meanwhile,
    - ``RETRY_S`` and ``MIN_TRIES``, else.

    Whoever has been given up on, a store or a file, is then asked once each time, until it answers
    or ``RETRY_S`` have gone by: a run with many items must not wait out each of them.

    Args:
        store: Whom ``act`` asks.
        act: One request or several; must do no harm when done twice.
        may_pass: Which errors are worth another try; ``may_pass`` below, or more.
        file: What ``act`` reads, if it reads one file; None asks for the whole patience.
        other: Asks the store for something else that it has given before, if there is such a thing.
        describe: An error in words, without a secret.
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
    """One ``ask`` under way."""

    def __init__(
        self,
        store: str,
        file: str | None,
        other: Callable[[], object] | None,
        describe: Callable[[BaseException], str],
    ) -> None:
        self._store, self._file, self._other, self._describe = store, file, other, describe
        self._began_s = time.monotonic()
        self._num_tries = 0
        self._error: BaseException | None = None
        self._is_the_files = False

    def is_enough(self, state: tenacity.RetryCallState) -> bool:
        """Whether this error is the last."""
        self._error, self._num_tries = _error_of(state), state.attempt_number
        if is_answer(self._error):
            _have_answered.add(self._store)
        elapsed_s = (state.seconds_since_start or 0.0) + state.upcoming_sleep
        own_s = _patience_of_caller_s.get()
        if own_s is not None:
            return elapsed_s > own_s
        if _was_given_up_on(self._store) or _was_given_up_on(self._file):
            return True
        if elapsed_s > self._patience_s():
            return self._num_tries >= MIN_TRIES or self._store not in _have_answered
        self._is_the_files = elapsed_s > FILE_S and self._fails_alone()
        return self._is_the_files

    def _patience_s(self) -> float:
        return RETRY_S if self._store in _have_answered else min(RETRY_S, FIRST_CONTACT_S)

    def _fails_alone(self) -> bool:
        """Whether the store answers for others; asked where nobody else does."""
        if self._file is None or self._num_tries < FILE_TRIES or self._error is None:
            return False
        if status_of(self._error) == 429:  # it is not the file of which there is too much
            return False
        if _answered_at.get(self._store, self._began_s) > self._began_s:
            return True
        if self._other is None:
            return False
        try:
            self._other()
        except Exception as error:
            return is_answer(error) and not may_pass(error)
        return True

    def give_up(self, state: tenacity.RetryCallState) -> Any:
        """Raise the last error, and remember whose trouble it was."""
        error, elapsed_s = _error_of(state), state.seconds_since_start or 0.0
        key = self._file if self._is_the_files and self._file is not None else self._store
        is_new = not (_was_given_up_on(self._store) or _was_given_up_on(self._file))
        if is_new and _patience_of_caller_s.get() is None:
            _gave_up_at[key] = time.monotonic()
        tries = f"tried {state.attempt_number} times in {elapsed_s:.0f} s; "
        error.add_note((tries if state.attempt_number > 1 else "") + self._next_step())
        raise error

    def _next_step(self) -> str:
        if self._is_the_files:
            return "its store answers for others, so look at this one, and try again later"
        if self._store not in _have_answered:
            return "check the address and the network"
        if self._error is not None and is_answer(self._error):
            return "try again later"
        return "check the network, and try again later"

    def remember_answer(self) -> None:
        """The store is there, and so is the file."""
        _gave_up_at.pop(self._store, None)
        if self._file is not None:
            _gave_up_at.pop(self._file, None)
        _have_answered.add(self._store)
        _answered_at[self._store] = time.monotonic()

    def say(self, state: tenacity.RetryCallState) -> None:
        """Log why the run waits, once for all that wait for one store."""
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
            self._num_tries,
            elapsed_s,
            self._patience_s(),
        )


def _was_given_up_on(key: str | None) -> bool:
    at = _gave_up_at.get(key) if key is not None else None
    return at is not None and time.monotonic() - at < RETRY_S


def is_answer(error: BaseException) -> bool:
    """Whether the error comes from the store itself, and not from the way to it."""
    links = list(_chain(error))
    if status_of(error) is not None:
        return True
    if any(kind.__name__ in _ANSWERING_NAMES for link in links for kind in type(link).__mro__):
        return True
    # fsspec's http says "not found" to everything; what it was lies behind.
    answers = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError)
    return isinstance(links[-1], answers)


def cause_words(error: BaseException) -> str:
    """What lies at the bottom of an error: the system's words, or else its name."""
    cause = list(_chain(error))[-1]
    real = getattr(cause, "os_error", cause)
    if isinstance(real, socket.gaierror):
        return str(real.strerror or "no such host")
    if isinstance(real, OSError) and real.errno is not None and real.errno in errno.errorcode:
        return os.strerror(real.errno)
    return type(cause).__name__


def may_pass(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later."""
    chain = list(_chain(error))
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if names & _LASTING_NAMES:
        return any(isinstance(link, OSError) and _is_dns_trouble(link) for link in chain)
    passing = (ConnectionError, TimeoutError, ShortBodyError, json.JSONDecodeError)
    if names & _PASSING_NAMES or any(isinstance(link, passing) for link in chain):
        return True
    if any(_error_code(link) in _PASSING_CODES for link in chain):
        return True
    return status_of(error) in _PASSING_STATUSES


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the error, or what caused it, stands for; None if there is none."""
    for link in _chain(error):
        named = (getattr(link, name, None) for name in ("status", "status_code", "code"))
        for value in itertools.chain((_metadata(link).get("HTTPStatusCode"),), named):
            if str(value).isdecimal() and 100 <= int(str(value)) < 600:
                return int(str(value))
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        # Behind a body that breaks off, aiohttp has an error with a status that no server gave.
        link = None if type(link).__name__ == "ClientPayloadError" else link.__cause__


def _is_dns_trouble(error: OSError) -> bool:
    """Whether the name server is the trouble; a name that does not exist stays so."""
    real = getattr(error, "os_error", error)
    return isinstance(real, OSError) and real.errno == socket.EAI_AGAIN


def _metadata(error: BaseException) -> dict[str, Any]:
    """What botocore tells of an answer."""
    response = getattr(error, "response", None)
    return response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}


def _error_code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _retry_after_s(error: BaseException) -> float:
    """How long the server asks to wait; 0 if it does not say (gcsfs does not pass it on)."""
    for link in _chain(error):
        headers = getattr(link, "headers", None) or _metadata(link).get("HTTPHeaders") or {}
        value = str(headers.get("retry-after", "")) if hasattr(headers, "get") else ""
        if value.isdecimal():
            return min(float(value), MAX_RETRY_AFTER_S)
    return 0.0


def _error_of(state: tenacity.RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome is not None else None
    if error is None:
        raise ValueError("tried again without an error")
    return error


def _wait_s(state: tenacity.RetryCallState) -> float:
    drawn = tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=MAX_WAIT_S)(state)
    return max(drawn, _retry_after_s(_error_of(state)))
