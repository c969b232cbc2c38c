"""What stores say of files, with errors that name the file and no secret."""

from __future__ import annotations

import pickle
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.support.fake_stores import HttpError
from transforms.errors import UsageError
from transforms.storage import filesystem, reading, urls, writing


def test_version_changes_with_the_content(folder: str) -> None:
    url = urls.join(folder, "a")
    writing.write_bytes(url, b"1")
    before = filesystem.stat(url).version
    writing.write_bytes(url, b"2")
    assert filesystem.stat(url).version != before


def test_stat_many_gives_errors_in_place(folder: str) -> None:
    there, absent = urls.join(folder, "a"), urls.join(folder, "b")
    writing.write_bytes(there, b"x")
    found = filesystem.stat_many([absent, there, absent])
    assert list(found) == [absent, there]
    assert isinstance(found[absent], FileNotFoundError)
    assert found[there] == filesystem.stat(there)
    assert filesystem.stat_many([]) == {}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://b/x", r"s3:// needs the extra \[s3\]: run pip install '.\[s3\]' in Earmark's"),
        ("az://b/x", r"az:// needs the extra \[azure\]: run pip install '.\[azure\]' in Earmark's"),
        ("nope://b/x", "Protocol not known: nope"),
    ],
)
def test_a_protocol_that_cannot_work_is_a_usage_error(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(protocol: str, **kwargs: Any) -> Any:
        if protocol == "nope":
            raise ValueError("Protocol not known: nope")
        raise ImportError(f"Install what {protocol} needs")

    monkeypatch.setattr(fsspec.core, "filesystem", missing)
    with pytest.raises(UsageError, match=message):
        reading.read_bytes(url)


class _BrokenFileSystem(MemoryFileSystem):
    """A store that fails, and quotes the whole URL as it does so."""

    protocol = "broken"
    error: Exception

    def info(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise self.error

    cat_file = open = info  # type: ignore[assignment]


fsspec.register_implementation("broken", _BrokenFileSystem, clobber=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (HttpError(403, "GET https://h/a?X-Amz-Signature=SECRET failed"), PermissionError),
        (HttpError(404, "https://u:SECRET@h/a?b=1"), FileNotFoundError),
        (HttpError(500, "see broken://h/a?sig=SECRET"), OSError),
        (TimeoutError("https://h/?token=SECRET"), TimeoutError),
        (PermissionError("https://h/?token=SECRET"), PermissionError),
    ],
)
def test_errors_are_os_errors_without_secrets(
    error: Exception, expected: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_BrokenFileSystem, "error", error, raising=False)
    url = "broken://h/a?sig=SECRET&v=1"
    for act in (filesystem.stat, reading.read_bytes):
        with pytest.raises(expected) as caught:
            act(url)
        assert type(caught.value) is expected
        assert "broken://h/a?v=1" in str(caught.value)
        assert "SECRET" not in str(caught.value)
        assert caught.value.__suppress_context__
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_unreachable_store_is_not_an_absent_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_BrokenFileSystem, "error", HttpError(500, "down"), raising=False)
    with pytest.raises(OSError, match="down"):
        filesystem.exists("broken://h/a")
    monkeypatch.setattr(_BrokenFileSystem, "error", FileNotFoundError("x"), raising=False)
    assert filesystem.exists("broken://h/a") is False
