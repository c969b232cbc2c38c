"""What is still to be done: what was found, beside what is committed; nothing is read or run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.labelling.remaining import (
    FAILURES_PER_UNIT,
    RemainingWork,
    find_remaining,
    find_units,
)
from tests.support.unit_factory import make_item
from transforms.errors import InputError
from transforms.records import Carried, Failure, Item, WorkUnit
from transforms.results.commits import (
    Commit,
    Ledger,
    LedgerItem,
    LedgerSlice,
    UnitTotals,
    container_version,
    item_version,
    part_url,
)
from transforms.results.rows import errors_schema, errors_table
from transforms.sources.read_unit import Container, Found, SourceSettings, limit_items, plan_units

SETTINGS = SourceSettings(windows_per_unit=2)
RESULT = "memory://remaining"
PARQUET = "/audio/shard.parquet"
TAR = "/audio/shard.tar.gz"  # compressed: one slice, and nobody opens it to plan


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterable[None]:
    yield
    store = fsspec.filesystem("memory")
    if store.exists("/remaining"):
        store.rm("/remaining", recursive=True)


def files(*names: str, **changes: Any) -> tuple[Item, ...]:
    return tuple(make_item(f"/audio/{name}.wav", **changes) for name in names)


def parquet(num_groups: int = 3, version: str = "v1", **changes: Any) -> Container:
    """A Parquet file of row groups with two rows each; a row is a window."""
    groups = ((2, 100),) * num_groups
    container = Container(PARQUET, PARQUET, "parquet", 10, version, row_groups=groups)
    return dataclasses.replace(container, **changes)


def tar(version: str = "v1", **changes: Any) -> Container:
    return dataclasses.replace(Container(TAR, TAR, "tar", 10, version), **changes)


def members(*names: str, version: str = "v1") -> tuple[Item, ...]:
    return tuple(
        make_item(f"{TAR}#{name}", uri=TAR, member=name, version=version) for name in names
    )


def failure_of(item: Item) -> Failure:
    return Failure(item, "read", "ManifestError", "no such column")


def commit_of(
    unit: WorkUnit, failed: Iterable[str] = (), *, rows: int = 0, broken: bool = False
) -> Commit:
    """What committing a unit leaves; ``rows`` counts the items of a whole slice."""
    items = (*unit.items, *(failure.item for failure in unit.failures))
    part = unit.container
    num_failed = len(set(failed)) + len(unit.failures)
    num_items = len(items) or rows
    return Commit(
        unit_id=unit.unit_id,
        fingerprint="f",
        replaces=unit.replaces,
        ledger=Ledger(
            unit.kind,
            part
            and LedgerSlice(
                part.uri, container_version(part.size, part.version), part.start, part.stop
            ),
            tuple(LedgerItem(item.clip_id, item_version(item)) for item in items),
        ),
        parts={},
        totals=UnitTotals(
            items=num_items,
            clips=num_items - num_failed,
            failures=num_failed,
            broken_containers=int(broken),
            windows=num_items - num_failed,
        ),
        engines=(),
    )


def committed(
    found: Found, failed: Mapping[str, Failure] | None = None, rows: int = 2
) -> dict[str, Commit]:
    """The commits of a run over ``found``, and their errors parts in memory."""
    failed = failed or {}
    commits = {}
    for unit in find_units(found, SETTINGS):
        mine = [*unit.failures, *(failed[i.clip_id] for i in unit.items if i.clip_id in failed)]
        commit = commit_of(unit, [item.clip_id for item in unit.items if item.clip_id in failed])
        if unit.container is not None and not unit.items:
            mine = [f for f in failed.values() if f.item.uri == unit.container.uri]
            broken = any(failure.is_container for failure in mine)
            names = [failure.item.clip_id for failure in mine]
            commit = commit_of(unit, names, rows=rows, broken=broken)
        commits[unit.unit_id] = commit
        if mine:
            write_errors(unit.unit_id, mine)
    return commits


def write_errors(unit_id: str, failures: list[Failure]) -> None:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, errors_schema()) as writer:
        writer.write_table(errors_table(failures, unit_id))
    url = part_url(RESULT, "errors", unit_id)
    fsspec.filesystem("memory").pipe(url.removeprefix("memory:/"), sink.getvalue().to_pybytes())


def remaining_of(
    found: Found, commits: Mapping[str, Commit], *, retry: bool = False
) -> RemainingWork:
    remaining = find_remaining(found, commits, SETTINGS, retry_from=RESULT if retry else None)
    return remaining.cut(SETTINGS)


def clip_ids(units: Iterable[WorkUnit]) -> list[list[str]]:
    return [
        [item.clip_id for item in (*unit.items, *(failure.item for failure in unit.failures))]
        for unit in units
    ]


def ranges(units: Iterable[WorkUnit]) -> list[tuple[int, int | None]]:
    return [(unit.container.start, unit.container.stop) for unit in units if unit.container]


# --- Files ---------------------------------------------------------------------------------


def test_without_commits_everything_is_to_be_done() -> None:
    bad = failure_of(make_item("list.csv#row=3"))
    found = Found(items=files("a", "b", "c"), failures=(bad,))
    remaining = remaining_of(found, {})
    assert clip_ids(remaining.units) == [
        ["/audio/a.wav", "/audio/b.wav"], ["/audio/c.wav"], ["list.csv#row=3"],
    ]  # fmt: skip
    assert remaining.num_items == 4
    assert (remaining.kept_units, remaining.found_kept_items, remaining.vanished_items) == (
        (),
        0,
        0,
    )


@pytest.mark.parametrize(
    "change",
    [
        *({"size": 11}, {"version": "v2"}, {"truth": ("dog",)}, {"metadata": '{"a": 1}'}),
        *({"uri": "/audio/b.wav"}, {"start_s": 5.0, "end_s": 9.0}, {"end_s": 3.0}),
    ],
)
def test_a_changed_file_redoes_its_unit_whole(change: dict[str, Any]) -> None:
    commits = committed(Found(items=files("a", "b", "c")))
    (old,) = (u for u, c in commits.items() if c.ledger.items[0].clip_id == "/audio/a.wav")
    a, b, c = files("a", "b", "c")
    remaining = remaining_of(Found(items=(dataclasses.replace(a, **change), b, c)), commits)
    (unit,) = remaining.units
    assert clip_ids([unit]) == [["/audio/a.wav", "/audio/b.wav"]]
    assert (unit.replaces, unit.carried) == ((old,), None)
    assert unit.unit_id not in commits
    assert (remaining.num_redone, remaining.found_kept_items) == (1, 1)
    assert old not in remaining.kept_units


def test_many_bad_lines_of_manifests_are_several_units() -> None:
    bad = tuple(failure_of(make_item(f"list.csv#row={n}")) for n in range(FAILURES_PER_UNIT + 1))
    units = remaining_of(Found(failures=bad), {}).units
    assert [len(unit.failures) for unit in units] == [FAILURES_PER_UNIT, 1]
    assert len({unit.unit_id for unit in units}) == 2
    commits = committed(Found(failures=bad[:3]))
    assert [
        len(unit.failures) for unit in remaining_of(Found(failures=bad[:5]), commits).units
    ] == [2]


def test_a_bad_line_that_has_been_mended_vanishes_and_its_item_is_new() -> None:
    commits = committed(Found(failures=(failure_of(make_item("list.csv#row=0")),)))
    remaining = remaining_of(Found(items=files("a")), commits)
    assert clip_ids(remaining.units) == [["/audio/a.wav"]]
    assert remaining.vanished_items == 1


# --- Containers ----------------------------------------------------------------------------


def test_a_container_is_cut_and_its_items_are_not_known_yet() -> None:
    remaining = remaining_of(Found(containers=(parquet(),)), {})
    assert ranges(remaining.units) == [(0, 2), (2, 4), (4, None)]
    assert remaining.num_items is None


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 4), (3, 3)])
def test_a_changed_container_is_done_anew(before: int, after: int) -> None:
    commits = committed(Found(containers=(parquet(before),)))
    found = Found(containers=(parquet(after, version="v2"),))
    remaining = remaining_of(found, commits)
    assert len(remaining.units) == after
    assert ranges(remaining.units)[0][0] == 0
    assert ranges(remaining.units)[-1][1] is None
    # One of them replaces all of the old ones, so that they go once, and none is left behind.
    assert sorted(name for unit in remaining.units for name in unit.replaces) == sorted(commits)
    assert len({unit.unit_id for unit in remaining.units} | set(commits)) == before + after
    assert (remaining.kept_units, remaining.vanished_items) == ((), 0)


@pytest.mark.parametrize("done", [{0}, {1}, {0, 1}, {1, 2}])
def test_a_changed_container_whose_redoing_was_killed_goes_on(done: set[int]) -> None:
    old = committed(Found(containers=(parquet(2),)))
    found = Found(containers=(parquet(3, version="v2"),))
    units = remaining_of(found, old).units
    commits = {u.unit_id: commit_of(u, rows=2) for i, u in enumerate(units) if i in done}
    replaced = {name for commit in commits.values() for name in commit.replaces}
    commits |= {name: commit for name, commit in old.items() if name not in replaced}
    remaining = remaining_of(found, commits)
    left = [range_ for i, range_ in enumerate(ranges(units)) if i not in done]
    assert ranges(remaining.units) == left
    kept = {units[i].unit_id for i in done}
    assert set(remaining.kept_units) == kept
    assert {name for unit in remaining.units for name in unit.replaces} == set(commits) - kept


def test_a_vanished_container_is_kept() -> None:
    commits = committed(Found(items=files("a"), containers=(parquet(),)))
    remaining = remaining_of(Found(items=files("a")), commits)
    assert remaining.units == ()
    assert (remaining.found_kept_items, remaining.vanished_kept_items) == (1, 6)


def test_a_limit_inside_a_container_leaves_the_rest_for_later() -> None:
    whole = Found(containers=(parquet(),))
    first = limit_items(whole, 3, SETTINGS)
    commits = committed(first)
    assert remaining_of(first, commits).units == ()
    assert ranges(remaining_of(whole, commits).units) == [(3, None)]


def test_members_that_a_manifest_asks_for_are_known_by_name() -> None:
    found = Found(containers=(tar(items=members("a.wav", "b.wav")),))
    commits = committed(found)
    assert remaining_of(found, commits).units == ()
    more = Found(containers=(tar(items=members("a.wav", "b.wav", "c.wav")),))
    remaining = remaining_of(more, commits)
    assert clip_ids(remaining.units) == [[f"{TAR}#c.wav"]]
    assert (remaining.num_items, remaining.found_kept_items) == (1, 2)


def test_members_of_a_changed_container_are_asked_for_again() -> None:
    commits = committed(Found(containers=(tar(items=members("a.wav", "b.wav")),)))
    asked = members("b.wav", version="v2")
    remaining = remaining_of(Found(containers=(tar("v2", items=asked),)), commits)
    (unit,) = remaining.units
    assert unit.items == asked
    assert unit.container is not None
    assert (unit.container.version, ranges([unit])) == ("v2", [(0, None)])
    assert unit.replaces == tuple(commits)
    assert unit.carried == Carried(*commits, frozenset({f"{TAR}#a.wav"}))


def test_segments_beside_the_whole_container_are_items_of_their_own() -> None:
    segment = make_item(f"{TAR}#a.wav@0.000-1.000", uri=TAR, member="a.wav", end_s=1.0)
    found = Found(containers=(tar(), tar(items=(segment,))))
    commits = committed(found)
    assert len(commits) == 2
    remaining = remaining_of(found, commits)
    assert (remaining.units, remaining.found_kept_items) == ((), 3)


@pytest.mark.parametrize("whole_first", [True, False])
def test_a_container_as_a_whole_beside_items_of_it_is_refused(whole_first: bool) -> None:
    whole = Found(containers=(tar(),))
    asked = Found(containers=(tar(items=members("a.wav")),))
    before, now = (whole, asked) if whole_first else (asked, whole)
    with pytest.raises(InputError, match=r"shard\.tar\.gz was labelled .* twice\. Give another"):
        remaining_of(now, committed(before))


@pytest.mark.parametrize("whole_first", [True, False])
def test_items_under_other_names_may_be_beside_the_whole_container(whole_first: bool) -> None:
    whole = Found(containers=(tar(),))
    named = make_item("mine", uri=TAR, member="a.wav")
    segment = make_item(f"{TAR}#a.wav@0.000-1.000", uri=TAR, member="a.wav", end_s=1.0)
    asked = Found(containers=(tar(items=(named, segment)),))
    before, now = (whole, asked) if whole_first else (asked, whole)
    remaining = remaining_of(now, committed(before))
    assert (len(remaining.units), remaining.num_redone, len(remaining.kept_units)) == (1, 0, 1)


def test_an_item_that_moved_under_its_own_name_leaves_its_unit() -> None:
    stays, goes = make_item("stays", uri="/audio/s.wav"), make_item("goes", uri="/audio/g.wav")
    inside = make_item("goes", uri=TAR, member="g.wav")
    before = Found(items=(stays, goes))
    now = Found(items=(stays,), containers=(tar(items=(inside,)),))
    commits = committed(before)
    rest, fresh = remaining_of(now, commits).units
    assert (rest.kind, rest.items, rest.replaces) == ("files", (stays,), tuple(commits))
    assert (fresh.kind, fresh.items, rest.carried) == ("tar", (inside,), None)
    done = {unit.unit_id: commit_of(unit) for unit in (rest, fresh)}
    assert remaining_of(now, done).units == ()

    back, again = remaining_of(before, done).units
    assert (back.kind, back.items, back.container, back.carried) == ("files", (), None, None)
    assert back.replaces == (fresh.unit_id,)
    assert again.items == (goes,)


def test_another_row_under_the_same_clip_id_is_a_change() -> None:
    before, after = (make_item("x", uri=PARQUET, row=row) for row in (0, 1))
    commits = committed(Found(containers=(parquet(items=(before,)),)))
    (unit,) = remaining_of(Found(containers=(parquet(items=(after,)),)), commits).units
    assert (unit.items, unit.replaces) == ((after,), tuple(commits))


# --- Trying again --------------------------------------------------------------------------


def decode_failure(item: Item) -> Failure:
    return Failure(item, "decode", "DecodeError", "not audio")


def test_failed_files_are_tried_again_beside_the_good_rows() -> None:
    found = Found(items=files("a", "b", "c"))
    commits = committed(found, {"/audio/b.wav": decode_failure(found.items[1])})
    assert remaining_of(found, commits).units == ()  # only when asked for
    remaining = remaining_of(found, commits, retry=True)
    (unit,) = remaining.units
    assert unit.items == (found.items[1],)
    assert unit.carried == Carried(unit.replaces[0], frozenset({"/audio/a.wav"}))
    assert unit.replaces[0] not in remaining.kept_units
    assert (remaining.num_retried, remaining.found_carried_items) == (1, 1)
    assert (remaining.found_kept_items, remaining.vanished_items) == (1, 0)


def test_a_failed_file_that_changed_is_redone_rather_than_tried_again() -> None:
    found = Found(items=files("a", "b"))
    commits = committed(found, {"/audio/b.wav": decode_failure(found.items[1])})
    changed = Found(items=(found.items[0], *files("b", version="v2")))
    remaining = remaining_of(changed, commits, retry=True)
    assert clip_ids(remaining.units) == [["/audio/a.wav", "/audio/b.wav"]]
    assert (remaining.num_redone, remaining.num_retried) == (1, 0)


def test_a_failed_file_that_vanished_is_not_tried_again() -> None:
    found = Found(items=files("a", "b"))
    commits = committed(found, {"/audio/b.wav": decode_failure(found.items[1])})
    remaining = remaining_of(Found(items=found.items[:1]), commits, retry=True)
    assert (remaining.units, remaining.num_retried) == ((), 0)
    assert (remaining.found_kept_items, remaining.vanished_items) == (1, 1)


def test_a_failed_file_that_vanished_keeps_its_row_beside_one_that_is_tried_again() -> None:
    settings = SourceSettings(windows_per_unit=4)
    found = Found(items=files("a", "b", "c", "d"))
    failed = [decode_failure(item) for item in found.items[:2]]
    (unit,) = find_units(found, settings)
    commits = {unit.unit_id: commit_of(unit, [failure.item.clip_id for failure in failed])}
    write_errors(unit.unit_id, failed)
    now = Found(items=found.items[1:3])  # a failed and is gone, d is good and gone
    remaining = find_remaining(now, commits, settings, retry_from=RESULT).cut(settings)
    (unit,) = remaining.units
    assert clip_ids([unit]) == [["/audio/b.wav"]]
    others = frozenset(f"/audio/{name}.wav" for name in "acd")
    assert unit.carried == Carried(unit.replaces[0], others)
    assert (remaining.found_carried_items, remaining.vanished_carried_items) == (1, 2)
    assert remaining.num_retried == 1


def test_bad_lines_are_tried_again_with_what_they_say_now() -> None:
    bad = failure_of(make_item("list.csv#row=0"))
    commits = committed(Found(failures=(bad,)))
    (unit,) = remaining_of(Found(failures=(bad,)), commits, retry=True).units
    assert (unit.items, unit.failures) == ((), (bad,))


@pytest.mark.parametrize(("container", "start"), [(parquet(1), 0), (parquet(), 2), (tar(), 0)])
def test_failed_items_of_a_slice_are_tried_again_in_it(container: Container, start: int) -> None:
    found = Found(containers=(container,))
    failed = make_item(
        f"{container.uri}#x", uri=container.uri, member="x", row=None, truth=("dog",), metadata="{}"
    )
    commits = committed(found, {failed.clip_id: decode_failure(failed)})
    chosen = {u: c for u, c in commits.items() if c.ledger.container.start == start}  # type: ignore[union-attr]
    (old,) = chosen
    remaining = remaining_of(found, chosen, retry=True)
    unit = next(unit for unit in remaining.units if unit.replaces)
    assert unit.items == (failed,)
    assert (unit.replaces, unit.carried) == ((old,), Carried(old))
    assert unit.container is not None
    ledger = commits[old].ledger.container
    assert ledger is not None
    assert (unit.container.start, unit.container.stop) == (start, ledger.stop)
    assert (remaining.num_retried, remaining.found_carried_items) == (1, 1)
    # Nothing of the container is done twice.
    covered = [range_ for u in remaining.units if not u.replaces for range_ in ranges([u])]
    assert (start, ledger.stop) not in covered


def test_a_container_that_broke_off_is_read_again_whole() -> None:
    found = Found(containers=(tar(),))
    itself = make_item(TAR)
    broken = Failure(itself, "read", "ContainerError", "ends early", is_container=True)
    (old,) = commits = committed(found, {TAR: broken})
    remaining = remaining_of(found, commits, retry=True)
    (unit,) = remaining.units
    assert (unit.items, unit.carried, unit.replaces) == ((), None, (old,))
    assert ranges([unit]) == [(0, None)]
    assert remaining.found_carried_items == 0


# --- What always holds ---------------------------------------------------------------------

names = st.sets(st.sampled_from("abcdefgh"))


@settings(max_examples=60, deadline=None)
@given(before=names, now=names, changed=names, lost=st.integers(0, 3))
def test_every_file_is_in_a_kept_unit_or_in_one_unit_to_do(
    before: set[str], now: set[str], changed: set[str], lost: int
) -> None:
    commits = committed(Found(items=files(*sorted(before))))
    commits = dict(list(commits.items())[lost:])
    items = (files(name, version="v2" if name in changed else "v1")[0] for name in sorted(now))
    found = Found(items=tuple(items))
    remaining = remaining_of(found, commits)
    kept = [i.clip_id for u in remaining.kept_units for i in commits[u].ledger.items]
    done = Counter([*kept, *(name for unit in clip_ids(remaining.units) for name in unit)])
    carried = [name for u in remaining.units if u.carried for name in u.carried.clip_ids or ()]
    known = {item.clip_id for item in found.items}
    committed_ids = {i.clip_id for commit in commits.values() for i in commit.ledger.items}
    assert done.keys() >= known
    assert set((done + Counter(carried)).values()) <= {1}
    assert set(carried) <= committed_ids - known
    # The accounting: everything committed or found is somewhere, and counted where it is.
    assert {*done, *carried} == known | committed_ids
    assert remaining.found_kept_items == len(set(kept) & known)
    assert remaining.vanished_items == len(committed_ids - known)
    replaced = Counter(name for unit in remaining.units for name in unit.replaces)
    assert replaced == Counter(commits.keys() - set(remaining.kept_units))
    # What is done stays done: with these units committed, nothing is left.
    after = {u: commits[u] for u in remaining.kept_units}
    after |= {unit.unit_id: commit_of(unit) for unit in remaining.units}
    assert remaining_of(found, after).units == ()


@settings(max_examples=60, deadline=None)
@given(num_groups=st.integers(1, 6), done=st.sets(st.integers(0, 5)), windows=st.integers(1, 7))
def test_every_row_is_in_exactly_one_slice(num_groups: int, done: set[int], windows: int) -> None:
    container = parquet(num_groups)
    planned = plan_units([], [container], SETTINGS)
    commits = {u.unit_id: commit_of(u, rows=2) for i, u in enumerate(planned) if i in done}
    changed = SourceSettings(windows_per_unit=windows)  # may differ from run to run
    units = find_remaining(Found(containers=(container,)), commits, changed).cut(changed).units
    slices = [
        *ranges(units),
        *((c.ledger.container.start, c.ledger.container.stop) for c in commits.values()),  # type: ignore[union-attr]
    ]
    num_rows = 2 * num_groups
    rows = Counter(
        row for start, stop in slices for row in range(start, num_rows if stop is None else stop)
    )
    assert rows == Counter(range(num_rows))
