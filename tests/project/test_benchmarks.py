"""The benchmarks: they run at toy size, and store their figures with the machine they are from."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, gpu, peers, steady
from benchmarks.common import (
    count_flops,
    paired_rounds,
)
from transforms.inference.backbones import cpu_has_native_bf16
from transforms.inference.handler import ASTModelHandler
from transforms.models.ast.config import ASTConfig
from transforms.models.ast.model import ASTModel
from transforms.process import stage_times


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run child processes in this one, which has loaded the libraries already."""

    def run_here(
        command: Sequence[str], environment: Mapping[str, str], timeout_s: float | None = None
    ) -> str:
        _, kind, program, *arguments = command
        with monkeypatch.context() as patched, contextlib.redirect_stdout(io.StringIO()) as said:
            for name, value in environment.items():
                patched.setenv(name, value)
            if kind == "-c":
                patched.setattr(sys, "argv", ["-c", *arguments])
                # Restored afterwards: the overhead's null model replaces these.
                patched.setattr(ASTModelHandler, "load_model", ASTModelHandler.load_model)
                patched.setattr(stage_times, "time", stage_times.time)
                exec(program, {"__name__": "__main__"})
            else:
                name = "pipeline.cli.main" if program == "pipeline" else program
                if importlib.import_module(name).main(arguments):
                    raise SystemExit(f"{' '.join(command)} failed")
        return said.getvalue()

    monkeypatch.setattr(common, "_run", run_here)


@pytest.mark.parametrize(
    ("name", "arguments", "has_picture"),
    [
        ("stages", ["--clips", "2", "--model-windows", "1", "--layers", "1"], True),
        ("overhead", ["--windows", "8", "--clock", "cpu"], True),
        ("plan", ["--files", "100", "1000"], True),
        ("progress", "--files 3 --cases wav tar --window-s 0.01".split(), False),
        ("memory", ["--windows", "10", "20"], False),
        ("scaling", ["--windows", "10", "--factors", "1", "2", "--workers", "1"], True),
        ("gpu", "--toy --device cpu --engines eager --formats flac --workers 1".split(), True),
    ],
)
def test_a_benchmark_runs_and_stores_its_figures(
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
def test_all_peers_run_in_separate_processes(tmp_path: Path) -> None:
    options = ["--toy", "--seconds", "1", "--rounds", "1", "--results", str(tmp_path)]
    if not cpu_has_native_bf16():
        options += ["--contenders", "loop", "torch-fp32", "torch-bf16", "openvino-int8"]
    peers.main(options)
    assert (tmp_path / "peers.png").exists()
    kept = json.loads((tmp_path / "peers.json").read_text())
    assert kept["left_out"] == {}
    assert kept["summary"].keys() == kept["clips"].keys()
    for name, found in kept["summary"].items():
        assert found["clips"] == peers.TOY.checked, name
        # The tiny model has five labels and large weights; the real gates are for AST base.
        assert found["max_score_difference"] < (0.05 if "int8" in name else 0.02), name


@pytest.mark.slow
def test_label_is_measured_end_to_end_with_one_and_two_workers(tmp_path: Path) -> None:
    options = ["--toy", "--device", "cpu", "--parts", "end-to-end", "--formats", "flac"]
    gpu.main([*options, "--rounds", "1", "--results", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())["end_to_end"]
    assert found["left_out"] == {}
    workers = found["formats"]["flac"]["workers"]
    assert workers.keys() == {"1", "2"}
    for row in workers.values():
        (run,) = row["runs"]
        assert 0 < run["steady_clips"] < run["clips"] == sum(run["clips_by_second"])
        assert run["units"] >= gpu.SHARDS_PER_RUN
        assert run["device_busy_error"] == "cpu is no GPU of NVIDIA's"
        assert run["time"]["labelling"]["total_s"] > 0
        assert row["speedup"] == pytest.approx(
            row["clips_per_s"] / found["pipeline"]["clips_per_s"]
        )


def test_the_rate_of_the_steady_part_leaves_out_the_first_quarter(tmp_path: Path) -> None:
    folder = tmp_path / "_commits"
    folder.mkdir()
    # Two workers' commits in turn; the first two come late after a long start, and the slow units
    # among the others have as many clips more.
    times = [100.0, 130.0, 131.0, 132.0, 134.0, 135.0, 136.0, 138.0]
    clips = [900, 700, 10, 10, 20, 10, 10, 20]
    for index, (time_s, num_clips) in enumerate(zip(times, clips, strict=True)):
        path = folder / f"{7 - index}.json"  # the order of names is another
        path.write_text(json.dumps({"totals": {"clips": num_clips}}))
        os.utime(path, (time_s, time_s))
    commits = steady.read_commit_times(tmp_path)
    assert [commit.clips for commit in commits] == clips
    part = steady.steady_part(commits)
    assert part == steady.SteadyPart(130.0, 138.0, 80)
    assert part.clips_per_s == 10.0
    assert steady.steady_part(commits[:7]) is None
    assert steady.clips_by_second(commits[:2], 99.5) == [900, *[0] * 29, 700]


def test_the_load_of_the_device_is_measured_in_the_steady_part() -> None:
    looks = [(0.9, 0.0), (1.0, 0.5), (2.0, 1.0), (3.1, 0.0)]
    samples = [steady.DeviceSample(time_s, busy, 100.0 * busy) for time_s, busy in looks]
    assert steady.summarise_samples(samples, 1.0, 3.0) == {
        "device_busy": 0.75,
        "device_waits": 0.25,
        "device_memory_mib": 100.0,
        "device_samples": 2,
    }
    assert steady.summarise_samples(samples, 4.0, 5.0) == {}


def test_a_program_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
        "print('so far', flush=True)\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(common.CutOffError) as killed:
        common._run([sys.executable, "-c", program], {}, timeout_s=3.0)
    assert killed.value.output == "so far\n"
    status = Path("/proc", child.read_text(), "status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_rounds_take_turns_and_each_begins_with_the_next_case() -> None:
    order: list[str] = []
    cases = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert paired_rounds(cases, 2) == {"a": [None, None], "b": [None, None]}
    assert order == ["a", "b", "b", "a"]


def test_a_number_of_clips_leaves_a_last_batch_of_one() -> None:
    assert peers.count_clips(pace_s=0.5, seconds=16.0, most=320) == 33
    assert peers.count_clips(pace_s=10.0, seconds=16.0, most=320) == 9
    assert peers.count_clips(pace_s=0.01, seconds=16.0, most=320) == 313


def test_ratios_are_taken_within_a_round() -> None:
    precision = {"clips": 1, "max_score_difference": 0.021, "same_top": 1.0}
    first = {"first_run_s": 9.0, "precision": precision}
    clip_s = {
        peers.HUGGING_FACE: [1.0, 4.0, 2.0],
        peers.CEILING: [0.1, 0.4, 0.1],
        "Earmark, torch fp32": [0.2, 1.0, 0.2],
    }
    rounds = {name: [{"clip_s": each} for each in values] for name, values in clip_s.items()}
    found = peers.summarise(rounds, dict.fromkeys(rounds, first))["Earmark, torch fp32"]
    assert found["speedups"] == pytest.approx([5.0, 4.0, 10.0])
    assert (found["speedup"], found["of_ceiling"]) == pytest.approx((5.0, 0.5))
    assert found["gates_passed"] is False


def test_scores_are_compared_file_by_file() -> None:
    mine = {"a": [0.1, 0.9], "b": [0.5, 0.4], "other": [0.0, 0.0]}
    theirs = {"b": [0.4, 0.45], "a": [0.1, 0.8]}
    found, expected = (
        {name: np.array(row, np.float32) for name, row in scores.items()}
        for scores in (mine, theirs)
    )
    assert peers.compare(found, expected) == {
        "clips": 2,
        "max_score_difference": pytest.approx(0.1),
        "same_top": 0.5,
    }
    with pytest.raises(SystemExit, match="no scores to compare"):
        peers.compare({}, expected)


def test_a_share_is_of_the_matrix_rate() -> None:
    rates = {"bf16": {"best_tflops": 790.0}, "fp16": {"best_tflops": 700.0}}
    row = {"precision": "fp16", "windows_per_s": 1800.0}
    shares = gpu._shares(AST_BASE, row, rates)
    assert shares == pytest.approx({"share": 0.595, "own_share": 0.623}, abs=1e-3)
    assert gpu._shares(AST_BASE, {"precision": "fp16", "error": "out of memory"}, rates) == {}


def test_the_gpu_benchmark_needs_only_torch() -> None:
    code = "import sys, benchmarks.gpu; print(*(name.split('.')[0] for name in sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=True)
    needed = {name for names in gpu.NEEDS.values() for name in names}
    assert needed & set(done.stdout.split()) == set()


@pytest.mark.parametrize("name", ["peers", "gpu", "overhead", "scaling", "stages", "memory"])
def test_the_readme_marks_missing_figures(name: str) -> None:
    text = (common.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {name}.py")[2].partition("\n## ")[0]
    has_figures = (common.ROOT / "benchmarks" / f"{name}.json").exists()
    assert ("figures are missing" in section) != has_figures


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
def test_operations_agree_with_the_counter_of_torch(config: ASTConfig, pooled_alone: bool) -> None:
    with torch.device("meta"):  # shapes alone, nothing is computed
        model = ASTModel(config).eval()
        features = torch.zeros(2, config.max_length, config.num_mel_bins)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.embed(features) if pooled_alone else model(features)
    assert 2 * count_flops(config, pooled_alone=pooled_alone) == counter.get_total_flops()


def test_ast_base_takes_261_gflop_a_window() -> None:
    assert count_flops(AST_BASE) / 1e9 == pytest.approx(261, abs=0.5)
