"""A very long file is labelled in parts, and the result is that of a file labelled in one go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile

from pipeline.config.label import RunConfig
from pipeline.labelling.plan import describe_plan, make_plan
from pipeline.labelling.run import run_label
from pipeline.result.state import read_result
from pipeline.result.verify import run_verify
from tests.pipeline.labelling.test_kill import rows_of
from tests.support import audio_factory
from transforms import join_parts as join_step
from transforms.decoding.decode import decode, decode_whole
from transforms.decoding.readers import probe_duration_s
from transforms.errors import AccountingError
from transforms.header_probe import HeaderProbe
from transforms.process.progress_counts import live_counts
from transforms.records import Part
from transforms.results.commits import list_long_files, long_id_of, remove_long_file
from transforms.results.write_units import OpenUnit
from transforms.sources import kept_files
from transforms.sources.read_unit import windows_per_part

RATE_HZ = 16_000


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


def slow(*values: Any) -> Any:
    """A case that takes its time."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Label:
    """Labels with the tiny model; a file of more than eight windows is long, if ``in_parts``."""

    def __init__(self, model: Path, root: Path) -> None:
        self.model, self.root = model, root

    def config(
        self, out: str, *inputs: Path | str, in_parts: bool = True, **changes: Any
    ) -> RunConfig:
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

    def __call__(self, out: str, *inputs: Path | str, **changes: Any) -> Path:
        assert run_label(self.config(out, *inputs, **changes), []) == 0
        assert run_verify(str(self.root / out), quiet=True) == 0
        assert not (self.root / out / "_parts").exists()
        return self.root / out


@pytest.fixture
def label(tiny_model: Path, tmp_path: Path) -> Label:
    return Label(tiny_model, tmp_path)


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


def check_same(out: Path, expected: Path) -> None:
    for part in ("windows", "clips"):
        mine, others = rows_of(out, part), rows_of(expected, part)
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
        for row in (rows_of(out, "errors") if (out / "errors").exists() else [])
    ] == [
        {name: value for name, value in row.items() if name != "unit_id"}
        for row in (rows_of(expected, "errors") if (expected / "errors").exists() else [])
    ]


def write_long(folder: Path, name: str = "cd", duration_s: float = 40.3) -> Path:
    rate_hz, channels, kind = FILES[name]
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.{kind}"
    audio_factory.write(path, sweep(duration_s, rate_hz, channels), rate_hz, kind)
    return path


@pytest.mark.parametrize("hop_s", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
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


def test_softmax_and_float16_embeddings_and_all_scores(
    label: Label, tmp_path: Path, joined: list[int]
) -> None:
    path = write_long(tmp_path / "in", "exact")
    changes: dict[str, Any] = {
        "model": {"name": str(label.model), "activation": "softmax"},
        "embedding": {"dtype": "float16"},
        "labels": {"scores": True, "top_k": 2},
    }
    whole = label("whole", path, in_parts=False, **changes)
    parts = label("parts", path, **changes)
    assert joined == [10]
    check_same(parts, whole)
    mine, others = rows_of(parts, "windows"), rows_of(whole, "windows")
    np.testing.assert_allclose(
        [row["scores"] for row in mine], [row["scores"] for row in others], atol=2e-3
    )


class KilledError(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("num_commits", [pytest.param(1, marks=pytest.mark.slow), 4, 10])
def test_a_run_that_is_killed_goes_on_inside_the_file(
    label: Label,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_commits: int,
) -> None:
    """After some of the ten parts are committed; the last time between them and the join."""
    path = write_long(tmp_path / "in", "exact")
    whole = label("whole", path, in_parts=False)
    commit, committed = OpenUnit.commit, []

    def dying(unit: OpenUnit) -> Any:
        if len(committed) == num_commits:
            raise KilledError
        done = commit(unit)
        committed.append(done.unit_id)
        return done

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="KilledError"):
        patched.setattr(OpenUnit, "commit", dying)
        run_label(label.config("parts", path), [])
    out = tmp_path / "parts"
    assert len(list(out.glob("_parts/*/_commits/*.json"))) == num_commits
    assert all(long_id_of(unit_id) for unit_id in committed)
    assert run_verify(str(out), quiet=True) == 3
    assert f" 0 failures, {num_commits} parts of files" in capsys.readouterr().out
    before = live_counts.windows
    again: list[str] = []

    def counting(unit: OpenUnit) -> Any:
        done = commit(unit)
        again.append(done.unit_id)
        return done

    with monkeypatch.context() as patched:
        patched.setattr(OpenUnit, "commit", counting)
        label("parts", path)
    assert len(again) == 10 - num_commits + 1
    assert not set(again) & set(committed)
    assert live_counts.windows - before == 41
    check_same(out, whole)


def test_parts_that_were_damaged_or_are_of_other_settings_are_not_taken(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_long(tmp_path / "in", "exact")
    whole = label("whole", path, in_parts=False)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="KilledError"):
        patched.setattr(join_step, "join_parts", _die)
        run_label(label.config("parts", path), [])
    out = tmp_path / "parts"
    parts = sorted(out.glob("_parts/*/windows/*.parquet"))
    assert len(parts) == 10
    parts[3].write_bytes(parts[3].read_bytes()[:-10])
    parts[5].unlink()
    sorted(out.glob("_parts/*/_commits/*.json"))[7].write_bytes(b"{")
    for part in parts[1:3]:  # of the same size, which is not seen before they are joined
        data = part.read_bytes()
        part.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    with pytest.raises(AccountingError, match=r"^2 of 10 parts .*: its content has changed"):
        run_label(label.config("parts", path), [])
    label("parts", path)
    check_same(out, whole)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="KilledError"):
        patched.setattr(join_step, "join_parts", _die)
        run_label(label.config("other", path, window={"length_s": 1.0, "hop_s": 0.5}), [])
    label("other", path)  # nothing was committed, so other settings are no mixture
    check_same(tmp_path / "other", whole)


def _die(*args: object) -> None:
    raise KilledError


def test_parts_of_a_file_that_is_not_to_be_done_any_more_go(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = write_long(tmp_path / "in", "exact"), write_long(tmp_path / "in", "flac")
    out = tmp_path / "out"

    def interrupt() -> None:
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="KilledError"):
            patched.setattr(join_step, "join_parts", _die)
            run_label(label.config("out", path), [])
        assert (out / "_parts").exists()

    interrupt()
    label("out", other)
    assert [Path(row["uri"]).name for row in rows_of(out, "clips")] == ["flac.flac"]
    interrupt()
    kept = set(out.glob("_parts/*/windows/*"))
    assert run_label(label.config("out", other, limit=1), []) == 0  # another run goes on with them
    assert set(out.glob("_parts/*/windows/*")) == kept
    assert run_verify(str(out), quiet=True) == 0
    label("out", other, overwrite=True)
    interrupt()
    label("out", path, in_parts=False)
    label("out", other, overwrite=True)
    interrupt()
    write_long(tmp_path / "in", "exact", duration_s=39.0)
    label("out", path)
    clip = rows_of(out, "clips")[0]
    assert clip["duration_s"] == pytest.approx(39.0)


def truncate(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def put_garbage(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    at = int(len(data) * share)
    data[at : at + 3000] = np.random.default_rng(3).bytes(3000)
    path.write_bytes(data)


def flip(path: Path, share: float) -> None:
    """Change one bit: FFmpeg gives what libsndfile refuses, and no sample is lost."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 0x10
    path.write_bytes(data)


def lie(path: Path, ratio: float) -> None:
    """Make a FLAC's header speak of more or fewer samples than there are."""
    data = bytearray(path.read_bytes())
    packed = int.from_bytes(data[18:26], "big")
    samples = packed & ((1 << 36) - 1)
    data[18:26] = (packed - samples + int(samples * ratio)).to_bytes(8, "big")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        slow("exact", lambda path: truncate(path, 0.62)),
        slow("mp3", lambda path: truncate(path, 0.7)),
        slow("vorbis", lambda path: truncate(path, 0.8)),
        ("flac", lambda path: truncate(path, 0.71)),
        slow("flac", lambda path: lie(path, 1.5)),
        slow("flac", lambda path: lie(path, 0.7)),
        slow("mp3", lambda path: put_garbage(path, 0.5)),
        slow("flac", lambda path: flip(path, 0.5)),
        slow("flac", lambda path: flip(path, 0.22)),
    ],
    ids=[
        *("cut wav", "cut mp3", "cut ogg", "cut flac", "long header", "short header", "garbage"),
        *("a bit", "a bit just behind a part"),
    ],
)
def test_damage_costs_what_it_costs_in_one_go(
    label: Label, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    path = write_long(tmp_path / "in", name)
    damage(path)
    whole = label("whole", path, in_parts=False)
    check_same(label("parts", path), whole)


def test_damage_just_behind_a_part_is_not_its_own(tmp_path: Path) -> None:
    path = write_long(tmp_path, "flac")
    flip(path, 0.22)
    warnings = {
        start_s: list(decode(path, start_s=start_s, end_s=start_s + 4.0, part=Part(0, 8_000)))[
            -1
        ].facts.warning
        for start_s in (4.0, 8.0)
    }
    assert warnings[4.0] is None
    assert str(warnings[8.0]).startswith("damaged at 9.6 s (libsndfile: ")


def test_one_damage_is_told_once_whatever_libsndfile_calls_it() -> None:
    one, two = (f"damaged at 8.0 s (libsndfile: {words})" for words in ("lost sync", "unknown"))
    further = "damaged at 12.0 s (libsndfile: lost sync)"
    notes = [one, "", two, "2 damaged packets skipped", further, one]
    assert join_step._once(notes) == [one, "2 damaged packets skipped", further]


def test_parts_behind_lost_frames_are_where_they_were(tmp_path: Path) -> None:
    path = write_long(tmp_path, "flac")
    sound, _ = decode_whole(path)
    put_garbage(path, 0.5)
    whole, facts = decode_whole(path)
    assert len(whole) < len(sound)
    for start_s, end_s in ((16.0, 20.0), (20.0, 24.0), (24.0, 28.0), (36.0, None)):
        pieces = list(decode(path, start_s=start_s, end_s=end_s, part=Part(0, 0)))
        found = np.concatenate([piece.samples for piece in pieces])
        # The part with the damage goes on behind it as the whole file does.
        expected = sound if start_s > 20.0 else whole
        stop = None if end_s is None else round(end_s * RATE_HZ)
        np.testing.assert_allclose(found, expected[round(start_s * RATE_HZ) : stop], atol=2e-6)
        has_damage = start_s in (16.0, 20.0)  # 20.7 s is in what the resampler needs of the first
        assert pieces[-1].facts.warning == (facts.warning if has_damage else None)


@pytest.mark.slow
def test_lost_frames_cost_what_they_cost_in_one_go_up_to_the_end_of_their_part(
    label: Label, tmp_path: Path, joined: list[int]
) -> None:
    path = write_long(tmp_path / "in", "flac")
    sound = label("sound", path, in_parts=False)
    put_garbage(path, 0.5)
    whole, parts = label("whole", path, in_parts=False), label("parts", path)
    assert joined == [10]
    found, as_one, undamaged = (rows_of(out, "windows") for out in (parts, whole, sound))
    assert [row["start_s"] for row in found] == [row["start_s"] for row in undamaged]
    for row, one, other in zip(found, as_one, undamaged, strict=True):
        expected = one if row["start_s"] < 24.0 else other
        np.testing.assert_allclose(row["embedding"], expected["embedding"], atol=2e-3)
    (clip,), (whole_clip,), (sound_clip,) = (rows_of(out, "clips") for out in (parts, whole, sound))
    assert clip["warning"] == whole_clip["warning"]
    assert clip["duration_s"] == sound_clip["duration_s"]
    assert whole_clip["duration_s"] == pytest.approx(sound_clip["duration_s"] - 4096 / 48_000)


@pytest.mark.parametrize(
    "at_s",
    [slow(0.0), slow(3.7), slow(9.2), slow(12.4), slow(15.9999), slow(16.0), 16.3, slow(40.2)],
)
def test_a_sample_that_is_no_number_ends_the_clip_wherever_it_is(
    label: Label, tmp_path: Path, at_s: float
) -> None:
    samples = sweep(40.3, 16_000, 1)
    samples[round(at_s * RATE_HZ)] = np.nan
    path = tmp_path / "nan.wav"
    soundfile.write(path, samples, RATE_HZ, subtype="FLOAT")
    window = {"length_s": 1.0, "hop_s": 0.5, "min_tail": 0.3}
    whole = label("whole", path, in_parts=False, window=window)
    check_same(label("parts", path, window=window), whole)


@pytest.mark.parametrize(
    "seconds",
    [slow(16.0), 16.2, slow(16.5), slow(16.6), slow(16.7), slow(16.9), slow(15.1), slow(17.0)],
)
def test_a_header_that_promises_too_much_loses_no_end(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """The file ends about where one part ends and the next begins."""
    path = tmp_path / "long.wav"
    soundfile.write(path, sweep(24.0, RATE_HZ, 1)[: round(seconds * RATE_HZ)], RATE_HZ)
    window = {"length_s": 1.0, "hop_s": 0.5, "min_tail": 0.3}
    # Parts of four windows, two seconds.
    whole = label("whole", path, in_parts=False, window=window)
    monkeypatch.setattr(HeaderProbe, "read_duration_s", lambda probe, item: 30.0)
    check_same(label("parts", path, window=window), whole)


@pytest.mark.parametrize("kind", ["m4a", "opus"])
def test_a_file_that_is_read_from_its_start_whatever_the_place_is_not_cut(
    label: Label, tmp_path: Path, joined: list[int], kind: str
) -> None:
    path = tmp_path / f"long.{kind}"
    audio_factory.write(path, sweep(40.0, 48_000, 1), 48_000, kind)
    with path.open("rb") as file:
        assert probe_duration_s(file) is None
    label("out", path)
    assert joined == []


def test_a_failure_of_the_first_part_is_the_files(
    label: Label, tmp_path: Path, joined: list[int]
) -> None:
    path = write_long(tmp_path / "in", "exact")
    limit = {"processes": 1, "max_item_s": 20.0}
    whole = label("whole", path, in_parts=False, decode=limit)
    parts = label("parts", path, decode=limit)
    assert joined == [10]
    check_same(parts, whole)
    (row,) = rows_of(parts, "errors")
    assert row["error_type"] == "ItemTooLong"
    first, second = (
        describe_plan(make_plan(label.config(out, path, retry_failed=True)))[-1]
        for out in ("new", "parts")
    )
    assert "cut into parts" in first
    assert second == first
    again = label("parts", path, retry_failed=True)
    assert joined == [10, 10]
    check_same(again, label("right", path, in_parts=False))


def test_the_plan_says_that_a_file_is_cut(label: Label, tmp_path: Path) -> None:
    path = write_long(tmp_path / "in", "mp3")
    (line,) = [
        line for line in describe_plan(make_plan(label.config("out", path))) if "parts" in line
    ]
    assert line.startswith("Of these, 1 long file is cut into parts, about ")
    whole = make_plan(label.config("out", path, in_parts=False))
    assert not [line for line in describe_plan(whole) if "parts" in line]


def test_a_remote_long_file_is_fetched_once(
    label: Label, tmp_path: Path, joined: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_long(tmp_path / "in", "exact")
    memory = fsspec.filesystem("memory")
    memory.pipe("/long/exact.wav", path.read_bytes())
    fetched: list[str] = []
    fetch = kept_files.fetch

    def counting(url: str, *args: Any) -> Any:
        fetched.append(url)
        return fetch(url, *args)

    monkeypatch.setattr(kept_files, "fetch", counting)
    out = label("out", "memory://long/exact.wav")
    assert joined == [10]
    assert fetched == ["memory://long/exact.wav"]
    whole = label("whole", path, in_parts=False)
    assert (
        rows_of(out, "clips")[0]["content_sha256"] == rows_of(whole, "clips")[0]["content_sha256"]
    )
    assert len(rows_of(out, "windows")) == len(rows_of(whole, "windows"))


@pytest.mark.slow
def test_two_workers_share_the_parts(label: Label, tmp_path: Path) -> None:
    path = write_long(tmp_path / "in", "exact")
    whole = label("whole", path, in_parts=False)
    inference = {"precision": "fp32", "device": "cpu", "batch_size": 8, "workers": 2}
    check_same(label("parts", path, inference=inference), whole)


def test_files_of_others_where_parts_lie_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    mine = [
        out / "_parts" / "drawing.step",
        out / "_parts" / ("a" * 20) / "notes.json",
        out / "_parts" / ("a" * 20) / "clips" / "mine.parquet",
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert list_long_files(str(out)) == {}
    assert long_id_of("drawing.step") is None
    remove_long_file(str(out), "a" * 20)
    assert [path.read_text() for path in mine] == ["mine"] * 3
