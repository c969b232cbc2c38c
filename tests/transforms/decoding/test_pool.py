"""The pool of decoders: order, bounds, and decoders that crash, hang or are left alone."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import audio_factory
from tests.support.audio_factory import clip, wav
from tests.support.labelling import wait_until
from tests.support.paths import ROOT
from transforms.decoding import pool as pool_module
from transforms.decoding.pool import DecodePool
from transforms.decoding.process import DecoderProcess
from transforms.decoding.settings import DecodeSettings
from transforms.errors import EarmarkError
from transforms.process.stage_times import stage_clocks
from transforms.records import EncodedClip, Failure, Item, ItemFailure, Waveform

RATE = 16_000


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(DecodeSettings(num_processes=2)) as pool:
        yield pool


def joined(results: list[Any], item_index: int = 0) -> audio_factory.Samples:
    """Join all samples of one item."""
    mine = [r.samples for r in results if isinstance(r, Waveform) and r.item_index == item_index]
    return np.concatenate(mine)


def children() -> set[int]:
    """Return the child processes that have not been waited for."""
    pids = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has ended meanwhile
            pids |= {int(pid) for pid in (task / "children").read_text().split()}
    return pids


def is_gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_results_come_in_order_with_failures_in_their_place(pool: DecodePool) -> None:
    missing = Failure(Item("b", "b"), "read", "ReadError", "gone")
    inputs = [clip("a", wav(2.0)), missing, clip("c", b"no audio at all"), clip("d", wav(0.1))]
    first, second, third, fourth = pool.stream("unit", inputs)
    assert isinstance(first, Waveform) and first.item.clip_id == "a" and first.facts is not None
    assert second == ItemFailure("unit", 1, missing)
    assert isinstance(third, ItemFailure)
    assert (third.failure.stage, third.failure.error_type) == ("decode", "NotAudio")
    assert isinstance(fourth, Waveform) and (fourth.unit_id, fourth.item_index) == ("unit", 3)
    assert np.array_equal(fourth.samples, audio_factory.tone(0.1)[:, 0])


def test_decoders_report_their_time_on_good_and_bad_clips(pool: DecodePool) -> None:
    stage_clocks.reset()
    samples = audio_factory.tone(2.0, 44_100)
    list(pool.stream("u", [clip("a", audio_factory.encode(samples, 44_100))]))
    good = stage_clocks.lap()
    assert good.read_s > 0.0 and good.open_s > 0.0
    assert good.decode_s > 0.0 and good.resample_s > 0.0
    list(pool.stream("u", [clip("b", b"no audio at all" * 100)]))
    bad = stage_clocks.lap()
    assert bad.open_s > 0.0 and bad.decode_s > 0.0 and bad.resample_s == 0.0


def test_many_clips_stay_in_order(pool: DecodePool) -> None:
    durations = np.random.default_rng(0).uniform(0.03, 1.0, 60)
    results = list(pool.stream("u", (clip(str(d), wav(d)) for d in durations)))
    assert [result.item_index for result in results] == list(range(60))
    assert [len(r.samples) for r in results] == [round(d * RATE) for d in durations]


def test_segments_and_paths_reach_the_decoder(pool: DecodePool, tmp_path: Path) -> None:
    path = audio_factory.write(tmp_path / "a.wav", audio_factory.tone(2.0), RATE, "wav_float")
    item = Item("a", "a", start_s=0.5, end_s=1.5)
    (result,) = pool.stream("u", [EncodedClip(item, path=str(path))])
    assert np.array_equal(result.samples, audio_factory.tone(2.0)[8_000:24_000, 0])
    assert path.exists()


def test_temporary_clips_are_removed_in_every_case(tmp_path: Path) -> None:
    paths = [tmp_path / str(index) for index in range(6)]
    for index, path in enumerate(paths):
        path.write_bytes(b"broken" if index == 1 else wav(0.1))
    clips = [EncodedClip(Item(p.name, p.name), path=str(p), delete_path=True) for p in paths]
    with DecodePool(DecodeSettings(num_processes=1, clips_ahead=4)) as pool:
        stream = pool.stream("u", iter(clips))
        next(stream), next(stream)
        stream.close()
        assert not paths[0].exists() and not paths[1].exists()
    left = [path for path in paths if path.exists()]
    assert all(path in paths[4:] for path in left)  # never read: still the reader's


def test_a_crash_costs_its_own_clip_only(hostile_worker: list[str]) -> None:
    data = [wav(0.5), wav(0.5, b"ABORT___"), wav(0.6), wav(0.5, b"EXIT____"), wav(0.7)]
    settings = DecodeSettings(num_processes=2)
    with DecodePool(settings, worker_command=hostile_worker) as pool:
        results = list(pool.stream("u", [clip(str(i), d) for i, d in enumerate(data)]))
    assert [isinstance(r, Waveform) for r in results] == [True, False, True, False, True]
    aborted, exited = results[1].failure, results[3].failure
    assert (aborted.stage, aborted.error_type) == ("decode", "DecoderCrashed")
    assert aborted.message == "the decoder was killed by SIGABRT (assertion failed: marked clip)"
    assert exited.message == "the decoder ended with exit code 7"


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        (b"LATE____", "the decoder was killed by SIGABRT"),
        (b"STUCK___", "the decoder gave no sign of life for 1 s and was killed"),
        (b"RAISE___", "the decoder failed: RuntimeError: the library stumbled"),
    ],
)
def test_samples_before_a_crash_or_a_hang_are_kept(
    mark: bytes, words: str, hostile_worker: list[str]
) -> None:
    settings = DecodeSettings(num_processes=1, piece_samples=RATE, stall_timeout_s=1.0)
    with DecodePool(settings, worker_command=hostile_worker) as pool:
        results = list(pool.stream("u", [clip("a", wav(9.5, mark)), clip("b", wav(0.5))]))
    assert np.array_equal(joined(results), audio_factory.tone(3.0)[:, 0])
    last = results[2]
    assert last.facts is not None and last.facts.duration_s == 3.0 and len(last.samples) == RATE
    assert str(last.facts.warning).startswith(f"decoded 3.0 s, then stopped: {words}")
    assert last.facts.warning_kinds == ("damaged",)
    assert last.facts.peak_dbfs == pytest.approx(-6.02, abs=0.01)
    assert len(joined(results, 1)) == RATE // 2


def test_pieces_sent_before_a_crash_are_received_after_it(
    hostile_worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    return_slot = DecoderProcess._return_slot

    def return_slot_late(decoder: DecoderProcess) -> None:
        wait_until(lambda: not decoder.is_usable(), "the crash")
        return_slot(decoder)

    monkeypatch.setattr(DecoderProcess, "_return_slot", return_slot_late)
    settings = DecodeSettings(num_processes=1, piece_samples=RATE)
    with DecodePool(settings, worker_command=hostile_worker) as pool:
        results = list(pool.stream("u", [clip("a", wav(9.5, b"LATE____"))]))
    assert np.array_equal(joined(results), audio_factory.tone(3.0)[:, 0])


def test_signs_of_life_keep_a_slow_clip_alive(tmp_path: Path) -> None:
    path = tmp_path / "slow_worker.py"
    path.write_text(
        "import sys, time\n"
        "from transforms.decoding import child\n"
        "child.ALIVE_EVERY_S = 0.05\n"
        "def decode(source, on_progress, **options):\n"
        "    for _ in range(20):\n"
        "        time.sleep(0.1)\n"
        "        on_progress()\n"
        "    yield from child.decode(source, **options)\n"
        "child.serve(sys.argv[1:], decode)\n"
    )
    settings = DecodeSettings(num_processes=1, stall_timeout_s=1.0)
    with DecodePool(settings, worker_command=[sys.executable, str(path)]) as pool:
        (result,) = pool.stream("u", [clip("a", wav(0.5))])
    assert isinstance(result, Waveform)


def test_ctrl_c_and_death_between_clips_are_survived() -> None:
    others = children()
    with DecodePool(DecodeSettings(num_processes=1)) as pool:
        list(pool.stream("u", [clip("a", wav(0.5))]))
        (child,) = children() - others
        os.kill(child, signal.SIGINT)
        list(pool.stream("u", [clip("a", wav(0.5))]))
        assert children() - others == {child}
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: is_gone(child), "its death")
        (result,) = pool.stream("u", [clip("a", wav(0.5))])
        assert isinstance(result, Waveform)


def test_a_decoder_that_cannot_start_is_an_error_of_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no libsndfile here')"]
    with (
        DecodePool(DecodeSettings(num_processes=1), worker_command=command) as pool,
        pytest.raises(EarmarkError, match=r"exit code 1 \(no libsndfile here"),
    ):
        list(pool.stream("u", [clip("a", wav(0.5))]))
    assert len(caplog.records) == 3


def test_an_error_of_the_reader_is_raised_in_its_place(pool: DecodePool) -> None:
    def clips() -> Iterator[EncodedClip]:
        yield clip("a", wav(0.5))
        raise OSError("the disk is gone")

    stream = pool.stream("u", clips())
    assert isinstance(next(stream), Waveform)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert list(stream) == []


def test_reading_ahead_is_bounded_in_clips_and_bytes() -> None:
    num_read = 0

    def clips() -> Iterator[EncodedClip]:
        nonlocal num_read
        for index in range(100):
            num_read += 1
            yield clip(str(index), wav(0.1))

    with DecodePool(DecodeSettings(num_processes=1, clips_ahead=5)) as pool:
        stream = pool.stream("u", clips())
        wait_until(lambda: num_read == 5, "five clips")
        time.sleep(0.2)
        assert num_read == 5
        next(stream)
        wait_until(lambda: num_read == 6, "the sixth")
        assert len(list(stream)) == 99
    num_read = 0
    with DecodePool(DecodeSettings(num_processes=1, bytes_ahead=1)) as pool:
        stream = pool.stream("u", clips())
        assert isinstance(next(stream), Waveform)
        assert len(list(stream)) == 99


def test_hours_flow_in_bounded_memory() -> None:
    ten_minutes = audio_factory.encode(audio_factory.tone(600.0, 8_000), 8_000, "flac")
    settings = DecodeSettings(num_processes=1, piece_samples=RATE)
    others = children()
    with DecodePool(settings) as pool:
        stream = pool.stream("u", [clip("a", ten_minutes)])
        first = next(stream)
        job = stream._stream.jobs[0]
        wait_until(lambda: len(job.results) == pool_module.PIECES_AHEAD, "a full queue")
        time.sleep(0.3)
        assert len(job.results) == pool_module.PIECES_AHEAD
        (child,) = children() - others
        rest = list(stream)
        status = Path(f"/proc/{child}/status").read_text()
    peak_kb = int(next(line.split()[1] for line in status.splitlines() if "VmHWM" in line))
    assert peak_kb < 200_000
    assert len(first.samples) + sum(len(r.samples) for r in rest) == 600 * RATE
    assert [r.facts is not None for r in rest] == [False] * (len(rest) - 1) + [True]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_streams_of_long_clips_can_be_consumed_in_any_order(num_processes: int) -> None:
    """The last stream is consumed first, when all decoders and queues are full."""
    settings = DecodeSettings(num_processes=num_processes, clips_ahead=2, piece_samples=400)
    others = children()
    with DecodePool(settings) as pool:
        streams = [
            pool.stream(name, [clip(f"{name}{i}", wav(1.0)) for i in range(3)]) for name in "xyz"
        ]
        wait_until(lambda: pool._num_stalled == num_processes, "stalled decoders")
        done = []
        for stream in reversed(streams):
            results = list(stream)
            done.append([len(joined(results, index)) for index in range(3)])
        assert done == [[RATE] * 3] * 3
        wait_until(lambda: len(children() - others) <= num_processes, "the end of the others")


def test_several_threads_share_a_pool() -> None:
    settings = DecodeSettings(num_processes=2, clips_ahead=3, piece_samples=4_000)
    totals: dict[str, int] = {}
    with DecodePool(settings) as pool:

        def consume(name: str) -> None:
            previous = None
            for round_index in range(4):
                stream = pool.stream(name, [clip(f"{i}", wav(0.9)) for i in range(5)])
                for taken in (previous, stream if round_index == 3 else None):
                    if taken is not None:
                        totals[name] = totals.get(name, 0) + sum(len(r.samples) for r in taken)
                previous = stream

        threads = [threading.Thread(target=consume, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert totals == dict.fromkeys("abcd", 4 * 5 * round(0.9 * RATE))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_closing_leaves_nothing_behind() -> None:
    threads, files, processes = threading.active_count(), open_files(), children()
    pool = DecodePool(DecodeSettings(num_processes=2, piece_samples=400, clips_ahead=4))
    streams = [pool.stream("u", [clip(f"{i}", wav(3.0)) for i in range(9)]) for _ in range(2)]
    next(streams[0])
    assert len(children() - processes) >= 1
    pool.close()
    assert children() == processes
    assert threading.active_count() == threads
    assert open_files() == files
    with pytest.raises(EarmarkError, match="was closed"):
        list(streams[0])
    with pytest.raises(EarmarkError, match="is closed"):
        pool.stream("u", [])


@pytest.mark.parametrize("how", ["close", "drop"])
def test_an_abandoned_stream_stops_and_frees_the_pool(how: str) -> None:
    closed = threading.Event()

    def clips() -> Iterator[EncodedClip]:
        try:
            for index in range(1000):
                yield clip(str(index), wav(3.0))
        finally:
            closed.set()

    with DecodePool(DecodeSettings(num_processes=1, piece_samples=400, clips_ahead=3)) as pool:
        stream = pool.stream("u", clips())
        next(stream)
        if how == "close":
            stream.close()
            assert list(stream) == []
        del stream
        gc.collect()
        assert closed.wait(20)
        assert len(list(pool.stream("v", [clip("a", wav(0.02 * 5))]))) == 4
        assert (pool._clips_in_flight, pool._bytes_in_flight) == (0, 0)


def test_children_end_when_their_parent_is_killed() -> None:
    code = (
        "import os, signal\n"
        "from tests.support.audio_factory import clip, wav\n"
        "from tests.transforms.decoding.test_pool import children\n"
        "from transforms.decoding.pool import DecodePool\n"
        "from transforms.decoding.settings import DecodeSettings\n"
        "pool = DecodePool(DecodeSettings(num_processes=1, piece_samples=400))\n"
        "stream = pool.stream('u', [clip('a', wav(5.0))])\n"
        "next(stream)\n"
        "print(*children(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL
    wait_until(lambda: is_gone(int(result.stdout)), "the end of the child")
