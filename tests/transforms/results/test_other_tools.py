"""Other people's tools read the output as it is."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
import soundfile

from pipeline.labelling.run import run_label
from tests.support.labelling import small_config
from tests.support.model_factory import TINY_LABELS

HIDDEN_SIZE = 32


@pytest.fixture(scope="module")
def out(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    (folder / "clips").mkdir()
    for index in range(3):
        noise = np.random.default_rng(index).normal(0, 0.1, 16_000)
        soundfile.write(folder / "clips" / f"{index}.wav", noise, 16_000)
    (folder / "clips" / "bad.wav").write_bytes(b"no audio")
    config = small_config(
        tiny_model,
        folder / "out",
        folder / "clips",
        max_failed=1.0,
        labels={"top_k": 3, "scores": True},
    )
    assert run_label(config, []) == 0
    return folder / "out"


def test_pandas(out: Path) -> None:
    clips = pd.read_parquet(out / "clips")
    assert len(clips) == 3
    assert np.stack(clips["embedding"]).shape == (3, HIDDEN_SIZE)
    assert clips["labels"][0][0]["name"] in TINY_LABELS
    assert len(pd.read_parquet(out / "errors")) == 1


def test_polars(out: Path) -> None:
    clips = pl.read_parquet(out / "clips" / "*.parquet")
    assert clips.schema["embedding"] == pl.Array(pl.Float32, HIDDEN_SIZE)
    best = clips.select(pl.col("labels").list.first().struct.field("name")).to_series()
    assert set(best) <= set(TINY_LABELS)


def test_duckdb(out: Path) -> None:
    rows = duckdb.sql(
        f"""
        SELECT clip_id, labels[1].name, len(labels),
               array_cosine_similarity(embedding::FLOAT[{HIDDEN_SIZE}],
                                       embedding::FLOAT[{HIDDEN_SIZE}])
        FROM '{out}/clips/*.parquet' ORDER BY clip_id
        """
    ).fetchall()
    assert [Path(row[0]).name for row in rows] == ["0.wav", "1.wav", "2.wav"]
    assert all(name in TINY_LABELS and count == 3 for _, name, count, _ in rows)
    assert [row[3] for row in rows] == pytest.approx([1, 1, 1], abs=1e-5)
    joined = duckdb.sql(
        f"SELECT count(*) FROM '{out}/windows/*.parquet' JOIN '{out}/clips/*.parquet' "
        "USING (clip_id)"
    ).fetchall()
    assert joined == [(3,)]


def test_hugging_face_datasets(out: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    clips = datasets.load_dataset(
        "parquet",
        data_files=str(out / "clips" / "*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert len(clips) == 3
    assert len(clips[0]["embedding"]) == HIDDEN_SIZE
    assert clips[0]["labels"][0]["name"] in TINY_LABELS
