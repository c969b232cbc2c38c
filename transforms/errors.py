"""Every error Earmark raises on purpose, and who each one speaks to.

    EarmarkError
    ├── UsageError            found before any work starts: exit code 2
    │   ├── ConfigError         an option or a key of the YAML
    │   ├── InputError          an input that does not exist or holds nothing to label
    │   ├── ModelError          a checkpoint that is missing, damaged or does not fit
    │   └── OutputError         an output that belongs to another run or cannot be written
    ├── TooManyListedError    more files than may be listed here: listed elsewhere, or exit code 1
    ├── ItemError             one item cannot be labelled: a row in ``errors``, never the run's end
    │   ├── ReadError           its bytes cannot be had
    │   ├── DecodeError         its bytes are not audio, or not enough of it
    │   ├── FeatureError        its samples cannot be turned into features
    │   └── InferenceError      the model gives no usable answer for it
    ├── ContainerError        a tar, Parquet file or manifest ends early: a row, and exit code 3
    ├── DeviceError           the model cannot be run on the device at all: exit code 1
    ├── TrainingError         a training cannot go on: exit code 1
    ├── WriteError            the output cannot be written any more: exit code 1
    ├── AnswerError           standard output cannot be written: exit code 1
    ├── OutputLostError       another run has taken the output over: exit code 1
    └── AccountingError       rows and items do not add up: exit code 1

A message names the thing, the value found, what was expected, and the next step. ``ItemError``
subclasses carry the ``stage`` that the error row records; ``error_type`` is the class's name
unless a more telling one (a library's own exception) is given.
"""

from __future__ import annotations


class EarmarkError(Exception):
    """Base of all errors that Earmark raises on purpose."""


class UsageError(EarmarkError):
    """Wrong usage, config, model, input or output, found before any work starts."""


class ConfigError(UsageError):
    """An option or a key of the configuration is unknown or out of range."""


class InputError(UsageError):
    """An input does not exist, cannot be listed, or holds nothing to label."""


class ModelError(UsageError):
    """A checkpoint is missing, damaged, or does not fit the model it describes."""


class OutputError(UsageError):
    """The output folder belongs to another run, or cannot be written."""


class TooManyListedError(EarmarkError):
    """The inputs hold more files than may be listed here."""


class ItemError(EarmarkError):
    """One item cannot be labelled; becomes a row in ``errors``.

    Attributes:
        stage: The step that failed: ``read``, ``decode``, ``fbank`` or ``inference``.
        error_type: The name that the error row carries; the class's own by default.
    """

    stage = "unknown"

    def __init__(self, message: str, *, error_type: str | None = None) -> None:
        super().__init__(message)
        self.error_type = error_type or type(self).__name__


class ReadError(ItemError):
    """The item's bytes cannot be had: missing, forbidden, cut short."""

    stage = "read"


class DecodeError(ItemError):
    """The item's bytes are not audio that can be decoded, or hold too little of it."""

    stage = "decode"


class FeatureError(ItemError):
    """The item's samples cannot be turned into features."""

    stage = "fbank"


class InferenceError(ItemError):
    """The model gives no usable answer for the item."""

    stage = "inference"


class ContainerError(EarmarkError):
    """A container (tar, Parquet file, manifest) cannot be read to its end."""


class DeviceError(EarmarkError):
    """The model cannot be run, whatever the window: no memory for one, or the device has failed."""


class TrainingError(EarmarkError):
    """A training cannot go on: its loss is not a number any more."""


class WriteError(EarmarkError):
    """The output cannot be written any more: full, read-only, gone."""


class AnswerError(EarmarkError):
    """Standard output, which a command's answer goes to, cannot be written."""


class OutputLostError(EarmarkError):
    """Another run has taken the output over, because this one seemed dead."""


class AccountingError(EarmarkError):
    """Items found and rows written do not add up."""


def in_words(error: OSError) -> str:
    """What the system said of a file, as ``name: reason``; other stores' words as they are."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def first_line(error: BaseException) -> str:
    """Return the first telling line of an error's text, to which libraries may add a page."""
    lines = str(error).strip().splitlines()
    # OpenVINO begins with places in its own source.
    return next((line for line in lines if not line.startswith("Exception f")), "no message")


def item_too_large(max_item_bytes: int, num_bytes: int | None = None) -> str:
    """What is said of an item beyond the bound, wherever that is noticed (``ItemTooLarge``).

    Args:
        max_item_bytes: The bound.
        num_bytes: What it has; None where that is not known, because nobody read on.
    """
    has = f"more than {max_item_bytes} bytes" if num_bytes is None else f"{num_bytes} bytes"
    allowed = "" if num_bytes is None else f"; at most {max_item_bytes} are allowed"
    return f"the item has {has}{allowed}; to allow more, raise decode.max_item_bytes"
