"""The folder that a training writes: its record, its figures and its weights.

An earlier training in the folder is resumed if it is the same, and left alone if it is another.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.config.train import TrainConfig
from pipeline.result.state import describe_differences, software_versions, utc_now
from pipeline.terminal.wording import counted
from pipeline.training.data.dataset import ClipSet, ClipSets
from pipeline.training.history import CURVES_NAME, HISTORY_NAME, draw_curves, history_table
from pipeline.training.plan import CACHE_NAME, TrainPlan
from pipeline.training.stages.loop import STATE_NAME, Row
from transforms.errors import OutputError
from transforms.models.ast.checkpoints import save_pretrained
from transforms.models.ast.files import CONFIG_NAME, FEATURES_NAME, WEIGHTS_NAME
from transforms.models.ast.model import ASTForAudioClassification
from transforms.sources.clip_ids import printable
from transforms.storage import filesystem, listing, reading, urls, writing

TRAIN_NAME = "train.json"
VALIDATION_NAME = "validation.jsonl"
ERRORS_NAME = "errors.parquet"
TRAIN_SCHEMA_VERSION = 1

# In the order in which they are saved.
MODEL_FILES = (FEATURES_NAME, WEIGHTS_NAME, CONFIG_NAME)
_WEIGHTS = ("best", "averaged", "last")
# Everything that a training writes, and --overwrite removes. The cache has names of its own.
_WRITTEN = (
    *(f"{folder}/{name}" for folder in _WEIGHTS for name in MODEL_FILES),
    *MODEL_FILES,
    *(STATE_NAME, HISTORY_NAME, CURVES_NAME, VALIDATION_NAME, ERRORS_NAME, TRAIN_NAME),
)
# Keys of ``training`` that the clips decide where they are not given, and what they are until then.
_OPEN = {"batch_size": None, "head": "auto"}
_CURVES_EVERY_S = 30.0


# --- An earlier training -------------------------------------------------------------------


def find_training(plan: TrainPlan) -> Mapping[str, Any] | None:
    """Read the record of this training from an earlier run; None if there is none.

    Raise ``OutputError`` if the folder holds another training, or files that no training wrote.
    """
    url = urls.join(plan.output, TRAIN_NAME)
    if not filesystem.exists(url):
        foreign = sorted(set(listing.list_names(plan.output)) - {CACHE_NAME})
        if foreign:
            raise OutputError(
                f"{plan.output} holds {counted(len(foreign), 'other thing')}, such as "
                f"{foreign[0]}, and no {TRAIN_NAME}; expected a new folder, or one that earmark "
                "train wrote. Give another --output."
            )
        return None
    try:
        record: Mapping[str, Any] = json.loads(reading.read_bytes(url))
        before = {**record["results"], "data": None}
        _ = record["status"], record["inputs"], record["config"]["training"]["epochs"]
        now = {**plan.results, "data": None, "training": {**plan.results["training"]}}
        for key, value in _OPEN.items():
            if now["training"][key] == value:
                now["training"][key] = before["training"][key]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{url} is not the record of a training ({type(error).__name__}: {error}); give "
            "another --output, or start again with --overwrite."
        ) from error
    check_same_training(plan, before, now)
    return record


def check_same_training(plan: TrainPlan, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``OutputError`` if what the result depended on differs from what it does now."""
    differences = describe_differences(before, now)
    if differences:
        raise OutputError(
            f"{plan.output} holds another training:\n"
            + "\n".join(differences)
            + "\nGive another --output, go back to those settings, or start again with --overwrite."
        )


def check_epochs(output: str, record: Mapping[str, Any], config: TrainConfig) -> int:
    """Return how many epochs an earlier run had.

    Raise ``OutputError`` if this one is to have fewer, or more without the state to extend.
    """
    before: int = record["config"]["training"]["epochs"]
    now = config.training.epochs or before
    if now < before:
        raise OutputError(
            f"{output} holds another training:\n  training.epochs: {before} there, {now} now\nMore "
            "epochs extend it, and fewer are another training. Give another --output, or start "
            "again with --overwrite."
        )
    state = urls.join(output, STATE_NAME)
    if now > before and is_done(record) and not filesystem.exists(state):
        raise OutputError(
            f"{output} cannot be extended from {before} to {now} epochs: {state}, the state at its "
            f"end, is gone. Train its model further into another folder: --model {output}, or "
            "start again with --overwrite."
        )
    return before


def is_done(record: Mapping[str, Any]) -> bool:
    """Return whether a training has run to its end."""
    return bool(record["status"] == "done")


def check_removable(plan: TrainPlan) -> None:
    """Raise ``OutputError`` for files that no training wrote, or that this one starts from."""
    written = [name for name in _WRITTEN if filesystem.exists(urls.join(plan.output, name))]
    if written and TRAIN_NAME not in written:
        raise OutputError(
            f"{plan.output} holds {written[0]} and no {TRAIN_NAME}, so earmark train did not write "
            "it, and --overwrite does not remove it. Give another --output, or remove it yourself."
        )
    source = plan.initial.folder
    if written and source is not None:
        output = Path(urls.local_path(plan.output)).resolve()
        if Path(source).resolve().is_relative_to(output):
            raise OutputError(
                f"--model {plan.initial.name} lies in {plan.output}, which --overwrite removes "
                "before it is read. Give another --output."
            )


def remove_training(output: str) -> None:
    """Remove what a training wrote, and nothing else."""
    for name in _WRITTEN:
        url = urls.join(output, name)
        if filesystem.exists(url):
            writing.remove(url)
    for folder in _WEIGHTS:
        writing.remove_empty_folder(urls.join(output, folder))


# --- This training -------------------------------------------------------------------------


def write_file(plan: TrainPlan, name: str, content: bytes) -> None:
    """Write a file of the output; raise ``WriteError`` if that fails."""
    url = urls.join(plan.output, name)
    with writing.writing_to(url):
        writing.write_bytes(url, content)


def make_record(
    plan: TrainPlan,
    clips: ClipSets,
    config: TrainConfig,
    statistics: tuple[float, float],
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Make ``train.json`` of a training that runs.

    ``statistics`` are the mean and standard deviation that features are normalised with;
    ``earlier`` is the record of the run that this one resumes, or None.
    """
    validation = clips.validation
    return {
        "schema_version": TRAIN_SCHEMA_VERSION,
        "status": "running",
        "fingerprint": plan.fingerprint,
        "inputs": plan.inputs_digest,
        "initial": {"name": plan.initial.name, "sha256": plan.initial.sha256},
        "labels": list(clips.train.label_names),
        "clips": {
            "train": len(clips.train),
            "validation": 0 if validation is None else len(validation),
        },
        "clips_per_label": clips.train.counts(),
        "mean": statistics[0],
        "std": statistics[1],
        "device": plan.device,
        "precision": plan.precision,
        "versions": software_versions(),
        "started": (earlier or {}).get("started") or utc_now(),
        "config": config.resolved(),
        "results": dict(plan.results),
    }


def validation_manifest(clips: ClipSet) -> bytes:
    """Make a manifest of clips with their labels, which ``label`` and ``evaluate`` take."""
    lines = []
    for clip in clips.clips:
        item = clip.item
        place = {
            "clip_id": item.clip_id,
            "uri": item.uri,
            "member": item.member,
            "row": item.row,
            "start_s": item.start_s,
            "end_s": item.end_s,
        }
        labels = [clips.label_names[index] for index in clip.labels]
        values = {name: value for name, value in place.items() if value is not None}
        lines.append(json.dumps({**values, "labels": labels}, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines).encode()


class Recorder:
    """Keeps the record, the figures and the weights up to date.

    ``record`` is ``train.json`` as far as it is known; it has the mean and the standard deviation.
    """

    def __init__(self, plan: TrainPlan, record: dict[str, Any], dtype: torch.dtype) -> None:
        self._plan, self._record, self._dtype = plan, record, dtype
        self._drawn_s = -_CURVES_EVERY_S

    def write_record(self, **more: Any) -> None:
        """Write ``train.json``, with what has become known since."""
        self._record |= more
        text = printable(json.dumps(self._record, indent=2, ensure_ascii=False))
        write_file(self._plan, TRAIN_NAME, text.encode() + b"\n")

    def write_history(self, history: list[Row], *, draw: bool) -> None:
        """Write the table; draw the curves if asked to, or if the last ones are old."""
        write_file(self._plan, HISTORY_NAME, history_table(history))
        if draw or time.monotonic() - self._drawn_s >= _CURVES_EVERY_S:
            write_file(self._plan, CURVES_NAME, draw_curves(history))
            self._drawn_s = time.monotonic()

    def write_model(self, model: ASTForAudioClassification, folder: str) -> None:
        """Write a model into a folder of the output."""
        place = urls.join(self._plan.output, folder)
        mean, std = self._record["mean"], self._record["std"]
        with writing.writing_to(place):
            saved = copy.deepcopy(model).cpu().eval()
            save_pretrained(saved, place, mean=mean, std=std, dtype=self._dtype)
