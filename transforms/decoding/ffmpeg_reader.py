"""Reading everything that FFmpeg reads, with PyAV."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from transforms.decoding.formats.routes import Route
from transforms.decoding.reader import PACKET_SLACK_S, Block, block_frames, check_rate
from transforms.errors import DecodeError
from transforms.records import FloatArray, Note

# FFmpeg guesses the length of these from the bit rate; a guess is no promise.
GUESSED_DURATION_FORMATS = frozenset(
    {
        "aac",
        "ac3",
        "amr",
        "amrnb",
        "amrwb",
        "asf",
        "dts",
        "eac3",
        "latm",
        "loas",
        "mp3",
        "mpeg",
        "mpegts",
    }
)


def _import_av() -> Any:
    """Import PyAV, with FFmpeg's messages kept for errors and away from the terminal.

    Not imported above, because most runs have no file that needs FFmpeg.
    """
    import av

    if av.logging.get_level() is None:
        av.logging.set_level(av.logging.ERROR)
        logger = logging.getLogger("libav")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    return av


def _error_text(error: Exception) -> str:
    log = getattr(error, "log", None)
    own = getattr(error, "strerror", None) or str(error)
    return f"{log[2].strip()}" if log else own


class FfmpegReader:
    """A ``Reader`` on FFmpeg, of the first audio stream."""

    library = "FFmpeg"
    promise_slack_s = PACKET_SLACK_S

    def __init__(self, route: Route) -> None:
        self._av = _import_av()
        self._bytes = route.encoded.open()
        self.notes: list[Note] = []
        self.stopped: str | None = None
        self._container: Any = None
        self._num_damaged = 0
        self._has_decoded = False
        self._num_errors_before = self._av.logging.get_last_error()[0]
        try:
            # A playlist inside the bytes must not make FFmpeg open other files or addresses.
            self._container = self._av.open(
                self._bytes, options={"protocol_whitelist": "none"}, metadata_errors="ignore"
            )
            self._stream = self._first_audio_stream()
            self.promised_s = route.promised_s or self._read_promise()
        except DecodeError:
            self.close()
            raise
        except MemoryError as error:
            self.close()
            raise MemoryError(f"FFmpeg: {_error_text(error)}") from error
        except Exception as error:  # PyAV raises built-in errors too, for what FFmpeg reports
            self.close()
            raise DecodeError(f"FFmpeg: {_error_text(error)}", error_type="NotAudio") from error

    def _first_audio_stream(self) -> Any:
        streams = self._container.streams
        if not streams.audio:
            found = ", ".join(sorted({str(stream.type) for stream in streams})) or "nothing"
            raise DecodeError(
                f"no audio stream in this {self._container.format.name} file, only: {found}",
                error_type="NoAudioStream",
            )
        if len(streams.audio) > 1:
            words = f"{len(streams.audio)} audio streams; the first was used"
            self.notes.append(Note("several_streams", words))
        stream = streams.audio[0]
        if stream.codec_context is None:
            raise DecodeError(
                f"FFmpeg has no decoder for the audio in this {self._container.format.name} file",
                error_type="NotAudio",
            )
        stream.codec_context.thread_count = 1  # one core per decoder process
        for other in streams:
            if other is not stream:  # where the file is cut, its packets would end the reading
                other.discard = self._av.stream.Discard.all
        return stream

    def _read_promise(self) -> float | None:
        if not GUESSED_DURATION_FORMATS.isdisjoint(self._container.format.name.split(",")):
            return None
        if self._stream.duration is not None and self._stream.time_base is not None:
            # What precedes the start is the encoder's delay, which the decoder drops.
            num_units = self._stream.duration - max(self._stream.start_time or 0, 0)
            return float(num_units * self._stream.time_base) - self._pre_skip_s()
        if self._container.duration is not None and len(self._container.streams) == 1:
            return float(self._container.duration) / 1e6
        return None

    def _pre_skip_s(self) -> float:
        """Return what an Opus in Ogg counts and its decoder drops (RFC 7845, section 4.2)."""
        head = self._stream.codec_context.extradata or b""
        if self._container.format.name != "ogg" or not head.startswith(b"OpusHead"):
            return 0.0
        return int.from_bytes(head[10:12], "little") / 48_000

    def seek(self, start_s: float) -> int:
        """Stay at the start: FFmpeg's decoders do not give the same samples after a seek."""
        return 0

    def blocks(self, on_progress: Callable[[], None]) -> Iterator[Block]:
        """Yield the samples up to the end, without the packets that are damaged."""
        fifo: Any = None
        key, size = ("", "", 0), 0
        for frame in self._frames(on_progress):
            frame_key = (frame.format.name, frame.layout.name, frame.sample_rate)
            if frame_key != key:
                if fifo is not None:
                    yield from self._drain(fifo, key)
                check_rate(frame.sample_rate)
                fifo, key = self._av.AudioFifo(), frame_key
                size = block_frames(frame.sample_rate, frame.layout.nb_channels)
            frame.pts = None  # the queue would refuse gaps between timestamps
            fifo.write(frame)
            if fifo.samples >= size:
                yield from self._drain(fifo, key)
        if fifo is not None:
            yield from self._drain(fifo, key)
        if self._num_damaged:
            plural = "" if self._num_damaged == 1 else "s"
            words = f"{self._num_damaged} damaged packet{plural} skipped"
            self.notes.append(Note("damaged", words))
        elif not self._has_decoded and self.stopped is None:
            self.notes.extend(self._last_logged())

    def _last_logged(self) -> list[Note]:
        """Return FFmpeg's last log line for this file: its only sign of damage that it skipped."""
        num_errors, log = self._av.logging.get_last_error()
        if log is None or num_errors == self._num_errors_before:
            return []
        return [Note("damaged", f"FFmpeg: {log[2].strip()}")]

    def _drain(self, fifo: Any, key: Any) -> Iterator[Block]:
        frame = fifo.read(0)
        if frame is not None and frame.samples:
            self._has_decoded = True
            yield Block(key[2], _to_float(frame))

    def _frames(self, on_progress: Callable[[], None]) -> Iterator[Any]:
        packets = self._container.demux(self._stream)
        while True:
            on_progress()  # per packet: damaged ones yield no block
            try:
                packet = next(packets, None)
            except self._av.error.FFmpegError as error:
                self.stopped = _error_text(error)
                packet = None
            if packet is None:
                return
            try:
                frames = packet.decode()
            except self._av.error.EOFError:
                return
            except self._av.error.FFmpegError as error:
                if not any(bytes(packet)):  # padding behind the audio
                    continue
                self._num_damaged += 1
                if self._num_damaged == 1:
                    self.notes.append(Note("damaged", f"FFmpeg: {_error_text(error)}"))
                continue
            yield from frames

    def close(self) -> None:
        """Release the file."""
        if self._container is not None:
            self._container.close()
        self._bytes.close()


# FFmpeg's sample formats, and the factor that scales each to 1.0.
_SAMPLE_FORMATS: dict[str, tuple[type[np.generic], float]] = {
    "u8": (np.uint8, 2.0**-7),
    "s16": (np.int16, 2.0**-15),
    "s32": (np.int32, 2.0**-31),
    "s64": (np.int64, 2.0**-63),
    "flt": (np.float32, 1.0),
    "dbl": (np.float64, 1.0),
}


def _to_float(frame: Any) -> FloatArray:
    """Convert PyAV samples, planar or packed, to float32 of shape (num_samples, num_channels).

    PyAV's ``to_ndarray`` counts one plane too many with eight or more planar channels, and reads
    through a stray pointer.
    """
    dtype, scale = _SAMPLE_FORMATS[frame.format.name.removesuffix("p")]
    num_channels = frame.layout.nb_channels
    if frame.format.is_planar:
        planes = [np.frombuffer(frame.planes[index], dtype) for index in range(num_channels)]
        samples = np.stack([plane[: frame.samples] for plane in planes], axis=1)
    else:
        packed = np.frombuffer(frame.planes[0], dtype)
        samples = packed[: frame.samples * num_channels].reshape(-1, num_channels).copy()
    if dtype is np.uint8:
        samples = samples.astype(np.int16) - 128
    if samples.dtype == np.int16:
        product: FloatArray = np.multiply(samples, np.float32(scale), dtype=np.float32)
        return product
    with np.errstate(all="ignore"):  # doubles beyond float32 become infinite: reported later
        return np.asarray(samples if scale == 1.0 else samples * scale, np.float32)
