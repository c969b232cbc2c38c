"""Short encoded clips, for tests of what decodes them."""

from __future__ import annotations

from tests.support import audio_factory
from transforms.records import EncodedClip, Item

RATE = 16_000


def clip(name: str, data: bytes, **segment: float) -> EncodedClip:
    return EncodedClip(Item(name, name, **segment), data=data)


def wav(duration_s: float, mark: bytes = b"", frequency_hz: float = 440.0) -> bytes:
    samples = audio_factory.tone(duration_s, frequency_hz=frequency_hz)
    return audio_factory.encode(samples, RATE, "wav_float") + mark
