"""Mean and standard deviation of a dataset's features, for normalising a model's input.

``MeasureFeatures`` makes the features of each window and returns statistics that can be added up in
any order and any grouping.

The features are log-mel values before normalising. By default every frame filled by audio counts
once, and padding does not. ``as_original`` follows the script behind the published statistics
(``get_norm_stats.py`` of github.com/YuanGongND/ast): half of the windows are mixed with another,
bands of mels and frames are masked with 0, padding counts, and the result is the mean of the means
and of the standard deviations of batches of 1,000 windows. Its figures differ from the dataset's
own; they are for comparison with published ones. The script draws partners and batches at random
over the whole dataset. Here the partner is the previous window of the same unit and the draws are
seeded with the clip's name, so that every run gives the same figures.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import apache_beam as beam
import numpy as np
import numpy.typing as npt
from apache_beam.pvalue import PCollection

from transforms.errors import FeatureError
from transforms.features.fbank import extract_fbank
from transforms.features.fbank_settings import FbankSettings, without_normalising
from transforms.features.threads import feature_threads
from transforms.process.progress_counts import live_counts
from transforms.records import Failure, FloatArray, ItemFailure, UnitEnd, Window

# From the original script: batch size, share of mixed windows, both parameters of the Beta
# distribution of the mixture, and the widest masks in mels and frames.
ORIGINAL_BATCH_WINDOWS = 1000
ORIGINAL_MIX_RATIO = 0.5
ORIGINAL_MIX_BETA = 10.0
ORIGINAL_MASKED_MELS = 24
ORIGINAL_MASKED_FRAMES = 192

_Element = Window | ItemFailure | UnitEnd


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and spread of values, which can be added without loss of precision.

    ``squares`` is the sum of the squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @staticmethod
    def of(values: npt.NDArray[np.floating]) -> Moments:
        """Compute the moments of an array of any shape, in float64."""
        if values.size == 0:
            return Moments()
        doubles = values.astype(np.float64)
        mean = float(doubles.mean())
        return Moments(doubles.size, mean, float(np.square(doubles - mean).sum()))

    def __add__(self, other: Moments) -> Moments:
        """Combine the moments of both (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        share = other.count / count
        distance = other.mean - self.mean
        return Moments(
            count,
            self.mean + distance * share,
            self.squares + other.squares + distance * distance * self.count * share,
        )

    @property
    def std(self) -> float:
        """Population standard deviation (divided by the count)."""
        return math.sqrt(self.squares / self.count) if self.count else math.nan


@dataclass(frozen=True, slots=True, eq=False)
class FeatureStatistics:
    """Statistics of the features of some windows.

    Attributes:
        moments: Moments of the log-mel values of the frames that count.
        clips: Clips read to their end; ``audio_s`` is their length.
        failures: Items that could not be measured.
        broken_containers: Failures that are containers which could not be read to their end.
        example: Description of one failure, or None.
        originals: ``as_original`` only: each window's random number, which decides its batch, mean
            and ``Moments.squares``; shape (windows, 3).
    """

    moments: Moments = field(default_factory=Moments)
    windows: int = 0
    clips: int = 0
    audio_s: float = 0.0
    failures: int = 0
    broken_containers: int = 0
    example: str | None = None
    originals: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 3)))


def sum_statistics(parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """Add up statistics, or partial sums of them, in any order."""
    found = list(parts)
    # The smallest example, so that the order of the parts does not matter.
    examples = [part.example for part in found if part.example is not None]
    return FeatureStatistics(
        moments=sum((part.moments for part in found), Moments()),
        windows=sum(part.windows for part in found),
        clips=sum(part.clips for part in found),
        audio_s=math.fsum(part.audio_s for part in found),
        failures=sum(part.failures for part in found),
        broken_containers=sum(part.broken_containers for part in found),
        example=min(examples, default=None),
        originals=np.concatenate([np.empty((0, 3)), *(part.originals for part in found)]),
    )


def mean_and_std(statistics: FeatureStatistics) -> tuple[float, float]:
    """Return mean and std to normalise with, by the script's rule if measured ``as_original``.

    Raises ``FeatureError`` if nothing was measured.
    """
    if statistics.moments.count == 0:
        raise FeatureError("no window has features, so there is no mean of them.")
    originals = statistics.originals[np.argsort(statistics.originals[:, 0], kind="stable"), 1:]
    if not len(originals):
        return statistics.moments.mean, statistics.moments.std
    values_per_window = statistics.moments.count // statistics.windows
    means, stds = [], []
    for start in range(0, len(originals), ORIGINAL_BATCH_WINDOWS):
        batch = originals[start : start + ORIGINAL_BATCH_WINDOWS].tolist()
        moments = sum((Moments(values_per_window, *each) for each in batch), Moments())
        means.append(moments.mean)
        stds.append(math.sqrt(moments.squares / (moments.count - 1)))  # torch.std's own
    return math.fsum(means) / len(means), math.fsum(stds) / len(stds)


def measure_window(samples: FloatArray, settings: FbankSettings) -> Moments:
    """Compute the moments of the log-mel values of the frames that the samples fill.

    The settings' mean and std are ignored. Samples and errors: as for ``extract_fbank``.
    """
    log_mel = extract_fbank(samples, without_normalising(settings))
    return Moments.of(log_mel[: settings.count_frames(samples.size)])


def measure_as_original(
    samples: FloatArray,
    partner: FloatArray | None,
    rng: np.random.Generator,
    settings: FbankSettings,
) -> Moments:
    """Compute the moments of a window as in the original script; otherwise as ``measure_window``.

    ``partner`` is another window to mix with, or None. ``rng`` draws whether and how to mix, and
    what to mask.
    """
    audio = samples - samples.mean()
    is_mixed = rng.random() < ORIGINAL_MIX_RATIO
    share = rng.beta(ORIGINAL_MIX_BETA, ORIGINAL_MIX_BETA)
    if is_mixed and partner is not None:
        other = np.zeros_like(audio)
        size = min(partner.size, audio.size)
        other[:size] = partner[:size] - partner.mean()
        audio = share * audio + (1.0 - share) * other
        audio -= audio.mean()
    features = extract_fbank(audio.astype(np.float32), without_normalising(settings))
    _mask(features, ORIGINAL_MASKED_MELS, rng)
    _mask(features.T, ORIGINAL_MASKED_FRAMES, rng)
    return Moments.of(features)


def _mask(features: FloatArray, widest: int, rng: np.random.Generator) -> None:
    """Set a band of columns to 0, of up to ``widest`` (torchaudio's ``mask_along_axis``)."""
    width = rng.random() * widest
    start = int(rng.random() * max(0.0, features.shape[1] - width))
    features[:, start : start + int(width)] = 0.0


@beam.typehints.with_input_types(_Element)
@beam.typehints.with_output_types(FeatureStatistics)
class MeasureFeatures(beam.PTransform[PCollection[_Element], PCollection[FeatureStatistics]]):
    """Measure the features of each window.

    In: ``Window`` with samples, ``ItemFailure``, ``UnitEnd``, in order within a unit. Out:
    ``FeatureStatistics``, for ``sum_statistics``. ``num_processes`` share this machine's cores.
    """

    def __init__(
        self, settings: FbankSettings, *, as_original: bool = False, num_processes: int = 1
    ) -> None:
        super().__init__()
        self._step = _MeasureFn(settings, as_original, num_processes)

    def expand(self, elements: PCollection[_Element]) -> PCollection[FeatureStatistics]:
        """Apply the transform."""
        measured: PCollection[FeatureStatistics] = elements | "Measure windows" >> beam.ParDo(
            self._step
        )
        return measured


class _MeasureFn(beam.DoFn):
    def __init__(self, settings: FbankSettings, as_original: bool, num_processes: int = 1) -> None:
        self._settings = settings
        self._as_original = as_original
        self._num_processes = num_processes
        self._previous: dict[str, FloatArray] = {}  # by unit
        self._failed: set[tuple[str, int]] = set()

    def start_bundle(self) -> None:
        self._previous, self._failed = {}, set()

    def process(self, element: _Element) -> Iterator[FeatureStatistics]:
        for statistics in self._measure(element):
            live_counts.windows += statistics.windows
            live_counts.clips += statistics.clips
            live_counts.failures += statistics.failures
            live_counts.audio_s += statistics.audio_s
            yield statistics

    def _measure(self, element: _Element) -> Iterator[FeatureStatistics]:
        if isinstance(element, ItemFailure):
            yield _of_failure(element.failure)
        elif isinstance(element, UnitEnd):
            self._previous.pop(element.unit.unit_id, None)
        else:
            yield from self._measure_window(element)

    def _measure_window(self, window: Window) -> Iterator[FeatureStatistics]:
        key = (window.unit_id, window.item_index)
        try:
            # Not in this thread: in the feature threads torch does not compete with decoders.
            threads = feature_threads(self._num_processes)
            yield threads.submit(self._statistics_of, window).result()
        except FeatureError as error:
            # Count a clip as one failed item, however many of its windows have no features.
            if key not in self._failed:
                self._failed.add(key)
                yield _of_failure(
                    Failure(window.item, error.stage, type(error).__name__, str(error))
                )
        if window.facts is not None:
            is_whole = key not in self._failed
            self._failed.discard(key)
            if is_whole:
                yield FeatureStatistics(clips=1, audio_s=window.facts.duration_s)

    def _statistics_of(self, window: Window) -> FeatureStatistics:
        samples = window.data
        if samples is None:
            raise FeatureError(window.error or "the window holds no samples.")
        if not self._as_original:
            return FeatureStatistics(measure_window(samples, self._settings), windows=1)
        name = f"{window.clip_id}\n{window.window_index}"
        drawn = int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:8])
        moments = measure_as_original(
            samples,
            self._previous.get(window.unit_id),
            np.random.default_rng(drawn),
            self._settings,
        )
        self._previous[window.unit_id] = samples
        return FeatureStatistics(
            moments,
            windows=1,
            originals=np.array([[drawn, moments.mean, moments.squares]]),
        )


def _of_failure(failure: Failure) -> FeatureStatistics:
    return FeatureStatistics(
        failures=1,
        broken_containers=int(failure.is_container),
        example=f"{failure.item.clip_id}: {failure.message}",
    )
