"""Units, windows and rows for tests of the steps after the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transforms.models.labels import Label
from transforms.records import (
    ClipFacts,
    ClipRow,
    Failure,
    Item,
    ItemFailure,
    Prediction,
    UnitEnd,
    UnitEvent,
    Window,
    WindowRow,
    WorkUnit,
)
from transforms.results.commits import Commit
from transforms.results.rows import RowSettings
from transforms.results.write_units import CommitSettings, OpenUnit
from transforms.storage import writing

HIDDEN_SIZE = 4
LABELS = (Label(0, "/m/a", "Alpha"), Label(1, "/m/b", "Beta, loud"), Label(2, None, "Gamma"))
FACTS = ClipFacts(
    duration_s=12.0,
    sample_rate_hz=44_100,
    channels=2,
    peak_dbfs=-1.0,
    rms_dbfs=-20.0,
    clipped_ratio=0.0,
    silent_ratio=0.25,
    content_sha256="ab" * 32,
)


def row_settings(**changes: object) -> RowSettings:
    defaults: dict[str, object] = {
        "labels": LABELS,
        "activation": "sigmoid",
        "hidden_size": HIDDEN_SIZE,
        "top_k": 2,
    }
    return RowSettings(**{**defaults, **changes})  # type: ignore[arg-type]


def make_item(name: str, **changes: object) -> Item:
    defaults: dict[str, object] = {"clip_id": name, "uri": name, "size": 10, "version": "v1"}
    return Item(**{**defaults, **changes})  # type: ignore[arg-type]


def make_prediction(
    scores: Sequence[float], embedding: Sequence[float] = (1, 2, 3, 4)
) -> Prediction:
    return Prediction(
        np.asarray(embedding, np.float32), np.asarray(scores, np.float32), "torch cpu fp32"
    )


def make_window(
    item: Item,
    index: int = 0,
    *,
    num_windows: int | None = None,
    unit_id: str = "u",
    **changes: object,
) -> Window:
    """Return a window of 10 s; with ``num_windows``, the last one of its clip."""
    defaults: dict[str, object] = {
        "unit_id": unit_id,
        "item_index": 0,
        "item": item,
        "window_index": index,
        "start_s": 10.0 * index,
        "end_s": 10.0 * (index + 1),
        "data": None,
        "facts": FACTS if num_windows else None,
        "num_windows": num_windows,
    }
    return Window(**{**defaults, **changes})  # type: ignore[arg-type]


def clip_events(unit_id: str, index: int, item: Item, num_windows: int = 1) -> list[UnitEvent]:
    """Return the rows of a labelled clip."""
    prediction = make_prediction([0.1 * (index % 9), 0.5, 0.9], np.full(HIDDEN_SIZE, index))
    rows: list[UnitEvent] = [
        WindowRow(unit_id, index, item.clip_id, n, 10.0 * n, 10.0 * n + 10, prediction)
        for n in range(num_windows)
    ]
    return [
        *rows,
        ClipRow(unit_id, index, item, FACTS, num_windows, prediction.embedding, prediction.scores),
    ]


def failure_event(unit_id: str, index: int, item: Item) -> ItemFailure:
    return ItemFailure(unit_id, index, Failure(item, "decode", "DecodeError", "not audio"))


def file_unit(unit_id: str, num_items: int, **changes: object) -> WorkUnit:
    items = tuple(make_item(f"/audio/{unit_id}-{index}.wav") for index in range(num_items))
    return WorkUnit(unit_id=unit_id, kind="files", items=items, **changes)  # type: ignore[arg-type]


def unit_events(
    unit: WorkUnit, failed: Sequence[int] = (), num_windows: int = 2
) -> list[UnitEvent]:
    """Return all events of a unit of files, as the sink receives them."""
    events: list[UnitEvent] = []
    for index, item in enumerate(unit.items):
        if index in failed:
            events.append(failure_event(unit.unit_id, index, item))
        else:
            events += clip_events(unit.unit_id, index, item, num_windows)
    return [*events, UnitEnd(unit, len(unit.items))]


def commit_unit(
    output: str,
    unit_id: str,
    clips: Sequence[tuple[Item, Sequence[tuple[float, float, Sequence[float]]]]],
    replaces: Sequence[str] = (),
    failures: Sequence[Failure] = (),
    facts: ClipFacts = FACTS,
) -> None:
    """Commit a unit of clips, given as item and windows (start, end, scores), and of failures."""
    settings = CommitSettings(output, "run", "f" * 64, "m" * 64, row_settings())
    unit = OpenUnit(settings, Path(writing.staging_path(output, "run")), unit_id)
    for index, (item, windows) in enumerate(clips):
        for number, (start_s, end_s, scores) in enumerate(windows):
            prediction = make_prediction(scores)
            unit.add(WindowRow(unit_id, index, item.clip_id, number, start_s, end_s, prediction))
        whole = make_prediction(windows[0][2])
        unit.add(ClipRow(unit_id, index, item, facts, len(windows), whole.embedding, whole.scores))
    for index, failure in enumerate(failures, start=len(clips)):
        unit.add(ItemFailure(unit_id, index, failure))
    items = (*(item for item, _ in clips), *(failure.item for failure in failures))
    unit.add(UnitEnd(WorkUnit(unit_id, "files", items, replaces=tuple(replaces)), len(items)))
    unit.commit()


def commit_events(settings: CommitSettings, events: Sequence[UnitEvent]) -> Commit:
    """Do what the sink does; check that the unit is complete only at the last event."""
    (end,) = (event for event in events if isinstance(event, UnitEnd))
    staging = Path(writing.staging_path(settings.output, settings.run_id))
    unit = OpenUnit(settings, staging, end.unit.unit_id)
    for event in events:
        assert not unit.is_complete
        unit.add(event)
    assert unit.is_complete
    return unit.commit()
