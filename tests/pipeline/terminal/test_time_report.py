"""Where the time went: what is made of the seconds, and that a slow step is the one named."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pipeline.labelling.run import run_label
from pipeline.terminal import time_report
from pipeline.terminal.time_report import Circumstances, Startup, advise, describe_time, record_time
from tests.support.labelling import small_config
from transforms.decoding import pool
from transforms.features import fbank
from transforms.models.ast.model import ASTModel
from transforms.process.stage_times import NO_SECONDS, StageSeconds
from transforms.storage import writing

RATE_HZ = 16_000
NUM_CLIPS = 4

# A process with two decoders that labelled for 100 s.
BASE = StageSeconds(process_s=100.0, decoder_s=200.0, other_s=1.0, load_s=2.0)
MODEL_BOUND = dataclasses.replace(
    BASE, model_s=93.0, fbank_s=3.0, copy_s=0.5, write_s=1.5, wait_decode_s=1.0, start_s=0.5,
    read_s=2.0, open_s=1.0, decode_s=20.0, resample_s=9.0,
)  # fmt: skip
DECODE_BOUND = dataclasses.replace(
    BASE, model_s=35.0, fbank_s=3.0, write_s=1.0, wait_decode_s=60.0,
    decode_s=150.0, resample_s=40.0,
)  # fmt: skip
READ_BOUND = dataclasses.replace(
    BASE, model_s=35.0, fbank_s=3.0, write_s=1.0, wait_read_s=50.0, wait_decode_s=10.0,
    read_s=97.0, decode_s=20.0,
)  # fmt: skip


def made_of(**seconds: float) -> StageSeconds:
    return dataclasses.replace(BASE, **seconds)


@pytest.mark.parametrize(
    ("seconds", "circumstances", "sentence"),
    [
        (
            MODEL_BOUND,
            Circumstances(("torch cuda bf16",), "auto", 8),
            "The model takes 94 % of the time: a faster device would help; more decoders would "
            "not.",
        ),
        (
            MODEL_BOUND,
            Circumstances(("torch cuda fp32",), "fp32", 8),
            "The model takes 94 % of the time: a faster device or half precision (--precision "
            "auto, if the device has it) would help; more decoders would not.",
        ),
        (
            MODEL_BOUND,
            Circumstances(("torch cpu fp32",), "fp32", 2),
            "The model takes 94 % of the time: a faster device, half precision (--precision auto, "
            "if the device has it) or the extra [openvino] would help; more decoders would not.",
        ),
        (
            made_of(model_s=20.0, copy_s=70.0),
            Circumstances(("torch cuda bf16",), "auto", 8),
            "Sending features to the device takes 77 % of the time: more --workers would help; a "
            "faster device would not.",
        ),
        (
            DECODE_BOUND,
            Circumstances(num_cores=2),
            "The model waits 60 % of the time for decoding: more cores would help; a faster "
            "device would not.",
        ),
        (
            DECODE_BOUND,
            Circumstances(num_cores=8),
            "The model waits 60 % of the time for decoding: there are cores for more decoders "
            "(--set decode.processes=8).",
        ),
        (
            dataclasses.replace(DECODE_BOUND, decode_s=40.0),
            Circumstances(num_cores=8),
            "The model waits 60 % of the time for decoding, and the decoders are 40 % busy: long "
            "recordings are decoded one after another; more --workers would help.",
        ),
        (
            READ_BOUND,
            Circumstances(num_cores=8),
            "The model waits 60 % of the time for reading: the store or disk is slow; larger "
            "shards, or running nearer to it, would help.",
        ),
        (
            # Local files are read by the decoders.
            dataclasses.replace(DECODE_BOUND, open_s=120.0, decode_s=30.0),
            Circumstances(num_cores=2),
            "The model waits 60 % of the time for reading: the store or disk is slow; larger "
            "shards, or running nearer to it, would help.",
        ),
        (
            made_of(model_s=20.0, write_s=60.0, fbank_s=19.0),
            Circumstances(num_cores=2),
            "Writing takes 60 % of the time: the output's store or disk is slow; larger units "
            "(units.windows), or an output nearer to the workers, would help.",
        ),
        (
            made_of(model_s=30.0, check_s=60.0, fbank_s=9.0),
            Circumstances(num_cores=2),
            "Checking the precision takes 60 % of the time: it hardly matters in a larger run, is "
            "skipped when the same run is repeated, and is shorter with fewer --set "
            "inference.check_windows.",
        ),
        (
            made_of(model_s=30.0, fbank_s=69.0),
            Circumstances(num_cores=64),
            "Waiting for features takes 69 % of the time: more --workers would help; a faster "
            "device would not.",
        ),
        (
            made_of(model_s=30.0, fbank_s=69.0),
            Circumstances(num_cores=16, num_processes=2),
            "Waiting for features takes 69 % of the time: more cores would help; a faster device "
            "would not.",
        ),
        (
            made_of(model_s=20.0, fbank_s=20.0, other_s=60.0),
            Circumstances(num_cores=2),
            "Moving windows from step to step takes 60 % of the time, more than the model: more "
            "--workers would help; a faster device would not.",
        ),
    ],
)
def test_the_advice_is_about_what_takes_the_most_time(
    seconds: StageSeconds, circumstances: Circumstances, sentence: str
) -> None:
    assert advise(seconds, circumstances) == sentence


def scaled(seconds: StageSeconds, factor: float) -> StageSeconds:
    return StageSeconds(*(factor * value for value in dataclasses.astuple(seconds)))


@pytest.mark.parametrize("factor", [0.0, 0.09])
def test_a_run_of_a_few_seconds_gets_no_advice(factor: float) -> None:
    assert advise(scaled(MODEL_BOUND, factor), Circumstances()) is None


def test_advice_is_the_same_for_one_process_and_for_many() -> None:
    many = sum([DECODE_BOUND] * 5, NO_SECONDS)
    assert advise(many, Circumstances(num_cores=2)) == advise(
        DECODE_BOUND, Circumstances(num_cores=2)
    )


def record(seconds: StageSeconds) -> dict[str, Any]:
    return record_time(
        Startup(8.04, 0.6004), seconds, ("torch cpu fp32",), asked_precision="auto", num_cores=2
    )


def test_the_record_has_seconds_and_shares() -> None:
    seconds = dataclasses.asdict(MODEL_BOUND)
    labelling = "model copy queue check fbank wait_read wait_decode write other".split()
    assert record(MODEL_BOUND) == {
        "startup": {
            "imports_s": 8.04,
            "planning_s": 0.6,
            "model_load_s": 2.0,
            "decoder_start_s": 0.5,
        },
        "labelling": {
            "total_s": 100.0,
            **{f"{name}_s": seconds[f"{name}_s"] for name in labelling},
        },
        "labelling_shares": {
            "model": 0.93,
            "copy": 0.005,
            "queue": 0.0,
            "check": 0.0,
            "fbank": 0.03,
            "wait": 0.01,
            "write": 0.015,
            "other": 0.01,
        },
        "background": {
            "read_s": 2.0,
            "open_s": 1.0,
            "decode_s": 20.0,
            "resample_s": 9.0,
            "device_ahead_s": 0.0,
            "reader_share": 0.02,
            "decoders": 2.0,
            "decoder_share": 0.15,
        },
        "device_idle_share": 0.07,
        "advice": "The model takes 94 % of the time: a faster device or the extra [openvino] would "
        "help; more decoders would not.",
    }


def test_a_gpu_that_computes_ahead_is_not_idle() -> None:
    seconds = StageSeconds(model_s=1.0, other_s=9.0, device_ahead_s=7.0, process_s=10.0)
    assert record(seconds)["device_idle_share"] == 0.2


def test_the_closing_lines_say_what_the_record_says() -> None:
    assert describe_time(record(MODEL_BOUND)) == [
        "To start: imports 8 s, planning 1 s, loading the model 2 s, decoders 0 s. "
        "Labelling took 1:40: model 93 %, fbank 3 %, write 2 %, wait 1 %, other 1 %.",
        "Meanwhile: reading 2 s (2 % busy), decoding 21 s and resampling 9 s (2 decoders, 15 % "
        "busy). The device was idle 7 % of the time.",
        record(MODEL_BOUND)["advice"],
    ]


def test_where_nothing_was_labelled_nothing_is_said() -> None:
    nothing = record(NO_SECONDS)
    assert nothing["labelling_shares"] == dict.fromkeys(nothing["labelling_shares"])
    assert (nothing["device_idle_share"], nothing["advice"]) == (None, None)
    assert describe_time(nothing) == []


# End to end


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(NUM_CLIPS):
        noise = np.random.default_rng(index).normal(0, 0.1, RATE_HZ)
        soundfile.write(folder / f"{index}.wav", noise, RATE_HZ, subtype="PCM_16")
    return folder


@pytest.fixture
def label(tiny_model: Path, clips: Path, tmp_path: Path) -> Run:
    """Labels the clips in units of two; gives ``time`` of run.json."""

    def run(source: str = str(clips), options: tuple[str, ...] = (), **changes: Any) -> Any:
        values = {"quiet": False, **changes}
        config = small_config(tiny_model, tmp_path / "out", source, **values)
        assert run_label(config, list(options), imports_s=1.5) == 0
        return json.loads((tmp_path / "out" / "run.json").read_text())["time"]

    return run


def slowed(function: Callable[..., Any], delay_s: float) -> Callable[..., Any]:
    @functools.wraps(function)
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(delay_s)
        return function(*args, **kwargs)

    return slow


def slow_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ASTModel, "embed", slowed(ASTModel.embed, 1.5))


def slow_fbank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fbank, "extract_fbank", slowed(fbank.extract_fbank, 0.75))


def slow_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(writing, "put_file", slowed(writing.put_file, 0.75))


def slow_decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "slow_worker.py"
    script.write_text(
        "import sys, time\n"
        "from transforms.decoding import child\n"
        "def decode(source, **options):\n"
        "    time.sleep(0.75)\n"
        "    yield from child.decode(source, **options)\n"
        "child.serve(sys.argv[1:], decode)\n"
    )
    command = (sys.executable, str(script))
    monkeypatch.setitem(pool.DecodePool.__init__.__kwdefaults__, "worker_command", command)


@pytest.mark.parametrize(
    ("slow_down", "words"),
    [
        (slow_model, "The model takes "),
        (slow_fbank, "Waiting for features takes "),
        (slow_output, "Writing takes "),
        (slow_decoder, "of the time for decoding: "),
    ],
)
def test_the_step_that_is_slow_is_the_one_named(
    slow_down: Callable[[pytest.MonkeyPatch, Path], None],
    words: str,
    label: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(time_report, "MIN_ADVISED_S", 0.0)
    slow_down(monkeypatch, tmp_path)
    found = label()
    assert words in found["advice"]
    assert capsys.readouterr().err.splitlines()[-1] == found["advice"]


def test_a_slow_store_is_named(label: Run, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    fs = MemoryFileSystem()
    fs.put(str(clips), "/slow", recursive=True)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", slowed(MemoryFileSystem.cat_file, 3.0))
    monkeypatch.setattr(time_report, "MIN_ADVISED_S", 0.0)
    try:
        found = label("memory://slow")
    finally:
        fs.rm("/slow", recursive=True)
    assert "of the time for reading: " in found["advice"]
    assert found["labelling"]["wait_read_s"] > found["labelling"]["wait_decode_s"]


def test_the_shares_add_up_and_every_step_has_taken_some_time(
    label: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    found = label(quiet=True)
    assert capsys.readouterr().err == ""
    assert sum(found["labelling_shares"].values()) == pytest.approx(1.0, abs=0.005)
    seconds = found["labelling"]
    parts = [value for name, value in seconds.items() if name != "total_s"]
    assert sum(parts) == pytest.approx(seconds["total_s"], abs=0.01)
    # Features are made beside: they may have been there whenever the model asked.
    for name in ("model_s", "write_s", "other_s"):
        assert seconds[name] > 0.0, name
    background = found["background"]
    assert background["decode_s"] > 0.0
    assert background["decoders"] == 1.0
    assert found["startup"]["imports_s"] == 1.5
    assert found["startup"]["planning_s"] > 0.0
    assert found["startup"]["model_load_s"] > 0.0


def test_only_the_time_of_this_run_counts(label: Run, capsys: pytest.CaptureFixture[str]) -> None:
    first = label()
    assert first["labelling"]["total_s"] > 0.0
    capsys.readouterr()
    again = label()
    assert again["labelling"]["total_s"] == 0.0
    assert "Labelling took" not in capsys.readouterr().err


def test_threads_of_one_process_add_up(label: Run) -> None:
    """The time of two labelling threads is not more than twice that of their process."""
    found = label(options=("--direct_num_workers=2", "--direct_running_mode=multi_threading"))
    shares = [share for share in found["labelling_shares"].values() if share is not None]
    assert sum(shares) == pytest.approx(1.0, abs=0.005)
    assert 0.0 <= found["device_idle_share"] < 1.0
    assert found["background"]["decoders"] == 1.0
