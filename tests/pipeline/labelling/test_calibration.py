"""int8, calibrated on the user's own audio: which windows, and what a result keeps of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main as cli
from pipeline.labelling import calibration
from pipeline.labelling.calibration import sample_windows
from pipeline.labelling.plan import RunPlan, make_plan
from tests.support.audio_factory import noise, quantised, write_noise
from tests.support.labelling import small_config
from transforms.errors import ConfigError
from transforms.features.fbank import extract_fbank
from transforms.records import FloatArray

pytestmark = pytest.mark.usefixtures("openvino_as_installed")

RATE, WINDOW_S = 16_000, 10.255


def plan_of(model: Path, *inputs: Path, **changes: Any) -> RunPlan:
    config = small_config(model, Path(), *inputs, output=None, inference={}, units={}, **changes)
    return make_plan(config, needs_output=False)


def sampled(plan: RunPlan, num_windows: int) -> FloatArray:
    return sample_windows(plan.units, plan.resolved.label, num_windows)


def clip_features(plan: RunPlan, *seeds: int, duration_s: float = 1.0) -> FloatArray:
    """Features of the first windows of clips that ``write_clips`` wrote."""
    clips = [noise(duration_s, seed=seed)[: round(WINDOW_S * RATE), 0] for seed in seeds]
    return np.stack(
        [extract_fbank(quantised(clip, 16), plan.resolved.label.fbank) for clip in clips]
    )


def write_clips(folder: Path, count: int, duration_s: float = 1.0) -> Path:
    for index in range(count):
        write_noise(folder / f"{index:02d}.wav", duration_s, seed=index)
    return folder


def test_windows_are_spread_evenly_over_the_clips(tiny_model: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_model, write_clips(tmp_path / "clips", 12))
    windows = sampled(plan, 4)
    np.testing.assert_allclose(windows, clip_features(plan, 0, 3, 6, 9), rtol=0, atol=0.01)


def test_few_clips_give_further_windows(tiny_model: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_model, write_clips(tmp_path / "clips", 2, 3 * WINDOW_S))
    assert sampled(plan, 5).shape == (5, 1024, 128)
    firsts = clip_features(plan, 0, 1, duration_s=3 * WINDOW_S)
    np.testing.assert_allclose(sampled(plan, 5)[:2], firsts, rtol=0, atol=0.01)
    assert len(sampled(plan, 100)) == 6  # all there are


def test_clips_that_cannot_be_decoded_are_skipped(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "clips", 2)
    (folder / "01.wav").write_bytes(b"no audio")
    plan = plan_of(tiny_model, folder)
    np.testing.assert_allclose(sampled(plan, 4), clip_features(plan, 0), rtol=0, atol=0.01)


def test_int8_with_a_remote_runner_is_refused_while_planning(
    tiny_model: Path, tmp_path: Path
) -> None:
    clips, inference = write_clips(tmp_path / "clips", 1), {"precision": "int8"}
    config = small_config(tiny_model, Path(), clips, output=None, inference=inference)
    with pytest.raises(ConfigError, match="calibrated on this machine, and the runner works on"):
        make_plan(config, is_remote=True, needs_output=False)


class Label:
    """Runs ``earmark label --precision int8`` on a folder of clips."""

    def __init__(self, model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.out, self.capsys = model, out, capsys
        self.said = ""

    def __call__(self, clips: Path, *options: str) -> int:
        arguments = ["label", str(clips), "-o", str(self.out), "-m", str(self.model)]
        settings = ["--precision", "int8", "--device", "cpu", "--set", "decode.processes=1"]
        settings += ["--set", "inference.calibration_windows=4", "--set", "units.windows=2"]
        code = cli.main([*arguments, *settings, *options])
        self.said = self.capsys.readouterr().err
        return code

    def run(self) -> dict[str, Any]:
        run: dict[str, Any] = json.loads((self.out / "run.json").read_text())
        return run


@pytest.fixture
def label(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Label:
    return Label(tiny_model, tmp_path / "out", capsys)


def test_a_result_keeps_its_calibration(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = write_clips(tmp_path / "clips", 4)
    assert label(clips) == 0
    run = label.run()
    assert run["engines"] == ["openvino cpu int8"]
    assert run["calibration"]["windows"] == 4
    assert run["checks"]["openvino cpu int8"]["windows"] == 4
    assert run["versions"]["nncf"]
    table = pq.read_table(label.out / "windows")
    assert table.num_rows == 4
    # What is added later is computed by the same model, though the sample would be another.
    monkeypatch.setattr(calibration, "quantise", lambda *a: pytest.fail("quantised again"))
    write_noise(clips / "later.wav", seed=9)
    assert label(clips) == 0
    assert label.run()["calibration"] == run["calibration"]
    assert label(clips) == 0  # nothing to do
    assert label.run()["calibration"] == run["calibration"]


def test_with_nothing_to_calibrate_on_int8_is_an_error(label: Label, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "a.wav").write_bytes(b"no audio")
    assert label(folder) == 2
    assert "int8, and no clip to calibrate it on can be decoded" in label.said
    assert not (label.out / "_commits").exists()
