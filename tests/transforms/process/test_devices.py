"""The device of a process: which GPU it takes, and features that are made there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from pipeline.labelling.run import run_label
from tests.support.audio_factory import noise, write
from tests.support.labelling import Row, read_rows, small_config
from transforms.features.fbank import DeviceFbank, FbankSettings, extract_fbank
from transforms.process import devices
from transforms.process.devices import Sender, claim, torch_device

RATE = 16_000
SETTINGS = FbankSettings()

CLAIM = """
import sys
from pathlib import Path
from transforms.process.devices import claim
print(claim(["a", "b"], Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def claim_apart(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A process that takes one of two things and holds it, and which."""
    command = [sys.executable, "-c", CLAIM, str(folder)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.mark.slow
def test_processes_share_gpus_evenly_and_give_them_back(tmp_path: Path) -> None:
    held = [claim_apart(tmp_path) for _ in range(3)]
    assert [index for _, index in held] == [0, 1, 0]
    held[1][0].kill()
    held[1][0].wait()
    held.append(claim_apart(tmp_path))
    assert held[-1][1] == 1
    for process, _ in held:
        process.communicate("")


def test_where_nothing_can_be_locked_a_gpu_is_taken_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert claim(["a", "b"], tmp_path / "file") in (0, 1)
    assert devices._held == []


def test_one_gpu_needs_no_index() -> None:
    assert torch_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_features_of_the_device_are_those_of_the_host(
    device: str, request: pytest.FixtureRequest
) -> None:
    if device == "cuda":
        request.getfixturevalue("needs_gpu")
    windows = [noise(seconds)[:, 0] for seconds in (10.0, 0.5, 10.255, 0.025) * 5]  # two parts
    found = DeviceFbank(SETTINGS, torch.device(device))(windows).cpu().numpy()
    expected = np.stack([extract_fbank(window, SETTINGS) for window in windows])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_what_is_sent_to_a_gpu_arrives(needs_gpu: None) -> None:
    send = Sender(torch.device("cuda"))
    sent = [torch.full((1 << 20,), float(index)) for index in range(20)]
    found = [send(values) + 1 for values in sent]
    for index, values in enumerate(found):
        assert (values == index + 1).all()


def test_features_made_on_the_device_give_the_same_rows(tiny_model: Path, tmp_path: Path) -> None:
    def label(features_on: Literal["host", "device"]) -> list[Row]:
        out = tmp_path / features_on
        inference = {"precision": "fp32", "device": "cpu", "features_on": features_on}
        config = small_config(tiny_model, out, folder, labels={"scores": True}, inference=inference)
        assert run_label(config, []) == 0
        return read_rows(out, "clips")

    folder = tmp_path / "clips"
    folder.mkdir()
    for index, seconds in enumerate((1.0, 10.255, 23.0)):
        write(folder / f"{index}.wav", noise(seconds, seed=index), RATE)
    host, device = label("host"), label("device")
    assert [row["clip_id"] for row in host] == [f"{folder}/{index}.wav" for index in range(3)]
    for mine, theirs in zip(device, host, strict=True):
        np.testing.assert_allclose(mine["scores"], theirs["scores"], rtol=0, atol=1e-4)
