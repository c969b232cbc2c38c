"""The precision check: right figures, from the first windows on, which never end a run."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main as cli
from pipeline.terminal.precision_report import checks_record, describe_checks, precision_warnings
from tests.support.audio_factory import noise, write
from tests.transforms.inference.conftest import features as windows
from transforms.inference import engine as engine_module
from transforms.inference import precision_check
from transforms.inference.backbones import InferenceSettings
from transforms.inference.engine import Engine, load_engine
from transforms.inference.precision_check import PrecisionCheck, compare
from transforms.models.ast.checkpoints import ModelSpec, load_model
from transforms.process.progress_counts import live_counts
from transforms.records import FloatArray, Prediction, WindowCheck
from transforms.results.commits import (
    CheckFigures,
    Commit,
    Ledger,
    UnitSummary,
    UnitTotals,
    add_checks,
)

RATE = 16_000
EARLY, LATE = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EARMARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prediction(scores: list[float], embedding: list[float], **values: Any) -> Prediction:
    arrays = np.array(embedding, np.float32), np.array(scores, np.float32)
    return Prediction(*arrays, "e", **values)


# --- One window ------------------------------------------------------------------------------


def test_two_predictions_are_compared() -> None:
    check = compare(prediction([0.5, 0.25], [3, 4]), prediction([0.125, 0.5], [4, 3]))
    assert check.score_difference == 0.375
    assert check.cosine == pytest.approx(24 / 25)
    assert not check.same_top
    assert compare(prediction([0.5], [0, 0]), prediction([0.5], [0, 0])).cosine == 1.0


# --- Sums ------------------------------------------------------------------------------------


def test_figures_add_up_in_any_order() -> None:
    one = CheckFigures.of(WindowCheck(0.25, 0.5, False, LATE))
    other = CheckFigures.of(WindowCheck(0.125, 0.75, True, EARLY, reused=True))
    lost = CheckFigures.of(WindowCheck(error="no memory"))
    expected = CheckFigures(2, 1, 1, 0.25, 0.5, 1.25, EARLY, "no memory")
    assert one + other + lost == lost + other + one == expected
    assert add_checks({"a": one}, {}, {"a": other, "b": one}) == {"a": one + other, "b": one}


def test_figures_are_read_from_a_commit_and_older_commits_have_none() -> None:
    figures = {"torch cpu bf16": CheckFigures.of(WindowCheck(0.25, 0.5, False, LATE))}
    commit = Commit("u", "f", (), Ledger("files"), {}, UnitTotals(), ("torch cpu bf16",), figures)
    assert Commit.from_json(commit.to_json()) == commit
    assert UnitSummary.of(commit).checks == figures
    earlier = json.loads(commit.to_json())
    del earlier["checks"]
    assert Commit.from_json(json.dumps(earlier).encode()) == dataclasses.replace(commit, checks={})


def record(**figures: Any) -> dict[str, dict[str, Any]]:
    values = {"windows": 200, "same_top": 200, "sum_cosine": 200.0, "oldest_utc": EARLY}
    return checks_record({"torch cpu bf16": CheckFigures(**{**values, **figures})})


@pytest.mark.parametrize(
    ("figures", "warned"),
    [
        ({"max_score_difference": 0.02}, False),
        ({"max_score_difference": 0.0201}, True),
        ({"same_top": 198}, False),
        ({"same_top": 197}, True),
        ({"windows": 32, "same_top": 31}, False),  # one window: they may have been as good as equal
        ({"windows": 32, "same_top": 30}, True),
        ({"error": "no memory"}, True),
    ],
)
def test_beyond_a_gate_there_is_a_warning(figures: dict[str, Any], warned: bool) -> None:
    assert bool(list(precision_warnings(record(**figures)))) == warned


def test_a_warning_names_the_figures_and_the_next_step() -> None:
    (text,) = precision_warnings(record(max_score_difference=0.125, min_cosine=0.75))
    assert text == (
        "Warning: torch cpu bf16 against torch in float32, 200 windows: scores within 0.12, the "
        "same best class in 100.0%, cosine of embeddings at least 0.750000. Expected: no score "
        "further than 0.02, and the same best class in 99%. For float32's own numbers, label again "
        "with --precision fp32 --overwrite."
    )


def test_an_earlier_measurement_has_its_date() -> None:
    (text,) = describe_checks(record(reused=10))
    assert text.endswith(f" (10 of them measured before, from {EARLY}).")


# --- The windows that are checked ------------------------------------------------------------


class Reference:
    """Counts how often it is loaded and what it predicts; off by a tenth."""

    def __init__(self) -> None:
        self.loads, self.windows = 0, 0

    def load(self) -> Callable[[FloatArray], list[Prediction]]:
        self.loads += 1
        return self.predict

    def predict(self, batch: FloatArray) -> list[Prediction]:
        self.windows += len(batch)
        return [prediction([0.6, 0.2], list(window[0])) for window in batch]


def features(num: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(0, 0.5, (num, 4, 3)).astype(np.float32)


def found(batch: FloatArray) -> list[Prediction]:
    return [prediction([0.5, 0.2], list(window[0])) for window in batch]


def test_the_first_windows_are_checked_and_no_others() -> None:
    reference = Reference()
    check = PrecisionCheck(reference.load, 5, {"model": "m"})
    batches = [features(3, seed) for seed in range(3)]
    checked = [each.check is not None for batch in batches for each in check(batch, found(batch))]
    assert checked == [True] * 5 + [False] * 4
    assert (reference.loads, reference.windows) == (1, 5)


def test_a_display_sees_what_is_checked_and_how_long_it_takes() -> None:
    before = dataclasses.replace(live_counts)

    def since() -> tuple[int, int]:
        return (
            live_counts.checked - before.checked,
            live_counts.checks_left - before.checks_left,
        )

    check = PrecisionCheck(Reference().load, 5, {"model": "seen"})
    assert since() == (0, 5)
    for seed, expected in enumerate([(3, 2), (5, 0), (5, 0)]):
        check(features(3, seed), found(features(3, seed)))
        assert since() == expected
    assert live_counts.check_s > before.check_s


def test_failed_windows_are_not_checked() -> None:
    predictions = found(features(3))
    predictions[1] = dataclasses.replace(predictions[1], error="NaN")
    checked = PrecisionCheck(Reference().load, 2, {})(features(3), predictions)
    assert [each.check is not None for each in checked] == [True, False, True]


def test_the_same_windows_are_not_measured_again() -> None:
    first, again, other = Reference(), Reference(), Reference()
    batch = features(3)
    measured = [each.check for each in PrecisionCheck(first.load, 9, {"m": 1})(batch, found(batch))]
    reused = [each.check for each in PrecisionCheck(again.load, 9, {"m": 1})(batch, found(batch))]
    assert again.loads == 0
    assert reused == [dataclasses.replace(check, reused=True) for check in measured if check]
    # A new window among them is measured alone; another model starts from scratch.
    more = np.concatenate([batch, features(1, seed=7)])
    PrecisionCheck(again.load, 9, {"m": 1})(more, found(more))
    PrecisionCheck(other.load, 9, {"m": 2})(batch, found(batch))
    assert (again.windows, other.windows) == (1, 3)


@pytest.mark.parametrize("content", ["[]", "{", '{"%s": {"cosine": "x"}}', '{"%s": 3}'])
def test_kept_figures_that_are_damaged_are_measured_again(cache: Path, content: str) -> None:
    batch = features(1)
    PrecisionCheck(Reference().load, 9, {})(batch, found(batch))
    (path,) = cache.glob("checks/*.json")
    (digest,) = json.loads(path.read_text())
    path.write_text(content.replace("%s", digest))
    reference = Reference()
    (again,) = PrecisionCheck(reference.load, 9, {})(batch, found(batch))
    assert reference.windows == 1
    assert again.check is not None and not again.check.reused


def test_a_reference_that_does_not_fit_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def load() -> Callable[[FloatArray], list[Prediction]]:
        raise MemoryError("tried to allocate 350 MB")

    check = PrecisionCheck(load, 9, {})
    batch = features(2)
    assert [each.check for each in check(batch, found(batch))] == [
        WindowCheck(error="MemoryError: tried to allocate 350 MB")
    ] * 2
    assert [each.check for each in check(batch, found(batch))] == [None, None]
    assert "does not run in float32 beside this one: MemoryError: tried" in caplog.text


# --- The engine's own check ------------------------------------------------------------------


def engine_of(spec: ModelSpec, **values: Any) -> Engine:
    settings = InferenceSettings(**{"device": "cpu", "check_windows": 4, **values})
    return load_engine(load_model(spec), spec, settings)


def test_the_check_compares_with_plain_float32(spec: ModelSpec) -> None:
    batch = windows(3)
    plain = engine_of(spec, precision="fp32").label(batch)
    assert [each.check for each in plain] == [None] * 3  # the same engine: nothing to check
    checked = engine_of(spec, precision="bf16").label(batch)
    for mine, theirs in zip(checked, plain, strict=True):
        assert mine.check is not None
        difference = np.abs(mine.scores - theirs.scores).max()
        assert mine.check.score_difference == pytest.approx(difference, abs=1e-6)
        assert 0 < difference < 0.02
        assert 0.99 < mine.check.cosine < 1


def test_no_second_model_stays_in_memory(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    models = weakref.WeakSet[Any]()

    def load(spec: ModelSpec) -> Any:
        model = load_model(spec)
        models.add(model.audio_spectrogram_transformer)
        return model

    monkeypatch.setattr(engine_module, "load_model", load)
    engine = engine_of(spec, precision="bf16")
    engine.label(windows(2))
    assert len(models) == 1
    engine.label(windows(3))
    gc.collect()
    assert len(models) == 0


def test_a_failed_check_leaves_the_predictions_unchanged(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = engine_of(spec, precision="bf16", check_windows=0).label(windows(2))
    assert [each.check for each in plain] == [None, None]

    def refuse(*arguments: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(engine_module, "load_reference", refuse)
    checked = engine_of(spec, precision="bf16").label(windows(2))
    for mine, theirs in zip(checked, plain, strict=True):
        assert mine.check == WindowCheck(error="RuntimeError: CUDA out of memory")
        np.testing.assert_array_equal(mine.scores, theirs.scores)


# --- A whole run -----------------------------------------------------------------------------


class Label:
    """Runs ``earmark label`` in bfloat16, two windows a unit."""

    def __init__(self, model: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.clips, self.capsys = model, clips, capsys

    def __call__(self, out: Path, *options: str) -> tuple[dict[str, Any], str]:
        arguments = ["label", str(self.clips), "-o", str(out), "-m", str(self.model)]
        settings = ["--precision", "bf16", "--device", "cpu", "--set", "units.windows=2"]
        settings += ["--set", "decode.processes=1", "--batch-size", "2"]
        assert cli.main([*arguments, *settings, *options]) == 0
        run = json.loads((out / "run.json").read_text())
        return run["checks"], self.capsys.readouterr().err


@pytest.fixture
def label(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Label:
    (tmp_path / "clips").mkdir()
    for index in range(4):
        write(tmp_path / "clips" / f"{index}.wav", noise(1.0, seed=index), RATE)
    return Label(tiny_model, tmp_path / "clips", capsys)


def test_a_runs_figures_are_in_run_json_and_printed(label: Label, tmp_path: Path) -> None:
    checks, said = label(tmp_path / "out")
    figures = checks["torch cpu bf16"]
    assert (figures["windows"], figures["reused_windows"], figures["error"]) == (4, 0, None)
    assert 0 < figures["max_score_difference"] < 0.02
    assert 0.99 < figures["min_cosine"] <= figures["mean_cosine"] <= 1
    assert "Computed by torch cpu bf16." in said
    assert "torch cpu bf16 against torch in float32, 4 windows: scores within 0.0" in said
    # The same audio elsewhere: nothing is measured, and the date of the measurement is printed.
    again, said = label(tmp_path / "again")
    assert again["torch cpu bf16"] == {**figures, "reused_windows": 4}
    assert "(4 of them measured before, from 20" in said


def test_figures_add_up_over_reruns(label: Label, tmp_path: Path) -> None:
    label(tmp_path / "out", "--limit", "2")
    checks, _ = label(tmp_path / "out")
    assert checks["torch cpu bf16"]["windows"] == 4
    checks, _ = label(tmp_path / "out")  # nothing to do
    assert checks["torch cpu bf16"]["windows"] == 4


def test_a_difference_beyond_a_gate_is_printed_even_with_quiet(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far_off(mine: Prediction, theirs: Prediction) -> WindowCheck:
        return WindowCheck(0.5, 0.25, True, EARLY)

    monkeypatch.setattr(precision_check, "compare", far_off)
    _, said = label(tmp_path / "out", "--quiet")
    (line,) = [line for line in said.splitlines() if "float32" in line]
    assert line.startswith("Warning: torch cpu bf16 against torch in float32, 4 windows: scores ")
    assert "--precision fp32" in line


def test_a_failed_check_is_printed_even_with_quiet(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(engine_module, "load_reference", refuse)
    checks, said = label(tmp_path / "out", "--quiet")
    assert checks["torch cpu bf16"] == {"windows": 0, "error": "MemoryError: no room"}
    assert "The precision of torch cpu bf16 could not be checked on all windows: Memory" in said
