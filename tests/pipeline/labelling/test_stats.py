"""``earmark stats``: the figures of a whole dataset, however the work is split."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main as cli
from pipeline.config.label import RunConfig
from pipeline.labelling.plan import make_plan
from tests.support import audio_factory
from transforms.decoding.decode import decode_whole
from transforms.features.fbank import FbankSettings, extract_fbank
from transforms.features.fbank_settings import without_normalising
from transforms.features.windows import WindowSettings, cut_windows
from transforms.models.ast.feature_extractor import ASTFeatureExtractor

RATE_HZ = 16_000


@dataclass(frozen=True)
class Said:
    """What the command gave."""

    code: int
    out: str
    err: str

    @property
    def figures(self) -> tuple[float, float]:
        found = re.findall(r"^(?:mean|std) (\S+)$", self.out, re.MULTILINE)
        mean, std = map(float, found)
        return mean, std


Stats = Callable[..., Said]


@pytest.fixture
def stats(capsys: pytest.CaptureFixture[str]) -> Stats:
    def run(*arguments: object) -> Said:
        code = cli.main(["stats", *map(str, arguments)])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for index in range(6):
        samples = audio_factory.noise(0.5 + 3.0 * index, seed=index) * 0.1 * (1 + index)
        audio_factory.write(folder / f"{index}.wav", samples, RATE_HZ)
    return folder


def direct(paths: list[Path], num_frames: int = 1024) -> tuple[float, float]:
    """In one pass over all frames, in float64: nothing of the combiner is used."""
    settings = without_normalising(FbankSettings(num_frames=num_frames))
    windows = WindowSettings.from_seconds(settings)
    frames = []
    for path in paths:
        samples, _ = decode_whole(path)
        for cut in cut_windows(samples, windows):
            features = extract_fbank(cut.samples, settings)
            frames.append(features[: settings.count_frames(cut.samples.size)])
    values = np.concatenate(frames).astype(np.float64)
    return float(values.mean()), float(values.std())


def test_the_figures_are_those_of_all_frames(stats: Stats, clips: Path) -> None:
    expected = direct(sorted(clips.iterdir()))
    said = stats(clips)
    assert said.code == 0
    assert said.figures == pytest.approx(expected, rel=1e-9)
    distance = f"{expected[0] + 4.2677393:+.4f} and {expected[1] - 4.5689974:+.4f} away."
    assert f"AudioSet's are -4.2677393 and 4.5689974: these lie {distance}" in said.out
    assert "From 6 clips, 8 windows, 48 s of audio; padding left out." in said.out


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "units.windows=1"],
        ["--set", "units.windows=2", "--", "--direct_num_workers=2"],
        pytest.param(["--set", "units.windows=3", "--workers", "2"], marks=pytest.mark.slow),
    ],
    ids=["a unit per window", "two threads", "two processes"],
)
def test_any_split_gives_the_same_figures(stats: Stats, clips: Path, options: list[str]) -> None:
    assert stats(clips, *options).figures == pytest.approx(
        direct(sorted(clips.iterdir())), rel=1e-9
    )


def test_a_window_that_is_shorter_is_measured_as_such(stats: Stats, clips: Path) -> None:
    expected = direct(sorted(clips.iterdir()), num_frames=128)
    said = stats(clips, "--set", "model.max_length=128")
    assert said.figures == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_as_original_differs_and_repeats(stats: Stats, clips: Path) -> None:
    plain = stats(clips).figures
    first = stats(clips, "--as-original")
    assert "as the original script computes them." in first.out
    again = stats(clips, "--as-original", "--workers", "2").figures
    assert first.figures == pytest.approx(again, rel=1e-9)
    # Padding counts as 0 there, far above the log of quiet noise.
    assert first.figures[0] > plain[0] + 0.5


def test_transformers_and_label_take_the_written_file(
    stats: Stats, clips: Path, tiny_model: Path, tmp_path: Path
) -> None:
    import transformers

    out = tmp_path / "stats"
    said = stats(clips, "--output", out, "--set", "model.num_mel_bins=128")
    path = out / "preprocessor_config.json"
    assert said.code == 0
    assert f"Written: {path}" in said.out
    assert sorted(out.iterdir()) == [path]
    ours = ASTFeatureExtractor.from_pretrained(out)
    theirs = transformers.ASTFeatureExtractor.from_pretrained(out)
    assert (ours.mean, ours.std) == (theirs.mean, theirs.std) == said.figures
    for place in (out, path):
        config = RunConfig(
            inputs=(str(clips),),
            output=str(tmp_path / "out"),
            model={"name": str(tiny_model), "preprocessor": str(place)},  # type: ignore[arg-type]
        )
        plan = make_plan(config)
        assert (plan.resolved.label.fbank.mean, plan.resolved.label.fbank.std) == said.figures
        assert plan.resolved.run["results"]["mean"] == said.figures[0]


def test_existing_figures_are_not_replaced(stats: Stats, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("mine")
    said = stats(clips, "-o", tmp_path)
    assert said.code == 2
    assert "exists, and would be replaced; give another --output" in said.err
    assert (tmp_path / "preprocessor_config.json").read_text() == "mine"
    assert stats(clips, "-o", tmp_path, "--overwrite").code == 0
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["mean"] < 0


def test_items_that_cannot_be_measured_are_reported(
    stats: Stats, clips: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mix"
    folder.mkdir()
    (folder / "bad.wav").write_bytes(b"no audio" * 100)
    said = stats(folder)
    assert said.code == 2
    assert re.search(r"none of 1 item could be measured; one of them: .*bad\.wav: ", said.err)
    for path in clips.iterdir():
        (folder / path.name).symlink_to(path)
    said = stats(folder)
    assert said.code == 3  # more than --max-failed allows
    assert said.figures == pytest.approx(direct(sorted(clips.iterdir())), rel=1e-9)
    assert re.search(r"1 item could not be measured; one of them: .*bad\.wav: ", said.out)
    assert stats(folder, "--max-failed", "0.5").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no input is given"),
        (["/nowhere/at/all"], "does not exist"),
        (["{clips}", "--window-s", "11"], "window.length_s is 11.0; must be in"),
        (["{clips}", "--top-k", "3"], "No such option: --top-k"),
    ],
)
def test_wrong_usage_is_two(stats: Stats, clips: Path, arguments: list[str], words: str) -> None:
    said = stats(*(text.format(clips=clips) for text in arguments))
    assert said.code == 2
    assert words in said.err


@pytest.mark.parametrize("text", ["{}", '{"mean": "low", "std": 1}'])
def test_a_preprocessor_without_figures_is_refused(
    clips: Path, tiny_model: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    settings = ["--set", f"model.preprocessor={tmp_path}", "--model", str(tiny_model)]
    assert cli.main(["label", str(clips), "-o", str(tmp_path / "out"), *settings]) == 2
    assert "holds no mean; expected a preprocessor_config.json" in capsys.readouterr().err
