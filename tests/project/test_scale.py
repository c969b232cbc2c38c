"""``docs/scale.md`` has the figures of ``benchmarks/cost.py``, and those are right."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cost
from benchmarks.cost import PRICES, Costs, read_prices, with_tables
from tests.support.paths import ROOT
from transforms.sources.read_unit import SourceSettings

DOCUMENT = ROOT / "docs" / "scale.md"


@pytest.fixture
def given() -> dict[str, Any]:
    return copy.deepcopy(read_prices(PRICES))


def test_the_tables_are_those_of_the_script(given: dict[str, Any], tmp_path: Path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (\w+) -->\n\|", text)) == set(cost.TABLES)
    copied = tmp_path / "scale.md"
    copied.write_text(with_tables(text, Costs(given, "mp3")), encoding="utf-8")
    assert copied.read_text() != text
    cost.main(["--write", str(copied)])
    assert copied.read_text() == text, "python -m benchmarks.cost --write docs/scale.md"


def test_a_speed_is_the_share_of_the_peak_or_what_was_measured(given: dict[str, Any]) -> None:
    costs = Costs(given, "flac")
    assert costs.windows_per_s("A100") == pytest.approx(312 * 0.59 / 0.261)
    given["gpus"]["A100"]["windows_per_s"] = 500.0
    assert costs.model_x("A100") == pytest.approx(500 * 10.255)


def test_a_worker_is_as_fast_as_the_slower_of_its_parts(given: dict[str, Any]) -> None:
    opus, wav = Costs(given, "opus"), Costs(given, "wav")
    assert wav.worker_x("L4") == wav.model_x("L4")
    assert opus.worker_x("L4") == pytest.approx(8 / (1 / 165 + 1 / 7500))
    assert opus.vcpus_needed("L4") > 8 >= wav.vcpus_needed("L4")


def test_the_price_of_a_job_worked_out_by_hand(given: dict[str, Any]) -> None:
    given["gpus"]["L4"]["windows_per_s"] = 1000 / 10.255  # 1,000 times real time
    costs = Costs(given, "wav")
    worker = 0.672 + 8 * 0.056 + 32 * 0.003557 + 100 * 0.000298
    assert costs.worker_price("L4") == pytest.approx(worker)
    # 100,000 h are 100 h of one worker: five have 23.75 h each.
    assert costs.workers("L4", 100_000) == 5
    assert costs.job_h("L4", 100_000) == pytest.approx(20.25)
    shuffled = 36_000_000 * 200 / 1e9 * 0.011
    assert costs.job_price("L4", 100_000) == pytest.approx(5 * 20.25 * worker + shuffled)


def test_unknown_prices_are_not_made_up(given: dict[str, Any]) -> None:
    costs = Costs(given, "flac")
    assert costs.job_price("H100", 1000) is None
    assert cost.table_text("storage", costs).count(cost.UNKNOWN) == 4
    given["prices"]["storage_gb_month"] = 0.02
    given["gpus"]["H100"]["gpu_hour"] = 10.0
    assert cost.table_text("storage", costs).count(cost.UNKNOWN) == 2
    assert costs.job_price("H100", 1000) is not None


def test_every_price_names_its_source(given: dict[str, Any]) -> None:
    assert given["prices"]["source"] and given["prices"]["looked_up"]
    assert all(gpu["source"] for gpu in given["gpus"].values())


def test_units_are_those_of_the_pipeline(given: dict[str, Any]) -> None:
    assert SourceSettings().windows_per_unit == cost.DEFAULT_UNIT_WINDOWS
    assert SourceSettings().max_unit_bytes == cost.MAX_UNIT_BYTES
    costs = Costs(given, "mp3")
    assert costs.unit_windows(1000) == 256
    assert costs.units(1_000_000, costs.unit_windows(1_000_000)) < given["limits"]["units"]
