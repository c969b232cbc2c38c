"""Containers with random damage never end the process."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.support.containers import END, GOOD, STRUCT, member, parquet_bytes
from tests.support.paths import ROOT


def corpus() -> dict[str, bytes]:
    tar = b"".join(member(f"{n}.wav", GOOD[:900]) + member(f"{n}.json", b"{}") for n in range(3))
    tar += member("é" * 120 + ".wav", b"x") + member("y" * 200 + ".wav", b"x", format=1) + END
    cells = [{"bytes": bytes([n]) * 300, "path": None} for n in range(20)]
    table = pa.table({"audio": pa.array(cells, STRUCT), "tags": [["a", "b"]] * 20})
    newer = {"compression": "zstd", "data_page_version": "2.0"}
    names = pa.table({"uri": [f"{n}.wav" for n in range(9)], "labels": [["a"]] * 9})
    lines = "\n".join(json.dumps({"uri": f"{n}.wav", "start_s": n, "x": [n]}) for n in range(9))
    return {
        "x.tar": tar,
        "x.tar.gz": gzip.compress(tar, mtime=0),
        "plain.parquet": parquet_bytes(table, 7, compression="none"),
        "zstd.parquet": parquet_bytes(table, 7, **newer),
        "list.jsonl": lines.encode(),
        "list.csv": b'uri,label\n"a.wav","x\ny"\nb.wav,z\n' * 5,
        "list.parquet": parquet_bytes(names),
    }


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(1 << int(rng.integers(0, 5))):
        # Footers are small and lie at the end: half of the changes go there.
        low = 0 if rng.integers(2) else max(0, len(changed) - 700)
        changed[int(rng.integers(low, len(changed)))] = int(rng.choice([0, 255, rng.integers(256)]))
    cut = int(rng.integers(1, len(changed) + 1)) if rng.integers(4) == 0 else len(changed)
    return bytes(changed[:cut])


READ_MUTANTS = """
import sys
from pathlib import Path
from transforms.errors import InputError
from transforms.sources.read_unit import SourceSettings, find_inputs, plan_units, read_unit
settings = SourceSettings(windows_per_unit=2, max_unit_bytes=3000)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    print(folder.name, flush=True)
    for path in sorted(folder.iterdir()):
        try:
            found = find_inputs([str(path)])
            units = plan_units(found.items, found.containers, settings)
            ends = [one for unit in units for one in read_unit(unit, settings)]
        except InputError:
            continue
        names = [one.item.clip_id for one in ends]
        assert len(set(names)) == len(names), (path, names)
"""


@pytest.mark.parametrize(
    "numbers", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.slow)]
)
def test_damaged_containers_never_end_the_run(tmp_path: Path, numbers: range) -> None:
    for number in numbers:
        rng = np.random.default_rng(number)
        (tmp_path / f"{number:06}").mkdir()
        for name, data in corpus().items():
            (tmp_path / f"{number:06}" / name).write_bytes(mutate(data, rng))
    done = subprocess.run(
        [sys.executable, "-c", READ_MUTANTS, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{last}: {done.stderr[-3000:]}"
