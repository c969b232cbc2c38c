"""What does a lossy format do to the labels? Real clips, encoded and labelled, beside the original.

    python -m benchmarks.lossy_formats [--data ../shared/data/esc10] [--clips 40]

Clips of all classes alike are decoded once; each is encoded in every format and labelled by the
main job in one run, with an AST of realistic shape and random weights. Every format is compared
with the 32-bit float WAV of the same samples. Prints a table and writes ``lossy_formats.json``
beside this file; see ``benchmarks/README.md`` for the figures. An encoder that this machine's
libraries lack is named, in the table and in the file.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import soundfile
import soxr
import torch

from pipeline.config.label import RunConfig
from pipeline.labelling.run import run_label
from tests.support.audio_factory import FORMATS, Format, Samples, encode, quantised
from tests.support.model_factory import MEAN, STD, randomise
from transforms.models.ast.checkpoints import save_pretrained
from transforms.models.ast.config import ASTConfig
from transforms.models.ast.model import ASTForAudioClassification
from transforms.models.labels import audioset_labels

OPUS_RATE_HZ = 48_000  # the only rate of these that Opus has, so clips are resampled for it
WEIGHT_SCALE = 0.05  # keeps scores between 0.1 and 0.9, and clips apart; the seed is fixed
REFERENCE = "WAV float"
OTHER_CLIP = "another clip"


def _lossy(container: str, codec: str, sample_format: str, kbps: int) -> Format:
    return Format("av", container, codec, bit_rate=kbps * 1000, sample_format=sample_format)


def _vorbis(quality: int) -> Format:
    return Format("soundfile", "OGG", "VORBIS", compression_level=1.0 - quality / 10)


# Name: how it is written, and the extension it gets.
ENCODINGS: dict[str, tuple[Format, str]] = {
    REFERENCE: (FORMATS["wav_float"], "wav"),
    "WAV 24 bit": (FORMATS["wav24"], "wav"),
    "FLAC 24 bit": (FORMATS["flac24"], "flac"),
    "WAV 16 bit": (FORMATS["wav"], "wav"),
    "FLAC 16 bit": (FORMATS["flac"], "flac"),
    "MP3 320 kb/s": (_lossy("mp3", "libmp3lame", "fltp", 320), "mp3"),
    "MP3 128 kb/s": (_lossy("mp3", "libmp3lame", "fltp", 128), "mp3"),
    "MP3 64 kb/s": (_lossy("mp3", "libmp3lame", "fltp", 64), "mp3"),
    "Vorbis q9": (_vorbis(9), "ogg"),
    "Vorbis q6": (_vorbis(6), "ogg"),
    "Vorbis q3": (_vorbis(3), "ogg"),
    "AAC 128 kb/s": (_lossy("ipod", "aac", "fltp", 128), "m4a"),
    "AAC 64 kb/s": (_lossy("ipod", "aac", "fltp", 64), "m4a"),
    "Opus 96 kb/s": (_lossy("ogg", "libopus", "flt", 96), "opus"),
    "Opus 32 kb/s": (_lossy("ogg", "libopus", "flt", 32), "opus"),
}


@dataclass(frozen=True)
class Clip:
    """A clip, decoded.

    Attributes:
        name: Its file's stem.
        samples: Shape (num_samples, 1).
        sample_rate_hz: Its rate.
    """

    name: str
    samples: Samples
    sample_rate_hz: int

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.sample_rate_hz


@dataclass(frozen=True)
class Labelled:
    """An encoding's rows in the order of the clips.

    Attributes:
        scores: Shape (num_clips, num_labels).
        embeddings: Shape (num_clips, hidden_size).
        durations_s: Shape (num_clips,), as decoded.
        levels_dbfs: Shape (num_clips,), RMS.
        num_warnings: Clips labelled with a warning.
    """

    scores: npt.NDArray[np.float64]
    embeddings: npt.NDArray[np.float64]
    durations_s: npt.NDArray[np.float64]
    levels_dbfs: npt.NDArray[np.float64]
    num_warnings: int


def choose_clips(data: Path, num_clips: int) -> list[Clip]:
    """The first of each class, then the second of each, until there are enough."""
    by_class: dict[str, list[str]] = {}
    with (data / "esc10.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            by_class.setdefault(row["label"], []).append(row["filename"])
    in_turn = (
        name
        for names in itertools.zip_longest(*(by_class[label] for label in sorted(by_class)))
        for name in names
        if name is not None
    )
    clips = []
    for name in itertools.islice(in_turn, num_clips):
        samples, rate_hz = soundfile.read(data / "audio" / name, dtype="float32", always_2d=True)
        # Vorbis overshoots full scale by a little, which integers would clip: another matter.
        peak = np.abs(samples).max()
        clips.append(Clip(Path(name).stem, samples / max(1.0, peak / 0.999), rate_hz))
    return clips


def write_model(folder: Path) -> Path:
    """AST tiny: 192 wide, 12 layers, stride 10, AudioSet's 527 labels; random weights."""
    config = ASTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        problem_type="multi_label_classification",
    ).with_labels(tuple(label.name for label in audioset_labels()))
    model = ASTForAudioClassification(config).eval()
    randomise(model, scale=WEIGHT_SCALE)
    save_pretrained(model, folder, mean=MEAN, std=STD)
    return folder


def is_available(chosen: Format) -> bool:
    """Whether the libraries here have the encoder."""
    if chosen.library == "soundfile":
        return bool(soundfile.check_format(chosen.container, chosen.codec))
    import av

    try:
        av.Codec(chosen.codec, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def write_encodings(clips: list[Clip], folder: Path) -> dict[str, float]:
    """Write every clip in every format there is; bit rate in kb/s, measured, by encoding."""
    kbps = {}
    for name, (chosen, extension) in ENCODINGS.items():
        if not is_available(chosen):
            continue
        target = folder / file_name(name)
        target.mkdir()
        num_bytes = 0
        for clip in clips:
            samples, rate_hz = clip.samples, clip.sample_rate_hz
            if chosen.codec == "libopus":
                samples, rate_hz = soxr.resample(samples, rate_hz, OPUS_RATE_HZ), OPUS_RATE_HZ
            if name != REFERENCE and chosen.lossless_bits is not None:
                samples = quantised(samples, chosen.lossless_bits)  # libraries round differently
            content = encode(samples, rate_hz, chosen)
            (target / f"{clip.name}.{extension}").write_bytes(content)
            num_bytes += len(content)
        kbps[name] = num_bytes * 8 / 1000 / sum(clip.duration_s for clip in clips)
    return kbps


def file_name(encoding: str) -> str:
    return encoding.replace(" ", "_").replace("/", "")


def label(model: Path, source: Path, output: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Run the main job; rows of ``clips`` by folder and stem."""
    config = RunConfig.model_validate(
        {
            "inputs": [str(source)],
            "output": str(output),
            "quiet": True,
            "max_failed": 0.0,
            "model": {"name": str(model)},
            "labels": {"scores": True},
            "inference": {"device": "cpu", "precision": "fp32"},
        }
    )
    if run_label(config, []) != 0:
        raise SystemExit("some encoded clips could not be labelled; the figures would not hold")
    rows = [row for path in (output / "clips").iterdir() for row in pq.read_table(path).to_pylist()]
    paths = [Path(row["uri"]) for row in rows]
    return {(path.parent.name, path.stem): row for path, row in zip(paths, rows, strict=True)}


def collect(
    rows: dict[tuple[str, str], dict[str, Any]], encoding: str, clips: list[Clip]
) -> Labelled:
    """An encoding's rows as arrays; a clip that is missing raises."""
    found = [rows[file_name(encoding), clip.name] for clip in clips]
    return Labelled(
        scores=np.array([row["scores"] for row in found], np.float64),
        embeddings=np.array([row["embedding"] for row in found], np.float64),
        durations_s=np.array([row["duration_s"] for row in found], np.float64),
        levels_dbfs=np.array([row["rms_dbfs"] for row in found], np.float64),
        num_warnings=sum(row["warning"] is not None for row in found),
    )


def compare(
    actual: Labelled, expected: Labelled, true_durations_s: npt.NDArray[np.float64]
) -> dict[str, float]:
    """How far the labels of one encoding are from those of another."""
    difference = np.abs(actual.scores - expected.scores)
    cosine = np.sum(actual.embeddings * expected.embeddings, axis=1) / (
        np.linalg.norm(actual.embeddings, axis=1) * np.linalg.norm(expected.embeddings, axis=1)
    )
    same_top = actual.scores.argmax(axis=1) == expected.scores.argmax(axis=1)
    return {
        "max_score_difference": float(difference.max()),
        "mean_score_difference": float(difference.mean()),
        "top1_agreement": float(same_top.mean()),
        "min_embedding_cosine": float(cosine.min()),
        "mean_embedding_cosine": float(cosine.mean()),
        "max_duration_difference_ms": 1000
        * float(np.abs(actual.durations_s - true_durations_s).max()),
        "mean_level_difference_db": float((actual.levels_dbfs - expected.levels_dbfs).mean()),
        "warnings": actual.num_warnings,
    }


def measure(clips: list[Clip], folder: Path) -> dict[str, dict[str, float]]:
    """Figures by encoding; those of the next clip, as a yardstick, under ``OTHER_CLIP``."""
    source = folder / "encoded"
    source.mkdir()
    kbps = write_encodings(clips, source)
    rows = label(write_model(folder / "model"), source, folder / "out")
    durations_s = np.array([clip.duration_s for clip in clips])
    expected = collect(rows, REFERENCE, clips)
    figures = {
        name: {"kbps": kbps[name], **compare(collect(rows, name, clips), expected, durations_s)}
        for name in kbps
        if name != REFERENCE
    }
    shifted = collect(rows, REFERENCE, [*clips[1:], clips[0]])
    figures[OTHER_CLIP] = compare(shifted, expected, shifted.durations_s)
    return figures


def table(figures: dict[str, dict[str, float]], absent: list[str]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield (
        "| format | kb/s | score difference: mean | largest | same top label "
        "| embedding cosine: mean | smallest | length off by, ms | level, dB |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for name, row in figures.items():
        kbps = f"{row['kbps']:.0f}" if "kbps" in row else "–"
        yield (
            f"| {name} | {kbps} | {_digits(row['mean_score_difference'])} "
            f"| {_digits(row['max_score_difference'])} | {row['top1_agreement']:.0%} "
            f"| {row['mean_embedding_cosine']:.5f} | {row['min_embedding_cosine']:.5f} "
            f"| {row['max_duration_difference_ms']:.1f} "
            f"| {round(row['mean_level_difference_db'], 2) + 0.0:+.2f} |"
        )
    for name in absent:
        yield f"| {name} | no encoder on this machine | | | | | | | |"


def _digits(value: float) -> str:
    return f"{value:.5f}" if value >= 1e-4 else f"{value:.0e}"


def processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, Any]:
    """What decides the figures besides the code."""
    import av

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "soundfile": soundfile.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "soxr": soxr.__version__,
    }


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    beside_the_checkout = Path(__file__).resolve().parents[2] / "shared" / "data" / "esc10"
    parser.add_argument("--data", type=Path, default=beside_the_checkout)
    parser.add_argument("--clips", type=int, default=40)
    arguments = parser.parse_args()
    if not (arguments.data / "esc10.csv").is_file():
        parser.error(f"--data: {arguments.data} holds no esc10.csv; give the folder that does")
    clips = choose_clips(arguments.data, arguments.clips)
    if len(clips) < 2:
        parser.error(f"--clips is {arguments.clips}; must be at least 2")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        figures = measure(clips, Path(name))
    absent = [name for name in ENCODINGS if name not in figures and name != REFERENCE]
    result = {
        "machine": processor(),
        "versions": versions(),
        "clips": [clip.name for clip in clips],
        "seconds": round(time.monotonic() - began, 1),
        "no_encoder": absent,
        "figures": figures,
    }
    print("\n".join(table(figures, absent)))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
