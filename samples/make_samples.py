"""Synthesis of the ten sounds in this folder, one for each class of ESC-10.

Run it to make them again: ``python samples/make_samples.py [FOLDER]``. It needs only numpy and
soundfile, takes a few seconds, and makes the same samples every time. (The encoders of another
libsndfile may write other bytes.) Nothing in it is a recording: every sound is noise, pulses and
sines, shaped like the source of such a sound.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

Array = npt.NDArray[np.float64]
# numpy's compatibility policy freezes its streams, unlike those of default_rng.
Random = np.random.RandomState

DURATION_S = 5.0
# Noise of a room, dB per band below its loudest: no recording is silent between the sounds.
ROOM_TONE = {60: 0.0, 200: -12.0, 1000: -26.0, 4000: -34.0, 12_000: -42.0}


@dataclass(frozen=True)
class Sample:
    """A file to make.

    Attributes:
        name: File name; its stem is the class.
        synthesise: Gives samples, shape (num_samples,) or (num_samples, 2), of any level.
        rate_hz: Sample rate of the file.
        peak: Largest absolute sample in the file.
        subtype: Encoding, as soundfile names it.
    """

    name: str
    synthesise: Callable[[int, Random], Array]
    rate_hz: int
    peak: float
    subtype: str


# Building blocks


def seconds(rate_hz: int, duration_s: float = DURATION_S) -> Array:
    """Return the time of each sample."""
    return np.arange(round(rate_hz * duration_s)) / rate_hz


def filtered(sound: Array, rate_hz: int, gains_db: dict[float, float]) -> Array:
    """Filter ``sound`` with these gains in dB, linear over the logarithm of frequency."""
    spectrum = np.fft.rfft(sound)
    frequencies_hz = np.maximum(np.fft.rfftfreq(len(sound), 1 / rate_hz), 1.0)
    gain_db = np.interp(np.log(frequencies_hz), np.log(list(gains_db)), list(gains_db.values()))
    return np.fft.irfft(spectrum * 10 ** (gain_db / 20), len(sound))


def coloured_noise(
    num_samples: int, rate_hz: int, random: Random, gains_db: dict[float, float]
) -> Array:
    """Return noise with this spectrum and RMS 1."""
    noise = filtered(random.standard_normal(num_samples), rate_hz, gains_db)
    return noise / np.sqrt(np.mean(noise**2))


def resonances(formants: Sequence[tuple[float, float, float]]) -> dict[float, float]:
    """Return filter gains with a peak at each (frequency in Hz, bandwidth in Hz, gain in dB)."""
    frequencies = np.geomspace(30.0, 22_000.0, 400)
    power = np.full(400, 1e-4)
    for centre, width, gain_db in formants:
        power += 10 ** (gain_db / 10) / (1 + ((frequencies - centre) / (width / 2)) ** 2)
    return dict(zip(frequencies.tolist(), (10 * np.log10(power)).tolist(), strict=True))


def curve(time_s: Array, points_s: Sequence[float], values: Sequence[float]) -> Array:
    """Interpolate between these values; constant before the first time and after the last."""
    return np.interp(time_s, points_s, values)


def smooth_random(num_samples: int, rate_hz: int, random: Random, changes_hz: float) -> Array:
    """Return a slowly varying random curve with a standard deviation near 1."""
    num_points = max(4, round(num_samples / rate_hz * changes_hz) + 2)
    return np.interp(
        np.linspace(0, num_points - 1, num_samples),
        np.arange(num_points),
        random.standard_normal(num_points),
    )


def harmonics(pitch_hz: Array, rate_hz: int, slope_db: float, jitter: Array | float = 0.0) -> Array:
    """Return a harmonic tone; each harmonic is weaker by ``slope_db`` per octave."""
    phase = 2 * np.pi * np.cumsum(pitch_hz * (1 + jitter)) / rate_hz
    tone = np.zeros(len(pitch_hz))
    for number in range(1, int(rate_hz / 2 / pitch_hz.min()) + 1):
        # A harmonic above half the rate would come back as another tone.
        audible = np.clip((rate_hz / 2 - number * pitch_hz) / 500.0, 0.0, 1.0)
        tone += audible * 10 ** (-slope_db * np.log2(number) / 20) * np.sin(number * phase)
    return tone


def with_room(sound: Array, rate_hz: int, random: Random, level: float, decay_s: float) -> Array:
    """Add the reflections of a room, which decay by 60 dB in twice ``decay_s``."""
    time_s = seconds(rate_hz, 4 * decay_s)
    response = random.standard_normal(len(time_s)) * np.exp(
        -6.9 * time_s / (2 * decay_s)
    )  # e^-6.9 is -60 dB
    response *= level / np.sqrt(np.sum(response**2))
    response[0] = 1.0
    size = len(sound) + len(response)
    spectrum = np.fft.rfft(sound, size) * np.fft.rfft(response, size)
    wet: Array = np.fft.irfft(spectrum, size)[: len(sound)]
    return wet


def add_at(sound: Array, piece: Array, rate_hz: int, start_s: float) -> None:
    """Mix ``piece`` into ``sound`` at a time, without the part beyond its end."""
    start = round(start_s * rate_hz)
    stop = min(start + len(piece), len(sound))
    sound[start:stop] += piece[: stop - start]


def at_peak(sound: Array, peak: float) -> Array:
    """Scale ``sound`` to this largest absolute value, with fades of 5 ms at both ends."""
    fade = np.minimum(1.0, np.arange(len(sound)) / (len(sound) * 0.001))
    faded = (sound.T * fade * fade[::-1]).T
    return faded * (peak / np.abs(faded).max())


# The ten sounds


def dog_bark(rate_hz: int, random: Random) -> Array:
    """Barks: a rough voice that rises and falls within 150 ms, through a snout that opens."""
    sound = np.zeros(round(rate_hz * DURATION_S))
    for start_s in (0.25, 0.62, 1.45, 1.80, 2.16, 3.30, 3.68, 4.45):
        length_s = random.uniform(0.15, 0.20)
        time_s = seconds(rate_hz, length_s + 0.06)
        top_hz = random.uniform(560.0, 680.0)
        pitch = curve(
            time_s / length_s,
            [0, 0.25, 0.6, 1],
            [0.62 * top_hz, top_hz, 0.9 * top_hz, 0.55 * top_hz],
        )
        rough = 0.035 * smooth_random(len(time_s), rate_hz, random, 600.0)
        voice = harmonics(pitch, rate_hz, 4.0, rough)
        breath = coloured_noise(
            len(time_s), rate_hz, random, {100: -30, 500: 0, 2000: -8, 6000: -22}
        )
        shape = curve(time_s / length_s, [0, 0.08, 0.3, 0.7, 1.1], [0, 0.8, 1, 0.6, 0])
        bark = filtered(
            (voice + 0.8 * breath) * shape,
            rate_hz,
            resonances([(620, 300, 0), (1250, 450, -2), (2300, 700, -16), (3600, 1200, -30)]),
        )
        add_at(sound, bark / np.abs(bark).max() * random.uniform(0.7, 1.0), rate_hz, start_s)
    sound = with_room(sound, rate_hz, random, 0.35, 0.25)
    return sound + 0.0015 * coloured_noise(len(sound), rate_hz, random, ROOM_TONE)


def rooster(rate_hz: int, random: Random) -> Array:
    """A crow: three short calls and a long one that breaks and sinks."""
    time_s = seconds(rate_hz)
    pitch = curve(
        time_s,
        [0.5, 0.72, 0.8, 1.0, 1.12, 1.25, 1.45, 1.9, 2.3, 2.65, 2.8],
        [640, 820, 700, 880, 760, 930, 980, 960, 900, 780, 620],
    )
    shape = curve(
        time_s,
        [0.5, 0.54, 0.7, 0.74, 0.82, 0.86, 1.02, 1.06, 1.1, 1.18, 1.22, 1.3, 2.0, 2.5, 2.75, 2.84],
        [0, 0.8, 0.7, 0, 0, 1, 0.9, 0.1, 0.9, 0.9, 0.3, 1, 0.95, 0.6, 0.25, 0],
    )
    rough = 0.006 * smooth_random(len(time_s), rate_hz, random, 300.0)
    vibrato = 0.008 * np.sin(2 * np.pi * 9.0 * time_s)
    voice = harmonics(pitch, rate_hz, 3.0, rough + vibrato)
    breath = coloured_noise(len(time_s), rate_hz, random, {300: -30, 1500: 0, 5000: -6})
    throat = resonances([(900, 300, 0), (1800, 500, 2), (2900, 800, -4), (4500, 1500, -10)])
    crow = filtered((voice + 0.25 * breath) * shape, rate_hz, throat)
    crow = with_room(crow / np.abs(crow).max(), rate_hz, random, 0.25, 0.5)
    return crow + 0.001 * coloured_noise(len(crow), rate_hz, random, ROOM_TONE)


def baby_cry(rate_hz: int, random: Random) -> Array:
    """Wails on each breath out: a pitch that arches around 450 Hz, with hoarse stretches."""
    time_s = seconds(rate_hz)
    sound = np.zeros(len(time_s))
    formants = resonances(
        [(1100, 350, 0), (1900, 450, -1), (3400, 700, 2), (4900, 900, 0), (6800, 1500, -6)]
    )
    for start_s, length_s, top_hz in ((0.15, 1.15, 470), (1.75, 1.25, 510), (3.45, 1.05, 480)):
        local_s = seconds(rate_hz, length_s)
        part = local_s / length_s
        pitch = curve(part, [0, 0.12, 0.4, 0.75, 1], [0.78, 0.97, 1, 0.93, 0.72]) * top_hz
        hoarse = curve(part, [0, 0.3, 0.38, 0.62, 0.72, 1], [0, 0, 1, 1, 0, 0])
        tremor = 0.012 * np.sin(2 * np.pi * 6.0 * local_s)
        rough = 0.004 + 0.03 * hoarse
        voice = harmonics(
            pitch, rate_hz, 1.0, tremor + rough * smooth_random(len(part), rate_hz, random, 900.0)
        )
        breath = coloured_noise(len(part), rate_hz, random, {500: -20, 3000: 0, 8000: -2})
        shape = curve(part, [0, 0.06, 0.3, 0.8, 0.95, 1], [0, 0.7, 1, 0.8, 0.3, 0])
        wail = filtered((voice + (0.1 + 0.7 * hoarse) * breath) * shape, rate_hz, formants)
        add_at(sound, wail / np.abs(wail).max(), rate_hz, start_s)
        gasp = coloured_noise(round(0.22 * rate_hz), rate_hz, random, {800: -15, 2500: 0})
        gasp *= np.hanning(len(gasp)) * 0.03
        add_at(sound, gasp, rate_hz, start_s + length_s + 0.12)
    sound = with_room(sound, rate_hz, random, 0.2, 0.3)
    return sound + 0.001 * coloured_noise(len(sound), rate_hz, random, ROOM_TONE)


def person_sneeze(rate_hz: int, random: Random) -> Array:
    """One sneeze: breath drawn in, a burst of air with a voiced "choo", and its echo."""
    time_s = seconds(rate_hz)
    gasp = coloured_noise(len(time_s), rate_hz, random, {300: -20, 1500: 0, 4000: -8})
    gasp *= curve(time_s, [0.3, 0.7, 0.78, 0.84], [0, 0.03, 0.04, 0])
    burst = coloured_noise(
        len(time_s), rate_hz, random, {100: -10, 600: -4, 1800: 0, 5500: 0, 9000: -3}
    )
    burst *= curve(time_s, [0.9, 0.915, 0.93, 1.02, 1.15, 1.4], [0, 0.5, 1, 0.7, 0.25, 0])
    pitch = curve(time_s, [0.85, 0.92, 1.1, 1.35], [330, 420, 300, 190])
    voice = harmonics(pitch, rate_hz, 5.0, 0.01 * smooth_random(len(time_s), rate_hz, random, 300))
    voice *= curve(time_s, [0.84, 0.88, 0.95, 1.12, 1.32], [0, 0.5, 0.8, 0.4, 0])
    voice = filtered(voice, rate_hz, resonances([(700, 250, 0), (1200, 400, -2), (2600, 600, -8)]))
    sneeze = gasp + 0.5 * burst + 0.35 * voice / np.abs(voice).max()
    sneeze = with_room(sneeze, rate_hz, random, 0.3, 0.4)
    return sneeze + 0.0004 * coloured_noise(len(sneeze), rate_hz, random, ROOM_TONE)


def clock_tick(rate_hz: int, random: Random) -> Array:
    """Tick, tock, twice a second: two pairs of metal clicks that differ a little."""
    sound = np.zeros(round(rate_hz * DURATION_S))
    modes = [(1900, 2950, 4300, 6100, 8700), (1700, 2600, 4050, 5700, 8200)]
    for beat in range(10):
        click = np.zeros(round(0.09 * rate_hz))
        # The escapement: the pallet lands, then the wheel's next tooth.
        for delay_s, level in ((0.0, 0.5), (0.011, 1.0), (0.019, 0.3)):
            time_s = seconds(rate_hz, 0.06)
            ring = np.zeros(len(time_s))
            for mode_hz in modes[beat % 2]:
                decay_s = 0.025 * 2000.0 / mode_hz
                ring += np.sin(2 * np.pi * mode_hz * time_s) * np.exp(-time_s / decay_s)
            hit = random.standard_normal(len(time_s)) * np.exp(-time_s / 0.0015)
            add_at(click, level * (0.3 * ring + hit), rate_hz, delay_s)
        start_s = 0.2 + 0.5 * beat + random.uniform(-0.002, 0.002)
        add_at(sound, click * random.uniform(0.85, 1.0), rate_hz, start_s)
    sound = with_room(sound, rate_hz, random, 0.3, 0.15)
    hiss = {60: 2.0, 300: 0.0, 2000: -6.0, 12_000: -10.0}
    return sound / np.abs(sound).max() + 0.006 * coloured_noise(len(sound), rate_hz, random, hiss)


def fire_crackling(rate_hz: int, random: Random) -> Array:
    """Crackles at random times, few loud and many soft, over the hiss and rumble of the flames."""
    num_samples = round(rate_hz * DURATION_S)
    sound = np.zeros(num_samples)
    for start_s in np.sort(random.uniform(0.0, DURATION_S, 400)):
        time_s = seconds(rate_hz, 0.02)
        decay_s = random.uniform(0.0006, 0.003)
        snap = random.standard_normal(len(time_s)) * np.exp(-time_s / decay_s)
        loudness = min(1.0, 0.03 * random.pareto(1.1) + 0.015)
        add_at(sound, loudness * snap, rate_hz, start_s)
    sound = filtered(sound, rate_hz, {100: -10, 800: -5, 3000: -2, 7000: 0})
    sound = with_room(sound, rate_hz, random, 0.2, 0.08)
    hiss = coloured_noise(num_samples, rate_hz, random, {100: -6, 1000: -6, 8000: 0})
    flicker = np.exp(0.4 * smooth_random(num_samples, rate_hz, random, 6.0))
    rumble = coloured_noise(num_samples, rate_hz, random, {30: -6, 70: 0, 150: -10, 500: -40})
    rumble *= 1 + 0.6 * smooth_random(num_samples, rate_hz, random, 9.0)
    return sound / np.abs(sound).max() + 0.004 * hiss * flicker + 0.008 * rumble


def rain(rate_hz: int, random: Random) -> Array:
    """Thousands of drops too dense to tell apart, with nearer ones that stand out; stereo."""
    num_samples = round(rate_hz * DURATION_S)
    wash = {50: 2.0, 200: 5.0, 1000: 5.0, 2500: 1.0, 6000: 0.0, 16_000: -6.0}
    left, right = (coloured_noise(num_samples, rate_hz, random, wash) for _ in range(2))
    common = coloured_noise(num_samples, rate_hz, random, wash)
    stereo = np.stack([0.6 * left + 0.8 * common, 0.6 * right + 0.8 * common], axis=1)
    for start_s in random.uniform(0.0, DURATION_S, 900):
        time_s = seconds(rate_hz, 0.012)
        drop = random.standard_normal(len(time_s)) * np.exp(-time_s / random.uniform(5e-4, 3e-3))
        drop *= min(6.0, 0.6 + 0.5 * random.pareto(2.0))
        pan = random.uniform(0.2, 0.8)
        for channel, gain in enumerate((1 - pan, pan)):
            add_at(stereo[:, channel], gain * drop, rate_hz, start_s)
    return stereo


def sea_waves(rate_hz: int, random: Random) -> Array:
    """Surf: one wave draws back, the next breaks and runs out; stereo."""
    time_s = seconds(rate_hz)
    near = curve(time_s, [0, 0.9, 1.5, 1.9, 2.6, 4.0, 5], [0.3, 0.1, 0.35, 1.0, 0.7, 0.25, 0.15])
    far = curve(time_s, [0, 1.2, 2.8, 3.9, 5], [0.35, 0.15, 0.12, 0.3, 0.25])
    channels = []
    for _ in range(2):
        roar = coloured_noise(
            len(time_s), rate_hz, random, {40: 0, 150: 5, 700: 4, 3000: -6, 7000: -14, 12_000: -22}
        )
        foam = coloured_noise(
            len(time_s), rate_hz, random, {200: -24, 1500: -4, 4000: 0, 7000: -6, 12_000: -14}
        )
        bubbling = 1 + 0.15 * smooth_random(len(time_s), rate_hz, random, 30.0)
        channels.append(0.8 * far * roar + near * (0.6 * roar + 0.5 * near * foam) * bubbling)
    return np.stack(channels, axis=1)


def helicopter(rate_hz: int, random: Random) -> Array:
    """Rotor blades slapping the air 11 times a second, a turbine above, rumble below."""
    time_s = seconds(rate_hz)
    phase = np.cumsum(11.0 + 0.1 * smooth_random(len(time_s), rate_hz, random, 2.0)) / rate_hz
    slap = np.exp(-6.0 * (phase % 1.0)) + 0.4 * np.exp(-9.0 * ((phase + 0.5) % 1.0))
    air = coloured_noise(
        len(time_s),
        rate_hz,
        random,
        {30: 2, 90: 10, 400: 5, 1000: 1, 2500: -10, 5000: -20, 11_000: -44},
    )
    wash = coloured_noise(
        len(time_s), rate_hz, random, {40: 6, 200: 2, 1000: -4, 3000: -14, 5000: -20, 11_000: -44}
    )
    thump = harmonics(np.full(len(time_s), 66.0), rate_hz, 8.0) * slap
    turbine_hz = 1850.0 * (1 + 0.002 * smooth_random(len(time_s), rate_hz, random, 3.0))
    turbine = np.sin(2 * np.pi * np.cumsum(turbine_hz) / rate_hz)
    approach = curve(time_s, [0, 2.5, 5], [0.75, 1.0, 0.85])
    return approach * (air * slap + 0.2 * wash + 0.25 * thump + 0.03 * turbine)


def chainsaw(rate_hz: int, random: Random) -> Array:
    """A two-stroke engine that idles, revs up into the wood, sags and revs again."""
    time_s = seconds(rate_hz)
    speed_hz = curve(
        time_s,
        [0, 0.5, 0.9, 1.6, 2.2, 2.6, 3.0, 4.0, 4.4, 5.0],
        [75, 80, 165, 178, 140, 132, 170, 176, 150, 138],
    )
    phase = np.cumsum(speed_hz * (1 + 0.01 * smooth_random(len(time_s), rate_hz, random, 40.0)))
    cycle = (phase / rate_hz) % 1.0
    firing = np.exp(-7.0 * cycle)
    exhaust = harmonics(
        speed_hz, rate_hz, 2.5, 0.01 * smooth_random(len(cycle), rate_hz, random, 40)
    )
    blast = coloured_noise(
        len(time_s), rate_hz, random, {60: -4, 200: 2, 600: 3, 2500: 0, 6000: 1, 12_000: -3}
    )
    chain = coloured_noise(len(time_s), rate_hz, random, {800: -20, 3000: -4, 6000: 0})
    load = curve(time_s, [0, 0.5, 0.9, 2.4, 3.0, 5], [0.35, 0.4, 0.9, 1.0, 0.95, 0.9])
    muffler = resonances([(350, 250, 0), (900, 500, 0), (2200, 900, -2), (5200, 2500, -3)])
    engine = filtered(exhaust * (0.4 + firing), rate_hz, muffler)
    engine /= np.sqrt(np.mean(engine**2))
    return load * (0.9 * engine + 0.9 * blast * (0.25 + firing) + 0.35 * load * chain)


SAMPLES = (
    Sample("dog_bark.wav", dog_bark, 44_100, 0.8, "PCM_16"),
    Sample("rooster.flac", rooster, 32_000, 0.35, "PCM_16"),
    Sample("baby_cry.wav", baby_cry, 22_050, 0.4, "PCM_24"),
    Sample("person_sneeze.ogg", person_sneeze, 48_000, 0.8, "OPUS"),
    Sample("clock_tick.flac", clock_tick, 24_000, 0.25, "PCM_16"),
    Sample("fire_crackling.ogg", fire_crackling, 44_100, 0.7, "VORBIS"),
    Sample("rain.ogg", rain, 44_100, 0.6, "VORBIS"),
    Sample("sea_waves.mp3", sea_waves, 44_100, 0.7, "MPEG_LAYER_III"),
    Sample("helicopter.mp3", helicopter, 22_050, 0.8, "MPEG_LAYER_III"),
    Sample("chainsaw.ogg", chainsaw, 32_000, 0.8, "VORBIS"),
)


def make_samples(folder: Path) -> list[Path]:
    """Write every sample into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for sample in SAMPLES:
        # Its own seed: changing one sound leaves the others as they are.
        random = Random(zlib.crc32(sample.synthesise.__name__.encode()))
        sound = at_peak(sample.synthesise(sample.rate_hz, random), sample.peak)
        path = folder / sample.name
        soundfile.write(path, sound, sample.rate_hz, subtype=sample.subtype)
        paths.append(path)
    return paths


if __name__ == "__main__":
    for written in make_samples(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent):
        print(f"{written.stat().st_size:>9,d}  {written}")
