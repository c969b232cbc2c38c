"""Does memory stay flat? Peak memory of ``earmark label`` over 1,000 and over 4,000 windows.

    python -m benchmarks.memory [--rounds 3]

Each run is a process of its own, over files of ten windows each, with a small model, so that what
grows with the data would show beside what does not. Peak memory is that of the labelling process,
without its decoders. Prints a table and writes ``memory.json`` beside this
file; see ``benchmarks/README.md`` for the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from tests.model_factory import write_tiny_model

RATE_HZ = 16_000
WINDOWS_PER_FILE = 10
NUM_DISTINCT_FILES = 10
WINDOW_S = 164_080 / RATE_HZ

_RUN = """
import json, resource, sys
from pipeline.config import RunConfig
from pipeline.run import run_label
code = run_label(RunConfig.model_validate(json.loads(sys.argv[1])), [])
own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"exit_code": code, "peak_kb": own}))
"""


def write_inputs(folder: Path, num_windows: int, sources: list[Path]) -> Path:
    """Files of ten windows each; links to a few distinct ones, which cost no disk."""
    target = folder / f"input-{num_windows}"
    target.mkdir()
    for index in range(num_windows // WINDOWS_PER_FILE):
        os.link(sources[index % len(sources)], target / f"{index:05}.wav")
    return target


def write_sources(folder: Path) -> list[Path]:
    """A few distinct files of ten windows of noise."""
    generator = np.random.default_rng(0)
    paths = []
    for index in range(NUM_DISTINCT_FILES):
        path = folder / f"source-{index}.wav"
        noise = generator.normal(0, 0.1, round(WINDOW_S * WINDOWS_PER_FILE * RATE_HZ))
        soundfile.write(path, noise, RATE_HZ, subtype="PCM_16")
        paths.append(path)
    return paths


def measure(source: Path, model: Path, output: Path) -> dict[str, float]:
    """One run: seconds and peak memory in MB."""
    config = {
        "inputs": [str(source)],
        "output": str(output),
        "quiet": True,
        "model": {"name": str(model)},
        "inference": {"device": "cpu", "precision": "fp32"},
        "labels": {"scores": True},
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps(config)], check=True, capture_output=True, text=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    if result["exit_code"] != 0:
        raise SystemExit(done.stderr)
    return {"seconds": time.monotonic() - began, "peak_mb": result["peak_kb"] / 1024}


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, nargs=2, default=(1000, 4000))
    arguments = parser.parse_args()
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in arguments.windows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tiny_model(folder / "model", hidden_size=192, num_attention_heads=3)
        sources = write_sources(folder)
        inputs = {count: write_inputs(folder, count, sources) for count in arguments.windows}
        for round_index in range(arguments.rounds):
            for count, source in inputs.items():
                output = folder / f"out-{count}-{round_index}"
                runs[count].append(measure(source, model, output))
    few, many = (statistics.median(run["peak_mb"] for run in runs[n]) for n in arguments.windows)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "runs": {str(count): measured for count, measured in runs.items()},
        "ratio": many / few,
    }
    print(f"{'windows':>8} {'peak MB':>8} {'seconds':>8}")
    for count, measured in runs.items():
        peak = statistics.median(run["peak_mb"] for run in measured)
        print(f"{count:>8} {peak:>8.0f} {statistics.median(r['seconds'] for r in measured):>8.1f}")
    print(f"ratio: {many / few:.3f}")
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
