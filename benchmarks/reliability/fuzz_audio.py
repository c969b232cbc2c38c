"""Does hostile audio cost anything but itself? Real recordings, damaged in every way, decoded.

    python -m benchmarks.reliability.fuzz_audio [--files 10000] [--data ../shared/data/esc10/audio]

Recordings are encoded in every format of ``tests/support/audio_factory.py``, mutated (see
``MUTATIONS``), and put through ``DecodePool`` as the pipeline does it, half of them as bytes,
half as files with an extension drawn at random. Every file must come to exactly one end: decoded
whole, decoded in part with a warning, or a failure. A decoder that crashes or hangs makes the exit
code 1.

File number n of a seed is always the same: ``--first n --files 1`` has it alone. Prints tables and
writes ``fuzz_audio.json`` beside this file; see ``benchmarks/README.md`` for the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import resource
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from tests.support.audio_factory import FORMATS, Samples, encode
from transforms.decoding.pool import Decoded, DecodePool
from transforms.decoding.settings import DecodeSettings
from transforms.records import EncodedClip, Item, ItemFailure, Waveform

BATCH_FILES = 200
RECORDINGS_PER_FORMAT = 4
DURATIONS_S = (0.3, 1.0, 2.0, 4.0)
SAMPLE_EVERY_S = 0.05
LOST = ("DecoderCrashed", "DecoderHung")
EXTENSIONS = ("wav", "flac", "ogg", "mp3", "m4a", "mkv", "aiff", "wma", "caf", "txt", "jpg", "")

# What headers lie with: sizes, counts of frames and channels, rates.
LIES = (0, 1, 2, 3, 64, 255, 1024, 65_535, 768_000, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
HEADER_BYTES = 512


# The mutations. Each takes the bytes of a real file, random numbers, and another real file.


def untouched(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """As it is; half of these have a wrong extension."""
    return data


def flip_bits(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """1 to 64 bits anywhere."""
    return _flip(data, rng, len(data))


def flip_header_bits(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """1 to 64 bits at the start."""
    return _flip(data, rng, HEADER_BYTES)


def _flip(data: bytes, rng: np.random.Generator, within: int) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(0, min(within, len(data)), 1 << rng.integers(0, 7))
    changed[places] ^= np.left_shift(1, rng.integers(0, 8, len(places))).astype(np.uint8)
    return changed.tobytes()


def cut_end(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Truncated."""
    return data[: int(rng.integers(0, len(data)))]


def cut_header(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Truncated within the header."""
    return data[: int(rng.integers(0, HEADER_BYTES))]


def cut_start(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Without its start."""
    return data[int(rng.integers(1, len(data))) :]


def cut_middle(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """With a hole that has closed."""
    start, stop = sorted(rng.integers(0, len(data), 2).tolist())
    return data[:start] + data[stop:]


def zero_middle(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """With a hole of zeros, as an interrupted copy leaves it."""
    start, stop = sorted(rng.integers(0, len(data), 2).tolist())
    return data[:start] + bytes(stop - start) + data[stop:]


def insert_noise(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """With up to 4 KiB of noise in between."""
    at = int(rng.integers(0, len(data)))
    return data[:at] + rng.bytes(int(rng.integers(1, 4096))) + data[at:]


def repeat_part(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """A part of it comes twice."""
    start, stop = sorted(rng.integers(0, len(data), 2).tolist())
    return data[:stop] + data[start:]


def splice_header(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Another file's header before this one's audio."""
    size = int(rng.integers(4, HEADER_BYTES))
    return other[:size] + data[size:]


def join_files(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Two files of any formats in one."""
    return data + other


def lie_in_header(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """1 to 4 numbers of 16 or 32 bits at the start become one of ``LIES``."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        lie = int(rng.choice(LIES))
        code = "H" if lie < 65_536 and rng.integers(2) else "I"
        at = 2 * int(rng.integers(2, 64)) if rng.integers(2) else int(rng.integers(4, HEADER_BYTES))
        if at + 4 <= len(changed):
            struct.pack_into("<>"[int(rng.integers(2))] + code, changed, at, lie)
    return bytes(changed)


def lie_in_sizes(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """The number behind, or before, a chunk's name lies: RIFF, AIFF, CAF, MP4, Ogg."""
    names = (b"data", b"fmt ", b"SSND", b"COMM", b"mdat", b"moov", b"stsz", b"stts", b"desc")
    found = [place for name in names if (place := data.find(name)) >= 4]
    if not found:
        return lie_in_header(data, rng, other)
    place = found[int(rng.integers(len(found)))]
    at = place + (-4, 4, 8, 12)[int(rng.integers(4))]
    changed = bytearray(data)
    if at + 4 <= len(data):
        order = "<>"[int(rng.integers(2))]
        struct.pack_into(f"{order}I", changed, at, int(rng.choice(LIES)))
    return bytes(changed)


def lie_in_format(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """A WAV's channels, rate, block size or bits lie; else as ``lie_in_header``."""
    at = data.find(b"fmt ", 0, 200)
    if at < 0 or at + 24 > len(data):
        return lie_in_header(data, rng, other)
    changed = bytearray(data)
    offset, code, values = (
        (10, "H", (0, 3, 64, 1024, 65_535)),
        (12, "I", (0, 1, 17, 768_000, 1 << 31, (1 << 32) - 1)),
        (20, "H", (0, 1, 7, 65_535)),
        (22, "H", (0, 1, 4, 12, 64, 65_535)),
        (8, "H", (0, 1, 2, 3, 6, 7, 17, 49, 85, 0xFFFE, 0xFFFF)),
    )[int(rng.integers(5))]
    struct.pack_into(f"<{code}", changed, at + offset, int(rng.choice(values)))
    return bytes(changed)


Mutation = Callable[[bytes, np.random.Generator, bytes], bytes]
MUTATIONS: tuple[Mutation, ...] = (
    untouched,
    flip_bits,
    flip_header_bits,
    cut_end,
    cut_header,
    cut_start,
    cut_middle,
    zero_middle,
    insert_noise,
    repeat_part,
    splice_header,
    join_files,
    lie_in_header,
    lie_in_sizes,
    lie_in_format,
)


@dataclass(frozen=True)
class Mutant:
    """One hostile file.

    Attributes:
        index: Its number.
        format: What it was before.
        mutation: What was done to it.
        data: Its bytes.
        extension: Its name's, if it goes by a file; None if it goes as bytes.
    """

    index: int
    format: str
    mutation: str
    data: bytes
    extension: str | None


class Corpus:
    """Makes mutants out of real recordings; number n of a seed is always the same."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self._seed = seed
        self._files = make_files(folder)
        self._formats = tuple(self._files)

    def mutant(self, index: int) -> Mutant:
        """Formats and mutations take turns, so that all pairs come up alike."""
        rng = np.random.default_rng([self._seed, index])
        name = self._formats[index % len(self._formats)]
        mutation = MUTATIONS[index // len(self._formats) % len(MUTATIONS)]
        data = self._draw(name, rng)
        other = self._draw(self._formats[int(rng.integers(len(self._formats)))], rng)
        changed = mutation(data, rng, other)
        extension = str(rng.choice(EXTENSIONS)) if rng.integers(2) else None
        return Mutant(index, name, mutation.__name__, changed, extension)

    def _draw(self, name: str, rng: np.random.Generator) -> bytes:
        files = self._files[name]
        return files[int(rng.integers(len(files)))]


def make_files(folder: Path) -> dict[str, list[bytes]]:
    """Real recordings in every format, mono and stereo, at some rates."""
    paths = sorted(folder.glob("*.ogg"))
    if not paths:
        raise SystemExit(f"there are no .ogg recordings in {folder}: give their folder with --data")
    drawn = itertools.cycle(paths[:: max(len(paths) // 40, 1)])
    return {
        name: [_make_file(next(drawn), name, index) for index in range(RECORDINGS_PER_FORMAT)]
        for name in FORMATS
    }


def _make_file(path: Path, name: str, index: int) -> bytes:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    rates = FORMATS[name].rates or (44_100, 32_000, 48_000)
    target = rates[index % len(rates)]
    stretch = samples[: round(DURATIONS_S[index] * rate), :1]
    resampled: Samples = np.clip(soxr.resample(stretch, rate, target), -1.0, 1.0)
    channels = 1 if name == "amr" or index % 2 == 0 else 2
    return encode(np.repeat(resampled, channels, axis=1), target, name)


# Decoding them


class TimedPool(DecodePool):
    """Notes how long each item takes in its decoder, in seconds."""

    def __init__(self, settings: DecodeSettings) -> None:
        super().__init__(settings)
        self.seconds: dict[str, float] = {}

    def begin(self, job: Any, child: Any) -> bool:
        """As the pool's, and start the clock."""
        self.seconds[job.item.clip_id] = time.monotonic()
        return super().begin(job, child)

    def end(self, job: Any, result: Decoded | None) -> None:
        """As the pool's, and stop the clock."""
        self.seconds[job.item.clip_id] = time.monotonic() - self.seconds[job.item.clip_id]
        super().end(job, result)


@dataclass
class ChildWatch:
    """Looks at the peak memory of this process's children, every now and then.

    Attributes:
        peak_mb: The largest peak of one child so far.
        pids: All children seen.
    """

    peak_mb: float = 0.0
    pids: set[int] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> ChildWatch:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            self.look()

    def look(self) -> None:
        """Note the children's peaks."""
        for task in Path("/proc/self/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the thread or the child has ended meanwhile
                for pid in task.read_text().split():
                    self._note(int(pid))

    def _note(self, pid: int) -> None:
        if b"transforms.decoding.child" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return  # just forked: what is there is still the parent's memory
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                self.pids.add(pid)
                self.peak_mb = max(self.peak_mb, int(line.split()[1]) / 1024)


@dataclass(frozen=True)
class End:
    """What came of a file.

    Attributes:
        outcome: ``whole``, ``part`` or ``error``.
        words: The warning or the message.
        error_type: Of an error, or of the trouble that ended a part; else empty.
    """

    outcome: str
    words: str
    error_type: str


def end_of(results: list[Decoded]) -> End:
    """The one end of a file's results.

    Raises:
        SystemExit: There is none, or more than one, or something follows it.
    """
    is_end = [isinstance(r, ItemFailure) or r.facts is not None for r in results]
    if is_end != [False] * (len(results) - 1) + [True]:
        raise SystemExit(f"a file has no single end: {results}")
    last = results[-1]
    if isinstance(last, ItemFailure):
        return End("error", last.failure.message, last.failure.error_type)
    if last.facts is None or last.facts.warning is None:
        return End("whole", "", "")
    words = last.facts.warning
    hung = "then stopped: the decoder gave no sign" in words
    crashed = "then stopped: the decoder was killed" in words or "stopped: the decoder e" in words
    return End("part", words, "DecoderHung" if hung else "DecoderCrashed" if crashed else "")


def decode_batch(pool: DecodePool, mutants: list[Mutant], folder: Path) -> Iterator[End]:
    """The ends of a batch's files, in order; every file has one."""
    results: dict[int, list[Decoded]] = {index: [] for index in range(len(mutants))}
    for result in pool.stream("batch", (_clip(mutant, folder) for mutant in mutants)):
        if isinstance(result, Waveform):  # hours of samples need not be kept
            result = dataclasses.replace(result, samples=result.samples[:0].copy())
        results[result.item_index].append(result)
    if len(results) != len(mutants):
        raise SystemExit(f"{len(mutants)} files went in, {len(results)} came out")
    yield from (end_of(results[index]) for index in range(len(mutants)))


def _clip(mutant: Mutant, folder: Path) -> EncodedClip:
    item = Item(str(mutant.index), str(mutant.index))
    if mutant.extension is None:
        return EncodedClip(item, data=mutant.data)
    path = folder / f"{mutant.index}.{mutant.extension}"
    path.write_bytes(mutant.data)
    return EncodedClip(item, path=str(path), delete_path=True)


# The report


@dataclass
class Report:
    """What came of all files.

    Attributes:
        outcomes: Files by (format, outcome).
        by_mutation: Files by (mutation, outcome).
        error_types: Errors by type.
        lost: Files that crashed or hung a decoder: (number, format, mutation, words).
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_mutation: Counter[tuple[str, str]] = field(default_factory=Counter)
    error_types: Counter[str] = field(default_factory=Counter)
    lost: list[tuple[int, str, str, str]] = field(default_factory=list)

    def add(self, mutant: Mutant, end: End, keep: Path | None) -> None:
        """Count a file in; one that cost its decoder is kept."""
        self.outcomes[mutant.format, end.outcome] += 1
        self.by_mutation[mutant.mutation, end.outcome] += 1
        if end.outcome == "error":
            self.error_types[end.error_type] += 1
        if end.error_type not in LOST:
            return
        self.lost.append((mutant.index, mutant.format, mutant.mutation, end.words))
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{mutant.index}-{mutant.format}-{mutant.mutation}").write_bytes(mutant.data)

    def print_table(self, title: str, counts: Counter[tuple[str, str]]) -> None:
        """Markdown: a row per format or mutation."""
        columns = ("whole", "part", "error")
        print(f"\n| {title} | files | whole | in part, with a warning | error |")
        print("|---|---:|---:|---:|---:|")
        names = list(dict.fromkeys(name for name, _ in counts))
        for name in names:
            row = [counts[name, column] for column in columns]
            print(f"| {name} | {sum(row):,} | " + " | ".join(f"{n:,}" for n in row) + " |")
        totals = [sum(counts[name, column] for name in names) for column in columns]
        cells = " | ".join(f"**{n:,}**" for n in (sum(totals), *totals))
        print(f"| **all** | {cells} |")


def nested(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Counts as JSON can hold them."""
    table: dict[str, dict[str, int]] = {}
    for (name, outcome), count in counts.items():
        table.setdefault(name, {})[outcome] = count
    return table


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fuzz, print, and give back the figures."""
    corpus = Corpus(arguments.data, arguments.seed)
    report, slowest = Report(), (0.0, "")
    settings = DecodeSettings(num_processes=2, max_item_s=arguments.max_item_s)
    parent_before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began_s = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        ChildWatch() as watch,
        TimedPool(settings) as pool,
    ):
        numbers = range(arguments.first, arguments.first + arguments.files)
        for batch in batches(numbers):
            mutants = [corpus.mutant(index) for index in batch]
            for mutant, end in zip(mutants, decode_batch(pool, mutants, Path(folder)), strict=True):
                report.add(mutant, end, arguments.keep)
                seconds = pool.seconds.pop(str(mutant.index))
                what = f"{mutant.index} ({mutant.format}, {mutant.mutation}): {end.outcome}"
                slowest = max(slowest, (seconds, f"{what} {end.words}".strip()))
            watch.look()
            done = batch[-1] + 1 - arguments.first
            print(f"\r{done:,} of {arguments.files:,}", end="", file=sys.stderr, flush=True)
        left = sorted(Path(folder).iterdir())
    if left:
        raise SystemExit(f"temporary files were left behind: {left[:5]}")
    report.print_table("format", report.outcomes)
    report.print_table("mutation", report.by_mutation)
    return {
        "files": arguments.files,
        "first": arguments.first,
        "seed": arguments.seed,
        "max_item_s": arguments.max_item_s,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "libsndfile": soundfile.__libsndfile_version__,
        "ffmpeg": ffmpeg_version(),
        "seconds": time.monotonic() - began_s,
        "crashes": sum("no sign of life" not in words for *_, words in report.lost),
        "hangs": sum("no sign of life" in words for *_, words in report.lost),
        "lost": report.lost,
        "decoders_started": len(watch.pids),
        "peak_decoder_mb": watch.peak_mb,
        "peak_parent_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_parent_mb_before": parent_before_mb,
        "slowest_seconds": slowest[0],
        "slowest": slowest[1],
        "error_types": dict(report.error_types.most_common()),
        "formats": nested(report.outcomes),
        "mutations": nested(report.by_mutation),
    }


def batches(numbers: range) -> Iterator[range]:
    """The numbers in groups, as work units hold them."""
    for start in range(0, len(numbers), BATCH_FILES):
        yield numbers[start : start + BATCH_FILES]


def ffmpeg_version() -> str:
    """The release of libavcodec that PyAV carries."""
    import av

    return "libavcodec " + ".".join(map(str, av.library_versions["libavcodec"]))


def main() -> None:
    """Fuzz, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/esc10/audio"))
    parser.add_argument("--keep", type=Path, help="folder for files that crash or hang a decoder")
    # A flipped bit makes hours of seconds (a rate of 3 Hz); the bound is part of what is tried.
    parser.add_argument("--max-item-s", type=float, default=3600.0)
    arguments = parser.parse_args()
    result = run(arguments)
    for name, value in result.items():
        if name not in ("formats", "mutations", "lost"):
            print(f"{name}: {value}")
    for lost in result["lost"]:
        print("LOST:", *lost)
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    if result["lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
