"""Does a store's bad day cost more than time? Whole runs on object stores that break off.

    python -m benchmarks.reliability.faulty_storage [--rounds 10] [--stores s3 gs]

Emulators of S3 and of Google Cloud Storage lie behind a proxy that injects faults (both in
``tests/support/stores``). Each round labels loose files, a tar, a Parquet file and a manifest
from the store into the store with a tiny model, in one of four ways:

- ``5 %`` and ``30 %`` of the requests are harmed: refused with 429, 500 or 503, reset before or
  after the store did them, cut on the way there or back, with and without a sign, or slowed down.
- ``10 %, impatient``: the same, and each request is tried no longer than the library does.
- ``goes down``: from a request drawn at random on, the store is down until the run has ended.

A run must complete, or end with a message; the same command is then run again (with
``--retry-failed`` after exit code 3), at most twenty times. At every moment, every commit in the
store must have its parts, of the size and checksum it names; that is looked at past the proxy, all
the while and after each run. In the end ``verify`` must find the result whole, and the rows must be
those of a run without faults. Anything else makes the exit code 1.

Prints a table and writes ``faulty_storage.json`` beside this file; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import random
import re
import sys
import tempfile
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from pipeline.cli.main import main as earmark
from pipeline.exit_codes import EXIT_INTERRUPTED
from pipeline.result import lock
from tests.support.labelling import assert_same_rows
from tests.support.model_factory import write_tiny_model
from tests.support.stores.fault_proxy import Faults
from tests.support.stores.object_store import ObjectStore, damaged_commits, missing, open_store
from tests.support.stores.store_runs import fill, label, rows_of
from transforms.storage import retries

NUM_EACH = 3
MAX_RUNS = 20
WATCH_EVERY_S = 0.5
SAYS_WHAT = re.compile(r"^earmark: .*\S.*", re.MULTILINE)


@dataclass(frozen=True)
class Scenario:
    """A way for a store to fail.

    Attributes:
        rate: Share of requests harmed.
        retry_s: What ``retries.RETRY_S`` is meanwhile, None for its own value.
        min_tries: What ``retries.MIN_TRIES`` is meanwhile.
        goes_down: Whether the first run meets a store that goes down for good.
    """

    rate: float
    retry_s: float | None = None
    min_tries: int = retries.MIN_TRIES
    goes_down: bool = False


SCENARIOS = {
    "5 %": Scenario(0.05),
    "30 %": Scenario(0.3),
    "10 %, impatient": Scenario(0.1, retry_s=0.0, min_tries=1),
    "goes down": Scenario(0.05, retry_s=1.0, min_tries=1, goes_down=True),
}


@dataclass
class Tally:
    """What came of the rounds of a scenario on a store."""

    rounds: int = 0
    runs: int = 0
    requests: int = 0
    looks: int = 0
    seconds: float = 0.0
    exit_codes: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


class Watcher:
    """Looks for commits without their whole parts while a run goes on."""

    def __init__(self, store: ObjectStore, output: str) -> None:
        self._store, self._output = store, output
        self._stop = threading.Event()
        self.looks = 0
        self.found: list[str] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_EVERY_S):
            try:
                self.look()
            except urllib.error.HTTPError:
                continue  # what is removed between the listing and the reading is no damage
            except Exception as error:  # a thread that dies looks at nothing
                self.found.append(f"cannot be looked at: {error!r}")

    def look(self) -> None:
        self.found += damaged_commits(self._store, self._output)
        self.looks += 1


def one_round(
    store: ObjectStore, model: Path, inputs: list[str], scenario: Scenario, seed: int, tally: Tally
) -> None:
    """Label until it is done; everything that breaks a promise goes into ``tally.broken``."""
    chance = random.Random(seed)
    output = f"out-{seed}"
    more: list[str] = []
    for run in range(MAX_RUNS):
        down_after = chance.randrange(20, 90) if scenario.goes_down and run == 0 else None
        store.proxy.faults = Faults(scenario.rate, seed=100 * seed + run, down_after=down_after)
        retries._gave_up_at.clear()  # each run is a process of its own, elsewhere
        watcher, said = Watcher(store, output), io.StringIO()
        with watcher.watching(), contextlib.redirect_stderr(said):
            code = label(inputs, f"{store.url}/{output}", model, *more)
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        tally.runs += 1
        tally.looks += watcher.looks
        tally.exit_codes[code] += 1
        tally.requests += store.proxy.num_requests
        tally.faults += store.proxy.counts
        tally.broken += [f"seed {seed}, run {run}: {what}" for what in watcher.found]
        if code not in (0, 1, 2, 3) or (code in (1, 2) and not SAYS_WHAT.search(said.getvalue())):
            tally.broken.append(f"seed {seed}, run {run}: exit code {code} without a word")
        if code == 0:
            break
        print(f"    run {run}: exit code {code}: {said.getvalue().strip()[-300:]}", flush=True)
        more = ["--retry-failed"] if code == 3 else more
    store.proxy.faults = Faults()
    retries._gave_up_at.clear()
    if code != 0:
        tally.broken.append(f"seed {seed}: not done after {MAX_RUNS} runs")
        return
    if earmark(["verify", f"{store.url}/{output}", "--quiet"]) != 0:
        tally.broken.append(f"seed {seed}: verify does not find it whole")
    try:
        for part in ("clips", "windows", "errors"):
            assert_same_rows(rows_of(store, output, part), rows_of(store, "sound", part))
    except AssertionError as error:
        tally.broken.append(f"seed {seed}: other rows: {error}")


def measure(store: ObjectStore, model: Path, rounds: int, first_seed: int) -> dict[str, Tally]:
    """All scenarios on one store."""
    tallies = {}
    for name, scenario in SCENARIOS.items():
        store.clear()
        store.proxy.faults = Faults()
        inputs = fill(store, NUM_EACH)
        if label(inputs, f"{store.url}/sound", model) != 0:
            raise RuntimeError(f"{store.protocol}: the run without faults fails")
        tally = tallies[name] = Tally()
        started = time.monotonic()
        patient = retries.RETRY_S if scenario.retry_s is None else scenario.retry_s
        with (
            patch.object(retries, "RETRY_S", patient),
            patch.object(retries, "MIN_TRIES", scenario.min_tries),
        ):
            for seed in range(first_seed, first_seed + rounds):
                one_round(store, model, inputs, scenario, seed, tally)
                tally.rounds += 1
        tally.seconds = round(time.monotonic() - started, 1)
        print(_line(store.protocol, name, tally), flush=True)
    return tallies


def _line(protocol: str, name: str, tally: Tally) -> str:
    codes = ", ".join(f"{code}: {count}" for code, count in sorted(tally.exit_codes.items()))
    return (
        f"{protocol:8} {name:16} {tally.rounds:6} {tally.runs:5} {tally.requests:9} "
        f"{tally.faults.total():7} {tally.looks:6} {len(tally.broken):7}  {codes}"
    )


def main() -> int:
    """Run the rounds; 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="per store and scenario")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--stores", nargs="+", default=["s3", "gs"], choices=["s3", "gs"])
    arguments = parser.parse_args()
    results: dict[str, dict[str, Tally]] = {}
    print("store    scenario         rounds  runs  requests  faults  looks  broken  exit codes")
    with tempfile.TemporaryDirectory() as folder, patch.object(lock, "PATIENCE_S", 3.0):
        model = write_tiny_model(Path(folder) / "tiny")
        for protocol in arguments.stores:
            if reason := missing(protocol):
                print(reason, file=sys.stderr)
                return 1
            with open_store(protocol) as store:
                results[protocol] = measure(store, model, arguments.rounds, arguments.first_seed)
    faults = sum((t.faults for of in results.values() for t in of.values()), Counter[str]())
    broken = [what for of in results.values() for t in of.values() for what in t.broken]
    print("\nFaults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(faults.items())))
    print("\n".join(broken) or "No promise was broken.")
    report = {
        "machine": {"python": platform.python_version(), "system": platform.platform()},
        "rounds": arguments.rounds,
        "first_seed": arguments.first_seed,
        "stores": {p: {n: vars(t) for n, t in of.items()} for p, of in results.items()},
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
