"""How long a file is by its header: read elsewhere, in few bytes, whatever the header says."""

from __future__ import annotations

import functools
import io
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.label import RunConfig
from pipeline.labelling.run import run_label
from pipeline.result.verify import run_verify
from tests.pipeline.labelling.test_kill import rows_of
from tests.support import audio_factory
from tests.support.listing_store import ListingFileSystem
from tests.transforms.storage.test_faulty_storage import web_server
from transforms import header_probe, long_files
from transforms.decoding import pool as decode_module
from transforms.decoding.decode import BLOCK_BYTES
from transforms.decoding.pool import DecodePool, DecodeSettings
from transforms.decoding.readers import probe_duration_s
from transforms.header_probe import HeaderProbe
from transforms.records import Item

FORMATS = ("wav", "rf64", "flac", "ogg", "mp3", "aiff", "au", "caf", "m4a", "opus")


@dataclass
class Remote:
    """A file of a store that counts what is asked of it, and fails as often as it is told.

    Attributes:
        data: The content.
        failures: What the next requests are answered with, in order.
        asked: The ranges of bytes that were given.
    """

    data: bytes
    failures: list[Exception] = field(default_factory=list)
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def num_bytes(self) -> int:
        return sum(stop - start for start, stop in self.asked)

    def fetch(self, start: int, stop: int) -> bytes:
        if self.failures:
            raise self.failures.pop(0)
        self.asked.append((start, min(stop, self.size)))
        return self.data[start:stop]

    def item(self) -> Item:
        url = ListingFileSystem.add_tar("remote", self)
        return Item(url, url)


@pytest.fixture(scope="module")
def probe() -> Iterator[HeaderProbe]:
    with HeaderProbe(DecodeSettings()) as probe:
        yield probe


@functools.cache
def sound(kind: str = "wav", duration_s: float = 40.0) -> bytes:
    return audio_factory.encode(audio_factory.noise(duration_s, 48_000), 48_000, kind)


def wav_behind(*chunks: bytes) -> bytes:
    """A WAV of 40 s with other chunks before its audio."""
    data = sound()
    data = data[:12] + b"".join(chunks) + data[12:]
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def chunk(num_bytes: int) -> bytes:
    return b"JUNK" + struct.pack("<I", num_bytes) + bytes(num_bytes)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_length_is_that_of_libsndfile_wherever_the_file_lies(
    kind: str, probe: HeaderProbe, tmp_path: Path
) -> None:
    data = sound(kind)
    path, remote = tmp_path / "local", Remote(data)
    path.write_bytes(data)
    expected = probe_duration_s(io.BytesIO(data))
    assert (expected is None) == (kind in ("m4a", "opus"))
    assert probe.read_duration_s(Item(str(path), str(path))) == expected
    assert probe.read_duration_s(remote.item()) == expected
    # The first block, and of some formats the last bytes.
    assert remote.num_bytes <= 3 * BLOCK_BYTES < remote.size


def test_what_lies_before_the_header_is_passed_over(probe: HeaderProbe) -> None:
    remote = Remote(wav_behind(chunk(3 << 20)))
    assert probe.read_duration_s(remote.item()) == 40.0
    assert remote.num_bytes <= 3 * BLOCK_BYTES
    tag = b"ID3\4\0\0\0\x40\0\0" + bytes(1 << 20)
    expected = probe_duration_s(io.BytesIO(sound("mp3")))
    assert probe.read_duration_s(Remote(tag + sound("mp3")).item()) == expected


def test_a_header_that_goes_on_for_ever_ends_at_the_bound(
    probe: HeaderProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_probe, "MAX_HEADER_BYTES", 4 * BLOCK_BYTES)
    remote = Remote(wav_behind(*[chunk(1022)] * 2048))
    assert probe.read_duration_s(remote.item()) is None
    assert remote.num_bytes == 4 * BLOCK_BYTES
    # Of a file that FFmpeg reads, nothing but the start is: its boxes are not gone along.
    boxes = b"".join(struct.pack(">I4s", 1 << 20, b"moof") + bytes((1 << 20) - 8) for _ in range(9))
    remote = Remote(b"\0\0\0\x10ftypM4A \0\0\0\0" + boxes)
    assert probe.read_duration_s(remote.item()) is None
    assert remote.asked == [(0, BLOCK_BYTES)]
    assert probe.read_duration_s(Remote(sound()).item()) == 40.0


def test_a_store_is_asked_again_while_its_trouble_may_pass(probe: HeaderProbe) -> None:
    remote = Remote(sound(), [ConnectionResetError(), ConnectionResetError()])
    assert probe.read_duration_s(remote.item()) == 40.0
    assert not remote.failures
    remote = Remote(sound("ogg"), [PermissionError()])
    assert probe.read_duration_s(remote.item()) is None
    assert remote.asked == []
    assert probe.read_duration_s(Remote(sound()).item()) == 40.0


def test_a_web_server_without_ranges_is_not_read_to_the_end(
    probe: HeaderProbe, tmp_path: Path
) -> None:
    (tmp_path / "long.ogg").write_bytes(sound("ogg"))  # whose length lies at the end
    with web_server(tmp_path) as proxy:
        url = f"{proxy.url}/long.ogg"
        assert probe.read_duration_s(Item(url, url)) is None


# Whatever a header does to a library

HOSTILE_WORKER = """
import ctypes, os, sys
from transforms.decoding import decode as decode_worker

def answer(kind, payload, length=None):
    header = decode_worker.FRAME_HEADER.pack(kind, length or len(payload))
    os.write(int(sys.argv[1]), header + payload)

def harm(mark):
    if mark == b"SEGFAULT":
        ctypes.string_at(0)
    if mark == b"NATIVE_S":
        ctypes.PyDLL(None).sleep(1000)  # in C, and no other Python thread can run
    if mark == b"GREEDY__":
        bytes(1 << 30)
    if mark == b"RAISES__":
        raise RuntimeError("it is too much")
    if mark == b"NOWHERE_":
        answer(decode_worker.WANTED, b'{"start": 36893488147419103232}')
    if mark == b"NO_JSON_":
        answer(decode_worker.LENGTH, b"[")
    if mark == b"ENDLESS_":
        answer(decode_worker.LENGTH, b"", 10**14)
    if mark == b"NO_NUMB_":
        answer(decode_worker.LENGTH, b'{"length_s": NaN}')

def probe(file):
    file.seek(-8, os.SEEK_END)
    harm(file.read())
    return decode_worker.probe_duration_s(file)

def decode(source, **options):
    with open(source, "rb") as file:
        probe(file)
    yield from decode_worker.decode(source, **options)

decode_worker.serve(sys.argv[1:], decode, probe)
"""


@pytest.fixture
def hostile_worker(tmp_path: Path) -> list[str]:
    path = tmp_path / "hostile_worker.py"
    path.write_text(HOSTILE_WORKER)
    return [sys.executable, str(path)]


def test_a_header_that_takes_its_process_along_has_no_length(hostile_worker: list[str]) -> None:
    settings = DecodeSettings(stall_timeout_s=1.5, max_decoder_bytes=256 << 20)
    marks = b"SEGFAULT NATIVE_S RAISES__ NOWHERE_ NO_JSON_ ENDLESS_ NO_NUMB_".split()
    marks += [b"GREEDY__"] if sys.platform == "linux" else []
    with HeaderProbe(settings, worker_command=hostile_worker) as probe:
        for mark in marks:
            assert probe.read_duration_s(Remote(sound() + mark).item()) is None
            assert probe.read_duration_s(Remote(sound() + b"harmless").item()) == 40.0


def test_a_run_takes_no_harm_from_the_header_of_a_long_file(
    hostile_worker: list[str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file is not cut, and its row says why; the other long one is labelled in parts."""
    for module, of_decoders in ((long_files, HeaderProbe), (decode_module, DecodePool)):
        hostile: Callable[..., object] = functools.partial(
            of_decoders, worker_command=hostile_worker
        )
        monkeypatch.setattr(module, of_decoders.__name__, hostile)
    cut: dict[str, int] = {}
    cut_long = long_files.cut_long

    def counting(*args: object) -> object:
        parts = cut_long(*args)  # type: ignore[arg-type]
        cut[Path(parts[0].items[0].uri).name] = len(parts)
        return parts

    monkeypatch.setattr(long_files, "cut_long", counting)
    (tmp_path / "in").mkdir()
    samples = audio_factory.encode(np.zeros((16_000 * 20, 1), np.float32), 16_000, "wav")
    (tmp_path / "in" / "bad.wav").write_bytes(samples + b"SEGFAULT")
    (tmp_path / "in" / "good.wav").write_bytes(samples)
    out = tmp_path / "out"
    config = RunConfig.model_validate(
        {
            "inputs": [str(tmp_path / "in")],
            "output": str(out),
            "quiet": True,
            "max_failed": 1.0,
            "model": {"name": str(tiny_model)},
            "window": {"length_s": 1.0, "hop_s": 1.0},
            "inference": {"precision": "fp32", "device": "cpu", "batch_size": 8},
            "units": {"windows": 4},
            "decode": {"processes": 1},
        }
    )
    assert run_label(config, []) == 0
    assert run_verify(str(out), quiet=True) == 0
    assert cut == {"bad.wav": 1, "good.wav": 5}
    assert [Path(row["uri"]).name for row in rows_of(out, "clips")] == ["good.wav"]
    (error,) = rows_of(out, "errors")
    assert (Path(error["uri"]).name, error["error_type"]) == ("bad.wav", "DecoderCrashed")
