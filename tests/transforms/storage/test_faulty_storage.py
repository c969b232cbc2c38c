"""Storage and whole runs on object stores that refuse, break off and lose answers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import io
import itertools
import json
import random
import re
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.cli.main import main
from tests.support.stores.fault_proxy import CUTS, KINDS, FaultProxy, Faults
from tests.support.stores.object_store import (
    ObjectStore,
    damaged_commits,
    missing,
    open_store,
    result_rows,
)
from transforms.storage import filesystem, listing, reading, retries, writing

RATE_HZ = 16_000
# A refusal, a lost answer, a body that is short without a sign; -m slow has the rest.
QUICK_KINDS = ("503", "reset_after", "cut_unframed")


@pytest.fixture(scope="module", params=["s3", "gs"])
def emulator(request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    if reason := missing(request.param):
        pytest.skip(reason)
    with open_store(request.param) as store:
        yield store


@pytest.fixture
def store(emulator: ObjectStore) -> Iterator[ObjectStore]:
    """An empty bucket without faults."""
    emulator.clear()
    emulator.proxy.faults = Faults()
    yield emulator
    emulator.proxy.faults = Faults()


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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_faults_at_random_pass_with_any_seed(store: ObjectStore, tmp_path: Path, seed: int) -> None:
    for number in range(5):
        store.clear()
        store.proxy.faults = Faults(rate=0.3, slow_s=0.02, seed=10 * seed + number)
        use_every_function(store, tmp_path)


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


@pytest.mark.usefixtures("alone")
def test_giving_up_says_what_and_how_often(store: ObjectStore) -> None:
    writing.write_bytes(f"{store.url}/a", b"1")
    tried = r"; tried [3-9]\d* times in \d+ s; check the network, and try again later$"
    retries_s = 0.05
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries, "RETRY_S", retries_s)
        store.proxy.faults = Faults(down_after=0)
        for act in (
            lambda: reading.read_bytes(f"{store.url}/a"),
            lambda: writing.write_bytes(f"{store.url}/a", b"2"),
            lambda: listing.list_names(store.url),
        ):
            retries._gave_up_at.clear()
            with pytest.raises(OSError, match=rf"^{store.url}.*{tried}"):
                act()
    assert store.objects() == {"a": b"1"}


@pytest.mark.usefixtures("alone")
def test_a_store_that_was_given_up_on_is_asked_once_until_it_answers(store: ObjectStore) -> None:
    url = http_url(store, "a")
    store.put("a", b"1")
    retries._gave_up_at[store.proxy.url] = time.monotonic()
    store.proxy.faults = Faults(rate=1, kinds=("503",), target=first_of_each(2))
    with pytest.raises(OSError, match="the store answered 503"):
        reading.read_bytes(url)
    assert store.proxy.num_requests == 2  # HEAD, and GET for what HEAD would not say
    store.proxy.faults = Faults()
    assert reading.read_bytes(url) == b"1"
    store.proxy.faults = Faults(rate=1, kinds=("503",), target=first_of_each(4))
    assert reading.read_bytes(url) == b"1"


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


class _NoRanges(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[FaultProxy]:
    handler = functools.partial(_NoRanges, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        with FaultProxy("127.0.0.1", server.server_port) as proxy:
            yield proxy
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("size", [0, 100, 12_000_000])
def test_a_server_without_ranges_gives_the_whole_file_or_an_error(
    tmp_path: Path, size: int
) -> None:
    data = random.Random(1).randbytes(size)
    (tmp_path / "a.bin").write_bytes(data)
    with web_server(tmp_path) as proxy:
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


class _Changing(http.server.BaseHTTPRequestHandler):
    """Serves ``content`` in ranges with the ``validators``; calls ``on_get`` before each answer."""

    protocol_version = "HTTP/1.1"
    content = b""
    validators: dict[str, str]
    on_get: Callable[[], None]
    has_ranges = True
    breaks_after: int | None = None

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        # As from a server in front, which knows the file by another etag.
        self._head(200, len(self.content), {"ETag": '"in-front"'})

    def do_GET(self) -> None:
        type(self).on_get()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None or not self.has_ranges:
            self._head(200, len(self.content), self.validators)
            self.wfile.write(self.content[: self.breaks_after])
            self.close_connection = True
            return
        start, end = int(wanted[1]), int(wanted[2]) + 1
        total = len(self.content)
        if start >= total:
            self._head(416, 0, {"Content-Range": f"bytes */{total}"})
            return
        part = self.content[start:end]
        span = f"bytes {start}-{start + len(part) - 1}/{total}"
        self._head(206, len(part), {**self.validators, "Content-Range": span})
        self.wfile.write(part)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()


class _QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


@pytest.fixture
def changing() -> Iterator[tuple[type[_Changing], str]]:
    handler = type(
        "Handler", (_Changing,), {"validators": {}, "on_get": staticmethod(lambda: None)}
    )
    server = _QuietServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}/a.wav"
    server.shutdown()
    server.server_close()


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
    with web_server(tmp_path) as proxy:
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


def wav(seed: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).normal(0, 0.1, RATE_HZ)
    soundfile.write(file, noise, RATE_HZ, format="WAV", subtype="PCM_16")
    return file.getvalue()


def fill(store: ObjectStore, num_each: int) -> list[str]:
    """Loose files, a tar, a Parquet file and a manifest; the arguments that name them."""
    seeds = iter(range(4 * num_each))
    for number in range(num_each):
        store.put(f"in/loose-{number}.wav", wav(next(seeds)))
        store.put(f"elsewhere/listed-{number}.wav", wav(next(seeds)))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as shard:
        for number in range(num_each):
            info = tarfile.TarInfo(f"member-{number}.wav")
            data = wav(next(seeds))
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    store.put("in/shard.tar", tar.getvalue())
    audio = [{"bytes": wav(next(seeds)), "path": f"row-{n}.wav"} for n in range(num_each)]
    table = io.BytesIO()
    pq.write_table(pa.table({"audio": audio, "text": ["x"] * num_each}), table, row_group_size=2)
    store.put("in/rows.parquet", table.getvalue())
    lines = (json.dumps({"uri": f"elsewhere/listed-{n}.wav"}) for n in range(num_each))
    store.put("list.jsonl", "\n".join(lines).encode())
    return [f"{store.url}/in", f"{store.url}/list.jsonl"]


def label(store: ObjectStore, model: Path, inputs: list[str], output: str, *more: str) -> int:
    options = ["--device", "cpu", "--precision", "fp32", "--batch-size", "2", "--quiet"]
    sets = ["--set", "units.windows=4", "--set", "decode.processes=1"]
    where = ["--output", f"{store.url}/{output}", "--model", str(model)]
    return main(["label", *inputs, *where, *options, *sets, *more])


def assert_same_rows(store: ObjectStore, expected: str, found: str) -> None:
    for part in ("clips", "windows", "errors"):
        ours, theirs = result_rows(store, expected, part), result_rows(store, found, part)
        assert [row["clip_id"] for row in theirs] == [row["clip_id"] for row in ours]
        for one, other in zip(ours, theirs, strict=True):
            for name, value in one.items():
                if name == "embedding":
                    np.testing.assert_allclose(other[name], value, atol=1e-5)
                elif name != "labels":
                    assert other[name] == value


def run_until_done(store: ObjectStore, model: Path, inputs: list[str], output: str) -> int:
    """How many runs it took; after each, what is committed is whole."""
    more: list[str] = []
    for attempt in range(1, 11):
        code = label(store, model, inputs, output, *more)
        assert damaged_commits(store, output) == []
        assert code in (0, 1, 3)
        if code == 0:
            return attempt
        more = ["--retry-failed"] if code == 3 else more
    raise AssertionError("not done after ten runs")


@pytest.mark.usefixtures("hurry")
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
    assert label(store, tiny_model, inputs, "sound") == 0
    store.proxy.faults = Faults(rate=rate, seed=seed, slow_s=0.05)
    run_until_done(store, tiny_model, inputs, "faulty")
    assert store.proxy.counts.total() > 0
    store.proxy.faults = Faults()
    assert main(["verify", f"{store.url}/faulty", "--quiet"]) == 0
    assert_same_rows(store, "sound", "faulty")
    assert len(result_rows(store, "faulty", "clips")) == 4 * num_each


@pytest.mark.usefixtures("alone")
def test_a_store_that_goes_down_ends_the_run_with_a_message_and_the_next_goes_on(
    store: ObjectStore,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 0.5)
    inputs = fill(store, 2)

    def is_after_the_first_commit(method: str, path: str) -> bool:
        return method in ("PUT", "POST") and any("/_commits/" in name for name in store.names())

    store.proxy.faults = Faults(rate=1, kinds=("503",), target=is_after_the_first_commit)
    assert label(store, tiny_model, inputs, "out") == 1
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
    assert label(store, tiny_model, inputs, "out") == 0
    assert done[0] in store.names()
    assert len(result_rows(store, "out", "clips")) == 8
    assert main(["verify", f"{store.url}/out", "--quiet"]) == 0


@pytest.mark.usefixtures("alone")
def test_an_input_that_cannot_be_read_costs_itself_and_is_taken_up_again(
    store: ObjectStore, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 0.05)
    inputs = fill(store, 2)

    def is_one_of_the_files(method: str, path: str) -> bool:
        wanted = "alt=media" in path if store.protocol == "gs" else method == "GET"
        return wanted and "loose-1.wav" in path

    store.proxy.faults = Faults(rate=1, kinds=("503", "cut"), target=is_one_of_the_files)
    assert label(store, tiny_model, inputs, "out") == 3
    (row,) = result_rows(store, "out", "errors")
    assert (row["uri"], row["stage"]) == (f"{store.url}/in/loose-1.wav", "read")
    assert "tried" in row["message"]
    store.proxy.faults = Faults()
    assert label(store, tiny_model, inputs, "out", "--retry-failed") == 0
    assert len(result_rows(store, "out", "clips")) == 8
    assert result_rows(store, "out", "errors") == []
