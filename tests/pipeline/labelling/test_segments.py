"""``earmark plan --segment-s``: long recordings divided into segments, with nothing lost."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main as cli
from pipeline.config.label import RunConfig
from pipeline.labelling import headers
from pipeline.labelling.headers import HeaderReader
from pipeline.labelling.plan import LONG_FILE_S, describe_long_files
from pipeline.labelling.run import run_label
from pipeline.labelling.segments import (
    Division,
    divide,
    divide_found,
    encode_manifest,
    run_segments,
)
from pipeline.result.verify import run_verify
from tests.support.audio_factory import encode, noise
from tests.support.containers import tar_bytes
from tests.support.labelling import read_rows, small_config
from tests.support.unit_factory import make_item
from transforms.decoding.settings import DecodeSettings
from transforms.errors import UsageError
from transforms.process.progress_counts import live_counts
from transforms.process.temp_folders import scratch_folder
from transforms.records import EncodedClip, Item, WorkUnit
from transforms.results.commits import Commit
from transforms.results.write_units import OpenUnit
from transforms.sources.read_unit import SourceSettings, find_inputs
from transforms.storage import listing as storage_listing
from transforms.storage import writing

RATE_HZ = 16_000
DECODE = DecodeSettings(num_processes=1)
ENDINGS = (".jsonl", ".csv", ".parquet")


def wav(duration_s: float, seed: int = 0) -> bytes:
    return encode(noise(duration_s, RATE_HZ, seed=seed), RATE_HZ)


def division_of(*inputs: Path | str, segment_s: float = 3.0) -> Division:
    found = find_inputs([str(path) for path in inputs])
    return divide_found(found, segment_s, SourceSettings(), DECODE)


def spans(items: tuple[Item, ...] | list[Item]) -> list[tuple[float | None, float | None]]:
    return [(item.start_s, item.end_s) for item in items]


@pytest.mark.parametrize(
    ("length_s", "expected"),
    [
        (0.5, [(None, None)]),
        (900.0, [(None, None)]),
        (989.0, [(None, None)]),  # the second would be shorter than a tenth
        (991.0, [(0.0, 900.0), (900.0, None)]),
        (1800.0, [(0.0, 900.0), (900.0, None)]),
        (1889.0, [(0.0, 900.0), (900.0, None)]),
        (1891.0, [(0.0, 900.0), (900.0, 1800.0), (1800.0, None)]),
        (-5.0, [(None, None)]),  # a segment that starts behind the end of its file
    ],
)
def test_segments_follow_one_another_and_the_last_is_open(
    length_s: float, expected: list[tuple[float | None, float | None]]
) -> None:
    assert spans(divide(make_item("/a.wav"), length_s, 900.0)) == expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (make_item("/a.wav"), ["/a.wav@0.000-4.000", "/a.wav@4.000-"]),
        (
            make_item("/a.wav@1.000-9.000", uri="/a.wav", start_s=1.0, end_s=9.0),
            ["/a.wav@1.000-5.000", "/a.wav@5.000-9.000"],
        ),
        (
            make_item("/a.tar#x.wav~2", uri="/a.tar", member="x.wav"),
            ["/a.tar#x.wav~2@0.000-4.000", "/a.tar#x.wav~2@4.000-"],
        ),
        (
            make_item("/a.parquet#row=3", uri="/a.parquet", row=3),
            ["/a.parquet#row=3@0.000-4.000", "/a.parquet#row=3@4.000-"],
        ),
        (make_item("mine", uri="/a.wav"), ["mine@0.000-4.000", "mine@4.000-"]),
    ],
)
def test_a_segment_is_named_by_its_item_and_its_times(item: Item, expected: list[str]) -> None:
    assert [segment.clip_id for segment in divide(item, 8.0, 4.0)] == expected


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """A folder with a long and a short file, a tar, a Parquet file, a manifest with its own ids."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "long.wav").write_bytes(wav(10.3))
    (folder / "short.wav").write_bytes(wav(2.0))
    facts = json.dumps({"offset": 5, "site": {"name": "ü", "depth": 2}}).encode()
    members = [("a.wav", wav(7.0)), ("a.json", facts), ("b.wav", wav(1.0)), ("a.wav", wav(6.5))]
    (folder / "shard.tar").write_bytes(tar_bytes(members))
    sounds = [{"bytes": wav(seconds), "path": None} for seconds in (6.2, 1.0)]
    table = pa.table({"audio": sounds, "label": ["dog; cat", "bird"], "night": [True, False]})
    pq.write_table(table, folder / "rows.parquet")
    manifest = tmp_path / "list.jsonl"
    manifest.write_text(
        '{"uri": "in/long.wav", "clip_id": "mine", "start_s": 1, "end_s": 8, "labels": ["a;b"]}\n'
        '{"uri": "in/long.wav", "start_s": 4.5, "labels": [], "place": "north", "depth": 3}\n'
    )
    return [folder, manifest]


def facts_of(item: Item, *, as_text: bool = False) -> Item:
    """An item without its file's size and version; CSV has metadata ``as_text``."""
    metadata = json.loads(item.metadata or "{}")
    for name, value in metadata.items():
        if as_text and not isinstance(value, str):
            metadata[name] = json.dumps(value, ensure_ascii=False)
    text = json.dumps(metadata, sort_keys=True)
    truth = None if as_text and not item.truth else item.truth
    return dataclasses.replace(item, url="", size=None, version=None, truth=truth, metadata=text)


def with_safe_names(item: Item) -> Item:
    """An item whose metadata has no name that a manifest's reader takes for something else."""
    text = re.sub('"(label|offset)":', r'"\1_":', item.metadata or "{}")
    return dataclasses.replace(item, metadata=text)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_manifest_gives_the_segments_of_files_members_and_rows(
    inputs: list[Path], tmp_path: Path, ending: str
) -> None:
    division = division_of(*inputs)
    assert (division.num_found, division.num_divided) == (9, 6)
    assert (division.unknown, division.failures) == ((), ())
    expected = """
        long.wav@0.000-3.000 long.wav@3.000-6.000 long.wav@6.000-9.000 long.wav@9.000-
        mine@1.000-4.000 mine@4.000-7.000 mine@7.000-8.000
        long.wav@4.500-7.500 long.wav@7.500- short.wav
        rows.parquet#row=0@0.000-3.000 rows.parquet#row=0@3.000- rows.parquet#row=1
        shard.tar#a.wav@0.000-3.000 shard.tar#a.wav@3.000-6.000 shard.tar#a.wav@6.000-
        shard.tar#b.wav
        shard.tar#a.wav~2@0.000-3.000 shard.tar#a.wav~2@3.000-6.000 shard.tar#a.wav~2@6.000-
    """.split()
    ids = [item.clip_id.removeprefix(f"{tmp_path}/in/") for item in division.items]
    assert ids == expected
    manifest = tmp_path / f"segments{ending}"
    manifest.write_bytes(encode_manifest(division.items, ending))
    found = find_inputs([str(manifest)])
    items = [*found.items, *(item for one in found.containers for item in one.items)]
    again = {item.clip_id: facts_of(item) for item in items}
    assert not found.failures
    for item in division.items:
        expected = facts_of(with_safe_names(item), as_text=ending == ".csv")
        assert again[item.clip_id] == expected
    assert len(items) == len(division.items)


def test_a_segment_of_a_member_is_divided_within_its_end(inputs: list[Path]) -> None:
    (folder, _) = inputs
    manifest = folder / "members.csv"
    manifest.write_text(
        "uri,member,start_s,end_s\nshard.tar,a.wav,1,2\nshard.tar,a.wav,2,7\nshard.tar,a.wav,3,\n"
    )
    assert spans(division_of(manifest).items) == [
        (1.0, 2.0), (2.0, 5.0), (5.0, 7.0), (3.0, 6.0), (6.0, None)
    ]  # fmt: skip


def test_a_column_of_several_types_is_text_in_parquet(tmp_path: Path) -> None:
    items = [make_item(f"/{n}.wav", metadata=f'{{"a": {n}}}') for n in ("1", '"x"', "[2]")]
    table = pq.read_table(io.BytesIO(encode_manifest(items, ".parquet")))
    assert table["a"].to_pylist() == ["1", "x", "[2]"]
    assert table["uri"].to_pylist() == [item.uri for item in items]


def test_every_segment_becomes_a_clip_and_together_they_are_the_file(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = tmp_path / "in"
    audio.mkdir()
    (audio / "long.flac").write_bytes(encode(noise(10.3, 44_100), 44_100, "flac"))
    (audio / "short.wav").write_bytes(wav(2.0))
    manifest = tmp_path / "segments.csv"
    command = ["plan", str(audio), "--segment-s", "3", "--manifest", str(manifest)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert f"{manifest}: 5 clips; 1 of 2 items divided into segments of 3 s.\n" in printed
    assert f"To label them: earmark label {manifest} --output DIR\n" in printed
    assert run_label(small_config(tiny_model, tmp_path / "out", manifest), []) == 0
    rows = read_rows(tmp_path / "out", "clips")
    lengths = {row["clip_id"].rpartition("/")[2]: row["duration_s"] for row in rows}
    expected = {f"long.flac@{n}.000-{n + 3}.000": 3.0 for n in (0, 3, 6)}
    expected |= {"long.flac@9.000-": 1.3, "short.wav": 2.0}
    assert lengths == pytest.approx(expected)
    assert not any(row["warning"] for row in rows)


class KilledError(Exception):
    """Ends a run inside a unit."""


@pytest.mark.parametrize(("is_divided", "num_kept"), [(False, 0), (True, 2)])
def test_a_run_killed_inside_a_file_labels_it_again_and_committed_segments_stay(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_divided: bool,
    num_kept: int,
) -> None:
    audio, manifest = tmp_path / "long.wav", tmp_path / "segments.jsonl"
    audio.write_bytes(wav(9.0))
    manifest.write_bytes(encode_manifest(division_of(audio).items, ".jsonl"))
    inputs = manifest if is_divided else audio
    changes = {"window": {"length_s": 1.0}, "units": {"windows": 3}}
    config = small_config(tiny_model, tmp_path / "out", inputs, **changes)
    commit, committed = OpenUnit.commit, []

    def dying(unit: OpenUnit) -> Commit:
        if len(committed) == num_kept:
            raise KilledError
        committed.append(commit(unit))
        return committed[-1]

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="KilledError"):
        patched.setattr(OpenUnit, "commit", dying)
        run_label(config, [])
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/clips/*.parquet")}
    assert len(kept) == num_kept
    windows_before = live_counts.windows
    assert run_label(config, []) == 0
    assert live_counts.windows - windows_before == 9 - 3 * num_kept
    assert run_verify(str(tmp_path / "out"), quiet=True) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(tmp_path.glob("out/clips/*.parquet"))) == (3 if is_divided else 1)


def flac_that_promises(num_samples: int, duration_s: float = 10.0) -> bytes:
    data = bytearray(encode(noise(duration_s, RATE_HZ), RATE_HZ, "flac"))
    packed = int.from_bytes(data[18:26], "big")
    data[18:26] = (packed >> 36 << 36 | num_samples).to_bytes(8, "big")
    return bytes(data)


def test_audio_beyond_what_a_header_promises_is_in_the_last_segment(tmp_path: Path) -> None:
    path = tmp_path / "liar.flac"
    path.write_bytes(flac_that_promises(7 * RATE_HZ))  # of ten seconds, which its frames tell
    assert spans(division_of(path).items) == [(0.0, 3.0), (3.0, 6.0), (6.0, 9.0), (9.0, None)]


@pytest.mark.parametrize("num_samples", [0, (1 << 36) - 1])
def test_a_header_that_promises_nothing_or_too_much_leaves_the_file_whole(
    tmp_path: Path, num_samples: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "liar.flac"
    path.write_bytes(flac_that_promises(num_samples))
    config = RunConfig.model_validate({"inputs": [str(path)]})
    manifest = tmp_path / "segments.jsonl"
    assert run_segments(config, 3.0, str(manifest)) == 0
    assert json.loads(manifest.read_text()) == {"uri": str(path), "clip_id": str(path)}
    printed = capsys.readouterr().out
    assert f"Kept whole, because no header tells the length: 1 item, such as {path}.\n" in printed


def test_what_cannot_be_opened_stays_whole_and_labelling_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(bytes(9_000))
    (tmp_path / "b.wav").write_bytes(wav(7.0))
    listing = tmp_path / "list.csv"
    listing.write_text("uri\na.wav\nb.wav\ngone.wav\n")
    division = division_of(listing)
    assert [item.clip_id for item in division.unknown] == [
        str(tmp_path / "a.wav"), str(tmp_path / "gone.wav")
    ]  # fmt: skip
    divided = [(0.0, 3.0), (3.0, 6.0), (6.0, None)]
    assert spans(division.items) == [(None, None), *divided, (None, None)]


def test_a_header_that_takes_its_process_along_has_no_length(tmp_path: Path) -> None:
    crashes = (
        "import os, signal, sys\n"
        "from transforms.decoding import child\n"
        "read = child.read_length_s\n"
        "def crash(source, on_progress):\n"
        "    if 'bad' in str(source):\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return read(source, on_progress)\n"
        "child.read_length_s = crash\n"
        "child.serve(sys.argv[1:])\n"
    )
    lengths = []
    with HeaderReader(DECODE, worker_command=(sys.executable, "-c", crashes)) as reader:
        for name in ("good", "bad", "better"):
            path = tmp_path / f"{name}.wav"
            path.write_bytes(wav(7.0))
            lengths.append(reader.read_length_s(EncodedClip(Item(name, name), path=str(path))))
    assert lengths == [7.0, None, 7.0]


@pytest.fixture
def remote() -> Iterator[str]:
    """A folder in a store, with what a recorder writes."""
    folder = "memory://recorder"
    for name in ("wav", "flac", "ogg", "mp3", "m4a"):
        data = encode(noise(60.0, 44_100, amplitude=0.3), 44_100, name)
        writing.write_bytes(f"{folder}/{name}.{name}", data)
    writing.write_bytes(f"{folder}/short.wav", wav(1.0))
    yield folder
    for file in list(storage_listing.list_files(folder)):
        writing.remove(file.url)


def test_of_a_remote_file_only_its_edges_are_fetched(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "EDGE_BYTES", 100_000)
    num_fetched = 0
    copy = headers._copy_edges

    def counting(source: io.BufferedReader, target: io.BufferedWriter) -> None:
        nonlocal num_fetched
        copy(source, target)
        size = target.seek(0, io.SEEK_END)
        assert size == source.seek(0, io.SEEK_END)
        with open(target.name, "rb") as file:
            num_fetched += np.count_nonzero(np.frombuffer(file.read(), np.uint8))

    monkeypatch.setattr(headers, "_copy_edges", counting)
    before = set(scratch_folder().iterdir())
    division = division_of(remote, segment_s=20.0)
    assert division.num_found == 6
    assert division.unknown == ()
    assert division.num_divided == 5
    assert 200_000 < num_fetched <= 5 * 2 * 100_000  # of more than 10 MB
    assert set(scratch_folder().iterdir()) == before


def test_an_item_of_a_tar_beyond_the_bound_stays_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "a.tar", wav(7.0)
    path.write_bytes(tar_bytes([("a.wav", data)]))
    given = {"inputs": [str(path)], "decode": {"max_item_bytes": len(data) - 1}}
    manifest = tmp_path / "segments.jsonl"
    assert run_segments(RunConfig.model_validate(given), 3.0, str(manifest)) == 0
    assert "start_s" not in json.loads(manifest.read_text())
    assert "Kept whole" in capsys.readouterr().out


def test_a_container_that_breaks_off_is_told_and_the_code_is_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(tar_bytes([("a.wav", wav(7.0)), ("b.wav", wav(7.0))])[:300_000])
    manifest = tmp_path / "segments.parquet"
    config = RunConfig.model_validate({"inputs": [str(path)]})
    assert run_segments(config, 3.0, str(manifest)) == 3
    assert pq.read_table(manifest)["start_s"].to_pylist() == [0.0, 3.0, 6.0]
    printed = capsys.readouterr().out
    assert "Could not be read, and not in the manifest: 1 line or container, such as" in printed


@pytest.mark.parametrize(
    ("segment_s", "manifest", "message"),
    [
        (None, "a.csv", "--manifest needs --segment-s SECONDS"),
        (900.0, None, "--segment-s needs --manifest FILE"),
        (0.5, "a.csv", "--segment-s is 0.5; must be at least 1"),
        (float("nan"), "a.csv", "--segment-s is nan; must be"),
        (900.0, "a.txt", r"--manifest is .*a\.txt; must end in one of \.jsonl, \.csv, \.parquet"),
        (900.0, "there.csv", r"there\.csv exists; give another --manifest"),
    ],
)
def test_wrong_options_are_found_before_anything_is_read(
    tmp_path: Path, segment_s: float | None, manifest: str | None, message: str
) -> None:
    (tmp_path / "there.csv").write_text("mine")
    config = RunConfig.model_validate({"inputs": [str(tmp_path / "gone")]})
    with pytest.raises(UsageError, match=message):
        run_segments(config, segment_s, None if manifest is None else str(tmp_path / manifest))
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_a_manifest_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(7.0))
    manifest = tmp_path / "segments.csv"
    manifest.write_text("mine")
    config = RunConfig.model_validate({"inputs": [str(tmp_path / "a.wav")], "overwrite": True})
    assert run_segments(config, 3.0, str(manifest)) == 0
    assert len(manifest.read_text().splitlines()) == 4


def test_plan_and_label_name_long_files_and_the_command_that_divides_them() -> None:
    num_bytes = 88_200 * LONG_FILE_S
    items = (
        make_item("/a/short.wav", size=num_bytes),
        make_item("/a/segment.wav", start_s=0.0, end_s=9.0, size=9 * num_bytes),
        make_item("/a/day.wav", size=9 * num_bytes),
        make_item("/a/night.flac", size=num_bytes),
        make_item("/a/unknown.wav", size=None),
    )
    assert describe_long_files([WorkUnit("u", "files", items[:2])]) == []
    assert describe_long_files([WorkUnit("u", "files", items)]) == [
        "/a/day.wav and 1 other: probably longer than 15 minutes, and labelled in one go; to "
        "divide: earmark plan INPUT… --segment-s 900 --manifest segments.jsonl"
    ]
