"""``LabelAudio`` for Beam YAML: rows with a URI in, rows of Earmark's tables out.

YAML passes plain values to a transform and learns types from schemas. So the settings are keyword
arguments, and the outputs declare their columns.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import PCollection, Row
from apache_beam.typehints import List, Optional
from apache_beam.typehints.decorators import IOTypeHints
from apache_beam.typehints.row_type import RowTypeConstraint

from transforms.decoding.settings import ChannelName, DecodeSettings
from transforms.errors import InputError
from transforms.inference.backbones import DeviceName, InferenceSettings, Precision
from transforms.label_audio import LabelAudio, make_settings
from transforms.models.ast.checkpoints import ModelOverrides, resolve_model
from transforms.results.rows import clips_schema, errors_schema, windows_schema

SCALARS: Mapping[pa.DataType, type] = {
    pa.string(): str,
    pa.int32(): int,
    pa.int64(): int,
    pa.float32(): float,
    pa.float64(): float,
    pa.float16(): float,
}


class LabelAudioRows(beam.PTransform[PCollection[Row], dict[str, PCollection[Row]]]):
    """Label the audio that rows name; ``LabelAudio`` in a YAML pipeline.

    In: rows with a text column that names an audio file. Out: ``clips``, ``windows`` and
    ``failures``, rows with the columns of ``clips``, ``windows`` and ``errors``.

    Args:
        model: Hub id, local or remote folder, original ``.pth``, or the name of a bundled model.
        uri_field: The column with the URI or path of an audio file.
        top_k: Number of labels in a row, best first.
        scores: Also return the score of every class.
        window_s: Null for the checkpoint's.
        hop_s: Seconds between the starts of two windows; null for the window's length.
        device: A missing device requested by name is an error.
        batch_size: Windows per call; null for the device's default.
        channel: What is labelled of several channels: ``mix``, ``first``, a number from 1,
            ``loudest`` or ``each``.

    Raises:
        ConfigError: A setting does not fit the checkpoint.
        ModelError: The checkpoint does not exist or is damaged.
    """

    def __init__(
        self,
        *,
        model: str,
        uri_field: str = "uri",
        top_k: int = 10,
        scores: bool = False,
        window_s: float | None = None,
        hop_s: float | None = None,
        precision: Precision = "auto",
        device: DeviceName = "auto",
        batch_size: int | None = None,
        channel: ChannelName | int = "mix",
    ) -> None:
        super().__init__()
        self._uri_field = uri_field
        self._settings = make_settings(
            resolve_model(model, ModelOverrides()),
            decode=DecodeSettings(channel=channel),
            inference=InferenceSettings(precision=precision, device=device, batch_size=batch_size),
            window_s=window_s,
            hop_s=hop_s,
            top_k=top_k,
            store_scores=scores,
        )

    def default_type_hints(self) -> IOTypeHints:
        """Return the types of input and output, which Beam checks."""
        outputs = dict.fromkeys(("windows", "clips", "failures"), Row)
        return IOTypeHints.empty().with_input_types(Row).with_output_types(**outputs)

    def expand(self, rows: PCollection[Row]) -> dict[str, PCollection[Row]]:
        """Apply the transform."""
        take_uri = functools.partial(uri_of, field=self._uri_field)
        uris = rows | "Take URI" >> beam.Map(take_uri).with_output_types(str)
        labelled = (uris | "Label" >> LabelAudio(self._settings))._asdict()
        schemas = {
            "windows": windows_schema(self._settings.rows),
            "clips": clips_schema(self._settings.rows),
            "failures": errors_schema(),
        }
        return {
            name: labelled[name]
            | f"Rows of {name}" >> beam.Map(row_of).with_output_types(row_type(schema))
            for name, schema in schemas.items()
        }


def uri_of(row: Any, field: str) -> str:
    """Return the URI in a row, or raise ``InputError`` if the column is missing or not text."""
    value = getattr(row, field, None)
    if not isinstance(value, str):
        raise InputError(
            f"{field} is {value!r} in the row {row!r}; must be the URI of an audio file. "
            "uri_field names the column that holds it."
        )
    return value


def row_type(schema: pa.Schema) -> RowTypeConstraint:
    """Return Beam's type of the rows of a table."""
    return RowTypeConstraint.from_fields([(field.name, _type_of(field)) for field in schema])


def _type_of(field: pa.Field) -> Any:
    kind = _plain_type(field.type)
    return Optional[kind] if field.nullable else kind


def _plain_type(kind: pa.DataType) -> Any:
    if pa.types.is_struct(kind):
        return row_type(pa.schema(list(kind)))
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return List[_plain_type(kind.value_type)]
    return SCALARS[kind]


def row_of(values: Mapping[str, Any]) -> Row:
    """Convert a row of ``LabelAudio``, with the structs in it, to Beam's ``Row``."""
    return Row(**{name: _value_of(value) for name, value in values.items()})


def _value_of(value: Any) -> Any:
    if isinstance(value, dict):
        return row_of(value)
    if isinstance(value, list):
        return [_value_of(item) for item in value]
    return value
