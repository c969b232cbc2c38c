"""What this process may use: cores and memory by cgroups, and threads that cannot be started."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT
from transforms.decoding.settings import DecodeSettings
from transforms.process import devices, limits
from transforms.process.limits import usable_bytes, usable_cores

GIB = 1 << 30
NO_LIMIT = "9223372036854771712"  # what version 1 says where there is none


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 16 cores and 64 GiB; its cgroups lie in the folder."""
    facts = {"SC_PHYS_PAGES": 64 * GIB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(os, "sysconf", facts.__getitem__)
    monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def put_cgroups(machine: Path, own: str, files: Mapping[str, str]) -> None:
    (machine / "own").write_text(own)
    for name, text in files.items():
        path = machine / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("own", "files", "cores", "gib"),
    [
        ("", {}, 16, 64),
        # Version 2 in a container: its own cgroup is the root.
        ("0::/\n", {"cpu.max": "150000 100000", "memory.max": str(4 * GIB)}, 2, 4),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, 16, 64),
        ("0::/\n", {"cpu.max": "5000 100000", "memory.high": str(3 * GIB)}, 1, 3),
        # On the machine itself: of a service and the slice above it, the least counts.
        (
            "0::/jobs.slice/earmark.service\n",
            {
                "jobs.slice/cpu.max": "400000 100000",
                "jobs.slice/memory.max": str(8 * GIB),
                "jobs.slice/earmark.service/cpu.max": "max 100000",
                "jobs.slice/earmark.service/memory.max": str(16 * GIB),
                "other.slice/cpu.max": "100000 100000",
            },
            4,
            8,
        ),
        # Version 1, on the machine and in a container that does not see its own path.
        (
            "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n",
            {
                "cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000",
                "memory/docker/ab/memory.limit_in_bytes": str(2 * GIB),
                "memory/memory.limit_in_bytes": NO_LIMIT,
            },
            3,
            2,
        ),
        (
            "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n",
            {
                "cpu/cpu.cfs_quota_us": "50000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": str(GIB),
            },
            1,
            1,
        ),
        (
            "4:cpu:/\n5:memory:/\n0::/\n",
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": NO_LIMIT,
                "unified/memory.max": str(5 * GIB),
            },
            16,
            5,
        ),
        ("0::/\n", {"cpu.max": "nonsense", "memory.max": ""}, 16, 64),
    ],
)
def test_a_containers_limits_count_as_the_machines(
    machine: Path, own: str, files: Mapping[str, str], cores: int, gib: int
) -> None:
    put_cgroups(machine, own, files)
    assert (usable_cores(), usable_bytes()) == (cores, gib * GIB)


def test_without_cgroups_the_machine_counts(machine: Path) -> None:
    assert (usable_cores(), usable_bytes()) == (16, 64 * GIB)


def test_decoders_and_look_ahead_fit_into_the_container(machine: Path) -> None:
    settings = DecodeSettings()
    assert settings.resolve_num_processes() == 16
    assert settings.resolve_bytes_ahead() == 512 << 20
    put_cgroups(machine, "0::/\n", {"cpu.max": "600000 100000", "memory.max": str(2 * GIB)})
    assert settings.resolve_num_processes() == 4  # of 256 MiB, in half of the memory
    assert settings.resolve_bytes_ahead() == 256 << 20
    put_cgroups(machine, "0::/\n", {"cpu.max": "300000 100000", "memory.max": str(100 << 20)})
    assert settings.resolve_num_processes() == 1
    put_cgroups(machine, "0::/\n", {"memory.max": str(16 * GIB)})
    assert settings.resolve_num_processes() == 3
    assert DecodeSettings(num_processes=7).resolve_num_processes() == 7  # as asked for


def test_torch_uses_the_containers_cores(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    uncached = devices._torch_threads.__wrapped__
    monkeypatch.setattr(devices, "_torch_threads", functools.cache(uncached))
    put_cgroups(machine, "0::/\n", {"cpu.max": "400000 100000"})
    assert [devices.threads_of(number) for number in (1, 2, 8)] == [4, 2, 1]


# Threads that the system refuses. A child process that waits for ever fails the test.

NO_THREADS = """
import threading, torch
from transforms.errors import EarmarkError
from transforms.features import threads
from transforms.process import devices

class Refused(threading.Thread):
    num_started = 0
    def start(self):
        Refused.num_started += 1
        if Refused.num_started > {most}:
            raise RuntimeError("can't start new thread")
        super().start()

devices._torch_threads = lambda: 4
threading.Thread = Refused
try:
    threads.feature_threads()
except EarmarkError as error:
    print(error)
"""


@pytest.mark.parametrize("most", [0, 1, 3])
def test_feature_threads_that_cannot_all_be_started_are_an_error(most: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_THREADS.format(most=most)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith(
        "the 4 threads that compute features cannot be started: can't start new thread; raise the "
        "system's limit (ulimit -u"
    )
