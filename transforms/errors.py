"""All errors that Earmark raises on purpose.

A ``UsageError`` ends a command with exit code 2. An ``ItemError`` is a row in ``errors`` and never
the run's end, a ``ContainerError`` is a row and exit code 3. All others are exit code 1.

A message names the thing, the value found, what was expected, and the next step. Subclasses of
``ItemError`` have the ``stage`` of the error row. ``error_type`` is the class's name, unless a
library's own exception says more.
"""

from __future__ import annotations


class EarmarkError(Exception):
    """Base class of Earmark's errors."""


class UsageError(EarmarkError):
    """A wrong usage, config, model, input or output, found before any work starts."""


class ConfigError(UsageError):
    """An option or a key of the configuration is unknown or out of range."""


class InputError(UsageError):
    """An input does not exist, cannot be listed, or holds nothing to label."""


class ModelError(UsageError):
    """A checkpoint is missing, damaged, or does not fit the model it describes."""


class OutputError(UsageError):
    """The output folder belongs to another run, or cannot be written."""


class TooManyListedError(EarmarkError):
    """The inputs hold more files than this machine may list; ``label`` lets workers list them."""


class ItemError(EarmarkError):
    """One item cannot be labelled; becomes a row in ``errors``.

    ``stage`` is the step that failed. ``error_type`` is by default the class's name.
    """

    stage = "unknown"

    def __init__(self, message: str, *, error_type: str | None = None) -> None:
        super().__init__(message)
        self.error_type = error_type or type(self).__name__


class ReadError(ItemError):
    """The item's bytes cannot be read: missing, forbidden, cut short."""

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
    """The model runs on no window: there is no memory for one, or the device has failed."""


class TrainingError(EarmarkError):
    """A training cannot continue: its loss is not a number any more."""


class WriteError(EarmarkError):
    """The output has become full, read-only or absent."""


class AnswerError(EarmarkError):
    """Standard output, which gets a command's answer, cannot be written."""


class OutputLostError(EarmarkError):
    """Another run has taken the output over, because this one seemed dead."""


class AccountingError(EarmarkError):
    """Items found and rows written do not add up."""


def in_words(error: OSError) -> str:
    """Describe a system's error as ``name: reason``; a store's error by its own text."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def first_line(error: BaseException) -> str:
    """Return the first telling line of an error's text, to which libraries may add a page."""
    lines = str(error).strip().splitlines()
    # OpenVINO begins with places in its own source.
    return next((line for line in lines if not line.startswith("Exception f")), "no message")


def item_too_large(max_item_bytes: int, num_bytes: int | None = None) -> str:
    """Describe an item beyond the bound (``ItemTooLarge``); no size if reading stopped there."""
    has = f"more than {max_item_bytes} bytes" if num_bytes is None else f"{num_bytes} bytes"
    allowed = "" if num_bytes is None else f"; at most {max_item_bytes} are allowed"
    return f"the item has {has}{allowed}; to allow more, raise decode.max_item_bytes"
