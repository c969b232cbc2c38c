"""All steps joined: from work units, or plain URIs, to labelled rows and failures.

``LabelUnits`` is the single fused stage of a run: read, decode, cut, fbank, RunInference, rows.
Features never cross a stage: no step in between may shuffle, take a side input, keep state or
request other resources than its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.pvalue import PCollection, TaggedOutput
from apache_beam.typehints import Dict
from apache_beam.typehints.decorators import IOTypeHints

from transforms.decoding.decode_audio import DecodeAudio
from transforms.decoding.settings import DecodeSettings
from transforms.features.fbank import DeviceFbank, ExtractFbank, FbankSettings
from transforms.features.windows import CutWindows, WindowSettings
from transforms.inference.backbones import InferenceSettings, makes_features_on_device
from transforms.inference.handler import ASTModelHandler
from transforms.models.ast.checkpoints import ModelSpec
from transforms.records import (
    ClipRow,
    EncodedClip,
    Failure,
    FloatArray,
    Item,
    ItemFailure,
    UnitEnd,
    UnitEvent,
    Window,
    WindowRow,
    WorkUnit,
)
from transforms.results.rows import (
    AssembleRows,
    RowSettings,
    clips_table,
    errors_table,
    windows_table,
)
from transforms.sources.clip_ids import printable
from transforms.sources.read_unit import (
    SourceSettings,
    make_clip_id,
    make_unit_id,
    read_unit,
)
from transforms.storage import urls
from transforms.storage.secrets import public_uri

# Files in a unit of LabelAudio, so that decoding can prefetch across them.
FILES_PER_UNIT = 64

ROW = Dict[str, Any]


@dataclass(frozen=True)
class LabelSettings:
    """The settings of every step, resolved against one checkpoint."""

    model: ModelSpec
    decode: DecodeSettings
    windows: WindowSettings
    fbank: FbankSettings
    inference: InferenceSettings
    rows: RowSettings
    sources: SourceSettings = field(default_factory=SourceSettings)


@dataclass(frozen=True)
class InputSettings:
    """The settings of the steps from inputs to windows, resolved against the features' shape."""

    decode: DecodeSettings
    windows: WindowSettings
    sources: SourceSettings


def make_input_settings(
    fbank: FbankSettings,
    *,
    decode: DecodeSettings | None = None,
    window_s: float | None = None,
    hop_s: float | None = None,
    min_tail_ratio: float = 0.1,
    sources: SourceSettings | None = None,
) -> InputSettings:
    """Make the settings of the steps from inputs to windows; arguments as for ``make_settings``.

    The features give the rate and the longest window. Raises ``ConfigError`` if the window or hop
    does not fit them.
    """
    decode, sources = decode or DecodeSettings(), sources or SourceSettings()
    windows = WindowSettings.from_seconds(fbank, window_s, hop_s, min_tail_ratio)
    # A window within one piece need not be copied, so a piece is a number of whole windows.
    windows_per_piece = max(1, round(decode.piece_samples / windows.window_samples))
    return InputSettings(
        decode=dataclasses.replace(
            decode,
            sample_rate_hz=fbank.sample_rate_hz,
            piece_samples=windows_per_piece * windows.window_samples,
        ),
        windows=windows,
        sources=dataclasses.replace(
            sources,
            window_s=windows.window_samples / windows.sample_rate_hz,
            hop_s=windows.hop_samples / windows.sample_rate_hz,
            limits=dataclasses.replace(sources.limits, max_item_bytes=decode.max_item_bytes),
        ),
    )


def make_settings(
    model: ModelSpec,
    *,
    decode: DecodeSettings | None = None,
    inference: InferenceSettings | None = None,
    window_s: float | None = None,
    hop_s: float | None = None,
    min_tail_ratio: float = 0.1,
    top_k: int = 10,
    store_scores: bool = False,
    sources: SourceSettings | None = None,
) -> LabelSettings:
    """Make the settings of every step for a checkpoint, with the defaults of ``earmark label``.

    Raises ``ConfigError`` if the window or hop does not fit the checkpoint.

    Args:
        decode: The rate is always the model's.
        window_s: None for the checkpoint's.
        hop_s: Seconds between the starts of two windows; None for the window's length.
        min_tail_ratio: Share of the window below which a tail gets no padded window of its own.
        top_k: Number of labels in a row.
        store_scores: Also store the score of every class.
        sources: Windows and the size limit of an item always come from the other settings.
    """
    inference = inference or InferenceSettings()
    fbank = FbankSettings(
        sample_rate_hz=model.sampling_rate,
        num_mel_bins=model.config.num_mel_bins,
        num_frames=model.num_frames,
        mean=model.mean,
        std=model.std,
    )
    inputs = make_input_settings(
        fbank,
        decode=decode,
        window_s=window_s,
        hop_s=hop_s,
        min_tail_ratio=min_tail_ratio,
        sources=sources,
    )
    return LabelSettings(
        model=model,
        decode=inputs.decode,
        windows=inputs.windows,
        fbank=fbank,
        inference=inference,
        rows=RowSettings(
            labels=model.labels,
            activation=model.activation,
            hidden_size=model.hidden_size,
            top_k=top_k,
            store_scores=store_scores,
            embedding_dtype=inference.embedding_dtype,
        ),
        sources=inputs.sources,
    )


@beam.typehints.with_input_types(WorkUnit)
@beam.typehints.with_output_types(UnitEvent)
class LabelUnits(beam.PTransform[PCollection[WorkUnit], PCollection[UnitEvent]]):
    """Label work units: ``WorkUnit`` to ``WindowRow | ClipRow | ItemFailure | UnitEnd``."""

    def __init__(self, settings: LabelSettings) -> None:
        super().__init__()
        self._settings = settings

    def expand(self, units: PCollection[WorkUnit]) -> PCollection[UnitEvent]:
        """Apply the transform."""
        settings = self._settings
        handler = ASTModelHandler(
            settings.model,
            settings.inference,
            make_features=functools.partial(DeviceFbank, settings.fbank),
            # A late result would get the Beam window of the element it is emitted with.
            runs_ahead=units.windowing.is_default(),
        )
        on_device = functools.partial(makes_features_on_device, settings.inference)
        events: PCollection[UnitEvent] = (
            units
            | "Decode"
            >> DecodeAudio(
                settings.decode, functools.partial(read_items, settings=settings.sources)
            )
            | "Cut into windows" >> CutWindows(settings.windows)
            | "Extract fbank"
            >> ExtractFbank(settings.fbank, on_device, settings.inference.num_processes)
            | "Key features" >> beam.Map(_key_features)
            | "Run AST" >> RunInference(_KeyedFeatures(handler))
            | "Assemble rows" >> AssembleRows(settings.rows)
        )
        return events


def read_items(unit: WorkUnit, settings: SourceSettings) -> Iterator[EncodedClip | Failure]:
    """Read everything in a unit, after the failures that planning has found."""
    yield from unit.failures
    yield from read_unit(unit, settings)


def _key_features(
    event: Window | ItemFailure | UnitEnd,
) -> tuple[Window | ItemFailure | UnitEnd, FloatArray | None]:
    """Separate the features from a window, so that results do not carry them."""
    if isinstance(event, Window):
        return event.with_data(None), event.data
    return event, None


class _KeyedFeatures(KeyedModelHandler[Any, Any, Any, Any]):
    """Measures keyed features by the features alone, where Beam would pickle every key."""

    def get_num_bytes(self, batch: Sequence[tuple[Any, FloatArray | None]]) -> int:
        return sum(features.nbytes for _, features in batch if features is not None)


class LabelledAudio(NamedTuple):
    """The output of ``LabelAudio``: rows of Earmark's tables; ``failures`` are of ``errors``."""

    windows: PCollection[dict[str, Any]]
    clips: PCollection[dict[str, Any]]
    failures: PCollection[dict[str, Any]]


class LabelAudio(beam.PTransform[PCollection[str], LabelledAudio]):
    """Label audio files in your own pipeline: URIs or paths in, rows and failures out.

    ``make_settings`` makes the settings.
    """

    def __init__(self, settings: LabelSettings) -> None:
        super().__init__()
        self._settings = settings

    def default_type_hints(self) -> IOTypeHints:
        """Return the types of input and output, which Beam checks."""
        return IOTypeHints.empty().with_input_types(str).with_output_types(ROW, ROW, ROW)

    def expand(self, uris: PCollection[str]) -> LabelledAudio:
        """Apply the transform."""
        make_rows = beam.FlatMap(functools.partial(_row_of, settings=self._settings.rows))
        make_rows = make_rows.with_output_types(ROW, windows=ROW, clips=ROW, failures=ROW)
        rows = (
            uris
            | "Group files"
            >> beam.BatchElements(min_batch_size=FILES_PER_UNIT, max_batch_size=FILES_PER_UNIT)
            | "Make units" >> beam.Map(unit_of_files)
            | "Label units" >> LabelUnits(self._settings)
            | "Make rows" >> make_rows.with_outputs("windows", "clips", "failures")
        )
        return LabelledAudio(rows.windows, rows.clips, rows.failures)


def unit_of_files(uris: Sequence[str]) -> WorkUnit:
    """Make a work unit of whole files."""
    names = [urls.normalise(uri) for uri in uris]
    items = tuple(
        Item(clip_id=make_clip_id(public_uri(url)), uri=printable(public_uri(url)), url=url)
        for url in names
    )
    return WorkUnit(unit_id=make_unit_id("files", items), kind="files", items=items)


def _row_of(event: UnitEvent, settings: RowSettings) -> Iterator[TaggedOutput[str, dict[str, Any]]]:
    if isinstance(event, WindowRow):
        tag, table = "windows", windows_table([event], settings)
    elif isinstance(event, ClipRow):
        tag, table = "clips", clips_table([event], settings)
    elif isinstance(event, ItemFailure):
        tag, table = "failures", errors_table([event.failure], event.unit_id)
    else:
        return
    yield TaggedOutput(tag, table.to_pylist()[0])
