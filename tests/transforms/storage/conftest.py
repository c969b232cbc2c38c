"""Fixtures of the tests of storage."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest

from tests.support.stores.fault_proxy import Faults
from tests.support.stores.object_store import ObjectStore, missing, open_store


@pytest.fixture(scope="module")
def started() -> Iterator[Callable[[str], ObjectStore]]:
    """The emulator of a protocol, started when it is first asked for."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(protocol: str) -> ObjectStore:
            if reason := missing(protocol):
                pytest.skip(reason)
            return stack.enter_context(open_store(protocol))

        yield start


@pytest.fixture
def emulator(started: Callable[[str], ObjectStore]) -> Callable[[str], ObjectStore]:
    """The empty bucket of a protocol, without faults."""

    def reset(protocol: str) -> ObjectStore:
        store = started(protocol)
        store.proxy.faults = Faults()
        store.clear()
        return store

    return reset
