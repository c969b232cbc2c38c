"""The records that travel from step to step.

    WorkUnit ─sources─▶ EncodedClip ─decode─▶ Waveform ─windows─▶ Window ─fbank─▶ Window
                             │                   │                   │        (with features)
                             └────── Failure ────┴───────────────────┤
                                                                     ▼
             rows ◀─rows─ (Window, Prediction) ◀──────────inference──┘

A **work unit** is read, labelled and committed as one: a group of loose files, or a slice of a
container (a byte range of a tar, a row range of a Parquet file). Everything read from it is an
**item**: an ``EncodedClip``, or a ``Failure`` if it could not be read. A clip is decoded into
``Waveform`` pieces, so that hours of audio fit into bounded memory. The last piece carries the
clip's ``ClipFacts``. Pieces become ``Window``s. The last window of a clip carries the facts and the
number of its windows. ``UnitEnd`` closes the unit and tells how many items it held, so the sink
can count and needs no order.

``item_index`` is the item's position in its unit, and ``window_index`` the window's in its clip;
both count from 0. An item is one clip, except with ``decode.channel: each``: then each of its
channels is a clip, and ``channel`` counts them from 1; else it is None. So a clip is known by its
unit, its ``item_index`` and its ``channel``. Its id is that of the item, with ``!2`` behind it for
the second channel (``make_channel_id``). A ``Failure`` is always that of the item: if one of its
channels fails, the item has a row in ``errors``, and no clips.

All records are frozen, and nobody writes to an array that has been passed on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
UnitKind = Literal["files", "tar", "parquet"]


def make_channel_id(clip_id: str, channel: int | None) -> str:
    """Return the id of a clip that is one channel of an item; None: that is all of it."""
    return clip_id if channel is None else f"{clip_id}!{channel}"


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to label: a file, a tar member, a Parquet row, or a segment of one.

    Attributes:
        clip_id: Unique and stable name in a result (``make_clip_id``).
        uri: The file or container it comes from, without signature parameters: absolute local
            path (no ``file://``) or full URL.
        url: The URL to open. It may carry a signature, so it is never written or printed. Empty if
            the bytes come with a container.
        member: Name inside the tar, or None.
        row: Row number inside the Parquet file, counted from 0, or None.
        start_s: Start of the segment in seconds from the start of the file, or None for a whole
            file.
        end_s: End of the segment in seconds, exclusive, or None for the end of the file.
        truth: Labels that the input gives, or None if it gives none.
        metadata: JSON text of an object with everything else the input gives, or None.
        size: Bytes of the file (or of the container that holds it), or None.
        version: Etag or modification time: tells a changed file from an unchanged one.
    """

    clip_id: str
    uri: str
    url: str = field(default="", repr=False)
    member: str | None = None
    row: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    truth: tuple[str, ...] | None = None
    metadata: str | None = None
    size: int | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class ContainerSlice:
    """A part of a tar or Parquet file that one work unit reads.

    Attributes:
        uri: The container, without signature parameters.
        url: The URL to open. It may carry a signature, so it is never written or printed.
        size: The container's size in bytes, or None if the store does not tell.
        version: Etag or modification time.
        start: First byte of the slice (tar: of the archive, decompressed for ``.tar.gz``), or
            first row (Parquet).
        stop: One past the last byte or row; None means to the container's end.
        column: Parquet only: the audio column that planning chose; None to choose it by the schema.
        seen_names: Tar only: for member names that occurred before this slice and occur in it
            again, how often. So the second member of a name is ``#name~2`` wherever the slice
            begins.
    """

    uri: str
    url: str = field(repr=False)
    size: int | None
    version: str | None
    start: int = 0
    stop: int | None = None
    seen_names: Mapping[str, int] = field(default_factory=dict)
    column: str | None = None


@dataclass(frozen=True, slots=True)
class Carried:
    """Rows of the replaced unit ``unit_id`` that the new unit carries over unchanged.

    ``clip_ids`` are those of the items whose clips to copy; None means every row in its ``clips``
    part.
    """

    unit_id: str
    clip_ids: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A unit of work: read, labelled and committed as one.

    Attributes:
        unit_id: Name of its parts, made from its content (``make_unit_id``).
        kind: ``files`` (``items`` lists them all), ``tar`` or ``parquet`` (a ``container``).
        items: Loose files or segments, in order. With a container: the members or rows that a
            manifest asked for; empty means everything in the slice.
        container: The slice to read; None for ``files``.
        estimated_windows: Windows expected, from sizes alone; for even units and progress.
        replaces: Committed units whose content this one redoes; they are removed after its commit.
        carried: Rows to copy from a replaced unit, if any.
        failures: Items that planning could not read (a bad line of a manifest); they become rows
            too.
    """

    unit_id: str
    kind: UnitKind
    items: tuple[Item, ...] = ()
    container: ContainerSlice | None = None
    estimated_windows: int = 1
    replaces: tuple[str, ...] = ()
    carried: Carried | None = None
    failures: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        if (self.kind == "files") != (self.container is None):
            raise ValueError(
                f"unit {self.unit_id}: kind is {self.kind!r} and container is {self.container!r}; "
                "a unit of files has no container, any other kind has one"
            )


@dataclass(frozen=True, slots=True)
class EncodedClip:
    """An item's encoded bytes, in memory or in a local file; exactly one of the two.

    With ``delete_path`` the file is this clip's own, to be removed after decoding.
    """

    item: Item
    data: bytes | None = field(default=None, repr=False)
    path: str | None = None
    delete_path: bool = False

    def __post_init__(self) -> None:
        if (self.data is None) == (self.path is None):
            raise ValueError(f"{self.item.clip_id}: give data or path, exactly one")


@dataclass(frozen=True, slots=True)
class Failure:
    """An item that could not be labelled, and why; a row in ``errors``.

    Attributes:
        item: The item; the container itself if that could not be read to its end.
        stage: ``read``, ``decode``, ``fbank`` or ``inference``.
        error_type: Name of the error, for grouping.
        is_container: Whether the item is a container not read to its end (exit code 3).
    """

    item: Item
    stage: str
    error_type: str
    message: str
    is_container: bool = False


WarningKind = Literal[
    "cut_short",  # less audio than the file declares
    "damaged",  # what cannot be decoded is left out
    "header_wrong",  # more audio than the header declares
    "format_changes",  # of rate or channels, on the way
    "extra_bytes",  # skipped: neither audio nor a known tag
    "several_streams",  # the first is used
    "channels_cancel",  # mixing down loses most of the sound
    "segment_beyond_end",  # of the file
]


@dataclass(frozen=True, slots=True)
class Note:
    """One thing that is wrong with a clip that is labelled nevertheless."""

    kind: WarningKind
    words: str


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """Facts about a clip that has been decoded to its end.

    Levels are measured at the source's rate, over all channels before mixing down, or of the one
    channel that was taken.

    Attributes:
        duration_s: Decoded length in seconds (of the segment, for a segment).
        sample_rate_hz: The source's rate.
        channels: The source's channel count.
        peak_dbfs: 20·log10 of the largest |x|; ``-inf`` for digital silence.
        rms_dbfs: 20·log10 of the root mean square; ``-inf`` for digital silence.
        clipped_ratio: Share of samples with |x| ≥ 0.999, in [0, 1].
        silent_ratio: Share of 20 ms frames whose RMS is below −60 dBFS, in [0, 1].
        content_sha256: Hex digest of the encoded bytes (the whole file, for a segment).
        warning: What is wrong with a clip that was labelled nevertheless, or None.
        warning_kinds: The kinds of what ``warning`` says, each once.
    """

    duration_s: float
    sample_rate_hz: int
    channels: int
    peak_dbfs: float
    rms_dbfs: float
    clipped_ratio: float
    silent_ratio: float
    content_sha256: str
    warning: str | None = None
    warning_kinds: tuple[WarningKind, ...] = ()


@dataclass(frozen=True, slots=True)
class Waveform:
    """A piece of a decoded clip: mono, at the model's rate. Pieces of a clip come in order.

    Attributes:
        samples: Shape (num_samples,), float32, nominally in [-1, 1].
        facts: The clip's facts on its last piece, else None.
    """

    unit_id: str
    item_index: int
    item: Item
    samples: FloatArray = field(repr=False)
    facts: ClipFacts | None = None
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """One input of the model, and where it lies in its clip.

    Attributes:
        start_s: Start in seconds from the start of the file.
        end_s: True end in seconds: padding does not count.
        data: Samples of shape (num_samples,) until ``fbank``, then features of shape
            (num_frames, num_mel_bins); float32. None after inference, or on error.
        facts: On the clip's last window: its facts; else None.
        num_windows: On the clip's last window: how many windows the clip has; else None.
        error: Why there are no features, or None. The window still travels on, because the windows
            of a clip are counted.
    """

    unit_id: str
    item_index: int
    item: Item
    window_index: int
    start_s: float
    end_s: float
    data: FloatArray | None = field(repr=False)
    facts: ClipFacts | None = None
    num_windows: int | None = None
    error: str | None = None
    channel: int | None = None

    @property
    def clip_id(self) -> str:
        """The id of its clip."""
        return make_channel_id(self.item.clip_id, self.channel)

    def with_data(self, data: FloatArray | None) -> Window:
        """Return the window with features for samples, or without data."""
        return dataclasses.replace(self, data=data)


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """A failure on its way through a unit; with a ``channel``, the end of that clip."""

    unit_id: str
    item_index: int
    failure: Failure
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class UnitEnd:
    """The end of a unit: all of its items have been passed on.

    ``num_items`` includes failed items and a broken container's row. ``num_more_clips`` is how many
    clips there are beyond one for each item: an item has one for each of its channels, if each is a
    clip.
    """

    unit: WorkUnit
    num_items: int
    num_more_clips: int = 0


@dataclass(frozen=True, slots=True)
class WindowCheck:
    """A window's prediction compared with that of plain torch in float32.

    Attributes:
        score_difference: The largest absolute difference of a class's score.
        cosine: Cosine of the two embeddings, in [-1, 1].
        same_top: Whether both have the same best class.
        measured_utc: Time of the measurement, in ISO 8601.
        reused: Whether an earlier run measured it.
        error: Why it could not be measured; the other fields are then meaningless. None if it was.
    """

    score_difference: float = 0.0
    cosine: float = 1.0
    same_top: bool = True
    measured_utc: str = ""
    reused: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's output for one window.

    Attributes:
        embedding: Shape (hidden_size,), in the type in which it is stored (float32 or float16).
        scores: Shape (num_labels,), float32, after the activation.
        engine: What computed it, as the commit records it: ``torch cpu fp32``.
        error: Why there is no usable output; the arrays are then empty. None if there is.
        check: How far it is from the reference, if that was measured.
    """

    embedding: npt.NDArray[np.floating] = field(repr=False)
    scores: FloatArray = field(repr=False)
    engine: str
    error: str | None = None
    check: WindowCheck | None = None


class PendingBatch:
    """Predictions that a device is still computing.

    Args:
        finish: Waits for the predictions of the batch's windows, and returns them in order.
    """

    def __init__(self, finish: Callable[[], Sequence[Prediction]]) -> None:
        self._finish: Callable[[], Sequence[Prediction]] | None = finish
        self._predictions: Sequence[Prediction] = ()

    def wait(self) -> Sequence[Prediction]:
        """Return the predictions; the first call waits for them."""
        if self._finish is not None:
            self._predictions, self._finish = self._finish(), None  # and its tensors with it
        return self._predictions


@dataclass(frozen=True, slots=True, eq=False)
class PendingPrediction:
    """A window's prediction that is still being computed; pickling waits for it."""

    batch: PendingBatch
    index: int

    def wait(self) -> Prediction:
        """Wait for the batch, and return the prediction."""
        return self.batch.wait()[self.index]

    def __reduce__(self) -> tuple[Callable[[Prediction], Prediction], tuple[Prediction]]:
        """Pickle the prediction itself: Beam pickles a few elements to estimate the size of all."""
        return dataclasses.replace, (self.wait(),)


@dataclass(frozen=True, slots=True)
class WindowRow:
    """A labelled window on its way to the ``windows`` part; its times are those of ``Window``."""

    unit_id: str
    item_index: int
    clip_id: str
    window_index: int
    start_s: float
    end_s: float
    prediction: Prediction
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class ClipRow:
    """A labelled clip on its way to the ``clips`` part; it comes after its windows.

    Attributes:
        embedding: The windows' mean weighted by real duration, shape (hidden_size,).
        scores: Maximum (sigmoid) or mean (softmax) over the windows, shape (num_labels,).
    """

    unit_id: str
    item_index: int
    item: Item
    facts: ClipFacts
    num_windows: int
    embedding: npt.NDArray[np.floating]
    scores: FloatArray
    channel: int | None = None

    @property
    def clip_id(self) -> str:
        """The clip's id."""
        return make_channel_id(self.item.clip_id, self.channel)


UnitEvent = WindowRow | ClipRow | ItemFailure | UnitEnd
