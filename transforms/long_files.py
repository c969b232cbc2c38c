"""A very long file in parts, so that several workers label it, and a killed run goes on inside it.

    long unit ─cut─▶ part 0 ─┐
              header ▶ part 1 ─┼─▶ LabelUnits ─▶ CommitUnits ─▶ _parts/<unit_id>/ ─join_parts─▶ unit
                     ▶ part 2 ─┘

A **long unit** is one whole file of at least two parts (``units.is_long``). A part of it is a unit
of one segment, which is read, labelled and committed as any other. Parts begin at whole seconds
that are starts of windows too, so their windows are exactly those of the whole file::

    part 0   |=====|=====|=====|···        ···  beyond its end: what its last window needs
    part 1               |=====|=====|=====|···   its first window is the last of part 0, and not
    part 2                           |=====|===|  given: the rule for the tail looks on from there

The last part goes to the end of the file, wherever that is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import apache_beam as beam
from apache_beam.pvalue import PCollection, TaggedOutput
from apache_beam.typehints.decorators import IOTypeHints

from transforms.decoding.pool import DecodeSettings
from transforms.features.windows import WindowSettings
from transforms.header_probe import HeaderProbe
from transforms.records import Part, WorkUnit
from transforms.results.commits import commit_url, make_part_id
from transforms.sources.units import SourceSettings, is_long
from transforms.storage import filesystem

# A header that speaks of more is not believed, and its file not cut: 4096 parts of 200 windows are
# three months.
MAX_PARTS = 4096


def cut_long(
    unit: WorkUnit,
    duration_s: float | None,
    sources: SourceSettings,
    windows: WindowSettings,
    fingerprint: str,
) -> list[WorkUnit]:
    """The parts of a long unit; the unit itself where its length is that of one, or not known.

    Args:
        unit: A long unit.
        duration_s: Seconds of audio in it, by its header; None where that is not known.
        sources: What is long, and how many windows a part has.
        windows: How windows are cut.
        fingerprint: Of everything that changes results.
    """
    per_part = sources.windows_per_part
    if per_part is None or duration_s is None:
        return [unit]
    rate_hz, window, hop = windows.sample_rate_hz, windows.window_samples, windows.hop_samples
    part_s = per_part * hop // rate_hz
    # The last part holds two windows: room for the rule for the tail.
    num_parts = 1 + max(0, math.floor((duration_s - 2 * window / rate_hz) / part_s))
    if not 2 <= num_parts <= MAX_PARTS:
        return [unit]
    parts = []
    for index in range(num_parts):
        is_last = index == num_parts - 1
        start_s, end_s = float(index * part_s), None if is_last else float((index + 1) * part_s)
        margins = Part(hop if index else 0, 0 if is_last else window - hop)
        item = dataclasses.replace(unit.items[0], start_s=start_s, end_s=end_s, part=margins)
        rest = sources.estimate.of_duration(duration_s - start_s)
        parts.append(
            WorkUnit(
                unit_id=make_part_id(unit.unit_id, fingerprint, start_s, end_s),
                kind="files",
                items=(item,),
                estimated_windows=rest if is_last else per_part,
                part_of=unit,
            )
        )
    return parts


class CutLongFiles(
    beam.PTransform[PCollection[WorkUnit], tuple[PCollection[WorkUnit], PCollection[WorkUnit]]]
):
    """Divide units into those that are labelled whole, and parts of long ones.

    In: ``WorkUnit``. Out: a tuple of the units that stay as they are, and of parts; what has been
    committed already stays as it is.

    Args:
        sources: What is long, and how many windows a part has.
        windows: How windows are cut.
        decode: What reading a header may take.
        output: Where units are committed.
        fingerprint: Of everything that changes results.
    """

    def __init__(
        self,
        sources: SourceSettings,
        windows: WindowSettings,
        decode: DecodeSettings,
        output: str,
        fingerprint: str,
    ) -> None:
        super().__init__()
        self._step = _CutLongFn(sources, windows, decode, output, fingerprint)

    def default_type_hints(self) -> IOTypeHints:
        """What Beam checks what goes in and comes out against."""
        return IOTypeHints.empty().with_input_types(WorkUnit).with_output_types(WorkUnit, WorkUnit)

    def expand(
        self, units: PCollection[WorkUnit]
    ) -> tuple[PCollection[WorkUnit], PCollection[WorkUnit]]:
        """Apply the transform."""
        step = beam.ParDo(self._step).with_output_types(WorkUnit, parts=WorkUnit)
        divided = units | step.with_outputs("parts", main="whole")
        return divided.whole, divided.parts


class _CutLongFn(beam.DoFn):
    def __init__(
        self,
        sources: SourceSettings,
        windows: WindowSettings,
        decode: DecodeSettings,
        output: str,
        fingerprint: str,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources = sources
        self._windows = windows
        self._output = output
        self._fingerprint = fingerprint
        self._probe = HeaderProbe(decode)

    def start_bundle(self) -> None:
        self._probe.close()  # a bundle before this one may have failed halfway

    def finish_bundle(self) -> None:
        self._probe.close()

    def teardown(self) -> None:
        self._probe.close()

    def process(self, unit: WorkUnit) -> Iterator[WorkUnit | TaggedOutput[str, WorkUnit]]:
        if not is_long(unit, self._sources) or filesystem.exists(
            commit_url(self._output, unit.unit_id)
        ):
            yield unit
            return
        duration_s = self._probe.read_duration_s(unit.items[0])
        for part in cut_long(unit, duration_s, self._sources, self._windows, self._fingerprint):
            yield unit if part is unit else TaggedOutput("parts", part)
