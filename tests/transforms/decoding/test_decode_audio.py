"""The Beam step that decodes: order, bundles that fail, and the pool that steps share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from tests.support.audio_factory import clip, wav
from transforms.decoding import decode_audio
from transforms.decoding.decode_audio import DecodeAudio
from transforms.decoding.settings import DecodeSettings
from transforms.records import EncodedClip, Failure, Item, ItemFailure, UnitEnd, WorkUnit


def read_unit(unit: WorkUnit) -> Iterator[EncodedClip | Failure]:
    for item in unit.items:
        if item.uri == "broken":
            yield Failure(item, "read", "ReadError", "cannot be read")
        else:
            yield EncodedClip(item, data=wav(float(item.uri)))


def make_units(num_units: int) -> list[WorkUnit]:
    uris = ["0.5", "broken", "0.75"]
    return [
        WorkUnit(f"u{n}", "files", tuple(Item(f"u{n}/{uri}", uri) for uri in uris[: n % 4]))
        for n in range(num_units)
    ]


def summary(result: Any) -> tuple[Any, ...]:
    if isinstance(result, UnitEnd):
        return (result.unit.unit_id, "end", result.num_items)
    if isinstance(result, ItemFailure):
        return (result.unit_id, result.item_index, result.failure.message)
    return (result.unit_id, result.item_index, len(result.samples))


def expected_summary(num_units: int) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    contents = [8_000, "cannot be read", 12_000]
    for n in range(num_units):
        rows += [(f"u{n}", index, contents[index]) for index in range(n % 4)]
        rows.append((f"u{n}", "end", n % 4))
    return rows


def test_units_are_emitted_one_behind_and_in_order() -> None:
    step = decode_audio._DecodeFn(DecodeSettings(num_processes=1), read_unit)
    step.setup()
    try:
        for _ in range(2):  # a second bundle finds a clean step
            step.start_bundle()
            out = [
                [summary(r.value) for r in step.process(unit, "window", 17)]
                for unit in make_units(5)
            ]
            out.append([summary(r.value) for r in step.finish_bundle()])
            assert out[0] == []
            assert [row for rows in out for row in rows] == expected_summary(5)
            assert [rows[-1] for rows in out[1:]] == [(f"u{n}", "end", n % 4) for n in range(5)]
        results = [*step.process(make_units(1)[0], "window", 17), *step.finish_bundle()]
        assert [(r.timestamp, r.windows) for r in results] == [(17, ("window",))]
    finally:
        step.teardown()
    assert decode_audio._shared_pools == {}


def test_a_failed_bundle_leaves_no_work_behind() -> None:
    step = decode_audio._DecodeFn(DecodeSettings(num_processes=1), read_unit)
    step.setup()
    try:
        step.start_bundle()
        list(step.process(make_units(4)[3], "window", 17))
        step.start_bundle()
        assert list(step.finish_bundle()) == []
    finally:
        step.teardown()


def test_steps_of_one_process_share_a_pool() -> None:
    settings = DecodeSettings(num_processes=1)
    steps = [decode_audio._DecodeFn(settings, read_unit) for _ in range(3)]
    for step in steps:
        step.setup()
    assert len({id(step._pool) for step in steps}) == 1
    pool = steps[0]._pool
    for step in steps[:2]:
        step.teardown()
    assert pool is not None and len(list(pool.stream("u", [clip("a", wav(0.5))]))) == 1
    steps[2].teardown()
    assert decode_audio._shared_pools == {}


def test_decode_audio_in_a_pipeline() -> None:
    options = beam.options.pipeline_options.PipelineOptions(
        direct_num_workers=3, direct_running_mode="multi_threading"
    )
    with beam.Pipeline(FnApiRunner(), options=options) as pipeline:
        rows = (
            pipeline
            | beam.Create(make_units(9), reshuffle=False)
            | DecodeAudio(DecodeSettings(num_processes=2), read_unit)
            | beam.Map(summary)
        )
        assert_that(rows, equal_to(expected_summary(9)))
    assert decode_audio._shared_pools == {}
