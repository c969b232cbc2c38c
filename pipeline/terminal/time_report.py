"""Where a run's time went, and what would make it faster: figures, and one sentence.

The labelling threads do one thing after another (``fbank``, ``copy``, ``model``, ``write``, or
``wait`` for audio), so their shares add up to 1. Reading and decoding run beside them; how busy
they were says whether they could have delivered more.

``run.json`` holds these figures in ``time``, for the units of its run, summed over all workers::

    startup           imports_s, planning_s, model_load_s and decoder_start_s, before labelling
    labelling         total_s, the wall time of the labelling threads, and its parts: model_s,
                      copy_s (features to the device), queue_s (waiting for the device while
                      another thread uses it), check_s (the precision check), fbank_s (waiting for
                      the threads that make features), wait_read_s, wait_decode_s, write_s and
                      other_s (Beam, cutting, batching, rows)
    labelling_shares  the same as shares of total_s, with one share for both waits
    background        read_s, of each process's reading thread, and reader_share, of its time;
                      open_s (reading local files, hashing), decode_s and resample_s, of the decoder
                      processes; decoders, the number per process; decoder_share, of their time;
                      device_ahead_s, a GPU's computing that no labelling thread waited for
    device_idle_share share of the time in which the model did not run, as each process sees it
    advice            a sentence; null for a run too short to judge by

A share of nothing is null. Seconds of a decoder that crashed or was killed are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.terminal.wording import counted, format_duration, percent
from transforms.features.fbank_settings import MAX_FEATURE_THREADS
from transforms.process.stage_times import StageSeconds

# With less labelling than this there is no advice: in the first seconds decoders start and the
# model warms up.
MIN_ADVISED_S = 10.0

# Decoders that are less busy than this, while the model waits for them, do not work in parallel.
SIDE_BY_SIDE_SHARE = 0.5


@dataclass(frozen=True)
class Startup:
    """Seconds before the graph runs.

    ``imports_s`` is 0 if the caller had already imported the libraries. Planning is reading the
    model's header, listing the inputs and repairing the output.
    """

    imports_s: float = 0.0
    planning_s: float = 0.0


UNTIMED = Startup()


@dataclass(frozen=True)
class Circumstances:
    """What advice depends on, apart from the seconds.

    Attributes:
        engines: What ran the model, as commits name it: ``torch cpu fp32``.
        asked_precision: The precision as asked for; ``auto`` takes the fastest.
        num_cores: Cores that a worker may use.
        num_processes: Processes that share them.
    """

    engines: tuple[str, ...] = ()
    asked_precision: str = "auto"
    num_cores: int = 1
    num_processes: int = 1


def labelling_shares(seconds: StageSeconds) -> dict[str, float | None]:
    """Return the parts of the labelling threads' time; they add up to 1, or are all None."""
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
    """Return the share of the time in which no model ran, in [0, 1]."""
    busy_s = seconds.model_s + seconds.device_ahead_s + seconds.check_s
    busy = _share(busy_s, seconds.process_s)
    return None if busy is None else 1.0 - busy


def decoder_share(seconds: StageSeconds) -> float | None:
    """Return how busy the decoder processes were, in [0, 1]."""
    return _share(seconds.open_s + seconds.decode_s + seconds.resample_s, seconds.decoder_s)


def decoders_per_process(seconds: StageSeconds) -> float | None:
    """Return the number of decoder processes per labelling process."""
    return seconds.decoder_s / seconds.process_s if seconds.process_s else None


def _share(part_s: float, whole_s: float) -> float | None:
    """Return a share in [0, 1]; a part that began before the whole was measured may exceed it."""
    return min(part_s / whole_s, 1.0) if whole_s > 0.0 else None


def advise(seconds: StageSeconds, circumstances: Circumstances) -> str | None:
    """Return a sentence on what takes the most time; None for a run too short to judge by."""
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
    advice = max(candidates, key=lambda name: candidates[name])
    return advice(percent(candidates[advice] / seconds.labelling_s), seconds, circumstances)


def _of_device(share: str, seconds: StageSeconds, circumstances: Circumstances) -> str:
    if seconds.copy_s > seconds.model_s:
        share = percent(seconds.copy_s / seconds.labelling_s)
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
        f"Checking the precision takes {share} of the time: it hardly matters in a larger run, is "
        "skipped when the same run is repeated, and is shorter with fewer --set "
        "inference.check_windows."
    )


def _of_waiting(share: str, seconds: StageSeconds, circumstances: Circumstances) -> str:
    decoding_s = seconds.decode_s + seconds.resample_s
    if seconds.wait_read_s > seconds.wait_decode_s or seconds.open_s > decoding_s:
        return (
            f"The model waits {share} of the time for reading: the store or disk is slow; larger "
            "shards, or running nearer to it, would help."
        )
    decoders, busy = decoders_per_process(seconds) or 1.0, decoder_share(seconds) or 0.0
    waits = f"The model waits {share} of the time for decoding"
    if decoders > 1.0 and busy < SIDE_BY_SIDE_SHARE:
        return (
            f"{waits}, and the decoders are {percent(busy)} busy: long recordings are decoded "
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
        "(units.windows), or an output nearer to the workers, would help."
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
    """Return what ``run.json`` holds in ``time``; see the module, and ``Circumstances``."""
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
            "reader_share": _share(seconds.read_s, seconds.process_s),
            "decoders": decoders_per_process(seconds),
            "decoder_share": decoder_share(seconds),
        },
        "device_idle_share": device_idle_share(seconds),
        "advice": advise(seconds, circumstances),
    }
    rounded: dict[str, Any] = _rounded(record)
    return rounded


def _rounded(value: Any) -> Any:
    """Round to three decimals: milliseconds, and tenths of a per cent."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def describe_time(record: Mapping[str, Any]) -> list[str]:
    """Return the closing lines from ``time`` of ``run.json``; none where nothing ran."""
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
    parts = [f"{name} {percent(share)}" for name, share in shares if percent(share) != "0 %"]
    decoding_s = background["open_s"] + background["decode_s"]
    decoders = round(background["decoders"])
    lines = [
        f"To start: {startup}. Labelling took {format_duration(labelling['total_s'])}: "
        f"{', '.join(parts)}.",
        f"Meanwhile: reading {format_duration(background['read_s'])} "
        f"({percent(background['reader_share'])} busy), decoding {format_duration(decoding_s)} "
        f"and resampling {format_duration(background['resample_s'])} "
        f"({counted(decoders, 'decoder')}, "
        f"{percent(background['decoder_share'])} busy). "
        f"The device was idle {percent(record['device_idle_share'])} of the time.",
    ]
    return lines if record["advice"] is None else [*lines, record["advice"]]
