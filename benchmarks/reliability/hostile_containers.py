"""What do hostile containers cost? Bombs, huge cells, a million lines or members, long names.

    python -m benchmarks.reliability.hostile_containers [--cases gz_zeros_audio,csv_million]

Every case is made in a temporary folder and labelled by ``earmark label`` in a process of its own,
with a random tiny model and the default bounds. The table has its size on disk, what it would
expand to, the peak memory of the whole process tree (the sum of what its processes hold,
proportionally for what they share) and of its scratch files (both looked at every 50 ms), the time,
and what came of it. ``plan`` cases stop before labelling, which a million items make long: they
take the part that holds all of them at once. A case whose outcome is not the promised one, or that
takes more memory or scratch than promised, makes the exit code 1.

Prints a table and writes ``hostile_containers.json`` beside this file; see ``benchmarks/README.md``
for the figures. Linux only: it reads ``/proc``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support import audio_factory
from tests.support.model_factory import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
LOOK_EVERY_S = 0.05
GB, MB, KB = 1 << 30, 1 << 20, 1 << 10
GOOD = audio_factory.encode(audio_factory.noise(0.3), 16_000, "wav")
BLOCK = 100 * MB
MILLION = 1_000_000
# torch, Beam, the tiny model and two decoders, with nothing hostile at all: 640 to 740 MB.
BASE_MB = 750


@dataclass(frozen=True)
class Case:
    """One hostile input, and what is promised of it.

    Attributes:
        make: Writes it into a folder; returns what is to be labelled, and what that stands for.
        clips: Items that are labelled.
        errors: Items that become rows.
        code: The exit code.
        words: Must be in one of the rows' messages.
        memory_mb: The process tree takes less, beside ``BASE_MB``. Set from what was measured, and
            about half as much again: it tells when a later change takes more, no more than that.
        scratch_mb: Scratch files take less.
        plan: Only plan it.
    """

    make: Callable[[Path], tuple[Path, str]]
    clips: int
    errors: int = 0
    code: int = 0
    words: str = ""
    memory_mb: float = 350
    scratch_mb: float = 1
    plan: bool = False


# --- Making them ---------------------------------------------------------------------------


def member(name: str, data: bytes = GOOD) -> bytes:
    """A member as it lies in a tar."""
    return header(name, len(data)) + data + bytes(-len(data) % 512)


def header(name: str, size: int) -> bytes:
    """Its header alone."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


def zeros(size: int) -> bytes:
    """So many zeros (a multiple of 100 MB) as gzip: the same compressed block over and over."""
    return gzip.compress(bytes(BLOCK), 9) * (size // BLOCK)


def in_bytes(number: int) -> str:
    """Bytes, readable."""
    if number < MB:
        return f"{number:,} B"
    return f"{number / GB:,.1f} GB" if number >= GB else f"{number / MB:,.0f} MB"


def in_items(number: int) -> str:
    """Items, readable."""
    return f"{number:,} items"


def write_gz(path: Path, parts: Iterable[bytes]) -> int:
    """Write a compressed tar; returns its size decompressed."""
    total = 0
    with gzip.open(path, "wb", compresslevel=6) as file:
        for part in (*parts, bytes(1024)):
            total += file.write(part)
    return total


def gz_with(name: str, size: int) -> Callable[[Path], tuple[Path, str]]:
    """A good member, one of zeros, a good member."""

    def make(folder: Path) -> tuple[Path, str]:
        path = folder / "x.tar.gz"
        start = gzip.compress(member("a.wav") + header(name, size))
        path.write_bytes(start + zeros(size) + gzip.compress(member("b.wav") + bytes(1024)))
        return path, in_bytes(size)

    return make


def gz_nested(folder: Path) -> tuple[Path, str]:
    """A gzip of a gzip: the inner one is a file like any other."""
    path = folder / "x.tar.gz"
    write_gz(path, [member("a.wav"), member("inner.tar.gz", zeros(100 * BLOCK))])
    return path, in_bytes(100 * BLOCK)


def gz_sidecars(folder: Path) -> tuple[Path, str]:
    """A thousand siblings of 3 MB each for one recording."""
    text = b"[" + b"{}," * MB + b"{}]"
    path = folder / "x.tar.gz"
    one = gzip.compress(member("a.0.json", text), 9)
    path.write_bytes(gzip.compress(member("a.wav")) + one * 1000 + gzip.compress(bytes(1024)))
    return path, in_bytes(1000 * len(text))


def gz_long_names(folder: Path) -> tuple[Path, str]:
    """A thousand members whose names have a million characters each."""
    path = folder / "x.tar.gz"
    parts = (member(f"{n:04}" + "x" * 999_990 + ".wav", b"") for n in range(1000))
    return path, in_bytes(write_gz(path, [member("a.wav"), *parts]))


def tar_million(folder: Path) -> tuple[Path, str]:
    """A million members of one byte."""
    path = folder / "x.tar"
    with path.open("wb") as file:
        for number in range(MILLION):
            info = tarfile.TarInfo(f"{number:07}.wav")
            info.size = 1
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + b"x" + bytes(511))
        file.write(bytes(1024))
    return path, in_items(MILLION)


def tar_of_gigabytes(folder: Path) -> tuple[Path, str]:
    """A header that speaks of 100 GB, in a sparse file that is that large."""
    path = folder / "x.tar"
    size = 100 * GB
    with path.open("wb") as file:
        file.write(member("a.wav") + header("huge.wav", size))
        file.seek(size, os.SEEK_CUR)
        file.write(member("b.wav") + bytes(1024))
    return path, in_bytes(size)


def parquet_cells(count: int, size: int) -> Callable[[Path], tuple[Path, str]]:
    """Noise behind a good WAV in every cell; all of them in one page."""

    def make(folder: Path) -> tuple[Path, str]:
        path = folder / "x.parquet"
        noise = np.random.default_rng(0).bytes(size)
        table = pa.table({"audio": pa.array([GOOD + noise] * count, pa.large_binary())})
        pq.write_table(table, path, use_dictionary=False, compression="none")
        return path, in_bytes(count * size)

    return make


def parquet_page_bomb(folder: Path) -> tuple[Path, str]:
    """One page of 1.5 GB of zeros between two good row groups."""
    path = folder / "x.parquet"
    schema = pa.schema([("audio", pa.binary())])
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for cell in (GOOD, bytes(1500 * MB), GOOD):
            writer.write_table(pa.table({"audio": pa.array([cell], pa.binary())}))
    return path, in_bytes(1500 * MB)


def parquet_dictionary_bomb(folder: Path) -> tuple[Path, str]:
    """200 rows that are all the same 16 MB."""
    path = folder / "x.parquet"
    schema = pa.schema([("audio", pa.binary())])
    cell = GOOD + bytes(16 * MB)
    options: dict[str, object] = {"compression": "zstd", "dictionary_pagesize_limit": GB}
    with pq.ParquetWriter(path, schema, **options) as writer:
        for _ in range(4):
            writer.write_table(pa.table({"audio": pa.array([cell] * 50, pa.binary())}))
    return path, in_bytes(200 * len(cell))


def parquet_list_bomb(folder: Path) -> tuple[Path, str]:
    """A row with a list of 200 million zeros."""
    path = folder / "x.parquet"
    values = pa.array(np.zeros(200_000_000, np.int64))
    lists = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    pq.write_table(pa.table({"audio": [GOOD], "zeros": lists}), path, compression="zstd")
    return path, in_bytes(1600 * MB)


def parquet_nulls(folder: Path) -> tuple[Path, str]:
    """A billion rows of nothing."""
    path = folder / "x.parquet"
    nulls = pa.table({"audio": pa.nulls(50_000_000, pa.binary())})
    with pq.ParquetWriter(path, nulls.schema, compression="zstd") as writer:
        for _ in range(20):
            writer.write_table(nulls, row_group_size=len(nulls))
    return path, in_items(1_000_000_000)


def manifest(name: str) -> Callable[[Path], tuple[Path, str]]:
    """A million segments of one file."""

    def make(folder: Path) -> tuple[Path, str]:
        (folder / "good.wav").write_bytes(GOOD)
        path = folder / name
        starts = np.arange(MILLION) / 1000
        if path.suffix == ".parquet":
            pq.write_table(
                pa.table({"uri": ["good.wav"] * MILLION, "start_s": starts, "end_s": starts + 0.3}),
                path,
            )
            return path, in_items(MILLION)
        with path.open("w") as file:
            file.write("uri,start_s,end_s\n" if path.suffix == ".csv" else "")
            for start_s in starts:
                row = {"uri": "good.wav", "start_s": start_s, "end_s": start_s + 0.3}
                file.write(
                    ",".join(map(str, row.values())) if path.suffix == ".csv" else json.dumps(row)
                )
                file.write("\n")
        return path, in_items(MILLION)

    return make


def manifest_missing(folder: Path) -> tuple[Path, str]:
    """A million files that are not there."""
    path = folder / "list.jsonl"
    with path.open("w") as file:
        for number in range(MILLION):
            file.write(f'{{"uri": "{number:07}.wav", "label": "x"}}\n')
    return path, in_items(MILLION)


def manifest_bad_lines(folder: Path) -> tuple[Path, str]:
    """A good line and 100,000 that are no JSON; each is a row of the result."""
    (folder / "good.wav").write_bytes(GOOD)
    path = folder / "list.jsonl"
    path.write_text('{"uri": "good.wav"}\n' + "{oops\n" * 100_000)
    return path, in_items(100_001)


def manifest_missing_rows(folder: Path) -> tuple[Path, str]:
    """A good line and 100,000 files that are not there; each is a row of the result."""
    (folder / "good.wav").write_bytes(GOOD)
    path = folder / "list.jsonl"
    lines = "".join(f'{{"uri": "{number:06}.wav"}}\n' for number in range(100_000))
    path.write_text('{"uri": "good.wav"}\n' + lines)
    return path, in_items(100_001)


def manifest_one_line(folder: Path) -> tuple[Path, str]:
    """A line of 100 MB, and a good one."""
    (folder / "good.wav").write_bytes(GOOD)
    path = folder / "list.jsonl"
    path.write_text('{"uri": "' + "x" * (100 * MB) + '"}\n{"uri": "good.wav"}\n')
    return path, in_bytes(100 * MB)


def manifest_deep(folder: Path) -> tuple[Path, str]:
    """15 MB of small lists in one line: what takes JSON the most memory per byte."""
    (folder / "good.wav").write_bytes(GOOD)
    path = folder / "list.jsonl"
    path.write_text('{"uri": "good.wav", "x": [' + "{}," * (5 * MB) + "{}]}\n")
    return path, in_bytes(15 * MB)


def nothing(folder: Path) -> tuple[Path, str]:
    """A good file, for the base."""
    (folder / "good.wav").write_bytes(GOOD)
    return folder / "good.wav", in_bytes(len(GOOD))


EXPANSION = "raise read.max_expansion"
PAGE = "raise read.max_page_bytes"
CASES: dict[str, Case] = {
    "one good file": Case(nothing, clips=1),
    "gz_zeros_audio": Case(gz_with("bomb.wav", 100 * BLOCK), 1, 1, 3, EXPANSION, scratch_mb=1500),
    "gz_zeros_other": Case(gz_with("bomb.bin", 100 * BLOCK), 1, 1, 3, EXPANSION),
    "gz_zeros_json": Case(gz_with("a.json", 100 * BLOCK), 1, 1, 3, EXPANSION),
    "gz_zeros_below_bound": Case(gz_with("b.bin", 9 * BLOCK), 2),
    "gz_nested": Case(gz_nested, 1),
    "gz_sidecars_3gb": Case(gz_sidecars, 1, 1, 3, EXPANSION),
    "gz_names_1mb": Case(gz_long_names, 1, 1000),
    "tar_100gb_member": Case(tar_of_gigabytes, 2, 1, 0, "raise decode.max_item_bytes"),
    "tar_million_members": Case(tar_million, 0, plan=True, memory_mb=700),
    "parquet_600x1mb": Case(parquet_cells(600, MB), 600, memory_mb=1900),
    "parquet_4x200mb": Case(parquet_cells(4, 200 * MB), 4, memory_mb=2900, scratch_mb=500),
    "parquet_page_bomb": Case(parquet_page_bomb, 2, 1, 3, PAGE, memory_mb=500),
    "parquet_dictionary_bomb": Case(parquet_dictionary_bomb, 200, memory_mb=900),
    "parquet_list_bomb": Case(parquet_list_bomb, 0, 1, 3, PAGE),
    "parquet_billion_nulls": Case(parquet_nulls, 0, 1, 3, "a row takes at least one"),
    "jsonl_million": Case(manifest("list.jsonl"), 0, plan=True, memory_mb=1600),
    "csv_million": Case(manifest("list.csv"), 0, plan=True, memory_mb=1600),
    "parquet_million": Case(manifest("list.parquet"), 0, plan=True, memory_mb=1500),
    "jsonl_million_missing": Case(manifest_missing, 0, plan=True, memory_mb=2400),
    "jsonl_100000_missing": Case(manifest_missing_rows, 1, 100_000, memory_mb=600),
    "jsonl_100000_bad_lines": Case(manifest_bad_lines, 1, 100_000, memory_mb=600),
    "jsonl_100mb_line": Case(manifest_one_line, 1, 1),
    "jsonl_15mb_of_dicts": Case(manifest_deep, 1, memory_mb=1200),
}


# --- Running them --------------------------------------------------------------------------


@dataclass
class Peaks:
    """The most that was seen.

    Attributes:
        memory_bytes: Of the process tree.
        scratch_bytes: Of the scratch folder.
    """

    memory_bytes: int = 0
    scratch_bytes: int = 0

    def look(self, pid: int, scratch: Path) -> None:
        """Note what there is now."""
        self.memory_bytes = max(self.memory_bytes, sum(map(held_bytes, tree_of(pid))))
        self.scratch_bytes = max(self.scratch_bytes, folder_bytes(scratch))


def tree_of(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += tree_of(int(child))
    return found


def held_bytes(pid: int) -> int:
    """Memory that a process holds; what it shares counts in part."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * KB
    return 0


def folder_bytes(folder: Path) -> int:
    """Blocks on disk of all files below."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512 if path.is_file() else 0
    return total


PLAN = """
import sys
from pipeline.config.label import RunConfig
from pipeline.labelling.plan import make_plan, describe_plan
plan = make_plan(RunConfig(inputs=(sys.argv[1],), output=sys.argv[2], model={"name": sys.argv[3]}))
print(describe_plan(plan)[-1], file=sys.stderr)
"""


@dataclass(frozen=True)
class Result:
    """A line of the table."""

    case: str
    disk_mb: float
    stands_for: str
    memory_mb: float
    scratch_mb: float
    seconds: float
    outcome: str
    broken: str


def run_case(name: str, case: Case, model: Path, folder: Path) -> Result:
    """Make a case, run it, hold it to its promise."""
    (folder / "in").mkdir()
    scratch, out = folder / "scratch", folder / "out"
    scratch.mkdir()
    path, stands_for = case.make(folder / "in")
    label = ["-m", "pipeline", "label", str(path), "--output", str(out), "--model", str(model)]
    label += ["--device", "cpu", "--precision", "fp32", "--quiet", "--max-failed", "1"]
    label += ["--set", "decode.processes=2"]
    command = ["-c", PLAN, str(path), str(out), str(model)] if case.plan else label
    began, peaks = time.monotonic(), Peaks()
    with (folder / "words").open("w+") as words:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=words,
        )
        while process.poll() is None:
            peaks.look(process.pid, scratch)
            time.sleep(LOOK_EVERY_S)
        seconds = time.monotonic() - began
        words.seek(0)
        said = words.read()
    clips, errors = ([] if case.plan else rows(out, part) for part in ("clips", "errors"))
    outcome = f"{len(clips):,} labelled, {len(errors):,} rows, exit {process.returncode}"
    result = Result(
        case=name,
        disk_mb=path.stat().st_blocks * 512 / MB,
        stands_for=stands_for,
        memory_mb=peaks.memory_bytes / MB,
        scratch_mb=peaks.scratch_bytes / MB,
        seconds=seconds,
        outcome=said.strip().rpartition("\n")[2] if case.plan else outcome,
        broken="",
    )
    return dataclasses.replace(result, broken="; ".join(broken(case, result, clips, errors, said)))


def rows(out: Path, part: str) -> list[str | None]:
    """The messages of a table's rows, or None for each clip."""
    column = "message" if part == "errors" else "warning"
    found: list[str | None] = []
    for path in (out / part).glob("*.parquet"):
        found += pq.read_table(path, columns=[column])[column].to_pylist()
    return found


def broken(
    case: Case, result: Result, clips: list[str | None], errors: list[str | None], said: str
) -> Iterator[str]:
    """Which promises are broken."""
    expected = f"{case.clips:,} labelled, {case.errors:,} rows, exit {case.code}"
    if not case.plan and result.outcome != expected:
        yield f"promised: {expected}; {said[-500:]}"
    if case.plan and "To do: " not in result.outcome:
        yield f"not planned: {said[-500:]}"
    if case.words and not any(case.words in str(message) for message in errors):
        yield f"no row says {case.words!r}"
    if result.memory_mb > BASE_MB + case.memory_mb:
        yield f"memory above {BASE_MB + case.memory_mb:g} MB"
    if result.scratch_mb > case.scratch_mb:
        yield f"scratch above {case.scratch_mb:g} MB"


def main() -> None:
    """Run the cases, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", help="names, separated by commas; all by default")
    arguments = parser.parse_args()
    names = arguments.cases.split(",") if arguments.cases else list(CASES)
    print("| case | on disk, MB | stands for | memory, MB | scratch, MB | seconds | outcome |")
    print("|---|--:|--:|--:|--:|--:|---|")
    results = []
    with tempfile.TemporaryDirectory() as top:
        model = write_tiny_model(Path(top) / "model")
        for name in names:
            with tempfile.TemporaryDirectory(dir=top) as folder:
                result = run_case(name, CASES[name], model, Path(folder))
            results.append(result)
            print(
                f"| {name} | {result.disk_mb:,.2f} | {result.stands_for} | "
                f"{result.memory_mb:,.0f} | {result.scratch_mb:,.0f} | {result.seconds:.0f} | "
                f"{result.outcome}{' BROKEN: ' if result.broken else ''}{result.broken} |",
                flush=True,
            )
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "pyarrow": pa.__version__,
        "base_mb": BASE_MB,
        "cases": [dataclasses.asdict(result) for result in results],
    }
    if not arguments.cases:
        Path(__file__).with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    if any(result.broken for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
