"""The settings of decoding, which reach every decoder process whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from transforms.process.limits import usable_bytes, usable_cores

MIN_CLIP_S = 0.025  # one fbank frame: less than this gives no features
MIN_DECODER_BYTES = 256 << 20  # the libraries themselves need most of it

ChannelName = Literal["mix", "first", "loudest", "each"]


@dataclass(frozen=True)
class DecodeSettings:
    """How clips are decoded.

    Attributes:
        channel: What is labelled of several channels: ``mix`` (their mean), ``first``, a number
            from 1, ``loudest`` (the one with most energy in the clip; it is decoded twice), or
            ``each`` (every channel is a clip of its own).
        num_processes: 0 means one for each core this process may use, as far as they fit into half
            of the memory that it may use.
        clips_ahead: Clips read but not consumed yet; 0 means 4, plus 2 for each process.
        bytes_ahead: Encoded bytes read but not decoded yet, and never more than an eighth of the
            memory that this process may use; one clip may exceed it.
        stall_timeout_s: A decoder that shows no sign of life for this long is killed.
        max_item_bytes: Encoded bytes of an item.
        max_item_s: Seconds of audio of an item.
        max_decode_ratio: Seconds of computing per second of audio, once an item has taken
            ``stall_timeout_s`` of computing.
        max_decoder_bytes: Memory of a decoder process, beyond what it holds when it starts and
            the encoded bytes of its clip. Linux only.
    """

    sample_rate_hz: int = 16_000
    channel: ChannelName | int = "mix"
    num_processes: int = 0
    clips_ahead: int = 0
    bytes_ahead: int = 512 << 20
    stall_timeout_s: float = 60.0
    piece_samples: int = 160_000
    max_item_bytes: int = 64 << 30
    max_item_s: float = 604_800.0
    max_decode_ratio: float = 10.0
    max_decoder_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        names = get_args(ChannelName)
        if self.channel not in names and not (isinstance(self.channel, int) and self.channel >= 1):
            raise ValueError(
                f"channel is {self.channel!r}; must be {', '.join(names)} or a number from 1"
            )
        for name, least in (
            ("sample_rate_hz", 1),
            ("num_processes", 0),
            ("clips_ahead", 0),
            ("bytes_ahead", 1),
            ("piece_samples", self.min_clip_samples),
            ("max_item_bytes", 1),
            ("max_decoder_bytes", MIN_DECODER_BYTES),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; must be at least {least}")
        for name in ("stall_timeout_s", "max_item_s", "max_decode_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; must be greater than 0")

    @property
    def min_clip_samples(self) -> int:
        """The shortest clip that can be labelled: 25 ms, in samples."""
        return round(MIN_CLIP_S * self.sample_rate_hz)

    def resolve_num_processes(self) -> int:
        """Return ``num_processes``, or the number that cores and memory allow."""
        if self.num_processes:
            return self.num_processes
        that_fit = usable_bytes() // 2 // MIN_DECODER_BYTES
        return max(1, min(usable_cores(), that_fit))

    def resolve_bytes_ahead(self) -> int:
        """Return ``bytes_ahead``, or an eighth of the usable memory if that is less."""
        return min(self.bytes_ahead, usable_bytes() // 8)


# For a file of one's own, decoded in this process.
UNLIMITED = DecodeSettings(max_item_s=math.inf, max_decode_ratio=math.inf)
