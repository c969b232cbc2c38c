"""The Beam step that reads and decodes work units.

All DoFns of a process share one pool, so that the threads of a runner share the decoders.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import apache_beam as beam
from apache_beam.utils.windowed_value import WindowedValue

from transforms.decoding.pool import DecodePool, DecodeStream
from transforms.decoding.settings import DecodeSettings
from transforms.errors import EarmarkError
from transforms.process.stage_times import stage_clocks
from transforms.records import EncodedClip, Failure, ItemFailure, UnitEnd, Waveform, WorkUnit

ReadUnit: TypeAlias = Callable[[WorkUnit], Iterator[EncodedClip | Failure]]


@dataclass
class _SharedPool:
    pool: DecodePool
    num_users: int = 0


_shared_pools: dict[DecodeSettings, _SharedPool] = {}
_shared_pools_lock = threading.Lock()


def _borrow_pool(settings: DecodeSettings) -> DecodePool:
    with _shared_pools_lock:
        shared = _shared_pools.get(settings)
        if shared is None:
            shared = _shared_pools[settings] = _SharedPool(DecodePool(settings))
        shared.num_users += 1
        return shared.pool


def _return_pool(settings: DecodeSettings) -> None:
    with _shared_pools_lock:
        shared = _shared_pools[settings]
        shared.num_users -= 1
        if shared.num_users:
            return
        del _shared_pools[settings]
    shared.pool.close()


@beam.typehints.with_input_types(WorkUnit)
@beam.typehints.with_output_types(Waveform | ItemFailure | UnitEnd)
class DecodeAudio(beam.PTransform[Any, Any]):
    """Reads and decodes work units: ``WorkUnit`` to ``Waveform``, ``ItemFailure`` and ``UnitEnd``.

    A unit's results come in the order of its items, ``UnitEnd`` last. While they are emitted, the
    next unit is already being decoded. The step must be fused with the one that takes the samples.

    ``read_unit`` is a generator of a unit's clips, with a failure for each that cannot be read. It
    must be picklable, and runs on a thread of its own.
    """

    def __init__(self, settings: DecodeSettings, read_unit: ReadUnit) -> None:
        super().__init__()
        self._step = _DecodeFn(settings, read_unit)

    def expand(self, units: Any) -> Any:
        """Apply the transform."""
        return units | "Decode the unit's clips" >> beam.ParDo(self._step)


@dataclass
class _Pending:
    unit: WorkUnit
    stream: DecodeStream
    window: Any
    timestamp: Any


class _DecodeFn(beam.DoFn):
    """Starts the decoding of a unit, then emits the results of the unit before it."""

    def __init__(self, settings: DecodeSettings, read_unit: ReadUnit) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._settings = settings
        self._read_unit = read_unit
        self._pool: DecodePool | None = None
        self._pending: _Pending | None = None

    def setup(self) -> None:
        self._pool = _borrow_pool(self._settings)

    def start_bundle(self) -> None:
        self._abandon()  # the previous bundle may have failed halfway
        stage_clocks.begin(self._settings.resolve_num_processes())

    def process(
        self,
        unit: WorkUnit,
        window: Any = beam.DoFn.WindowParam,
        timestamp: Any = beam.DoFn.TimestampParam,
    ) -> Iterator[WindowedValue]:
        if self._pool is None:
            raise EarmarkError("setup was not called before process; a runner must call it")
        stream = self._pool.stream(unit.unit_id, self._read_unit(unit))
        yield from self._emit_before(_Pending(unit, stream, window, timestamp))

    def finish_bundle(self) -> Iterator[WindowedValue]:
        yield from self._emit_before(None)

    def teardown(self) -> None:
        self._abandon()
        if self._pool is not None:
            self._pool = None
            _return_pool(self._settings)

    def _abandon(self) -> None:
        if self._pending is not None:
            self._pending.stream.close()
            self._pending = None

    def _emit_before(self, next_pending: _Pending | None) -> Iterator[WindowedValue]:
        """Emit the results of the pending unit, whose place another takes."""
        pending, self._pending = self._pending, next_pending
        if pending is None:
            return
        num_items = num_ends = 0
        with contextlib.closing(pending.stream):
            for result in pending.stream:
                is_last = isinstance(result, ItemFailure) or result.facts is not None
                num_ends += is_last  # of a clip, or of the item
                num_items = result.item_index + 1
                yield WindowedValue(result, pending.timestamp, (pending.window,))
        end = UnitEnd(pending.unit, num_items, num_ends - num_items)
        yield WindowedValue(end, pending.timestamp, (pending.window,))
