"""Where a run's time went, and what would make it faster: figures, and one sentence.

Two things are told apart. The labelling threads do one thing after another (``fbank``, ``copy``,
``model``, ``write``, or ``wait`` for audio), so their shares add up to 1. Reading and decoding go
on beside them; how busy they were says whether they could have given more.

``run.json`` holds, in ``time``, what belongs to the units of its run, all workers added up::

    startup           imports_s, planning_s, model_load_s and decoder_start_s, before labelling
    labelling         total_s, the wall time of the labelling threads, and its parts: model_s,
                      copy_s (features on their way to the device), queue_s (for the device, while
                      another thread uses it), check_s (the precision check), fbank_s (waiting for
                      features, which threads of their own make), wait_read_s, wait_decode_s,
                      write_s and other_s (Beam, cutting, batching, rows)
    labelling_shares  the same as shares of total_s; the two waits are one
    background        read_s, of each process's reading thread, and reader_share, of its time;
                      open_s (reading local files, hashing), decode_s and resample_s, of the decoder
                      processes, decoders, how many a process has, and decoder_share, of their
                      time; device_ahead_s, a GPU's computing that no labelling thread waited for
    device_idle_share share of the time in which the model did not run, as each process sees it
    advice            a sentence, or null: little time, or none that could be saved

A share of nothing is null. Seconds of a decoder that crashed or was killed are in none of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.terminal.progress import format_duration
from transforms.features.fbank_settings import MAX_FEATURE_THREADS
from transforms.process.stage_times import StageSeconds

# A run of which less than this was labelling has told nothing yet: its first seconds are those of
# decoders that start and of a model that warms up.
MIN_ADVISED_S = 10.0

# Decoders that are less busy than this, while the model waits for them, do not work side by side.
SIDE_BY_SIDE_SHARE = 0.5


@dataclass(frozen=True)
class Startup:
    """Seconds before the graph runs.

    Attributes:
        imports_s: Importing the libraries; 0 where the caller had done it before.
        planning_s: Reading the model's header, listing the inputs, bringing the output in order.
    """

    imports_s: float = 0.0
    planning_s: float = 0.0


UNTIMED = Startup()


@dataclass(frozen=True)
class Circumstances:
    """What advice depends on beside the seconds.

    Attributes:
        engines: What computed, as commits name it: ``torch cpu fp32``.
        asked_precision: The precision as asked for; ``auto`` has taken the fastest there is.
        num_cores: Cores that a worker may use.
        num_processes: Processes that share them.
    """

    engines: tuple[str, ...] = ()
    asked_precision: str = "auto"
    num_cores: int = 1
    num_processes: int = 1


def labelling_shares(seconds: StageSeconds) -> dict[str, float | None]:
    """How the labelling threads' time divides; adds up to 1, or all None where there is none."""
    parts = {
        "model": seconds.model_s,
        "copy": seconds.copy_s,
        "queue": seconds.queue_s,
        "check": seconds.check_s,
        "fbank": seconds.fbank_s,
        "wait": seconds.wait_read_s + seconds.wait_decode_s,
        "write": seconds.write_s,
        "other": seconds.other_s,
    }
    return {name: _share(part_s, seconds.labelling_s) for name, part_s in parts.items()}


def device_idle_share(seconds: StageSeconds) -> float | None:
    """Share of the time in which no model ran, in [0, 1]."""
    busy_s = seconds.model_s + seconds.device_ahead_s + seconds.check_s
    busy = _share(busy_s, seconds.process_s)
    return None if busy is None else 1.0 - busy


def reader_share(seconds: StageSeconds) -> float | None:
    """How busy the reading threads were, in [0, 1]."""
    return _share(seconds.read_s, seconds.process_s)


def decoder_share(seconds: StageSeconds) -> float | None:
    """How busy the decoder processes were, in [0, 1]."""
    return _share(seconds.open_s + seconds.decode_s + seconds.resample_s, seconds.decoder_s)


def decoders_per_process(seconds: StageSeconds) -> float | None:
    """The decoder processes that each labelling process may have."""
    return seconds.decoder_s / seconds.process_s if seconds.process_s else None


def _share(part_s: float, whole_s: float) -> float | None:
    """A part of a whole, in [0, 1]: what began before the whole was measured may be too much."""
    return min(part_s / whole_s, 1.0) if whole_s > 0.0 else None


def advise(seconds: StageSeconds, circumstances: Circumstances) -> str | None:
    """What would make such a run faster: a sentence on what takes the most time.

    Returns:
        The sentence; None for a run too short to judge by.
    """
    if seconds.labelling_s < MIN_ADVISED_S:
        return None
    candidates = {
        _of_device: seconds.model_s + seconds.copy_s + seconds.queue_s,
        _of_checking: seconds.check_s,
        _of_waiting: seconds.wait_read_s + seconds.wait_decode_s,
        _of_fbank: seconds.fbank_s,
        _of_writing: seconds.write_s,
        _of_the_rest: seconds.other_s,
    }
    say = max(candidates, key=lambda name: candidates[name])
    return say(_percent(candidates[say] / seconds.labelling_s), seconds, circumstances)


def _of_device(share: str, seconds: StageSeconds, circumstances: Circumstances) -> str:
    if seconds.copy_s > seconds.model_s:
        share = _percent(seconds.copy_s / seconds.labelling_s)
        return (
            f"Sending features to the device takes {share} of the time: more --workers would help; "
            "a faster device would not."
        )
    remedies = ["a faster device"]
    if circumstances.asked_precision == "fp32":
        remedies.append("half precision (--precision auto, if the device has it)")
    if any(engine.startswith("torch cpu") for engine in circumstances.engines):
        remedies.append("the extra [openvino]")
    *first, last = remedies
    joined = f"{', '.join(first)} or {last}" if first else last
    return f"The model takes {share} of the time: {joined} would help; more decoders would not."


def _of_checking(share: str, seconds: StageSeconds, circumstances: Circumstances) -> str:
    return (
        f"Checking the precision takes {share} of the time: a larger run hardly feels it, the same "
        "one again does without, and fewer --set inference.check_windows would shorten it."
    )


def _of_waiting(share: str, seconds: StageSeconds, circumstances: Circumstances) -> str:
    decoding_s = seconds.decode_s + seconds.resample_s
    if seconds.wait_read_s > seconds.wait_decode_s or seconds.open_s > decoding_s:
        return (
            f"The model waits {share} of the time for reading: the store or disk is slow; larger "
            "shards, or work nearer to it, would help."
        )
    decoders, busy = decoders_per_process(seconds) or 1.0, decoder_share(seconds) or 0.0
    waits = f"The model waits {share} of the time for decoding"
    if decoders > 1.0 and busy < SIDE_BY_SIDE_SHARE:
        return (
            f"{waits}, and the decoders are {_percent(busy)} busy: long recordings are decoded "
            "one after another; more --workers would help."
        )
    if decoders < circumstances.num_cores:
        key = f"--set decode.processes={circumstances.num_cores}"
        return f"{waits}: there are cores for more decoders ({key})."
    return f"{waits}: more cores would help; a faster device would not."


def _of_fbank(share: str, seconds: StageSeconds, circumstances: Circumstances) -> str:
    is_narrow = circumstances.num_cores <= MAX_FEATURE_THREADS * circumstances.num_processes
    remedy = "more cores" if is_narrow else "more --workers"
    return (
        f"Waiting for features takes {share} of the time: {remedy} would help; a faster device "
        "would not."
    )


def _of_writing(share: str, seconds: StageSeconds, circumstances: Circumstances) -> str:
    return (
        f"Writing takes {share} of the time: the output's store or disk is slow; larger units "
        "(units.windows), or an output nearer to the work, would help."
    )


def _of_the_rest(share: str, seconds: StageSeconds, circumstances: Circumstances) -> str:
    remedy = "a faster processor" if circumstances.num_cores == 1 else "more --workers"
    return (
        f"Moving windows from step to step takes {share} of the time, more than the model: "
        f"{remedy} would help; a faster device would not."
    )


def record_time(
    startup: Startup,
    seconds: StageSeconds,
    engines: Sequence[str],
    *,
    asked_precision: str,
    num_cores: int,
    num_processes: int = 1,
) -> dict[str, Any]:
    """What ``run.json`` says in ``time``; see the module.

    Args:
        startup: What starting took.
        seconds: Of this run's units.
        engines: What computed them.
        asked_precision: The precision as asked for.
        num_cores: Cores that a worker may use.
        num_processes: Processes that share them.
    """
    waits = ("wait_read", "wait_decode")
    labelling = ("model", "copy", "queue", "check", "fbank", *waits, "write", "other")
    background = ("read", "open", "decode", "resample", "device_ahead")
    values = asdict(seconds)
    circumstances = Circumstances(tuple(engines), asked_precision, num_cores, num_processes)
    record = {
        "startup": {
            **asdict(startup),
            "model_load_s": seconds.load_s,
            "decoder_start_s": seconds.start_s,
        },
        "labelling": {
            "total_s": seconds.labelling_s,
            **{f"{name}_s": values[f"{name}_s"] for name in labelling},
        },
        "labelling_shares": labelling_shares(seconds),
        "background": {
            **{f"{name}_s": values[f"{name}_s"] for name in background},
            "reader_share": reader_share(seconds),
            "decoders": decoders_per_process(seconds),
            "decoder_share": decoder_share(seconds),
        },
        "device_idle_share": device_idle_share(seconds),
        "advice": advise(seconds, circumstances),
    }
    rounded: dict[str, Any] = _rounded(record)
    return rounded


def _rounded(value: Any) -> Any:
    """The same with three decimals: milliseconds, and tenths of a per cent."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def describe_time(record: Mapping[str, Any]) -> list[str]:
    """The closing lines: what ``time`` of ``run.json`` says, in words; none where nothing ran."""
    labelling, background = record["labelling"], record["background"]
    if not labelling["total_s"]:
        return []
    startup = ", ".join(
        f"{name} {format_duration(record['startup'][key])}"
        for name, key in (
            ("imports", "imports_s"),
            ("planning", "planning_s"),
            ("loading the model", "model_load_s"),
            ("decoders", "decoder_start_s"),
        )
    )
    shares = sorted(record["labelling_shares"].items(), key=lambda entry: -entry[1])
    said = [(name, _percent(share)) for name, share in shares]
    parts = ", ".join(f"{name} {percent}" for name, percent in said if percent != "0 %")
    decoding_s = background["open_s"] + background["decode_s"]
    decoders = round(background["decoders"])
    lines = [
        f"To start: {startup}. Labelling took {format_duration(labelling['total_s'])}: {parts}.",
        f"Meanwhile: reading {format_duration(background['read_s'])} "
        f"({_percent(background['reader_share'])} busy), decoding {format_duration(decoding_s)} "
        f"and resampling {format_duration(background['resample_s'])} "
        f"({decoders} decoder{'s' * (decoders != 1)}, "
        f"{_percent(background['decoder_share'])} busy). "
        f"The device was idle {_percent(record['device_idle_share'])} of the time.",
    ]
    return lines if record["advice"] is None else [*lines, record["advice"]]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
