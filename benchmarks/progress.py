"""Is the progress display right, and the estimate of ``earmark plan``?

    python -m benchmarks.progress [--files 80] [--data ../shared/data/esc10/audio]
                                  [--cases flac mp3 opus wav folders sorted tar tar.gz parquet]

Joins real recordings to files of 2 to 120 seconds and stores them in several ways. Each case is
planned, and labelled with a small random model by ``earmark label``; what its display says is
compared with what came to pass. A window takes ``--window-s`` at least, as it would on a device
of its own, so that other work on the machine hardly matters. Prints a table and writes
``progress.json`` beside this file; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from benchmarks.common import (
    ROOT,
    median,
    paired_rounds,
    print_table,
    run_apart,
    write_results,
)
from tests.support.audio_factory import Samples, encode
from tests.support.containers import STRUCT, tar_bytes
from tests.support.model_factory import write_tiny_model
from transforms.sources.file_kinds import is_audio_name

RATE_HZ = 48_000  # one that Opus has too
SHORTEST_S, LONGEST_S = 2.0, 120.0
FORMATS = ("flac", "mp3", "opus", "wav")
# The claim is made from a fifth of the run on. With less left, seconds are too coarse.
FROM_SHARE = 0.2
MIN_LEFT_S = 5.0

_COMMON = """
import builtins, contextlib, json, sys, time
from unittest.mock import patch
from pipeline.config.label import RunConfig
from pipeline.labelling.estimate import run_plan
from pipeline.labelling.run import run_label
from pipeline.terminal import progress
from transforms.models.ast.model import ASTModel
values, window_s = json.loads(sys.argv[1])
config, embed = RunConfig.model_validate(values), ASTModel.embed
def slow_embed(self, features, *rest):
    time.sleep(window_s * len(features))
    return embed(self, features, *rest)
"""
_PLAN = f"""{_COMMON}
with patch.object(ASTModel, "embed", slow_embed):
    run_plan(config, [])
"""
_LABEL = f"""{_COMMON}
def stamped(text, **options):
    builtins.print(f"{{time.monotonic():.3f}}\\t{{text}}")
with (
    contextlib.redirect_stderr(sys.stdout),
    patch.object(ASTModel, "embed", slow_embed),
    patch.object(progress, "LINE_INTERVAL_S", 0.0),
    patch.object(progress, "print", stamped, create=True),
):
    run_label(config, [])
"""


class Reading(NamedTuple):
    """What the display said at a time; None where it said nothing."""

    at_s: float
    share: float | None
    windows: int
    left_s: float | None


# --- Inputs --------------------------------------------------------------------------------


def make_clips(data: Path, num_files: int) -> list[Samples]:
    """Join recordings to clips; their lengths are log-uniform, in an order by chance."""
    generator = np.random.default_rng(0)
    recordings = []
    for path in sorted(path for path in data.iterdir() if is_audio_name(path.name)):
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
        at = np.arange(0, len(samples), rate_hz / RATE_HZ).astype(int)
        recordings.append(samples[at[at < len(samples)], :1])
    sound = np.concatenate([recordings[i] for i in generator.permutation(len(recordings))])
    lengths = np.exp(generator.uniform(np.log(SHORTEST_S), np.log(LONGEST_S), num_files))
    clips = []
    for length in (lengths * RATE_HZ).astype(int):
        start = int(generator.integers(len(sound)))
        clips.append(np.take(sound, np.arange(start, start + length), axis=0, mode="wrap"))
    return clips


def _encoded(clip: Samples, format_: str) -> bytes:
    # In stereo, as recorders write it; a mono file of it has half the size.
    return encode(np.repeat(clip, 2, axis=1) if format_ == "wav" else clip, RATE_HZ, format_)


def _write_folder(folder: Path, clips: Sequence[Samples], format_: str) -> None:
    folder.mkdir(parents=True)
    for number, clip in enumerate(clips):
        (folder / f"{number:04}.{format_}").write_bytes(_encoded(clip, format_))


def _write_folders(folder: Path, clips: Sequence[Samples]) -> None:
    for number, format_ in enumerate(FORMATS):
        _write_folder(folder / format_, clips[number :: len(FORMATS)], format_)


def _write_sorted(folder: Path, clips: Sequence[Samples]) -> None:
    _write_folder(folder, sorted(clips, key=len), "flac")


def _write_tar(folder: Path, clips: Sequence[Samples], ending: str) -> None:
    folder.mkdir()
    members = [(f"{number:04}.flac", _encoded(clip, "flac")) for number, clip in enumerate(clips)]
    mode = "w:gz" if ending == "tar.gz" else "w"
    (folder / f"clips.{ending}").write_bytes(tar_bytes(members, mode))


def _write_parquet(folder: Path, clips: Sequence[Samples]) -> None:
    folder.mkdir()
    cells = [{"bytes": _encoded(clip, "wav"), "path": None} for clip in clips]
    pq.write_table(pa.table({"audio": pa.array(cells, STRUCT)}), folder / "clips.parquet", 16)


CASES: dict[str, Callable[[Path, Sequence[Samples]], None]] = {
    **{format_: functools.partial(_write_folder, format_=format_) for format_ in FORMATS},
    "folders": _write_folders,
    "sorted": _write_sorted,
    "tar": functools.partial(_write_tar, ending="tar"),
    "tar.gz": functools.partial(_write_tar, ending="tar.gz"),
    "parquet": _write_parquet,
}


# --- What is said, and what comes to pass ---------------------------------------------------


def seconds_of(text: str) -> float:
    """Return the seconds of ``42 s``, ``3:07`` or ``2:03:07``."""
    seconds = 0.0
    for part in text.removesuffix(" s").split(":"):
        seconds = seconds * 60 + float(part)
    return seconds


def read_display(said: str) -> list[Reading]:
    """Return what the display said, line by line."""
    readings = []
    for line in said.splitlines():
        stamp, _, text = line.partition("\t")
        windows = re.search(r"· ([\d,]+)(/~[\d,]+)? windows", text)
        if windows is None:
            continue
        share = re.match(r" *(\d+)% ·", text)
        left = re.search(r"about ([\d:]+( s)?) left", text)
        readings.append(
            Reading(
                float(stamp),
                None if share is None else int(share[1]) / 100,
                int(windows[1].replace(",", "")),
                None if left is None else seconds_of(left[1]),
            )
        )
    return readings


def errors_of(readings: Sequence[Reading]) -> dict[str, float]:
    """Return the largest and the median error of the share and of the time left.

    The run is the time from the first windows to the end. ``share`` is in points of the work done;
    ``left`` is relative to the true time left. ``without`` is the share of readings without a time.
    """
    last = readings[-1]
    began_s = next(one.at_s for one in readings if one.windows)
    from_s = began_s + FROM_SHARE * (last.at_s - began_s)
    claimed = [one for one in readings if one.at_s >= from_s and last.at_s - one.at_s >= MIN_LEFT_S]
    shares = [abs((one.share or 0.0) - one.windows / last.windows) for one in claimed]
    lefts = [
        abs(one.left_s / (last.at_s - one.at_s) - 1) for one in claimed if one.left_s is not None
    ]
    return {
        "run_s": last.at_s - began_s,
        "readings": len(claimed),
        "share_max": max(shares, default=0.0),
        "left_max": max(lefts, default=0.0),
        "left_median": median(lefts) if lefts else 0.0,
        "within_20": sum(error <= 0.2 for error in lefts) / max(1, len(lefts)),
        "without": 1 - len(lefts) / max(1, len(claimed)),
    }


def measure(source: Path, model: Path, window_s: float) -> dict[str, Any]:
    """Plan and label a folder; return what was said of it and what it was."""
    with tempfile.TemporaryDirectory() as output:
        config = {
            "inputs": [str(source)],
            "output": output,
            "model": {"name": str(model)},
            "inference": {"device": "cpu", "precision": "fp32", "engine": "torch"},
        }
        argument = json.dumps([config, window_s])
        planned = run_apart(_PLAN, argument)
        said = run_apart(_LABEL, argument)
        run = json.loads((Path(output) / "run.json").read_text())
    estimate = re.search(
        r"Estimate from .*: ([\d.,]+) (s|min|h) of audio, ([\d,]+) window", planned
    )
    time = re.search(r"Time on this machine: about ([\d:]+( s)?) ", planned)
    if estimate is None or time is None:
        raise SystemExit(f"earmark plan gives no estimate: {planned}")
    unit_s = {"s": 1.0, "min": 60.0, "h": 3600.0}[estimate[2]]
    readings = read_display(said)
    found = errors_of(readings)
    totals = run["totals"]
    return {
        **found,
        "plan_audio": float(estimate[1].replace(",", "")) * unit_s / totals["audio_s"],
        "plan_windows": int(estimate[3].replace(",", "")) / totals["windows"],
        "plan_time": seconds_of(time[1]) / max(1e-3, run["time"]["labelling"]["total_s"]),
        "windows": totals["windows"],
        "readings_said": [list(one) for one in readings],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--files", type=int, default=80, help="recordings of each case")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/esc10/audio")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--window-s", type=float, default=0.1, help="that a window takes at least")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="where to")
    options = parser.parse_args(arguments)
    data = options.data if options.data.is_dir() else ROOT / "samples"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tiny_model(folder / "model")
        clips = make_clips(data, options.files)
        for case in options.cases:
            CASES[case](folder / case, clips)
        cases = {
            case: functools.partial(measure, folder / case, model, options.window_s)
            for case in options.cases
        }
        runs = paired_rounds(cases, options.rounds)
    columns = (
        *("run_s", "share_max", "left_median", "left_max", "within_20"),
        *("plan_audio", "plan_windows", "plan_time"),
    )
    figures = {
        case: {name: median([run[name] for run in measured]) for name in columns}
        for case, measured in runs.items()
    }
    print_table(
        (
            *("case", "run, s", "share: largest error", "time left: median error", "largest"),
            *("within 20 %", "plan: audio", "plan: windows", "plan: time"),
        ),
        [(case, *(found[name] for name in columns)) for case, found in figures.items()],
    )
    write_results(options.results / "progress.json", {"figures": figures, "rounds": runs})


if __name__ == "__main__":
    main()
