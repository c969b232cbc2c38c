"""Numbers in words."""

from __future__ import annotations

import pytest

from pipeline.terminal.wording import counted, format_audio, format_duration, percent


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "clip", "0 clips"),
        (1, "clip", "1 clip"),
        (2000, "file or segment", "2,000 files or segments"),
    ],
)
def test_a_number_has_its_noun_in_the_right_form(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


def test_shares_are_whole_percentages() -> None:
    assert (percent(0.0), percent(0.935), percent(1.0)) == ("0 %", "94 %", "100 %")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (187, "3:07"), (7387, "2:03:07")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42, "42 s"), (90, "1.5 min"), (3600, "1.0 h"), (7_200_000, "2,000.0 h")],
)
def test_amounts_of_audio_are_short(seconds: float, text: str) -> None:
    assert format_audio(seconds) == text
