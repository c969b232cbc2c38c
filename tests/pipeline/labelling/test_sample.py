"""The estimate of the work from a sample: in every format, of files and of containers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.labelling import sample as sample_module
from pipeline.labelling.remaining import find_units
from pipeline.labelling.sample import Amount, Measured, Sample, WorkEstimate, take_sample
from tests.support.audio_factory import encode, noise
from tests.support.containers import STRUCT, tar_bytes
from tests.support.unit_factory import make_item
from transforms.decoding.settings import DecodeSettings
from transforms.process.temp_folders import scratch_folder
from transforms.records import Failure, WorkUnit
from transforms.sources.read_unit import Found, SourceSettings, find_inputs
from transforms.storage import listing, writing

DECODE = DecodeSettings(num_processes=1)
RATE_HZ = 48_000
# Of very different lengths, 60 s in all.
LENGTHS_S = (0.5, 1.0, 3.0, 8.0, 10.5, 15.0, 22.0)
WINDOWS = sum(1 + max(0, int(np.ceil(length / 10.255)) - 1) for length in LENGTHS_S)


def sounds(format_: str, channels: int = 1) -> list[bytes]:
    return [
        encode(noise(length, RATE_HZ, num_channels=channels, seed=n), RATE_HZ, format_)
        for n, length in enumerate(LENGTHS_S)
    ]


def estimate_of(*inputs: Path | str, **settings: float) -> WorkEstimate:
    sources = SourceSettings()
    found = find_inputs([str(path) for path in inputs])
    units = find_units(found, sources)
    return WorkEstimate(units, found, sources, take_sample(units, found, sources, DECODE))


def folder_of(format_: str, channels: int = 1) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for number, data in enumerate(sounds(format_, channels)):
            (folder / f"{number}.{format_.partition('_')[0]}").write_bytes(data)

    return write


def tar_of(format_: str, mode: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        members = [(f"{n}.{format_}", data) for n, data in enumerate(sounds(format_))]
        members += [(f"{n}.json", b'{"label": "rain"}') for n in range(len(members))]
        name = "x.tar.gz" if mode == "w:gz" else "x.tar"
        (folder / name).write_bytes(tar_bytes(sorted(members), mode))

    return write


def parquet_of(format_: str, channels: int = 1) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        cells = [{"bytes": data, "path": None} for data in sounds(format_, channels)]
        table = pa.table({"audio": pa.array(cells, STRUCT)})
        pq.write_table(table, folder / "x.parquet", 3)

    return write


def manifest(folder: Path) -> None:
    """Segments, the last without an end, and lines that cannot be read."""
    (folder / "x.wav").write_bytes(encode(noise(60.0, RATE_HZ, num_channels=2), RATE_HZ))
    starts = np.cumsum([0.0, *LENGTHS_S])
    rows = [f"x.wav,{start},{stop}" for start, stop in itertools.pairwise(starts)]
    rows[-1] = f"x.wav,{starts[-2]},"
    (folder / "x.csv").write_text("\n".join(["uri,start_s,end_s", *rows]))


CASES = {
    "flac": folder_of("flac"),
    "mp3": folder_of("mp3"),
    "mp3 without a header": folder_of("mp3_no_header"),
    "opus": folder_of("opus"),
    "wav": folder_of("wav"),
    "stereo wav": folder_of("wav", 2),
    "raw aac": folder_of("aac"),
    "tar": tar_of("flac", "w"),
    "tar of opus": tar_of("opus", "w"),
    "compressed tar": tar_of("wav", "w:gz"),
    "parquet": parquet_of("mp3"),
    "parquet of stereo wav": parquet_of("wav", 2),
    "manifest": manifest,
}


@pytest.mark.parametrize("name", CASES)
def test_seconds_windows_and_items_are_known_where_all_is_sampled(
    name: str, tmp_path: Path
) -> None:
    CASES[name](tmp_path)
    source = tmp_path / "x.csv" if name == "manifest" else tmp_path
    total = estimate_of(source).total
    assert total.audio_s == pytest.approx(sum(LENGTHS_S), rel=0.02)
    assert total.windows == WINDOWS
    assert total.items == len(LENGTHS_S)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample a few files and slices of each input only."""
    monkeypatch.setattr(sample_module, "SAMPLED_FILES", 16)
    monkeypatch.setattr(sample_module, "SAMPLED_SLICES", 4)
    monkeypatch.setattr(sample_module, "SLICE_HEADERS", 16)
    monkeypatch.setattr(sample_module, "SLICE_BYTES", 400_000)


def write_many(folder: Path) -> float:
    """Write three folders of recordings by different devices; return the seconds of audio."""
    generator = np.random.default_rng(1)
    total_s = 0.0
    for name, format_, rate_hz, channels in (
        ("a", "wav", 8_000, 1),
        ("b", "wav", 48_000, 2),
        ("c", "opus", 16_000, 1),
    ):
        (folder / name).mkdir(parents=True)
        for number in range(40):
            length = float(np.exp(generator.uniform(np.log(0.2), np.log(6.0))))
            samples = noise(length, rate_hz, num_channels=channels, seed=number)
            (folder / name / f"{number}.{format_}").write_bytes(encode(samples, rate_hz, format_))
            total_s += length
    return total_s


def test_a_few_files_of_many_tell_how_much_there_is(tmp_path: Path, few: None) -> None:
    total_s = write_many(tmp_path)
    estimate = estimate_of(tmp_path)
    assert estimate.sample.num_clips <= 16
    assert estimate.total.audio_s == pytest.approx(total_s, rel=0.15)
    assert estimate.total.windows == pytest.approx(120, rel=0.1)
    assert estimate.total.items == 120
    assert estimate.has_exact_items


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
def test_the_beginning_of_a_container_tells_how_much_is_in_it(
    kind: str, tmp_path: Path, few: None
) -> None:
    cells = [encode(noise(1.0 + n % 5, 16_000, seed=n), 16_000, "wav") for n in range(100)]
    if kind == "parquet":
        table = pa.table({"audio": pa.array([{"bytes": c, "path": None} for c in cells], STRUCT)})
        pq.write_table(table, tmp_path / "x.parquet", 10)
    else:
        members = [(f"{n}.wav", data) for n, data in enumerate(cells)]
        data = tar_bytes(members, "w:gz" if kind == "tar.gz" else "w")
        (tmp_path / f"x.{kind}").write_bytes(data)
    before = set(scratch_folder().iterdir())
    estimate = estimate_of(tmp_path)
    assert estimate.sample.num_clips <= 16
    assert estimate.total.audio_s == pytest.approx(300.0, rel=0.1)
    assert estimate.total.windows == pytest.approx(100, rel=0.1)
    assert estimate.total.items == pytest.approx(100, rel=0.1)
    assert estimate.has_exact_items == (kind == "parquet")
    assert set(scratch_folder().iterdir()) == before


def test_what_cannot_be_decoded_has_no_windows(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.wav").write_bytes(encode(noise(2.0, 16_000), 16_000))
        (tmp_path / f"{number}.flac").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    estimate = estimate_of(tmp_path)
    assert (estimate.sample.num_clips, estimate.sample.num_failed) == (10, 10)
    assert estimate.total == Amount(items=20, audio_s=20.0, windows=10)


def test_of_remote_files_the_edges_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "memory://sampled"
    for number, data in enumerate(sounds("mp3")):
        writing.write_bytes(f"{folder}/{number}.mp3", data)
    before = set(scratch_folder().iterdir())
    try:
        total = estimate_of(folder).total
    finally:
        for file in list(listing.list_files(folder)):
            writing.remove(file.url)
    assert total.audio_s == pytest.approx(sum(LENGTHS_S), rel=0.02)
    assert total.windows == WINDOWS
    assert set(scratch_folder().iterdir()) == before


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_sample_ends_in_time_and_is_spread_then(is_stopped: bool, tmp_path: Path) -> None:
    # 60 files of a second, then 60 of two seconds; there is only time for the first 16 headers.
    for number in range(120):
        length = 1.0 + (number >= 60)
        (tmp_path / f"{number:03}.wav").write_bytes(encode(noise(length, 8_000), 8_000))
    stop = threading.Event()
    if is_stopped:
        stop.set()
    found, sources = find_inputs([str(tmp_path)]), SourceSettings()
    units = find_units(found, sources)
    sampling_s = 60.0 if is_stopped else 0.0
    sample = take_sample(units, found, sources, DECODE, sampling_s=sampling_s, stop=stop)
    lengths = [one.amount.audio_s for one in sample.measured[".wav"]]
    assert len(lengths) == 16
    assert 7 <= lengths.count(1.0) <= 9
    assert lengths.count(1.0) + lengths.count(2.0) == 16


def test_a_file_is_like_the_nearest_of_its_kind() -> None:
    names = ["a/1.wav", "a/2.wav", "a/3.mp3", "b/1.wav", "b/2.wav"]
    items = tuple(make_item(name, size=32_000) for name in names)
    units = [WorkUnit("u", "files", items, estimated_windows=5)]
    sources = SourceSettings(window_s=1.0, hop_s=1.0)
    measured = {
        ".wav": [Measured(0, 16_000, Amount(1, 1.0, 1)), Measured(4, 32_000, Amount(1, 4.0, 4))]
    }
    estimate = WorkEstimate(units, Found(items=items), sources, Sample(measured, 2))
    # The third has no sample: 16 kB a second, as usual.
    assert [estimate.of_first_items(0, number) for number in range(6)] == [0, 2, 4, 6, 10, 14]
    assert estimate.total == Amount(5, 14.0, 14)


def test_failures_of_planning_are_items_without_windows() -> None:
    bad = Failure(make_item("bad"), "read", "ManifestError", "no such column")
    units = [WorkUnit("w", "files", failures=(bad,))]
    sample = Sample({".wav": [Measured(0, 1, Amount(1, 1.0, 1))]}, 1)
    estimate = WorkEstimate(units, Found(failures=(bad,)), SourceSettings(), sample)
    assert estimate.total == Amount(items=1)


def test_without_a_sample_sizes_alone_count() -> None:
    items = tuple(make_item(name, size=882_000) for name in ("a.wav", "b.wav"))
    units = [WorkUnit("u", "files", items, estimated_windows=2)]
    estimate = WorkEstimate(units, Found(items=items), SourceSettings())
    assert not estimate.is_sampled
    assert (estimate.total.items, estimate.total.windows) == (2, 2)
    assert estimate.of_first_items(0, 1) == 1


@pytest.mark.parametrize("count", [1, 2, 7, 16, 100])
def test_any_beginning_of_the_order_is_spread_evenly(count: int) -> None:
    order: Sequence[int] = sample_module._spread(count)
    assert sorted(order) == list(range(count))
    for length in range(1, count + 1):
        found = sorted([-1, *order[:length], count])
        gaps = np.diff(found)
        assert gaps.max() <= max(2, 4 * count / length)


@pytest.mark.parametrize("write", [folder_of("wav", 2), parquet_of("flac", 2)])
def test_each_channel_counts_where_it_is_a_clip(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path)
    found, sources = find_inputs([str(tmp_path)]), SourceSettings()
    units = find_units(found, sources)
    decode = DecodeSettings(num_processes=1, channel="each")
    total = WorkEstimate(units, found, sources, take_sample(units, found, sources, decode)).total
    assert total.audio_s == pytest.approx(2 * sum(LENGTHS_S), rel=0.02)
    assert (total.items, total.windows) == (len(LENGTHS_S), 2 * WINDOWS)
