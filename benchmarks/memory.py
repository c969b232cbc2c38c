"""Does memory stay flat? Peak memory of ``earmark label`` over 1,000 and over 4,000 windows.

    python -m benchmarks.memory [--rounds 3]

Each run is a process of its own, over files of ten windows each, with a small model, so that what
grows with the data would show beside what does not. Peak memory is that of the labelling process,
without its decoders. Prints a table and writes ``memory.json`` beside this
file; see ``benchmarks/README.md`` for the figures.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import (
    label_apart,
    median,
    paired_rounds,
    print_table,
    write_noise,
    write_results,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run")
    parser.add_argument(
        "--windows", type=int, nargs=2, default=(1000, 4000), help="of the two cases"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="where to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        model, inputs = write_noise(Path(name), options.windows)
        cases = {
            str(count): functools.partial(label_apart, source, model)
            for count, source in inputs.items()
        }
        runs = paired_rounds(cases, options.rounds)
    peaks = {
        count: median([run["peak_mb"] for run in measured]) for count, measured in runs.items()
    }
    few, many = peaks.values()
    seconds = {count: [run["seconds"] for run in measured] for count, measured in runs.items()}
    print_table(
        ("windows", "peak memory, MB", "seconds, start-up included"),
        [(int(count), peaks[count], median(seconds[count])) for count in runs],
    )
    print(f"ratio: {many / few:.3f}")
    result = {"peak_mb": peaks, "seconds": seconds, "ratio": many / few}
    write_results(options.results / "memory.json", result)


if __name__ == "__main__":
    main()
