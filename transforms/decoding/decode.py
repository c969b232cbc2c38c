"""Decoding itself, and the child process that ``decode`` runs it in.

    encoded bytes ─▶ libsndfile or FFmpeg ─▶ blocks ─▶ segment ─▶ levels ─▶ mono ─▶ soxr ─▶ pieces

``decode`` turns any audio or video file into pieces of mono float32 at the model's rate, in
memory that does not grow with the file. ``serve`` runs it in a child process, one clip after
another: a decoder that crashes or hangs takes its child along, and nothing else. The child is
started with ``python -m transforms.decoding.decode``, not with multiprocessing, so that it never
imports the user's main module. It imports neither torch nor Beam, and FFmpeg only once a clip
needs it.

What a reader may rely on:

* The content decides which library reads a file, never its name. libsndfile is faster where it
  reads a format right; FFmpeg takes the rest, and goes on where libsndfile gives up in the middle.
* Encoder delay and padding: as the library gives it. libsndfile and FFmpeg cut them where the
  file says how much (LAME and Opus headers, MP4 edit lists) and keep them where it does not.
  Timestamps are not used: gaps between packets are closed, and a late start counts as the start.
* A segment is exactly the source samples ``[round(start_s * rate), round(end_s * rate))`` of what
  decoding the whole file gives.
* A part of a long file, which is labelled by itself and joined with the others, begins at a whole
  second, so at a sample of any rate; the resampler runs in and out beside it. Its samples are those
  of the whole file, to float rounding.
* The resampler is soxr's HQ; streamed or in one go gives the same samples.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import mmap
import os
import queue
import re
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import soxr

from transforms.decoding.readers import (
    ROUNDING_S,
    Block,
    ReaderChain,
    hash_encoded,
    open_encoded,
    probe_duration_s,
)
from transforms.errors import DecodeError
from transforms.process.stage_times import stage_clocks, timed
from transforms.records import ClipFacts, FloatArray, Part

MIN_CLIP_S = 0.025  # one fbank frame: less than this gives no features
RUN_IN_S = 1  # what the resampler is given beside a part; its filter is a fraction of that
CLIPPED_AT = 0.999
SILENT_MEAN_SQUARE = 1e-6  # −60 dBFS
LEVEL_FRAME_S = 0.02
# Errors that say that a bound was reached: the item fails, whatever has been decoded of it.
BOUND_ERRORS = frozenset({"ItemTooLarge", "ItemTooLong", "DecodingTooSlow", "DecoderOutOfMemory"})


@dataclass(frozen=True)
class DecodeLimits:
    """What one item may cost. More is an error that names the config's key; none by default.

    Attributes:
        max_item_s: Seconds of audio.
        max_decode_ratio: Seconds of computing per second of audio.
        min_decode_s: Seconds of computing that any item may take, however little audio it gives.
        max_decoder_bytes: Memory of the child process, beside what it holds when it starts and
            the encoded bytes that it is sent. Linux only.
    """

    max_item_s: float = math.inf
    max_decode_ratio: float = math.inf
    min_decode_s: float = math.inf
    max_decoder_bytes: float = math.inf


NO_LIMITS = DecodeLimits()


class DecodedPiece(NamedTuple):
    """A piece of a clip on its way out.

    Attributes:
        samples: Shape (num_samples,), mono float32 at the model's rate.
        facts: The clip's facts as far as decoded; complete where ``is_last``.
        is_last: Nothing follows.
    """

    samples: FloatArray
    facts: ClipFacts
    is_last: bool


def _ignore_progress() -> None:
    """Nobody waits for signs of life."""


def decode(
    source: bytes | str | Path,
    *,
    sample_rate_hz: int = 16_000,
    piece_samples: int = 160_000,
    start_s: float | None = None,
    end_s: float | None = None,
    part: Part | None = None,
    limits: DecodeLimits = NO_LIMITS,
    on_progress: Callable[[], None] = _ignore_progress,
) -> Iterator[DecodedPiece]:
    """Decode a file, or a segment of it, to mono at one rate, piece by piece.

    Args:
        source: The encoded bytes, or the path of a local file.
        sample_rate_hz: The rate to resample to.
        piece_samples: Samples per piece; the last has between 1 and this many.
        start_s: Start of the segment in seconds, or None for the file's start.
        end_s: End of the segment, exclusive, or None for the file's end.
        part: The segment is a part of a long file, from a whole second to another or to the end:
            its samples have these margins, where there is audio; its facts have not. Only the
            first hashes the content, and the words of a warning are those of a whole file.
        limits: What the item may cost.
        on_progress: Called whenever work has been done, for whoever watches for a hang.

    Yields:
        Pieces in order; at least one, and exactly one ``is_last``.

    Raises:
        DecodeError: Nothing can be labelled. ``error_type`` is ``EmptyFile``, ``NoAudioStream``,
            ``NotAudio``, ``BadSegment``, ``BadSampleRate``, ``NonFiniteSamples``, ``TooShort``, or
            the name of the operating system's error. Once a piece is out, trouble ends the clip
            with a warning in its facts instead; a bound does not (``ItemTooLong``,
            ``DecodingTooSlow``): it raises at any time.
    """
    _check_segment(start_s, end_s)
    with contextlib.ExitStack() as opened:
        with timed("open"):
            encoded = opened.enter_context(open_encoded(source))
            is_first = part is None or not start_s
            sha256 = hash_encoded(encoded, on_progress) if is_first else ""
        if part is None:
            stretch = _Stretch(start_s or 0.0, end_s)
        else:
            stretch = _PartStretch(start_s or 0.0, end_s, part, sample_rate_hz)
        budget = _Budget(limits, on_progress)
        chain = ReaderChain(encoded, stretch.read.start_s, budget.on_progress)
        try:
            yield from _decode_blocks(chain, stretch, sha256, sample_rate_hz, piece_samples, budget)
        finally:
            chain.close()


def decode_whole(
    source: bytes | str | Path,
    *,
    sample_rate_hz: int = 16_000,
    start_s: float | None = None,
    end_s: float | None = None,
) -> tuple[FloatArray, ClipFacts]:
    """Decode a short clip in one go: samples of shape (num_samples,), and its facts.

    Raises:
        DecodeError: As ``decode``.
    """
    pieces = list(decode(source, sample_rate_hz=sample_rate_hz, start_s=start_s, end_s=end_s))
    return np.concatenate([piece.samples for piece in pieces]), pieces[-1].facts


def _decode_blocks(
    chain: ReaderChain,
    stretch: _Stretch,
    sha256: str,
    sample_rate_hz: int,
    piece_samples: int,
    budget: _Budget,
) -> Iterator[DecodedPiece]:
    levels = _Levels(stretch.origin_s)
    resampler = _Resampler(sample_rate_hz)
    pieces = _Pieces(piece_samples)
    notes: list[str] = []
    error: DecodeError | None = None
    for block in stretch.read.cut(budget.count(chain.blocks()), chain.first_frame):
        samples, energy, bad = _finite_part(block.samples)
        start, stop = stretch.measured(block.rate, len(samples))
        if start < stop or not len(samples):
            levels.add(block.rate, samples[start:stop], energy[start:stop])
        decoded_s = stretch.reached_s - stretch.counts_from_s
        budget.check_duration(decoded_s)
        if bad:
            error = DecodeError(
                f"the sample at {stretch.reached_s:.3f} s is NaN or infinite",
                error_type="NonFiniteSamples",
            )
            notes.append(f"decoded {decoded_s:.1f} s, then stopped: {error}")
        mono = mix_down(samples)
        with timed("resample"):
            resampled = stretch.given(resampler.push(block.rate, mono))
        for samples_out in pieces.push(resampled):
            yield DecodedPiece(samples_out, levels.facts(sha256, None), False)
        if error is not None:
            break
    else:
        notes.extend(stretch.shortfall(chain, levels))
    with timed("resample"):
        resampled = stretch.given(resampler.flush())
    yield from (
        DecodedPiece(samples_out, levels.facts(sha256, None), False)
        for samples_out in pieces.push(resampled)
    )
    last = pieces.rest()
    notes.extend(levels.notes)
    notes.extend(chain.notes())
    if not pieces.num_out and len(last) < round(MIN_CLIP_S * sample_rate_hz):
        raise error or _too_short(levels.duration_s, stretch.read, notes)
    yield DecodedPiece(last, levels.facts(sha256, "; ".join(notes) or None), True)


def _too_short(decoded_s: float, segment: _Segment, notes: list[str]) -> DecodeError:
    if decoded_s == 0.0 and segment.start_s > 0.0 and segment.frames_seen:
        return DecodeError(
            f"the segment starts at {segment.start_s:.3f} s, but the audio ends at "
            f"{segment.reached_s:.3f} s; check start_s and end_s of the manifest",
            error_type="BadSegment",
        )
    words = f" ({'; '.join(notes)})" if notes else ""
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

    Time is that of the processor, so that neither a busy machine nor a consumer who takes his
    time makes a file slow; who waits for nothing at all is ended by the parent.
    """

    def __init__(self, limits: DecodeLimits, on_progress: Callable[[], None]) -> None:
        self._limits = limits
        self._on_progress = on_progress
        self._began_s = time.process_time()
        self._audio_s = 0.0

    def count(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Note how much audio goes by, a segment's way to its start included."""
        for block in blocks:
            self._audio_s += len(block.samples) / block.rate
            yield block

    def on_progress(self) -> None:
        """Work has been done: pass it on, and look at the clock."""
        self._on_progress()
        used_s = time.process_time() - self._began_s
        if math.isinf(self._limits.max_decode_ratio):
            return
        allowed_s = max(self._limits.min_decode_s, self._limits.max_decode_ratio * self._audio_s)
        if used_s > allowed_s:
            raise DecodeError(
                f"decoding took {used_s:.1f} s for {self._audio_s:.1f} s of audio; at most "
                f"{self._limits.max_decode_ratio:g} s per second are allowed (and "
                f"{self._limits.min_decode_s:g} s for any item); to allow more, raise "
                "decode.max_decode_ratio",
                error_type="DecodingTooSlow",
            )

    def check_duration(self, duration_s: float) -> None:
        """Refuse an item that is longer than allowed, rather than cut it."""
        if duration_s > self._limits.max_item_s:
            raise DecodeError(
                f"the item goes on after {duration_s:.1f} s of audio; at most "
                f"{self._limits.max_item_s:g} s are allowed; to allow more, raise "
                "decode.max_item_s, or label it in segments",
                error_type="ItemTooLong",
            )


# From blocks to pieces


class _Segment:
    """Cuts ``[round(start_s * rate), round(end_s * rate))`` out of the blocks.

    Attributes:
        start_s: Start in seconds.
        reached_s: How far the file was read, in seconds from its start.
        frames_seen: Whether anything was read at all.
        is_read: Whether it was read to its own end, rather than the file's.
    """

    def __init__(self, start_s: float, end_s: float | None) -> None:
        self.start_s = start_s
        self.end_s = end_s
        self.reached_s = 0.0
        self.frames_seen = False
        self.is_read = False

    def cut(self, blocks: Iterable[Block], first_frame: int) -> Iterator[Block]:
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
                self.is_read = True
                return

    def shortfall(self, chain: ReaderChain, decoded_s: float) -> list[str]:
        """A warning if there is less audio than the file promises or the segment asks for."""
        promised_s, slack_s = chain.promised_s, chain.slack_s
        wanted_end_s = promised_s if self.end_s is None else self.end_s
        if self.end_s is not None:
            slack_s = ROUNDING_S
        if wanted_end_s is None or decoded_s >= wanted_end_s - self.start_s - slack_s:
            return []
        note = f"decoded {_of(decoded_s, wanted_end_s - self.start_s)} s"
        if self.end_s is not None and (
            promised_s is None or promised_s <= self.reached_s + slack_s
        ):
            note += f" (the segment ends at {self.end_s:.3f} s, the file at {self.reached_s:.3f} s)"
        return [note]


class _Stretch:
    """What of a file is read, measured and given: of a segment, all the same.

    Attributes:
        read: What is read.
        counts_from_s: Where words to the user count seconds of audio from.
        origin_s: Seconds before what is measured, by the same count.
        reached_s: How far samples have been taken in, in seconds from the start of the file.
    """

    def __init__(self, start_s: float, end_s: float | None) -> None:
        self.read = _Segment(start_s, end_s)
        self.counts_from_s = start_s
        self.origin_s = 0.0
        self.reached_s = start_s

    def measured(self, rate: int, num_samples: int) -> tuple[int, int]:
        """Take the next samples in; which of them count for the levels: from, and up to."""
        self.reached_s += num_samples / rate
        return 0, num_samples

    def given(self, resampled: FloatArray) -> FloatArray:
        """Which of the next resampled samples are given."""
        return resampled

    def shortfall(self, chain: ReaderChain, levels: _Levels) -> list[str]:
        """A warning if there is less audio than there should be."""
        return self.read.shortfall(chain, levels.duration_s)


class _PartStretch(_Stretch):
    """A part of a long file: more is read than is given, and more is given than is measured."""

    def __init__(self, start_s: float, end_s: float | None, part: Part, rate_hz: int) -> None:
        before_s = math.ceil(part.before_samples / rate_hz) + RUN_IN_S
        after_s = part.after_samples / rate_hz + RUN_IN_S
        first_s = max(0, round(start_s) - before_s)
        super().__init__(first_s, None if end_s is None else end_s + after_s)
        self.counts_from_s, self.origin_s = 0.0, start_s
        self._start_s = start_s
        self._end_s = math.inf if end_s is None else end_s
        self._to_drop = round((start_s - first_s) * rate_hz) - part.before_samples
        self._to_give: float = math.inf
        if end_s is not None:
            margins = part.before_samples + part.after_samples
            self._to_give = round((end_s - start_s) * rate_hz) + margins

    def measured(self, rate: int, num_samples: int) -> tuple[int, int]:
        begins_s = self.reached_s
        super().measured(rate, num_samples)
        first, stop = (
            round(min(max((bound_s - begins_s) * rate, 0), num_samples))
            for bound_s in (self._start_s, self._end_s)
        )
        return first, stop

    def given(self, resampled: FloatArray) -> FloatArray:
        num_dropped = min(self._to_drop, len(resampled))
        self._to_drop -= num_dropped
        num_given = int(min(self._to_give, len(resampled) - num_dropped))
        self._to_give -= num_given
        return resampled[num_dropped : num_dropped + num_given]

    def shortfall(self, chain: ReaderChain, levels: _Levels) -> list[str]:
        """That of the whole file, where it ends in this part."""
        if self.read.is_read:
            return []
        whole = _Segment(0.0, None)
        return whole.shortfall(chain, self.read.reached_s)


def _of(part_s: float, whole_s: float) -> str:
    """``3.2 of 5.0``, with as many decimals as it takes to tell the two apart."""
    digits = 1 if whole_s - part_s >= 0.1 else 3
    return f"{part_s:.{digits}f} of {whole_s:.{digits}f}"


class _Levels:
    """Level statistics over all channels at the source's rate, added up block by block.

    A silent frame is 20 ms (``round(0.02 * rate)`` samples) whose RMS over all channels is below
    −60 dBFS; a last partial frame counts as one.

    Attributes:
        duration_s: Seconds added so far.
        notes: Changes of format on the way.
        origin_s: What these are counted from: seconds before the first sample.
    """

    def __init__(self, origin_s: float = 0.0) -> None:
        self.duration_s = 0.0
        self.origin_s = origin_s
        self.notes: list[str] = []
        self._first_format: tuple[int, int] | None = None
        self._format: tuple[int, int] = (0, 0)
        self._run_start_s = 0.0
        self._run_samples = 0
        self._peak = 0.0
        self._energy = 0.0
        self._num_values = 0
        self._num_clipped = 0
        self._num_frames = 0
        self._num_silent = 0
        self._partial_energy = 0.0
        self._partial_samples = 0

    def add(self, rate: int, samples: FloatArray, energy: npt.NDArray[np.float64]) -> None:
        """Add a block.

        Args:
            rate: Its rate in Hz.
            samples: Shape (num_samples, num_channels), finite.
            energy: Shape (num_samples,): the sum of squares over the channels.
        """
        if (rate, samples.shape[1]) != self._format:
            self._change_format(rate, samples.shape[1])
        if not len(samples):
            return
        peak = max(float(samples.max()), -float(samples.min()))
        self._peak = max(self._peak, peak)
        if peak >= CLIPPED_AT:
            self._num_clipped += int(np.count_nonzero(np.abs(samples) >= CLIPPED_AT))
        self._energy += float(energy.sum())
        self._num_values += samples.size
        self._count_frames(rate, samples.shape[1], energy)
        self._run_samples += len(samples)
        self.duration_s = self._run_start_s + self._run_samples / rate

    def _change_format(self, rate: int, channels: int) -> None:
        if self._first_format is None:
            self._first_format = (rate, channels)
        else:
            self.notes.append(
                f"at {self.origin_s + self.duration_s:.1f} s the audio changes from "
                f"{self._format[0]} Hz, {self._format[1]} channels to {rate} Hz, "
                f"{channels} channels"
            )
        self._close_partial_frame()
        self._format = (rate, channels)
        self._run_start_s, self._run_samples = self.duration_s, 0

    def _count_frames(self, rate: int, channels: int, energy: npt.NDArray[np.float64]) -> None:
        frame_samples = max(round(LEVEL_FRAME_S * rate), 1)
        if self._partial_samples:
            head = energy[: frame_samples - self._partial_samples]
            self._partial_energy += float(head.sum())
            self._partial_samples += len(head)
            energy = energy[len(head) :]
            if self._partial_samples < frame_samples:
                return
            self._close_partial_frame()
        num_whole = len(energy) // frame_samples
        whole = energy[: num_whole * frame_samples].reshape(num_whole, frame_samples)
        silent_below = SILENT_MEAN_SQUARE * frame_samples * channels
        self._num_silent += int(np.count_nonzero(whole.sum(axis=1) < silent_below))
        self._num_frames += num_whole
        rest = energy[num_whole * frame_samples :]
        self._partial_energy, self._partial_samples = float(rest.sum()), len(rest)

    def _partial_frame(self) -> tuple[int, int]:
        """The frame that is not full yet, as (1 or 0 frames, 1 or 0 of them silent)."""
        if not self._partial_samples:
            return 0, 0
        silent_below = SILENT_MEAN_SQUARE * self._partial_samples * self._format[1]
        return 1, int(self._partial_energy < silent_below)

    def _close_partial_frame(self) -> None:
        frames, silent = self._partial_frame()
        self._num_frames += frames
        self._num_silent += silent
        self._partial_energy, self._partial_samples = 0.0, 0

    def facts(self, content_sha256: str, warning: str | None) -> ClipFacts:
        """What is known so far."""
        frames, silent = self._partial_frame()
        rate, channels = self._first_format or (0, 0)
        return ClipFacts(
            duration_s=self.duration_s,
            sample_rate_hz=rate,
            channels=channels,
            peak_dbfs=_decibels(self._peak),
            rms_dbfs=_decibels(math.sqrt(self._energy / max(self._num_values, 1))),
            clipped_ratio=self._num_clipped / max(self._num_values, 1),
            silent_ratio=(self._num_silent + silent) / max(self._num_frames + frames, 1),
            content_sha256=content_sha256,
            warning=warning,
        )


def _decibels(amplitude: float) -> float:
    return 20.0 * math.log10(amplitude) if amplitude > 0.0 else -math.inf


def _finite_part(samples: FloatArray) -> tuple[FloatArray, npt.NDArray[np.float64], bool]:
    """The samples up to the first NaN or infinity, their energy, and whether there is one.

    Energy has shape (num_samples,): the sum of squares over the channels, in float64, which no
    float32 can overflow.
    """
    with np.errstate(all="ignore"):
        energy = np.square(samples[:, 0], dtype=np.float64)
        for channel in range(1, samples.shape[1]):
            energy += np.square(samples[:, channel], dtype=np.float64)
    if math.isfinite(float(energy.sum())):
        return samples, energy, False
    first_bad = int(np.argmin(np.isfinite(energy)))
    return samples[:first_bad], energy[:first_bad], True


def mix_down(samples: FloatArray) -> FloatArray:
    """The mean of the channels: (num_samples, num_channels) to (num_samples,), float32."""
    num_channels = samples.shape[1]
    if num_channels == 1:
        return samples[:, 0]
    mono = samples[:, 0] + samples[:, 1]
    for channel in range(2, num_channels):
        mono += samples[:, channel]
    mono *= np.float32(1.0 / num_channels)
    return mono


class _Resampler:
    """soxr HQ, streaming; starts afresh where the source changes its rate."""

    def __init__(self, sample_rate_hz: int) -> None:
        self._sample_rate_hz = sample_rate_hz
        self._rate = 0
        self._stream: soxr.ResampleStream | None = None

    def push(self, rate: int, mono: FloatArray) -> FloatArray:
        """Samples at the new rate that are ready; shape (num_samples,)."""
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
        """What the filter still holds."""
        stream, self._stream, self._rate = self._stream, None, 0
        empty = np.zeros(0, np.float32)
        return empty if stream is None else stream.resample_chunk(empty, last=True)


class _Pieces:
    """Cuts a stream of samples into pieces of one size, and holds the last one back.

    Attributes:
        num_out: Pieces given out so far.
    """

    def __init__(self, piece_samples: int) -> None:
        self.num_out = 0
        self._piece_samples = piece_samples
        self._parts: list[FloatArray] = []
        self._num_held = 0

    def push(self, samples: FloatArray) -> Iterator[FloatArray]:
        """Take samples in; give out whole pieces that something follows."""
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
        """All that is held."""
        parts, self._parts, self._num_held = self._parts, [], 0
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])


# The child process. Its end of a socket carries frames: one byte of kind, eight of length, and
# the payload. Samples go through shared memory, in slots that the parent gives back.

FRAME_HEADER = struct.Struct("!cQ")
READY, PIECE, LAST, ERROR, ALIVE = b"R", b"P", b"L", b"E", b"A"  # to the parent
WANTED, LENGTH = b"W", b"T"  # to the parent, of a file whose header is probed
JOB, CREDIT = b"J", b"C"  # to the child
PROBE, BLOCK = b"H", b"B"  # to the child, of a file whose header is probed
NUM_SLOTS = 3
ALIVE_EVERY_S = 1.0
BLOCK_BYTES = 64 << 10  # what of a file that is probed is asked for at once

DecodeFunction = Callable[..., Iterator[DecodedPiece]]
ProbeFunction = Callable[[BinaryIO], float | None]


def data_bytes(process: int | str) -> int:
    """What RLIMIT_DATA counts of a process: private writable memory; 0 if that is not known."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux, or the process is gone
        return 0
    found = re.search(r"^VmData:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def send_frame(connection: socket.socket, kind: bytes, payload: bytes = b"") -> None:
    """Write one frame."""
    connection.sendall(FRAME_HEADER.pack(kind, len(payload)) + payload)


@dataclass
class _Job:
    """A clip as the parent sends it."""

    source: bytes | str
    options: dict[str, Any]  # of ``decode``: which stretch of the file


@dataclass
class _Probe:
    """A file whose header the parent asks about; its blocks are the parent's."""

    size: int


class _ParentsFile(io.RawIOBase):
    """A file of which the parent gives one block after another, as they are read.

    None is asked for twice: how many there are is the parent's bound.
    """

    def __init__(self, size: int, fetch: Callable[[int], bytes]) -> None:
        super().__init__()
        self._size = size
        self._fetch = fetch
        self._blocks: dict[int, bytes] = {}
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        start = self._position - self._position % BLOCK_BYTES
        if start not in self._blocks:
            self._blocks[start] = self._fetch(start)
        at = self._position - start
        data = memoryview(self._blocks[start])[at : at + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@dataclass
class _Child:
    """The child's side of the connection.

    The reader thread takes in jobs and credits, and ends the process when the parent is gone.
    """

    connection: socket.socket
    sample_rate_hz: int
    piece_samples: int
    limits: DecodeLimits
    slots: FloatArray  # (NUM_SLOTS, piece_samples)
    jobs: queue.SimpleQueue[_Job | _Probe] = field(default_factory=queue.SimpleQueue)
    blocks: queue.SimpleQueue[bytes] = field(default_factory=queue.SimpleQueue)
    credits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(NUM_SLOTS))
    num_sent: int = 0
    last_sign_s: float = 0.0
    num_bytes_before: int = 0  # of the clip before, which may not have been let go of yet
    base_bytes: int = field(default_factory=lambda: data_bytes("self"))

    def read_frames(self) -> None:
        """Body of the reader thread."""
        stream = self.connection.makefile("rb")
        try:
            while header := stream.read(FRAME_HEADER.size):
                kind, length = FRAME_HEADER.unpack(header)
                payload = stream.read(length)
                if kind == CREDIT:
                    self.credits.release()
                    continue
                if kind == BLOCK:
                    self.blocks.put(payload)
                    continue
                job = json.loads(payload)
                if kind == PROBE:
                    self.limit_memory(0)
                    self.jobs.put(_Probe(job["size"]))
                    continue
                if job["returned_slots"]:
                    self.credits.release(job["returned_slots"])
                self.limit_memory(job["size"])
                source = stream.read(job["size"]) if job["path"] is None else job["path"]
                options = {"start_s": job["start_s"], "end_s": job["end_s"]}
                if job["part"] is not None:
                    options["part"] = Part(**job["part"])
                self.jobs.put(_Job(source, options))
        finally:
            os._exit(0)

    def run_job(self, decode_function: DecodeFunction, probe_function: ProbeFunction) -> None:
        """Decode one clip, or probe one header, and send what comes of it."""
        job = self.jobs.get()
        try:
            if isinstance(job, _Probe):
                self.send_length(job, probe_function)
            else:
                self.send_pieces(job, decode_function)
        except DecodeError as error:
            self.send_error(error.error_type, str(error))
        except MemoryError as error:
            words = str(error) or "out of memory"
            message = (
                f"the decoder needs too much memory ({words}); at most "
                f"{self.limits.max_decoder_bytes:.0f} bytes are allowed; to allow more, raise "
                "decode.max_decoder_bytes"
            )
            self.send_error("DecoderOutOfMemory", message)
        except Exception as error:  # whatever a library throws belongs to this clip alone
            message = f"the decoder failed: {type(error).__name__}: {error}"
            self.send_error(type(error).__name__, message)

    def send_length(self, probe: _Probe, probe_function: ProbeFunction) -> None:
        """Probe one header and send what it says."""
        with io.BufferedReader(_ParentsFile(probe.size, self.fetch_block)) as file:
            self.send(LENGTH, {"length_s": probe_function(file)})

    def fetch_block(self, start: int) -> bytes:
        """The block of the file under probe that begins there."""
        self.send(WANTED, {"start": start})
        return self.blocks.get()

    @timed("decode")
    def send_pieces(self, job: _Job, decode_function: DecodeFunction) -> None:
        """Decode one clip and send its pieces."""
        for piece in decode_function(
            job.source,
            sample_rate_hz=self.sample_rate_hz,
            piece_samples=self.piece_samples,
            **job.options,
            limits=self.limits,
            on_progress=self.show_life,
        ):
            with timed("other"):  # waiting for room is no decoding
                self.send_piece(piece)

    def limit_memory(self, num_bytes: int) -> None:
        """Bound what the process may allocate, beside a clip of so many encoded bytes."""
        allowed = self.limits.max_decoder_bytes
        if math.isfinite(allowed) and self.base_bytes:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            soft = self.base_bytes + int(allowed) + num_bytes + self.num_bytes_before
            if hard != resource.RLIM_INFINITY:
                soft = min(soft, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        self.num_bytes_before = num_bytes

    def send_piece(self, piece: DecodedPiece) -> None:
        self.credits.acquire()
        self.slots[self.num_sent % NUM_SLOTS, : len(piece.samples)] = piece.samples
        self.num_sent += 1
        content = {"num_samples": len(piece.samples), "facts": asdict(piece.facts)}
        if piece.is_last:
            self.send(LAST, content | {"seconds": seconds_of_decoder()})
        else:
            self.send(PIECE, content)

    def send_error(self, error_type: str, message: str) -> None:
        content = {"error_type": error_type, "message": message}
        self.send(ERROR, content | {"seconds": seconds_of_decoder()})

    def send(self, kind: bytes, payload: dict[str, Any]) -> None:
        send_frame(self.connection, kind, json.dumps(payload).encode())
        self.last_sign_s = time.monotonic()

    def show_life(self) -> None:
        if time.monotonic() - self.last_sign_s > ALIVE_EVERY_S:
            self.send(ALIVE, {})


def seconds_of_decoder() -> dict[str, float]:
    """What this process has worked since it said so last, as fields of ``StageSeconds``."""
    lap = stage_clocks.lap()
    return {"open_s": lap.open_s, "decode_s": lap.decode_s, "resample_s": lap.resample_s}


def serve(
    arguments: list[str],
    decode_function: DecodeFunction = decode,
    probe_function: ProbeFunction = probe_duration_s,
) -> None:
    """Decode clips and probe headers for the parent process until it goes away; never returns.

    Args:
        arguments: File descriptors of the socket and of the shared memory, the rate in Hz, the
            samples per piece, and ``DecodeLimits`` as JSON.
        decode_function: What decodes; tests put a crashing one here.
        probe_function: What probes, likewise.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # hostile files would fill the disk with cores
    socket_fd, memory_fd, sample_rate_hz, piece_samples = map(int, arguments[:4])
    limits = DecodeLimits(**json.loads(arguments[4]))
    memory = mmap.mmap(memory_fd, NUM_SLOTS * piece_samples * 4)
    os.close(memory_fd)
    slots = np.frombuffer(memory, np.float32).reshape(NUM_SLOTS, piece_samples)
    connection = socket.socket(fileno=socket_fd)
    child = _Child(connection, sample_rate_hz, piece_samples, limits, slots)
    threading.Thread(target=child.read_frames, daemon=True).start()
    send_frame(child.connection, READY)
    while True:
        child.run_job(decode_function, probe_function)


if __name__ == "__main__":
    serve(sys.argv[1:])
