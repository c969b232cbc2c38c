"""Names whose bytes are not UTF-8: of inputs, outputs, models and the current folder."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main as cli
from pipeline.result.verify import run_verify
from tests.support.audio_factory import noise, write
from tests.support.containers import GOOD, parquet_bytes, tar_bytes
from tests.support.paths import ROOT
from transforms.storage import urls

LATIN = os.fsdecode(b"caf\xe9 \xff")  # "café ÿ" in Latin-1
ENCODED = "caf%E9 %FF"


def earmark(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder of such a name, in which everything has such a name."""
    try:
        folder = tmp_path / LATIN / "in"
        folder.mkdir(parents=True)
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    write(folder / f"{LATIN}.wav", noise(0.5), 16_000)
    (folder / f"{LATIN}.tar").write_bytes(tar_bytes([("a.wav", GOOD)]))
    (folder / f"{LATIN}.parquet").write_bytes(parquet_bytes(pa.table({"audio": [GOOD]})))
    (folder / f"{LATIN}.csv").write_text("uri,clip_id\nlisted.wav,listed\n")
    write(folder / "listed.wav", noise(0.5, seed=1), 16_000)
    return folder.parent


def test_names_that_are_not_utf8_anywhere(
    here: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    shutil.copytree(tiny_model, here / f"model {LATIN}")
    few = ("--device", "cpu", "--engine", "torch", "--set", "decode.processes=1")
    inputs = ("in", f"in/{LATIN}.wav", str(here / "in" / f"{LATIN}.csv"))
    done = earmark(here, "label", *inputs, "-o", LATIN, "-m", f"./model {LATIN}", *few)
    assert done.returncode == 0, done.stderr
    done.stderr.decode()  # raises unless it is UTF-8
    out = here / LATIN
    assert run_verify(str(out), quiet=True) == 0
    top = f"{here.parent}/{ENCODED}/in"
    parts = [path.read_bytes() for path in (out / "clips").iterdir()]  # Arrow opens no such path
    ids = sorted(
        name for part in parts for name in pq.read_table(io.BytesIO(part))["clip_id"].to_pylist()
    )
    names = [f"{top}/{ENCODED}{ending}" for ending in (".wav", ".tar#a.wav", ".parquet#row=0")]
    assert ids == sorted([*names, "listed"])
    assert Path(os.fsdecode(unquote_to_bytes(names[0]))).is_file()
    assert (
        f"{here.parent}/{ENCODED}/{ENCODED}"
        in json.loads((out / "run.json").read_text())["config"]["output"]
    )
    monkeypatch.chdir(here)
    label = ["label", *inputs, "-o", LATIN, "-m", f"./model {LATIN}", *few]
    assert cli.main(label) == 0  # nothing is left to do
    assert cli.main(["plan", *label[1:]]) == 0
    assert cli.main(["export", LATIN, "-f", "csv"]) == 0
    said = capfdbinary.readouterr()
    assert b"Nothing to do" in said.err
    (said.out + said.err).decode()
    (table,) = (out / "export" / "csv").glob("*.csv")
    rows = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")))
    assert {row["clip_id"] for row in rows} == set(ids)


def test_what_a_result_names_is_the_file(here: Path) -> None:
    """A name in a result leads back to its file: as an input, in a manifest, as a file:// URL."""
    path = f"{here}/in/{LATIN}.wav"
    told = f"{here.parent}/{ENCODED}/in/{ENCODED}.wav"
    assert urls.normalise(told) == path
    assert urls.normalise(f"file://{told}") == path
    assert urls.normalise(told + ".gone") == told + ".gone"
    taken = here.parent / "100%E9.wav"  # a file of this very name comes first
    taken.write_bytes(b"")
    Path(os.fsdecode(bytes(here.parent) + b"/100\xe9.wav")).write_bytes(b"")
    assert urls.normalise(str(taken)) == str(taken)
