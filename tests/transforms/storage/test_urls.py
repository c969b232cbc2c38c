"""Names of files: joined, split and matched by their path, whatever they are chained to."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from transforms.storage import listing, reading, urls

ZIPPED = "zip://a/b.wav::gs://bucket/x.zip"


@pytest.mark.parametrize(
    ("url", "start", "path", "query", "inner"),
    [
        ("gs://bucket/a.wav", "gs://", "bucket/a.wav", "", ""),
        ("https://host/a.wav?sig=1::2", "https://", "host/a.wav", "?sig=1::2", ""),
        ("https://host/a.wav#t::/x", "https://", "host/a.wav", "#t::/x", ""),
        (ZIPPED, "zip://", "a/b.wav", "", "::gs://bucket/x.zip"),
        ("zip://*.wav::/data/x.zip", "zip://", "*.wav", "", "::/data/x.zip"),
        ("zip://a::https://host/x?s=1", "zip://", "a", "", "::https://host/x?s=1"),
        ("simplecache::gs://bucket/a.wav", "simplecache::gs://", "bucket/a.wav", "", ""),
        ("gs://bucket/a::b.wav", "gs://", "bucket/a::b.wav", "", ""),
        ("/data/a::b.wav", "", "/data/a::b.wav", "", ""),
    ],
)
def test_a_url_is_split_around_its_path(
    url: str, start: str, path: str, query: str, inner: str
) -> None:
    assert urls.split_url(url) == (start, path, query, inner)


def test_the_folder_of_a_signed_url_has_nothing_of_its_query() -> None:
    assert urls.parent("https://host/in/a.wav?sig=1::/2") == "https://host/in"
    assert urls.join("https://host/in?sig=1::/2", "a.wav") == "https://host/in/a.wav?sig=1::/2"


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


def test_normalise_gives_absolute_paths_and_urls_without_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert urls.normalise("a/../b/") == str(tmp_path / "b")
    assert urls.normalise("~/x.wav") == "/home/someone/x.wav"
    assert urls.normalise("file:///x/y/") == "/x/y"
    assert urls.normalise("file://localhost/x") == "/x"
    assert urls.normalise("/") == "/"
    assert urls.normalise("gs://b/x/") == "gs://b/x"
    assert urls.normalise("memory://") == "memory://"
    assert urls.normalise("https://h/x/?a=b/") == "https://h/x/?a=b/"


def test_normalise_decodes_a_file_url_only_where_the_file_has_the_decoded_name(
    tmp_path: Path,
) -> None:
    (tmp_path / "a b").touch()
    (tmp_path / "c%20d").touch()
    assert urls.normalise(f"file://{tmp_path}/a%20b") == str(tmp_path / "a b")
    assert urls.normalise(f"file://{tmp_path}/c%20d") == str(tmp_path / "c%20d")


@pytest.mark.parametrize(
    ("url", "parent", "name"),
    [
        ("/a/b.wav", "/a", "b.wav"),
        ("/", "/", ""),
        ("gs://b/x/y.wav", "gs://b/x", "y.wav"),
        ("gs://b", "gs://b", "b"),
        ("s3://b/x?y/z", "s3://b/x?y", "z"),
        ("https://h/x/y.wav?a=b/c", "https://h/x", "y.wav"),
    ],
)
def test_parent_and_file_name(url: str, parent: str, name: str) -> None:
    assert urls.parent(url) == parent
    assert urls.file_name(url) == name


def test_join_uses_single_slashes() -> None:
    assert urls.join("/", "a") == "/a"
    assert urls.join("memory://", "a", "b/") == "memory://a/b"
    assert urls.join("gs://b/x/", "/a") == "gs://b/x/a"
