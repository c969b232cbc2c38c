"""What a run says at its end, and ``run.json`` and ``verify`` with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.cli import main as cli
from tests.support.audio_factory import encode, noise, write_noise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clips, one of them cut; two files that are no audio; twelve of other kinds."""
    folder = tmp_path / "in"
    for index in range(2):
        write_noise(folder / f"{index}.wav", seed=index)
    whole = encode(noise(2.0), 16_000, "wav")
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    for name in "ab":
        (folder / f"{name}.wav").write_bytes(b"no audio at all")
    for number in range(12):
        (folder / f"x.kind{number:02}").write_bytes(b"")
    return folder


def test_labels_warnings_and_failures_are_summed_up(
    folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "out"
    options = ["-m", str(tiny_model), "--device", "cpu", "--max-failed", "1"]
    assert cli.main(["label", str(folder), "-o", str(out), *options]) == 0
    said = capsys.readouterr().err
    assert re.search(r"other kinds: 1 \.kind00, 1 \.kind01, .* and 4 more kinds \(4\)\.", said)
    labels = json.loads((out / "run.json").read_text())["totals"]["labels"]
    assert sum(labels.values()) == 3
    shown = ", ".join(f"{name} ({count})" for name, count in labels.items())
    assert f"Clips by best label: {shown}." in said
    warned = "1 of 3 clips with a warning: 1 cut_short; see the column warning of clips."
    failed = "Failures by cause: 2 NotAudio (not audio that can be decoded)."
    example = f"  NotAudio, for example {folder}/a.wav: not audio that can be decoded"
    for line in (warned, failed, example):
        assert line in said
    assert "2 of 5 items could not be labelled" in said
    assert "--retry-failed" not in said

    totals = json.loads((out / "run.json").read_text())["totals"]
    assert (totals["counted_clips"], totals["warned_clips"]) == (3, 1)
    assert totals["warnings"] == {"cut_short": 1}
    assert totals["errors"]["NotAudio"]["items"] == 2
    assert cli.main(["verify", str(out)]) == 0
    said = capsys.readouterr().out
    for line in (warned, failed, example):
        assert line in said


def test_another_try_is_recommended_where_it_may_succeed(
    folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = folder / "list.csv"
    listed.write_text("uri\n0.wav\na.wav\nnowhere.wav\n")
    out = folder.parent / "out"
    options = ["-m", str(tiny_model), "--device", "cpu", "--max-failed", "1", "--quiet"]
    assert cli.main(["label", str(listed), "-o", str(out), *options]) == 0
    said = capsys.readouterr().err
    assert "/errors/*.parquet. To retry: --retry-failed" in said
    assert "Failures by cause: 1 FileNotFoundError (not there), 1 NotAudio (not audio" in said
