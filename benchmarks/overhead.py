"""What does the pipeline itself cost? Milliseconds a window around a model that does nothing.

    python -m benchmarks.overhead [--rounds 5] [--windows 4000] [--clock wall|cpu]

The real graph, from files to committed Parquet, with a null model of AST base's width: 768 numbers
of embedding and 527 scores a window, all stored. Where the time of the labelling thread goes, the
run's own clocks say (``pipeline/terminal/time_report.py``). The overhead is what is neither
features nor waiting for audio nor the model: Beam, cutting, batching, rows, Parquet and commits.
Reading, decoding and level statistics go on in other processes.

``--clock cpu`` counts the processor's time instead of the wall's, which other work on the machine
hardly moves; it does not see what waiting for the disk costs.

Prints a table and writes ``overhead.json`` and ``overhead.png`` beside this file.
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
    link_inputs,
    median,
    paired_rounds,
    print_table,
    spread,
    write_results,
    write_sources,
)
from tests.support.model_factory import write_tiny_model

WINDOWS_PER_FILE = 4
HIDDEN_SIZE = 768
NUM_LABELS = 527
STAGES = ("write", "other")

_PRELUDE = "from benchmarks.overhead import use_null_model; use_null_model({clock!r})"


def use_null_model(clock: str) -> None:
    """Put a model that does nothing in place of the loaded one, in this process.

    Args:
        clock: What the stages are measured with: ``wall``, or ``cpu`` of the thread.
    """
    import time
    from types import SimpleNamespace

    import numpy as np
    from torch import nn

    from transforms.inference.engine import join_features
    from transforms.inference.handler import ASTModelHandler
    from transforms.process import stage_times
    from transforms.records import FloatArray, Prediction

    class NullEngine(nn.Module):
        """Gives the same numbers for every window."""

        def __init__(self) -> None:
            super().__init__()
            generator = np.random.default_rng(0)
            embedding = generator.normal(0, 1, HIDDEN_SIZE).astype(np.float32)
            scores = generator.uniform(0, 1, NUM_LABELS).astype(np.float32)
            self.prediction = Prediction(embedding, scores, "null cpu fp32")
            self.make_features = join_features

        def begin(self, features: FloatArray) -> None:
            """It computes nothing by itself."""

        def label(self, features: FloatArray) -> list[Prediction]:
            return [self.prediction] * len(features)

    ASTModelHandler.load_model = lambda self: NullEngine()  # type: ignore[method-assign]
    if clock == "cpu":
        stage_times.time = SimpleNamespace(perf_counter=time.thread_time)  # type: ignore


def per_window_ms(run: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of the labelling thread for each window, by stage."""
    seconds, windows = run["run"]["time"]["labelling"], run["run"]["totals"]["windows"]
    stages = {
        "fbank": seconds["fbank_s"],
        "wait for audio": seconds["wait_read_s"] + seconds["wait_decode_s"],
        "write": seconds["write_s"],
        "other": seconds["other_s"],
    }
    return {name: 1000.0 * value / windows for name, value in stages.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often it is run")
    parser.add_argument("--windows", type=int, default=4000, help="of each run")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: of the thread alone"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="where to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels = {index: f"label {index}" for index in range(NUM_LABELS)}
        model = write_tiny_model(
            folder / "model",
            hidden_size=HIDDEN_SIZE,
            num_hidden_layers=1,
            num_labels=NUM_LABELS,
            id2label=labels,
            label2id={label: index for index, label in labels.items()},
        )
        sources = write_sources(folder, WINDOWS_PER_FILE)
        source = link_inputs(folder, options.windows // WINDOWS_PER_FILE, sources)
        label = functools.partial(
            label_apart, source, model, prelude=_PRELUDE.format(clock=options.clock)
        )
        runs = paired_rounds({"null model": label}, options.rounds)["null model"]
    measured = [per_window_ms(run) for run in runs]
    medians = {name: median([run[name] for run in measured]) for name in measured[0]}
    overheads = [sum(run[name] for name in STAGES) for run in measured]
    print_table(
        ("the labelling thread", "ms a window"),
        [*medians.items(), ("overhead (write and other)", median(overheads))],
    )
    print(
        f"{options.windows:,} windows, {options.rounds} rounds, {options.clock} clock; the rounds"
    )
    print(f"lie {spread(overheads):.0%} apart")
    result = {
        "clock": options.clock,
        "windows": options.windows,
        "rounds": measured,
        "overhead_ms": median(overheads),
    }
    write_results(options.results / "overhead.json", result)
    title = f"A null model: {median(overheads):.2f} ms of overhead a window ({options.clock})"
    with drawn(options.results / "overhead.png", title) as axes:
        axes.bar(list(medians), list(medians.values()))
        axes.set_ylabel("ms a window")


if __name__ == "__main__":
    main()
