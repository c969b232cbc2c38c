"""Does it scale? Time per window and peak memory with 1, 4 and 16 times the data; 1 and 2 workers.

    python -m benchmarks.scaling [--rounds 3] [--windows 500] [--workers 1 2]

Each run is a process of its own over files of ten windows each, with a small model. Time per window
is that of labelling alone, which the run's own clocks give; start-up is a column of its own. With
several workers it is the wall time from the first work to the last. Peak memory is that of the
labelling process where it works by itself, so it is left out for several workers.

Prints a table and writes ``scaling.json`` and ``scaling.png`` beside this file.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    drawn,
    label_apart,
    median,
    paired_rounds,
    print_table,
    spread,
    write_noise,
    write_results,
)

FACTORS = (1, 4, 16)


def figures(run: dict[str, Any], workers: int) -> dict[str, float]:
    """Of one run: ms per window of labelling, seconds of anything else, MB."""
    time, windows = run["run"]["time"], run["run"]["totals"]["windows"]
    # Labelling threads, each of a process of its own, work at the same time.
    labelling_s = time["labelling"]["total_s"] / workers
    return {
        "window_ms": 1000.0 * labelling_s / windows,
        "other_s": run["seconds"] - labelling_s,
        "peak_mb": run["peak_mb"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is run")
    parser.add_argument("--windows", type=int, default=500, help="of the smallest case")
    parser.add_argument(
        "--factors", type=int, nargs="+", default=FACTORS, help="how many times that many"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=(1, 2), help="processes that label"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="where to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        counts = [factor * options.windows for factor in options.factors]
        model, inputs = write_noise(Path(name), counts)
        keys = {
            f"{factor}×, {workers}": (factor, workers)
            for workers in options.workers
            for factor in options.factors
        }
        cases = {
            name: functools.partial(
                label_apart,
                inputs[factor * options.windows],
                model,
                inference={"device": "cpu", "precision": "fp32", "workers": workers},
            )
            for name, (factor, workers) in keys.items()
        }
        runs = paired_rounds(cases, options.rounds)
    measured = {
        name: [figures(run, keys[name][1]) for run in found] for name, found in runs.items()
    }
    rows = []
    for name, found in measured.items():
        factor, workers = keys[name]
        window_ms = [run["window_ms"] for run in found]
        peak_mb = median([run["peak_mb"] for run in found])
        rows.append(
            (
                workers,
                factor * options.windows,
                median(window_ms),
                f"{spread(window_ms):.0%}",
                median([run["other_s"] for run in found]),
                peak_mb if workers == 1 else "–",
            )
        )
    header = ("workers", "windows", "ms a window", "spread", "start and end, s", "peak memory, MB")
    print_table(header, rows)
    write_results(options.results / "scaling.json", {"runs": measured})
    with drawn(options.results / "scaling.png", "Time per window as the data grows") as axes:
        for workers in options.workers:
            mine = [row for row in rows if row[0] == workers]
            axes.plot([row[1] for row in mine], [row[2] for row in mine], "o-", label=str(workers))
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("windows")
        axes.set_ylabel("ms a window")
        axes.legend(title="workers")


if __name__ == "__main__":
    main()
