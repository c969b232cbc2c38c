"""What does labelling cost? Machines, time and money, and what breaks first, from rates and prices.

    python -m benchmarks.cost [--hours 1000 1000000] [--format flac] [--prices my-prices.yaml]
    python -m benchmarks.cost --write docs/scale.md

Arithmetic alone, nothing is measured here: every rate, price and assumption stands in
``prices.yaml`` with its source. The tables of ``docs/scale.md`` are this script's; ``--write`` puts
them there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import print_table

PRICES = Path(__file__).parent / "prices.yaml"
HOURS = (1000, 1_000_000)
SIZES = (1000, 100_000, 1_000_000)
UNKNOWN = "not known"
DEFAULT_UNIT_WINDOWS = 256
MAX_UNIT_BYTES = 1 << 30  # units.SourceSettings.max_unit_bytes


class Costs:
    """The arithmetic, over one file of prices.

    Args:
        given: As ``prices.yaml`` has it.
        audio_format: Of the recordings; a key of ``formats``.
    """

    def __init__(self, given: Mapping[str, Any], audio_format: str) -> None:
        self.given = given
        self.format = given["formats"][audio_format]

    # -- rates --

    def windows_per_s(self, gpu: str) -> float:
        """Windows per second that the model does on a GPU."""
        own = self.given["gpus"][gpu]
        if own["windows_per_s"] is not None:
            return float(own["windows_per_s"])
        return float(own["peak_tflops"] * own["share"] / self.given["model"]["tflop_per_window"])

    def model_x(self, gpu: str) -> float:
        """Hours of audio per hour that the model does on a GPU."""
        return self.windows_per_s(gpu) * float(self.given["model"]["hop_s"])

    def vcpu_x(self) -> float:
        """Hours of audio per hour that a vCPU decodes and resamples."""
        return 1 / (1 / self.format["decode_x"] + 1 / self.given["resample_x"])

    def vcpus_needed(self, gpu: str) -> int:
        """vCPUs that keep a GPU busy."""
        return math.ceil(self.model_x(gpu) / self.vcpu_x())

    def worker_x(self, gpu: str) -> float:
        """Hours of audio per hour that a worker does: the lesser of its model and its vCPUs."""
        return min(self.model_x(gpu), self.given["gpus"][gpu]["vcpus"] * self.vcpu_x())

    # -- a job --

    def workers(self, gpu: str, hours: float) -> int:
        """Workers that are done within the deadline."""
        job = self.given["job"]
        return math.ceil(hours / self.worker_x(gpu) / (job["deadline_h"] - job["startup_h"]))

    def job_h(self, gpu: str, hours: float) -> float:
        """Hours that a job takes."""
        startup_h = float(self.given["job"]["startup_h"])
        return startup_h + hours / self.worker_x(gpu) / self.workers(gpu, hours)

    def worker_price(self, gpu: str) -> float | None:
        """Dollars per hour of a worker; None where a price is not known."""
        own, prices = self.given["gpus"][gpu], self.given["prices"]
        if own["gpu_hour"] is None:
            return None
        return float(
            own["gpu_hour"]
            + own["vcpus"] * prices["vcpu_hour"]
            + own["memory_gb"] * prices["memory_gb_hour"]
            + self.given["job"]["disk_gb"] * prices["disk_gb_hour"]
        )

    def job_price(self, gpu: str, hours: float) -> float | None:
        """Dollars of a job's machines and shuffle; None where a price is not known."""
        price = self.worker_price(gpu)
        if price is None:
            return None
        shuffle_gb = self.files(hours) * self.given["planning"]["bytes_per_file_in_graph"] / 1e9
        machines = self.workers(gpu, hours) * self.job_h(gpu, hours) * price
        return machines + shuffle_gb * float(self.given["prices"]["shuffle_gb"])

    # -- amounts --

    def windows(self, hours: float) -> float:
        """Windows of so many hours."""
        return hours * 3600 / float(self.given["model"]["hop_s"])

    def files(self, hours: float) -> float:
        """Loose files of so many hours."""
        return hours * 3600 / float(self.given["job"]["clip_s"])

    def input_gb(self, hours: float) -> float:
        """Gigabytes to read."""
        return hours * 3600 * float(self.format["bytes_per_s"]) / 1e9

    def output_gb(self, hours: float) -> float:
        """Gigabytes to write."""
        output = self.given["output"]
        of_windows = self.windows(hours) * output["bytes_per_window"]
        return float(of_windows + self.files(hours) * output["bytes_per_clip"]) / 1e9

    def units(self, hours: float, windows_per_unit: int) -> int:
        """Work units of so many hours."""
        by_bytes = self.input_gb(hours) * 1e9 / MAX_UNIT_BYTES
        return math.ceil(max(self.windows(hours) / windows_per_unit, by_bytes))

    def unit_windows(self, hours: float) -> int:
        """Windows per unit that keep the number of units in bounds: a power of two."""
        wanted = self.windows(hours) / self.given["limits"]["units"]
        return max(DEFAULT_UNIT_WINDOWS, 2 ** math.ceil(math.log2(max(1.0, wanted))))


# --- Tables ----------------------------------------------------------------------------------


def machines_table(costs: Costs) -> None:
    """What a worker is, does and costs."""
    rows = []
    for gpu, own in costs.given["gpus"].items():
        is_gpu_bound = costs.vcpus_needed(gpu) <= own["vcpus"]
        price = costs.worker_price(gpu)
        rows.append(
            (
                gpu,
                own["machine"],
                _dollars(price),
                round(costs.windows_per_s(gpu)),
                round(costs.model_x(gpu)),
                f"{costs.vcpus_needed(gpu)} of {own['vcpus']}",
                round(costs.worker_x(gpu)),
                "GPU" if is_gpu_bound else "decoding",
                round(costs.worker_x(gpu) * costs.format["bytes_per_s"] / 1e6),
                _dollars(None if price is None else 1000 * price / costs.worker_x(gpu)),
            )
        )
    print_table(
        (
            *("GPU", "worker", "$ an hour", "windows/s", "model, × real time", "vCPUs needed"),
            *("worker, × real time", "bound by", "reads, MB/s", "$ per 1,000 h, busy"),
        ),
        rows,
    )


def formats_table(costs: Costs) -> None:
    """How many vCPUs keep each GPU busy, by format."""
    rows = []
    for name in costs.given["formats"]:
        of_format = Costs(costs.given, name)
        needed = [of_format.vcpus_needed(gpu) for gpu in costs.given["gpus"]]
        rows.append((name, round(of_format.vcpu_x()), *needed))
    print_table(("format", "a vCPU, × real time", *costs.given["gpus"]), rows)


def jobs_table(costs: Costs, sizes: Sequence[int] = HOURS) -> None:
    """Machines, time and money of whole jobs."""
    rows = [
        (
            f"{hours:,}",
            gpu,
            costs.workers(gpu, hours),
            _hours(costs.job_h(gpu, hours)),
            _dollars(costs.job_price(gpu, hours)),
        )
        for hours in sizes
        for gpu in costs.given["gpus"]
    ]
    print_table(("hours of audio", "GPU", "workers", "hours", "$"), rows)


def storage_table(costs: Costs, sizes: Sequence[int] = HOURS) -> None:
    """What is read and written, and what keeping it costs."""
    prices = costs.given["prices"]
    rows = [
        (
            f"{hours:,}",
            round(costs.input_gb(hours)),
            _product(costs.input_gb(hours), prices["egress_gb"]),
            float(costs.output_gb(hours)),
            _product(costs.output_gb(hours), prices["storage_gb_month"]),
        )
        for hours in sizes
    ]
    print_table(
        (
            *("hours of audio", "read, GB", "$ if from another region"),
            *("written, GB", "$ a month to keep that"),
        ),
        rows,
    )


def amounts_table(costs: Costs) -> None:
    """What each size makes of listings, units, objects and the rest, as rows of one table."""
    planning, limits = costs.given["planning"], costs.given["limits"]
    output = costs.given["output"]

    def headers_h(hours: float) -> float:
        return costs.files(hours) * planning["header_s"] / planning["walks_at_once"] / 3600

    def writes_per_s(hours: float) -> float:
        objects = costs.units(hours, costs.unit_windows(hours)) * output["objects_per_unit"]
        return float(objects / (costs.job_h("L4", hours) * 3600))

    def lost_s(hours: float) -> float:
        in_hand = costs.given["job"]["units_in_hand"] * costs.unit_windows(hours)
        return float(in_hand / costs.windows_per_s("L4"))

    lines: list[tuple[str, Callable[[float], float]]] = [
        ("windows, millions", lambda hours: costs.windows(hours) / 1e6),
        ("loose files, millions", lambda hours: costs.files(hours) / 1e6),
        (
            "memory of one machine that groups them, GB",
            lambda hours: costs.files(hours) / 1e9 * planning["memory_mb_per_million_files"],
        ),
        (
            "its time, CPU minutes",
            lambda hours: costs.files(hours) / 1e6 * planning["cpu_s_per_million_files"] / 60,
        ),
        (
            "listing them, page after page, hours",
            lambda hours: (
                costs.files(hours) / planning["files_per_page"] * planning["page_s"] / 3600
            ),
        ),
        (
            "them in a job's description, MB "
            f"(Dataflow: {limits['job_graph_mb']}; not used beyond `units.max_listed_here`)",
            lambda hours: costs.files(hours) * planning["bytes_per_file_in_graph"] / 1e6,
        ),
        (
            f"or, in tars of {planning['tar_gb']} GB: tars",
            lambda hours: max(1, math.ceil(costs.input_gb(hours) / planning["tar_gb"])),
        ),
        ("reading the headers of all tars, worker hours", headers_h),
        ("units of 256 windows", lambda hours: costs.units(hours, DEFAULT_UNIT_WINDOWS)),
        ("`units.windows` to use", costs.unit_windows),
        ("units then", lambda hours: costs.units(hours, costs.unit_windows(hours))),
        (
            "objects written",
            lambda hours: (
                costs.units(hours, costs.unit_windows(hours)) * output["objects_per_unit"]
            ),
        ),
        (f"of them a second, on L4 (a bucket: {limits['writes_per_s']:,})", writes_per_s),
        ("GPUs at the same time (quota), L4", lambda hours: costs.workers("L4", hours)),
        ("work lost with a worker, at most, s, L4", lost_s),
    ]
    rows = [(name, *(_amount(of(hours)) for hours in SIZES)) for name, of in lines]
    print_table(("", *(f"{hours:,} h" for hours in SIZES)), rows)


def assumptions_table(costs: Costs) -> None:
    """What each GPU's speed and price rest on."""
    rows = [
        (
            gpu,
            own["precision"],
            own["peak_tflops"],
            f"{own['share']:.0%}",
            own["source"],
        )
        for gpu, own in costs.given["gpus"].items()
    ]
    print_table(("GPU", "precision", "peak, TFLOP/s", "share reached", "source"), rows)


TABLES: dict[str, Callable[[Costs], None]] = {
    "machines": machines_table,
    "formats": formats_table,
    "jobs": jobs_table,
    "storage": storage_table,
    "amounts": amounts_table,
    "assumptions": assumptions_table,
}


def _dollars(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _hours(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _product(amount: float, price: float | None) -> str:
    return UNKNOWN if price is None else _dollars(amount * price)


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def read_prices(path: Path) -> dict[str, Any]:
    """A file of prices."""
    given: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return given


def table_text(name: str, costs: Costs) -> str:
    """A table as Markdown has it."""
    target = io.StringIO()
    with contextlib.redirect_stdout(target):
        TABLES[name](costs)
    return target.getvalue()


def with_tables(document: str, costs: Costs) -> str:
    """A document with its tables made anew: each stands between two marks that name it."""
    for name in TABLES:
        marks = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = table_text(name, costs)
        document = marks.sub(lambda found, text=text: found[1] + text + found[2], document)  # type: ignore[misc]
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or write them into a document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=int, nargs="+", default=HOURS, help="of audio")
    parser.add_argument("--format", default="flac", help="of the recordings")
    parser.add_argument("--prices", type=Path, default=PRICES, help="rates and prices")
    parser.add_argument("--write", type=Path, help="a document whose tables are to be made anew")
    options = parser.parse_args(arguments)
    costs = Costs(read_prices(options.prices), options.format)
    if options.write is not None:
        text = options.write.read_text(encoding="utf-8")
        options.write.write_text(with_tables(text, costs), encoding="utf-8")
        return
    for name, print_it in TABLES.items():
        print(f"\n{name}\n")
        if print_it in (jobs_table, storage_table):
            print_it(costs, options.hours)
        else:
            print_it(costs)


if __name__ == "__main__":
    main()
