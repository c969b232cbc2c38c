"""Parquet with decoded samples: a struct or two columns, as a WAV file of the same samples."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from tests.support import audio_factory
from tests.support.containers import parquet_bytes
from tests.support.labelling import read_rows, small_config
from tests.support.sources import as_dict, failures, put, read_all

RATE_HZ = 8_000


def decoded(data: bytes) -> tuple[Any, int, str]:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        return file.read(dtype="float32", always_2d=True), file.samplerate, file.subtype


def table(arrays: list[Any], kind: pa.DataType, *, as_struct: bool, **columns: Any) -> pa.Table:
    array = pa.array(arrays, kind)
    rates = pa.array([RATE_HZ] * len(arrays), pa.int32())
    if not as_struct:
        return pa.table({"array": array, "sampling_rate": rates, **columns})
    names = ["path", "array", "sampling_rate"]
    paths = pa.array([f"{number}.wav" for number in range(len(arrays))])
    return pa.table({**columns, "audio": pa.StructArray.from_arrays([paths, array, rates], names)})


@pytest.mark.parametrize("as_struct", [True, False])
@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 400)],
    ids=str,
)
def test_samples_become_a_float_wav_of_the_same_samples(
    folder: str, as_struct: bool, kind: pa.DataType
) -> None:
    clips = [audio_factory.noise(0.05, RATE_HZ, seed=n)[:, 0] * 3 for n in range(3)]
    made = table(
        [clip.tolist() for clip in clips], kind, as_struct=as_struct, label=["x", "y", None]
    )
    url = put(folder, "t.parquet", parquet_bytes(made, 2))
    items = read_all(url)
    assert [one.item.truth for one in items] == [("x",), ("y",), None]
    for number, data in enumerate(as_dict(items).values()):
        samples, rate_hz, subtype = decoded(data)
        assert (rate_hz, subtype) == (RATE_HZ, "FLOAT")
        np.testing.assert_array_equal(samples[:, 0], clips[number])
    assert as_dict(read_all(url)) == as_dict(items)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_channels_are_the_shorter_side(folder: str, is_transposed: bool) -> None:
    clip = audio_factory.tone(0.05, RATE_HZ, num_channels=2)
    rows = (clip if is_transposed else clip.T).tolist()
    made = table([rows], pa.list_(pa.list_(pa.float32())), as_struct=True)
    (data,) = as_dict(read_all(put(folder, "t.parquet", parquet_bytes(made)))).values()
    np.testing.assert_array_equal(decoded(data)[0], clip)


def test_integers_of_16_bits_stay_what_they_are(folder: str) -> None:
    clip = [0, 1, -32768, 32767]
    made = table([clip], pa.list_(pa.int16()), as_struct=False)
    (data,) = as_dict(read_all(put(folder, "t.parquet", parquet_bytes(made)))).values()
    samples, _, subtype = decoded(data)
    assert subtype == "PCM_16"
    assert (samples[:, 0] * 32768).tolist() == clip


@pytest.mark.parametrize(
    ("arrays", "kind", "rate", "message"),
    [
        ([[0, 1]], pa.list_(pa.int64()), 8000, "array of int64; expected floats"),
        ([[0.0, None]], pa.list_(pa.float32()), 8000, "array with nulls"),
        ([[[0.0], [0.0, 1.0]]], pa.list_(pa.list_(pa.float32())), 8000, "different lengths"),
        ([[0.0]], pa.list_(pa.float32()), 0, "sampling_rate = 0; expected a whole number of hertz"),
        ([[0.0]], pa.list_(pa.float32()), None, "sampling_rate = None"),
        ([None], pa.list_(pa.float32()), 8000, "neither bytes nor a path"),
    ],
)
def test_a_row_that_is_no_audio_is_an_error(
    tmp_path: Path, arrays: list[Any], kind: pa.DataType, rate: int | None, message: str
) -> None:
    columns = {"array": pa.array(arrays, kind), "sampling_rate": pa.array([rate], pa.int32())}
    items = read_all(put(str(tmp_path), "t.parquet", parquet_bytes(pa.table(columns))))
    (failure,) = failures(items)
    assert message in failure.message


def test_samples_win_over_a_picture_and_lose_to_encoded_audio(tmp_path: Path) -> None:
    samples = pa.array([[0.5, -0.5]], pa.list_(pa.float32()))
    columns = {"array": samples, "sampling_rate": [RATE_HZ], "image": [b"png"]}
    (data,) = as_dict(
        read_all(put(str(tmp_path), "a.parquet", parquet_bytes(pa.table(columns))))
    ).values()
    assert data.startswith(b"RIFF")
    columns["audio"] = [b"encoded"]
    (data,) = as_dict(
        read_all(put(str(tmp_path), "b.parquet", parquet_bytes(pa.table(columns))))
    ).values()
    assert data == b"encoded"


def test_samples_are_labelled_like_the_file_that_holds_them(
    tmp_path: Path, tiny_model: Path
) -> None:
    from pipeline.labelling.run import run_label

    clip = audio_factory.noise(0.5, RATE_HZ, seed=1)
    audio_factory.write(tmp_path / "a.wav", clip, RATE_HZ, "wav_float")
    made = table([clip[:, 0].tolist()], pa.list_(pa.float32()), as_struct=True)
    put(str(tmp_path), "t.parquet", parquet_bytes(made))
    inputs = (tmp_path / "a.wav", tmp_path / "t.parquet")
    assert run_label(small_config(tiny_model, tmp_path / "out", *inputs), []) == 0
    file, row = read_rows(tmp_path / "out", "clips")
    assert (row["duration_s"], row["sample_rate_hz"], row["channels"]) == (0.5, RATE_HZ, 1)
    for name in ("embedding", "peak_dbfs", "rms_dbfs"):
        np.testing.assert_allclose(row[name], file[name], atol=1e-6)
