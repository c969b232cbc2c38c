"""Rows: labels best first, a clip's aggregate, and the schemas of the contract."""

from __future__ import annotations

from collections.abc import Iterator

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that

from tests.support.unit_factory import (
    FACTS,
    LABELS,
    clip_events,
    failure_event,
    make_item,
    make_prediction,
    make_window,
    row_settings,
)
from transforms.records import (
    ClipRow,
    ItemFailure,
    PendingBatch,
    PendingPrediction,
    Prediction,
    UnitEnd,
    WindowRow,
    WorkUnit,
)
from transforms.results.rows import (
    AssembleRows,
    ClipAggregate,
    _AssembleRowsFn,
    clips_table,
    errors_table,
    labels_array,
    windows_table,
)

ITEM = make_item("/a.wav", truth=("Alpha",), metadata='{"site": 7}')


def test_labels_are_best_first_with_index_id_and_name() -> None:
    labels = labels_array(np.array([[0.1, 0.75, 0.5]], np.float32), LABELS, 2).to_pylist()
    assert labels == [
        [
            {"index": 1, "id": "/m/b", "name": "Beta, loud", "score": 0.75},
            {"index": 2, "id": None, "name": "Gamma", "score": 0.5},
        ]
    ]


def test_equal_scores_keep_the_models_order_and_top_k_may_be_beyond_all() -> None:
    labels = labels_array(np.full((1, 3), 0.5, np.float32), LABELS, 10).to_pylist()[0]
    assert [label["index"] for label in labels] == [0, 1, 2]


@pytest.mark.parametrize(
    ("activation", "scores"),
    [("sigmoid", [0.9, 0.4, 0.2]), ("softmax", [0.5, 0.3, 0.2])],
)
def test_a_clips_scores_are_the_maximum_or_the_mean(activation: str, scores: list[float]) -> None:
    clip = ClipAggregate(ITEM, row_settings(activation=activation))
    # In any order.
    clip.add(make_window(ITEM, 1, num_windows=2), make_prediction([0.1, 0.4, 0.2]))
    assert clip.result("u", 0) is None
    clip.add(make_window(ITEM, 0), make_prediction([0.9, 0.2, 0.2]))
    row = clip.result("u", 0)
    assert isinstance(row, ClipRow)
    assert row.num_windows == 2
    np.testing.assert_allclose(row.scores, scores, rtol=1e-6)


def test_a_clips_embedding_is_weighted_by_real_duration() -> None:
    clip = ClipAggregate(ITEM, row_settings())
    clip.add(make_window(ITEM, 0), make_prediction([0, 0, 0], [1, 1, 1, 1]))
    last = make_window(ITEM, 1, num_windows=2, end_s=12.5)
    clip.add(last, make_prediction([0, 0, 0], [6, 6, 6, 6]))
    row = clip.result("u", 0)
    assert isinstance(row, ClipRow)
    np.testing.assert_allclose(row.embedding, np.full(4, (10 * 1 + 2.5 * 6) / 12.5))
    assert row.embedding.dtype == np.float32


def test_one_failed_window_makes_the_item_a_failure_that_names_it() -> None:
    clip = ClipAggregate(ITEM, row_settings())
    bad = Prediction(np.empty(0, np.float32), np.empty(0, np.float32), "e", "the model gave NaN")
    clip.add(make_window(ITEM, 0), make_prediction([1, 0, 0]))
    clip.add(make_window(ITEM, 1, num_windows=2), bad)
    result = clip.result("u", 3)
    assert isinstance(result, ItemFailure)
    assert result.item_index == 3
    assert result.failure.stage == "inference"
    assert result.failure.message == "window 1 (10.000 to 20.000 s): the model gave NaN"


def test_a_window_without_features_fails_at_fbank() -> None:
    clip = ClipAggregate(ITEM, row_settings())
    clip.add(make_window(ITEM, 0, num_windows=1, error="399 samples"), None)
    result = clip.result("u", 0)
    assert isinstance(result, ItemFailure)
    assert (result.failure.stage, result.failure.error_type) == ("fbank", "FeatureError")


def test_schemas_are_those_of_the_contract() -> None:
    settings = row_settings(store_scores=True)
    events = clip_events("u", 0, ITEM)
    windows = windows_table([e for e in events if isinstance(e, WindowRow)], settings)
    clips = clips_table([e for e in events if isinstance(e, ClipRow)], settings)
    struct = {"index": pa.int32(), "id": pa.string(), "name": pa.string(), "score": pa.float32()}
    labels = pa.list_(pa.struct(struct))
    assert [(field.name, field.type) for field in windows.schema] == [
        ("clip_id", pa.string()),
        ("window_index", pa.int32()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("labels", labels),
        ("embedding", pa.list_(pa.float32(), 4)),
        ("scores", pa.list_(pa.float32(), 3)),
    ]
    assert (
        clips.schema.names
        == (
            "clip_id uri member row start_s end_s duration_s sample_rate_hz channels num_windows "
            "peak_dbfs rms_dbfs clipped_ratio silent_ratio content_sha256 warning truth labels "
            "embedding warning_kinds metadata scores"
        ).split()
    )
    errors = errors_table([failure_event("u", 0, ITEM).failure], "u")
    assert (
        errors.schema.names
        == (
            "clip_id uri member row start_s end_s stage error_type message truth metadata unit_id"
        ).split()
    )


def test_rows_hold_what_the_item_says() -> None:
    row = clips_table(
        [e for e in clip_events("u", 0, ITEM) if isinstance(e, ClipRow)], row_settings()
    )
    values = row.to_pylist()[0]
    assert values["truth"] == ["Alpha"]
    assert values["metadata"] == '{"site": 7}'
    assert (values["start_s"], values["member"], values["warning"]) == (None, None, None)
    assert values["sample_rate_hz"] == FACTS.sample_rate_hz


def test_half_precision_embeddings_are_stored_as_such() -> None:
    settings = row_settings(embedding_dtype="float16")
    events = [e for e in clip_events("u", 0, ITEM) if isinstance(e, WindowRow)]
    assert windows_table(events, settings).schema.field("embedding").type == pa.list_(
        pa.float16(), 4
    )


def pending_elements(num_clips: int) -> Iterator[tuple[object, object]]:
    """Yield clips of two windows, every other one a batch, then a failure and the unit's end."""
    for index in range(num_clips):
        prediction = make_prediction([0, 1, 0])
        pending = PendingPrediction(PendingBatch(lambda: [make_prediction([0, 1, 0])]), 0)
        yield make_window(ITEM, 0, item_index=index), pending if index % 2 else prediction
        yield make_window(ITEM, 1, num_windows=2, item_index=index), prediction
    yield failure_event("u", num_clips, ITEM), None
    yield UnitEnd(WorkUnit("u", "files", (ITEM,)), num_clips + 1), None


def test_rows_that_wait_for_a_device_come_in_their_order_within_the_bundle() -> None:
    def check(actual: list[object]) -> None:
        names = [type(event).__name__ for event in actual]
        clip = ["WindowRow", "WindowRow", "ClipRow"]
        assert names == [*clip * 5, "ItemFailure", "UnitEnd"]
        assert [event.item_index for event in actual if isinstance(event, ClipRow)] == [*range(5)]

    with TestPipeline(runner="FnApiRunner") as pipeline:
        events = pipeline | beam.Create([5]) | beam.FlatMap(pending_elements)
        assert_that(events | AssembleRows(row_settings()), check)


def test_two_batches_are_left_to_the_device() -> None:
    waited: list[int] = []

    def make_batch(index: int) -> PendingBatch:
        def finish() -> list[Prediction]:
            waited.append(index)
            return [make_prediction([0, 1, 0])]

        return PendingBatch(finish)

    step = _AssembleRowsFn(row_settings())
    step.start_bundle()
    for index in range(5):
        window = make_window(ITEM, 0, num_windows=1, item_index=index)
        rows = [*step.process((window, PendingPrediction(make_batch(index), 0)))]
        assert waited == [*range(index - 1)]
        assert len(rows) == (0 if index < 2 else 2)  # a window's and its clip's
    assert len([*step.finish_bundle()]) == 4
    assert waited == [*range(5)]


def test_a_clip_that_misses_windows_at_the_bundles_end_is_an_error() -> None:
    with (
        pytest.raises(RuntimeError, match="lack windows"),
        TestPipeline(runner="FnApiRunner") as pipeline,
    ):
        _ = (
            pipeline
            | beam.Create([(make_window(ITEM, 0), make_prediction([0, 1, 0]))])
            | AssembleRows(row_settings())
        )
