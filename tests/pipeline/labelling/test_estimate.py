"""``earmark plan``: it says what there is and how long it takes, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.label import RunConfig
from pipeline.labelling.estimate import Costs, estimate_work, run_plan
from pipeline.labelling.plan import make_plan
from pipeline.labelling.sample import Amount
from tests.support.audio_factory import write_noise
from tests.support.containers import tar_bytes
from tests.support.labelling import small_config


def config_of(model: Path, *inputs: Path, **changes: object) -> RunConfig:
    inference = {"precision": "fp32", "device": "cpu", "batch_size": 1}
    values = {"inference": inference, "units": {"windows": 8}, "output": None, **changes}
    return small_config(model, Path(), *inputs, **values)


def test_hours_and_windows_come_from_a_sample(tiny_model: Path, tmp_path: Path) -> None:
    for index in range(20):
        write_noise(tmp_path / f"short-{index:02}.wav", 2.0)
    write_noise(tmp_path / "long.wav", 100.0)
    plan = make_plan(config_of(tiny_model, tmp_path), needs_output=False)
    estimate = estimate_work(plan)
    assert estimate.total.audio_s == pytest.approx(140.0, rel=0.01)
    assert estimate.total.windows == 20 + 10
    assert estimate.sample.num_failed == 0


def test_a_tar_is_estimated_from_its_bytes(tiny_model: Path, tmp_path: Path) -> None:
    clip = write_noise(tmp_path / "clip.wav", 5.0).read_bytes()
    members = [(f"{index}.wav", clip) for index in range(50)]
    (tmp_path / "clips.tar").write_bytes(tar_bytes(members))
    plan = make_plan(config_of(tiny_model, tmp_path / "clips.tar"), needs_output=False)
    estimate = estimate_work(plan)
    assert estimate.total.audio_s == pytest.approx(250.0, rel=0.05)
    assert estimate.total.windows == pytest.approx(50, rel=0.05)


def test_the_plan_is_printed_and_nothing_is_written(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        write_noise(tmp_path / "clips" / f"{index}.wav", 2.0)
    (tmp_path / "clips" / "bad.wav").write_bytes(b"no audio")
    (tmp_path / "clips" / "notes.txt").write_text("notes")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    config = config_of(tiny_model, tmp_path / "clips", output=str(tmp_path / "out"))
    assert run_plan(config, []) == 0
    printed = capsys.readouterr().out
    assert "5 labels (sigmoid), windows of 10.255 s" in printed
    assert "Found: 4 files or segments." in printed
    assert printed.count("window") - printed.count("a window") == 2  # of the model; one estimate
    assert "Skipped files of other kinds: 1 .txt" in printed
    assert "Estimate from 3 clips: 6 s of audio, 3 windows." in printed
    assert "Time on this machine: about" in printed
    assert "1 of the clips tried could not be decoded" in printed
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("shares_cores", "expected_s"),
    [(True, 100 * 0.5 + (100 * 0.02 + 1000 * 0.01) / 4), (False, 100 * 0.5)],
)
def test_decoding_counts_where_the_model_computes_on_the_same_cores(
    shares_cores: bool, expected_s: float
) -> None:
    costs = Costs(0.5, fbank_s=0.02, decode_s=0.01, shares_cores=shares_cores)
    assert costs.total_s(Amount(50, 1000.0, 100), num_cores=4) == pytest.approx(expected_s)


def test_a_fast_device_waits_for_the_decoders() -> None:
    costs = Costs(0.001, fbank_s=0.0, decode_s=0.01, shares_cores=False)
    assert costs.total_s(Amount(50, 1000.0, 100), num_cores=4) == pytest.approx(2.5)
