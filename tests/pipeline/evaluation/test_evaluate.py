"""``earmark evaluate``: scores meet the truth, and what does not meet is said."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from pipeline.cli import main as cli
from pipeline.evaluation.evaluate import combine_results, read_scores
from tests.support import audio_factory
from tests.support.model_factory import TINY_LABELS, write_tiny_model
from transforms.errors import InputError
from transforms.models.labels import audioset_labels

RATE_HZ = 16_000
NUM_CLIPS = 15


@dataclass(frozen=True)
class Said:
    """What the command gave."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def earmark(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Said:
        code = cli.main([*map(str, arguments)])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


def label_of(index: int) -> str:
    return TINY_LABELS[index % len(TINY_LABELS)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for index in range(NUM_CLIPS):
        seconds = 12.0 if index == 3 else 1.0  # one of two windows
        samples = audio_factory.noise(seconds, seed=index) * (0.02 + 0.1 * (index % 5))
        audio_factory.write(folder / f"clip{index}.wav", samples, RATE_HZ)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    kinds = ("single_label_classification", "multi_label_classification")
    return [
        write_tiny_model(folder / f"{kind}{seed}", seed=seed, problem_type=kind)
        for kind in kinds
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, clips: Path, models: list[Path]
) -> dict[str, Path]:
    """Results by name: softmax and sigmoid, with and without stored scores, another model's."""
    out = tmp_path_factory.mktemp("results")
    runs = {
        "softmax": (models[0], []),
        "softmax_scores": (models[0], ["--scores"]),
        "other": (models[1], []),
        "sigmoid": (models[2], []),
        "sigmoid_scores": (models[2], ["--scores"]),
        "half": (models[0], ["--set", "embedding.dtype=float16"]),
        "patches": (models[0], ["--set", "embedding.pooling=patch_mean"]),
    }
    for name, (model, options) in runs.items():
        arguments = ["label", str(clips), "-o", str(out / name), "-m", str(model), "-q", *options]
        assert cli.main(arguments) == 0
    return {name: out / name for name in runs}


@pytest.fixture
def truth(tmp_path: Path, clips: Path) -> Path:
    """A manifest beside the clips' own folder: only the names tell which is which."""
    path = tmp_path / "truth.csv"
    lines = [f"clip{i}.ogg,{label_of(i)}\n" for i in range(NUM_CLIPS)]
    path.write_text("filename,label\n" + "".join(lines))
    return path


def rows_of(clips: Path) -> list[dict[str, Any]]:
    return [{"uri": str(clips / f"clip{i}.wav"), "label": label_of(i)} for i in range(NUM_CLIPS)]


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def figures(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evaluation.json").read_text()))


def expected_truth() -> np.ndarray[Any, np.dtype[np.bool_]]:
    classes = np.arange(NUM_CLIPS) % len(TINY_LABELS)
    return np.eye(len(TINY_LABELS), dtype=np.bool_)[classes]


def scores_in_order(folder: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    scored = read_scores(str(folder))
    order = sorted(
        range(NUM_CLIPS),
        key=lambda i: int(re.findall(r"clip(\d+)\.wav", str(scored.places[i].clip_id))[0]),
    )
    return scored.scores[order]


@pytest.mark.parametrize(
    ("computed", "stored", "tolerance"),
    [
        ("softmax", "softmax_scores", 1e-6),
        ("sigmoid", "sigmoid_scores", 1e-6),
        ("half", "softmax_scores", 2e-3),
    ],
)
def test_scores_come_back_from_embeddings_as_they_were(
    results: dict[str, Path], computed: str, stored: str, tolerance: float
) -> None:
    found, wanted = scores_in_order(results[computed]), scores_in_order(results[stored])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


def test_the_figures_are_sklearns(
    earmark: Command, results: dict[str, Path], truth: Path, tmp_path: Path
) -> None:
    said = earmark("evaluate", results["softmax"], "--truth", truth, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    scores, positives = scores_in_order(results["softmax"]), expected_truth()
    found = figures(tmp_path / "out")
    accuracy = accuracy_score(positives.argmax(1), scores.argmax(1))
    mean = average_precision_score(positives, scores, average="macro")
    assert found["accuracy"] == accuracy
    assert found["mean_average_precision"] == pytest.approx(mean, rel=1e-12)
    assert found["mean_auc"] == pytest.approx(
        roc_auc_score(positives, scores, average="macro"), rel=1e-12
    )
    assert f"accuracy {accuracy:.4f}\nmAP {mean:.4f}\n" in said.out
    assert [entry["name"] for entry in found["classes"]] == list(TINY_LABELS)
    assert np.sum(found["confusion"]) == NUM_CLIPS
    assert "Left out" not in said.out
    assert re.search(r"^dog +3 +\d\.\d{4}", said.out, re.MULTILINE)
    joined = f"Clips joined with a row of the truth: {NUM_CLIPS} by the end of the path (such as "
    assert joined in said.out
    assert found["joined"] == {"clip_id": 0, "uri": 0, "path": NUM_CLIPS}
    assert any(note.startswith(joined) for note in found["notes"])
    picture = (tmp_path / "out" / "evaluation.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_mistakes_are_written_and_the_first_of_them_printed(
    earmark: Command, results: dict[str, Path], truth: Path, tmp_path: Path
) -> None:
    said = earmark("evaluate", results["softmax"], "--truth", truth, "-o", tmp_path / "out")
    scores, positives = scores_in_order(results["softmax"]), expected_truth()
    wrong = {
        f"clip{index}.wav": [TINY_LABELS[positives[index].argmax()], TINY_LABELS[best]]
        for index, best in enumerate(scores.argmax(1))
        if not positives[index, best]
    }
    assert wrong
    with (tmp_path / "out" / "mistakes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["clip_id"]).name: [row["truth"], row["guess"]] for row in rows} == wrong
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert figures(tmp_path / "out")["mistakes"] == len(wrong)
    assert f"{len(wrong)} clips whose best label is not true" in said.out
    assert f"  {rows[0]['clip_id']}: {rows[0]['truth']} taken for {rows[0]['guess']}" in said.out
    quiet = earmark("evaluate", results["softmax"], "-t", truth, "-o", tmp_path / "out", "-q")
    assert "taken for" not in quiet.out


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_stem_joins_no_files_of_other_folders_whatever_the_table(
    earmark: Command, results: dict[str, Path], clips: Path, tmp_path: Path, kind: str
) -> None:
    rows = [{"uri": f"elsewhere/clip{i}.wav", "label": "dog"} for i in range(NUM_CLIPS)]
    rows[0]["uri"] = f"{clips.name}/clip0.wav"
    table = tmp_path / f"truth.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    elif kind == "jsonl":
        write_manifest(table, rows)
    else:
        table.write_text("uri,label\n" + "".join(f"{row['uri']},dog\n" for row in rows))
    said = earmark("evaluate", results["softmax"], "-t", table, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    assert figures(tmp_path / "out")["counts"]["clips"] == 1
    assert figures(tmp_path / "out")["counts"]["rows_without_clip"] == NUM_CLIPS - 1


def test_clips_that_are_not_in_all_averaged_results_are_counted(
    earmark: Command, results: dict[str, Path], clips: Path, truth: Path, models: list[Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    some = [clips / f"clip{index}.wav" for index in range(4)]
    assert earmark("label", *some, "-o", tmp_path / "some", "-m", models[1], "-q").code == 0
    both = [results["softmax"], tmp_path / "some"]
    said = earmark("evaluate", *both, "-t", truth, "-o", tmp_path / "out")
    assert f"{NUM_CLIPS - 4} clips not in all of them left out" in said.out


def test_without_an_output_the_evaluation_lies_in_the_result_and_does_no_harm(
    earmark: Command, results: dict[str, Path], truth: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(results["softmax"], tmp_path / "copy")
    said = earmark("evaluate", copy, "--truth", truth)
    assert f"Written: {copy}/evaluation/evaluation.json" in said.out
    assert earmark("verify", copy).code == 0


def test_truth_of_the_result_itself_is_used(
    earmark: Command, clips: Path, models: list[Path], tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", rows_of(clips)[:-1])
    out = tmp_path / "out"
    assert earmark("label", manifest, "-o", out, "-m", models[0], "-q").code == 0
    said = earmark("evaluate", out)
    assert said.code == 0, said.err
    assert figures(out / "evaluation")["counts"]["clips"] == NUM_CLIPS - 1
    clips_only = tmp_path / "clips_only"
    assert earmark("label", clips, "-o", clips_only, "-m", models[0], "-q").code == 0
    refused = earmark("evaluate", clips_only)
    assert refused.code == 2
    assert "holds no truth of its own; pass --truth with a manifest" in refused.err
    # The clips table of one result is truth for another.
    by_table = earmark("evaluate", clips_only, "--truth", next((out / "clips").iterdir()))
    assert by_table.code == 0, by_table.err
    assert "Left out: 1 of the result's clips without a row in the truth" in by_table.out


def test_clip_ids_and_places_win_over_stems(
    earmark: Command, results: dict[str, Path], clips: Path, tmp_path: Path
) -> None:
    # Of the same stems, and wrong: they are of other files.
    wrong = [{"uri": f"elsewhere/clip{i}.wav", "label": "rain"} for i in range(NUM_CLIPS)]
    manifest = write_manifest(tmp_path / "truth.jsonl", [*rows_of(clips), *wrong])
    said = earmark("evaluate", results["softmax"], "-t", manifest, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    scores = scores_in_order(results["softmax"])
    assert figures(tmp_path / "out")["accuracy"] == accuracy_score(
        expected_truth().argmax(1), scores.argmax(1)
    )
    assert f"Left out: {NUM_CLIPS} of the truth's rows without a clip in the result" in said.out


def test_rows_and_clips_without_a_match_are_reported(
    earmark: Command, results: dict[str, Path], clips: Path, models: list[Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(clips, tmp_path / "clips")
    (folder / "broken.wav").write_bytes(b"no audio" * 99)
    out = tmp_path / "out"
    arguments = ["-o", out, "-m", models[0], "-q", "--max-failed", "0.5"]
    assert earmark("label", folder, *arguments).code == 0
    lines = [f"clip{i}.wav,{label_of(i)}" for i in range(NUM_CLIPS - 2)]
    lines += ["broken.wav,dog", "absent.wav,dog", "unlabelled.wav,", "clip0.wav,too,many"]
    manifest = tmp_path / "truth.csv"
    manifest.write_text("\n".join(["filename,label", *lines]) + "\n")
    said = earmark("evaluate", out, "--truth", manifest)
    assert said.code == 0, said.err
    assert figures(out / "evaluation")["counts"] == {
        "clips": NUM_CLIPS - 2,
        "clips_without_truth": 2,
        "rows_that_failed": 1,
        "rows_without_clip": 1,
        "rows_without_label": 1,
        "unreadable_rows": 1,
        "unknown_labels": 0,
        "ambiguous_names": 0,
    }
    for words in (
        r"2 of the result's clips without a row in the truth, such as \S+clip13\.wav, \S+clip14",
        r"1 of the truth's rows are items that could not be labelled, such as \S+broken\.wav",
        r"1 of the truth's rows without a clip in the result, such as \S+absent\.wav",
        r"1 of the truth's rows have no label",
        r"1 of the truth's lines cannot be read, such as line 18 of \S+ has 3 fields",
    ):
        assert re.search(f"Left out: {words}", said.out), (words, said.out)


def test_a_name_that_means_two_files_is_not_guessed(
    earmark: Command, models: list[Path], clips: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        shutil.copy(clips / "clip0.wav", tmp_path / "in" / name / "same.wav")
        shutil.copy(clips / "clip1.wav", tmp_path / "in" / name / f"only_{name}.wav")
    out = tmp_path / "out"
    assert earmark("label", tmp_path / "in", "-o", out, "-m", models[0], "-q").code == 0
    manifest = tmp_path / "truth.csv"
    manifest.write_text("filename,label\nsame.ogg,dog\nonly_a.ogg,rain\nonly_b.ogg,dog\n")
    said = earmark("evaluate", out, "--truth", manifest)
    assert said.code == 0, said.err
    assert figures(out / "evaluation")["counts"]["clips"] == 2
    assert "1 of the truth's names fit several clips or rows, such as same.ogg." in said.out
    assert figures(out / "evaluation")["joined"] == {"clip_id": 0, "uri": 0, "path": 2}


def test_with_several_labels_there_is_no_accuracy(
    earmark: Command, results: dict[str, Path], clips: Path, tmp_path: Path
) -> None:
    rows = rows_of(clips)
    for index, row in enumerate(rows):
        row["labels"] = [row.pop("label"), label_of(index + 1)]
    manifest = write_manifest(tmp_path / "truth.jsonl", rows)
    said = earmark("evaluate", results["sigmoid"], "-t", manifest, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    found = figures(tmp_path / "out")
    assert (found["accuracy"], found["confusion"]) == (None, None)
    positives = expected_truth() | np.roll(expected_truth(), 1, axis=1)
    assert found["mean_average_precision"] == pytest.approx(
        average_precision_score(positives, scores_in_order(results["sigmoid"]), average="macro")
    )
    assert "accuracy" not in said.out


def test_scores_of_several_results_are_averaged(
    earmark: Command, results: dict[str, Path], truth: Path, tmp_path: Path
) -> None:
    both = [results["softmax"], results["other"]]
    said = earmark("evaluate", *both, "--truth", truth, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    mean = (scores_in_order(both[0]) + scores_in_order(both[1])) / 2
    found = figures(tmp_path / "out")
    assert found["mean_average_precision"] == pytest.approx(
        average_precision_score(expected_truth(), mean, average="macro"), rel=1e-9
    )
    assert found["results"] == [str(path) for path in both]
    assert "the scores of 2 results are averaged, clip by clip; evaluate each of them" in said.out


def test_results_of_other_labels_or_clips_cannot_be_averaged(
    earmark: Command, results: dict[str, Path], clips: Path, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "m", id2label={i: f"x{i}" for i in range(5)}, label2id={})
    assert earmark("label", clips, "-o", tmp_path / "out", "-m", model, "-q").code == 0
    said = earmark("evaluate", results["softmax"], tmp_path / "out")
    assert said.code == 2
    assert "has other labels than" in said.err
    one, another = (read_scores(str(results[name])) for name in ("softmax", "other"))
    moved = shutil.copytree(clips, tmp_path / "moved")
    arguments = ["-o", tmp_path / "two", "-m", write_tiny_model(tmp_path / "n"), "-q"]
    assert earmark("label", moved, *arguments).code == 0
    with pytest.raises(InputError, match="none is in all of them"):
        combine_results([one, another, read_scores(str(tmp_path / "two"))])


def test_results_without_a_clip_in_common_are_taken_together(
    earmark: Command, results: dict[str, Path], clips: Path, models: list[Path], tmp_path: Path
) -> None:
    halves = [sorted(clips.glob("*.wav"))[start::2] for start in (0, 1)]
    for number, half in enumerate(halves):
        arguments = ["-o", tmp_path / f"{number}", "-m", models[0], "-q"]
        assert earmark("label", *half, *arguments).code == 0
    manifest = write_manifest(tmp_path / "truth.jsonl", rows_of(clips))
    folds = [tmp_path / "0", tmp_path / "1"]
    said = earmark("evaluate", *folds, "-t", manifest, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    assert "2 results without a clip in common, taken together" in said.out
    whole = earmark("evaluate", results["softmax"], "-t", manifest, "-o", tmp_path / "whole")
    assert whole.code == 0, whole.err
    pooled, expected = figures(tmp_path / "out"), figures(tmp_path / "whole")
    assert pooled["counts"] == expected["counts"]
    assert pooled["confusion"] == expected["confusion"]
    assert pooled["mean_average_precision"] == pytest.approx(
        expected["mean_average_precision"], rel=1e-6
    )


def test_the_segments_of_audioset_are_truth(earmark: Command, clips: Path, tmp_path: Path) -> None:
    labels = audioset_labels()
    model = write_tiny_model(
        tmp_path / "model",
        problem_type=None,
        id2label={label.index: label.name for label in labels},
        label2id={},
        num_labels=527,
    )
    # File names as the usual downloaders of AudioSet give them; the last clip has no row.
    names = ["--4gqARaEJE.wav", "Y-0_AbC.wav", "-x_30.000_40.000.wav", "y-z_30000.wav", "zzz.wav"]
    (tmp_path / "in").mkdir()
    for index, name in enumerate(names):
        shutil.copy(clips / f"clip{index}.wav", tmp_path / "in" / name)
    out = tmp_path / "out"
    assert earmark("label", tmp_path / "in", "-o", out, "-m", model, "-q").code == 0
    segments = tmp_path / "eval_segments.csv"
    segments.write_text(
        "# Segments csv created Sun Mar  5 10:54:31 2017\n"
        "# num_ytids=5, num_segs=5, num_unique_labels=4, num_positive_labels=6\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '--4gqARaEJE, 30.000, 40.000, "/m/068hy,/m/07q6cd_"\n'
        '-0_AbC, 30.000, 40.000, "/m/0bt9lr"\n'
        '-x, 30.000, 40.000, "/m/09x0r"\n'
        'y-z, 30.000, 40.000, "/m/04rlf"\n'
        'not_here, 0.000, 10.000, "/m/0bt9lr"\n'
        "broken line\n"
    )
    said = earmark("evaluate", out, "--truth", segments)
    assert said.code == 0, said.err
    found = figures(out / "evaluation")
    positives = {entry["id"]: entry["positives"] for entry in found["classes"]}
    assert {mid: count for mid, count in positives.items() if count} == dict.fromkeys(
        ("/m/068hy", "/m/07q6cd_", "/m/0bt9lr", "/m/09x0r", "/m/04rlf"), 1
    )
    assert found["counts"]["clips"] == 4
    assert found["counts"]["unreadable_rows"] == 1
    assert "5 of 527 classes in the truth" in said.out


def test_labels_that_the_model_does_not_know(
    earmark: Command, results: dict[str, Path], tmp_path: Path
) -> None:
    manifest = tmp_path / "truth.csv"
    manifest.write_text("filename,labels\nclip0.wav,Dog ;whale\nclip1.wav,whale\nclip2.wav,rain\n")
    said = earmark("evaluate", results["softmax"], "-t", manifest)
    assert said.code == 2
    assert "the truth names 1 label that" in said.err
    assert "does not know: whale; its 5 labels are such as dog, rain, rooster, …" in said.err
    arguments = ["-t", manifest, "--known-labels-only", "-o", tmp_path / "out"]
    said = earmark("evaluate", results["softmax"], *arguments)
    assert said.code == 0, said.err
    assert figures(tmp_path / "out")["counts"]["clips"] == 2
    assert "1 of the truth's labels are unknown to the model, such as whale." in said.out


def test_the_model_may_have_moved_but_not_changed(
    earmark: Command, clips: Path, truth: Path, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "model", seed=5)
    out = tmp_path / "out"
    assert earmark("label", clips, "-o", out, "-m", model, "-q").code == 0
    moved = model.rename(tmp_path / "moved")
    assert earmark("evaluate", out, "-t", truth).code == 2
    assert earmark("evaluate", out, "-t", truth, "--model", moved).code == 0
    other = write_tiny_model(tmp_path / "model", seed=6)
    said = earmark("evaluate", out, "-t", truth, "--model", other)
    assert said.code == 2
    assert "is not the model that the result was made with" in said.err


def test_results_that_cannot_be_evaluated(
    earmark: Command, results: dict[str, Path], truth: Path, tmp_path: Path
) -> None:
    cases = [
        ([results["patches"], "-t", truth], "holds neither every class's score nor the embedding"),
        ([tmp_path / "nowhere", "-t", truth], "holds no result of Earmark"),
        ([results["softmax"], "-t", tmp_path / "no.csv"], "cannot be read|no such file"),
        ([results["softmax"], "-t", results["softmax"] / "run.json"], "no labels; .* is not JSON"),
    ]
    for arguments, words in cases:
        said = earmark("evaluate", *arguments)
        assert said.code == 2, said
        assert re.search(words, said.err), said.err
    unlabelled = tmp_path / "m.csv"
    unlabelled.write_text("filename\nclip0.wav\n")
    assert "holds no labels" in earmark("evaluate", results["softmax"], "-t", unlabelled).err
    others = tmp_path / "o.csv"
    others.write_text("filename,label\nother.wav,dog\n")
    said = earmark("evaluate", results["softmax"], "-t", others)
    assert said.code == 2
    assert re.search(r"no clip of \S+ has a row in the truth: one of the clips is \S+", said.err)
    assert f"relative to its folder, {tmp_path}" in said.err
