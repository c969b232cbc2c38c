"""lhotse's manifests: recordings and cuts, a JSON object per line.

A source of type ``command`` is never run: it is an error, and so is everything else that is not one
span of one audio file as it stands (a mix of cuts, a recording with transforms).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transforms.errors import ReadError

_SPAN_TOLERANCE_S = 0.001
_CUTS = frozenset({"MonoCut", "MultiCut", "MixedCut", "PaddingCut", "Cut"})
# Facts that Earmark reads from the audio itself, or needs to find it.
_NOT_METADATA = frozenset(
    {
        *("sources", "sampling_rate", "num_samples", "channel_ids", "recording", "supervisions"),
        *("start", "duration", "features", "type", "tracks", "transforms", "custom"),
    }
)


def is_lhotse(values: Mapping[str, Any]) -> bool:
    """Return whether a JSON object is a recording or a cut of lhotse."""
    is_recording = "sources" in values and bool({"sampling_rate", "num_samples"} & values.keys())
    return is_recording or "recording" in values or values.get("type") in _CUTS


def row_of_lhotse(values: Mapping[str, Any]) -> dict[str, Any] | ReadError:
    """Return the columns of a recording or a cut: its file, its span and its metadata.

    The metadata of a cut's only supervision (its text, speaker, custom fields) are columns too.
    """
    if not is_lhotse(values):
        return ReadError(
            "is not a recording or a cut of lhotse; make cuts of "
            "supervisions with lhotse cut simple"
        )
    if "sources" in values:
        path = _path_of(values)
        return path if isinstance(path, ReadError) else {"uri": path, **_metadata_of(values)}
    recording, kind = values.get("recording"), values.get("type")
    if "tracks" in values or not isinstance(recording, dict):
        return ReadError(
            f"is a {kind or 'cut'} without a recording of its own, which no single file holds; "
            "write it to a file with cut.save_audio"
        )
    path = _path_of(recording)
    if isinstance(path, ReadError):
        return path
    return {"uri": path, **_span_of(values, recording), **_metadata_of(values)}


def _path_of(recording: Mapping[str, Any]) -> str | ReadError:
    """Return the path or URL of a recording's only source."""
    if recording.get("transforms"):
        return ReadError(
            "has transforms, which are not applied; write it to a file as it should be"
        )
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        number = len(sources) if isinstance(sources, list) else "no"
        return ReadError(f"has {number} sources; expected one file")
    kind, source = sources[0].get("type"), sources[0].get("source")
    if kind == "command":
        return ReadError(
            f"is a command ({str(source)[:200]}), and a table never runs one; write its output to "
            "a file and name that",
            error_type="CommandInTable",
        )
    if kind not in ("file", "url") or not isinstance(source, str):
        return ReadError(f"has a source of type {str(kind)[:50]}; expected file or url")
    return source


def _span_of(cut: Mapping[str, Any], recording: Mapping[str, Any]) -> dict[str, Any]:
    """Return the span of a cut; nothing if it is the whole recording."""
    start_s, duration_s = cut.get("start") or 0.0, cut.get("duration")
    of_all_s = recording.get("duration")
    if not isinstance(duration_s, int | float) or not isinstance(start_s, int | float):
        return {"start_s": start_s, "duration": duration_s}  # refused by name
    if (
        start_s == 0
        and isinstance(of_all_s, int | float)
        and duration_s >= of_all_s - _SPAN_TOLERANCE_S
    ):
        return {}
    return {"start_s": start_s, "end_s": start_s + duration_s}


def _metadata_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata, those of the only supervision and all custom fields as columns."""
    supervisions = values.get("supervisions")
    columns = _plain_columns(values)
    if isinstance(supervisions, list) and len(supervisions) == 1:
        only = supervisions[0]
        if isinstance(only, dict):
            of_supervision = _plain_columns(only)
            of_supervision.pop("id", None)
            return of_supervision | columns
    if supervisions:
        columns["supervisions"] = supervisions
    return columns


def _plain_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    custom = values.get("custom")
    own = {name: value for name, value in values.items() if name not in _NOT_METADATA}
    return (custom if isinstance(custom, dict) else {}) | own
