"""Labelled clips for training and for validation, and the labels to learn.

Clips and labels that do not fit each other are an error before anything is trained. It names the
clip, the label and the next step.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.config.train import split_hold_out
from pipeline.terminal.wording import counted
from pipeline.training.data.clip_cache import CachedClips
from pipeline.training.data.failures import check_failures
from pipeline.training.data.packed_clips import CachedClip, PackedClips, SampleFiles
from transforms.errors import InputError
from transforms.models.labels import find_label, labels_from_names
from transforms.records import FloatArray, Item
from transforms.sources.file_kinds import MANIFEST_EXTENSIONS
from transforms.sources.read_unit import Found

Loss: TypeAlias = Literal["cross_entropy", "binary_cross_entropy"]

_NUM_EXAMPLES = 5
# Files of these kinds may be manifests; in a folder they are skipped.
_MAYBE_MANIFESTS = MANIFEST_EXTENSIONS | {".parquet"}


# --- Training and validation ---------------------------------------------------------------


def split_clips(
    cached: CachedClips, hold_out: str | None
) -> tuple[tuple[CachedClip, ...], tuple[CachedClip, ...]]:
    """Divide clips into those to train on and those to validate with.

    ``hold_out`` is ``COLUMN=VALUE``: clips whose metadata has this value in this column, compared
    as text, are for validation. With None no clip is.

    Raise ``InputError`` if there is no such column, no clip has the value, or all have it.
    """
    if hold_out is None:
        return cached.clips, ()
    are_held = which_are_held_out([clip.item for clip in cached.clips], hold_out)
    train = itertools.compress(cached.clips, map(operator.not_, are_held))
    return tuple(train), tuple(itertools.compress(cached.clips, are_held))


def which_are_held_out(items: Sequence[Item], hold_out: str) -> list[bool]:
    """Return for each item whether it is for validation; see ``split_clips``, also for errors."""
    column, value = split_hold_out(hold_out)
    columns = [_metadata_of(item) for item in items]
    texts = [_texts(values[column]) if column in values else () for values in columns]
    are_held = [value in of for of in texts]
    if not any(are_held):
        raise InputError(_why_none_is_held_out(hold_out, column, columns, texts))
    if all(are_held):
        raise InputError(
            f"--hold-out {hold_out} holds out all of {counted(len(items), 'clip')}, and none "
            f"remains to train on; give a value of {column} that only some clips have"
        )
    return are_held


def _metadata_of(item: Item) -> Mapping[str, object]:
    if item.metadata is None:
        return {}
    try:
        values = json.loads(item.metadata)
    except ValueError as error:
        raise InputError(
            f"the metadata of {item.clip_id} is not JSON: {error}; correct it"
        ) from error
    return values if isinstance(values, dict) else {}


def _texts(value: object) -> tuple[str, ...]:
    """Return how a value may be written: its text, and whole numbers without decimals."""
    if isinstance(value, str):
        return (value.strip(),)
    text = json.dumps(value, ensure_ascii=False)
    is_whole = isinstance(value, float) and value.is_integer()
    return (str(int(value)), text) if is_whole and isinstance(value, float) else (text,)


def _why_none_is_held_out(
    hold_out: str,
    column: str,
    columns: Sequence[Mapping[str, object]],
    texts: Sequence[tuple[str, ...]],
) -> str:
    known = list(dict.fromkeys(name for values in columns for name in values))
    if not known:
        return (
            f"--hold-out {hold_out}: the inputs have no columns besides labels; expected a "
            f"manifest with a column {column}"
        )
    if column not in known:
        return (
            f"--hold-out {hold_out}: no clip has a column {column}; the existing columns are: "
            f"{_some(known, 20)}"
        )
    values = sorted({of[0] for of in texts if of})
    return (
        f"--hold-out {hold_out}: no clip has this value; {column} has "
        f"{counted(len(values), 'value')}: {_some(values)}"
    )


def _some(texts: Sequence[str], num_shown: int = _NUM_EXAMPLES) -> str:
    more = f" and {len(texts) - num_shown:,} more" if len(texts) > num_shown else ""
    return ", ".join(texts[:num_shown]) + more


def check_found(found: Found, which: str, hold_out: str | None = None) -> None:
    """Refuse, before decoding, inputs that cannot be learnt from or validated with.

    This is certain if no item lies in a container, because only a manifest can label a file:
    ``split_clips`` or ``resolve_labels`` would refuse the inputs however decoding ends, with the
    same errors. ``which`` is their purpose: ``training`` or ``validation``.
    """
    if found.containers or not found.items:
        return
    sets = {which: list(found.items)}
    # Without any labels, the column to hold out by is the lesser problem.
    if hold_out is not None and any(item.truth is not None for item in found.items):
        are_held = which_are_held_out(found.items, hold_out)
        sets = {
            which: list(itertools.compress(found.items, map(operator.not_, are_held))),
            "validation": list(itertools.compress(found.items, are_held)),
        }
    for name, items in sets.items():
        if all(item.truth is None for item in items):
            raise InputError(_nothing_labelled(items, name) + _manifest_hint(found))


def _manifest_hint(found: Found) -> str:
    skipped = found.skipped_by_extension
    kinds = [f"{skipped[kind]:,} {kind}" for kind in sorted(_MAYBE_MANIFESTS & set(skipped))]
    doubts = "".join(f". {warning}" for warning in found.warnings)
    if not kinds:
        return doubts
    return (
        f"{doubts}. Files in the folder that were skipped: {', '.join(kinds)}. Manifests count "
        "only when they are named: if the labels are there, give that file instead of the folder"
    )


# --- Labels --------------------------------------------------------------------------------


class ResolvedLabels(NamedTuple):
    """The labels to learn, in the order of the model's outputs, and warnings for the user."""

    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def resolve_labels(
    train: Sequence[CachedClip],
    validation: Sequence[CachedClip] = (),
    names: Sequence[str] | None = None,
    *,
    loss: Loss = "cross_entropy",
    is_held_out: bool = False,
) -> ResolvedLabels:
    """Settle the labels that a model is to learn, and check that clips and labels fit.

    Args:
        validation: Clips to validate with; their labels must be among those to learn.
        names: The labels of the model or of a list, in order; None for those of the training
            clips, sorted.
        loss: With ``cross_entropy``, each clip must have exactly one label.
        is_held_out: Whether the validation clips were split off the training clips.

    Raises:
        InputError: A clip has no label, an unknown one, or more or fewer than the loss allows; or a
            label cannot be both learnt and validated.
    """
    known = tuple(names) if names is not None else _sorted_names(train)
    sets = [("training", train), *([("validation", validation)] if validation else [])]
    for which, clips in sets:
        _check_labelled(clips, which)
    for which, clips in sets:
        _check_known(clips, which, known, is_from_clips=names is None)
    if not known:
        raise InputError(
            f"{counted(len(train), 'training clip')} have empty lists of labels; give clips that "
            "have one, or the list of labels with --labels"
        )
    if loss == "cross_entropy":
        for which, clips in sets:
            _check_one_label(clips, which, known)
        if len(known) < 2:
            raise InputError(
                f"there is only one label to learn, {known[0]!r}; with training.loss=cross_entropy "
                "a model always answers with it. Give clips with at least two labels, or --set "
                "training.loss=binary_cross_entropy"
            )
    find = _finder(known)
    counts = np.bincount([i for clip in train for i in find(clip)], minlength=len(known))
    checks = np.bincount([i for clip in validation for i in find(clip)], minlength=len(known))
    if is_held_out:
        _check_learnable(known, counts, checks)
    if names is None and loss == "cross_entropy":
        _check_not_single(known, counts, checks)
    return ResolvedLabels(known, tuple(_label_warnings(known, counts)))


def _sorted_names(clips: Sequence[CachedClip]) -> tuple[str, ...]:
    return tuple(sorted({name for clip in clips for name in clip.item.truth or ()}))


def _finder(names: Sequence[str]) -> Callable[[CachedClip], tuple[int, ...]]:
    """Make a function from a clip to the indices of its known labels, each once."""
    labels = labels_from_names(names)
    # There are few texts and many clips.
    find = functools.lru_cache(maxsize=None)(lambda text: find_label(text, labels))

    def indices(clip: CachedClip) -> tuple[int, ...]:
        found = [find(text) for text in clip.item.truth or ()]
        return tuple(dict.fromkeys(index for index in found if index is not None))

    return indices


def _nothing_labelled(items: Sequence[Item], which: str) -> str:
    return (
        f"none of {counted(len(items), f'{which} clip')} has a label; expected a manifest with a "
        "column label (one name) or labels (several), or a Parquet file or tar that has it beside "
        f"the audio. The first clip: {items[0].clip_id}"
    )


def _check_labelled(clips: Sequence[CachedClip], which: str) -> None:
    without = [clip.item.clip_id for clip in clips if clip.item.truth is None]
    if not without:
        return
    if len(without) == len(clips):
        raise InputError(_nothing_labelled([clip.item for clip in clips], which))
    raise InputError(
        f"{len(without):,} of {counted(len(clips), f'{which} clip')} have no label: "
        f"{_some(without)}. Label them, or leave them out of the input"
    )


def _check_known(
    clips: Sequence[CachedClip], which: str, names: Sequence[str], *, is_from_clips: bool
) -> None:
    labels = labels_from_names(names)
    texts = dict.fromkeys(text for clip in clips for text in clip.item.truth or ())
    unknown = {text for text in texts if find_label(text, labels) is None}
    if not unknown:
        return
    first: dict[str, str] = {}
    for clip in clips:
        for text in clip.item.truth or ():
            if text in unknown:
                first.setdefault(text, clip.item.clip_id)
    described = [
        f"{text!r} of {first[text]}{_closest(text, names)}"
        for text in sorted(unknown)[:_NUM_EXAMPLES]
    ]
    more = f" and {len(unknown) - _NUM_EXAMPLES:,} more" if len(unknown) > _NUM_EXAMPLES else ""
    number = sum(any(text in unknown for text in clip.item.truth or ()) for clip in clips)
    if is_from_clips:
        where = "that no training clip has"
        advice = "Give training clips with them, or leave those clips out"
    else:
        where = f"that are not among the {counted(len(names), 'label')} to learn"
        advice = "Correct them, leave those clips out, or give the right list of labels"
    raise InputError(
        f"{number:,} of {counted(len(clips), f'{which} clip')} have labels {where}: "
        f"{_some(described)}{more}. {advice}"
    )


def _closest(text: str, names: Sequence[str]) -> str:
    by_lower = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(text.casefold(), by_lower, n=1, cutoff=0.5)
    return f" (the closest is {by_lower[close[0]]!r})" if close else ""


def _check_one_label(clips: Sequence[CachedClip], which: str, names: Sequence[str]) -> None:
    find = _finder(names)
    others = [(clip, len(find(clip))) for clip in clips]
    others = [(clip, number) for clip, number in others if number != 1]
    if others:
        clip, number = others[0]
        raise InputError(
            f"{len(others):,} of {counted(len(clips), f'{which} clip')} do not have exactly one "
            f"label, which training.loss=cross_entropy needs; {clip.item.clip_id} has "
            f"{number or 'none'}. Give --set training.loss=binary_cross_entropy if a clip may have "
            "several labels or none"
        )


def _check_learnable(
    names: Sequence[str], counts: npt.NDArray[np.int64], checks: npt.NDArray[np.int64]
) -> None:
    lost = [name for name, n, c in zip(names, counts, checks, strict=True) if c and not n]
    if lost:
        raise InputError(
            f"all clips of {counted(len(lost), 'label')} are held out, and none remains to learn "
            f"from: {_some(lost)}. Hold out another value, or leave those clips out"
        )


def _check_not_single(
    names: Sequence[str], counts: npt.NDArray[np.int64], checks: npt.NDArray[np.int64]
) -> None:
    single = [name for name, n in zip(names, counts + checks, strict=True) if n == 1]
    if single:
        raise InputError(
            f"{counted(len(single), 'label')} of {len(names):,} have one clip, which cannot be "
            f"used for both training and validation: {_some(single)}. Add clips, leave those out, "
            "or give the list of labels with --labels to confirm that it is meant"
        )


def _label_warnings(names: Sequence[str], counts: npt.NDArray[np.int64]) -> Iterator[str]:
    pairs = list(zip(names, counts, strict=True))
    single = [name for name, number in pairs if number == 1]
    if single:
        yield f"{counted(len(single), 'label')} with one training clip: {_some(single)}."
    absent = [name for name, number in pairs if number == 0]
    if absent:
        yield f"{counted(len(absent), 'label')} without a training clip: {_some(absent)}."
    spellings = Counter(_spelling(name) for name in names)
    alike = [name for name in names if spellings[_spelling(name)] > 1]
    if alike:
        yield f"Labels that differ only in spelling are learnt as different ones: {_some(alike)}."


def _spelling(name: str) -> str:
    return " ".join(name.split()).casefold()


# --- Clips with labels ---------------------------------------------------------------------


@dataclass(frozen=True)
class ClipSet:
    """Clips with labels, in the cache's order; labels are indices into ``label_names``."""

    files: SampleFiles
    clips: tuple[CachedClip, ...]
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.clips)

    @functools.cached_property
    def targets(self) -> FloatArray:
        """1 where a clip has a label, else 0; shape (clips, labels), float32, read-only."""
        targets = np.zeros((len(self.clips), len(self.label_names)), np.float32)
        for row, clip in zip(targets, self.clips, strict=True):
            row[list(clip.labels)] = 1.0
        targets.setflags(write=False)
        return targets

    def counts(self) -> dict[str, int]:
        """Count the clips of each label."""
        numbers = Counter(index for clip in self.clips for index in clip.labels)
        return {name: numbers[index] for index, name in enumerate(self.label_names)}


def pack_clips(clips: ClipSet) -> PackedClips:
    """Return the same clips as arrays, without the ids and texts that only people need."""
    counts = [len(clip.labels) for clip in clips.clips]
    return PackedClips(
        files=clips.files,
        offsets=np.array([clip.offset for clip in clips.clips], np.int64),
        num_samples=np.array([clip.num_samples for clip in clips.clips], np.int64),
        labels=np.array([index for clip in clips.clips for index in clip.labels], np.int32),
        bounds=np.cumsum([0, *counts], dtype=np.int64),
        num_labels=len(clips.label_names),
    )


def label_clips(
    cached: CachedClips, clips: Sequence[CachedClip], label_names: Sequence[str]
) -> ClipSet:
    """Make a set of a cache's clips with their labels, which ``resolve_labels`` has checked."""
    find = _finder(label_names)
    return ClipSet(
        files=cached.files,
        clips=tuple(dataclasses.replace(clip, labels=find(clip)) for clip in clips),
        label_names=tuple(label_names),
    )


class ClipSets(NamedTuple):
    """Clips to train on and to validate with, and warnings for the user."""

    train: ClipSet
    validation: ClipSet | None
    warnings: tuple[str, ...]


def make_clip_sets(
    cached: CachedClips,
    cached_validation: CachedClips | None = None,
    *,
    hold_out: str | None = None,
    label_names: Sequence[str] | None = None,
    loss: Loss = "cross_entropy",
    max_failed: float = 0.0,
) -> ClipSets:
    """Divide the clips, settle the labels, and join both.

    The validation clips are an input of their own, or held out. See
    ``split_clips``, ``resolve_labels`` and ``check_failures`` for the arguments and the errors;
    ``max_failed`` holds for either input.
    """
    check_failures(cached, max_failed)
    if cached_validation is not None:
        check_failures(cached_validation, max_failed)
    train, held = split_clips(cached, hold_out)
    checked = held if cached_validation is None else cached_validation.clips
    names, warnings = resolve_labels(
        train, checked, label_names, loss=loss, is_held_out=hold_out is not None
    )
    return ClipSets(
        train=label_clips(cached, train, names),
        validation=label_clips(cached_validation or cached, checked, names) if checked else None,
        warnings=(
            *warnings,
            *_shared_warnings(train, checked),
            *_odd_warnings([*train, *checked]),
        ),
    )


def _shared_warnings(train: Sequence[CachedClip], checked: Sequence[CachedClip]) -> Iterator[str]:
    """Warn of validation clips that are identical to training clips."""
    known = {_content_of(clip) for clip in train}
    shared = [clip.item.clip_id for clip in checked if _content_of(clip) in known]
    if shared:
        yield (
            f"{len(shared):,} of {counted(len(checked), 'validation clip')} have the same content "
            f"as a training clip, so the figures are too good: {_some(shared)}."
        )


def _content_of(clip: CachedClip) -> tuple[str, float | None, float | None]:
    return clip.content_sha256, clip.item.start_s, clip.item.end_s


def _odd_warnings(clips: Sequence[CachedClip]) -> Iterator[str]:
    """Warn of clips that were decoded only in part, or with something wrong."""
    odd = [clip for clip in clips if clip.warning is not None]
    if odd:
        yield (
            f"{counted(len(odd), 'clip')} decoded with a warning; one of them: "
            f"{odd[0].item.clip_id}: {odd[0].warning}."
        )
