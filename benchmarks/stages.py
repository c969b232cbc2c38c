"""What does each stage cost alone? Milliseconds for 10 s of audio, beside its own limit.

    python -m benchmarks.stages [--rounds 5] [--clips 40] [--model-windows 4]

One stage at a time, on one core, over clips of 10 s (mono, 44.1 kHz; Opus 48 kHz; tones in noise):

* read: the members of a tar, against reading the file's bytes and nothing else;
* decode: every format through one decoder process, hash and levels included, at the source's rate,
  so that nothing is resampled; against the library alone (libsndfile; FFmpeg for Opus);
* resample: 44.1 to 16 kHz in the pieces in which it comes, against soxr in one go;
* fbank: torchaudio, window by window, and our own in batches of 8; against the Fourier transform of
  ready frames and the product with the mel filters, and nothing else;
* model: AST base by torch, in the fastest precision that the chip has, in batches of 4; against the
  product of large matrices with as many operations, in the same precision;
* write: rows of AST base with every class's score, to their commit, against writing the same table
  with pyarrow.

Sending features to a device is measured where there is one, by ``gpu``.

Prints a table and writes ``stages.json`` and ``stages.png`` beside this file.
"""

from __future__ import annotations

import argparse
import functools
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import soundfile
import soxr
import torch

from benchmarks.common import (
    count_flops,
    drawn,
    median,
    paired_rounds,
    print_table,
    spread,
    write_results,
)
from tests.support import audio_factory
from transforms.decoding import decode
from transforms.decoding.pool import DecodePool
from transforms.decoding.settings import DecodeSettings
from transforms.features.fbank import FbankSettings, KaldiFbank, extract_fbank
from transforms.inference.backbones import (
    CPU_BATCH_SIZE,
    TORCH_DTYPES,
    InferenceSettings,
    TorchBackbone,
    resolve_precision,
)
from transforms.models.ast.config import ASTConfig
from transforms.models.ast.model import ASTModel
from transforms.models.labels import Label
from transforms.records import (
    ClipFacts,
    ClipRow,
    ContainerSlice,
    EncodedClip,
    FloatArray,
    Item,
    Prediction,
    UnitEnd,
    UnitEvent,
    WindowRow,
    WorkUnit,
)
from transforms.results.rows import RowSettings, windows_table
from transforms.results.write_units import CommitSettings, OpenUnit
from transforms.sources.read_unit import read_unit

CLIP_S = 10.0
RATE_HZ, MODEL_RATE_HZ, OPUS_RATE_HZ = 44_100, 16_000, 48_000
FORMATS = {"WAV": "wav", "FLAC": "flac", "MP3": "mp3", "Vorbis": "ogg", "Opus": "opus"}
BATCH_SIZE = 8
HIDDEN_SIZE, NUM_LABELS = 768, 527
MATRIX_SIZE = 2048  # large enough for a core to multiply as fast as it can

Work = Callable[[], None]


@dataclass(frozen=True)
class Stage:
    """A stage, and what it cannot be faster than.

    Attributes:
        name: What it is called in the table.
        work: Does it once for each clip.
        limit: Does what cannot be done without, as often.
        num_clips: How many clips that is.
    """

    name: str
    work: Work
    limit: Work
    num_clips: int


def make_clip(rate_hz: int, seed: int = 0) -> FloatArray:
    """Tones in noise, shape (num_samples, 1)."""
    noise = audio_factory.noise(CLIP_S, rate_hz, amplitude=0.02, seed=seed)
    tones = [
        audio_factory.tone(CLIP_S, rate_hz, frequency_hz=frequency, amplitude=0.1)
        for frequency in (220.0, 1760.0, 7040.0)
    ]
    return noise + np.sum(tones, axis=0, dtype=np.float32)


def reading(folder: Path, num_clips: int) -> Stage:
    """The members of a tar of WAVs."""
    path = folder / "clips.tar"
    data = audio_factory.encode(make_clip(RATE_HZ), RATE_HZ, "wav")
    with tarfile.open(path, "w") as archive:
        for index in range(num_clips):
            member = tarfile.TarInfo(f"{index:05}.wav")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    part = ContainerSlice(str(path), str(path), path.stat().st_size, "v")
    unit = WorkUnit("u", "tar", container=part)

    def work() -> None:
        if sum(1 for _ in read_unit(unit)) != num_clips:
            raise SystemExit(f"{path}: not every member was read")

    return Stage("read (tar of WAV)", work, lambda: _ignore(path.read_bytes()), num_clips)


def _ignore(value: object) -> None:
    """Nobody needs it."""


def decoding(pools: dict[int, DecodePool], title: str, name: str, num_clips: int) -> Stage:
    """One format through a decoder process."""
    rate_hz = OPUS_RATE_HZ if name == "opus" else RATE_HZ
    data = audio_factory.encode(make_clip(rate_hz), rate_hz, name)
    clips = [EncodedClip(Item(str(i), str(i)), data=data) for i in range(num_clips)]

    def work() -> None:
        for _ in pools[rate_hz].stream("u", clips):
            pass

    def limit() -> None:
        for _ in clips:
            if name == "opus":
                with av.open(io.BytesIO(data)) as container:
                    for frame in container.decode(audio=0):
                        frame.to_ndarray()
            else:
                soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)

    return Stage(f"decode {title}", work, limit, num_clips)


def resampling(num_clips: int) -> Stage:
    """44.1 to 16 kHz, in blocks of a second."""
    mono = make_clip(RATE_HZ)[:, 0]

    def work() -> None:
        for _ in range(num_clips):
            resampler = decode._Resampler(MODEL_RATE_HZ)
            for start in range(0, len(mono), RATE_HZ):
                resampler.push(RATE_HZ, mono[start : start + RATE_HZ])
            resampler.flush()

    def limit() -> None:
        for _ in range(num_clips):
            soxr.resample(mono, RATE_HZ, MODEL_RATE_HZ, quality="HQ")

    return Stage("resample 44.1 to 16 kHz", work, limit, num_clips)


def fbanks(num_clips: int) -> list[Stage]:
    """Features by torchaudio, and by our own function for batches."""
    settings = FbankSettings()
    samples = make_clip(MODEL_RATE_HZ)[:, 0]
    batched = KaldiFbank(settings)
    batch = torch.from_numpy(np.stack([samples] * BATCH_SIZE))

    def one_by_one() -> None:
        for _ in range(num_clips):
            extract_fbank(samples, settings)

    def in_batches() -> None:
        with torch.inference_mode():
            for start in range(0, num_clips, BATCH_SIZE):
                batched(batch[: num_clips - start])

    frames = batch.unfold(1, settings.frame_samples, settings.hop_samples) * batched.window

    def limit() -> None:
        with torch.inference_mode():
            for start in range(0, num_clips, BATCH_SIZE):
                spectrum = torch.fft.rfft(frames[: num_clips - start], n=settings.fft_samples)
                _ignore(spectrum.real @ batched.mel_filters)

    return [
        Stage("fbank, torchaudio", one_by_one, limit, num_clips),
        Stage("fbank, in batches of 8", in_batches, limit, num_clips),
    ]


def modelling(num_windows: int, num_layers: int) -> Stage:
    """AST base by torch."""
    config = ASTConfig(num_hidden_layers=num_layers)
    precision = resolve_precision("auto", "cpu")
    settings = InferenceSettings(device="cpu", engine="torch", compile=False)
    backbone = TorchBackbone(ASTModel(config), settings, precision)
    shape = (num_windows, config.max_length, config.num_mel_bins)
    features = np.random.default_rng(0).normal(0, 0.5, shape).astype(np.float32)
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=TORCH_DTYPES[precision])
    flops = num_windows * count_flops(config, pooled_alone=True)
    num_products = max(1, round(flops / (2 * MATRIX_SIZE**3)))

    def work() -> None:
        for start in range(0, num_windows, CPU_BATCH_SIZE):
            backbone.embed(features[start : start + CPU_BATCH_SIZE])

    def limit() -> None:
        for _ in range(num_products):
            _ignore(matrix @ matrix)

    return Stage(f"model, torch {precision}", work, limit, num_windows)


def writing(folder: Path, num_clips: int) -> Stage:
    """A unit of clips of one window each, to its commit."""
    labels = tuple(Label(index, None, f"label {index}") for index in range(NUM_LABELS))
    rows = RowSettings(labels, "sigmoid", HIDDEN_SIZE, store_scores=True)
    settings = CommitSettings(str(folder / "out"), "run", "f" * 64, "0" * 64, rows)
    items = tuple(Item(f"/audio/{index}.wav", f"/audio/{index}.wav") for index in range(num_clips))
    unit = WorkUnit("0" * 16, "files", items)
    facts = ClipFacts(
        duration_s=CLIP_S,
        sample_rate_hz=RATE_HZ,
        channels=1,
        peak_dbfs=-1.0,
        rms_dbfs=-20.0,
        clipped_ratio=0.0,
        silent_ratio=0.0,
        content_sha256="0" * 64,
    )
    generator = np.random.default_rng(0)
    windows, events = [], list[UnitEvent]()
    for index, item in enumerate(items):
        embedding = generator.normal(0, 1, HIDDEN_SIZE).astype(np.float32)
        scores = generator.uniform(0, 1, NUM_LABELS).astype(np.float32)
        prediction = Prediction(embedding, scores, "null")
        windows.append(WindowRow("0" * 16, index, item.clip_id, 0, 0.0, CLIP_S, prediction))
        clip = ClipRow("0" * 16, index, item, facts, 1, embedding, scores)
        events += [windows[-1], clip]
    events.append(UnitEnd(unit, num_clips))
    table = windows_table(windows, rows)

    def work() -> None:
        opened = OpenUnit(settings, folder / "staging", unit.unit_id)
        for event in events:
            opened.add(event)
        opened.commit()

    def limit() -> None:
        pq.write_table(table, folder / "limit.parquet", compression="zstd")

    return Stage("write", work, limit, num_clips)


def limit_of(stage: Stage) -> str:
    """What its limit is called among the figures."""
    return f"{stage.name}, limit"


def measure(work: Work, num_clips: int) -> float:
    """Milliseconds for each clip."""
    began_s = time.perf_counter()
    work()
    return 1000.0 * (time.perf_counter() - began_s) / num_clips


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each stage is run")
    parser.add_argument("--clips", type=int, default=40, help="of each run")
    parser.add_argument("--model-windows", type=int, default=4, help="of each run of the model")
    parser.add_argument("--layers", type=int, default=12, help="of the model; AST base has 12")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="where to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, num_clips = Path(name), options.clips
        pools = {
            rate_hz: DecodePool(DecodeSettings(sample_rate_hz=rate_hz, num_processes=1))
            for rate_hz in (RATE_HZ, OPUS_RATE_HZ)
        }
        try:
            stages = [
                reading(folder, num_clips),
                *(decoding(pools, title, name, num_clips) for title, name in FORMATS.items()),
                resampling(num_clips),
                *fbanks(num_clips),
                modelling(options.model_windows, options.layers),
                writing(folder, num_clips),
            ]
            cases = {
                name: functools.partial(measure, work, stage.num_clips)
                for stage in stages
                for name, work in ((stage.name, stage.work), (limit_of(stage), stage.limit))
            }
            paired_rounds(cases, 1)  # processes start, and libraries load what they need
            found = paired_rounds(cases, options.rounds)
        finally:
            for pool in pools.values():
                pool.close()
    medians = {name: median(values) for name, values in found.items()}
    rows = [
        (
            stage.name,
            medians[stage.name],
            f"{1000.0 * CLIP_S / medians[stage.name]:,.0f}×",
            medians[limit_of(stage)],
            medians[stage.name] / medians[limit_of(stage)],
            f"{spread(found[stage.name]):.0%}",
        )
        for stage in stages
    ]
    print_table(
        ("stage", "ms for 10 s", "real time", "limit, ms", "times its limit", "spread"), rows
    )
    result = {"clips": num_clips, "ms_for_10_s": medians, "rounds": found}
    write_results(options.results / "stages.json", result)
    with drawn(options.results / "stages.png", "Each stage alone, one core") as axes:
        names = [stage.name for stage in stages][::-1]
        axes.barh(names, [medians[name] for name in names], label="as it is")
        limits = [medians[limit_of(stage)] for stage in stages][::-1]
        axes.barh(names, limits, height=0.4, label="its limit")
        axes.set_xscale("log")
        axes.set_xlabel("ms for 10 s of audio")
        axes.legend()


if __name__ == "__main__":
    main()
