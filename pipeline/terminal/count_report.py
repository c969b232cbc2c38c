"""What the rows of a result say in counts: for ``run.json``, and in words.

Labels, warnings and failures are counted by the commits (``transforms.results.counts``), so that
``label`` can say what is in a result of any size without reading it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pipeline.terminal.wording import counted
from transforms.results.commits import UnitTotals
from transforms.results.counts import RowCounts

NUM_LABELS = 10
NUM_EXAMPLES = 3

# The types of errors whose cause is the item's content: another try cannot succeed.
_CAUSES_IN_CONTENT = {
    "EmptyFile": "no bytes",
    "NoAudioStream": "no audio stream",
    "NotAudio": "not audio that can be decoded",
    "Encrypted": "needs a key",
    "NoSamples": "no audio in it",
    "TooShort": "too little audio",
    "BadSegment": "a segment that is not in the file",
    "BadSampleRate": "no usable sample rate",
    "NonFiniteSamples": "samples that are not numbers",
    "NoSuchChannel": "not as many channels",
    "InvalidHeaderError": "not a tar archive",
}
_OTHER_CAUSES = {
    "ItemTooLarge": "more bytes than allowed",
    "ItemTooLong": "more audio than allowed",
    "DecodingTooSlow": "more time to decode than allowed",
    "DecoderOutOfMemory": "more memory to decode than allowed",
    "DecoderCrashed": "the decoder crashed",
    "DecoderHung": "the decoder hung",
    "FileNotFoundError": "not there",
    "PermissionError": "not readable",
    "ReadError": "not readable",
    "FeatureError": "no features",
    "InferenceError": "no answer of the model",
    "ContainerError": "not readable to its end",
}
_CAUSES = _CAUSES_IN_CONTENT | _OTHER_CAUSES


def totals_record(totals: UnitTotals, counts: RowCounts) -> dict[str, Any]:
    """Return totals and counts as ``totals`` of ``run.json`` holds them."""
    return {**asdict(totals), **_counts_record(counts)}


def _counts_record(counts: RowCounts) -> dict[str, Any]:
    """Return the counts, the largest first."""
    record = asdict(counts)
    return {
        "counted_clips": record["clips"],
        "labels": _largest_first(record["labels"]),
        "warned_clips": record["warned_clips"],
        "warnings": _largest_first(record["warnings"]),
        "errors": dict(
            sorted(record["errors"].items(), key=lambda entry: (-entry[1]["items"], entry[0]))
        ),
    }


def _largest_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def list_largest(
    counts: Mapping[str, int], limit: int, noun: str, form: str = "{n:,} {name}"
) -> str:
    """List the largest counts, and how many others there are: ``8 .txt, 1 .md and 2 more kinds``.

    Args:
        counts: By name.
        limit: How many to name. One more is named rather than called "1 more".
        noun: What a name is.
        form: How a count and its name are written.
    """
    ordered = list(_largest_first(counts).items())
    shown = ordered if len(ordered) <= limit + 1 else ordered[:limit]
    text = ", ".join(form.format(n=count, name=name) for name, count in shown)
    others = ordered[len(shown) :]
    if not others:
        return text
    return f"{text} and {counted(len(others), f'more {noun}')} ({sum(n for _, n in others):,})"


def describe_labels(totals: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line with the labels that most clips have as their best."""
    if not totals["labels"]:
        return
    largest = list_largest(totals["labels"], NUM_LABELS, "label", "{name} ({n:,})")
    uncounted = totals["clips"] - totals["counted_clips"]
    earlier = f" (without {uncounted:,} that an earlier version labelled)" if uncounted else ""
    yield f"Clips by best label{earlier}: {largest}."


def describe_warnings(totals: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line with the number of clips with a warning, by kind."""
    if totals["warned_clips"]:
        kinds = list_largest(totals["warnings"], len(totals["warnings"]), "kind")
        yield (
            f"{totals['warned_clips']:,} of {counted(totals['clips'], 'clip')} with a warning"
            f"{': ' if kinds else ''}{kinds}; see the column warning of clips."
        )


def describe_errors(totals: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line with the failures by type and cause, and an example of the largest few."""
    errors = totals["errors"]
    named = {
        f"{error_type} ({_CAUSES[error_type]})" if error_type in _CAUSES else error_type: count
        for error_type, count in ((name, entry["items"]) for name, entry in errors.items())
    }
    if uncounted := totals["failures"] - sum(named.values()):
        named["of an earlier version"] = uncounted
    if not named:
        return
    is_partial = totals.get("found_failures", totals["failures"]) < totals["failures"]
    whole = ", in the whole result" if is_partial else ""
    yield f"Failures by cause{whole}: {list_largest(named, NUM_LABELS, 'cause')}."
    for error_type in list(errors)[:NUM_EXAMPLES]:
        yield f"  {error_type}, for example {errors[error_type]['example']}"


def may_succeed(totals: Mapping[str, Any]) -> bool:
    """Return whether another try of the failed items may succeed."""
    items_of_content = sum(
        entry["items"]
        for error_type, entry in totals["errors"].items()
        if error_type in _CAUSES_IN_CONTENT
    )
    return bool(totals["failures"] > items_of_content)
