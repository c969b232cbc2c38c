"""The interface of a library that reads audio, and what its implementations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from transforms.errors import DecodeError
from transforms.records import FloatArray, Note

BLOCK_S = 1.0
MAX_BLOCK_VALUES = 1 << 20  # samples times channels: bounds memory whatever a header claims
PACKET_SLACK_S = 0.1  # lengths that a codec's packets give are rounded to packets
ROUNDING_S = 0.01  # manifests round their times; an end this little past the file's is no news


class Block(NamedTuple):
    """Samples as a library gives them: shape (num_samples, num_channels), float32."""

    rate: int
    samples: FloatArray


class Reader(Protocol):
    """One library that reads one file.

    Attributes:
        promised_s: Length in seconds by the file's header, or None.
        promise_slack_s: How far off that length may be in an undamaged file, in seconds.
        notes: Oddities of a file that could be read all the same, for the clip's warning.
        stopped: The library's error message if it gave up before the end.
    """

    library: str
    promised_s: float | None
    promise_slack_s: float
    notes: list[Note]
    stopped: str | None

    def seek(self, start_s: float) -> int:
        """Move to ``start_s`` or before it; return the frame that the next block starts at."""
        ...

    def blocks(self, on_progress: Callable[[], None]) -> Iterator[Block]:
        """Yield the samples from there to the end; a damaged file never raises."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


def block_frames(rate: int, channels: int) -> int:
    """Return how many frames make a block: one second, or fewer if there are many channels."""
    return max(1, min(round(rate * BLOCK_S), MAX_BLOCK_VALUES // channels))


def check_rate(rate: int) -> None:
    """Raise ``DecodeError`` with type ``BadSampleRate`` for a rate below 1 Hz."""
    if rate < 1:
        raise DecodeError(
            f"the sample rate is {rate} Hz; must be at least 1", error_type="BadSampleRate"
        )
