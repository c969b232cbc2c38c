"""One body over every store: the same command, the same rows, and how much is asked of the store.

``s3`` is moto's server, ``gs`` is fake-gcs-server or else gcp-storage-emulator (see
``tests/support/stores``), ``http`` a web server with index pages and ranges, ``memory`` fsspec's
own. The head of pytest's report says which emulators there are.
"""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import multiprocessing
import random
import re
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.cli.main import main
from tests.support.audio_factory import encode, noise
from tests.support.model_factory import TINY_LABELS
from tests.support.stores.fault_proxy import FaultProxy, Faults
from tests.support.stores.object_store import ObjectStore, missing, open_store
from transforms.records import ContainerSlice, Item, WorkUnit
from transforms.results.write_units import OpenUnit
from transforms.sources.read_unit import read_unit
from transforms.sources.tar import TarReader
from transforms.storage import filesystem, listing, reading, writing

RATE_HZ = 16_000
MIB = 1 << 20


class Place(Protocol):
    """Where files lie; names are below ``url``, and all but ``url`` goes past the door."""

    url: str

    def put(self, name: str, data: bytes) -> None: ...
    def get(self, name: str) -> bytes: ...
    def names(self) -> list[str]: ...
    def remove(self, name: str) -> None: ...


@dataclass(frozen=True)
class Folder:
    """A folder on this machine, under the name that the store gives it."""

    path: Path
    url: str

    def put(self, name: str, data: bytes) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(data)

    def get(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def names(self) -> list[str]:
        files = (path for path in self.path.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.path)) for path in files)

    def remove(self, name: str) -> None:
        (self.path / name).unlink()


@dataclass(frozen=True)
class Memory:
    """A folder of fsspec's ``memory://``."""

    url: str

    def put(self, name: str, data: bytes) -> None:
        fsspec.filesystem("memory").pipe_file(f"{self.url}/{name}", data)

    def get(self, name: str) -> bytes:
        return bytes(fsspec.filesystem("memory").cat_file(f"{self.url}/{name}"))

    def names(self) -> list[str]:
        root = self.url.removeprefix("memory:/")
        return sorted(n[len(root) + 1 :] for n in fsspec.filesystem("memory").find(self.url))

    def remove(self, name: str) -> None:
        fsspec.filesystem("memory").rm_file(f"{self.url}/{name}")


class _RangeHandler(http.server.SimpleHTTPRequestHandler):
    """What is there already, index pages included, and ranges."""

    protocol_version = "HTTP/1.1"
    methods: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def handle_one_request(self) -> None:
        super().handle_one_request()
        if self.command:
            self.methods.append(self.command)

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        size = path.stat().st_size
        start, end = int(wanted[1]), min(int(wanted[2]) + 1, size)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            while start < end and (data := file.read(min(64 << 10, end - start))):
                self.wfile.write(data)
                start += len(data)


@dataclass(frozen=True)
class WebServer:
    """A folder behind a web server, and the methods of the requests that have come."""

    folder: Path
    port: int
    methods: list[str] = field(default_factory=list)


@contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    methods: list[str] = []
    handler = type("Handler", (_RangeHandler,), {"methods": methods})
    made = functools.partial(handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), made)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield WebServer(folder, server.server_port, methods)
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def emulators() -> Iterator[dict[str, ObjectStore]]:
    """The emulators that have been asked for, each started once."""
    stores: dict[str, ObjectStore] = {}
    contexts = []
    yield _Started(stores, contexts)
    for context in reversed(contexts):
        context.__exit__(None, None, None)


class _Started(dict[str, ObjectStore]):
    def __init__(self, stores: dict[str, ObjectStore], contexts: list[Any]) -> None:
        super().__init__(stores)
        self._contexts = contexts

    def __missing__(self, protocol: str) -> ObjectStore:
        if reason := missing(protocol):
            pytest.skip(reason)
        context = open_store(protocol)
        self[protocol] = context.__enter__()
        self._contexts.append(context)
        return self[protocol]


@pytest.fixture(params=["s3", "gs", "memory"])
def place(
    request: pytest.FixtureRequest,
    emulators: dict[str, ObjectStore],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Place]:
    """An empty store that can be written."""
    if request.param == "memory":
        # The command refuses it, because it ends with the process; this process goes on.
        monkeypatch.setattr("pipeline.cli.commands.check_output_lasts", lambda output: None)
        yield Memory("memory://stores")
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
        return
    store = emulators[request.param]
    store.clear()
    store.proxy.faults = Faults()
    yield store


# --- The same command everywhere --------------------------------------------------------------


def wav(seed: int, seconds: float = 1.0) -> bytes:
    return encode(noise(seconds, seed=seed), RATE_HZ)


@functools.cache
def dataset() -> dict[str, bytes]:
    """Loose files in folders, a tar with labels, a Parquet file, a manifest with a segment."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as shard:
        for number in range(2):
            for ending, data in (("wav", wav(10 + number)), ("json", b'{"label": "dog"}')):
                info = tarfile.TarInfo(f"member-{number}.{ending}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    table = io.BytesIO()
    audio = [{"bytes": wav(20 + number), "path": f"row-{number}.wav"} for number in range(2)]
    pq.write_table(pa.table({"audio": audio, "label": ["rain", "dog"]}), table)
    rows: list[dict[str, object]] = [
        {"uri": "elsewhere/long.wav", "start_s": 1.0, "end_s": 2.5, "label": "rooster"},
        {"uri": "elsewhere/long.wav", "start_s": 0.25, "end_s": 1.0},
    ]
    return {
        "in/a b.wav": wav(0),
        "in/deep/er/c.flac": encode(noise(1.0, seed=1), RATE_HZ, "flac"),
        "in/notes.txt": b"of another kind",
        "in/rows.parquet": table.getvalue(),
        "in/shard.tar": tar.getvalue(),
        "elsewhere/long.wav": wav(30, 3.0),
        "elsewhere/single.wav": wav(31),
        "list.jsonl": "\n".join(map(json.dumps, rows)).encode(),
    }


def inputs(url: str) -> list[str]:
    return [f"{url}/in", f"{url}/list.jsonl", f"{url}/elsewhere/single.wav"]


def run(command: str, sources: list[str], output: str, model: str, *more: str) -> int:
    options = ["--device=cpu", "--precision=fp32", "--batch-size=2"]
    sets = ["--set=units.windows=2", "--set=decode.processes=1"]
    return main([command, *sources, "-o", output, "-m", model, *options, *sets, *more])


def label(sources: list[str], output: str, model: str, *more: str) -> int:
    return run("label", sources, output, model, "--quiet", *more)


def rows_of(place: Place, output: str, part: str, base: str | None = None) -> list[dict[str, Any]]:
    """The rows of a part, sorted, by names below the store's."""
    base = base or place.url
    rows = [
        {
            name: value.replace(f"{base}/", "").replace("%2520", " ").replace("%20", " ")
            if name in ("clip_id", "uri")
            else value
            for name, value in row.items()
        }
        for name in place.names()
        if name.startswith(f"{output}/{part}/")
        for row in pq.read_table(io.BytesIO(place.get(name))).to_pylist()
    ]
    return sorted(rows, key=lambda row: (row["clip_id"], row.get("window_index", 0)))


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> dict[str, list[dict[str, Any]]]:
    """What a run gives on this machine's own disk."""
    top = tmp_path_factory.mktemp("local")
    folder = Folder(top, str(top))
    for name, data in dataset().items():
        folder.put(name, data)
    assert label(inputs(folder.url), f"{top}/out", str(tiny_model)) == 0
    return {part: rows_of(folder, "out", part) for part in ("clips", "windows")}


def assert_same(
    found: list[dict[str, Any]], wanted: list[dict[str, Any]], names: set[str] = frozenset()
) -> None:
    assert [row["clip_id"] for row in found] == [row["clip_id"] for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if name == "embedding":
                np.testing.assert_allclose(one[name], value, atol=1e-5)
            elif name == "labels":
                assert [entry["index"] for entry in one[name]] == [e["index"] for e in value]
                scores = [entry["score"] for entry in value]
                np.testing.assert_allclose([e["score"] for e in one[name]], scores, atol=1e-5)
            else:
                assert one[name] == value, name


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The units that have been committed, in order; may be cleared."""
    units: list[str] = []
    commit = OpenUnit.commit

    def note(self: OpenUnit) -> Any:
        done = commit(self)
        units.append(done.unit_id)
        return done

    monkeypatch.setattr(OpenUnit, "commit", note)
    return units


def test_a_store_holds_inputs_model_and_result_as_a_disk_does(
    place: Place,
    tiny_model: Path,
    expected: dict[str, list[dict[str, Any]]],
    committed: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, data in dataset().items():
        place.put(name, data)
    for path in tiny_model.iterdir():
        place.put(f"model/{path.name}", path.read_bytes())
    again = functools.partial(label, inputs(place.url), f"{place.url}/out", f"{place.url}/model")

    # Read, list, write, commit.
    assert again() == 0
    for part in ("clips", "windows"):
        assert_same(rows_of(place, "out", part), expected[part])
    assert "out/_SUCCESS" in place.names()
    assert main(["verify", f"{place.url}/out"]) == 0
    units = sorted(committed)
    assert len(units) == len(set(units)) >= 4

    # Again: nothing is left to do.
    committed.clear()
    others = {n: place.get(n) for n in place.names() if n[:4] == "out/" and units[0] not in n}
    assert again() == 0
    assert committed == []

    # A part that is gone is redone, it alone.
    place.remove(f"out/windows/{units[0]}.parquet")
    assert main(["verify", f"{place.url}/out", "--quiet"]) == 3
    assert again() == 0
    assert committed == [units[0]]
    parts = [name for name in others if name.endswith(".parquet")]
    assert [place.get(name) for name in parts] == [others[name] for name in parts]

    # Killed between a unit's parts and its commit: the next run goes on from there.
    committed.clear()
    for name in (f"_commits/{units[1]}.json", "_SUCCESS"):
        place.remove(f"out/{name}")
    assert main(["verify", f"{place.url}/out", "--quiet"]) == 3
    assert again() == 0
    assert committed == [units[1]]
    assert "out/_SUCCESS" in place.names()
    assert main(["verify", f"{place.url}/out", "--quiet"]) == 0

    # One flipped byte is found.
    part = f"out/clips/{units[0]}.parquet"
    content = bytearray(place.get(part))
    content[len(content) // 2] ^= 1
    place.put(part, bytes(content))
    capsys.readouterr()
    assert main(["verify", f"{place.url}/out", "--quiet"]) == 3
    assert f"{place.url}/{part}: its content has changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "place", [pytest.param("s3", marks=pytest.mark.slow), "gs", "memory"], indirect=True
)
def test_what_reads_results_and_inputs_does_so_on_a_store(
    place: Place, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Folder(tmp_path, str(tmp_path))
    truth = [{"uri": f"in/{number}.wav", "label": TINY_LABELS[number % 2]} for number in range(4)]
    for target in (place, here):
        for number in range(4):
            target.put(f"in/{number}.wav", wav(number))
        target.put("truth.jsonl", "\n".join(map(json.dumps, truth)).encode())
    figures, exported = [], []
    for target in (place, here):
        url = target.url
        assert label([f"{url}/in"], f"{url}/out", str(tiny_model)) == 0
        options = ["--quiet", "--known-labels-only"]
        assert main(["evaluate", f"{url}/out", "--truth", f"{url}/truth.jsonl", *options]) == 0
        assert main(["export", f"{url}/out", "--format", "csv", "--quiet"]) == 0
        assert main(["stats", f"{url}/in", "-o", f"{url}/stats", "--quiet"]) == 0
        capsys.readouterr()
        assert run("plan", [f"{url}/in"], f"{url}/out", str(tiny_model)) == 0
        assert "Nothing to do" in capsys.readouterr().out
        files = ("out/evaluation/evaluation.json", "stats/preprocessor_config.json")
        figures.append([target.get(name).decode().replace(url, "") for name in files])
        table = target.get("out/export/csv/labels.csv").decode().replace(url, "")
        # The order is that of the units, whose names come from the whole URLs.
        exported.append(sorted(line.rpartition(",") for line in table.splitlines()[1:]))
    assert figures[0] == figures[1]
    ours, theirs = exported
    assert [name for name, _, _ in ours] == [name for name, _, _ in theirs]
    scores = [[float(score) for _, _, score in table] for table in exported]
    np.testing.assert_allclose(*scores, atol=1e-5)


# --- http -------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "www").mkdir()
    with web_server(tmp_path / "www") as server:
        yield server


def test_the_web_is_read_like_a_folder(
    web: WebServer, tmp_path: Path, tiny_model: Path, expected: dict[str, list[dict[str, Any]]]
) -> None:
    url = f"http://127.0.0.1:{web.port}"
    for name, data in dataset().items():
        Folder(web.folder, url).put(name, data)
    result = Folder(tmp_path, str(tmp_path))
    assert label(inputs(url), f"{tmp_path}/out", str(tiny_model)) == 0
    for part in ("clips", "windows"):
        assert_same(rows_of(result, "out", part, base=url), expected[part])
    assert main(["verify", f"{tmp_path}/out", "--quiet"]) == 0


def test_nothing_can_be_written_to_the_web_and_that_is_said_before_work_starts(
    web: WebServer, tiny_model: Path, capsys: pytest.CaptureFixture[str], committed: list[str]
) -> None:
    url = f"http://127.0.0.1:{web.port}"
    Folder(web.folder, url).put("in/a.wav", wav(0))
    assert label([f"{url}/in/a.wav"], f"{url}/out", str(tiny_model)) == 2
    assert "http:// can be read, not written" in capsys.readouterr().err
    assert main(["stats", f"{url}/in/a.wav", "-o", f"{url}/out", "--quiet"]) == 2
    assert "http:// can be read, not written" in capsys.readouterr().err
    assert set(web.methods) <= {"HEAD", "GET"}
    assert "/in/a.wav" not in str(committed)


def test_an_index_page_lists_what_lies_below_and_nothing_else(web: WebServer) -> None:
    url = f"http://127.0.0.1:{web.port}"
    here = Folder(web.folder, url)
    for name in ("in/b.wav", "in/deep/a.wav", "in/deep/er/é &c.wav", "out.wav"):
        here.put(name, name.encode())
    for given in (f"{url}/in", f"{url}/in/"):
        assert filesystem.is_folder(given)
        found = list(listing.list_files(given))
        assert [file.url for file in found] == [
            f"{url}/in/b.wav",
            f"{url}/in/deep/a.wav",
            f"{url}/in/deep/er/%C3%A9%20%26c.wav",
        ]
        assert [file.size for file in found] == [8, 13, 20]
        assert all(file.version for file in found)
        assert reading.read_bytes(found[2].url) == "in/deep/er/é &c.wav".encode()
    assert not filesystem.is_folder(f"{url}/out.wav")
    with pytest.raises(IsADirectoryError):
        filesystem.stat(f"{url}/in/")


# --- How much is asked for --------------------------------------------------------------------

TAR_MEMBERS = 160
MEMBER_BYTES = 400 << 10


@functools.cache
def large_tar() -> bytes:
    """62 MiB: members of 400 KiB, which tar has to pad."""
    data = random.Random(0).randbytes(MEMBER_BYTES + 100)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as shard:
        for number in range(TAR_MEMBERS):
            info = tarfile.TarInfo(f"{number:05}.wav")
            info.size = len(data) - number % 7
            shard.addfile(info, io.BytesIO(data))
    return tar.getvalue()


def slice_of(url: str, start: int = 0, stop: int | None = None) -> ContainerSlice:
    return ContainerSlice(uri=url, url=url, size=None, version=None, start=start, stop=stop)


def bodies(proxy: FaultProxy, name: str) -> list[tuple[int | None, int]]:
    """Where each answer with an object's content began, and its length."""
    found = [
        (answer.start, answer.num_bytes)
        for answer in proxy.answers
        if answer.method == "GET" and name in answer.path and answer.num_bytes > 4096
    ]
    return [one for one in found if one[0] is not None] or found


@pytest.mark.parametrize("protocol", ["s3", "gs", "http"])
def test_a_tar_is_read_in_order_in_one_pass(
    protocol: str, emulators: dict[str, ObjectStore], tmp_path: Path
) -> None:
    tar = large_tar()
    if protocol == "http":
        (tmp_path / "large.tar").write_bytes(tar)
        with web_server(tmp_path) as server, FaultProxy("127.0.0.1", server.port) as proxy:
            check_one_pass(proxy, f"{proxy.url}/large.tar", len(tar))
        return
    store = emulators[protocol]
    store.clear()
    store.put("large.tar", tar)
    check_one_pass(store.proxy, f"{store.url}/large.tar", len(tar))


def check_one_pass(proxy: FaultProxy, url: str, size: int) -> None:
    member_bytes = size // TAR_MEMBERS // 512 * 512  # 401 KiB with its header
    starts = [number * member_bytes for number in (0, TAR_MEMBERS // 2)]
    whole = (0, None, TAR_MEMBERS)
    half = (starts[1], None, TAR_MEMBERS // 2)
    first = (0, starts[1], TAR_MEMBERS // 2)
    for start, stop, num_clips in (whole, half, first):
        proxy.faults = Faults()
        clips = list(TarReader(slice_of(url, start, stop), ()).read())
        assert [type(clip).__name__ for clip in clips] == ["EncodedClip"] * num_clips
        asked = bodies(proxy, "large.tar")
        offsets = [at for at, _ in asked]
        assert None not in offsets  # never the whole object
        assert offsets == sorted(set(offsets))  # ascending, each once
        assert max(length for _, length in asked) <= 8 * MIB
        wanted = (size if stop is None else stop) - start
        assert wanted <= sum(length for _, length in asked) + 10_240
        assert sum(length for _, length in asked) <= wanted * 1.01 + 128 * 1024
        assert len(asked) <= wanted // (8 * MIB) + 12


def test_the_next_piece_comes_while_the_last_is_used(web: WebServer) -> None:
    data = random.Random(0).randbytes(40 * MIB)
    (web.folder / "a.bin").write_bytes(data)
    with FaultProxy("127.0.0.1", web.port) as proxy:
        with reading.open_read(f"{proxy.url}/a.bin") as file:
            read = file.read(9 * MIB)
            wait_for(lambda: sum(n for _, n in bodies(proxy, "a.bin")) == 24 * MIB)
            read += file.read(12 * MIB)
            file.seek(35 * MIB)
            assert file.read(10) == data[35 * MIB :][:10]
        assert read == data[: 21 * MIB]


def wait_for(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come")


def test_a_piece_that_fails_ahead_fails_where_it_is_read(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (web.folder / "a.bin").write_bytes(bytes(20 * MIB))
    server_is_down, ask_for = threading.Event(), reading._RangedFile._ask_for

    def ask_for_the_last_piece_later(
        file: reading._RangedFile, start: int, end: int
    ) -> bytes | None:
        if start >= 16 * MIB:
            server_is_down.wait(10.0)
        return ask_for(file, start, end)

    monkeypatch.setattr(reading._RangedFile, "_ask_for", ask_for_the_last_piece_later)
    with (
        FaultProxy("127.0.0.1", web.port) as proxy,
        reading.open_read(f"{proxy.url}/a.bin") as file,
    ):
        assert len(file.read(8 * MIB)) == 8 * MIB
        file.peek(1)  # type: ignore[attr-defined]
        proxy.faults = Faults(rate=1, kinds=("404",))
        server_is_down.set()
        with pytest.raises(FileNotFoundError, match=r"a\.bin: there is no such file"):
            file.read()
        proxy.faults = Faults()
        file.seek(12 * MIB)
        assert len(file.read()) == 8 * MIB


def test_what_is_held_of_a_large_tar_does_not_grow_with_it(web: WebServer) -> None:
    (web.folder / "large.tar").write_bytes(large_tar())
    url = f"http://127.0.0.1:{web.port}/large.tar"
    held = peak_bytes(lambda: [None for _ in TarReader(slice_of(url), ()).read()])
    # The piece in use and the next one, and a third while aiohttp joins it.
    assert held < 34 * MIB


def test_a_large_recording_passes_by_once_for_all_its_segments(web: WebServer) -> None:
    seconds, size = 3000, 44 + 3000 * 32_000  # 92 MiB
    with soundfile.SoundFile(web.folder / "a.wav", "w", RATE_HZ, 1, "PCM_16") as file:
        for _ in range(seconds // 100):
            file.write(np.zeros(100 * RATE_HZ, np.int16))
    assert (web.folder / "a.wav").stat().st_size == size
    with FaultProxy("127.0.0.1", web.port) as proxy:
        url = f"{proxy.url}/a.wav"
        items = tuple(
            Item(f"{url}@{n}", url, start_s=float(n), end_s=n + 1.0, size=size) for n in range(3)
        )
        unit = WorkUnit("u", "files", items)
        paths = []
        for clip in read_unit(unit):
            assert clip.path is not None and clip.data is None  # on disk, not in memory
            paths.append(clip.path)
        assert len({Path(path).stat().st_ino for path in paths}) == 1  # and there once
        for path in paths:
            Path(path).unlink()
        asked = bodies(proxy, "a.wav")
        assert sum(length for _, length in asked) == size
        assert max(length for _, length in asked) <= 8 * MIB


def test_what_google_unpacks_on_the_way_is_not_held(emulators: dict[str, ObjectStore]) -> None:
    store = emulators["gs"]
    if not store.is_exclusive:
        pytest.skip("gcp-storage-emulator keeps no contentEncoding; fake-gcs-server does")
    data = bytes(24 * MIB) + b"the end"
    store.put("packed", gzip.compress(data, 1), content_encoding="gzip")
    found: list[int] = []

    def read() -> None:
        with reading.open_read(f"{store.url}/packed") as file:
            found.append(sum(map(len, iter(lambda: file.read(MIB), b""))))
            file.seek(-7, 2)
            assert file.read() == b"the end"

    assert peak_bytes(read) < 8 * MIB
    assert found == [len(data)]


def peak_bytes(act: Any) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- More than one process --------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["s3", pytest.param("gs", marks=pytest.mark.slow)])
def test_worker_processes_read_and_write_a_store(
    protocol: str,
    emulators: dict[str, ObjectStore],
    tiny_model: Path,
    expected: dict[str, list[dict[str, Any]]],
) -> None:
    store = emulators[protocol]
    store.clear()
    store.proxy.faults = Faults()
    for name, data in dataset().items():
        store.put(name, data)
    assert label(inputs(store.url), f"{store.url}/out", str(tiny_model), "--workers=2") == 0
    for part in ("clips", "windows"):
        assert_same(rows_of(store, "out", part), expected[part])
    assert main(["verify", f"{store.url}/out", "--quiet"]) == 0


@pytest.mark.parametrize("protocol", ["s3", "gs"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_opens_stores_anew(
    protocol: str, emulators: dict[str, ObjectStore]
) -> None:
    store = emulators[protocol]
    store.proxy.faults = Faults()
    data = random.Random(0).randbytes(100_000)
    writing.write_bytes(f"{store.url}/before", data)  # this process's connections are open
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(reading.read_bytes, f"{store.url}/before").result(60) == data
        pool.submit(writing.write_bytes, f"{store.url}/after", data).result(60)
    assert reading.read_bytes(f"{store.url}/after") == data
