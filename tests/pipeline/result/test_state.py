"""The state of a result: what is refused, and how errors name the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.graph import RunTotals
from pipeline.result import state
from pipeline.result.state import (
    FinishRun,
    ResultState,
    check_removable,
    check_same_results,
    read_result,
    read_run,
    wait_for_writers,
)
from pipeline.terminal.time_report import UNTIMED
from transforms.errors import AccountingError, OutputError
from transforms.results.commits import Commit, Ledger, UnitTotals
from transforms.storage import urls, writing

OUTPUT = "memory://someone:PASSWORD@host/out"
PUBLIC = "memory://host/out"


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def finish(*, num_units: int = 0, **changes: Any) -> Callable[[], None]:
    counts = {"carried_items": 0, "vanished_items": 0, "vanished_failures": 0, "num_found_items": 0}
    values = {"kept": RunTotals(), "num_units": num_units, **counts, **changes}
    step = FinishRun(OUTPUT, {}, UNTIMED, **values)
    return lambda: step(RunTotals())


def read_a_file() -> None:
    writing.write_bytes(OUTPUT, b"")
    read_result(OUTPUT)


def read_a_foreign_record() -> None:
    writing.write_bytes(urls.join(OUTPUT, "run.json"), b"{}")
    read_run(OUTPUT)


def overwrite_foreign_files() -> None:
    writing.write_bytes(urls.join(OUTPUT, "clips", "mine.parquet"), b"")
    check_removable(read_result(OUTPUT))


def mix_settings() -> None:
    commit = Commit("u", "another fingerprint", (), Ledger("files", None, ()), {}, UnitTotals(), ())
    check_same_results(ResultState(OUTPUT, commits={"u": commit}), {"top_k": 10}, "tiny")


def read_a_denied_folder() -> None:
    def deny(url: str) -> bool:
        raise PermissionError(f"{PUBLIC}: access is denied")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(state.filesystem, "exists", deny)
        read_result(OUTPUT)


@pytest.mark.parametrize(
    "act",
    [
        read_a_file,
        read_a_foreign_record,
        read_a_denied_folder,
        overwrite_foreign_files,
        mix_settings,
        finish(num_found_items=3),
        finish(kept=RunTotals(units=3)),
    ],
)
def test_an_error_names_the_output_without_its_password(act: Callable[[], None]) -> None:
    with pytest.raises((OutputError, AccountingError)) as caught:
        act()
    assert PUBLIC in str(caught.value)
    assert "PASSWORD" not in str(caught.value)


def test_waiting_for_writers_names_the_output_without_its_password(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(state, "WRITERS_PATIENCE_S", 0.0)
    monkeypatch.setattr(state, "are_commits_held", lambda output: True)
    with pytest.raises(OutputError, match="did not end") as caught:
        wait_for_writers(OUTPUT)
    assert "PASSWORD" not in str(caught.value)
    assert PUBLIC in caplog.text
    assert "PASSWORD" not in caplog.text
