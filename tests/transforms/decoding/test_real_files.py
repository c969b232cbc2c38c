"""The small files of the kinds that archives hold, in ``shared/data/real_files``."""

from __future__ import annotations

from pathlib import Path

import pytest

from transforms.decoding.decode import decode_whole
from transforms.errors import DecodeError

WHOLE = {
    "01_id3v2_before.wav": 3.0,
    "01_id3v2_before.aiff": 3.0,
    "01_id3v2_before.m4a": 1.02,
    "01_id3v2_before.wv": 1.0,
    "02_flac_two_concatenated_3s.flac": 6.0,
    "06_ac3_spdif.wav": 3.0,
    "06_dts_spdif.wav": 3.0,
    "09_false_alarm_itunsmpb_16k.m4a": 2.94,
    "09_false_alarm_mp3_in.wav": 3.03,
    "09_false_alarm_id3v1.wv": 3.0,
    "09_false_alarm_zero_padded.mp3": 3.03,
    "09_id3v1_last_frame_lost.ac3": 3.03,
}
ODD = {
    "02_flac_total_1s_of_3s.flac": (
        3.0,
        "header_wrong",
        "the header declares 1.0 s; there are 3.0 s of audio",
    ),
    "03_flac_rate_change.flac": (
        6.0,
        "format_changes",
        "at 3.0 s the audio changes from 16000 Hz, 1 channel",
    ),
    "03_flac_channels_change.flac": (6.0, "format_changes", "to 16000 Hz, 2 channels"),
    "07_cut.sph": (1.79, "cut_short", "decoded 1.8 of 3.0 s"),
    "07_cut.voc": (0.6, "cut_short", "the file is cut short: 53047 of 53388 bytes"),
    "10_junk_before.flac": (3.0, "extra_bytes", "1000 bytes in front of the audio skipped"),
    "10_junk_before.ogg": (3.0, "extra_bytes", "1000 bytes in front of the audio skipped"),
}
FAILED = {
    "04_empty_then_id3.wav": ("NoSamples", "no audio in it"),
    "04_empty_then_list.wav": ("NoSamples", "no audio in it"),
    "05_cenc_pcm.mov": ("Encrypted", "without its key"),
    "05_cenc_opus.mp4": ("Encrypted", "without its key"),
    "05_cenc_aac.mp4": ("Encrypted", "without its key"),
    "11_html.mp3": ("NotAudio", "an HTML page"),
    "11_lfs.wav": ("NotAudio", "git lfs pull"),
}


@pytest.fixture(scope="module")
def real_files(shared_data: Path) -> Path:
    return shared_data / "real_files"


def test_every_file_has_its_row(real_files: Path) -> None:
    names = {path.name for path in real_files.iterdir()} - {"README.md"}
    assert names == {*WHOLE, *ODD, *FAILED}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_file_has_no_warning(name: str, real_files: Path) -> None:
    _, facts = decode_whole(real_files / name)
    assert facts.warning is None
    assert facts.duration_s == pytest.approx(WHOLE[name], abs=0.01)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_read_to_its_end_with_a_warning(name: str, real_files: Path) -> None:
    _, facts = decode_whole(real_files / name)
    duration_s, kind, words = ODD[name]
    assert words in str(facts.warning)
    assert facts.warning_kinds == (kind,)
    assert facts.duration_s == pytest.approx(duration_s, abs=0.01)


@pytest.mark.parametrize("name", FAILED)
def test_what_cannot_be_decoded_says_what_it_is(name: str, real_files: Path) -> None:
    error_type, words = FAILED[name]
    with pytest.raises(DecodeError, match=words) as error:
        decode_whole(real_files / name)
    assert error.value.error_type == error_type
