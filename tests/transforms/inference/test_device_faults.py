"""Faults of the device and the model, through the whole graph.

Out of memory halves the batch and the run goes on; a window for which the model gives no number
costs its own clip; what no window can be the cause of ends the run, with words that help.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cli import main as cli
from pipeline.result.verify import run_verify
from tests.support.audio_factory import noise, write
from tests.support.labelling import Row, assert_same_rows, rows_by_name
from tests.support.model_factory import write_tiny_model
from transforms.inference import safe_predictor
from transforms.inference.backbones import Embeddings
from transforms.inference.engine import NOT_FINITE, Engine
from transforms.records import FloatArray

RATE = 16_000
WINDOW_S = 10.255
SETTINGS = (
    *("--precision", "fp32", "--device", "cpu", "--batch-size", "8"),
    *("--set", "decode.processes=1"),
)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee docs")
Embed = Callable[[Engine, FloatArray], Any]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of a window, and one of three whose second is digital silence."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(8):
        write(folder / f"{index}.wav", noise(1.0, seed=index), RATE)
    three = noise(3 * WINDOW_S, seed=9)
    length = round(WINDOW_S * RATE)
    three[length : 2 * length] = 0
    write(folder / "silent.wav", three, RATE)
    return folder


class Label:
    """Runs ``earmark label``; batches of eight windows, and all clips in one unit."""

    def __init__(self, model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.out, self.capsys = model, out, capsys
        self.said = ""

    def __call__(self, source: Path, *options: str) -> int:
        arguments = ["label", str(source), "-o", str(self.out), "-m", str(self.model)]
        code = cli.main([*arguments, *SETTINGS, *options])
        self.said = self.capsys.readouterr().err
        return code

    def rows(self, part: str) -> dict[tuple[str, int], Row]:
        return rows_by_name(self.out, part)


@pytest.fixture
def label(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Label:
    monkeypatch.setattr(safe_predictor, "MEMORY_WAITS_S", (0.0, 0.0))
    monkeypatch.delenv("EARMARK_DEBUG", raising=False)
    return Label(tiny_model, tmp_path / "out", capsys)


@pytest.fixture(scope="module")
def undisturbed_folder(
    tiny_model: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert cli.main(["label", str(clips), "-o", str(out), "-m", str(tiny_model), *SETTINGS]) == 0
    return out


@pytest.fixture
def undisturbed(
    undisturbed_folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> Label:
    """The result of the same command where nothing goes wrong."""
    return Label(tiny_model, undisturbed_folder, capsys)


def break_engine(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Embed], Embed]) -> None:
    """Put a fault before the engine's own forward pass."""
    monkeypatch.setattr(Engine, "_embed", fault(Engine._embed))


# --- Memory --------------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch_and_the_rows_are_the_same(
    label: Label, undisturbed: Label, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def fault(embed: Embed) -> Embed:
        def limited(engine: Engine, features: FloatArray) -> Any:
            sizes.append(len(features))
            if len(features) > 3:
                raise OUT_OF_MEMORY
            return embed(engine, features)

        return limited

    break_engine(monkeypatch, fault)
    assert label(clips) == 0
    assert [size for size in sizes if size > 2] == [8, 4]  # what was too large is not tried again
    for part in ("clips", "windows"):
        assert_same_rows(label.rows(part).values(), undisturbed.rows(part).values())
    told = [line for line in label.said.splitlines() if "Out of memory" in line]
    assert told == [
        "WARNING transforms.inference.safe_predictor: Out of memory on torch cpu fp32 with 8 "
        "windows a batch; continuing with 2. To start with that: --batch-size 2"
    ]
    assert run_verify(str(label.out), quiet=True) == 0


def test_no_memory_for_a_single_window_ends_the_run_and_the_next_resumes(
    label: Label, undisturbed: Label, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No window is the cause: error rows for all of them would have to be retried one by one.
    calls: list[int] = []

    def fault(embed: Embed) -> Embed:
        def lost(engine: Engine, features: FloatArray) -> Any:
            calls.append(len(features))
            if len(calls) > 2:  # another program takes the memory in the middle of the run
                raise OUT_OF_MEMORY
            return embed(engine, features)

        return lost

    with monkeypatch.context() as patched:
        break_engine(patched, fault)
        assert label(clips, "--set", "units.windows=2", "--batch-size", "2") == 1
    assert "torch cpu fp32: out of memory with a single window (CUDA out of memory" in label.said
    assert "nvidia-smi" in label.said
    assert "run the same command again to resume" in label.said
    assert not label.rows("errors")
    committed = set(label.rows("clips"))
    assert committed
    assert label(clips, "--set", "units.windows=2", "--batch-size", "2") == 0
    assert committed < set(label.rows("clips"))
    for part in ("clips", "windows"):
        assert_same_rows(label.rows(part).values(), undisturbed.rows(part).values())
    assert run_verify(str(label.out), quiet=True) == 0


def test_a_model_that_does_not_fit_onto_the_device_ends_the_run(
    label: Label, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack_memory(*arguments: Any) -> None:
        raise OUT_OF_MEMORY

    monkeypatch.setattr(Engine, "__init__", lack_memory)
    assert label(clips) == 1
    assert "cpu: the model cannot be loaded onto it: CUDA out of memory" in label.said
    assert not label.rows("errors")


# --- NaN -----------------------------------------------------------------------------------


def give_nan_for_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that divides by the spread of its input, wherever the features lie."""
    read = Engine._read

    def unstable(engine: Engine, features: Any, embeddings: Embeddings) -> Any:
        pooled = embeddings.pooled.copy()
        pooled[[bool(window.std() < 1e-3) for window in features]] = np.nan
        return read(engine, features, Embeddings(pooled))

    monkeypatch.setattr(Engine, "_read", unstable)


def test_a_window_with_a_nan_result_costs_only_its_clip(
    label: Label, undisturbed: Label, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_nan_for_silence(monkeypatch)
    assert label(clips, "--max-failed", "0.2") == 0
    (error,) = label.rows("errors").values()
    assert error["clip_id"] == str(clips / "silent.wav")
    assert (error["stage"], error["error_type"]) == ("inference", "InferenceError")
    assert error["message"] == f"window 1 (10.255 to 20.510 s): {NOT_FINITE}"
    # Bit for bit: the same batches were computed.
    for part in ("clips", "windows"):
        others = [row for (name, _), row in undisturbed.rows(part).items() if name != "silent.wav"]
        assert_same_rows(label.rows(part).values(), others, tolerance=0)
    assert run_verify(str(label.out), quiet=True) == 0


def write_with_value(path: Path, value: float, at_s: float, duration_s: float) -> None:
    samples = noise(duration_s, seed=4)
    samples[round(at_s * RATE)] = value
    write(path, samples, RATE, "wav_float")


def test_samples_that_are_not_numbers_cost_only_their_clip(label: Label, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(3):
        write(folder / f"{index}.wav", noise(1.0, seed=index), RATE)
    assert label(folder) == 0
    before = {part: label.rows(part) for part in ("clips", "windows")}
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus", -np.inf), ("huge", 3e38)):
        write_with_value(folder / f"{name}.wav", value, 1.0, 2.0)
        write_with_value(folder / f"{name}-late.wav", value, 15.0, 25.0)
    other = Label(label.model, tmp_path / "again", label.capsys)
    assert other(folder, "--max-failed", "0.5") == 0
    errors = {key[0]: row["message"] for key, row in other.rows("errors").items()}
    overflow = "samples reach 3e+38; must be in [-1, 1]. Beyond ±1e+15 the features overflow."
    assert errors == {
        "huge.wav": f"window 0 (0.000 to 2.000 s): {overflow}",
        "huge-late.wav": f"window 1 (10.255 to 20.510 s): {overflow}",
    }
    # A clip that breaks off is labelled up to there, with a warning.
    clips, windows = other.rows("clips"), other.rows("windows")
    for name in ("nan", "inf", "minus", "nan-late", "inf-late", "minus-late"):
        end_s, num_windows = (15.0, 2) if name.endswith("late") else (1.0, 1)
        name += ".wav"
        row = clips.pop((name, 0))
        assert (row["duration_s"], row["num_windows"]) == (end_s, num_windows)
        assert f"the sample at {end_s:.3f} s is NaN or infinite" in row["warning"]
        assert np.isfinite(row["embedding"]).all()
        for index in range(num_windows):
            assert np.isfinite(windows.pop((name, index))["embedding"]).all()
    assert_same_rows(clips.values(), before["clips"].values())
    assert_same_rows(windows.values(), before["windows"].values())
    assert run_verify(str(other.out), quiet=True) == 0


# --- A model that does not do what it should -------------------------------------------------


def test_a_window_that_makes_the_model_raise_costs_only_its_clip(
    label: Label, undisturbed: Label, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(embed: Embed) -> Embed:
        def choosy(engine: Engine, features: FloatArray) -> Any:
            if (features.std(axis=(1, 2)) < 1e-3).any():
                raise IndexError("index 7 is out of bounds\nand a page more")
            return embed(engine, features)

        return choosy

    break_engine(monkeypatch, fault)
    assert label(clips, "--max-failed", "0.2") == 0
    (error,) = label.rows("errors").values()
    assert error["clip_id"] == str(clips / "silent.wav")
    assert error["message"] == (
        "window 1 (10.255 to 20.510 s): IndexError: index 7 is out of bounds"
    )
    for part in ("clips", "windows"):
        others = [row for (name, _), row in undisturbed.rows(part).items() if name != "silent.wav"]
        assert_same_rows(label.rows(part).values(), others)


def test_a_model_that_never_works_ends_the_run_at_its_first_batch(
    label: Label, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An error row for each of a million clips would say less, and take days.
    def fail(engine: Engine, features: FloatArray) -> Any:
        raise RuntimeError("could not create a primitive\nand a page more")

    with monkeypatch.context() as patched:
        break_engine(patched, lambda embed: fail)
        assert label(clips) == 1
    assert (
        "torch cpu fp32: the model cannot be run: RuntimeError: could not create a primitive. "
        "Check the installation"
    ) in label.said
    assert "run the same command again to resume" in label.said
    assert not label.rows("errors")
    assert not (label.out / "_SUCCESS").exists()
    assert label(clips) == 0
    assert len(label.rows("clips")) == 9


# --- On a GPU ------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_that_is_nearly_full_gives_the_same_rows(
    needs_gpu: None, label: Label, clips: Path, tmp_path: Path
) -> None:
    # A wide model, so that a batch is large compared with torch's own reserve.
    label.model = write_tiny_model(
        tmp_path / "wide", hidden_size=768, intermediate_size=3072, num_attention_heads=12,
        frequency_stride=10, time_stride=10,
    )  # fmt: skip
    options = ["--device", "cuda", "--batch-size", "64", "--hop-s", "0.5"]
    assert label(clips, *options) == 0
    wanted, out = label.rows("windows"), label.out
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(0.5 * (1 << 30) / total)
    try:
        label.out = tmp_path / "tight"
        assert label(clips, *options) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory on torch cuda fp32 with 51 windows" in label.said, label.said
    assert_same_rows(label.rows("windows").values(), wanted.values(), tolerance=1e-4)
    assert run_verify(str(out), quiet=True) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_nan_on_a_gpu_costs_only_its_clip(
    needs_gpu: None, label: Label, clips: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    give_nan_for_silence(monkeypatch)
    options = ["--device", "cuda", "--precision", precision, "--max-failed", "0.2"]
    assert label(clips, *options) == 0
    assert [key[0] for key in label.rows("errors")] == ["silent.wav"]
    assert len(label.rows("clips")) == 8
