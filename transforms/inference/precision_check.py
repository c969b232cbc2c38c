"""The difference between an engine and plain torch in float32, measured on the user's audio.

The difference depends on the weights and the audio. So the first windows of each process are
computed a second time, and the difference is recorded with each window's prediction, in its unit's
commit, and from there in ``run.json``.

Guarantees: the check never ends a run; if it fails, the reason is recorded instead. The second
model is in memory only while windows are being checked. A measurement for the same model, engine,
versions, chip and window is kept on disk and not repeated.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import importlib.util
import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from transforms.errors import first_line
from transforms.inference.backbones import Features
from transforms.process import disk_cache
from transforms.process.devices import processor_facts
from transforms.process.progress_counts import live_counts
from transforms.records import FloatArray, Prediction, WindowCheck

logger = logging.getLogger(__name__)

# Windows that float32 computes at once: it takes twice the memory of the engine's own.
REFERENCE_BATCH_SIZE = 4

# Windows whose figures are kept for one engine and model, the latest ones.
MAX_KEPT_WINDOWS = 4096

KIND = "checks"

Predict = Callable[[FloatArray], list[Prediction]]


class PrecisionCheck:
    """Checks the first windows that an engine has computed.

    Args:
        load_reference: Loads the reference and returns its function from a batch to predictions.
        depends_on: Everything that the outcome depends on besides the windows.
    """

    def __init__(
        self, load_reference: Callable[[], Predict], num_windows: int, depends_on: Mapping[str, Any]
    ) -> None:
        self._load_reference = load_reference
        self._reference: Predict | None = None
        self._left = num_windows
        self._key = disk_cache.make_key(depends_on)
        self._kept: dict[str, Any] | None = None
        self._lock = threading.Lock()  # threads of a process share an engine
        live_counts.checks_left += num_windows

    def __call__(self, features: Features, predictions: Sequence[Prediction]) -> list[Prediction]:
        """Return the engine's predictions of a batch, the first of them with a check."""
        with self._lock:
            began_s, left = time.perf_counter(), self._left
            checked = self._check_first(features, list(predictions))
            if self._left < left:
                live_counts.check_s += time.perf_counter() - began_s
                live_counts.checked += left - self._left
                live_counts.checks_left -= left - self._left
            return checked

    def _check_first(self, features: Features, checked: list[Prediction]) -> list[Prediction]:
        chosen = [i for i, each in enumerate(checked) if each.error is None][: self._left]
        if not chosen:
            return checked
        self._left -= len(chosen)
        looked_at = features[chosen]
        if isinstance(looked_at, torch.Tensor):
            looked_at = looked_at.cpu().numpy()
        checks = self._check(looked_at, [checked[i] for i in chosen])
        for index, check in zip(chosen, checks, strict=True):
            checked[index] = replace(checked[index], check=check)
        if self._left <= 0:
            self._reference = None  # frees its weights
        return checked

    def _check(self, features: FloatArray, found: Sequence[Prediction]) -> list[WindowCheck]:
        digests = [hashlib.sha256(window.tobytes()).hexdigest()[:32] for window in features]
        kept = self._find_kept(digests)
        missing = [i for i, digest in enumerate(digests) if digest not in kept]
        try:
            measured = self._measure(features[missing], [found[i] for i in missing])
        except Exception as error:  # no memory, a missing file: no reason to end a run
            return self._give_up(len(found), error)
        fresh = dict(zip((digests[i] for i in missing), measured, strict=True))
        if fresh:
            figures = {digest: asdict(check) for digest, check in fresh.items()}
            disk_cache.keep_figures(KIND, self._key, figures, MAX_KEPT_WINDOWS)
        return [fresh[d] if d in fresh else replace(kept[d], reused=True) for d in digests]

    def _find_kept(self, digests: Sequence[str]) -> dict[str, WindowCheck]:
        if self._kept is None:
            self._kept = disk_cache.read_figures(KIND, self._key)
        found = {digest: _read_check(self._kept.get(digest)) for digest in digests}
        return {digest: check for digest, check in found.items() if check is not None}

    def _measure(self, features: FloatArray, found: Sequence[Prediction]) -> list[WindowCheck]:
        if not found:
            return []
        if self._reference is None:
            self._reference = self._load_reference()
        expected: list[Prediction] = []
        for start in range(0, len(features), REFERENCE_BATCH_SIZE):
            expected += self._reference(features[start : start + REFERENCE_BATCH_SIZE])
        return [compare(mine, theirs) for mine, theirs in zip(found, expected, strict=True)]

    def _give_up(self, num_windows: int, error: Exception) -> list[WindowCheck]:
        self._left, self._reference = 0, None
        text = f"{type(error).__name__}: {first_line(error)}"
        logger.warning(
            "The precision cannot be checked, because the model does not run in float32 beside "
            "this one: %s. To skip the check: --set inference.check_windows=0",
            text,
        )
        return [WindowCheck(error=text)] * num_windows


def compare(found: Prediction, expected: Prediction) -> WindowCheck:
    """Compare an engine's prediction with the reference's; ``ValueError`` if that one failed."""
    if expected.error is not None:
        raise ValueError(f"in float32 {expected.error}")
    mine, theirs = found.embedding.astype(np.float64), expected.embedding.astype(np.float64)
    lengths = float(np.linalg.norm(mine) * np.linalg.norm(theirs))
    return WindowCheck(
        score_difference=float(np.abs(found.scores - expected.scores).max()),
        cosine=float(mine @ theirs) / lengths if lengths > 0 else 1.0,
        same_top=bool(found.scores.argmax() == expected.scores.argmax()),
        measured_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _read_check(kept: Any) -> WindowCheck | None:
    """Read a stored check; None if there is none, or it is damaged."""
    try:
        return WindowCheck(
            score_difference=float(kept["score_difference"]),
            cosine=float(kept["cosine"]),
            same_top=bool(kept["same_top"]),
            measured_utc=str(kept["measured_utc"]),
        )
    except (TypeError, KeyError, ValueError):
        return None


def surroundings(device: str) -> dict[str, Any]:
    """Return the versions and the chip, on which rounding depends."""
    packages = [name for name in ("openvino", "nncf") if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in ("torch", *packages)}
    return {**versions, "chip": torch.cuda.get_device_name() if device == "cuda" else _cpu_name()}


def _cpu_name() -> str:
    return processor_facts().get("model name") or platform.processor() or platform.machine()
