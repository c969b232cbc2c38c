"""The decoding of one file, in memory that does not grow with it.

``decode`` turns any audio or video file into pieces of mono float32 at the model's rate. It imports
neither torch nor Beam, and FFmpeg only for a file that needs it.

Guarantees:

* The content decides which library reads a file, never its name. libsndfile is faster where it
  reads a format right. FFmpeg takes the rest, and continues where libsndfile gives up midway.
* Encoder delay and padding are as the library gives them. libsndfile and FFmpeg cut them where the
  file says how much (LAME and Opus headers, MP4 edit lists) and keep them where it does not.
  Timestamps are not used: gaps between packets are closed, and a late start counts as the start.
* A segment is exactly the source samples ``[round(start_s * rate), round(end_s * rate))`` of the
  decoded file.
* Channels are mixed down to their mean, and a clip that loses too much by it has a warning; or one
  of them is taken, and is silent where the audio does not have it.
* The resampler is soxr's HQ; streaming gives the same samples as one call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

from transforms.decoding.formats.encoded import Encoded, hash_encoded, open_encoded
from transforms.decoding.levels import ChannelEnergies, LevelMeter, finite_part
from transforms.decoding.reader import ROUNDING_S, Block
from transforms.decoding.reader_chain import ReaderChain
from transforms.decoding.settings import MIN_CLIP_S, UNLIMITED, ChannelName, DecodeSettings
from transforms.errors import DecodeError
from transforms.process.stage_times import timed
from transforms.records import ClipFacts, FloatArray, Note

# Errors that report a bound: the item fails, however much of it has been decoded.
BOUND_ERRORS = frozenset({"ItemTooLarge", "ItemTooLong", "DecodingTooSlow", "DecoderOutOfMemory"})


class DecodedPiece(NamedTuple):
    """A piece of a decoded clip: mono float32 of shape (num_samples,) at the model's rate.

    ``facts`` are the clip's as far as decoded; they are complete where ``is_last``. So is
    ``num_channels``, the most that the audio has anywhere.
    """

    samples: FloatArray
    facts: ClipFacts
    is_last: bool
    num_channels: int


def decode(
    source: bytes | str | Path,
    settings: DecodeSettings = UNLIMITED,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    channel: int | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Iterator[DecodedPiece]:
    """Decode a file, or a segment of it, to mono at one rate, piece by piece.

    There is at least one piece, and exactly one ``is_last``.

    Args:
        source: The encoded bytes, or the path of a local file.
        settings: The rate to resample to, the samples of a piece, and what the item may cost.
        start_s: None for the file's start.
        end_s: Exclusive; None for the file's end.
        channel: The channel to decode, from 1, for a caller that decodes ``each`` of them. None for
            what the settings say, where ``each`` is the first.
        on_progress: Called whenever work has been done, for a caller that watches for a hang.

    Raises:
        DecodeError: Nothing can be labelled. ``error_type`` is ``EmptyFile``, ``NoAudioStream``,
            ``NotAudio``, ``Encrypted``, ``BadSegment``, ``BadSampleRate``, ``NonFiniteSamples``,
            ``NoSuchChannel``, ``NoSamples``, ``TooShort``, or the name of the operating system's
            error. After the first piece, an error ends the clip with a warning in its facts
            instead. A bound (``ItemTooLong``, ``DecodingTooSlow``) raises at any time.
    """
    _check_segment(start_s, end_s)
    with contextlib.ExitStack() as opened:
        with timed("open"):
            encoded = opened.enter_context(open_encoded(source))
            sha256 = hash_encoded(encoded, on_progress)
        span = DecodeSpan(start_s or 0.0, end_s)
        budget = _Budget(settings, on_progress)
        if channel is None and settings.channel == "loudest":
            channel = _find_loudest(encoded, DecodeSpan(span.start_s, end_s), budget)
        chain = ReaderChain(encoded, span.start_s, budget.on_progress)
        opened.callback(chain.close)
        blocks = budget.count(chain.blocks())
        if channel is None and settings.channel != "mix":
            channel = settings.channel if isinstance(settings.channel, int) else 1
            blocks = _with_channel(channel, blocks)
        yield from _decode_blocks(chain, span, blocks, sha256, settings, budget, channel)


def decode_whole(
    source: bytes | str | Path,
    *,
    sample_rate_hz: int = 16_000,
    start_s: float | None = None,
    end_s: float | None = None,
    channel: ChannelName | int = "mix",
) -> tuple[FloatArray, ClipFacts]:
    """Decode a short clip in one go: samples of shape (num_samples,); errors as ``decode``.

    ``channel`` is as in ``DecodeSettings``; of ``each`` it is the first.
    """
    settings = dataclasses.replace(UNLIMITED, sample_rate_hz=sample_rate_hz, channel=channel)
    pieces = list(decode(source, settings, start_s=start_s, end_s=end_s))
    return np.concatenate([piece.samples for piece in pieces]), pieces[-1].facts


def read_length_s(source: bytes | str | Path, on_progress: Callable[[], None]) -> float | None:
    """Return the seconds that a header promises, or None; raise ``DecodeError`` if not audio."""
    with (
        open_encoded(source) as encoded,
        contextlib.closing(ReaderChain(encoded, 0.0, on_progress)) as chain,
    ):
        return chain.promised_s


def _find_loudest(encoded: Encoded, span: DecodeSpan, budget: _Budget) -> int:
    """Return the channel with most energy in the span, from 1, by decoding it all."""
    energies, decoded_s = ChannelEnergies(), 0.0
    with contextlib.closing(ReaderChain(encoded, span.start_s, budget.on_progress)) as chain:
        for block in span.cut(budget.count(chain.blocks()), chain.first_frame):
            part = finite_part(block.samples)
            energies.add(part)
            decoded_s += len(part.samples) / block.rate
            budget.check_duration(decoded_s)
            if part.is_cut:
                break
    return energies.loudest


def _with_channel(channel: int, blocks: Iterable[Block]) -> Iterator[Block]:
    """Raise ``DecodeError`` if the audio begins without this channel, counted from 1."""
    for index, block in enumerate(blocks):
        num_channels = block.samples.shape[1]
        if index == 0 and channel > num_channels:
            raise DecodeError(
                f"decode.channel is {channel}, and the audio has "
                f"{num_channels} channel{'' if num_channels == 1 else 's'}; give a channel that it "
                "has, or mix, loudest or each",
                error_type="NoSuchChannel",
            )
        yield block


def _decode_blocks(
    chain: ReaderChain,
    span: DecodeSpan,
    blocks: Iterable[Block],
    sha256: str,
    settings: DecodeSettings,
    budget: _Budget,
    channel: int | None,
) -> Iterator[DecodedPiece]:
    """Decode the span of ``blocks``, the chain's own: one channel, from 1, or with None the mix."""
    levels = LevelMeter()
    energies = ChannelEnergies()
    resampler = _Resampler(settings.sample_rate_hz)
    pieces = _Pieces(settings.piece_samples)
    notes: list[Note] = []
    error: DecodeError | None = None
    num_channels = 0
    for block in span.cut(blocks, chain.first_frame):
        num_channels = max(num_channels, block.samples.shape[1])
        part = finite_part(
            block.samples if channel is None else _take_channel(block.samples, channel)
        )
        levels.add(block.rate, block.samples.shape[1], part)
        budget.check_duration(levels.duration_s)
        if part.is_cut:
            error = DecodeError(
                f"the sample at {span.start_s + levels.duration_s:.3f} s is NaN or infinite",
                error_type="NonFiniteSamples",
            )
            words = f"decoded {levels.duration_s:.1f} s, then stopped: {error}"
            notes.append(Note("damaged", words))
        mono = mix_down(part.samples)
        energies.add(part, mono)
        with timed("resample"):
            resampled = resampler.push(block.rate, mono)
        for samples_out in pieces.push(resampled):
            yield DecodedPiece(samples_out, levels.facts(sha256), False, num_channels)
        if error is not None:
            break
    else:
        notes.extend(span.shortfall(chain, levels.duration_s))
    with timed("resample"):
        resampled = resampler.flush()
    for samples_out in pieces.push(resampled):
        yield DecodedPiece(samples_out, levels.facts(sha256), False, num_channels)
    last = pieces.rest()
    notes.extend(levels.notes)
    if (mix_warning := energies.mix_warning()) is not None:
        notes.append(Note("channels_cancel", mix_warning))
    notes.extend(chain.notes())
    if not pieces.num_out and len(last) < settings.min_clip_samples:
        raise error or _too_short(levels.duration_s, span, notes)
    yield DecodedPiece(last, levels.facts(sha256, notes), True, num_channels)


def _take_channel(samples: FloatArray, channel: int) -> FloatArray:
    """Return one channel, from 1, of shape (num_samples, 1); silence if it is not there."""
    if channel > samples.shape[1]:
        return np.zeros((len(samples), 1), np.float32)
    return np.ascontiguousarray(samples[:, channel - 1 : channel])


def _too_short(decoded_s: float, span: DecodeSpan, notes: list[Note]) -> DecodeError:
    if decoded_s == 0.0 and span.start_s > 0.0 and span.frames_seen:
        return DecodeError(
            f"the segment starts at {span.start_s:.3f} s, but the audio ends at "
            f"{span.reached_s:.3f} s; check start_s and end_s of the manifest",
            error_type="BadSegment",
        )
    words = f" ({'; '.join(note.words for note in notes)})" if notes else ""
    if decoded_s == 0.0:
        return DecodeError(f"there is no audio in it{words}", error_type="NoSamples")
    return DecodeError(
        f"{decoded_s * 1000:.1f} ms of audio; "
        f"at least {MIN_CLIP_S * 1000:.0f} ms are needed{words}",
        error_type="TooShort",
    )


def _check_segment(start_s: float | None, end_s: float | None) -> None:
    start = 0.0 if start_s is None else start_s
    if not (math.isfinite(start) and start >= 0.0):
        raise DecodeError(
            f"start_s is {start_s}; must be a number of seconds ≥ 0", error_type="BadSegment"
        )
    if end_s is not None and not (math.isfinite(end_s) and end_s > start):
        raise DecodeError(
            f"end_s is {end_s}; must be greater than start_s ({start})", error_type="BadSegment"
        )


class _Budget:
    """Holds one item to its limits.

    Time is processor time, so that neither a busy machine nor a slow consumer makes a file slow.
    A process that hangs without computing is killed by the parent.
    """

    def __init__(self, settings: DecodeSettings, on_progress: Callable[[], None]) -> None:
        self._settings = settings
        self._on_progress = on_progress
        self._began_s = time.process_time()
        self._audio_s = 0.0

    def count(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Count the audio that is read, including what precedes the start of a segment."""
        for block in blocks:
            self._audio_s += len(block.samples) / block.rate
            yield block

    def on_progress(self) -> None:
        self._on_progress()
        used_s = time.process_time() - self._began_s
        if math.isinf(self._settings.max_decode_ratio):
            return
        allowed_s = max(
            self._settings.stall_timeout_s, self._settings.max_decode_ratio * self._audio_s
        )
        if used_s > allowed_s:
            raise DecodeError(
                f"decoding took {used_s:.1f} s for {self._audio_s:.1f} s of audio; at most "
                f"{self._settings.max_decode_ratio:g} s per second are allowed (and "
                f"{self._settings.stall_timeout_s:g} s for any item); to allow more, raise "
                "decode.max_decode_ratio",
                error_type="DecodingTooSlow",
            )

    def check_duration(self, duration_s: float) -> None:
        """Raise for an item that is longer than allowed: it is not cut."""
        if duration_s > self._settings.max_item_s:
            raise DecodeError(
                f"the item goes on after {duration_s:.1f} s of audio; at most "
                f"{self._settings.max_item_s:g} s are allowed; to allow more, raise "
                "decode.max_item_s, or label it in segments",
                error_type="ItemTooLong",
            )


# From blocks to pieces


class DecodeSpan:
    """The span of a file to decode: ``[round(start_s * rate), round(end_s * rate))``.

    ``end_s`` is None for the end of the file. ``reached_s`` is how far the file was read, in
    seconds from its start.
    """

    def __init__(self, start_s: float, end_s: float | None) -> None:
        self.start_s = start_s
        self.end_s = end_s
        self.reached_s = 0.0
        self.frames_seen = False

    def cut(self, blocks: Iterable[Block], first_frame: int) -> Iterator[Block]:
        """Yield the samples that lie in the span; ``first_frame`` is where the blocks start."""
        run_start_s, rate, frame = 0.0, 0, first_frame
        for block in blocks:
            if rate and block.rate != rate:  # a stream may change its rate on the way
                run_start_s, frame = self.reached_s, 0
            rate = block.rate
            self.frames_seen = True
            start = max(round((self.start_s - run_start_s) * rate) - frame, 0)
            stop = len(block.samples)
            if self.end_s is not None:
                stop = min(round((self.end_s - run_start_s) * rate) - frame, stop)
            if start < stop:
                yield Block(rate, block.samples[start:stop])
            frame += len(block.samples)
            self.reached_s = run_start_s + frame / rate
            if self.end_s is not None and frame >= round((self.end_s - run_start_s) * rate):
                return

    def shortfall(self, chain: ReaderChain, decoded_s: float) -> list[Note]:
        """Warn if there is less audio than the file promises or the segment asks for."""
        promised_s, slack_s = chain.promised_s, chain.slack_s
        wanted_end_s = promised_s if self.end_s is None else self.end_s
        if self.end_s is not None:
            slack_s = ROUNDING_S
        if wanted_end_s is None or decoded_s >= wanted_end_s - self.start_s - slack_s:
            return []
        words = f"decoded {_of(decoded_s, wanted_end_s - self.start_s)} s"
        if self.end_s is not None and (
            promised_s is None or promised_s <= self.reached_s + slack_s
        ):
            words += (
                f" (the segment ends at {self.end_s:.3f} s, the file at {self.reached_s:.3f} s)"
            )
            return [Note("segment_beyond_end", words)]
        return [Note("cut_short", words)]


def _of(part_s: float, whole_s: float) -> str:
    """Return ``3.2 of 5.0``, with enough decimals to tell the two apart."""
    digits = 1 if whole_s - part_s >= 0.1 else 3
    return f"{part_s:.{digits}f} of {whole_s:.{digits}f}"


def mix_down(samples: FloatArray) -> FloatArray:
    """Average the channels: (num_samples, num_channels) to (num_samples,), float32."""
    num_channels = samples.shape[1]
    if num_channels == 1:
        return samples[:, 0]
    mono = samples[:, 0] + samples[:, 1]
    for channel in range(2, num_channels):
        mono += samples[:, channel]
    mono *= np.float32(1.0 / num_channels)
    return mono


class _Resampler:
    """A streaming soxr HQ resampler that starts afresh where the source changes its rate."""

    def __init__(self, sample_rate_hz: int) -> None:
        self._sample_rate_hz = sample_rate_hz
        self._rate = 0
        self._stream: soxr.ResampleStream | None = None

    def push(self, rate: int, mono: FloatArray) -> FloatArray:
        """Return the samples that are ready at the new rate, shape (num_samples,)."""
        before = np.zeros(0, np.float32)
        if rate != self._rate:
            before = self.flush()
            self._rate = rate
            if rate != self._sample_rate_hz:
                self._stream = soxr.ResampleStream(
                    rate, self._sample_rate_hz, 1, dtype="float32", quality="HQ"
                )
        after = mono if self._stream is None else self._stream.resample_chunk(mono)
        return np.concatenate([before, after]) if len(before) else after

    def flush(self) -> FloatArray:
        stream, self._stream, self._rate = self._stream, None, 0
        empty = np.zeros(0, np.float32)
        return empty if stream is None else stream.resample_chunk(empty, last=True)


class _Pieces:
    """Cuts a stream of samples into pieces of one size, and holds the last one back."""

    def __init__(self, piece_samples: int) -> None:
        self.num_out = 0  # pieces yielded so far
        self._piece_samples = piece_samples
        self._parts: list[FloatArray] = []
        self._num_held = 0

    def push(self, samples: FloatArray) -> Iterator[FloatArray]:
        """Yield the whole pieces that are followed by something."""
        self._parts.append(samples)
        self._num_held += len(samples)
        if self._num_held <= self._piece_samples:
            return
        held = self.rest()
        start = 0
        while len(held) - start > self._piece_samples:
            self.num_out += 1
            yield held[start : start + self._piece_samples]
            start += self._piece_samples
        self._parts, self._num_held = [held[start:]], len(held) - start

    def rest(self) -> FloatArray:
        parts, self._parts, self._num_held = self._parts, [], 0
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])
