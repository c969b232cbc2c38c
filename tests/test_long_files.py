"""A very long file is labelled in parts, and the result is that of a file labelled in one go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config import RunConfig
from pipeline.result import read_result
from pipeline.run import run_label
from pipeline.verify import run_verify
from tests import audio_factory
from transforms import join_parts as join_step
from transforms.decode_worker import decode, decode_whole
from transforms.records import Part
from transforms.sources import windows_per_part

RATE_HZ = 16_000


def part_samples(path: Path, start_s: int, end_s: int | None, part: Part) -> np.ndarray:
    pieces = list(decode(path, start_s=float(start_s), end_s=end_s, part=part))
    return np.concatenate([piece.samples for piece in pieces])


FILES = {
    "exact": (16_000, 1, "wav"),
    "cd": (44_100, 2, "wav"),
    "flac": (48_000, 2, "flac"),
    "odd": (22_051, 1, "flac"),
    "low": (8_000, 1, "au"),
    "mp3": (44_100, 2, "mp3"),
    "vorbis": (44_100, 1, "ogg"),
    "aiff": (11_025, 1, "aiff"),
}


def sweep(duration_s: float, rate_hz: int, channels: int) -> np.ndarray:
    """Noise and a tone that gets louder, a second of silence and a clipped one."""
    samples = audio_factory.noise(duration_s, rate_hz, num_channels=channels, amplitude=0.05)
    tone = audio_factory.tone(duration_s, rate_hz, num_channels=channels, amplitude=0.3)
    samples = samples + tone * np.linspace(0.1, 1, len(tone), dtype=np.float32)[:, None]
    samples[2 * rate_hz : 3 * rate_hz] = 0.0
    samples[20 * rate_hz : 20 * rate_hz + rate_hz // 100] = 1.0
    return np.clip(samples, -1.0, 1.0).astype(np.float32)


@pytest.mark.parametrize("name", FILES)
def test_samples_and_levels_of_parts_are_those_of_the_whole_file(name: str, tmp_path: Path) -> None:
    rate_hz, channels, kind = FILES[name]
    path = tmp_path / f"long.{kind}"
    audio_factory.write(path, sweep(40.3, rate_hz, channels), rate_hz, kind)
    whole, facts = decode_whole(path)
    before, after = 7_900, 8_100
    found = []
    for start_s, end_s in ((0, 15), (15, 30), (30, None)):
        part = Part(before if start_s else 0, after if end_s else 0)
        pieces = list(decode(path, start_s=float(start_s), end_s=end_s, part=part))
        samples = np.concatenate([piece.samples for piece in pieces])
        first = start_s * RATE_HZ - part.before_samples
        expected = whole[first : None if end_s is None else end_s * RATE_HZ + after]
        assert len(samples) == len(expected)
        # At a rate of no simple ratio to 16 kHz, soxr itself rounds its place in the filter.
        np.testing.assert_allclose(samples, expected, atol=2e-5 if name == "odd" else 2e-6)
        found.append(pieces[-1].facts)
    assert [bool(one.content_sha256) for one in found] == [True, False, False]
    joined = join_step.add_facts(found, None)
    check_facts(dataclasses.asdict(joined), dataclasses.asdict(facts))


FACTS = ("duration_s", "peak_dbfs", "rms_dbfs", "clipped_ratio")


def check_facts(joined: dict[str, Any], whole: dict[str, Any]) -> None:
    for name in FACTS:
        assert joined[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-5), name
    # At rates of which 50 frames are not a second, those of parts begin elsewhere.
    assert joined["silent_ratio"] == pytest.approx(whole["silent_ratio"], abs=1e-4)
    for name in ("sample_rate_hz", "channels", "content_sha256", "warning"):
        assert joined[name] == whole[name], name


@pytest.mark.parametrize(
    ("per_unit", "hop_samples", "expected"),
    [(256, 164_080, 200), (256, 82_040, 400), (64, 164_080, 200), (32, 164_080, None),
     (256, 16_000, 256), (8, 8_000, 8), (7, 8_000, 8), (256, 16_001, None)],
)  # fmt: skip
def test_a_part_begins_at_a_whole_second(
    per_unit: int, hop_samples: int, expected: int | None
) -> None:
    assert windows_per_part(per_unit, hop_samples, RATE_HZ) == expected
    if expected is not None:
        assert expected * hop_samples % RATE_HZ == 0


class Label:
    """Labels with the tiny model; a file of more than eight windows is long, if ``in_parts``."""

    def __init__(self, model: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.root, self._monkeypatch = model, root, monkeypatch

    def config(self, out: str, *inputs: Path, in_parts: bool = True, **changes: Any) -> RunConfig:
        values: dict[str, Any] = {
            "inputs": [str(path) for path in inputs],
            "output": str(self.root / out),
            "quiet": True,
            "max_failed": 1.0,
            "model": {"name": str(self.model)},
            "window": {"length_s": 1.0, "hop_s": 1.0},
            "inference": {"precision": "fp32", "device": "cpu", "batch_size": 8},
            "units": {"windows": 4 if in_parts else 100_000},
            "decode": {"processes": 1},
            **changes,
        }
        return RunConfig.model_validate(values)

    def __call__(self, out: str, *inputs: Path, **changes: Any) -> Path:
        assert run_label(self.config(out, *inputs, **changes), []) == 0
        assert run_verify(str(self.root / out), quiet=True) == 0
        assert not (self.root / out / "_parts").exists()
        return self.root / out


@pytest.fixture
def label(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Label:
    return Label(tiny_model, tmp_path, monkeypatch)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parts each join took, so that a test knows that there were any."""
    counts: list[int] = []
    join = join_step.join_parts

    def counting(*args: Any) -> Any:
        counts.append(len(args[-1]))
        return join(*args)

    monkeypatch.setattr(join_step, "join_parts", counting)
    return counts


def rows(out: Path, part: str) -> list[dict[str, Any]]:
    found = [
        row for path in (out / part).glob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    return sorted(found, key=lambda row: (row["clip_id"], row.get("window_index", 0)))


def check_same(out: Path, expected: Path) -> None:
    for part in ("windows", "clips"):
        mine, others = rows(out, part), rows(expected, part)
        assert [row["clip_id"] for row in mine] == [row["clip_id"] for row in others]
        for row, other in zip(mine, others, strict=True):
            assert row.keys() == other.keys()
            for name in ("window_index", "start_s", "end_s", "num_windows", "uri", "metadata"):
                assert row.get(name) == other.get(name), (name, row["clip_id"])
            np.testing.assert_allclose(row["embedding"], other["embedding"], atol=2e-3)
            scores = ({one["name"]: one["score"] for one in r["labels"]} for r in (row, other))
            assert next(scores) == pytest.approx(next(scores), abs=2e-3)
            assert ("scores" in row) == ("scores" in other)
            if part == "clips":
                check_facts(row, other)
    assert [
        {name: value for name, value in row.items() if name != "unit_id"}
        for row in (rows(out, "errors") if (out / "errors").exists() else [])
    ] == [
        {name: value for name, value in row.items() if name != "unit_id"}
        for row in (rows(expected, "errors") if (expected / "errors").exists() else [])
    ]


def write_long(folder: Path, name: str = "cd", duration_s: float = 40.3) -> Path:
    rate_hz, channels, kind = FILES[name]
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.{kind}"
    audio_factory.write(path, sweep(duration_s, rate_hz, channels), rate_hz, kind)
    return path


@pytest.mark.parametrize("hop_s", [1.0, 0.5])
def test_rows_are_those_of_files_labelled_in_one_go(
    label: Label, tmp_path: Path, joined: list[int], hop_s: float
) -> None:
    window = {"length_s": 1.0, "hop_s": hop_s}
    for name in ("exact", "cd", "flac", "mp3", "vorbis"):
        write_long(tmp_path / "in", name)
    audio_factory.write(tmp_path / "in" / "short.wav", sweep(24, 8_000, 1)[:9_000], 8_000, "wav")
    whole = label("whole", tmp_path / "in", window=window, in_parts=False)
    assert joined == []
    parts = label("parts", tmp_path / "in", window=window)
    assert len(joined) == 5
    assert min(joined) >= 9
    check_same(parts, whole)
    run = read_result(str(parts)).run or {}
    assert run["totals"]["units"] == 6
    assert run["totals"]["found_items"] == 6
