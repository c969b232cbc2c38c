"""int8, calibrated on the user's own audio: which windows, and what a result keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.labelling import calibration
from pipeline.labelling.calibration import sample_windows
from pipeline.labelling.plan import RunPlan, make_plan
from pipeline.labelling.run import run_label
from pipeline.result.state import read_run
from tests.support.audio_factory import noise, quantised, write_noise
from tests.support.labelling import small_config
from transforms.errors import ConfigError, InputError
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


def label(model: Path, out: Path, clips: Path) -> int:
    inference = {"precision": "int8", "device": "cpu", "calibration_windows": 4}
    return run_label(small_config(model, out, clips, inference=inference), [])


def test_a_result_keeps_its_calibration(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, out = write_clips(tmp_path / "clips", 4), tmp_path / "out"
    assert label(tiny_model, out, clips) == 0
    run = read_run(str(out))
    assert run is not None
    assert run["engines"] == ["openvino cpu int8"]
    assert run["calibration"]["windows"] == 4
    assert run["checks"]["openvino cpu int8"]["windows"] == 4
    assert run["versions"]["nncf"]
    assert pq.read_table(out / "windows").num_rows == 4
    # What is added later is computed by the same model, though the sample would be another.
    monkeypatch.setattr(calibration, "quantise", lambda *a: pytest.fail("quantised again"))
    write_noise(clips / "later.wav", seed=9)
    for _ in range(2):  # the second time, there is nothing to do
        assert label(tiny_model, out, clips) == 0
        assert (read_run(str(out)) or {})["calibration"] == run["calibration"]


def test_with_nothing_to_calibrate_on_int8_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"no audio")
    with pytest.raises(InputError, match="int8, and no clip to calibrate it on can be decoded"):
        label(tiny_model, tmp_path / "out", tmp_path / "a.wav")
    assert not (tmp_path / "out" / "_commits").exists()
