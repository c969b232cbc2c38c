"""Audio for tests: known samples in every format that the installed libraries can write.

``encode(samples, rate, "flac")`` returns bytes; ``FORMATS`` lists the names. Speex, WMA Pro, ATRAC
and AMR-WB are missing, since PyAV's wheels have no encoder for them.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from transforms.records import EncodedClip, Item

Samples = npt.NDArray[np.float32]


def tone(
    duration_s: float,
    sample_rate_hz: int = 16_000,
    *,
    frequency_hz: float = 440.0,
    amplitude: float = 0.5,
    num_channels: int = 1,
) -> Samples:
    """Return a sine, (num_samples, num_channels); each channel is half as loud as the last."""
    times = np.arange(round(duration_s * sample_rate_hz)) / sample_rate_hz
    sine = amplitude * np.sin(2 * np.pi * frequency_hz * times)
    return (sine[:, None] * 0.5 ** np.arange(num_channels)).astype(np.float32)


def noise(
    duration_s: float,
    sample_rate_hz: int = 16_000,
    *,
    amplitude: float = 0.1,
    num_channels: int = 1,
    seed: int = 0,
) -> Samples:
    """Return Gaussian noise clipped to [-1, 1], (num_samples, num_channels)."""
    shape = (round(duration_s * sample_rate_hz), num_channels)
    samples = amplitude * np.random.default_rng(seed).standard_normal(shape)
    return np.clip(samples, -1.0, 1.0).astype(np.float32)


def quantised(samples: Samples, bits: int) -> Samples:
    """Round samples to integers of this many bits, so that lossless means equal."""
    steps = 2.0 ** (bits - 1)
    return (np.clip(np.round(samples * steps), -steps, steps - 1) / steps).astype(np.float32)


@dataclass(frozen=True)
class Format:
    """How to write a format.

    Attributes:
        library: ``soundfile`` or ``av``.
        container: Its name in that library.
        codec: Subtype (soundfile) or encoder (PyAV).
        lossless_bits: Bits that survive a round trip; None for a lossy codec.
        rates: Sample rates that it supports; None for any.
        with_video: Write a small video stream first.
        bit_rate: For encoders without a default.
        sample_format: Input of PyAV's encoder; None for 16 bits where it takes them.
        compression_level: soundfile's, in [0, 1]; for Vorbis, 1 − quality / 10.
        options: Muxer options.
    """

    library: str
    container: str
    codec: str
    lossless_bits: int | None = None
    rates: tuple[int, ...] | None = None
    with_video: bool = False
    bit_rate: int | None = None
    sample_format: str | None = None
    compression_level: float | None = None
    options: dict[str, str] = field(default_factory=dict)


OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
FORMATS: dict[str, Format] = {
    "wav": Format("soundfile", "WAV", "PCM_16", 16),
    "wav8": Format("soundfile", "WAV", "PCM_U8", 8),
    "wav24": Format("soundfile", "WAV", "PCM_24", 24),
    "wav32": Format("soundfile", "WAV", "PCM_32", 24),
    "wav_float": Format("soundfile", "WAV", "FLOAT", 24),
    "wav_double": Format("soundfile", "WAV", "DOUBLE", 24),
    "wavex": Format("soundfile", "WAVEX", "PCM_16", 16),
    "rf64": Format("soundfile", "RF64", "PCM_16", 16),
    "w64": Format("soundfile", "W64", "PCM_16", 16),
    "flac": Format("soundfile", "FLAC", "PCM_16", 16),
    "flac24": Format("soundfile", "FLAC", "PCM_24", 24),
    "aiff": Format("soundfile", "AIFF", "PCM_16", 16),
    "aiff8": Format("soundfile", "AIFF", "PCM_S8", 8),
    "aiff24": Format("soundfile", "AIFF", "PCM_24", 24),
    "au": Format("soundfile", "AU", "PCM_16", 16),
    "caf": Format("soundfile", "CAF", "PCM_16", 16),
    "caf_alac": Format("soundfile", "CAF", "ALAC_16", 16),
    "caf_alac24": Format("soundfile", "CAF", "ALAC_24", 24),
    "mp3": Format("soundfile", "MP3", "MPEG_LAYER_III"),
    "ogg": Format("soundfile", "OGG", "VORBIS"),
    "mp3_no_header": Format("av", "mp3", "libmp3lame", options={"write_xing": "0"}),
    "opus": Format("av", "ogg", "libopus", rates=OPUS_RATES),
    "ogg_flac": Format("av", "ogg", "flac", 16),
    "m4a": Format("av", "ipod", "aac"),
    "m4a_faststart": Format("av", "ipod", "aac", options={"movflags": "+faststart"}),
    "alac": Format("av", "ipod", "alac", 16),
    # FFmpeg's encoder stores 24 of the 32 bits that it is given.
    "alac24": Format("av", "ipod", "alac", 24, sample_format="s32p"),
    "aac": Format("av", "adts", "aac"),
    "mov": Format("av", "mov", "pcm_s16le", 16),
    "mkv": Format("av", "matroska", "flac", 16),
    "webm": Format("av", "webm", "libopus", rates=OPUS_RATES),
    "wma": Format("av", "asf", "wmav2", bit_rate=128_000),
    "amr": Format("av", "amr", "libopencore_amrnb", rates=(8_000,), bit_rate=12_200),
    "ac3": Format("av", "ac3", "ac3"),
    "mp2": Format("av", "mp2", "mp2", bit_rate=192_000),
    "wavpack": Format("av", "wv", "wavpack", 16),
    "mp4_video": Format("av", "mp4", "aac", with_video=True),
    "mkv_video": Format("av", "matroska", "pcm_s16le", 16, with_video=True),
    "avi_video": Format("av", "avi", "pcm_s16le", 16, with_video=True),
}


def encode(samples: Samples, sample_rate_hz: int, format: str | Format = "wav") -> bytes:
    """Encode samples of shape (num_samples,) or (num_samples, num_channels)."""
    chosen = FORMATS[format] if isinstance(format, str) else format
    samples = samples[:, None] if samples.ndim == 1 else samples
    if chosen.library == "soundfile":
        return _encode_with_soundfile(samples, sample_rate_hz, chosen)
    return _encode_with_av([samples], sample_rate_hz, chosen)


def encode_video(sample_rate_hz: int, tracks: list[Samples]) -> bytes:
    """Encode a small video with these audio tracks, possibly none."""
    return _encode_with_av(tracks, sample_rate_hz, FORMATS["mkv_video"])


def write(path: Path, samples: Samples, sample_rate_hz: int, format: str | Format = "wav") -> Path:
    """Encode samples into a file and return its path."""
    path.write_bytes(encode(samples, sample_rate_hz, format))
    return path


def write_noise(path: Path, duration_s: float = 1.0, seed: int = 0) -> Path:
    """Write noise at 16 kHz, with the folder that it lies in, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, noise(duration_s, seed=seed), 16_000)


def _encode_with_soundfile(samples: Samples, sample_rate_hz: int, chosen: Format) -> bytes:
    target = io.BytesIO()
    with soundfile.SoundFile(
        target,
        "w",
        sample_rate_hz,
        samples.shape[1],
        format=chosen.container,
        subtype=chosen.codec,
        compression_level=chosen.compression_level,
    ) as file:
        # libsndfile overflows its stack on minutes of Vorbis in one call.
        for start in range(0, len(samples), sample_rate_hz):
            file.write(samples[start : start + sample_rate_hz])
    return target.getvalue()


def _encode_with_av(tracks: list[Samples], sample_rate_hz: int, chosen: Format) -> bytes:
    import av

    with tempfile.TemporaryDirectory() as folder:  # some muxers read their output again
        path = Path(folder, "audio")
        with av.open(str(path), "w", format=chosen.container, options=chosen.options) as container:
            if chosen.with_video:
                video = container.add_stream("mpeg4", rate=5)
                video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
            streams = [_add_audio(container, chosen, sample_rate_hz, t.shape[1]) for t in tracks]
            if chosen.with_video:
                _encode_video_frames(container, video)
            for stream, samples in zip(streams, tracks, strict=True):
                _encode_audio_frames(container, stream, samples, sample_rate_hz)
        return path.read_bytes()


def _add_audio(container: Any, chosen: Format, sample_rate_hz: int, num_channels: int) -> Any:
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[num_channels]
    stream = container.add_stream(chosen.codec, rate=sample_rate_hz, layout=layout)
    if chosen.bit_rate is not None:
        stream.bit_rate = chosen.bit_rate
    names = [supported.name for supported in stream.codec_context.codec.audio_formats or []]
    wanted = chosen.sample_format or next((n for n in ("s16", "s16p", *names) if n in names), "s16")
    stream.codec_context.format = wanted
    return stream


def _encode_video_frames(container: Any, video: Any) -> None:
    import av

    for index in range(5):
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), index * 40, np.uint8), "rgb24")
        frame.pts = index
        container.mux(video.encode(frame))
    container.mux(video.encode(None))


def _encode_audio_frames(
    container: Any, stream: Any, samples: Samples, sample_rate_hz: int
) -> None:
    import av

    context = stream.codec_context
    if not context.is_open:
        context.open()
    name = context.format.name
    frame_size = context.frame_size or 4096
    for start in range(0, len(samples), frame_size):
        block = samples[start : start + frame_size]
        if name.startswith("s16"):
            block = np.clip(np.round(block * 32_768), -32_768, 32_767).astype(np.int16)
        elif name.startswith("s32"):
            block = np.round(block.astype(np.float64) * 2**31).astype(np.int32)
        planar = name.endswith("p")
        array = block.T if planar else block.reshape(1, -1)
        frame = av.AudioFrame(name, stream.layout.name, len(block), align=1)
        # PyAV's from_ndarray fails for eight planar channels: it counts one plane too many.
        for plane, row in zip(frame.planes, np.ascontiguousarray(array), strict=False):
            plane.update(row)
        frame.sample_rate, frame.pts = sample_rate_hz, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def clip(name: str, data: bytes, **segment: float) -> EncodedClip:
    return EncodedClip(Item(name, name, **segment), data=data)


def wav(duration_s: float, mark: bytes = b"") -> bytes:
    return encode(tone(duration_s), 16_000, "wav_float") + mark
