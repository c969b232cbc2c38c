"""What comes of a GPU? How near the model is to what the chip can do, and the whole to the model.

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
* end-to-end: ``earmark label`` over tars of FLAC, MP3 and WAV, to committed Parquet; what the
  decoders can do alone and what the model can do alone; and the Hugging Face pipeline on the same
  device at its best batch size and precision. Needs Earmark's dependencies, and transformers.

A clip is (T_N − T_n) / (N − n), of a run over all clips and one over a few, medians of rounds. The
recordings are drawn out to 10 s by repetition; without any, it is noise, and that is said.

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
    WINDOW_SAMPLES,
    count_flops,
    drawn,
    median,
    paired_rounds,
    print_table,
    run_module,
    write_results,
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
FORMATS = ("flac", "mp3", "wav")
CLIPS_PER_SHARD = 256
MAX_DISTINCT_CLIPS = 64
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
        few_clips: Of the smaller run end to end.
        clips: Of the larger one.
        pipeline_clips: Of each setting of the Hugging Face pipeline.
        pipeline_batch_sizes: Those that it is tried with.
    """

    config: ASTConfig
    matrix_sizes: Sequence[int]
    batch_sizes: Sequence[int]
    compiled_batch_sizes: Sequence[int]
    compiled_precisions: Sequence[str]
    fbank_batch_sizes: Sequence[int]
    seconds: float
    few_clips: int
    clips: int
    pipeline_clips: int
    pipeline_batch_sizes: Sequence[int]


FULL = Size(
    config=ASTConfig(num_labels=527, problem_type="multi_label_classification"),
    matrix_sizes=(4096, 6144, 8192, 12288, 16384),
    batch_sizes=(1, 4, 16, 32, 64, 128, 256),
    compiled_batch_sizes=(64, 128),
    compiled_precisions=tuple(PRECISIONS),
    fbank_batch_sizes=(16, 64, 256),
    seconds=3.0,
    few_clips=512,
    clips=8192,
    pipeline_clips=2048,
    pipeline_batch_sizes=(8, 32, 64),
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
    few_clips=2,
    clips=6,
    pipeline_clips=2,
    pipeline_batch_sizes=(2,),
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
        rounds: Of what is measured end to end.
        recordings: What clips are made of; none for noise.
        formats: What clips are encoded in.
    """

    device: str
    size: Size
    is_toy: bool
    engines: Sequence[str]
    precisions: Sequence[str]
    rounds: int
    recordings: Sequence[Path]
    formats: Sequence[str]


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
    exactly = contextlib.nullcontext() if precision.may_use_tf32 else true_float32()
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


def measure_end_to_end(bench: Bench, model_rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Clips a second of Earmark by format, of what bounds it, and of the Hugging Face pipeline."""
    size, precision = bench.size, resolve_precision("auto", bench.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {"EARMARK_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        model = _write_model(folder / "model", bench)
        clips = list(_each_clip(bench, min(size.clips, MAX_DISTINCT_CLIPS), CLIP_S))
        shards = {
            _case(format_name, num): _write_shards(folder, clips, format_name, num)
            for format_name in bench.formats
            for num in (size.few_clips, size.clips)
        }

        def label(source: Path) -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=folder) as output:
                target = Path(output) / "out"
                given = [str(source), "--output", str(target), "--model", str(model)]
                began_s = time.monotonic()
                asked = ["--device", bench.device, "--engine", "torch", "--quiet"]
                run_module("pipeline", ["label", *given, *asked], environment)
                seconds = time.monotonic() - began_s
                run = json.loads((target / "run.json").read_text())
            print(f"{source.name}: {seconds:.1f} s", flush=True)  # whoever waits sees how long yet
            return {"seconds": seconds, "time": run["time"], "checks": run["checks"]}

        label(shards[_case(bench.formats[0], size.few_clips)])  # caches of compilers, of the check
        cases = {key: functools.partial(label, source) for key, source in shards.items()}
        rounds = paired_rounds(cases, bench.rounds)
        decoding = {
            format_name: _decode_rate(shards[_case(format_name, size.clips)])
            for format_name in bench.formats
        }
        pipeline = _measure_pipeline(bench, folder, clips, model, environment)
    rates = [row for row in model_rows if row["precision"] == precision]
    model_rate = max((row.get("windows_per_s", 0.0) for row in rates), default=None)
    found = {
        format_name: _sum_up(
            rounds[_case(format_name, size.few_clips)],
            rounds[_case(format_name, size.clips)],
            size,
            decoding[format_name],
            model_rate,
        )
        for format_name in bench.formats
    }
    _compare_with_pipeline(found, pipeline)
    _show_end_to_end(found, pipeline)
    return {
        "precision": precision,
        "formats": found,
        "pipeline": pipeline,
        "rounds": rounds,
    }


def _case(format_name: str, num_clips: int) -> str:
    return f"{format_name}, {num_clips} clips"


def _sum_up(
    few: Sequence[Mapping[str, Any]],
    many: Sequence[Mapping[str, Any]],
    size: Size,
    decode_rate: float,
    model_rate: float | None,
) -> dict[str, Any]:
    """Rates of one format, clips a second; a clip is a window."""
    clip_s = median(
        [
            (b["seconds"] - a["seconds"]) / (size.clips - size.few_clips)
            for a, b in zip(few, many, strict=True)
        ]
    )
    limit = decode_rate if model_rate is None else min(decode_rate, model_rate)
    return {
        "clips_per_s": 1.0 / clip_s,
        "times_real_time": CLIP_S / clip_s,
        "decode_bound_clips_per_s": decode_rate,
        "model_bound_clips_per_s": model_rate,
        "share_of_limit": None if model_rate is None else 1.0 / clip_s / limit,
        "speedup": None,
    }


def _compare_with_pipeline(found: Mapping[str, dict[str, Any]], pipeline: Any) -> None:
    rate = pipeline.get("clips_per_s")
    for figures in found.values():
        figures["speedup"] = None if rate is None else figures["clips_per_s"] / rate


def _show_end_to_end(found: Mapping[str, Mapping[str, Any]], pipeline: Mapping[str, Any]) -> None:
    print_table(
        (
            *("end to end", "clips/s", "× real time", "decoders alone", "model alone"),
            *("share of the smaller", "× Hugging Face pipeline"),
        ),
        [
            (
                *(name, row["clips_per_s"], row["times_real_time"]),
                row["decode_bound_clips_per_s"],
                "–" if row["model_bound_clips_per_s"] is None else row["model_bound_clips_per_s"],
                _percent(row["share_of_limit"]),
                "–" if row["speedup"] is None else f"{row['speedup']:.1f}",
            )
            for name, row in found.items()
        ],
    )
    if "error" in pipeline:
        print(f"left out: the Hugging Face pipeline: {pipeline['error']}")
    else:
        print(f"Hugging Face pipeline at its best: {pipeline['clips_per_s']:.3g} clips/s")


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


def _write_shards(
    folder: Path, clips: Sequence[tuple[Any, int]], format_name: str, num_clips: int
) -> Path:
    """A folder of tars of so many clips, the few distinct ones again and again."""
    from tests.support import audio_factory

    target = folder / f"{format_name}-{num_clips}"
    target.mkdir()
    encoded = [
        audio_factory.encode(samples, rate_hz, format_name)
        for samples, rate_hz in clips[:num_clips]
    ]
    for start in range(0, num_clips, CLIPS_PER_SHARD):
        with tarfile.open(target / f"{start:06}.tar", "w") as archive:
            for index in range(start, min(start + CLIPS_PER_SHARD, num_clips)):
                data = encoded[index % len(encoded)]
                member = tarfile.TarInfo(f"{index:06}.{format_name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return target


def _decode_rate(source: Path) -> float:
    """Clips a second of reading and decoding alone, on all cores, as a run does it."""
    from transforms.decoding.pool import DecodePool
    from transforms.records import Waveform
    from transforms.sources.read_unit import SourceSettings, find_inputs, plan_units, read_unit

    found, settings = find_inputs([str(source)]), SourceSettings()
    units = plan_units(found.items, found.containers, settings)
    with DecodePool() as pool:

        def decode(units: Sequence[Any]) -> int:
            encoded = itertools.chain.from_iterable(read_unit(unit, settings) for unit in units)
            pieces = pool.stream("all of it", encoded)
            return sum(isinstance(each, Waveform) and each.facts is not None for each in pieces)

        decode(units[:1])  # the processes start
        began_s = time.perf_counter()
        num_clips = decode(units)
        return num_clips / (time.perf_counter() - began_s)


def _measure_pipeline(
    bench: Bench,
    folder: Path,
    clips: Sequence[tuple[Any, int]],
    model: Path,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Clips a second of the Hugging Face pipeline at its best setting, over FLAC files."""
    if importlib.util.find_spec("transformers") is None:
        return {"error": "transformers is not installed"}
    from tests.support import audio_factory

    audio = folder / "files"
    audio.mkdir()
    for index, (samples, rate_hz) in enumerate(clips[: bench.size.pipeline_clips]):
        audio_factory.write(audio / f"{index:03}.flac", samples, rate_hz, "flac")
    job = {
        "model": str(model),
        "audio": str(audio),
        "device": bench.device,
        "precisions": [name for name in bench.precisions if name != "tf32"],
        "batch_sizes": list(bench.size.pipeline_batch_sizes),
        "num_clips": bench.size.pipeline_clips,
        "few_clips": bench.size.pipeline_clips // 2,
        "workers": 0 if bench.is_toy else len(os.sched_getaffinity(0)),
    }
    arguments = ["hugging_face_sweep", json.dumps(job)]
    said = run_module("benchmarks.peer_programs", arguments, environment)
    settings = json.loads(said.splitlines()[-1])["settings"]
    best_s = min(setting["clip_s"] for setting in settings if "clip_s" in setting)
    return {"clips_per_s": 1.0 / best_s, "settings": settings, "workers": job["workers"]}


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
        keep: Called after each part with all that has been found by then: a run of an hour
            may not come to its end.
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
            result["end_to_end"] = measure_end_to_end(bench, result.get("model", []))
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
    """The recordings that clips are made of; none where there is no such folder, which is said."""
    if folder.is_dir():
        return sorted(path for path in folder.iterdir() if path.is_file())
    print(f"{folder} is not there: clips are noise, which decoders take longer for than for sounds")
    return []


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
    parser.add_argument("--clips", type=int, help="of the larger run end to end")
    parser.add_argument(
        "--pipeline-clips", type=int, help="of each setting of the Hugging Face pipeline"
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="of clips")
    parser.add_argument("--rounds", type=int, default=3, help="paired rounds, end to end")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data/esc10/audio"),
        help="a folder of recordings that clips are made of; noise if it is not there",
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
        "clips": options.clips,
        "pipeline_clips": options.pipeline_clips,
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
