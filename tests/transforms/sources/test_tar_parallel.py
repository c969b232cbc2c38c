"""A parallel walk over a tar gives what a single walk gives, whatever the members hold."""

from __future__ import annotations

import functools
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.containers import tar_bytes
from tests.support.stores.listing_store import ListingFileSystem, SparseTar
from transforms.errors import ContainerError
from transforms.sources import tar_parallel
from transforms.sources.file_kinds import WindowEstimate
from transforms.sources.tar import index_tar
from transforms.sources.tar_headers import TarMember, open_archive, walk_members
from transforms.sources.tar_parallel import walk_in_parallel

ESTIMATE = WindowEstimate(10.0, 10.0)


def check_both_walks(path: Path, span_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a single walk and a parallel one give the same members, flags and error."""
    monkeypatch.setattr(tar_parallel, "_MIN_SPAN_BYTES", span_bytes)
    open_it = functools.partial(open_archive, str(path), str(path), 200.0)
    found = []
    for is_parallel in (False, True):
        members: list[TarMember] = []
        error = None
        with open_it() as archive:
            try:
                if is_parallel:
                    members.extend(walk_in_parallel(archive, open_it, path.stat().st_size))
                else:
                    members.extend(walk_members(archive, None))
            except ContainerError as what:
                error = str(what)
            found.append((members, error, archive.global_headers))
    assert found[0] == found[1]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(0, 4000), max_size=20),
    nested=st.sets(st.integers(0, 20)),
    format_=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]),
    span_bytes=st.integers(512, 8000),
    cut=st.one_of(st.none(), st.integers(0, 100)),
    damaged=st.one_of(st.none(), st.integers(0, 60)),
)
def test_a_parallel_walk_gives_what_a_single_walk_gives(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    nested: set[int],
    format_: int,
    span_bytes: int,
    cut: int | None,
    damaged: int | None,
) -> None:
    inner = tar_bytes([("inner.wav", b"x" * 700), ("é" * 60 + ".wav", b"y" * 100)])
    members = [
        (f"{'d' * (n * 9)}/{n}.wav"[-120:], inner if n in nested else bytes(size))
        for n, size in enumerate(sizes)
    ]
    if format_ != tarfile.USTAR_FORMAT:
        members.append(("long/" * 60 + "name.wav", b"z" * 300))
    data = tar_bytes(members, format_=format_)
    if damaged is not None and damaged * 512 < len(data):
        data = data[: damaged * 512] + b"\x01" * 512 + data[(damaged + 1) * 512 :]
    if cut is not None:
        data = data[: len(data) * cut // 100]
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    check_both_walks(path, span_bytes, monkeypatch)


def test_global_headers_of_a_member_that_is_a_tar_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = io.BytesIO()
    with tarfile.open(
        fileobj=inner, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"who": "me"}
    ) as archive:
        archive.addfile(tarfile.TarInfo("a.wav"))
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes([(f"{n}.tar", inner.getvalue()) for n in range(5)]))
    check_both_walks(path, 1024, monkeypatch)
    path.write_bytes(inner.getvalue() * 3)
    check_both_walks(path, 1024, monkeypatch)


def test_many_requests_are_made_at_once() -> None:
    tar = SparseTar([2_000_000] * 300, latency_s=0.005)
    url = ListingFileSystem.add_tar("slow.tar", tar)
    one_by_one = index_tar(url, url, ESTIMATE)
    alone = tar.requests
    assert tar.most_at_once == 1
    assert index_tar(url, url, ESTIMATE, size=tar.size) == one_by_one
    assert len(one_by_one.groups) == 300
    assert tar.most_at_once > 8
    # The search for the first header of each part takes a few more.
    assert tar.requests - alone < 2 * alone
