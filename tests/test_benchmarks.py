"""Benchmarks run, at toy size, and keep their figures with the machine that they are from."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.common import (
    count_flops,
    label_apart,
    median,
    paired_rounds,
    print_table,
    spread,
)
from transforms import stage_clocks
from transforms.inference import ASTModelHandler
from transforms.spectrogram_transformer import ASTConfig, ASTModel


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to run in a process of its own runs in this one, which has the libraries loaded."""

    def run_here(code: str, argument: str) -> str:
        with monkeypatch.context() as patched, contextlib.redirect_stdout(io.StringIO()) as said:
            patched.setattr(sys, "argv", ["-c", argument])
            # What the overhead's null model replaces comes back.
            patched.setattr(ASTModelHandler, "load_model", ASTModelHandler.load_model)
            patched.setattr(stage_clocks, "time", stage_clocks.time)
            exec(code, {"__name__": "__main__"})
        return said.getvalue()

    monkeypatch.setattr(common, "run_apart", run_here)


@pytest.mark.parametrize(
    ("name", "arguments", "has_picture"),
    [
        ("stages", ["--clips", "2", "--model-windows", "1", "--layers", "1"], True),
        ("overhead", ["--windows", "8", "--clock", "cpu"], True),
        ("memory", ["--windows", "10", "20"], False),
        ("scaling", ["--windows", "10", "--factors", "1", "2", "--workers", "1"], True),
    ],
)
def test_a_benchmark_runs_and_keeps_its_figures(
    name: str, arguments: list[str], has_picture: bool, tmp_path: Path, in_this_process: None
) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    benchmark.main([*arguments, "--rounds", "1", "--results", str(tmp_path)])
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"processor", "cores", "versions", "date"} <= kept["machine"].keys()
    assert len(kept) > 1
    pictures = [path.name for path in tmp_path.glob("*.png")]
    assert pictures == ([f"{name}.png"] if has_picture else [])


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    source = common.link_inputs(tmp_path, 2, common.write_sources(tmp_path, 1))
    found = label_apart(source, tiny_model)
    assert found["run"]["totals"]["windows"] == 2
    assert found["peak_mb"] > 100
    with pytest.raises(SystemExit, match="does not exist"):
        label_apart(tmp_path / "nowhere", tiny_model)


def test_rounds_take_turns_and_each_begins_with_the_next_case() -> None:
    order: list[str] = []
    cases = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert paired_rounds(cases, 2) == {"a": [None, None], "b": [None, None]}
    assert order == ["a", "b", "b", "a"]


def test_the_figures_of_rounds() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert spread([3.0, 1.0, 2.0]) == 1.0
    assert spread([0.0, 0.0]) == 0.0


def test_a_table_can_be_copied_into_a_readme(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("what", "n", "ms"), [("a", 1200, 0.12345), ("b", 3, 1234.5)])
    assert capsys.readouterr().out.splitlines() == [
        "| what | n | ms |",
        "|---|--:|--:|",
        "| a | 1,200 | 0.123 |",
        "| b | 3 | 1,234 |",
    ]


AST_BASE = ASTConfig()
ODD_SHAPE = ASTConfig(
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=48,
    num_hidden_layers=3,
    max_length=128,
    num_mel_bins=64,
    time_stride=12,
    frequency_stride=14,
)


@pytest.mark.parametrize("pooled_alone", [False, True])
@pytest.mark.parametrize("config", [AST_BASE, ODD_SHAPE], ids=["AST base", "odd shape"])
def test_operations_are_those_that_torch_counts(config: ASTConfig, pooled_alone: bool) -> None:
    with torch.device("meta"):  # shapes alone, nothing is computed
        model = ASTModel(config).eval()
        features = torch.zeros(2, config.max_length, config.num_mel_bins)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.embed(features) if pooled_alone else model(features)
    assert 2 * count_flops(config, pooled_alone=pooled_alone) == counter.get_total_flops()


def test_ast_base_takes_261_gflop_a_window() -> None:
    assert count_flops(AST_BASE) / 1e9 == pytest.approx(261, abs=0.5)
