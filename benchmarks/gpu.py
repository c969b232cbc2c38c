"""How fast is it on a GPU? How near the model is to the chip, and the whole run to the model.

    python -m benchmarks.gpu [--parts matrices model fbank end-to-end] [--data FOLDER]

It runs on any machine with torch (2.11 or later) and a CUDA device; what else a part needs it looks
for first, and what is left out is said, with the reason:

* matrices: operations a second of the product of large square matrices, the best of several sizes,
  in every precision. That is what a chip can do in practice, and what shares are taken of. The
  matrices are larger than any cache, and random: of zeros, a chip multiplies more.
* model: AST base, features ready on the device, by batch size, engine and precision. A share counts
  261 GFLOP a window, all that AST is said to take, against bf16's matrix rate. Earmark leaves out
  what no score needs of the last block (7 %); the other share counts what is really done, against
  the matrix rate of the same precision.
* fbank: features made on the device, of samples that lie there and of samples that come from the
  host, and how far they are from torchaudio's on the CPU. Needs Earmark's dependencies.
* end-to-end: ``earmark label`` over tars of FLAC, MP3 and WAV, to committed Parquet, with one and
  two worker processes on the device; the decoders alone; the model alone; and the Hugging Face
  pipeline on the same device at its best batch size and precision. Needs Earmark's dependencies,
  and transformers.

End to end, a rate is that of the steady part of one run: the clips committed after the first
quarter of its units, over the time from then to the last commit. The rates of the decoders and of
the model alone decide how many clips a run has. NVML, the driver's library, tells how busy the
device was meanwhile. All of it ends within ``--minutes``: a case that does not fit is left out, and
the reason is kept. A run that takes far longer than expected is killed, and its commits still give
a rate. Figures are kept after every measurement.

A clip is 10 s at 44.1 kHz: a recording, drawn out by repetition. A run's tars are hard links to a
single tar of a few distinct clips, so they are read from memory, not from the disk.

Without a GPU, ``--toy --device cpu`` goes the same way with a tiny model, and says nothing about
speed. Prints tables and writes ``gpu.json`` and ``gpu.png`` beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import (
    RATE_HZ,
    ROOT,
    WINDOW_SAMPLES,
    CutOffError,
    count_flops,
    drawn,
    link_inputs,
    median,
    print_table,
    run_module,
    write_results,
)
from benchmarks.steady import (
    DeviceMonitor,
    Minutes,
    clips_by_second,
    read_commit_times,
    steady_part,
)
from transforms.inference.backbones import (
    PooledTransformer,
    resolve_device,
    resolve_precision,
    true_float32,
)
from transforms.models.ast.config import ASTConfig
from transforms.models.ast.model import ASTModel

Call = Callable[[], object]

STRETCHES = 5  # that the time of a measurement is divided into; the median of them counts
CLIP_S = 10.0
CLIP_RATE_HZ = 44_100
FORMATS = ("flac", "mp3", "wav")
MAX_CLIPS_PER_SHARD = 256  # a unit's windows, by default
SHARDS_PER_RUN = 32  # at least
STEADY_SHARE = 0.75  # of a run's clips
GUESSED_RATE = 100.0  # clips a second, where nothing else tells
PIPELINE = "Hugging Face pipeline"
MAX_DISTINCT_CLIPS = 64
SAMPLES = ROOT / "samples"
RECORDING_SUFFIXES = frozenset({".wav", ".ogg", ".flac", ".mp3"})
NUM_COMPARED = 32  # windows whose features are compared with the CPU's


@dataclass(frozen=True)
class Precision:
    """A way to multiply.

    Attributes:
        dtype: Of the operands.
        may_use_tf32: Whether float32 may be cut to 19 bits first, which cuda alone can.
    """

    dtype: torch.dtype
    may_use_tf32: bool = False


PRECISIONS = {
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
    "tf32": Precision(torch.float32, may_use_tf32=True),
    "fp32": Precision(torch.float32),
}
ENGINES = ("eager", "compile")


@dataclass(frozen=True)
class Size:
    """How large the benchmark is.

    Attributes:
        config: The model's shape.
        matrix_sizes: Sides of the squares.
        batch_sizes: Windows at once, of the model run as it is.
        compiled_batch_sizes: Those that it is compiled for, which takes a minute each.
        compiled_precisions: Those of the precisions tried that it is compiled in.
        fbank_batch_sizes: Windows at once, of features.
        seconds: That a measurement takes, about.
        steady_s: Seconds that the steady part of a run end to end should take.
        min_steady_s: Seconds below which it tells nothing.
        start_s: Seconds that a run takes beside its clips, until one has told.
        decode_s: Seconds for which decoders run alone.
        pipeline_s: Seconds of each setting of the Hugging Face pipeline.
        pipeline_batch_sizes: Those that it is tried with.
        pipeline_precisions: Those that it is tried with, where the device has them.
    """

    config: ASTConfig
    matrix_sizes: Sequence[int]
    batch_sizes: Sequence[int]
    compiled_batch_sizes: Sequence[int]
    compiled_precisions: Sequence[str]
    fbank_batch_sizes: Sequence[int]
    seconds: float
    steady_s: float
    min_steady_s: float
    start_s: float
    decode_s: float
    pipeline_s: float
    pipeline_batch_sizes: Sequence[int]
    pipeline_precisions: Sequence[str]


FULL = Size(
    config=ASTConfig(num_labels=527, problem_type="multi_label_classification"),
    matrix_sizes=(4096, 6144, 8192, 12288, 16384),
    batch_sizes=(1, 4, 16, 32, 64, 128, 256),
    compiled_batch_sizes=(64, 128),
    compiled_precisions=tuple(PRECISIONS),
    fbank_batch_sizes=(16, 64, 256),
    seconds=3.0,
    steady_s=18.0,
    min_steady_s=6.0,
    start_s=40.0,
    decode_s=5.0,
    pipeline_s=5.0,
    pipeline_batch_sizes=(32, 64),
    pipeline_precisions=("bf16", "fp16"),
)
TOY = Size(
    config=ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        frequency_stride=16,
        time_stride=16,
        problem_type="multi_label_classification",
    ),
    matrix_sizes=(64, 128),
    batch_sizes=(1, 2),
    compiled_batch_sizes=(2,),
    compiled_precisions=tuple(PRECISIONS),
    fbank_batch_sizes=(2,),
    seconds=0.05,
    steady_s=0.5,
    min_steady_s=0.1,
    start_s=10.0,
    decode_s=0.2,
    pipeline_s=0.1,
    pipeline_batch_sizes=(2,),
    pipeline_precisions=("fp32",),
)


@dataclass(frozen=True)
class Bench:
    """What all parts have in common.

    Attributes:
        device: As torch names it.
        size: How large the benchmark is.
        is_toy: Whether that is only to see that all of it runs.
        engines: Those of the model that are tried.
        precisions: Those that are tried.
        rounds: Of what is measured end to end, while the minutes last.
        recordings: What clips are made of; none for noise.
        formats: What clips are encoded in.
        workers: Numbers of worker processes that label is run with.
        minutes: For all that is measured end to end.
    """

    device: str
    size: Size
    is_toy: bool
    engines: Sequence[str]
    precisions: Sequence[str]
    rounds: int
    recordings: Sequence[Path]
    formats: Sequence[str]
    workers: Sequence[int] = (1, 2)
    minutes: float = 10.0


# Time


def seconds_of(call: Call, device: str, seconds: float) -> float:
    """Seconds that a call takes: the device's own time where it is a GPU, else the clock's.

    It runs a few times unmeasured first. What counts is the median of several stretches.
    """
    for _ in range(3):
        call()
    once_s = max(_elapsed_s(call, device, 1), 1e-6)
    num_calls = max(1, round(seconds / STRETCHES / once_s))
    return median([_elapsed_s(call, device, num_calls) for _ in range(STRETCHES)]) / num_calls


def _elapsed_s(call: Call, device: str, num_calls: int) -> float:
    if device != "cuda":
        began_s = time.perf_counter()
        for _ in range(num_calls):
            call()
        return time.perf_counter() - began_s
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    for _ in range(num_calls):
        call()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000.0


@contextlib.contextmanager
def multiplying(precision: Precision) -> Iterator[None]:
    """No gradients, and TF32 where it is wanted, and nowhere else."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision.may_use_tf32 else "highest")
    exactly = contextlib.nullcontext() if precision.may_use_tf32 else true_float32
    try:
        with torch.inference_mode(), exactly:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# The parts


def measure_matrices(bench: Bench) -> dict[str, dict[str, Any]]:
    """Operations a second of matrix products: for each precision, of each size and the best."""
    found = {}
    for name in bench.precisions:
        precision, tflops = PRECISIONS[name], {}
        with multiplying(precision):
            for size in bench.size.matrix_sizes:
                left, right = (
                    torch.randn(size, size, device=bench.device, dtype=precision.dtype)
                    for _ in range(2)
                )
                target = torch.empty_like(left)
                call = functools.partial(torch.matmul, left, right, out=target)
                tflops[size] = 2 * size**3 / seconds_of(call, bench.device, bench.size.seconds)
        found[name] = {
            "best_tflops": max(tflops.values()) / 1e12,
            "tflops": {str(size): value / 1e12 for size, value in tflops.items()},
        }
    print_table(
        ("matrix products", "TFLOP/s", "by size"),
        [(name, rate["best_tflops"], _listed(rate["tflops"])) for name, rate in found.items()],
    )
    return found


def _listed(tflops: Mapping[str, float]) -> str:
    return ", ".join(f"{size}: {value:.3g}" for size, value in tflops.items())


def measure_model(bench: Bench, matrices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Windows a second of the model alone, in every setting that is asked for."""
    found = []
    for name in bench.precisions:
        precision = PRECISIONS[name]
        transformer = PooledTransformer(ASTModel(bench.size.config), "pooler_output").eval()
        transformer = transformer.to(bench.device, precision.dtype)
        with multiplying(precision):
            for engine in bench.engines:
                sizes = bench.size
                if engine == "compile" and name not in sizes.compiled_precisions:
                    continue
                batch_sizes = sizes.batch_sizes if engine == "eager" else sizes.compiled_batch_sizes
                for batch_size in batch_sizes:
                    setting = {"precision": name, "engine": engine, "batch_size": batch_size}
                    measured = _measure_setting(bench, transformer, precision, engine, batch_size)
                    found.append({**setting, **measured})
    for row in found:
        row |= _shares(bench.size.config, row, matrices)
    print_table(
        (
            *("precision", "engine", "batch", "windows/s", "share of bf16's matrix rate"),
            *("really done, of its own", "compiling, s"),
        ),
        [
            (
                *(row["precision"], row["engine"], row["batch_size"]),
                row.get("windows_per_s", row.get("error")),
                *(_percent(row.get(key)) for key in ("share", "own_share")),
                row.get("compile_s", "–"),
            )
            for row in found
        ],
    )
    return found


def _measure_setting(
    bench: Bench, transformer: PooledTransformer, precision: Precision, engine: str, batch_size: int
) -> dict[str, Any]:
    """One row of the model's table; with ``error`` where it does not run."""
    config = bench.size.config
    shape = (batch_size, config.max_length, config.num_mel_bins)
    run: Callable[[Tensor], object] = transformer
    told: dict[str, Any] = {}
    try:
        features = torch.randn(shape, device=bench.device, dtype=precision.dtype)
        if engine == "compile":
            torch.compiler.reset()
            run = torch.compile(transformer, dynamic=False)  # as Earmark's engine does
            began_s = time.perf_counter()
            run(features)
            told["compile_s"] = time.perf_counter() - began_s
        seconds = seconds_of(lambda: run(features), bench.device, bench.size.seconds)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        if engine == "eager":
            raise
        return {"error": f"cannot be compiled: {str(error).strip().splitlines()[0]}"}
    finally:
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return {"windows_per_s": batch_size / seconds, "batch_ms": 1000.0 * seconds, **told}


def _shares(
    config: ASTConfig, row: Mapping[str, Any], matrices: Mapping[str, Any]
) -> dict[str, float]:
    """What a rate is of the matrix rates, where both are known."""
    rate = row.get("windows_per_s")
    shares = {}
    if rate is not None and "bf16" in matrices:
        nominal = rate * count_flops(config) / 1e12
        shares["share"] = nominal / matrices["bf16"]["best_tflops"]
    if rate is not None and row["precision"] in matrices:
        done = rate * count_flops(config, pooled_alone=True) / 1e12
        shares["own_share"] = done / matrices[row["precision"]]["best_tflops"]
    return shares


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def measure_fbank(bench: Bench) -> dict[str, Any]:
    """Windows a second of features, and how far they are from the CPU's."""
    from transforms.features.fbank import DeviceFbank, FbankSettings, KaldiFbank, extract_fbank

    settings, device = FbankSettings(), torch.device(bench.device)
    windows = _windows(bench)
    on_device, from_host = KaldiFbank(settings).to(device), DeviceFbank(settings, device)
    seconds = functools.partial(seconds_of, device=bench.device, seconds=bench.size.seconds)
    rows = []
    with multiplying(PRECISIONS["fp32"]):
        for batch_size in bench.size.fbank_batch_sizes:
            batch = [windows[index % len(windows)] for index in range(batch_size)]
            samples = torch.from_numpy(np.stack(batch)).to(device)
            parts = samples.split(DeviceFbank.MAX_WINDOWS)
            there_s = seconds(lambda parts=parts: [on_device(part) for part in parts])
            sent_s = seconds(lambda batch=batch: from_host(batch))
            rows.append(
                {
                    "batch_size": batch_size,
                    "windows_per_s": batch_size / there_s,
                    "from_host_windows_per_s": batch_size / sent_s,
                }
            )
        found = from_host(windows).cpu().numpy()
    expected = np.stack([extract_fbank(window, settings) for window in windows])
    difference = np.abs(found - expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cpu_s = seconds_of(lambda: extract_fbank(windows[0], settings), "cpu", bench.size.seconds)
    finally:
        torch.set_num_threads(threads)
    result = {
        "rates": rows,
        "one_core_windows_per_s": 1.0 / cpu_s,
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
    }
    print_table(
        ("features, batch", "windows/s, samples on the device", "windows/s, samples on the host"),
        [tuple(row.values()) for row in rows],
    )
    print(
        f"one core, torchaudio: {1.0 / cpu_s:,.0f} windows/s; the features differ by at most "
        f"{result['max_difference']:.2g}"
    )
    return result


def _windows(bench: Bench) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Samples at the model's rate, a full window each."""
    import soxr

    wanted = 2 if bench.is_toy else NUM_COMPARED
    windows = []
    for samples, rate_hz in _each_clip(bench, wanted, WINDOW_SAMPLES / RATE_HZ):
        resampled = soxr.resample(samples, rate_hz, RATE_HZ).astype(np.float32)
        windows.append(np.resize(resampled, WINDOW_SAMPLES))
    return windows


def _each_clip(
    bench: Bench, num_clips: int, duration_s: float
) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.float32]], int]]:
    """Mono clips of a length, and their rates: recordings, repeated to that length, or noise."""
    import soundfile

    generator = np.random.default_rng(0)
    for index in range(num_clips):
        if bench.recordings:
            recording = bench.recordings[index % len(bench.recordings)]
            samples, rate_hz = soundfile.read(recording, dtype="float32", always_2d=True)
            samples = samples.mean(axis=1)
        else:
            rate_hz = 44_100
            samples = generator.normal(0, 0.1, rate_hz).astype(np.float32)
        yield np.resize(samples, round(duration_s * rate_hz)), rate_hz


# End to end


def measure_end_to_end(
    bench: Bench,
    model_rows: Sequence[Mapping[str, Any]],
    keep: Callable[[Mapping[str, Any]], None],
    found: dict[str, Any],
) -> None:
    """Clips a second of Earmark by format and workers, of what bounds it, and of the pipeline.

    Args:
        bench: How.
        model_rows: What the model alone did, where that has been measured.
        keep: Called after each measurement, with all that has been found by then.
        found: Where the figures go.
    """
    minutes = Minutes(60.0 * bench.minutes)
    precision = resolve_precision("auto", bench.device)
    found |= {"precision": precision, "minutes": bench.minutes, "model_alone": None}
    found |= {"formats": {name: {"workers": {}} for name in bench.formats}}
    found |= {"pipeline": {}, "left_out": {}}
    with tempfile.TemporaryDirectory() as name:
        run = EndToEnd(bench, Path(name), minutes, found)
        for number, case in enumerate(cases := run.cases(model_rows)):
            num_long = sum(each.is_long for each in cases[number:])
            run.measure(case, minutes.left_s / max(1, num_long))
            _sum_up(found)
            keep(found)
        for case in [case for _ in range(1, bench.rounds) for case in cases]:
            fits = case.is_repeated and minutes.why_not(case.needed_s()) is None
            if fits and case.name not in found["left_out"]:
                run.measure(case, minutes.left_s)
                _sum_up(found)
                keep(found)
    _show_end_to_end(found)


@dataclass(frozen=True)
class Case:
    """Something that is measured end to end, if the minutes last.

    Attributes:
        name: As it is reported.
        needed_s: Tells how long it takes at least.
        measure: Measures it; given the seconds that it should take, all included.
        is_long: Whether it takes its share of the minutes, rather than a few seconds.
        is_repeated: Whether another round measures it again.
    """

    name: str
    needed_s: Callable[[], float]
    measure: Callable[[float], None]
    is_long: bool = False
    is_repeated: bool = False


class EndToEnd:
    """What is measured end to end, within the minutes.

    Args:
        bench: How.
        folder: For the model, the clips and the results.
        minutes: What is left of them.
        found: Where the figures go.
    """

    def __init__(self, bench: Bench, folder: Path, minutes: Minutes, found: dict[str, Any]) -> None:
        self._bench = bench
        self._folder = folder
        self._minutes = minutes
        self._found = found
        self._starts_s: dict[int, float] = {}  # by workers, once a run has told
        self._monitor = DeviceMonitor(bench.device)
        self._environment = {"EARMARK_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        self._model = _write_model(folder / "model", bench)
        self._clips = list(_end_to_end_clips(bench))
        self._shards = Shards(folder / "shards", self._clips)

    def cases(self, model_rows: Sequence[Mapping[str, Any]]) -> list[Case]:
        """Everything, what matters most first."""
        by_format = [self._cases_of(name) for name in self._bench.formats]
        size = self._bench.size
        model = Case(
            "model alone",
            lambda: 0.0 if model_rows else size.start_s,
            lambda share_s: self._find_model_rate(model_rows),
        )
        pipeline = Case(PIPELINE, lambda: size.start_s, self._measure_pipeline, is_long=True)
        return [model, *by_format[0], pipeline, *itertools.chain(*by_format[1:])]

    def _cases_of(self, format_name: str) -> list[Case]:
        size = self._bench.size
        decoders = Case(
            f"{format_name}, decoders alone",
            lambda: 2 * size.decode_s,
            lambda share_s: self._measure_decoders(format_name),
        )
        labels = [
            Case(
                f"{format_name}, workers={workers}",
                lambda workers=workers: self._start_s(workers) + size.min_steady_s / STEADY_SHARE,
                functools.partial(self._measure_label, format_name, workers),
                is_long=True,
                is_repeated=True,
            )
            for workers in self._bench.workers
        ]
        return [decoders, *labels]

    def measure(self, case: Case, share_s: float) -> None:
        """Measure a case, or note why not: no time, or an error."""
        reason = self._minutes.why_not(case.needed_s())
        if reason is None:
            try:
                case.measure(share_s)
            except (SystemExit, CutOffError) as error:
                reason = f"failed: {_last_line(error)}"
        if reason is not None:
            self._found["left_out"].setdefault(case.name, reason)
            print(f"left out: {case.name}: {reason}", flush=True)

    def _find_model_rate(self, model_rows: Sequence[Mapping[str, Any]]) -> None:
        """The best of the model's rows in a run's own precision; measured if there is none."""
        precision = self._found["precision"]
        rows = [row for row in model_rows if row["precision"] == precision]
        rows = rows or _measure_model_alone(self._bench, precision)
        self._found["model_alone"] = max(rows, key=lambda row: row.get("windows_per_s", 0.0))

    def _measure_decoders(self, format_name: str) -> None:
        size, shard_clips = self._bench.size, 8 if self._bench.is_toy else MAX_CLIPS_PER_SHARD
        source, _ = self._shards.link(format_name, SHARDS_PER_RUN * shard_clips)
        rate = _decode_rate(source, size.decode_s)
        self._found["formats"][format_name]["decoders_alone_clips_per_s"] = rate
        print(f"{format_name}, decoders alone: {rate:.0f} clips/s", flush=True)

    def _start_s(self, workers: int) -> float:
        """Seconds that a run takes beside its clips."""
        slowest_s = max(self._starts_s.values(), default=self._bench.size.start_s)
        return self._starts_s.get(workers, slowest_s)

    def _expected_rate(self, format_name: str) -> float:
        """Clips a second that a run is expected to do, from what has been measured by then."""
        figures = self._found["formats"][format_name]
        rates = [workers["clips_per_s"] for workers in figures["workers"].values()]
        if rates:
            return max(rates)
        model = self._found["model_alone"] or {}
        known = [figures.get("decoders_alone_clips_per_s"), model.get("windows_per_s")]
        return min((rate for rate in known if rate is not None), default=GUESSED_RATE)

    def _measure_label(self, format_name: str, workers: int, share_s: float) -> None:
        size, rate = self._bench.size, self._expected_rate(format_name)
        start_s = self._start_s(workers)
        steady_s = (share_s - start_s) * STEADY_SHARE
        steady_s = min(size.steady_s, max(size.min_steady_s, steady_s))
        source, num_clips = self._shards.link(format_name, rate * steady_s / STEADY_SHARE)
        timeout_s = min(self._minutes.left_s, 10.0 + 2 * (start_s + num_clips / rate))
        run = self._label(source, workers, timeout_s)
        run["clips"] = num_clips
        if not run["cut_off"]:
            self._starts_s[workers] = max(1.0, run["seconds"] - num_clips / run["clips_per_s"])
        workers_found = self._found["formats"][format_name]["workers"]
        workers_found.setdefault(str(workers), {"runs": []})["runs"].append(run)
        print(
            f"{format_name}, workers={workers}: {run['clips_per_s']:.0f} clips/s for "
            f"{run['steady_s']:.0f} of {run['seconds']:.0f} s; the device waits: "
            f"{_percent(run.get('device_waits'))}",
            flush=True,
        )

    def _label(self, source: Path, workers: int, timeout_s: float) -> dict[str, Any]:
        """The figures of one run.

        Raises:
            SystemExit: It failed, or was killed before it told anything.
        """
        with tempfile.TemporaryDirectory(dir=self._folder) as output:
            target = Path(output) / "out"
            given = [str(source), "--output", str(target), "--model", str(self._model)]
            asked = ["--device", self._bench.device, "--engine", "torch", "--quiet"]
            asked += ["--workers", str(workers)]
            began_s, cut_off = time.time(), False
            with self._monitor.running():
                try:
                    arguments = ["label", *given, *asked]
                    run_module("pipeline", arguments, self._environment, timeout_s)
                except CutOffError:
                    cut_off = True
            seconds = time.time() - began_s
            commits = read_commit_times(target)
            run = {} if cut_off else json.loads((target / "run.json").read_text())
        steady = steady_part(commits)
        if steady is None:
            raise SystemExit(f"{len(commits)} units in {seconds:.0f} s are too few for a rate")
        return {
            "clips_per_s": steady.clips_per_s,
            "steady_s": steady.seconds,
            "steady_clips": steady.clips,
            "seconds": seconds,
            "cut_off": cut_off,
            "units": len(commits),
            **self._monitor.figures(steady.began_s, steady.ended_s),
            "clips_by_second": clips_by_second(commits, began_s),
            **{key: run.get(key) for key in ("time", "checks", "engines")},
        }

    def _measure_pipeline(self, share_s: float) -> None:
        """The Hugging Face pipeline at its best setting, over FLAC files."""
        if importlib.util.find_spec("transformers") is None:
            raise SystemExit("not installed: transformers")
        from tests.support import audio_factory

        audio, size = self._folder / "files", self._bench.size
        audio.mkdir()
        for index, samples in enumerate(self._clips):
            audio_factory.write(audio / f"{index:03}.flac", samples, CLIP_RATE_HZ, "flac")
        num_workers = 0 if self._bench.is_toy else len(os.sched_getaffinity(0))
        sweep_s = min(share_s, self._minutes.left_s - 5.0)
        job = {
            "model": str(self._model),
            "audio": str(audio),
            "device": self._bench.device,
            "precisions": size.pipeline_precisions,
            "batch_sizes": size.pipeline_batch_sizes,
            "seconds": size.pipeline_s,
            "sweep_s": sweep_s,
            "workers": num_workers,
        }
        timeout_s = min(self._minutes.left_s, 2 * sweep_s)
        arguments = ["hugging_face_timed_sweep", json.dumps(job)]
        try:
            said = run_module("benchmarks.peer_programs", arguments, self._environment, timeout_s)
        except CutOffError as error:
            said = error.output
        swept = _last_json(said)
        rates = [1.0 / row["clip_s"] for row in swept.get("settings", []) if "clip_s" in row]
        if not rates:
            raise SystemExit(f"no setting was measured within {timeout_s:.0f} s")
        self._found["pipeline"] = {"clips_per_s": max(rates), "workers": num_workers, **swept}
        print(f"{PIPELINE}: {max(rates):.0f} clips/s at its best", flush=True)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _last_json(output: str) -> dict[str, Any]:
    """The last whole line of JSON that a program printed; nothing if there is none."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                read: dict[str, Any] = json.loads(line)
                return read
    return {}


def _measure_model_alone(bench: Bench, precision: str) -> list[dict[str, Any]]:
    """The row of the largest batch, compiled where a run compiles."""
    engine = "compile" if bench.device == "cuda" else "eager"
    batch_sizes = bench.size.compiled_batch_sizes[-1:]
    size = dataclasses.replace(
        bench.size,
        batch_sizes=batch_sizes,
        compiled_batch_sizes=batch_sizes,
        compiled_precisions=(precision,),
        seconds=min(2.0, bench.size.seconds),
    )
    quick = dataclasses.replace(bench, size=size, engines=(engine,), precisions=(precision,))
    return measure_model(quick, {})


def _sum_up(found: Mapping[str, Any]) -> None:
    """Add what follows from the figures so far: medians of runs, and ratios of rates."""
    model_rate = (found["model_alone"] or {}).get("windows_per_s")
    pipeline_rate = found["pipeline"].get("clips_per_s")
    for figures in found["formats"].values():
        bounds = (figures.get("decoders_alone_clips_per_s"), model_rate)
        limit = None if None in bounds else min(bounds)
        for row in figures["workers"].values():
            rate = median([run["clips_per_s"] for run in row["runs"]])
            waits = [run["device_waits"] for run in row["runs"] if "device_waits" in run]
            row["clips_per_s"] = rate
            row["times_real_time"] = rate * CLIP_S
            row["share_of_limit"] = None if limit is None else rate / limit
            row["speedup"] = None if pipeline_rate is None else rate / pipeline_rate
            row["device_waits"] = median(waits) if waits else None


def _show_end_to_end(found: Mapping[str, Any]) -> None:
    model_rate = (found["model_alone"] or {}).get("windows_per_s", "–")
    print_table(
        (
            *("end to end", "workers", "clips/s", "× real time", "decoders alone", "model alone"),
            *("share of the smaller", "the device waits", "× Hugging Face pipeline"),
        ),
        [
            (
                *(name, workers, row["clips_per_s"], row["times_real_time"]),
                *(figures.get("decoders_alone_clips_per_s", "–"), model_rate),
                *(_percent(row["share_of_limit"]), _percent(row["device_waits"])),
                "–" if row["speedup"] is None else f"{row['speedup']:.1f}",
            )
            for name, figures in found["formats"].items()
            for workers, row in figures["workers"].items()
        ],
    )
    if found["pipeline"]:
        rate = found["pipeline"]["clips_per_s"]
        print(f"Hugging Face pipeline at its best: {rate:.3g} clips/s")


def _write_model(folder: Path, bench: Bench) -> Path:
    """A checkpoint with random weights, of the shape that the model is measured with."""
    from benchmarks.peer_programs import WEIGHT_SCALE
    from tests.support.model_factory import MEAN, STD, randomise
    from transforms.models.ast.checkpoints import save_pretrained
    from transforms.models.ast.model import ASTForAudioClassification

    model = ASTForAudioClassification(bench.size.config).eval()
    randomise(model, scale=0.2 if bench.is_toy else WEIGHT_SCALE)
    save_pretrained(model, folder, mean=MEAN, std=STD)
    return folder


def _end_to_end_clips(bench: Bench) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
    """The distinct clips, all at one rate."""
    import soxr

    num_clips = min(len(bench.recordings) or 2, MAX_DISTINCT_CLIPS)
    for samples, rate_hz in _each_clip(bench, num_clips, CLIP_S):
        resampled = soxr.resample(samples, rate_hz, CLIP_RATE_HZ)
        yield np.resize(resampled.astype(np.float32), round(CLIP_S * CLIP_RATE_HZ))


class Shards:
    """Folders of tars, as many clips as wanted: hard links to one tar of the distinct clips.

    Args:
        folder: Where they are to lie.
        clips: The distinct clips.
    """

    def __init__(
        self, folder: Path, clips: Sequence[np.ndarray[Any, np.dtype[np.float32]]]
    ) -> None:
        self._folder = folder
        self._clips = clips
        self._encoded: dict[str, list[bytes]] = {}
        self._num_folders = itertools.count()

    def link(self, format_name: str, num_clips: float) -> tuple[Path, int]:
        """A folder of about so many clips in at least ``SHARDS_PER_RUN`` tars.

        Returns:
            The folder, and how many clips it has.
        """
        shard_clips = math.ceil(num_clips / SHARDS_PER_RUN)
        shard_clips = min(MAX_CLIPS_PER_SHARD, max(1, shard_clips))
        num_shards = max(SHARDS_PER_RUN, math.ceil(num_clips / shard_clips))
        target = self._folder / str(next(self._num_folders))
        target.mkdir(parents=True)
        shard = self._shard(format_name, shard_clips)
        return link_inputs(target, num_shards, [shard]), num_shards * shard_clips

    def _shard(self, format_name: str, num_clips: int) -> Path:
        path = self._folder / f"{format_name}-{num_clips}.tar"
        if path.exists():
            return path
        encoded = self._encode(format_name)
        with tarfile.open(path, "w") as archive:
            for index in range(num_clips):
                data = encoded[index % len(encoded)]
                member = tarfile.TarInfo(f"{index:06}.{format_name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path

    def _encode(self, format_name: str) -> list[bytes]:
        from tests.support import audio_factory

        if format_name not in self._encoded:
            self._encoded[format_name] = [
                audio_factory.encode(samples, CLIP_RATE_HZ, format_name) for samples in self._clips
            ]
        return self._encoded[format_name]


def _decode_rate(source: Path, seconds: float) -> float:
    """Clips a second of reading and decoding alone, on all cores, as a run does it.

    The clips are read again and again for so many seconds, after a start that does not count.
    """
    from transforms.decoding.pool import DecodePool
    from transforms.records import Waveform
    from transforms.sources.read_unit import SourceSettings, find_inputs, plan_units, read_unit

    found, settings = find_inputs([str(source)]), SourceSettings()
    units = itertools.cycle(plan_units(found.items, found.containers, settings))
    encoded = itertools.chain.from_iterable(read_unit(unit, settings) for unit in units)
    with DecodePool() as pool, contextlib.closing(pool.stream("all of it", encoded)) as pieces:
        next(pieces)  # the processes have started
        began_s = time.perf_counter() + seconds / 4
        num_clips = 0
        for piece in pieces:
            now_s = time.perf_counter()
            is_last = isinstance(piece, Waveform) and piece.facts is not None
            num_clips += is_last and now_s >= began_s
            if now_s >= began_s + seconds:
                return num_clips / (now_s - began_s)
    raise SystemExit(f"{source}: nothing to decode")


# The whole


# What a part needs beside torch and numpy.
NEEDS = {
    "fbank": ("apache_beam", "torchaudio", "soundfile", "soxr"),
    "end-to-end": ("apache_beam", "torchaudio", "soundfile", "soxr", "av", "pyarrow"),
}
PARTS = ("matrices", "model", "fbank", "end-to-end")


def why_left_out(part: str) -> str | None:
    """What is missing for a part; None if nothing is."""
    missing = [name for name in NEEDS.get(part, ()) if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def run_parts(
    bench: Bench, parts: Sequence[str], keep: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Measure what is asked for and can be had here.

    Args:
        bench: How.
        parts: What is asked for.
        keep: Called after each part, and after each measurement end to end, with all that has been
            found by then: a run of an hour may not come to its end.
    """
    left_out = {part: reason for part in parts if (reason := why_left_out(part)) is not None}
    for part, reason in left_out.items():
        print(f"left out: {part}: {reason}")
    wanted = [part for part in PARTS if part in parts and part not in left_out]
    result: dict[str, Any] = {"left_out": left_out}
    for part in wanted:  # in the order in which one needs what another has found
        if part == "matrices":
            result["matrices"] = measure_matrices(bench)
        elif part == "model":
            result["model"] = measure_model(bench, result.get("matrices", {}))
        elif part == "fbank":
            result["fbank"] = measure_fbank(bench)
        else:
            measure_end_to_end(
                bench,
                result.get("model", []),
                lambda found: keep({**result, "end_to_end": found}),
                result.setdefault("end_to_end", {}),
            )
        keep(result)
    return result


def describe_device(device: str) -> dict[str, Any]:
    """What it is that computes."""
    if device != "cuda":
        return {"type": device}
    properties = torch.cuda.get_device_properties(0)
    return {
        "type": device,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def draw(result: Mapping[str, Any], target: Path) -> None:
    """Windows a second of the model alone, by batch size."""
    title = f"The model alone: {result['device'].get('name', result['device']['type'])}"
    with drawn(target, f"{title} (toy)" if result["is_toy"] else title) as axes:
        kinds = sorted({(row["precision"], row["engine"]) for row in result["model"]})
        for precision, engine in kinds:
            rows = [
                row
                for row in result["model"]
                if (row["precision"], row["engine"]) == (precision, engine)
                and "windows_per_s" in row
            ]
            sizes = [row["batch_size"] for row in rows]
            rates = [row["windows_per_s"] for row in rows]
            axes.plot(sizes, rates, "o-", label=f"{precision}, {engine}")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("windows in a batch")
        axes.set_ylabel("windows a second")
        axes.legend()


def find_recordings(folder: Path) -> list[Path]:
    """The recordings that clips are made of; the samples' where there is no such folder."""
    if not folder.is_dir():
        print(f"{folder} is not there: clips are made of {SAMPLES}")
        folder = SAMPLES
    return sorted(path for path in folder.iterdir() if path.suffix in RECORDING_SUFFIXES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=ENGINES, help="of the model"
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        help="of matrices and model; all that the device has",
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="of the model, uncompiled")
    parser.add_argument("--compiled-batch-sizes", nargs="+", type=int, help="and compiled")
    parser.add_argument(
        "--compiled-precisions",
        nargs="+",
        choices=PRECISIONS,
        help="those of the precisions that it is compiled in; all",
    )
    parser.add_argument("--seconds", type=float, help="that one measurement takes, about")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="for all that is measured end to end"
    )
    parser.add_argument(
        "--workers", nargs="+", type=int, default=(1, 2), help="processes of label, end to end"
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="of clips")
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each case end to end, while the minutes last"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data/esc10/audio"),
        help="a folder of recordings that clips are made of; if it is not there, samples/",
    )
    parser.add_argument("--toy", action="store_true", help="everything tiny, for any device")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="where to")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    if device != "cuda" and not options.toy:
        raise SystemExit("there is no CUDA device; --toy --device cpu shows whether all of it runs")
    size = TOY if options.toy else FULL
    changes = {
        "batch_sizes": options.batch_sizes,
        "compiled_batch_sizes": options.compiled_batch_sizes,
        "compiled_precisions": options.compiled_precisions,
        "seconds": options.seconds,
    }
    size = dataclasses.replace(size, **{k: v for k, v in changes.items() if v is not None})
    can = [name for name, way in PRECISIONS.items() if device == "cuda" or not way.may_use_tf32]
    bench = Bench(
        device=device,
        size=size,
        is_toy=options.toy,
        engines=options.engines,
        precisions=options.precisions or can,
        rounds=options.rounds,
        recordings=[] if options.toy else find_recordings(options.data),
        formats=options.formats,
        workers=options.workers,
        minutes=options.minutes,
    )
    about = {"is_toy": options.toy, "device": describe_device(device)}

    def keep(found: Mapping[str, Any]) -> None:
        write_results(options.results / "gpu.json", {**about, **found})

    found = run_parts(bench, options.parts, keep)
    if "model" in found:
        if importlib.util.find_spec("matplotlib") is None:
            print("left out: the picture: matplotlib is not installed")
        else:
            draw({**about, **found}, options.results / "gpu.png")


if __name__ == "__main__":
    main()
