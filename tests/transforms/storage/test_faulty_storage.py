"""Storage and whole runs on object stores that refuse, break off and lose answers."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest

from pipeline.cli.main import main
from tests.support.labelling import assert_same_rows
from tests.support.stores.fault_proxy import CUTS, KINDS, FaultProxy, Faults
from tests.support.stores.object_store import ObjectStore, damaged_commits
from tests.support.stores.store_runs import fill, label, rows_of
from tests.support.stores.web_server import QuietHandler, serve, serve_folder
from transforms.storage import filesystem, listing, reading, retries, writing

# A refusal, a lost answer, a body that is short without a sign; -m slow has the rest.
QUICK_KINDS = ("503", "reset_after", "cut_unframed")


@pytest.fixture(params=["s3", "gs"])
def store(
    request: pytest.FixtureRequest, emulator: Callable[[str], ObjectStore]
) -> Iterator[ObjectStore]:
    """An empty bucket without faults."""
    yield (store := emulator(request.param))
    store.proxy.faults = Faults()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patience of a real run, with waits a hundredth as long, in gcsfs's own policy, too."""
    gcsfs_retry = pytest.importorskip("gcsfs.retry")
    monkeypatch.setattr(retries, "RETRY_S", 120.0)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.005)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.2)
    short = SimpleNamespace(sleep=lambda delay_s: asyncio.sleep(delay_s / 100))
    monkeypatch.setattr(gcsfs_retry, "asyncio", short)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, store: ObjectStore) -> None:
    """Without what the libraries try by themselves."""
    fs, _ = filesystem.open_filesystem(store.url)
    if store.protocol == "gs":
        monkeypatch.setattr(type(fs), "_request", type(fs)._request.__wrapped__)
        return
    monkeypatch.setattr(type(fs), "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    type(fs).clear_instance_cache()


def first_of_each(number: int) -> Callable[[str, str], bool]:
    """Only the first requests of a method for a path."""
    seen: Counter[tuple[str, str]] = Counter()

    def is_among_them(method: str, path: str) -> bool:
        seen[method, path] += 1
        return seen[method, path] <= number

    return is_among_them


def http_url(store: ObjectStore, name: str) -> str:
    if store.protocol == "s3":
        return f"{store.http_url}/{name}"
    return f"{store.http_url}/{quote(name, safe='')}?alt=media"


def use_every_function(store: ObjectStore, tmp_path: Path) -> None:
    chance = random.Random(1)
    names = [f"in/{number}.bin" for number in range(3)]
    data = dict(zip(names, map(chance.randbytes, (0, 100, 50_000)), strict=True))
    for name in names:
        writing.write_bytes(f"{store.url}/{name}", data[name])
    urls = [f"{store.url}/{name}" for name in names]
    staged = tmp_path / "staged"
    staged.write_bytes(data[names[2]])
    writing.put_file(str(staged), f"{store.url}/put/a.bin")
    assert store.objects() == {**data, "put/a.bin": data[names[2]]}
    for name, url in zip(names, urls, strict=True):
        assert filesystem.stat(url).size == len(data[name])
        assert reading.read_bytes(url) == data[name]
        assert reading.read_bytes(http_url(store, name)) == data[name]
        reading.get_file(url, str(tmp_path / "got"))
        assert (tmp_path / "got").read_bytes() == data[name]
    with reading.open_read(urls[2], 10_000) as file:
        for start in (40_001, 0, 25_000, 49_999):
            file.seek(start)
            assert file.read(9_000) == data[names[2]][start : start + 9_000]
    assert [filesystem.exists(url) for url in (*urls, f"{urls[0]}x")] == [True, True, True, False]
    assert filesystem.is_folder(f"{store.url}/in") and not filesystem.is_folder(urls[1])
    assert [info.url for info in listing.list_files(f"{store.url}/in")] == urls
    assert listing.list_names(f"{store.url}/in") == ["0.bin", "1.bin", "2.bin"]
    assert listing.list_names(f"{store.url}/absent") == []
    assert [info.url for info in listing.glob_files(f"{store.url}/in/[12].bin")] == urls[1:]
    found = filesystem.stat_many([*urls, f"{urls[0]}x"])
    assert [getattr(info, "size", None) for info in found.values()] == [0, 100, 50_000, None]
    assert isinstance(found[f"{urls[0]}x"], FileNotFoundError)
    assert writing.create_bytes(f"{store.url}/lease", b"mine") is True
    assert writing.create_bytes(f"{store.url}/lease", b"another's") is False
    writing.remove(urls[0])
    writing.remove(urls[0])
    assert sorted(store.names()) == [names[1], names[2], "lease", "put/a.bin"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK_KINDS else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_every_fault_passes(store: ObjectStore, tmp_path: Path, kind: str) -> None:
    store.proxy.faults = Faults(rate=1, kinds=(kind,), target=first_of_each(1), slow_s=0.02)
    use_every_function(store, tmp_path)
    assert store.proxy.counts.total() > 15
    assert store.proxy.counts[kind] > 0


def test_faults_at_random_pass(store: ObjectStore, tmp_path: Path) -> None:
    store.proxy.faults = Faults(rate=0.3, slow_s=0.02, seed=1)
    use_every_function(store, tmp_path)
    assert store.proxy.counts.total() > 15


@pytest.mark.usefixtures("alone")
def test_a_large_upload_is_whole_or_not_there(store: ObjectStore, tmp_path: Path) -> None:
    # gcsfs sends what is larger than 5 MB in a session, which the store may forget.
    data = random.Random(1).randbytes(6 << 20)
    for seed in range(3):
        staged = tmp_path / "staged"
        staged.write_bytes(data)
        uploads = Faults(rate=0.5, seed=seed, target=lambda method, path: method != "GET")
        store.proxy.faults = uploads
        writing.put_file(str(staged), f"{store.url}/large-{seed}")
        assert not staged.exists()
        assert store.objects()[f"large-{seed}"] == data
        store.clear()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("400", OSError),
        ("401", PermissionError),
        ("403", PermissionError),
        ("404", FileNotFoundError),
        ("410", FileNotFoundError),
        ("501", OSError),
    ],
)
def test_what_will_not_pass_is_not_asked_again(
    store: ObjectStore, status: str, expected: type[OSError]
) -> None:
    store.put("a", b"1")
    store.proxy.faults = Faults(rate=1, kinds=(status,))
    with pytest.raises(expected) as caught:
        reading.read_bytes(http_url(store, "a"))
    assert type(caught.value) is expected
    assert "tried" not in str(caught.value)
    assert store.proxy.num_requests == 2


def test_a_server_is_given_the_time_it_asks_for(store: ObjectStore) -> None:
    store.put("a", b"1")
    first = first_of_each(1)
    store.proxy.faults = Faults(rate=1, kinds=("429",), target=first, retry_after_s=1)
    started = time.monotonic()
    assert reading.read_bytes(http_url(store, "a")) == b"1"
    assert time.monotonic() - started > 1  # Retry-After: 1
    assert store.proxy.counts["429"] == 2  # HEAD and GET


def test_an_answer_lost_is_no_lease_lost(store: ObjectStore) -> None:
    for number in range(3):
        store.proxy.faults = Faults(rate=1, kinds=("reset_after",), target=first_of_each(1))
        url = f"{store.url}/lease-{number}"
        assert writing.create_bytes(url, b"mine") is True
        assert store.proxy.counts["reset_after"] >= 1
        assert writing.create_bytes(url, b"another's") is False
    assert set(store.objects().values()) == {b"mine"}


def test_of_many_one_gets_the_lease(store: ObjectStore) -> None:
    if not store.is_exclusive:
        pytest.skip("gcp-storage-emulator has no preconditions; fake-gcs-server has")
    for seed in range(3):
        store.proxy.faults = Faults(rate=0.3, seed=seed, slow_s=0.02)
        url, start = f"{store.url}/lease-{seed}", threading.Barrier(6)

        def create(number: int, url: str = url, start: threading.Barrier = start) -> bool:
            start.wait()
            return writing.create_bytes(url, b"%d" % number)

        with ThreadPoolExecutor(6) as pool:
            made = list(pool.map(create, range(6)))
        assert made.count(True) == 1
        assert store.objects()[f"lease-{seed}"] == b"%d" % made.index(True)


def test_a_file_that_changes_while_it_is_read_is_not_patched_together(store: ObjectStore) -> None:
    store.put("a", b"1" * 100_000)
    with reading.open_read(f"{store.url}/a", 70_000) as file:
        assert file.read(10) == b"1" * 10
        store.put("a", b"2" * 100_000)
        if store.protocol == "gs" and not store.is_exclusive:
            pytest.skip("gcp-storage-emulator gives the new content for the old generation")
        with pytest.raises(OSError, match=f"{store.url}/a"):
            file.read()


# --- A web server without ranges --------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 12_000_000])
def test_a_server_without_ranges_gives_the_whole_file_or_an_error(
    tmp_path: Path, size: int
) -> None:
    data = random.Random(1).randbytes(size)
    (tmp_path / "a.bin").write_bytes(data)
    with (
        serve_folder(tmp_path, has_ranges=False) as web,
        FaultProxy("127.0.0.1", web.port) as proxy,
    ):
        url = f"{proxy.url}/a.bin"
        assert reading.read_bytes(url) == data
        for kind in (*CUTS, "reset_after", "503"):
            proxy.faults = Faults(rate=1, kinds=(kind,), target=first_of_each(3))
            assert reading.read_bytes(url) == data
            assert proxy.counts.total() >= 3
        reading.get_file(url, str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == data
        if size:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(retries, "RETRY_S", 0.01)
                always = Faults(rate=1, kinds=CUTS, target=lambda method, path: method == "GET")
                proxy.faults = always
                with pytest.raises(OSError, match=r"a\.bin: .*; tried \d+ times"):
                    reading.get_file(url, str(tmp_path / "short"))
        assert not (tmp_path / "short").exists()


# --- A web server whose file changes -----------------------------------------------------------


class _Changing(QuietHandler):
    """Serves ``content`` with the ``validators``; calls ``on_get`` before each answer."""

    content = b""
    validators: dict[str, str]
    on_get: Callable[[], None]
    has_ranges = True
    breaks_after: int | None = None

    def answer(self) -> None:
        if self.command == "HEAD":
            # As from a server in front, which knows the file by another etag.
            self.reply(200, self.content, {"ETag": '"in-front"'})
            return
        type(self).on_get()
        if self.has_ranges:
            self.reply_content(self.content, self.validators)
            return
        length = {"Content-Length": str(len(self.content))}
        self.reply(200, self.content[: self.breaks_after], {**self.validators, **length})
        self.close_connection = True


@pytest.fixture
def changing() -> Iterator[tuple[type[_Changing], str]]:
    handler = type(
        "Handler", (_Changing,), {"validators": {}, "on_get": staticmethod(lambda: None)}
    )
    with serve(handler) as port:
        yield handler, f"http://127.0.0.1:{port}/a.wav"


MONDAY, TUESDAY = "Mon, 05 Jan 2026 00:00:00 GMT", "Tue, 06 Jan 2026 00:00:00 GMT"


@pytest.mark.parametrize(
    ("before", "after", "size", "said"),
    [
        ({"ETag": '"one"'}, {"ETag": '"two"'}, 200_000, "its ETag was one, and is two"),
        (
            {"Last-Modified": MONDAY},
            {"Last-Modified": TUESDAY},
            200_000,
            f"its Last-Modified was {MONDAY}, and is {TUESDAY}",
        ),
        ({}, {}, 200_001, "it had 200000 bytes, and has 200001"),
        ({}, {}, 100_000, "it had 200000 bytes, and has 100000"),
    ],
)
def test_a_file_on_the_web_that_changes_between_two_blocks_is_an_error(
    changing: tuple[type[_Changing], str],
    before: dict[str, str],
    after: dict[str, str],
    size: int,
    said: str,
) -> None:
    server, url = changing
    server.content, server.validators = b"1" * 200_000, before
    with reading.open_read(url, 70_000) as file:
        assert file.read(100_000) == b"1" * 100_000
        server.content, server.validators = b"2" * size, after
        with pytest.raises(OSError, match="changed") as caught:
            file.read()
    assert str(caught.value) == f"{url}: was changed while it was read ({said})"


def test_a_file_on_the_web_that_stays_is_read_whatever_packs_it(
    changing: tuple[type[_Changing], str],
) -> None:
    server, url = changing
    server.content = random.Random(1).randbytes(200_000)
    etags = itertools.cycle(['"one"', 'W/"one"', '"one-gzip"', '"one;gzip"'])
    server.on_get = staticmethod(lambda: setattr(server, "validators", {"ETag": next(etags)}))
    with reading.open_read(url, 30_000) as file:
        assert file.read() == server.content


def test_a_stream_that_breaks_is_not_gone_on_with_in_another_file(
    changing: tuple[type[_Changing], str],
) -> None:
    server, url = changing
    server.has_ranges = False
    server.breaks_after = 150_000
    etags = iter(['"one"', '"one"', '"one"'])
    server.content, server.validators = b"1" * 200_000, {"ETag": '"one"'}

    def change() -> None:
        if next(etags, None) is None:
            server.content, server.validators = b"2" * 200_000, {"ETag": '"two"'}

    server.on_get = staticmethod(change)
    with reading.open_read(url, 70_000) as file, pytest.raises(OSError, match="changed") as caught:
        file.read()
    said = "was changed while it was read (its ETag was one, and is two)"
    assert str(caught.value) == f"{url}: {said}"


def test_a_file_that_always_fails_holds_up_nothing_but_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FILE_S", 0.05)
    names = [f"{number}.bin" for number in range(8)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    with serve_folder(tmp_path) as web, FaultProxy("127.0.0.1", web.port) as proxy:
        proxy.faults = Faults(rate=1, kinds=("500",), target=lambda method, path: path > "/2")
        began_s = time.monotonic()
        assert reading.read_bytes(f"{proxy.url}/0.bin") == b"0.bin"
        for name in names[2:]:
            with pytest.raises(OSError, match=r"the store answered 500.*its store answers for"):
                reading.read_bytes(f"{proxy.url}/{name}")
            assert proxy.url not in retries._gave_up_at
        assert time.monotonic() - began_s < 20  # patience with the store would be 120 s each
        assert reading.read_bytes(f"{proxy.url}/1.bin") == b"1.bin"


# --- Whole runs -------------------------------------------------------------------------------


def run_until_done(store: ObjectStore, model: Path, inputs: list[str], output: str) -> int:
    """How many runs it took; after each, what is committed is whole."""
    more: list[str] = []
    for attempt in range(1, 11):
        code = label(inputs, f"{store.url}/{output}", model, *more)
        assert damaged_commits(store, output) == []
        assert code in (0, 1, 3)
        if code == 0:
            return attempt
        more = ["--retry-failed"] if code == 3 else more
    raise AssertionError("not done after ten runs")


@pytest.mark.parametrize(
    ("rate", "seed", "num_each"),
    [
        (0.05, 4, 2),
        *(pytest.param(0.05, seed, 4, marks=pytest.mark.slow) for seed in (1, 2, 3)),
        *(pytest.param(0.3, seed, 4, marks=pytest.mark.slow) for seed in (1, 2, 3)),
    ],
)
def test_a_run_on_a_faulty_store_ends_as_on_a_sound_one(
    store: ObjectStore, tiny_model: Path, rate: float, seed: int, num_each: int
) -> None:
    inputs = fill(store, num_each)
    assert label(inputs, f"{store.url}/sound", tiny_model) == 0
    store.proxy.faults = Faults(rate=rate, seed=seed, slow_s=0.05)
    run_until_done(store, tiny_model, inputs, "faulty")
    assert store.proxy.counts.total() > 0
    store.proxy.faults = Faults()
    assert main(["verify", f"{store.url}/faulty", "--quiet"]) == 0
    for part in ("clips", "windows", "errors"):
        assert_same_rows(rows_of(store, "faulty", part), rows_of(store, "sound", part))
    assert len(rows_of(store, "faulty", "clips")) == 4 * num_each


@pytest.mark.usefixtures("alone")
def test_a_store_that_goes_down_ends_the_run_with_a_message_and_the_next_goes_on(
    store: ObjectStore,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 0.5)
    inputs = fill(store)

    def is_after_the_first_commit(method: str, path: str) -> bool:
        return method in ("PUT", "POST") and any("/_commits/" in name for name in store.names())

    store.proxy.faults = Faults(rate=1, kinds=("503",), target=is_after_the_first_commit)
    assert label(inputs, f"{store.url}/out", tiny_model) == 1
    said = capsys.readouterr().err.splitlines()
    (last,) = (line for line in said if line.startswith("earmark: "))
    assert last.startswith(f"earmark: {store.url}/out cannot be written: ")
    assert re.search(rf"{store.url}/out/\w+/\w+\.\w+: the store answered 503", last)
    assert re.search(r"; tried \d+ times in \d+ s", last) and "[while running" not in last
    assert "run the same command again" in last
    assert not any("Traceback" in line for line in said)
    assert damaged_commits(store, "out") == []
    done = [name for name in store.names() if name.startswith("out/_commits/")]
    assert len(done) == 1
    store.proxy.faults = Faults()
    assert label(inputs, f"{store.url}/out", tiny_model) == 0
    assert done[0] in store.names()
    assert len(rows_of(store, "out", "clips")) == 8
    assert main(["verify", f"{store.url}/out", "--quiet"]) == 0


@pytest.mark.usefixtures("alone")
def test_an_input_that_cannot_be_read_costs_itself_and_is_taken_up_again(
    store: ObjectStore, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 0.05)
    inputs = fill(store)

    def is_one_of_the_files(method: str, path: str) -> bool:
        wanted = "alt=media" in path if store.protocol == "gs" else method == "GET"
        return wanted and "loose-1.wav" in path

    store.proxy.faults = Faults(rate=1, kinds=("503", "cut"), target=is_one_of_the_files)
    assert label(inputs, f"{store.url}/out", tiny_model) == 3
    (row,) = rows_of(store, "out", "errors")
    assert (row["uri"], row["stage"]) == ("in/deep/a b/loose-1.wav", "read")
    assert "tried" in row["message"]
    store.proxy.faults = Faults()
    assert label(inputs, f"{store.url}/out", tiny_model, "--retry-failed") == 0
    assert len(rows_of(store, "out", "clips")) == 8
    assert rows_of(store, "out", "errors") == []
