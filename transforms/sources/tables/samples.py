"""Audio that a Parquet table holds as samples: a column ``array``, and one ``sampling_rate``.

It becomes a WAV file in memory, so that everything after reading is the same as for encoded audio.
"""

from __future__ import annotations

import struct as binary
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from transforms.errors import ReadError

ARRAY, RATE = "array", "sampling_rate"
_MAX_BYTES = (1 << 32) - 64  # what a WAV header can count
_PCM, _FLOAT = 1, 3  # formats in a WAV header


def is_array(kind: pa.DataType) -> bool:
    """Return whether a column may hold samples: lists of numbers, or lists of channels."""
    if not _is_list(kind):
        return False
    inner = kind.value_type.value_type if _is_list(kind.value_type) else kind.value_type
    return bool(pa.types.is_floating(inner) or pa.types.is_integer(inner))


def is_samples_struct(kind: pa.DataType) -> bool:
    """Return whether a column is ``struct<array, sampling_rate>``, possibly with other fields."""
    if not pa.types.is_struct(kind):
        return False
    fields = {kind.field(number).name: kind.field(number).type for number in range(len(kind))}
    return is_array(fields.get(ARRAY, pa.null())) and is_rate(fields.get(RATE, pa.null()))


def is_rate(kind: pa.DataType) -> bool:
    """Return whether a column may hold sample rates."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def sample_columns(schema: pa.Schema) -> list[str]:
    """Return the columns of decoded samples: structs, else the one beside a sample rate."""
    structs = [one.name for one in schema if is_samples_struct(one.type)]
    kinds = {one.name: one.type for one in schema}
    is_once = schema.names.count(ARRAY) == schema.names.count(RATE) == 1
    is_pair = is_once and is_array(kinds[ARRAY]) and is_rate(kinds[RATE])
    return sorted(structs, key="audio".__ne__) or ([ARRAY] if is_pair else [])


def join_pair(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Join the two columns of decoded samples into the struct that other tables have."""
    struct = pa.StructArray.from_arrays([batch[ARRAY], batch[RATE]], [ARRAY, RATE])
    position = batch.schema.get_field_index(ARRAY)
    return batch.set_column(position, pa.field(ARRAY, struct.type), struct)


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def wav_of_samples(array: pa.Scalar, sample_rate_hz: object) -> bytes:
    """Return samples as a WAV file: floats as 32-bit floats, 16-bit integers as they are.

    ``array`` has shape (samples,), (channels, samples) or (samples, channels). The same samples
    always give the same bytes, which libsndfile's float WAV does not: it holds the time.
    """
    if not isinstance(sample_rate_hz, int | float) or not float(sample_rate_hz).is_integer():
        raise _bad_rate(sample_rate_hz)
    rate = int(sample_rate_hz)
    if not 1 <= rate < 1 << 31:
        raise _bad_rate(sample_rate_hz)
    samples = _as_numpy(array)
    if samples.dtype == np.int16:
        kind, samples = _PCM, samples.astype("<i2")
    elif samples.dtype.kind == "f":
        kind, samples = _FLOAT, samples.astype("<f4")
    else:
        raise ReadError(f"has {ARRAY} of {samples.dtype}; expected floats in [-1, 1], or int16")
    num_channels = samples.shape[1]
    frame_bytes = num_channels * samples.itemsize
    if samples.nbytes > _MAX_BYTES:
        raise ReadError(f"has {ARRAY} of {samples.nbytes} bytes; at most {_MAX_BYTES} are read")
    form = binary.pack(
        "<HHIIHH", kind, num_channels, rate, rate * frame_bytes, frame_bytes, 8 * samples.itemsize
    )
    chunks = b"fmt " + binary.pack("<I", len(form)) + form
    chunks += b"data" + binary.pack("<I", samples.nbytes)
    size = binary.pack("<I", 4 + len(chunks) + samples.nbytes)
    return b"".join((b"RIFF", size, b"WAVE", chunks, samples.tobytes()))


def _bad_rate(sample_rate_hz: object) -> ReadError:
    return ReadError(f"has {RATE} = {sample_rate_hz!r}; expected a whole number of hertz")


def _as_numpy(array: pa.Scalar) -> npt.NDArray[Any]:
    """Return samples of shape (samples, channels)."""
    values = array.values
    if not _is_list(values.type):
        return _numbers(values)[:, None]
    lengths = values.value_lengths().to_pylist() if len(values) else []
    if len(set(lengths)) != 1 or None in lengths:
        raise ReadError(f"has {ARRAY} with channels of different lengths")
    table = _numbers(values.flatten()).reshape(len(lengths), lengths[0])
    # There are fewer channels than samples.
    return table.T if table.shape[0] < table.shape[1] else table


def _numbers(values: pa.Array) -> npt.NDArray[Any]:
    if values.null_count:
        raise ReadError(f"has {ARRAY} with nulls; expected numbers")
    numbers: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return numbers
