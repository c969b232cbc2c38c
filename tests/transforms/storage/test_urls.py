"""Names of files: joined, split and matched by their path, whatever they are chained to."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from transforms.storage import listing, reading, urls

ZIPPED = "zip://a/b.wav::gs://bucket/x.zip"


@pytest.mark.parametrize(
    ("url", "start", "path", "end"),
    [
        ("gs://bucket/a.wav", "gs://", "bucket/a.wav", ""),
        ("https://host/a.wav?sig=1::2", "https://", "host/a.wav", "?sig=1::2"),
        (ZIPPED, "zip://", "a/b.wav", "::gs://bucket/x.zip"),
        ("zip://*.wav::/data/x.zip", "zip://", "*.wav", "::/data/x.zip"),
        ("simplecache::gs://bucket/a.wav", "simplecache::gs://", "bucket/a.wav", ""),
        ("gs://bucket/a::b.wav", "gs://", "bucket/a::b.wav", ""),
        ("/data/a::b.wav", "", "/data/a::b.wav", ""),
    ],
)
def test_a_url_is_split_around_its_path(url: str, start: str, path: str, end: str) -> None:
    assert urls.split_url(url) == (start, path, end)


def test_a_chained_url_is_named_by_its_first_part() -> None:
    assert urls.file_name(ZIPPED) == "b.wav"
    assert urls.parent(ZIPPED) == "zip://a::gs://bucket/x.zip"
    assert urls.join("zip://a::gs://bucket/x.zip", "b.wav") == ZIPPED
    assert urls.join("zip://::file:///x.zip", "b.wav") == "zip://b.wav::file:///x.zip"
    assert urls.is_glob("zip://*.wav::file:///x.zip")
    assert not urls.is_glob("zip://a.wav::file:///[x].zip")


def test_members_of_a_zip_are_listed_matched_and_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a.wav", "b.txt", "deep/c.wav"):
            archive.writestr(name, name)
    chained = f"::file://{tmp_path}/x.zip"
    matched = [info.url for info in listing.glob_files(f"zip://*.wav{chained}")]
    assert matched == [f"zip://a.wav{chained}"]
    listed = [info.url for info in listing.list_files(f"zip://{chained}")]
    assert listed == [f"zip://{name}{chained}" for name in ("a.wav", "b.txt", "deep/c.wav")]
    assert [reading.read_bytes(url) for url in listed] == [b"a.wav", b"b.txt", b"deep/c.wav"]
