"""Members of a tar that are neither audio nor siblings are ignored, and logged once."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path

import pytest

from transforms.records import ContainerSlice, EncodedClip
from transforms.sources import tar
from transforms.sources.tar import TarReader


def test_members_of_other_kinds_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "_logged_extensions", set())
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.wav", "a.json", "inner.tar", "b.xyz", "c.xyz"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"null"))
    part = ContainerSlice(str(path), str(path), path.stat().st_size, "1")
    with caplog.at_level(logging.INFO, logger="transforms.sources.tar"):
        for _ in range(2):
            (clip,) = TarReader(part, ()).read()
            assert isinstance(clip, EncodedClip)
            assert clip.item.member == "a.wav"
    assert [record.getMessage().partition("ignored: ")[2] for record in caplog.records] == [
        ".tar, the first is 'inner.tar'",
        ".xyz, the first is 'b.xyz'",
    ]
