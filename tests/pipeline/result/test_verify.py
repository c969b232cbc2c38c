"""``verify`` finds every damage, and following its advice repairs the result."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main as cli
from pipeline.labelling.run import run_label
from pipeline.result.export import run_export
from pipeline.result.state import read_result, remove_result
from pipeline.result.verify import Finding, Kind, make_advice, run_verify, verify_result
from tests.support.audio_factory import noise, write
from tests.support.labelling import small_config
from transforms.errors import OutputError
from transforms.storage import reading

RERUN = "un the same earmark label command again"
CapturedText = pytest.CaptureFixture[str]
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for index in range(3):
        write(folder / f"{index}.wav", noise(1.0, seed=index), 16_000)
    return folder


@pytest.fixture(scope="module")
def label(tiny_model: Path, clips: Path) -> Callable[[Path], int]:
    """Run the same ``earmark label`` command each time: two units, of two clips and of one."""

    def run(out: Path) -> int:
        return run_label(small_config(tiny_model, out, clips), [])

    return run


@pytest.fixture(scope="module")
def whole(label: Callable[[Path], int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert label(out) == 0
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A result to damage, in a folder whose name a shell and a terminal could misread."""
    return Path(shutil.copytree(whole, tmp_path / "[bold] out"))


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def first(folder: Path) -> Path:
    """Return the first file; whose unit it is depends on the clips' times."""
    return min(path for path in folder.iterdir() if path.is_file())


def kinds(out: Path) -> list[Kind]:
    return [finding.kind for finding in verify_result(read_result(str(out)))]


def test_a_whole_result_is_called_so(out: Path, capsys: CapturedText) -> None:
    assert run_verify(str(out)) == 0
    assert capsys.readouterr().out == (
        f"{out} is whole: 2 units, 3 clips, 3 windows, 0 failures.\n"
    )


def test_what_is_said_of_a_flipped_byte_mends_it(
    label: Callable[[Path], int], out: Path, capsys: CapturedText
) -> None:
    part = "windows"
    victim = first(out / part)
    wanted = pq.read_table(victim)
    flip_byte(victim)
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert f"changed {victim}: its content has changed" in text
    assert "Then r" + RERUN in text
    commands = [line for line in text.splitlines() if line.startswith("  rm ")]
    assert len(commands) == 1
    # A run does not notice it; once the commit is removed, it redoes that unit and no other.
    assert label(out) == 0
    assert run_verify(str(out)) == 3
    kept = max((out / part).iterdir()).stat().st_mtime_ns
    subprocess.run(commands[0], shell=True, check=True)
    assert label(out) == 0
    assert run_verify(str(out)) == 0
    assert pq.read_table(victim).equals(wanted)
    assert max((out / part).iterdir()).stat().st_mtime_ns == kept


@pytest.mark.parametrize("overwrite", [False, True])
def test_parts_of_an_earlier_version_are_reported_and_the_next_run_removes_them(
    label: Callable[[Path], int], out: Path, capsys: CapturedText, overwrite: bool
) -> None:
    folders = [out / "_parts" / ("a1" * 10), out / "_parts" / ("c3" * 10)]
    ours = [
        folders[0] / "windows" / ("b2" * 10 + ".parquet"),
        folders[0] / "_commits" / ("b2" * 10 + ".json"),
        folders[1] / "errors" / ("." + "d4" * 10 + ".parquet." + "e5" * 16 + ".tmp"),
    ]
    others = [out / "_parts" / "notes.txt", folders[0] / "windows" / "mine.parquet"]
    for path in (*ours, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of an earlier version, or of somebody else")
    (out / "_SUCCESS").unlink()  # as that version left it: parts of a file that is not committed
    first(out / "_commits").unlink()
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    for folder in folders:
        assert (
            text.count(f"left over {folder}: parts of a long file, from an earlier version;") == 1
        )
    if overwrite:
        remove_result(read_result(str(out)))
        assert not (out / "run.json").exists()
    else:
        assert label(out) == 0
        assert len(read_result(str(out)).commits) == 2
        assert run_verify(str(out)) == 0
    assert not any(path.exists() for path in ours)
    assert not folders[1].exists()
    assert all(path.exists() for path in others)


def test_files_of_others_that_nobody_reads_are_only_mentioned(
    out: Path, capsys: CapturedText
) -> None:
    (out / "windows" / ".DS_Store").touch()
    assert run_verify(str(out)) == 0
    text = capsys.readouterr().out
    assert f"note {out}/windows/.DS_Store: Earmark did not write it\n" in text
    assert "is whole" in text
    assert run_verify(str(out), quiet=True) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["mine.parquet", "MINE.PARQUET", "deep/mine.parquet"])
def test_foreign_parquet_is_to_be_moved_away(out: Path, capsys: CapturedText, name: str) -> None:
    path = out / "clips" / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(first(out / "clips"), path)
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert f"foreign {path}: Earmark did not write it\n" in text
    assert "Move the foreign files away" in text
    assert RERUN not in text
    path.unlink()
    assert run_verify(str(out)) == 0


def test_an_unreadable_part_is_not_said_to_have_changed(
    out: Path, capsys: CapturedText, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_read = reading.open_read

    def refuse(url: str, *arguments: Any) -> Any:
        if url.endswith(".parquet"):
            raise PermissionError(13, "Permission denied", url)
        return open_read(url, *arguments)

    monkeypatch.setattr(reading, "open_read", refuse)
    assert set(kinds(out)) == {Kind.UNREADABLE}
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert re.search(r"unreadable .*: it cannot be read: .*Permission denied", text)
    assert "Make readable" in text
    assert "  rm " not in text
    assert RERUN not in text


def test_a_commit_that_cannot_be_read_is_one_unit_and_nobody_goes_on_beside_it(
    label: Callable[[Path], int],
    out: Path,
    capsys: CapturedText,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = first(out / "_commits")
    read_bytes = reading.read_bytes
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refuse(url: str) -> bytes:
        if Path(url) == commit:
            raise PermissionError(13, "Permission denied", url)
        return read_bytes(url)

    monkeypatch.setattr(reading, "read_bytes", refuse)
    state = read_result(str(out))
    assert (len(state.commits), dict(state.damaged)) == (1, {})
    assert set(state.unreadable) == {commit.stem}
    assert kinds(out) == [Kind.UNREADABLE]
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert f"unreadable {commit}: its commit cannot be read: Permission denied\n" in text
    assert "Make readable" in text
    assert RERUN not in text
    # A run would redo the unit, and remove what may well be whole.
    with pytest.raises(OutputError, match=r"\.json: its commit cannot be read: Permission denied"):
        label(out)
    with pytest.raises(OutputError, match="1 commits are damaged or cannot be read"):
        run_export(str(out), "csv")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    assert run_verify(str(out)) == 0


def test_commits_that_cannot_be_listed_are_told_in_words(
    label: Callable[[Path], int], out: Path, capsys: CapturedText
) -> None:
    commits = out / "_commits"
    shutil.rmtree(commits)
    commits.symlink_to(commits)  # who lists it meets an error, whatever his rights
    words = f"{commits}: Too many levels of symbolic links. Check the folder"
    assert run_verify(str(out)) == 3
    assert capsys.readouterr().out.startswith(f"unreadable {words}")
    for command in (label, lambda out: run_export(str(out), "csv")):
        with pytest.raises(OutputError, match=re.escape(words)):
            command(out)


# --- Every planted damage, by the command itself -----------------------------------------------


@pytest.fixture(scope="module")
def mixed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result with every kind of part: four units, two of them with failures, one of a tar."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "clips").mkdir()
    for index in range(4):
        write(folder / "clips" / f"{index}.wav", noise(1.0, seed=index), 16_000)
    for index in range(2):
        (folder / "clips" / f"bad{index}.wav").write_bytes(b"no audio" * 99)
    with tarfile.open(folder / "clips" / "a.tar", "w") as archive:
        archive.add(folder / "clips" / "0.wav", "x.wav")
        archive.add(folder / "clips" / "bad0.wav", "y.wav")
    arguments = ["label", str(folder / "clips"), "-o", str(folder / "out"), "-m", str(tiny_model)]
    settings = ["--set", "units.windows=2", "--set", "decode.processes=1", "-q"]
    assert cli.main([*arguments, *settings, "--max-failed", "1"]) == 0
    return folder / "out"


@pytest.fixture
def planted(mixed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed, tmp_path / "out"))


def change_commit(change: Callable[[dict[str, Any]], Any], part: str = "clips") -> Damage:
    """Change the commit of a unit that has a part of this name."""

    return lambda out: rewrite_json(out / "_commits" / f"{first(out / part).stem}.json", change)


def change_items(change: Callable[[list[Any]], Any]) -> Damage:
    """Change the ledger of a unit of files (a tar's names a range, and has no items)."""

    def damage(out: Path) -> None:
        commits = sorted((out / "_commits").iterdir())
        path = next(p for p in commits if json.loads(p.read_text())["ledger"]["items"])
        rewrite_json(path, lambda c: change(c["ledger"]["items"]))

    return damage


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def add_to(*keys: str) -> Callable[[dict[str, Any]], None]:
    """Add one to a number in a commit."""

    def change(values: dict[str, Any]) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] += 1

    return change


def rewrite_part(part: str, change: Callable[[pa.Table], pa.Table]) -> Damage:
    """Change a part's rows, and its commit so that sizes and hashes agree."""

    def damage(out: Path) -> None:
        # Which unit is first depends on the clips' times; a unit of failures alone has no clip.
        paths = sorted((out / part).glob("*.parquet"))
        path = next(path for path in paths if pq.read_metadata(path).num_rows)
        table = pq.read_table(path)
        pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)
        content = path.read_bytes()
        info = {
            "num_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "num_rows": pq.read_metadata(path).num_rows,
        }
        rewrite_json(
            out / "_commits" / f"{path.stem}.json", lambda c: c["parts"].update({part: info})
        )

    return damage


def flip(part: str) -> Damage:
    return lambda out: flip_byte(first(out / part))


def cut(part: str, num_bytes: int) -> Damage:
    def damage(out: Path) -> None:
        os.truncate(first(out / part), first(out / part).stat().st_size - num_bytes)

    return damage


def empty_footer(part: str) -> Damage:
    """The last bytes are zeros, and the size is the same: as after a power cut."""

    def damage(out: Path) -> None:
        content = first(out / part).read_bytes()
        first(out / part).write_bytes(content[:-200] + bytes(200))

    return damage


def remove(name: str) -> Damage:
    """Remove a file, or the first one in a folder."""
    return lambda out: (first(out / name) if (out / name).is_dir() else out / name).unlink()


def add_orphan(out: Path) -> None:
    shutil.copy(first(out / "windows"), out / "windows" / f"{'0' * 20}.parquet")


def add_part(out: Path) -> None:
    """A part that its commit does not name."""
    clean = next(p for p in (out / "clips").iterdir() if not (out / "errors" / p.name).exists())
    shutil.copy(first(out / "errors"), out / "errors" / clean.name)


def remove_parts(out: Path) -> None:
    unit = first(out / "errors").stem
    for part in ("windows", "clips", "errors"):
        (out / part / f"{unit}.parquet").unlink()


def remove_folder(part: str) -> Damage:
    return lambda out: shutil.rmtree(out / part)


def copy_unit(out: Path) -> None:
    """Duplicate every row of a unit, under another name that is whole in itself."""
    unit, other = first(out / "_commits").stem, "f" * 20
    for path in [*out.glob(f"*/{unit}.*")]:
        shutil.copy(path, path.with_name(f"{other}{path.suffix}"))
    rewrite_json(out / "_commits" / f"{other}.json", lambda commit: commit.update(unit_id=other))


def change_run(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda out: rewrite_json(out / "run.json", change)


def swap_parts(out: Path) -> None:
    one, other, *_ = sorted((out / "clips").iterdir())
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def double_clip(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table.slice(0, 1)])


PLANTED: dict[str, Damage] = {
    **{f"flipped byte in {part}": flip(part) for part in ("windows", "clips", "errors")},
    **{f"missing part of {part}": remove(part) for part in ("windows", "clips", "errors")},
    **{f"missing folder {part}": remove_folder(part) for part in ("windows", "errors")},
    **{f"{part} cut by {n}": cut(part, n) for part in ("windows", "clips") for n in (1, 8, 500)},
    **{f"empty footer in {part}": empty_footer(part) for part in ("windows", "clips", "errors")},
    "extra part without a commit": add_orphan,
    "extra part beside a commit": add_part,
    "swapped parts": swap_parts,
    "commit without parts": remove_parts,
    "parts without a commit": remove("_commits"),
    "no commits": remove_folder("_commits"),
    "cut commit": cut("_commits", 40),
    "empty commit": lambda out: first(out / "_commits").write_bytes(b""),
    "commit of another unit": change_commit(lambda c: c.update(unit_id="0" * 20)),
    "every clip of a unit twice": copy_unit,
    "a clip twice in a part": rewrite_part("clips", double_clip),
    "a failure twice in a part": rewrite_part("errors", double_clip),
    "a window twice in a part": rewrite_part("windows", double_clip),
    "a clip less": rewrite_part("clips", lambda table: table.slice(1)),
    "a window less": rewrite_part("windows", lambda table: table.slice(1)),
    "a failure less": rewrite_part("errors", lambda table: table.slice(1)),
    **{f"wrong count of {name}": change_commit(add_to("totals", name))
       for name in ("items", "clips", "failures", "windows", "audio_s")},
    **{f"wrong rows of {part}": change_commit(add_to("parts", part, "num_rows"), part)
       for part in ("windows", "clips", "errors")},
    "wrong size": change_commit(add_to("parts", "clips", "num_bytes")),
    "wrong hash": change_commit(lambda c: c["parts"]["clips"].update(sha256="0" * 64)),
    "wrong fingerprint": change_commit(lambda c: c.update(fingerprint="0" * 64)),
    "an item less in the ledger": change_items(lambda items: items.pop()),
    "an item more in the ledger": change_items(
        lambda items: items.append({"clip_id": "/never", "version": "1"})
    ),
    "no run.json": remove("run.json"),
    "garbage in run.json": lambda out: (out / "run.json").write_bytes(b"garbage"),
    "empty run.json": lambda out: (out / "run.json").write_bytes(b""),
    "no totals in run.json": change_run(lambda run: run.update(totals=None)),
    "another fingerprint in run.json": change_run(lambda run: run.update(fingerprint="0" * 64)),
    **{f"wrong {name} in run.json": change_run(add_to("totals", name))
       for name in ("items", "clips", "failures", "windows")},
    "no _SUCCESS": remove("_SUCCESS"),
}  # fmt: skip


@pytest.mark.parametrize("damage", PLANTED.values(), ids=PLANTED.keys())
def test_the_command_finds_every_planted_damage(
    planted: Path, capsys: CapturedText, damage: Damage
) -> None:
    assert cli.main(["verify", str(planted)]) == 0
    assert "is whole: " in capsys.readouterr().out
    damage(planted)
    assert cli.main(["verify", str(planted)]) == 3
    printed = capsys.readouterr()
    assert f"{planted} is whole" not in printed.out
    assert "Traceback" not in printed.err
    assert str(planted) in printed.out
    assert cli.main(["verify", str(planted), "-q"]) == 3


# --- What a run repairs by itself ----------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        remove("clips"),
        cut("windows", 10),
        cut("_commits", 40),
        remove("_commits"),
        add_orphan,
        change_run(add_to("totals", "clips")),
        remove("run.json"),
    ],
)
def test_what_a_run_sees_by_itself_needs_only_a_run(
    label: Callable[[Path], int], out: Path, capsys: CapturedText, damage: Damage
) -> None:
    damage(out)
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert "R" + RERUN in text
    assert "  rm " not in text
    assert f"{out} is damaged" in text
    assert label(out) == 0
    assert run_verify(str(out)) == 0


def test_an_interrupted_result_is_unfinished_and_may_be_damaged_as_well(
    label: Callable[[Path], int], out: Path, capsys: CapturedText
) -> None:
    # As a kill leaves it: a unit's parts without its commit, and no _SUCCESS.
    remove("_SUCCESS")(out)
    remove("_commits")(out)
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert f"{out} is unfinished: what is committed is whole, 1 unit," in text
    assert "damaged" not in text
    assert "R" + RERUN in text
    (out / "clips" / first(out / "_commits").with_suffix(".parquet").name).unlink()
    assert run_verify(str(out)) == 3
    text = capsys.readouterr().out
    assert f"{out} is damaged" in text
    assert "unfinished" in text
    assert label(out) == 0
    assert run_verify(str(out)) == 0


def test_a_clip_in_two_units_is_found(out: Path) -> None:
    copy_unit(out)
    found = [f for f in verify_result(read_result(str(out))) if "twice" in f.problem]
    assert found
    assert {(finding.kind, finding.unit_id) for finding in found} == {(Kind.CHANGED, "f" * 20)}


def test_a_flipped_byte_is_found_wherever_it_is(planted: Path) -> None:
    for path in sorted(planted.glob("*/*.parquet")):
        content = path.read_bytes()
        for at in range(0, len(content), max(1, len(content) // 7)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
            assert run_verify(str(planted), quiet=True) == 3, (path, at)
        path.write_bytes(content)
    assert run_verify(str(planted), quiet=True) == 0


def test_a_run_json_of_somebody_else_without_commits_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert cli.main(["verify", str(tmp_path / "run.json")]) == 2
    assert cli.main(["verify", str(tmp_path / "nowhere")]) == 2


def test_advice_is_given_once_and_for_urls_without_a_shell() -> None:
    findings = [
        Finding("a", "it has changed", Kind.CHANGED, "u1"),
        Finding("b", "it has changed", Kind.CHANGED, "u1"),
        Finding("c", "foreign", Kind.FOREIGN),
    ]
    foreign, remove, url, rerun = make_advice("gs://bucket/out", findings)
    assert foreign.startswith("Move the foreign files away")
    assert remove.startswith("A run does not see changed content; remove the commits")
    assert url == "  remove gs://bucket/out/_commits/u1.json"
    assert rerun.startswith("Then r" + RERUN)
    assert make_advice("gs://bucket/out", [Finding("x", "note", Kind.STRAY)]) == []
