"""``ASTFeatureExtractor`` against transformers' own, and the calls that it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as hf_module,
)

from tests.support.fake_hub import COMMIT, FakeHub, serve_hub, use_hub
from tests.transforms.features.signals import RATE_HZ, noise, read_recordings, tone, voice
from tests.transforms.models.ast.factory import edit_json
from transforms.errors import ConfigError, FeatureError, ModelError
from transforms.features.fbank import extract_fbank
from transforms.features.fbank_settings import FbankSettings, without_normalising
from transforms.models.ast.feature_extractor import ASTFeatureExtractor
from transforms.records import FloatArray

SETTINGS = FbankSettings()


@pytest.fixture(scope="session")
def recordings(esc10: list[Path]) -> list[FloatArray]:
    return read_recordings(esc10[::20])


def test_extractor_equals_transformers_bit_for_bit(recordings: list[FloatArray]) -> None:
    batch = [*recordings, voice(1000), noise(164_080)]
    expected = hf_module.ASTFeatureExtractor()(batch, sampling_rate=RATE_HZ, return_tensors="np")
    found = ASTFeatureExtractor()(batch, sampling_rate=RATE_HZ, return_tensors="np")
    np.testing.assert_array_equal(found.input_values, expected.input_values)
    np.testing.assert_array_equal(extract_fbank(batch[0], SETTINGS), expected.input_values[0])


def test_other_checkpoint_against_transformers() -> None:
    arguments = {"max_length": 128, "mean": -6.845978, "std": 5.5654526}
    expected = hf_module.ASTFeatureExtractor(**arguments)(tone(16_000), sampling_rate=RATE_HZ)
    found = ASTFeatureExtractor(**arguments)(tone(16_000), sampling_rate=RATE_HZ)
    assert found.input_values[0].shape == (128, 128)
    np.testing.assert_array_equal(found["input_values"][0], expected["input_values"][0])


SINGLE_FORMS: dict[str, Callable[[FloatArray], object]] = {
    "float32 array": lambda x: x,
    "float64 array": lambda x: x.astype(np.float64),
    "list of floats": lambda x: x.tolist(),
    "tuple of floats": lambda x: tuple(x.tolist()),
    "list of numpy scalars": list,
    "float32 tensor": torch.from_numpy,
    "float64 tensor": lambda x: torch.from_numpy(x).double(),
    "tensor with gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "batch of one": lambda x: [x],
    "batch of one list": lambda x: [x.tolist()],
    "batch of one tensor": lambda x: [torch.from_numpy(x)],
}


@pytest.mark.parametrize("form", SINGLE_FORMS)
def test_every_form_of_a_clip_has_the_same_features(form: str) -> None:
    samples = voice(2000)
    features = ASTFeatureExtractor()(SINGLE_FORMS[form](samples), sampling_rate=RATE_HZ)
    assert len(features["input_values"]) == 1
    np.testing.assert_array_equal(features.input_values[0], extract_fbank(samples, SETTINGS))


INTEGER_FORMS: dict[str, Callable[[np.ndarray], object]] = {
    "int16 array": lambda x: x,
    "int32 array": lambda x: x.astype(np.int32),
    "int64 array": lambda x: x.astype(np.int64),
    "list of integers": lambda x: x.tolist(),
    "int16 tensor": torch.from_numpy,
    "batch of one int16 array": lambda x: [x],
}


@pytest.mark.parametrize("form", INTEGER_FORMS)
def test_integers_are_scaled_from_16_bit(form: str) -> None:
    integers = np.concatenate(([-32768, 32767], voice(2000) * 32767)).astype(np.int16)
    features = ASTFeatureExtractor()(INTEGER_FORMS[form](integers), sampling_rate=RATE_HZ)
    expected = extract_fbank((integers / 32768.0).astype(np.float32), SETTINGS)
    np.testing.assert_array_equal(features.input_values[0], expected)


@pytest.mark.parametrize(
    "halve", [lambda x: x.astype(np.float16), lambda x: torch.from_numpy(x).bfloat16()]
)
def test_half_precision_is_widened(halve: Callable[[FloatArray], object]) -> None:
    samples = np.round(voice(2000) * 64).astype(np.float32) / 64  # exact in both half types
    features = ASTFeatureExtractor()(halve(samples), sampling_rate=RATE_HZ)
    np.testing.assert_array_equal(features.input_values[0], extract_fbank(samples, SETTINGS))


def test_a_ragged_list_is_a_batch_in_order() -> None:
    clips = [voice(2000), torch.from_numpy(noise(400)), tone(16_000).tolist()]
    found = ASTFeatureExtractor()(clips, sampling_rate=RATE_HZ, return_tensors="pt")
    assert isinstance(found["input_values"], torch.Tensor)
    assert found.input_values.shape == (3, 1024, 128)
    for clip, features in zip(clips, found.input_values, strict=True):
        expected = extract_fbank(np.asarray(clip, np.float32), SETTINGS)
        np.testing.assert_array_equal(features.numpy(), expected)


def test_forms_of_the_result() -> None:
    extractor = ASTFeatureExtractor()
    as_list = extractor(voice(2000), sampling_rate=RATE_HZ)["input_values"]
    as_array = extractor(voice(2000), sampling_rate=RATE_HZ, return_tensors="np")["input_values"]
    as_tensor = extractor(voice(2000), sampling_rate=RATE_HZ, return_tensors="pt")
    assert isinstance(as_list, list)
    assert as_array.shape == (1, 1024, 128)
    assert {**as_tensor}.keys() == {"input_values"}  # model(**features) works
    assert as_tensor.to(torch.float64)["input_values"].dtype == torch.float64
    np.testing.assert_array_equal(as_list[0], as_array[0])


def test_without_normalising() -> None:
    extractor = ASTFeatureExtractor(do_normalize=False)
    features = extractor(voice(2000), sampling_rate=RATE_HZ).input_values[0]
    np.testing.assert_array_equal(
        features, extract_fbank(voice(2000), without_normalising(SETTINGS))
    )


STEREO = np.zeros((2, 1000), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling_rate": 44_100}, "sampling_rate is 44100; the model was trained at 16000 Hz"),
        ({"raw_speech": STEREO}, r"raw_speech has the shape \(2, 1000\)"),
        ({"raw_speech": STEREO.T}, r"raw_speech has the shape \(1000, 2\)"),
        ({"raw_speech": STEREO[:1]}, r"raw_speech has the shape \(1, 1000\)"),
        ({"raw_speech": STEREO[None]}, r"raw_speech has the shape \(1, 2, 1000\)"),
        ({"raw_speech": torch.zeros(2, 1000)}, r"raw_speech has the shape \(2, 1000\)"),
        ({"raw_speech": [voice(500), STEREO]}, r"raw_speech\[1\] has the shape \(2, 1000\)"),
        ({"raw_speech": (voice(500), RATE_HZ)}, r"raw_speech\[1\] has the shape \(\)"),
        ({"raw_speech": np.float32(0.5)}, r"raw_speech has the shape \(\)"),
        ({"raw_speech": [0.1, [0.2, 0.3]]}, "raw_speech is not a vector of numbers"),
        ({"raw_speech": ["dog.wav"] * 500}, "must be floats"),
        ({"raw_speech": np.zeros(500, np.uint8)}, "uint8; must be floats .* or 16-bit integers"),
        ({"raw_speech": np.zeros(500, np.int8)}, "int8; must be floats .* or 16-bit integers"),
        ({"raw_speech": np.zeros(500, bool)}, "bool; must be floats"),
        ({"raw_speech": np.zeros(500, complex)}, "complex128; must be floats"),
        ({"return_tensors": "tf"}, "return_tensors is 'tf'; must be None, 'np' or 'pt'"),
        ({"max_length": 512, "padding": True}, r"unknown arguments \['max_length', 'padding'\]"),
    ],
)
def test_a_wrong_call_is_refused(arguments: dict, message: str) -> None:
    call = {"raw_speech": voice(500), "sampling_rate": RATE_HZ, **arguments}
    with pytest.raises(ValueError, match=message):
        ASTFeatureExtractor()(**call)


@pytest.mark.parametrize(
    ("raw_speech", "message"),
    [
        ([], "raw_speech: no samples"),
        (np.zeros(0), "raw_speech: no samples"),
        ([voice(500), np.zeros(0)], r"raw_speech\[1\]: no samples"),
        (np.zeros(399), "raw_speech: 399 samples; at least 400"),
        (np.full(500, np.nan), "raw_speech: 500 of 500 samples are NaN"),
        (np.full(500, 1e300), "raw_speech: 500 of 500 samples are NaN or infinite"),
        (np.full(500, np.inf, np.float16), "raw_speech: 500 of 500"),
        (np.full(500, 40_000), "integer samples reach from 40000 to 40000; 16-bit audio ends"),
        (np.full(500, 32_768), "integer samples reach from 32768 to 32768"),
        (np.full(500, -32_769), "integer samples reach from -32769 to -32769"),
        ([voice(500), [10**6] * 500], r"raw_speech\[1\]: integer samples reach"),
    ],
)
def test_samples_without_features_are_refused(raw_speech: object, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        ASTFeatureExtractor()(raw_speech, sampling_rate=RATE_HZ)


def test_a_missing_rate_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    ASTFeatureExtractor()(voice(500))
    assert "sampling_rate was not given" in caplog.text


def test_long_audio_is_cut_as_in_transformers_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = noise(164_080 + 160)
    found = ASTFeatureExtractor()(samples, sampling_rate=RATE_HZ).input_values[0]
    assert "raw_speech has 1025 frames; only the first 1024 are used" in caplog.text
    expected = hf_module.ASTFeatureExtractor()(samples, sampling_rate=RATE_HZ)["input_values"][0]
    np.testing.assert_array_equal(found, expected)


def test_samples_beyond_the_last_frame_are_cut_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ASTFeatureExtractor()(noise(164_080 + 159), sampling_rate=RATE_HZ)
    assert caplog.text == ""


def test_floats_of_16_bit_size_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    ASTFeatureExtractor()(voice(500) * np.float32(32768), sampling_rate=RATE_HZ)
    assert "floats must be in [-1, 1]" in caplog.text


def test_attributes_and_dict_are_those_of_transformers() -> None:
    ours, theirs = ASTFeatureExtractor(), hf_module.ASTFeatureExtractor()
    assert ours.to_dict() == theirs.to_dict()
    assert ours.settings == SETTINGS
    assert repr(ours).startswith("ASTFeatureExtractor {")


@pytest.mark.parametrize(
    "arguments",
    [{"padding_value": 1.0}, {"return_attention_mask": True}, {"padding_side": "left"}],
)
def test_arguments_without_effect_are_a_warning(
    arguments: dict, caplog: pytest.LogCaptureFixture
) -> None:
    ASTFeatureExtractor(**arguments)
    assert "have no effect" in caplog.text


def test_out_of_range_arguments_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="std of the features is 0"):
        ASTFeatureExtractor(std=0)


CHANGED = {"max_length": 128, "mean": -6.8, "std": 5.5, "do_normalize": False, "num_mel_bins": 64}


def test_what_is_saved_loads_here_and_in_transformers(tmp_path: Path) -> None:
    saved = ASTFeatureExtractor(**CHANGED)
    paths = saved.save_pretrained(tmp_path / "model")
    assert paths == [str(tmp_path / "model" / "preprocessor_config.json")]
    loaded = ASTFeatureExtractor.from_pretrained(tmp_path / "model")
    assert loaded.to_dict() == saved.to_dict()
    theirs = hf_module.ASTFeatureExtractor.from_pretrained(tmp_path / "model")
    assert theirs.to_dict() == saved.to_dict()


def test_what_transformers_saves_loads_here(tmp_path: Path) -> None:
    theirs = hf_module.ASTFeatureExtractor(**CHANGED)
    theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "preprocessor_config.json", unknown_to_us=1)
    loaded = ASTFeatureExtractor.from_pretrained(str(tmp_path), max_length=256)
    assert loaded.to_dict() == {**theirs.to_dict(), "max_length": 256}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no preprocessor_config.json"),
        ("{", "preprocessor_config.json cannot be read as JSON"),
        ("[]", "preprocessor_config.json holds a list; expected a JSON object"),
        (
            json.dumps({"feature_extractor_type": "WhisperFeatureExtractor"}),
            "is 'WhisperFeatureExtractor'; expected ASTFeatureExtractor",
        ),
    ],
)
def test_a_folder_without_an_ast_extractor_is_refused(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        ASTFeatureExtractor.from_pretrained(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    """A hub on this machine whose model has a feature extractor and nothing else."""
    ASTFeatureExtractor(**CHANGED).save_pretrained(tmp_path / "hub")
    with serve_hub(tmp_path / "hub") as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        yield hub


def test_a_downloaded_extractor_is_found_without_a_network(hub: type[FakeHub]) -> None:
    before = ASTFeatureExtractor.from_pretrained("org/tiny")
    hub.status = 503
    after = ASTFeatureExtractor.from_pretrained(f"org/tiny@{COMMIT}")
    assert after.to_dict() == before.to_dict()
