"""An estimate of the work to do: items, seconds of audio and windows, from a sample.

The sizes of files are known, and what a second takes is not: 4 kB of Opus, 192 kB of WAV. So the
headers of a sample of files are read, spread over the plan by the windows that sizes suggest. A
file that was not sampled takes as many bytes a second as the nearest in the plan with the same
extension: files of one folder are mostly of one kind. Of containers, the beginnings of some slices
are read.
"""

from __future__ import annotations

import bisect
import functools
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

from pipeline.labelling.calibration import thinned
from pipeline.labelling.headers import (
    HEADERS_AHEAD,
    HeaderReader,
    fetch_headers,
    num_encoded_bytes,
    remove_temporary,
)
from transforms.decoding.settings import DecodeSettings
from transforms.label_audio import read_items
from transforms.records import EncodedClip, Failure, Item, WorkUnit
from transforms.sources.file_kinds import WindowEstimate, extension, guess_duration_s
from transforms.sources.read_unit import Found, SourceSettings, windows_of

# Up to this number of files, all are sampled. Beyond, the estimate is off by the spread of their
# bytes a second divided by the root of this.
SAMPLED_FILES = 256
SAMPLED_SLICES = 16
# Headers and bytes that are read of all sampled slices together.
SLICE_HEADERS = 256
SLICE_BYTES = 128 << 20

# After this time, what has been read is the sample. At any time it is spread evenly.
SAMPLING_S = 5.0

TAR_BYTES_PER_MEMBER = 512 + 256  # a header, and padding to whole blocks
COMPRESSED_BYTES = 1 << 18  # of a member of a compressed tar, to know how far it shrinks


@dataclass(frozen=True, slots=True)
class Amount:
    """An amount of work; estimates need not be whole numbers."""

    items: float = 0.0
    audio_s: float = 0.0
    windows: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.items + other.items, self.audio_s + other.audio_s, self.windows + other.windows
        )

    def of_channels(self, channels: int) -> Amount:
        """Return the amount of an item, each of whose channels is a clip of this amount."""
        return Amount(self.items, self.audio_s * channels, self.windows * channels)

    def times(self, factor: float) -> Amount:
        """Return so many times the amount."""
        return Amount(self.items * factor, self.audio_s * factor, self.windows * factor)


FAILED = Amount(items=1)


@dataclass(frozen=True, slots=True)
class Measured:
    """A file that was sampled, or the part of a slice that was read.

    Attributes:
        position: Its place in the plan, in windows that sizes suggest.
        size: Bytes of a file or tar, rows of a Parquet file; at least 1.
        amount: What it holds. A clip that cannot be decoded is an item without windows. Of a file,
            the amount of one clip.
        channels: Clips of a file: 1, or its channels with ``decode.channel: each``.
    """

    position: float
    size: float
    amount: Amount
    channels: int = 1


@dataclass(frozen=True)
class Sample:
    """What was sampled, by kind: an extension, ``tar`` or ``parquet``.

    ``num_clips`` were measured; ``num_failed`` others cannot be decoded.
    """

    measured: Mapping[str, Sequence[Measured]] = field(default_factory=dict)
    num_clips: int = 0
    num_failed: int = 0


class WorkEstimate:
    """The estimated amount of work of each unit of a plan; by sizes alone without a sample."""

    def __init__(
        self,
        units: Sequence[WorkUnit],
        found: Found,
        sources: SourceSettings,
        sample: Sample | None = None,
    ) -> None:
        self.sample = sample or Sample()
        self._units = units
        self._guess = sources.estimate
        self._positions = _positions_of(units)
        self._num_rows = _num_rows(found)
        self._nearest = {
            kind: _Nearest(measured) for kind, measured in self.sample.measured.items() if measured
        }
        self.of_unit = [self._of_unit(number) for number in range(len(units))]
        self.total = sum(self.of_unit, Amount())

    @functools.cached_property
    def has_exact_items(self) -> bool:
        """Whether the number of items is known exactly, without reading a tar."""
        return all(
            unit.container is None
            or unit.items
            or (unit.kind == "parquet" and slice_size(unit, self._num_rows))
            for unit in self._units
        )

    @property
    def is_sampled(self) -> bool:
        """Whether anything was measured."""
        return bool(self._nearest)

    def of_first_items(self, number: int, num_items: int) -> float:
        """Return the windows of the first items of a unit, given by its number in the plan."""
        unit, amount = self._units[number], self.of_unit[number]
        share = min(1.0, num_items / max(1.0, amount.items))
        if not self.is_sampled or not unit.items:
            return share * amount.windows
        amounts = list(self._of_items(number))[:num_items]
        return sum(one.windows for one in amounts)

    def _of_unit(self, number: int) -> Amount:
        unit = self._units[number]
        if self.is_sampled:
            return sum(self._of_items(number), Amount())
        windows = unit.estimated_windows
        items = len(unit.items) + len(unit.failures)
        if not items:
            items = slice_size(unit, self._num_rows) or 1 if unit.kind == "parquet" else windows
        return Amount(items, windows * self._guess.hop_s, windows)

    def _of_items(self, number: int) -> Iterator[Amount]:
        """Yield the amount of each item of a unit; of a slice, that of all together."""
        unit, first = self._units[number], self._positions[number]
        for _ in unit.failures:
            yield FAILED
        if unit.container is not None and not unit.items:
            yield self._of_slice(unit, first + unit.estimated_windows / 2)
        step = unit.estimated_windows / max(1, len(unit.items))
        for index, item in enumerate(unit.items):
            if unit.container is not None:
                yield self._of_listed(item, unit.kind, first + step * index)
            else:
                yield self._of_file(item, first + step * index)

    def _of_slice(self, unit: WorkUnit, position: float) -> Amount:
        size = slice_size(unit, self._num_rows)
        nearest = self._nearest.get(unit.kind)
        if nearest is None or not size:
            windows = unit.estimated_windows
            return Amount(size or windows, windows * self._guess.hop_s, windows)
        measured = nearest.at(position)
        return measured.amount.times(size / measured.size)

    def _of_listed(self, item: Item, kind: str, position: float) -> Amount:
        """Return the amount of a member or row that a manifest lists."""
        if item.end_s is not None or kind not in self._nearest:
            return _of_span(item, (item.start_s or 0.0) + self._guess.hop_s, self._guess)
        amount = self._nearest[kind].at(position).amount
        return amount.times(1 / max(1.0, amount.items))

    def _of_file(self, item: Item, position: float) -> Amount:
        nearest = self._nearest.get(extension(item.uri))
        if item.end_s is not None or nearest is None:
            return _of_span(item, guess_duration_s(item.uri, item.size), self._guess)
        measured = nearest.at(position)
        if not measured.amount.windows:
            return FAILED
        length_s = (item.size or 0) * measured.amount.audio_s / measured.size
        return _of_span(item, length_s, self._guess).of_channels(measured.channels)


def _of_span(item: Item, length_s: float, guess: WindowEstimate) -> Amount:
    """Return the amount of an item in a file of so many seconds."""
    end_s = length_s if item.end_s is None else item.end_s
    duration_s = max(0.0, end_s - (item.start_s or 0.0))
    return Amount(1, duration_s, guess.of_duration(duration_s))


def _positions_of(units: Sequence[WorkUnit]) -> list[int]:
    """Return where each unit begins, in windows that sizes suggest, and where the last ends."""
    return list(accumulate((unit.estimated_windows for unit in units), initial=0))


def _num_rows(found: Found) -> dict[str, int]:
    return {one.uri: sum(rows for rows, _ in one.row_groups) for one in found.containers}


def slice_size(unit: WorkUnit, num_rows: Mapping[str, int]) -> int | None:
    """Return the bytes of a slice of a tar, or the rows of one of Parquet; None if not known."""
    part = unit.container
    if part is None:
        return None
    whole = part.size if unit.kind == "tar" else num_rows.get(part.uri)
    stop = whole if part.stop is None else part.stop
    return None if stop is None else max(0, stop - part.start)


class _Nearest:
    """Finds the nearest in the plan of what was measured of one kind."""

    def __init__(self, measured: Sequence[Measured]) -> None:
        self._measured = sorted(measured, key=lambda one: one.position)
        self._edges = [(a.position + b.position) / 2 for a, b in pairwise(self._measured)]

    def at(self, position: float) -> Measured:
        return self._measured[bisect.bisect_left(self._edges, position)]


# --- Sampling ------------------------------------------------------------------------------


def take_sample(
    units: Sequence[WorkUnit],
    found: Found,
    sources: SourceSettings,
    decode: DecodeSettings,
    *,
    sampling_s: float = SAMPLING_S,
    stop: threading.Event | None = None,
) -> Sample:
    """Measure some files and the beginnings of some slices.

    Ends after about ``sampling_s``, or when ``stop`` is set, with what has been measured by then.
    """
    num_rows = _num_rows(found)
    measured: dict[str, list[Measured]] = defaultdict(list)
    files, slices = _choose_files(units, sources), _choose_slices(units)
    began_s = time.monotonic()
    with HeaderReader(decode) as headers:
        sampler = _Sampler(headers, sources, stop or threading.Event(), decode.channel == "each")
        sampler.until_s = began_s + sampling_s / (2 if slices else 1)
        for place, one in sampler.measure_files(files):
            measured[extension(place.item.uri)].append(one)
        sampler.until_s = began_s + sampling_s
        for position, unit in slices:
            size = slice_size(unit, num_rows)
            part = sampler.measure_slice(unit, position, size, share=1 / len(slices))
            if part is not None:
                measured[unit.kind].append(part)
    return Sample(measured, sampler.num_clips, sampler.num_failed)


class _Place(NamedTuple):
    position: float
    item: Item


def _choose_files(units: Sequence[WorkUnit], sources: SourceSettings) -> list[_Place]:
    """Choose files whose lengths are to be measured, evenly by the windows that sizes suggest.

    They are ordered such that each beginning of the list is spread evenly, too.
    """
    loose = [
        (position, unit)
        for position, unit in zip(_positions_of(units), units, strict=False)
        if unit.container is None
    ]
    is_all = sum(len(unit.items) for _, unit in loose) <= SAMPLED_FILES
    step = sum(unit.estimated_windows for _, unit in loose) / SAMPLED_FILES
    places: list[_Place] = []
    done, due = 0.0, step / 2
    for position, unit in loose:
        if not is_all and done + unit.estimated_windows <= due:
            done += unit.estimated_windows
            continue
        width = unit.estimated_windows / max(1, len(unit.items))
        for index, item in enumerate(unit.items):
            done += windows_of(item, sources)
            if item.end_s is None and (is_all or done > due):
                places.append(_Place(position + width * index, item))
            while done > due:
                due += step
    return [places[index] for index in _spread(len(places))]


def _choose_slices(units: Sequence[WorkUnit]) -> list[tuple[float, WorkUnit]]:
    """Choose units of containers to look into, in an order as in ``_choose_files``."""
    inside = [
        (position + unit.estimated_windows / 2, unit)
        for position, unit in zip(_positions_of(units), units, strict=False)
        if unit.container is not None
    ]
    count = min(SAMPLED_SLICES, len(inside))
    return [inside[len(inside) * index // count] for index in _spread(count)]


def _spread(count: int) -> list[int]:
    """Return the numbers below ``count``, such that the first few are always spread evenly."""
    width = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{width}b}"[::-1])


class _Sampler:
    def __init__(
        self,
        headers: HeaderReader,
        sources: SourceSettings,
        stop: threading.Event,
        takes_each_channel: bool,
    ) -> None:
        self._takes_each_channel = takes_each_channel
        self._headers = headers
        self._sources = sources
        self._guess = sources.estimate
        self._stop = stop
        self.until_s = 0.0
        self.num_clips = 0
        self.num_failed = 0

    def _is_over(self) -> bool:
        return self._stop.is_set() or time.monotonic() > self.until_s

    def measure_files(self, places: Sequence[_Place]) -> Iterator[tuple[_Place, Measured]]:
        for start in range(0, len(places), HEADERS_AHEAD):
            some = places[start : start + HEADERS_AHEAD]
            if start and self._is_over():
                return
            clips = fetch_headers([place.item for place in some])
            for place, clip in zip(some, clips, strict=True):
                found = self._measure(clip)
                if found is not None:
                    yield place, Measured(place.position, max(1, place.item.size or 0), *found)

    def _measure(self, clip: EncodedClip | Failure) -> tuple[Amount, int] | None:
        """Return a clip's amount, from the start of its file, and its channels; None if unknown."""
        channels = self._headers.count_channels(clip) if self._takes_each_channel else 1
        length_s = self._headers.measure_s(clip)
        if length_s is None:
            return None
        if length_s <= 0:
            self.num_failed += 1
            return FAILED, 1
        self.num_clips += 1
        length_s += clip.item.start_s or 0.0
        return Amount(1, length_s, self._guess.of_duration(length_s)), channels

    def measure_slice(
        self, unit: WorkUnit, position: float, size: int | None, *, share: float
    ) -> Measured | None:
        """Read the beginning of a slice, up to a share of what may be read of all of them.

        ``size`` is that of the whole slice in bytes or rows. Not every clip is measured: one that
        is not is taken for the one before, by its bytes.
        """
        if self.num_clips and self._is_over():
            return None
        most_bytes, most_headers = SLICE_BYTES * share, SLICE_HEADERS * share
        whole_bytes = unit.container.size if unit.container is not None else None
        step = min(most_bytes, whole_bytes or most_bytes) / most_headers
        part = thinned(unit, max(1, round(most_headers)))
        is_whole = not part.items
        shrinks_to = 1.0
        amount = Amount()
        num_bytes = due = 0.0
        measured: dict[str, Measured] = {}  # the last of each kind
        for clip in read_items(part, self._sources):
            size_of_clip = 0 if isinstance(clip, Failure) else num_encoded_bytes(clip)
            kind = extension(clip.item.member or "")
            if isinstance(clip, EncodedClip) and (num_bytes >= due or kind not in measured):
                if not num_bytes:
                    shrinks_to = _compression(unit, clip)
                due = num_bytes + step
                found = self._measure(clip)
                if found is not None:
                    measured[kind] = Measured(position, max(1, size_of_clip), *found)
            elif isinstance(clip, EncodedClip):
                remove_temporary(clip)
            amount += self._amount_like(measured.get(kind), clip, size_of_clip)
            num_bytes += size_of_clip
            if num_bytes >= most_bytes or self._is_over():
                is_whole = False
                break
        if not is_whole and not amount.items:
            return None
        read = amount.items
        if unit.kind == "tar":
            read = (num_bytes + TAR_BYTES_PER_MEMBER * amount.items) * shrinks_to
        return Measured(position, max(1.0, size if is_whole and size else read), amount)

    def _amount_like(
        self, measured: Measured | None, clip: EncodedClip | Failure, num_bytes: int
    ) -> Amount:
        """Return the amount of a clip with the bytes a second of one that was measured."""
        if isinstance(clip, Failure):
            return FAILED
        if measured is None:
            return _of_span(
                clip.item, guess_duration_s(clip.item.member or "", num_bytes), self._guess
            )
        if not measured.amount.windows:
            return FAILED
        length_s = measured.amount.audio_s * num_bytes / measured.size
        return _of_span(clip.item, length_s, self._guess).of_channels(measured.channels)


def _compression(unit: WorkUnit, clip: EncodedClip) -> float:
    """Return about how far a container shrinks its bytes, in (0, 1]; only a tar as a whole does."""
    is_compressed = unit.kind == "tar" and not clip.item.uri.lower().endswith(".tar")
    data = (clip.data or b"")[:COMPRESSED_BYTES]
    return len(zlib.compress(data)) / len(data) if is_compressed and data else 1.0
