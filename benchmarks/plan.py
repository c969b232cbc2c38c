"""What does planning a large input take? Time and memory over files that are only listed.

    python -m benchmarks.plan [--rounds 3] [--files 100000 1000000]

Lists WAV files of 5 s in a store that has nothing but a listing
(``tests/support/stores/listing_store.py``), and cuts them into units, as ``earmark plan`` and
``earmark label`` do before any work starts: without an output, and without the sample that ``plan``
decodes and times, which takes the same for any input. Each run is a process of its own. Prints a
table, writes ``plan.json`` and draws ``plan.png`` beside this file; see ``benchmarks/README.md``
for the figures.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import drawn, median, paired_rounds, print_table, run_apart, write_results
from tests.support.stores.listing_store import bucket_url

WAV_BYTES = 44 + 5 * 44_100 * 2

# What the libraries take stands before the planning begins: a plan of one file is made first.
_PLAN = """
import json, resource, sys, time
import tests.support.stores.listing_store
from pipeline.config.label import RunConfig
from pipeline.labelling.plan import describe_plan, make_plan
one, many = json.loads(sys.argv[1])
def plan(url):
    config = RunConfig.model_validate({"inputs": [url], "inference": {"device": "cpu"}})
    found = make_plan(config, needs_output=False)
    describe_plan(found)
    return found
def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
plan(one)
base_mb, cpu_s, wall_s = peak_mb(), time.process_time(), time.perf_counter()
units = plan(many).units
print(json.dumps({
    "wall_s": time.perf_counter() - wall_s,
    "cpu_s": time.process_time() - cpu_s,
    "peak_mb": peak_mb(),
    "base_mb": base_mb,
    "units": len(units),
    "largest_unit": max(unit.estimated_windows for unit in units),
}))
"""


def plan_apart(num_files: int) -> dict[str, Any]:
    """Plan so many files in a process of its own.

    Returns:
        ``wall_s`` and ``cpu_s`` of planning; ``peak_mb`` of the process, and ``base_mb`` before it
        began; ``units``, and windows of the largest.
    """
    urls = [bucket_url(1, WAV_BYTES), bucket_url(num_files, WAV_BYTES)]
    found: dict[str, Any] = json.loads(run_apart(_PLAN, json.dumps(urls)).splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, nargs="+", default=(100_000, 1_000_000))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="where to")
    options = parser.parse_args(arguments)
    cases = {str(count): functools.partial(plan_apart, count) for count in options.files}
    runs = paired_rounds(cases, options.rounds)
    names = ("cpu_s", "wall_s", "peak_mb", "base_mb", "units", "largest_unit")
    figures = {
        count: {name: median([run[name] for run in measured]) for name in names}
        for count, measured in runs.items()
    }
    print_table(
        ("files", "seconds", "of them CPU", "peak memory, MB", "before planning, MB", "units"),
        [
            (
                int(count),
                *(found[name] for name in ("wall_s", "cpu_s", "peak_mb", "base_mb")),
                int(found["units"]),
            )
            for count, found in figures.items()
        ],
    )
    write_results(options.results / "plan.json", {"figures": figures, "rounds": runs})
    title = "Planning files that are only listed"
    with drawn(options.results / "plan.png", title) as axes:
        counts = [int(count) for count in figures]
        axes.plot(counts, [found["cpu_s"] for found in figures.values()], "o-", label="CPU, s")
        axes.set_xlabel("files")
        axes.set_ylabel("seconds")
        memory = axes.twinx()
        memory.plot(counts, [found["peak_mb"] for found in figures.values()], "s--", color="grey")
        memory.set_ylabel("peak memory, MB (dashed)")
        axes.set_ylim(bottom=0)
        memory.set_ylim(bottom=0)


if __name__ == "__main__":
    main()
