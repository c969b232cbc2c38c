"""Asking a store again: which of its errors may pass, how long to wait, when to give up.

One policy for every store. fsspec's libraries have some of their own (gcsfs asks up to six times,
s3fs five, http never); those stay, and this one goes by time, so that the two do not multiply.
"""

from __future__ import annotations

import itertools
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import tenacity

logger = logging.getLogger(__name__)

# Google's own client gives up after this long, too.
RETRY_S = 120.0
# Who has never answered this process is more likely misspelt or switched off than busy.
FIRST_CONTACT_S = 15.0
# A request that hangs until its timeout may take up all of RETRY_S; it is still asked again.
MIN_TRIES = 3
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

_T = TypeVar("_T")
_gave_up_at: dict[str, float] = {}
_have_answered: set[str] = set()


class ShortBodyError(OSError):
    """Fewer bytes have come, or been stored, than there are."""


def ask(store: str, act: Callable[[], _T], may_pass: Callable[[BaseException], bool]) -> _T:
    """The result of ``act``, tried again while its error may pass.

    After ``RETRY_S`` (``FIRST_CONTACT_S`` for a store that has never answered, be it with an error;
    and ``MIN_TRIES``) the error is raised, with a note of how often it was tried. A store that has
    been given up on is then asked once each time, until it answers or ``RETRY_S`` have gone by: a
    run with many items must not wait out each of them.

    Args:
        store: Whom ``act`` asks.
        act: One request or several; must do no harm when done twice.
        may_pass: Which errors are worth another try; ``may_pass`` below, or more.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=_wait_s,
        stop=partial(_is_enough, store),
        before_sleep=_Notice(store),
        retry_error_callback=partial(_give_up, store),
    )
    try:
        result = retrying(act)
    except Exception as error:
        if not may_pass(error):
            _remember_answer(store)
        raise
    _remember_answer(store)
    return result


def _remember_answer(store: str) -> None:
    _gave_up_at.pop(store, None)
    _have_answered.add(store)


def _patience_s(store: str) -> float:
    return RETRY_S if store in _have_answered else min(RETRY_S, FIRST_CONTACT_S)


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


def _is_enough(store: str, state: tenacity.RetryCallState) -> bool:
    if status_of(_error_of(state)) is not None:
        _have_answered.add(store)
    given_up_at = _gave_up_at.get(store)
    if given_up_at is not None and time.monotonic() - given_up_at < RETRY_S:
        return True
    elapsed_s = (state.seconds_since_start or 0.0) + state.upcoming_sleep
    return state.attempt_number >= MIN_TRIES and elapsed_s > _patience_s(store)


def _give_up(store: str, state: tenacity.RetryCallState) -> Any:
    error, elapsed_s = _error_of(state), state.seconds_since_start or 0.0
    if state.attempt_number > 1:
        _gave_up_at[store] = time.monotonic()
        error.add_note(f"tried {state.attempt_number} times in {elapsed_s:.0f} s")
    raise error


class _Notice:
    """Says once why nothing goes on, where that takes long."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._said = False

    def __call__(self, state: tenacity.RetryCallState) -> None:
        elapsed_s = (state.seconds_since_start or 0.0) + state.upcoming_sleep
        if elapsed_s > NOTICE_S and not self._said:
            self._said = True
            logger.warning(
                "%s: %s (%d times by now); trying again for up to %.0f s",
                self._store,
                type(_error_of(state)).__name__,
                state.attempt_number,
                _patience_s(self._store),
            )
