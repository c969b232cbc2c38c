"""Clips cut into windows of the model's length.

``CutWindows`` receives a decoded clip in pieces and emits each window as soon as it is final, so
hours of audio need the memory of two windows.

Windows start every ``hop`` samples until the clip is covered. The last may be shorter; ``fbank``
pads it, and ``end_s`` keeps its true end. The samples that no full window covers are the *tail*. A
tail shorter than ``min_tail`` gets no padded window of its own: one more full window, ending with
the clip, covers it instead::

    window 0   |──────────────|                 hop = window, tail ≥ min_tail
    window 1                  |──────────────|
    window 2                                 |──────|············    (padded)
    clip       |====================================|

    window 0   |──────────────|                 hop = window, tail < min_tail
    window 1                  |──────────────|
    window 2                    |──────────────|      ends with the clip
    clip       |===============================|

Guaranteed: every sample is in a window; every clip has at least one window; no window is shorter
than one 25 ms frame unless the clip is; the windows do not depend on how the clip is divided into
pieces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import PCollection

from transforms.errors import AccountingError, ConfigError
from transforms.features.fbank_settings import FbankSettings
from transforms.records import FloatArray, ItemFailure, UnitEnd, Waveform, Window

_NO_SAMPLES: FloatArray = np.empty(0, np.float32)

_Piece = Waveform | ItemFailure | UnitEnd
_Element = Window | ItemFailure | UnitEnd


@dataclass(frozen=True)
class WindowSettings:
    """Lengths in samples, at the model's rate; made by ``from_seconds``, which checks the ranges.

    Attributes:
        window_samples: Length of a window; at least one frame of 25 ms.
        hop_samples: Distance between the starts of two windows; in [1, window_samples].
        min_tail_samples: A shorter tail is covered by a full window that ends with the clip; at
            least one frame, at most window_samples.
    """

    sample_rate_hz: int
    window_samples: int
    hop_samples: int
    min_tail_samples: int

    @classmethod
    def from_seconds(
        cls,
        fbank: FbankSettings,
        length_s: float | None = None,
        hop_s: float | None = None,
        min_tail_ratio: float = 0.1,
    ) -> Self:
        """Convert the config's seconds to samples.

        Args:
            fbank: The checkpoint's features, which give the rate and the longest window.
            length_s: Length of a window; None for the checkpoint's (1024 frames are 10.255 s), to
                which shorter windows are padded.
            hop_s: Distance between the starts of two windows; None for the window's length.
            min_tail_ratio: Shortest tail with a padded window of its own, as a share of the
                window, in [0, 1]; never less than one frame of 25 ms.

        Raises:
            ConfigError: A value is out of range; the message names its key.
        """
        rate_hz, frame = fbank.sample_rate_hz, fbank.frame_samples
        window = _to_samples(
            "window.length_s", length_s, frame, fbank.max_samples, rate_hz, "what the model holds"
        )
        hop = _to_samples("window.hop_s", hop_s, 1, window, rate_hz, "window.length_s")
        if not 0.0 <= min_tail_ratio <= 1.0:
            raise ConfigError(
                f"window.min_tail is {min_tail_ratio}; must be in [0, 1] (a share of the window). "
                "Set it in the config, or with --set window.min_tail=RATIO."
            )
        return cls(rate_hz, window, hop, max(frame, round(min_tail_ratio * window)))


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A span of a clip; ``start`` is the index of its first sample."""

    start: int
    samples: FloatArray

    @property
    def stop(self) -> int:
        """Index after its last sample."""
        return self.start + self.samples.size


def cut_windows(samples: FloatArray, settings: WindowSettings) -> list[Cut]:
    """Cut a whole clip, shape (num_samples,); an empty clip has one empty window."""
    cutter = WindowCutter(settings)
    return [*cutter.push(samples), cutter.finish()]


class WindowCutter:
    """Cuts a clip that arrives in pieces, mono float32.

    It holds two windows of samples: the one being filled, and the previous one, because the clip's
    last window may start in it. A window is returned only when a sample after its end has arrived,
    since the last window differs; ``finish`` returns that one. A window within one piece is a view
    of it, so pieces must not be written to afterwards. ``num_cuts`` windows were returned so far.
    """

    def __init__(self, settings: WindowSettings) -> None:
        self.num_cuts = 0
        self._settings = settings
        self._given: FloatArray = _NO_SAMPLES
        self._filled: list[FloatArray] = []  # the parts of the next window
        self._num_filled = 0

    def push(self, samples: FloatArray) -> list[Cut]:
        """Take the clip's next piece, and return the windows that are now final."""
        cuts: list[Cut] = []
        start = 0
        while start < samples.size:
            if self._num_filled == self._settings.window_samples:
                cuts.append(self._give())
            part = samples[start : start + self._settings.window_samples - self._num_filled]
            self._fill(part)
            start += part.size
        return cuts

    def finish(self) -> Cut:
        """Return the last window of the clip; the cutter cannot be used afterwards."""
        start, samples = self._next_start, self._join()
        tail = self._num_filled - self._num_shared
        if self.num_cuts > 0 and tail < self._settings.min_tail_samples:
            start += self._num_filled - self._settings.window_samples
            samples = np.concatenate([self._given[tail:], samples[self._num_shared :]])
        self.num_cuts += 1
        return Cut(start, samples)

    @property
    def _next_start(self) -> int:
        return self.num_cuts * self._settings.hop_samples

    @property
    def _num_shared(self) -> int:
        return self._settings.window_samples - self._settings.hop_samples

    def _give(self) -> Cut:
        """Return the full window, and start the next with the samples that both share."""
        self._given = self._join()
        cut = Cut(self._next_start, self._given)
        self.num_cuts += 1
        self._filled, self._num_filled = [], 0
        self._fill(self._given[self._settings.hop_samples :])
        return cut

    def _fill(self, part: FloatArray) -> None:
        if part.size > 0:
            self._filled.append(part)
            self._num_filled += part.size

    def _join(self) -> FloatArray:
        if len(self._filled) == 1:
            return self._filled[0]
        return np.concatenate(self._filled) if self._filled else _NO_SAMPLES


def _to_samples(
    key: str, seconds: float | None, least: int, most: int, rate_hz: int, most_is: str
) -> int:
    """Convert seconds to samples, and None to the maximum."""
    if seconds is None:
        return most
    # NaN and infinity fail the first test, before rounding.
    if not 0.0 < seconds < 1e9 or not least <= round(seconds * rate_hz) <= most:
        lower = "(0" if least == 1 else f"[{least / rate_hz:g}"
        raise ConfigError(
            f"{key} is {seconds}; must be in {lower}, {most / rate_hz:g}] ({most_is}). "
            f"Set it in the config, or with --set {key}=SECONDS."
        )
    return round(seconds * rate_hz)


def _make_window(piece: Waveform, index: int, cut: Cut, settings: WindowSettings) -> Window:
    item, rate_hz = piece.item, settings.sample_rate_hz
    clip_start_s = item.start_s or 0.0
    return Window(
        unit_id=piece.unit_id,
        item_index=piece.item_index,
        item=item,
        window_index=index,
        start_s=clip_start_s + cut.start / rate_hz,
        end_s=clip_start_s + cut.stop / rate_hz,
        data=cut.samples,
        channel=piece.channel,
    )


@beam.typehints.with_input_types(_Piece)
@beam.typehints.with_output_types(_Element)
class CutWindows(beam.PTransform[PCollection[_Piece], PCollection[_Element]]):
    """Turn the pieces of decoded clips into windows.

    The pieces of a clip come in order and within one bundle; clips of several items may be open at
    once.
    A clip's last window carries its facts and the number of its windows. Failures and unit ends
    pass unchanged. ``AccountingError`` if a clip has not had its last piece when a bundle ends.
    """

    def __init__(self, settings: WindowSettings) -> None:
        super().__init__()
        self._step = _CutWindowsFn(settings)

    def expand(self, pieces: PCollection[_Piece]) -> PCollection[_Element]:
        """Apply the transform."""
        windows: PCollection[_Element] = pieces | "Cut each clip" >> beam.ParDo(self._step)
        return windows


class _CutWindowsFn(beam.DoFn):
    def __init__(self, settings: WindowSettings) -> None:
        self._settings = settings
        self._open: dict[tuple[str, int], tuple[str, WindowCutter]] = {}

    def start_bundle(self) -> None:
        self._open = {}  # a failed bundle may have left some

    def process(self, element: _Piece) -> Iterator[_Element]:
        if isinstance(element, Waveform):
            yield from self._cut(element)
            return
        if isinstance(element, ItemFailure):
            self._open.pop((element.unit_id, element.item_index), None)
        yield element

    def finish_bundle(self) -> None:
        if self._open:
            clips = [clip_id for clip_id, _ in self._open.values()]
            raise AccountingError(
                f"{len(clips)} clips have no last piece at the end of the bundle, the first is "
                f"{clips[0]!r}. All pieces of a clip must arrive in one bundle: is there a "
                "Reshuffle or GroupByKey between decoding and cutting?"
            )

    def _cut(self, piece: Waveform) -> Iterator[Window]:
        key = (piece.unit_id, piece.item_index)
        if key not in self._open:
            self._open[key] = (piece.item.clip_id, WindowCutter(self._settings))
        _, cutter = self._open[key]
        first_index = cutter.num_cuts
        for index, cut in enumerate(cutter.push(piece.samples), start=first_index):
            yield _make_window(piece, index, cut, self._settings)
        if piece.facts is not None:
            del self._open[key]
            last = _make_window(piece, cutter.num_cuts, cutter.finish(), self._settings)
            yield dataclasses.replace(last, facts=piece.facts, num_windows=cutter.num_cuts)
