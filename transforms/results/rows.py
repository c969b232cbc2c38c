"""Predictions to rows: the tables' schemas, the aggregate of a clip, and the Arrow arrays.

A clip's scores are the maximum over its windows if classes are independent (sigmoid), and the mean
if they exclude each other (softmax). Its embedding is the mean of its windows' weighted by their
real duration. If any window of a clip fails, the clip could not be labelled: a failure takes the
place of its row, and the sink drops its other windows. If the clip is one channel of an item, the
sink drops its other channels too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from apache_beam.pvalue import PCollection
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue

from transforms.errors import FeatureError, InferenceError
from transforms.models.labels import Label
from transforms.records import (
    ClipFacts,
    ClipRow,
    Failure,
    Item,
    ItemFailure,
    PendingBatch,
    PendingPrediction,
    Prediction,
    UnitEnd,
    UnitEvent,
    Window,
    WindowRow,
)
from transforms.results.commits import OPTIONAL_COLUMNS


@dataclass(frozen=True)
class RowSettings:
    """The content of rows.

    Attributes:
        labels: The model's labels, in its order.
        activation: Decides how a clip's scores are made of its windows'.
        hidden_size: Length of the embedding.
        top_k: How many labels a row lists, best first; all of them if the model has fewer.
        store_scores: Whether rows also store every class's score.
        optional_columns: Those of ``OPTIONAL_COLUMNS`` that rows have.
    """

    labels: tuple[Label, ...]
    activation: Literal["sigmoid", "softmax"]
    hidden_size: int
    top_k: int = 10
    store_scores: bool = False
    embedding_dtype: Literal["float32", "float16"] = "float32"
    optional_columns: tuple[str, ...] = OPTIONAL_COLUMNS


LABELS_TYPE = pa.list_(
    pa.struct({"index": pa.int32(), "id": pa.string(), "name": pa.string(), "score": pa.float32()})
)


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


# Each column of a table, and how it is made of a row.
_Columns = Sequence[tuple[pa.Field, Callable[[Any], object]]]

_WINDOW_COLUMNS: _Columns = (
    (_required("clip_id", pa.string()), lambda row: row.clip_id),
    (_required("window_index", pa.int32()), lambda row: row.window_index),
    (_required("start_s", pa.float64()), lambda row: row.start_s),
    (_required("end_s", pa.float64()), lambda row: row.end_s),
)

# Where the ``item`` of a row lies. A whole file has null times.
_PLACE_COLUMNS: _Columns = (
    (_required("uri", pa.string()), lambda row: row.item.uri),
    (pa.field("member", pa.string()), lambda row: row.item.member),
    (pa.field("row", pa.int64()), lambda row: row.item.row),
    (pa.field("start_s", pa.float64()), lambda row: row.item.start_s),
    (pa.field("end_s", pa.float64()), lambda row: row.item.end_s),
)
_CLIP_ID = _required("clip_id", pa.string())
_TRUTH = (pa.field("truth", pa.list_(pa.string())), lambda row: row.item.truth)
_METADATA = (pa.field("metadata", pa.string()), lambda row: row.item.metadata)

_CLIP_COLUMNS: _Columns = (
    (_CLIP_ID, lambda row: row.clip_id),
    *_PLACE_COLUMNS,
    (_required("duration_s", pa.float64()), lambda row: row.facts.duration_s),
    (_required("sample_rate_hz", pa.int32()), lambda row: row.facts.sample_rate_hz),
    (_required("channels", pa.int32()), lambda row: row.facts.channels),
    (_required("num_windows", pa.int32()), lambda row: row.num_windows),
    (_required("peak_dbfs", pa.float64()), lambda row: row.facts.peak_dbfs),
    (_required("rms_dbfs", pa.float64()), lambda row: row.facts.rms_dbfs),
    (_required("clipped_ratio", pa.float64()), lambda row: row.facts.clipped_ratio),
    (_required("silent_ratio", pa.float64()), lambda row: row.facts.silent_ratio),
    (_required("content_sha256", pa.string()), lambda row: row.facts.content_sha256),
    (pa.field("warning", pa.string()), lambda row: row.facts.warning),
    _TRUTH,
)

# Between a clip's embedding and its metadata, in a result that has them.
_OPTIONAL_CLIP_COLUMNS: _Columns = (
    (pa.field("warning_kinds", pa.list_(pa.string())), lambda row: row.facts.warning_kinds),
)

_ERROR_COLUMNS: _Columns = (
    (_CLIP_ID, lambda failure: failure.item.clip_id),
    *_PLACE_COLUMNS,
    (_required("stage", pa.string()), lambda failure: failure.stage),
    (_required("error_type", pa.string()), lambda failure: failure.error_type),
    (_required("message", pa.string()), lambda failure: failure.message),
    _TRUTH,
    _METADATA,
)
_UNIT_ID = _required("unit_id", pa.string())


def _fields(columns: _Columns) -> list[pa.Field]:
    return [field for field, _ in columns]


def _optional(settings: RowSettings) -> _Columns:
    return [
        column for column in _OPTIONAL_CLIP_COLUMNS if column[0].name in settings.optional_columns
    ]


def _arrays(rows: Sequence[object], columns: _Columns) -> list[pa.Array]:
    return [pa.array([make(row) for row in rows], field.type) for field, make in columns]


def _vector_fields(settings: RowSettings) -> list[pa.Field]:
    """Return the columns that windows and clips share: labels, embedding, and scores if stored."""
    value_type = pa.float16() if settings.embedding_dtype == "float16" else pa.float32()
    fields = [
        pa.field("labels", LABELS_TYPE),
        pa.field("embedding", pa.list_(value_type, settings.hidden_size)),
    ]
    if settings.store_scores:
        fields.append(pa.field("scores", pa.list_(pa.float32(), len(settings.labels))))
    return fields


def windows_schema(settings: RowSettings) -> pa.Schema:
    """Return the schema of ``windows/<unit_id>.parquet``."""
    return pa.schema([*_fields(_WINDOW_COLUMNS), *_vector_fields(settings)])


def clips_schema(settings: RowSettings) -> pa.Schema:
    """Return the schema of ``clips/<unit_id>.parquet``."""
    labels, embedding, *scores = _vector_fields(settings)
    optional = _fields(_optional(settings))
    return pa.schema([*_fields(_CLIP_COLUMNS), labels, embedding, *optional, _METADATA[0], *scores])


def errors_schema() -> pa.Schema:
    """Return the schema of ``errors/<unit_id>.parquet``: a manifest that tries the items again."""
    return pa.schema([*_fields(_ERROR_COLUMNS), _UNIT_ID])


def windows_table(rows: Sequence[WindowRow], settings: RowSettings) -> pa.Table:
    """Convert window rows to a table of ``windows_schema``."""
    predictions = [row.prediction for row in rows]
    vectors = _vector_columns(
        [p.embedding for p in predictions], [p.scores for p in predictions], settings
    )
    columns = [*_arrays(rows, _WINDOW_COLUMNS), *vectors]
    return pa.Table.from_arrays(columns, schema=windows_schema(settings))


def clips_table(rows: Sequence[ClipRow], settings: RowSettings) -> pa.Table:
    """Convert clip rows to a table of ``clips_schema``."""
    labels, embedding, *scores = _vector_columns(
        [row.embedding for row in rows], [row.scores for row in rows], settings
    )
    others = _arrays(rows, [*_optional(settings), _METADATA])
    columns = [*_arrays(rows, _CLIP_COLUMNS), labels, embedding, *others, *scores]
    return pa.Table.from_arrays(columns, schema=clips_schema(settings))


def errors_table(failures: Sequence[Failure], unit_id: str) -> pa.Table:
    """Convert failures to a table of ``errors_schema``."""
    unit_ids = pa.array([unit_id] * len(failures), pa.string())
    columns = [*_arrays(failures, _ERROR_COLUMNS), unit_ids]
    return pa.Table.from_arrays(columns, schema=errors_schema())


def _vector_columns(
    embeddings: Sequence[npt.NDArray[np.floating]],
    scores: Sequence[npt.NDArray[np.float32]],
    settings: RowSettings,
) -> list[pa.Array]:
    score_matrix = _stack(scores, len(settings.labels), np.dtype(np.float32))
    columns = [
        labels_array(score_matrix, settings.labels, settings.top_k),
        _lists(_stack(embeddings, settings.hidden_size, np.dtype(settings.embedding_dtype))),
    ]
    return [*columns, _lists(score_matrix)] if settings.store_scores else columns


def _lists(matrix: npt.NDArray[np.floating]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def _stack(
    vectors: Sequence[npt.NDArray[np.floating]], width: int, dtype: np.dtype[np.floating]
) -> npt.NDArray[np.floating]:
    return np.stack(vectors).astype(dtype) if vectors else np.empty((0, width), dtype)


def labels_array(
    scores: npt.NDArray[np.floating], labels: Sequence[Label], top_k: int
) -> pa.ListArray:
    """Return the best labels of each row, best first; equal scores in the model's own order.

    ``scores`` has shape (num_rows, num_labels), with ``labels`` in the model's order.
    """
    k = min(top_k, len(labels))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)  # (num_rows, k)
    flat = pa.array(best.reshape(-1))
    structs = pa.StructArray.from_arrays(
        [
            flat,
            pa.array([label.id for label in labels], pa.string()).take(flat),
            pa.array([label.name for label in labels], pa.string()).take(flat),
            pa.array(np.take_along_axis(scores, best, axis=1).reshape(-1).astype(np.float32)),
        ],
        fields=list(LABELS_TYPE.value_type),
    )
    offsets = pa.array(np.arange(len(scores) + 1, dtype=np.int32) * k)
    return pa.ListArray.from_arrays(offsets, structs)


class ClipAggregate:
    """Collects a clip's windows, in any order, until it is complete."""

    def __init__(self, item: Item, settings: RowSettings, channel: int | None = None) -> None:
        self._item = item
        self._channel = channel
        self._activation = settings.activation
        self._embedding = np.zeros(settings.hidden_size, np.float64)
        self._embedding_dtype = np.dtype(settings.embedding_dtype)
        self._scores = np.zeros(len(settings.labels), np.float64)
        self._duration_s = 0.0
        self._num_seen = 0
        self._num_windows: int | None = None
        self._facts: ClipFacts | None = None
        self._failure: Failure | None = None

    def add(self, window: Window, prediction: Prediction | None) -> None:
        """Add a window; a window without features has an error and no prediction."""
        self._num_seen += 1
        if window.facts is not None:
            self._facts, self._num_windows = window.facts, window.num_windows
        if prediction is None or prediction.error is not None:
            self._failure = self._failure or _window_failure(window, prediction)
            return
        duration_s = window.end_s - window.start_s
        self._duration_s += duration_s
        self._embedding += duration_s * prediction.embedding.astype(np.float64)
        if self._activation == "sigmoid":
            # Scores lie in [0, 1], so zeros are a neutral start for the maximum.
            np.maximum(self._scores, prediction.scores, out=self._scores)
        else:
            self._scores += prediction.scores

    def result(self, unit_id: str, item_index: int) -> ClipRow | ItemFailure | None:
        """Return the clip's row or failure once it is complete, else None."""
        if self._facts is None or self._num_windows is None or self._num_seen < self._num_windows:
            return None
        if self._failure is not None:
            return ItemFailure(unit_id, item_index, self._failure, self._channel)
        scores = self._scores if self._activation == "sigmoid" else self._scores / self._num_seen
        return ClipRow(
            unit_id=unit_id,
            item_index=item_index,
            item=self._item,
            facts=self._facts,
            num_windows=self._num_windows,
            embedding=(self._embedding / self._duration_s).astype(self._embedding_dtype),
            scores=scores.astype(np.float32),
            channel=self._channel,
        )


def _window_failure(window: Window, prediction: Prediction | None) -> Failure:
    kind = FeatureError if prediction is None else InferenceError
    error = window.error if prediction is None else prediction.error
    channel = "" if window.channel is None else f"channel {window.channel}, "
    return Failure(
        item=window.item,
        stage=kind.stage,
        error_type=kind.__name__,
        message=(
            f"{channel}window {window.window_index} "
            f"({window.start_s:.3f} to {window.end_s:.3f} s): {error}"
        ),
    )


# Unit, item and channel.
_ClipKey = tuple[str, int, int | None]

KeyedPrediction = tuple[Window | ItemFailure | UnitEnd, Prediction | PendingPrediction | None]

# Batches that a device may have: one that it computes, and the next.
BATCHES_AHEAD = 2


@beam.typehints.with_input_types(KeyedPrediction)
@beam.typehints.with_output_types(UnitEvent)
class AssembleRows(beam.PTransform[PCollection[KeyedPrediction], PCollection[UnitEvent]]):
    """Turn predictions, keyed by their windows, into rows; everything else passes through.

    In: ``(Window | ItemFailure | UnitEnd, Prediction | PendingPrediction | None)``. Out:
    ``WindowRow``, ``ClipRow`` after the last of its windows, ``ItemFailure`` and ``UnitEnd``, in
    the order of the input. What waits for a device comes later, but within its bundle.
    """

    def __init__(self, settings: RowSettings) -> None:
        super().__init__()
        self._settings = settings

    def expand(self, predictions: PCollection[KeyedPrediction]) -> PCollection[UnitEvent]:
        """Apply the transform."""
        # Explicit type hints: Beam cannot read postponed annotations.
        step = beam.ParDo(_AssembleRowsFn(self._settings)).with_output_types(UnitEvent)
        rows: PCollection[UnitEvent] = predictions | "Assemble each clip" >> step
        return rows


class _AssembleRowsFn(beam.DoFn):
    def __init__(self, settings: RowSettings) -> None:
        self._settings = settings
        self._open: dict[_ClipKey, ClipAggregate] = {}
        self._failed: set[_ClipKey] = set()
        self._waiting: deque[KeyedPrediction] = deque()
        self._batches: deque[PendingBatch] = deque()  # awaited, oldest first

    def start_bundle(self) -> None:
        self._open = {}
        self._failed = set()
        self._waiting.clear()
        self._batches.clear()

    def process(self, element: KeyedPrediction) -> Iterator[UnitEvent]:
        _, prediction = element
        self._waiting.append(element)
        if isinstance(prediction, PendingPrediction) and not self._is_awaited(prediction):
            self._batches.append(prediction.batch)
            if len(self._batches) > BATCHES_AHEAD:
                self._batches.popleft()
        yield from self._assemble_all()

    def _assemble_all(self) -> Iterator[UnitEvent]:
        """Yield everything before the first window whose batch is still being computed."""
        while self._waiting and not self._is_awaited(self._waiting[0][1]):
            event, prediction = self._waiting.popleft()
            if isinstance(prediction, PendingPrediction):
                prediction = prediction.wait()
            yield from self._assemble(event, prediction)

    def _is_awaited(self, prediction: Prediction | PendingPrediction | None) -> bool:
        return isinstance(prediction, PendingPrediction) and any(
            prediction.batch is batch for batch in self._batches
        )

    def _assemble(
        self, event: Window | ItemFailure | UnitEnd, prediction: Prediction | None
    ) -> Iterator[UnitEvent]:
        if isinstance(event, Window):
            # An item may fail after some of its windows passed; others may still be in a batch.
            if (event.unit_id, event.item_index, event.channel) not in self._failed:
                yield from self._add(event, prediction)
            return
        if isinstance(event, ItemFailure):
            key = (event.unit_id, event.item_index, event.channel)
            self._failed.add(key)
            self._open.pop(key, None)
        yield event

    def _add(self, window: Window, prediction: Prediction | None) -> Iterator[UnitEvent]:
        key = (window.unit_id, window.item_index, window.channel)
        clip = self._open.get(key)
        if clip is None:
            clip = ClipAggregate(window.item, self._settings, window.channel)
            self._open[key] = clip
        clip.add(window, prediction)
        if prediction is not None and prediction.error is None:
            yield WindowRow(
                window.unit_id,
                window.item_index,
                window.clip_id,
                window.window_index,
                window.start_s,
                window.end_s,
                prediction,
                window.channel,
            )
        result = clip.result(window.unit_id, window.item_index)
        if result is not None:
            del self._open[key]
            yield result

    def finish_bundle(self) -> Iterator[WindowedValue]:
        self._batches.clear()
        for event in self._assemble_all():
            # Beam's windows, not ours; batches run ahead only if there is only the global one.
            yield GlobalWindows.windowed_value(event)
        if self._open:
            raise RuntimeError(
                f"{len(self._open)} clips lack windows at the end of a bundle; the first "
                f"is item {next(iter(self._open))}: the stage was split; see graph.py."
            )
