"""How fast is it beside its peers? Seconds a clip from encoded files to written Parquet.

    python -m benchmarks.peers [--rounds 3] [--seconds 16] [--data ../shared/data/esc10/audio]

The same recordings, of a window each, and the same weights (AST base: 12 layers, 1024 frames, 527
labels, drawn at random) for all: the Hugging Face pipeline at its best batch size and precision, a
plain PyTorch DataLoader loop in the same, OpenVINO called directly on ready features (the ceiling:
no reading, no decoding, no rows), and ``earmark label`` by torch and by OpenVINO. What the programs
do is in ``peer_programs``; each run is a process of its own.

A run over N clips takes start-up and N times what a clip takes. So every contender runs twice in
every round, over one clip and over N, and a clip is (T_N − T_1) / (N − 1); T_1 is the time to the
first labelled window. N is such that the clips take about ``--seconds``, and one more than a
multiple of eight, so that a last batch that is padded is so in both runs. Ratios are taken within
each round; what is told is their median.

Before the rounds, everybody runs once with every score stored, and that is compared with float32's;
Earmark's own check and calibration, whose figures it keeps, happen then, too. ``--toy`` goes the
same way with a tiny model and a few seconds of noise, and says nothing about speed.

Prints a table and writes ``peers.json`` and ``peers.png`` beside this file.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import soundfile

from benchmarks.common import (
    RATE_HZ,
    WINDOW_SAMPLES,
    drawn,
    median,
    paired_rounds,
    print_table,
    run_module,
    spread,
    write_results,
)

HUGGING_FACE, DATA_LOADER, CEILING = "Hugging Face pipeline", "DataLoader loop", "OpenVINO alone"
EARMARK = {
    "Earmark, torch fp32": ("--engine", "torch", "--precision", "fp32"),
    "Earmark, torch bf16": ("--engine", "torch", "--precision", "bf16"),
    "Earmark, OpenVINO bf16": ("--engine", "openvino", "--precision", "bf16"),
    "Earmark, OpenVINO int8": ("--engine", "openvino", "--precision", "int8"),
}
CONTENDERS = {
    "hugging-face": HUGGING_FACE,
    "loop": DATA_LOADER,
    "ceiling": CEILING,
    "torch-fp32": "Earmark, torch fp32",
    "torch-bf16": "Earmark, torch bf16",
    "openvino-bf16": "Earmark, OpenVINO bf16",
    "openvino-int8": "Earmark, OpenVINO int8",
}
YARDSTICKS = ("hugging-face", "ceiling")  # what the others are compared with always takes part

# N is one more than a multiple of this, which batches divide.
CLIPS_STEP = 8
# int8 is thought to take this share of bf16's time; only the number of clips depends on it.
INT8_SHARE = 0.6

# What is said of a precision to be good enough; Earmark warns beyond the same.
MAX_SCORE_DIFFERENCE, MIN_SAME_TOP = 0.02, 0.99

Scores = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]


@dataclass(frozen=True)
class Size:
    """How large the benchmark is.

    Attributes:
        model: The program that writes the model.
        batch_sizes: Those that the sweeps try.
        sweep_clips: Clips that a sweep measures at each setting.
        checked: Clips whose scores are compared with float32's.
        workers: Processes that make features for those who have such.
    """

    model: str
    batch_sizes: tuple[int, ...]
    sweep_clips: int
    checked: int
    workers: int


FULL = Size("write_model", batch_sizes=(1, 4, 8), sweep_clips=8, checked=32, workers=1)
TOY = Size("write_tiny_model", batch_sizes=(1, 2), sweep_clips=2, checked=4, workers=0)


@dataclass(frozen=True)
class Stand:
    """What all contenders have in common.

    Attributes:
        folder: Where everything lies.
        model: The checkpoint.
        recordings: What there is to label.
        size: How large the benchmark is.
    """

    folder: Path
    model: Path
    recordings: Sequence[Path]
    size: Size

    @property
    def environment(self) -> dict[str, str]:
        """No network, and what Earmark keeps from run to run in a folder of this benchmark."""
        return {"EARMARK_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}

    def audio(self, num_clips: int) -> Path:
        """A folder of so many recordings, the same ones each time."""
        target = self.folder / f"audio-{num_clips}"
        if not target.exists():
            target.mkdir()
            for index, recording in enumerate(self.recordings[:num_clips]):
                shutil.copyfile(recording, target / f"{index:05}-{recording.name}")
        return target

    def run_program(self, name: str, **job: Any) -> dict[str, Any]:
        """What a program of ``peer_programs`` says."""
        values = {"model": str(self.model), "converted": str(self.folder), **job}
        said = run_module("benchmarks.peer_programs", [name, json.dumps(values)], self.environment)
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        return found


@dataclass(frozen=True)
class Contender:
    """Who labels a folder.

    Attributes:
        label: Labels so many clips into a file or folder, with every score stored or not, as a
            process of its own. It gives what the process says of itself.
        read_scores: Every score of each file, from what was written.
        pace_s: What a clip is thought to take; only the number of clips depends on it.
        settings: How it runs.
        is_ceiling: It times itself, and does nothing but infer.
    """

    label: Callable[[int, Path, bool], dict[str, Any]]
    read_scores: Callable[[Path], Scores]
    pace_s: float
    settings: Mapping[str, Any]
    is_ceiling: bool = False


# The contenders


def make_program(stand: Stand, name: str, settings: Mapping[str, Any], pace_s: float) -> Contender:
    """A program of ``peer_programs``."""

    def label(num_clips: int, output: Path, scores: bool) -> dict[str, Any]:
        return stand.run_program(
            name,
            audio=str(stand.audio(num_clips)),
            output=str(output),
            num_clips=num_clips,
            scores=scores,
            **settings,
        )

    return Contender(label, read_rows, pace_s, settings, is_ceiling=name == "openvino")


def make_earmark(stand: Stand, options: Sequence[str], pace_s: float) -> Contender:
    """The real command."""

    def label(num_clips: int, output: Path, scores: bool) -> dict[str, Any]:
        given = [str(stand.audio(num_clips)), "--output", str(output), "--model", str(stand.model)]
        asked = ["--device", "cpu", "--quiet", *options, *(["--scores"] if scores else [])]
        run_module("pipeline", ["label", *given, *asked], stand.environment)
        run: dict[str, Any] = json.loads((output / "run.json").read_text())
        return {name: run.get(name) for name in ("time", "checks", "calibration")}

    return Contender(label, read_windows, pace_s, {"options": list(options)})


def read_rows(path: Path) -> Scores:
    """Scores from what a peer wrote."""
    table = pq.read_table(path, columns=["file", "scores"]).to_pydict()
    return _by_file(table["file"], table["scores"])


def read_windows(output: Path) -> Scores:
    """Scores from what Earmark wrote."""
    columns = ["clip_id", "scores"]
    table = pq.read_table(sorted((output / "windows").iterdir()), columns=columns).to_pydict()
    return _by_file([Path(unquote(clip)).name for clip in table["clip_id"]], table["scores"])


def _by_file(files: Sequence[str], scores: Sequence[Sequence[float]]) -> Scores:
    return {file: np.array(row, np.float32) for file, row in zip(files, scores, strict=True)}


def compare(found: Scores, expected: Scores) -> dict[str, Any]:
    """How far scores are from float32's, over the files that both have.

    Raises:
        SystemExit: They have none in common.
    """
    files = sorted(found.keys() & expected.keys())
    if not files:
        raise SystemExit("there are no scores to compare: the files are named otherwise")
    differences = [float(np.abs(found[file] - expected[file]).max()) for file in files]
    same = [found[file].argmax() == expected[file].argmax() for file in files]
    return {
        "clips": len(files),
        "max_score_difference": max(differences),
        "same_top": sum(map(bool, same)) / len(files),
    }


# The measurement


def count_clips(pace_s: float, seconds: float, most: int) -> int:
    """Clips that take about so long, one more than a multiple of eight, of those that there are."""
    wanted = 1 + CLIPS_STEP * max(1, round(seconds / pace_s / CLIPS_STEP))
    return min(wanted, 1 + (most - 1) // CLIPS_STEP * CLIPS_STEP)


def measure(contender: Contender, num_clips: int, folder: Path) -> dict[str, Any]:
    """One round: a run over one clip, and one over all; seconds, and what the latter said."""

    def timed(clips: int) -> tuple[float, dict[str, Any]]:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            began_s = time.monotonic()
            said = contender.label(clips, Path(name) / "out", False)
            return time.monotonic() - began_s, said

    if contender.is_ceiling:
        _, said = timed(num_clips)
        return {"clip_s": said["clip_s"]}
    one_s, _ = timed(1)
    all_s, said = timed(num_clips)
    clip_s = (all_s - one_s) / (num_clips - 1)
    return {"one_s": one_s, "all_s": all_s, "clip_s": clip_s, **said}


def warm_up(contender: Contender, num_clips: int, expected: Scores, folder: Path) -> dict[str, Any]:
    """The first run, over one clip; and how far a contender's scores are from float32's."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        began_s = time.monotonic()
        if not contender.is_ceiling:
            contender.label(1, Path(name) / "one", False)
        first_run_s = time.monotonic() - began_s
        said = contender.label(num_clips, Path(name) / "all", True)
        precision = compare(contender.read_scores(Path(name) / "all"), expected)
    return {"first_run_s": first_run_s, "precision": precision, "first_run": said}


def find_recordings(folder: Path, most: int | None) -> list[Path]:
    """Recordings that a window holds, in an order that mixes them.

    Raises:
        SystemExit: There are too few.
    """
    files = sorted(path for path in folder.glob("*") if path.is_file())
    fitting = [path for path in files if _duration_s(path) <= WINDOW_SAMPLES / RATE_HZ]
    if len(fitting) < len(files):
        print(f"left out: {len(files) - len(fitting)} files, longer than a window or no audio")
    if len(fitting) <= CLIPS_STEP:
        raise SystemExit(
            f"{folder}: {len(fitting)} recordings of at most a window; needed: {CLIPS_STEP + 1}. "
            "Name another folder with --data."
        )
    order = np.random.default_rng(0).permutation(len(fitting))
    return [fitting[place] for place in order[:most]]


def _duration_s(path: Path) -> float:
    try:
        return float(soundfile.info(path).duration)
    except soundfile.LibsndfileError:
        return float("inf")


def write_toy_recordings(folder: Path) -> Path:
    """A few seconds of noise, so that the toy needs nothing."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for index in range(CLIPS_STEP + 1):
        noise = generator.normal(0, 0.1 * (index + 1) / CLIPS_STEP, RATE_HZ)
        soundfile.write(folder / f"{index}.flac", noise, RATE_HZ)
    return folder


@dataclass(frozen=True)
class Sweeps:
    """What everybody's best setting is.

    Attributes:
        hugging_face: Every setting of the pipeline, with its ``clip_s``.
        openvino: Every setting of OpenVINO.
    """

    hugging_face: Sequence[Mapping[str, Any]]
    openvino: Sequence[Mapping[str, Any]]

    def best(self, kind: str, **wanted: str) -> dict[str, Any]:
        """The fastest setting of one kind, among those of a precision if one is wanted."""
        settings = [s for s in getattr(self, kind) if wanted.items() <= s.items()]
        return dict(min(settings, key=lambda setting: float(setting["clip_s"])))


def sweep(stand: Stand) -> Sweeps:
    """Try what there is to choose."""
    size = stand.size
    job = {
        "audio": str(stand.audio(max(size.checked, size.sweep_clips))),
        "batch_sizes": size.batch_sizes,
        "num_clips": size.sweep_clips,
        "workers": size.workers,
    }
    pipelines = stand.run_program("hugging_face_sweep", precisions=("fp32", "bf16"), **job)
    graphs = stand.run_program("openvino_sweep", **job)
    return Sweeps(pipelines["settings"], graphs["settings"])


def make_contenders(stand: Stand, sweeps: Sweeps, chosen: Sequence[str]) -> dict[str, Contender]:
    """Those that take part, by the name that the table has."""
    pipeline, graph = sweeps.best("hugging_face"), sweeps.best("openvino")
    pipeline_s, graph_s = pipeline.pop("clip_s"), graph.pop("clip_s")
    in_torch = {
        precision: sweeps.best("hugging_face", precision=precision)["clip_s"]
        for precision in ("fp32", "bf16")
    }
    pipeline["workers"] = stand.size.workers
    made = {
        HUGGING_FACE: make_program(stand, "hugging_face", pipeline, pipeline_s),
        DATA_LOADER: make_program(stand, "data_loader", pipeline, pipeline_s),
        CEILING: make_program(stand, "openvino", graph, graph_s),
    }
    paces = (in_torch["fp32"], in_torch["bf16"], graph_s, INT8_SHARE * graph_s)
    for (name, options), pace_s in zip(EARMARK.items(), paces, strict=True):
        made[name] = make_earmark(stand, options, pace_s)
    return {name: made[name] for key, name in CONTENDERS.items() if key in chosen}


def summarise(
    rounds: Mapping[str, Sequence[Mapping[str, Any]]], first: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The figures of every contender: medians of the rounds, and of the ratios within each."""
    found = {}
    for name, mine in rounds.items():
        clip_s = [each["clip_s"] for each in mine]
        speedups = _ratios(rounds[HUGGING_FACE], mine)
        precision = first[name]["precision"]
        found[name] = {
            "clip_s": median(clip_s),
            "spread": spread(clip_s),
            "speedup": median(speedups),
            "speedups": speedups,
            "of_ceiling": median(_ratios(rounds[CEILING], mine)),
            "one_s": median([each["one_s"] for each in mine]) if "one_s" in mine[0] else None,
            "first_run_s": first[name]["first_run_s"],
            **precision,
            "gates_passed": precision["max_score_difference"] <= MAX_SCORE_DIFFERENCE
            and precision["same_top"] >= MIN_SAME_TOP,
        }
    return found


def _ratios(theirs: Sequence[Mapping[str, Any]], mine: Sequence[Mapping[str, Any]]) -> list[float]:
    return [a["clip_s"] / b["clip_s"] for a, b in zip(theirs, mine, strict=True)]


def run_all(stand: Stand, options: argparse.Namespace) -> dict[str, Any]:
    """Choose settings, warm up, measure."""
    stand.run_program(stand.size.model)
    sweeps = sweep(stand)
    chosen = [*YARDSTICKS, *options.contenders]
    contenders = make_contenders(stand, sweeps, chosen)
    most, checked = len(stand.recordings), min(stand.size.checked, len(stand.recordings))
    reference = stand.folder / "reference.parquet"
    plain = {"precision": "fp32", "batch_size": 1}
    make_program(stand, "hugging_face", plain, 0.0).label(checked, reference, True)
    expected = read_rows(reference)
    clips, first, left_out = {}, {}, {}
    for name, contender in contenders.items():
        clips[name] = count_clips(contender.pace_s, options.seconds, most)
        num_clips = max(clips[name], checked) if name in EARMARK else checked
        try:
            first[name] = warm_up(contender, num_clips, expected, stand.folder)
        except SystemExit as error:
            if name in (HUGGING_FACE, CEILING):
                raise
            left_out[name] = str(error).strip().splitlines()[-1]
            print(f"left out: {name}: {left_out[name]}")
    cases = {
        name: functools.partial(measure, contenders[name], clips[name], stand.folder)
        for name in first
    }
    rounds = paired_rounds(cases, options.rounds)
    return {
        "is_toy": options.toy,
        "summary": summarise(rounds, first),
        "clips": clips,
        "settings": {name: contender.settings for name, contender in contenders.items()},
        "left_out": left_out,
        "sweeps": {"hugging_face": sweeps.hugging_face, "openvino": sweeps.openvino},
        "first_runs": first,
        "rounds": rounds,
    }


def show(result: Mapping[str, Any]) -> None:
    """The table, and what it does not hold."""
    rows = [
        (
            name,
            1000.0 * found["clip_s"],
            f"{found['speedup']:.2f}×",
            f"{found['of_ceiling']:.0%}",
            found["one_s"] if found["one_s"] is not None else "–",
            found["first_run_s"] if found["one_s"] is not None else "–",
            f"{found['max_score_difference']:.2g}",
            f"{found['same_top']:.0%}",
            f"{found['spread']:.0%}",
        )
        for name, found in result["summary"].items()
    ]
    print_table(
        (
            *(
                "",
                "ms a clip",
                "speed-up",
                "of the ceiling",
                "one clip, s",
                "for the first time, s",
            ),
            *("largest difference of a score", "same top label", "spread"),
        ),
        rows,
    )
    for name in (HUGGING_FACE, CEILING):
        told = ", ".join(f"{key} {value}" for key, value in result["settings"][name].items())
        print(f"{name}: {told}")
    print(f"clips: {', '.join(f'{name} {number}' for name, number in result['clips'].items())}")


def draw(result: Mapping[str, Any], target: Path) -> None:
    """Speeds beside the pipeline's, and the ceiling."""
    summary = result["summary"]
    title = f"Clips a second, end to end: {HUGGING_FACE} = 1"
    with drawn(target, f"{title} (toy)" if result["is_toy"] else title) as axes:
        names = [name for name in summary if name != CEILING][::-1]
        bars = axes.barh(names, [summary[name]["speedup"] for name in names])
        told = [f"{summary[name]['speedup']:.2f}×" for name in names]
        axes.bar_label(bars, told, label_type="center", color="white")
        axes.axvline(summary[CEILING]["speedup"], color="black", linestyle="--", label=CEILING)
        axes.legend()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="paired rounds")
    parser.add_argument(
        "--seconds", type=float, default=16.0, help="that the clips of a run take, about"
    )
    parser.add_argument("--clips", type=int, help="recordings that are used, at most")
    parser.add_argument(
        "--contenders",
        nargs="*",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        help="who takes part, beside the Hugging Face pipeline and the ceiling",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data/esc10/audio"),
        help="a folder of recordings; those longer than a window are left out",
    )
    parser.add_argument("--toy", action="store_true", help="a tiny model and noise")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="where to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), TOY if options.toy else FULL
        data = write_toy_recordings(folder / "toy") if options.toy else options.data
        recordings = find_recordings(data, options.clips)
        result = run_all(Stand(folder, folder / "model", recordings, size), options)
    show(result)
    write_results(options.results / "peers.json", result)
    draw(result, options.results / "peers.png")


if __name__ == "__main__":
    main()
