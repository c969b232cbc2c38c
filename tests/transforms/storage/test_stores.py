"""One body over every store: the same command, the same rows, and how much is asked of the store.

``s3`` is moto's server, ``gs`` is fake-gcs-server or else gcp-storage-emulator (see
``tests/support/stores``), ``http`` a web server with index pages and ranges, ``memory`` fsspec's
own. The head of pytest's report says which emulators there are.
"""

from __future__ import annotations

import functools
import gzip
import json
import multiprocessing
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile

from pipeline.cli.main import main
from tests.support.containers import tar_bytes
from tests.support.labelling import assert_same_rows, wait_until
from tests.support.model_factory import TINY_LABELS
from tests.support.stores.fault_proxy import FaultProxy, Faults
from tests.support.stores.object_store import ObjectStore
from tests.support.stores.store_runs import Place, fill, label, rows_of, run, wav
from tests.support.stores.web_server import WebServer, serve_folder
from transforms.records import ContainerSlice, Item, WorkUnit
from transforms.results.write_units import OpenUnit
from transforms.sources.read_unit import read_unit
from transforms.sources.tar import TarReader
from transforms.storage import filesystem, listing, reading, writing

RATE_HZ = 16_000
MIB = 1 << 20


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


@pytest.fixture(params=["s3", "gs", "memory"])
def place(
    request: pytest.FixtureRequest,
    emulator: Callable[[str], ObjectStore],
    empty_memory: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    """An empty store that can be written."""
    if request.param != "memory":
        return emulator(request.param)
    # The command refuses it, because it ends with the process; this process goes on.
    monkeypatch.setattr("pipeline.cli.commands.check_output_lasts", lambda output: None)
    return Memory("memory://stores")


# --- The same command everywhere --------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> dict[str, list[dict[str, Any]]]:
    """What a run gives on this machine's own disk."""
    top = tmp_path_factory.mktemp("local")
    folder = Folder(top, str(top))
    assert label(fill(folder), f"{top}/out", tiny_model) == 0
    return {part: rows_of(folder, "out", part) for part in ("clips", "windows")}


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
    inputs = fill(place)
    for path in tiny_model.iterdir():
        place.put(f"model/{path.name}", path.read_bytes())
    again = functools.partial(label, inputs, f"{place.url}/out", f"{place.url}/model")

    # Read, list, write, commit.
    assert again() == 0
    for part in ("clips", "windows"):
        assert_same_rows(rows_of(place, "out", part), expected[part])
    assert "out/_SUCCESS" in place.names()
    assert main(["verify", f"{place.url}/out"]) == 0
    units = sorted(committed)
    assert len(units) == len(set(units)) >= 3

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
        assert label([f"{url}/in"], f"{url}/out", tiny_model) == 0
        options = ["--quiet", "--known-labels-only"]
        assert main(["evaluate", f"{url}/out", "--truth", f"{url}/truth.jsonl", *options]) == 0
        assert main(["export", f"{url}/out", "--format", "csv", "--quiet"]) == 0
        assert main(["stats", f"{url}/in", "-o", f"{url}/stats", "--quiet"]) == 0
        capsys.readouterr()
        assert run("plan", [f"{url}/in"], f"{url}/out", tiny_model) == 0
        assert "Nothing to do" in capsys.readouterr().out
        files = ("out/evaluation/evaluation.json", "stats/preprocessor_config.json")
        figures.append([target.get(name).decode().replace(url, "") for name in files])
        table = target.get("out/export/csv/labels.csv").decode().replace(url, "")
        # The order is that of the units, whose names come from the whole URLs.
        # Path, truth and metadata, which follow the score, are empty here.
        rows = (line.removesuffix(",,,") for line in table.splitlines()[1:])
        exported.append(sorted(row.rpartition(",") for row in rows))
    assert figures[0] == figures[1]
    ours, theirs = exported
    assert [name for name, _, _ in ours] == [name for name, _, _ in theirs]
    scores = [[float(score) for _, _, score in table] for table in exported]
    np.testing.assert_allclose(*scores, atol=1e-5)


# --- http -------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "www").mkdir()
    with serve_folder(tmp_path / "www") as server:
        yield server


def test_the_web_is_read_like_a_folder(
    web: WebServer, tmp_path: Path, tiny_model: Path, expected: dict[str, list[dict[str, Any]]]
) -> None:
    result = Folder(tmp_path, str(tmp_path))
    assert label(fill(Folder(web.folder, web.url)), f"{tmp_path}/out", tiny_model) == 0
    for part in ("clips", "windows"):
        assert_same_rows(rows_of(result, "out", part, base=web.url), expected[part])
    assert main(["verify", f"{tmp_path}/out", "--quiet"]) == 0


def test_nothing_can_be_written_to_the_web_and_that_is_said_before_work_starts(
    web: WebServer, tiny_model: Path, capsys: pytest.CaptureFixture[str], committed: list[str]
) -> None:
    url = web.url
    Folder(web.folder, url).put("in/a.wav", wav(0))
    assert label([f"{url}/in/a.wav"], f"{url}/out", tiny_model) == 2
    assert "http:// can be read, not written" in capsys.readouterr().err
    assert main(["stats", f"{url}/in/a.wav", "-o", f"{url}/out", "--quiet"]) == 2
    assert "http:// can be read, not written" in capsys.readouterr().err
    assert {request.partition(" ")[0] for request in web.requests} <= {"HEAD", "GET"}
    assert committed == []


def test_an_index_page_lists_what_lies_below_and_nothing_else(web: WebServer) -> None:
    url = web.url
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
    members = ((f"{n:05}.wav", data[: len(data) - n % 7]) for n in range(TAR_MEMBERS))
    return tar_bytes(members)


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
    protocol: str, emulator: Callable[[str], ObjectStore], web: WebServer
) -> None:
    tar = large_tar()
    if protocol == "http":
        (web.folder / "large.tar").write_bytes(tar)
        with FaultProxy("127.0.0.1", web.port) as proxy:
            check_one_pass(proxy, f"{proxy.url}/large.tar", len(tar))
    else:
        store = emulator(protocol)
        store.put("large.tar", tar)
        check_one_pass(store.proxy, f"{store.url}/large.tar", len(tar))


def check_one_pass(proxy: FaultProxy, url: str, size: int) -> None:
    member_bytes = size // TAR_MEMBERS // 512 * 512  # 401 KiB with its header
    middle = TAR_MEMBERS // 2 * member_bytes
    for start, stop in ((0, None), (middle, None), (0, middle)):
        proxy.faults = Faults()
        clips = list(TarReader(slice_of(url, start, stop), ()).read())
        num_clips = TAR_MEMBERS if (start, stop) == (0, None) else TAR_MEMBERS // 2
        assert [type(clip).__name__ for clip in clips] == ["EncodedClip"] * num_clips
        asked = bodies(proxy, "large.tar")
        offsets, lengths = zip(*asked, strict=True)
        assert None not in offsets  # never the whole object
        assert list(offsets) == sorted(set(offsets))  # ascending, each once
        assert max(lengths) <= 8 * MIB
        wanted = (size if stop is None else stop) - start
        assert wanted - 10_240 <= sum(lengths) <= wanted * 1.01 + 128 * 1024
        assert len(asked) <= wanted // (8 * MIB) + 12


def test_the_next_piece_comes_while_the_last_is_used(web: WebServer) -> None:
    data = random.Random(0).randbytes(40 * MIB)
    (web.folder / "a.bin").write_bytes(data)
    with FaultProxy("127.0.0.1", web.port) as proxy:
        with reading.open_read(f"{proxy.url}/a.bin") as file:
            read = file.read(9 * MIB)
            wait_until(lambda: sum(n for _, n in bodies(proxy, "a.bin")) == 24 * MIB, "a piece")
            read += file.read(12 * MIB)
            file.seek(35 * MIB)
            assert file.read(10) == data[35 * MIB :][:10]
        assert read == data[: 21 * MIB]


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
    url = f"{web.url}/large.tar"
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


def test_what_google_unpacks_on_the_way_is_not_held(emulator: Callable[[str], ObjectStore]) -> None:
    store = emulator("gs")
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


def test_worker_processes_read_and_write_a_store(
    emulator: Callable[[str], ObjectStore],
    tiny_model: Path,
    expected: dict[str, list[dict[str, Any]]],
) -> None:
    store = emulator("s3")
    assert label(fill(store), f"{store.url}/out", tiny_model, "--workers=2") == 0
    for part in ("clips", "windows"):
        assert_same_rows(rows_of(store, "out", part), expected[part])
    assert main(["verify", f"{store.url}/out", "--quiet"]) == 0


@pytest.mark.parametrize("protocol", ["s3", "gs"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_opens_stores_anew(
    protocol: str, emulator: Callable[[str], ObjectStore]
) -> None:
    store = emulator(protocol)
    data = random.Random(0).randbytes(100_000)
    writing.write_bytes(f"{store.url}/before", data)  # this process's connections are open
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(reading.read_bytes, f"{store.url}/before").result(60) == data
        pool.submit(writing.write_bytes, f"{store.url}/after", data).result(60)
    assert reading.read_bytes(f"{store.url}/after") == data
