"""Labelled clips: which to train on, which to validate with, and labels that fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.training.data.clip_cache import CachedClips
from pipeline.training.data.dataset import (
    label_clips,
    make_clip_sets,
    resolve_labels,
    split_clips,
)
from pipeline.training.data.failures import check_failures
from pipeline.training.data.packed_clips import CachedClip, SampleFiles
from transforms.errors import InputError
from transforms.records import Failure, Item, ItemFailure

RATE = 16_000


def failed(num_clips: int, num_failed: int, *, is_container: bool = False) -> CachedClips:
    failures = [
        ItemFailure("u", i, Failure(Item(f"bad{i}", "bad"), "decode", "X", "why", is_container))
        for i in range(num_failed)
    ]
    return made([clip(f"{i}", "a") for i in range(num_clips)], failures)


def test_too_many_failures_are_an_error() -> None:
    check_failures(failed(100, 0), 0.0)
    check_failures(failed(95, 5), 0.05)
    with pytest.raises(
        InputError,
        match=r"^6 of 100 items could not be decoded, and max_failed allows 0\.05 of them; one of "
        r"them: bad0: why\. Repair or leave out what is broken, or raise --max-failed\.$",
    ):
        check_failures(failed(94, 6), 0.05)
    with pytest.raises(InputError, match=r"^1 container could not be read to the end.*bad0: why"):
        check_failures(failed(99, 1, is_container=True), 0.5)
    check_failures(failed(99, 1, is_container=True), 1.0)


# --- Training and validation ---------------------------------------------------------------


def clip(name: str, *labels: str, content: str | None = None, **metadata: object) -> CachedClip:
    item = Item(name, name, truth=labels, metadata=json.dumps(metadata) if metadata else None)
    return CachedClip(item, 0, 1, content or name)


def unlabelled(name: str) -> CachedClip:
    return CachedClip(Item(name, name), 0, 1, name)


def made(clips: Sequence[CachedClip], failures: Sequence[ItemFailure] = ()) -> CachedClips:
    files = SampleFiles(Path("/nowhere"), (), (), "float32")
    return CachedClips(files, tuple(clips), tuple(failures), False)


FOLDS = [
    clip("a", "x", fold="1"),
    clip("b", "x", fold=2),
    clip("c", "y", fold=2.0, other=True),
    clip("d", "y", fold=2.5),
    clip("e", "y"),
]


@pytest.mark.parametrize(
    ("hold_out", "held"),
    [
        (None, ""),
        ("fold=1", "a"),
        ("fold=2", "bc"),
        ("fold = 2 ", "bc"),
        ("fold=2.0", "c"),
        ("fold=2.5", "d"),
        ("other=true", "c"),
    ],
)
def test_clips_are_held_out_by_a_column(hold_out: str | None, held: str) -> None:
    train, validation = split_clips(made(FOLDS), hold_out)
    assert "".join(clip.item.clip_id for clip in validation) == held
    assert "".join(clip.item.clip_id for clip in train) == "".join(
        c for c in "abcde" if c not in held
    )


@pytest.mark.parametrize(
    ("clips", "hold_out", "words"),
    [
        (FOLDS, "Fold=1", r"no clip has a column Fold; the existing columns are: fold, other$"),
        (FOLDS, "fold=9", r"no clip has this value; fold has 3 values: 1, 2, 2\.5$"),
        (
            FOLDS[4:],
            "fold=9",
            r"the inputs have no columns besides labels; expected a manifest with",
        ),
        (FOLDS[1:3], "fold=2", r"fold=2 holds out all of 2 clips, and none remains to train on"),
    ],
)
def test_a_hold_out_without_effect_is_an_error(
    clips: list[CachedClip], hold_out: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        split_clips(made(clips), hold_out)


# --- Labels --------------------------------------------------------------------------------

PAIRS = [clip("a1", "cat"), clip("a2", "cat"), clip("b1", "ant"), clip("b2", "ant")]


def test_labels_are_those_of_the_clips_sorted() -> None:
    assert resolve_labels(PAIRS) == (("ant", "cat"), ())


def test_labels_of_a_list_are_found_by_id_and_spelling() -> None:
    names = ["Walk, footsteps", "cat", "ant"]
    clips = [clip("a", " Cat"), clip("b", "ANT"), clip("c", "walk,  footsteps")]
    resolved = resolve_labels(clips, names=names)
    assert resolved.names == tuple(names)
    labelled = label_clips(made(clips), clips, names)
    assert [one.labels for one in labelled.clips] == [(1,), (2,), (0,)]


@pytest.mark.parametrize(
    ("train", "validation", "settings", "words"),
    [
        (
            [unlabelled("a"), unlabelled("b")],
            [],
            {},
            r"^none of 2 training clips has a label; expected a manifest with a column label \(one "
            r"name\) or labels \(several\).*The first clip: a$",
        ),
        (
            [*PAIRS, *map(unlabelled, "uvwxyz")],
            [],
            {},
            r"^6 of 10 training clips have no label: u, v, w, x, y and 1 more\. Label them",
        ),
        (PAIRS, [unlabelled("v"), *PAIRS], {}, r"^1 of 5 validation clips have no label: v\."),
        (
            [*PAIRS, clip("c", "catt"), clip("d", "catt"), clip("e", "zebra")],
            [],
            {"names": ["cat", "ant"]},
            r"^3 of 7 training clips have labels that are not among the 2 labels to learn: 'catt' "
            r"of c \(the closest is 'cat'\), 'zebra' of e\. Correct them",
        ),
        (
            PAIRS,
            [clip("v", "ants")],
            {},
            r"^1 of 1 validation clip have labels that no training clip has: 'ants' of v \(the "
            r"closest is 'ant'\)\. Give training clips with them",
        ),
        (
            [*PAIRS, clip("c", "ant", "cat"), clip("d")],
            [],
            {},
            r"^2 of 6 training clips do not have exactly one label, which "
            r"training\.loss=cross_entropy needs; c has 2\. Give --set training\.loss=binary_cross",
        ),
        (PAIRS, [clip("v")], {}, r"^1 of 1 validation clip do not have exactly one.*v has none"),
        (PAIRS[:2], [], {}, r"^there is only one label to learn, 'cat'; with training\.loss=cross"),
        (
            [clip("a"), clip("b")],
            [],
            {"loss": "binary_cross_entropy"},
            r"^2 training clips have empty lists of labels; give clips that",
        ),
        (
            [*PAIRS, clip("c", "cow"), clip("d", "dog")],
            PAIRS,
            {},
            r"^2 labels of 4 have one clip, which cannot be used for both training and validation: "
            r"cow, dog\. Add clips, leave those out, or give the list of labels with --labels",
        ),
        (
            PAIRS[:2],
            PAIRS[2:],
            {"names": ["cat", "ant"], "is_held_out": True},
            r"^all clips of 1 label are held out, and none remains to learn from: ant\. Hold out",
        ),
    ],
)
def test_clips_and_labels_that_do_not_fit_are_an_error(
    train: list[CachedClip], validation: list[CachedClip], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        resolve_labels(train, validation, **settings)


def test_rare_labels_that_are_meant_are_a_warning() -> None:
    single = [*PAIRS, clip("c", "cow")]
    meant = resolve_labels(single, names=["cat", "ant", "cow", "dog", "elk"])
    assert meant.warnings == (
        "1 label with one training clip: cow.",
        "2 labels without a training clip: dog, elk.",
    )
    checked = resolve_labels(single, [clip("v", "cow")], is_held_out=True)
    assert checked.warnings == ("1 label with one training clip: cow.",)
    several = resolve_labels(single, loss="binary_cross_entropy")
    assert several.warnings == ("1 label with one training clip: cow.",)
    other = resolve_labels(PAIRS[:2], PAIRS[2:], ["cat", "ant"])  # an input of its own
    assert other.warnings == ("1 label without a training clip: ant.",)


def test_labels_that_differ_only_in_spelling_are_a_warning() -> None:
    clips = [*PAIRS, clip("c", "Cat"), clip("d", "Cat")]
    assert resolve_labels(clips).warnings == (
        "Labels that differ only in spelling are learnt as different ones: Cat, cat.",
    )


# --- Clips with labels ---------------------------------------------------------------------


def test_targets_and_counts_say_which_labels_a_clip_has() -> None:
    clips = [clip("a", "x", "z"), clip("b"), clip("c", "y")]
    sets = make_clip_sets(made(clips), loss="binary_cross_entropy")
    expected = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)
    assert sets.train.targets.dtype == np.float32
    np.testing.assert_array_equal(sets.train.targets, expected)
    assert sets.train.targets is sets.train.targets
    assert sets.train.counts() == {"x": 1, "y": 1, "z": 1}
    assert sets.train.label_names == ("x", "y", "z")
    assert len(sets.train) == 3
    assert sets.validation is None


def test_validation_clips_that_are_training_clips_are_a_warning() -> None:
    other = [clip("v1", "cat", content="a1"), clip("v2", "ant"), clip("v3", "ant", content="b2")]
    sets = make_clip_sets(made(PAIRS), made(other))
    assert sets.validation is not None
    assert [one.item.clip_id for one in sets.validation.clips] == ["v1", "v2", "v3"]
    assert sets.warnings == (
        "2 of 3 validation clips have the same content as a training clip, so the figures are "
        "too good: v1, v3.",
    )


def test_clips_decoded_in_part_are_a_warning() -> None:
    odd = dataclasses.replace(PAIRS[0], warning="decoded 1.0 s, then stopped")
    assert make_clip_sets(made([odd, *PAIRS[1:]])).warnings == (
        "1 clip decoded with a warning; one of them: a1: decoded 1.0 s, then stopped.",
    )


def test_failures_of_either_input_count() -> None:
    with pytest.raises(InputError, match=r"^3 of 4 items could not be decoded"):
        make_clip_sets(made(PAIRS), failed(1, 3), max_failed=0.5)
