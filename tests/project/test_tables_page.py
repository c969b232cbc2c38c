"""``docs/tables.md``: its commands label and train on the layouts of published datasets."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pipeline.cli import main as cli
from tests.pipeline.training.small_trainings import RATE_HZ, SMALL, sets_of, sound
from tests.support import audio_factory
from tests.support.docs import unknown_options
from tests.support.labelling import read_rows
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")


class Clip(NamedTuple):
    """A file of a dataset, below its folder, and what the table says of it."""

    path: str
    labels: tuple[str, ...]
    row: tuple[object, ...] = ()


class Dataset(NamedTuple):
    """A dataset in its published layout: a table of clips, or folders alone."""

    tables: dict[str, tuple[str, list[Clip]]]
    learnt: tuple[str, ...]
    is_labelled_by_table: bool = True
    delimiter: str = ","


def write(dataset: Dataset) -> None:
    rng = np.random.default_rng(0)
    for name, (header, clips) in dataset.tables.items():
        for clip in clips:
            kind = ("tone", "noise", "clicks")[dataset.learnt.index(clip.labels[0])]
            path = Path(clip.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            samples = sound(kind, rng).astype(np.float32)
            format_ = {".wav": "wav", ".mp3": "mp3", ".ogg": "ogg"}[path.suffix]
            audio_factory.write(path, samples, RATE_HZ, format_)
        if header:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            with Path(name).open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, delimiter=dataset.delimiter, lineterminator="\n")
                writer.writerow(header.split(","))
                writer.writerows(clip.row for clip in clips)


def esc50() -> Dataset:
    clips = []
    for target, name in enumerate(("dog", "sea_waves")):
        for fold in range(1, 6):
            file = f"{fold}-100{target}32-A-{target}.wav"
            row = (file, fold, target, name, target == 0, f"100{target}32", "A")
            clips.append(Clip(f"ESC-50/audio/{file}", (name,), row))
    header = "filename,fold,target,category,esc10,src_file,take"
    return Dataset({"ESC-50/meta/esc50.csv": (header, clips)}, ("dog", "sea_waves"))


def urbansound() -> Dataset:
    clips = []
    for class_id, name in ((2, "children_playing"), (3, "dog_bark")):
        for fold in (1, 2, 10):
            file = f"{fold}0032-{class_id}-0-0.wav"
            row = (file, f"{fold}0032", 60.5, 64.5, 1, fold, class_id, name)
            path = f"UrbanSound8K/audio/fold{fold}/{file}"
            clips.append(Clip(path, (name,), row))
    header = "slice_file_name,fsID,start,end,salience,fold,classID,class"
    table = "UrbanSound8K/metadata/UrbanSound8K.csv"
    return Dataset({table: (header, clips)}, ("children_playing", "dog_bark"))


def fsd50k() -> Dataset:
    clips = []
    for number in range(6):
        labels = (("Bark", "Dog", "Animal"), ("Electric_guitar", "Music"))[number % 2]
        split = "val" if number > 3 else "train"
        row = (64760 + number, ",".join(labels), "/m/05tny_,/m/0bt9lr", split)
        clips.append(Clip(f"FSD50K/FSD50K.dev_audio/{64760 + number}.wav", labels, row))
    table = "FSD50K/FSD50K.ground_truth/dev.csv"
    return Dataset({table: ("fname,labels,mids,split", clips)}, ("Bark", "Electric_guitar"))


def common_voice() -> Dataset:
    header = "client_id,path,sentence,up_votes,down_votes,age,gender,accents,locale,segment"
    tables = {}
    for part, first in (("train", 10), ("dev", 20)):
        clips = []
        for number in range(first, first + 4):
            word = ("yes", "no")[number % 2]
            file = f"common_voice_en_{number}.mp3"
            row = (f"c{number}", file, word, 2, 0, "", "", "", "en", "Singleword Benchmark")
            clips.append(Clip(f"cv-corpus/en/clips/{file}", (word,), row))
        tables[f"cv-corpus/en/{part}.tsv"] = (header, clips)
    return Dataset(tables, ("yes", "no"), is_labelled_by_table=False, delimiter="\t")


def birdclef() -> Dataset:
    clips = []
    for code, species in (("abethr1", "Turdus tephronotus"), ("afecuc1", "Cuculus gularis")):
        for number in range(2):
            file = f"{code}/XC12801{number}.ogg"
            row = (code, "['afecuc1']", "['song']", 4.39, species, f"https://x.org/{number}", file)
            clips.append(Clip(f"birdclef/train_audio/{file}", (code,), row))
    header = "primary_label,secondary_labels,type,latitude,scientific_name,url,filename"
    return Dataset({"birdclef/train_metadata.csv": (header, clips)}, ("abethr1", "afecuc1"))


def xeno_canto() -> Dataset:
    clips = [
        Clip(f"xeno-canto/audio/{species}/XC{number}.mp3", (species,))
        for species in ("Turdus merula", "Erithacus rubecula")
        for number in range(2)
    ]
    return Dataset({"": ("", clips)}, ("Turdus merula", "Erithacus rubecula"))


DATASETS: dict[str, Callable[[], Dataset]] = {
    "ESC-50": esc50,
    "UrbanSound8K": urbansound,
    "FSD50K": fsd50k,
    "Common Voice": common_voice,
    "BirdCLEF": birdclef,
    "xeno-canto": xeno_canto,
}


def commands_of(name: str) -> list[list[str]]:
    """Return the arguments of a dataset's commands, without the program."""
    (text,) = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert [line[:2] for line in lines] == [["earmark", "label"], ["earmark", "train"]]
    return [line[1:] for line in lines]


def test_every_dataset_of_the_page_is_tried() -> None:
    part = PAGE.partition("## Datasets")[2].partition("\n## ")[0]
    assert re.findall(r"^### (.+)$", part, re.MULTILINE) == list(DATASETS)


@pytest.fixture(params=DATASETS)
def dataset(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Dataset]:
    """A dataset in the current folder, and its name."""
    monkeypatch.chdir(tmp_path)
    made = DATASETS[request.param]()
    write(made)
    return request.param, made


def truths(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {row["uri"]: tuple(row["truth"]) if row["truth"] else None for row in rows}


def test_the_command_labels_the_dataset(
    dataset: tuple[str, Dataset], tiny_model: Path, tmp_path: Path
) -> None:
    name, made = dataset
    label, _ = commands_of(name)
    assert unknown_options(*label) == set()
    assert cli.main([*label, "--model", str(tiny_model), "-q"]) == 0
    first = next(iter(made.tables.values()))[1]
    rows = read_rows(tmp_path / "labelled", "clips")
    assert truths(rows) == {
        str(tmp_path / clip.path): clip.labels if made.is_labelled_by_table else None
        for clip in first
    }
    assert all((row["start_s"], row["end_s"]) == (None, None) for row in rows)


def test_the_command_trains_on_the_dataset(dataset: tuple[str, Dataset], tmp_path: Path) -> None:
    name, made = dataset
    _, train = commands_of(name)
    assert unknown_options(*train) == set()
    small = {**SMALL, "training.epochs": 1}
    assert cli.main([*train, *sets_of(small), "-q"]) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    clips = [clip for _, clips in made.tables.values() for clip in clips]
    learnt = {label for clip in clips for label in clip.labels}
    assert set(config["id2label"].values()) == learnt


def test_labels_under_another_name_are_named_where_none_is_found(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(esc50())
    table = ["ESC-50/meta/esc50.csv", "--set", "manifest.root=ESC-50/audio"]
    advice = "category, target look like labels, but are not used as such: metadata. To use them: "
    assert cli.main(["train", "--train", *table, "--hold-out", "fold=5", "-o", "model"]) == 2
    assert advice + "--column label=category" in capsys.readouterr().err
    assert cli.main(["label", *table, "-o", "labelled", "-m", str(tiny_model), "-q"]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", "labelled", "--truth", *table]) == 2
    assert advice + "--column label=category" in capsys.readouterr().err


def test_urbansounds_times_of_another_file_are_said_not_to_be_used(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(urbansound())
    label, _ = commands_of("UrbanSound8K")
    assert cli.main(["plan", *label[1:]]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "UrbanSound8K.csv: start, end look like times, but are not used as such: metadata" in said
    )
    assert "--column start_s=start --column end_s=end" in said
    assert "classID" not in said and "like labels" not in said
    assert cli.main([*label, "--model", str(tiny_model), "-q"]) == 0
    (warning,) = json.loads((tmp_path / "labelled" / "run.json").read_bytes())["input"]["warnings"]
    assert warning in capsys.readouterr().err
    assert warning in said
