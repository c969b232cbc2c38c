"""What the benchmarks have in common: the machine, paired rounds, tables, pictures, JSON.

Where versions or settings are compared, each round runs every case once, in turn, so that what else
the machine does falls on all of them alike; the figure of a case is the median of its rounds.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soundfile

T = TypeVar("T")

RATE_HZ = 16_000
WINDOW_SAMPLES = 164_080  # what 1024 frames hold
NUM_DISTINCT_FILES = 10

_LIBRARIES = ("apache-beam", "torch", "torchaudio", "numpy", "pyarrow", "soundfile", "av", "soxr")

_RUN = """
import json, resource, sys
{prelude}
from pipeline.config import RunConfig
from pipeline.run import run_label
code = run_label(RunConfig.model_validate(json.loads(sys.argv[1])), [])
own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"exit_code": code, "peak_kb": own}}))
"""


def machine() -> dict[str, Any]:
    """The machine, the versions and the date: what figures mean nothing without."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def paired_rounds(cases: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What every case gives in every round, the cases of a round one after another."""
    found: dict[str, list[T]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            found[name].append(case())
    return found


def median(values: Sequence[float]) -> float:
    """The middle one, or the mean of the two in the middle."""
    return float(statistics.median(values))


def spread(values: Sequence[float]) -> float:
    """How far the rounds lie apart: largest less smallest, as a share of the median."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table as Markdown has it, numbers to the right: fit to be copied into a README."""
    print(f"| {' | '.join(header)} |")
    print(f"|---|{'--:|' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(_cell(value) for value in row)} |")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_results(target: Path, result: Mapping[str, Any]) -> None:
    """The figures with the machine that they are from, as JSON."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


@contextmanager
def drawn(target: Path, title: str) -> Iterator[Any]:
    """Axes to draw on; a PNG once the block ends."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.0, 4.5), layout="constrained")
    axes.set_title(title)
    yield axes
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


# Data: files of noise, and runs over them


def write_sources(folder: Path, windows_per_file: int) -> list[Path]:
    """A few distinct files of noise, each of so many windows."""
    generator = np.random.default_rng(0)
    paths = []
    for index in range(NUM_DISTINCT_FILES):
        path = folder / f"source-{index}.wav"
        noise = generator.normal(0, 0.1, WINDOW_SAMPLES * windows_per_file)
        soundfile.write(path, noise, RATE_HZ, subtype="PCM_16")
        paths.append(path)
    return paths


def link_inputs(folder: Path, num_files: int, sources: Sequence[Path]) -> Path:
    """A folder of links to a few distinct files, which cost no disk."""
    target = folder / f"input-{num_files}"
    target.mkdir()
    for index in range(num_files):
        os.link(sources[index % len(sources)], target / f"{index:05}{sources[0].suffix}")
    return target


def run_apart(code: str, argument: str) -> str:
    """What a piece of Python prints, run in a process of its own.

    Raises:
        SystemExit: It failed; with what it said.
    """
    command = [sys.executable, "-c", code, argument]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return done.stdout


def label_apart(source: Path, model: Path, *, prelude: str = "", **changes: Any) -> dict[str, Any]:
    """``earmark label`` over a folder, in a process of its own.

    Args:
        source: The folder.
        model: The checkpoint.
        prelude: Python that the process runs first.
        **changes: Sections of the configuration.

    Returns:
        ``seconds``, start-up included; ``peak_mb`` of the labelling process, without its decoders
        and workers; ``run``, what run.json says.

    Raises:
        SystemExit: The run failed; with what it said.
    """
    with tempfile.TemporaryDirectory() as output:
        config = {
            "inputs": [str(source)],
            "output": output,
            "quiet": True,
            "model": {"name": str(model)},
            "inference": {"device": "cpu", "precision": "fp32"},
            "labels": {"scores": True},
            **changes,
        }
        began_s = time.monotonic()
        said = run_apart(_RUN.format(prelude=prelude), json.dumps(config))
        seconds = time.monotonic() - began_s
        result = json.loads(said.splitlines()[-1])
        if result["exit_code"] != 0:
            raise SystemExit(f"{source}: labelling it ended with {result['exit_code']}, not with 0")
        run = json.loads((Path(output) / "run.json").read_text())
    return {"seconds": seconds, "peak_mb": result["peak_kb"] / 1024, "run": run}
