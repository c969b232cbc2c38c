"""The door to storage: names, whole writes, and what an error may say."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import fsspec
import pytest
import requests
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from transforms.errors import OutputError, UsageError
from transforms.storage import filesystem, listing, reading, retries, secrets, urls, writing
from transforms.storage.secrets import public_uri

_numbers = itertools.count()


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "in")
        return
    yield f"memory://storage-{next(_numbers)}/in"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


AWS = "https://b.s3.amazonaws.com/a%20b.wav"
AZURE = "https://acc.blob.core.windows.net/c/a.wav"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            f"{AWS}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA%2F20260101%2Feu-west-1"
            "%2Fs3%2Faws4_request&X-Amz-Date=20260101T000000Z&X-Amz-Expires=3600"
            "&X-Amz-SignedHeaders=host&X-Amz-Security-Token=IQoJ&X-Amz-Signature=0f3a",
            AWS,
        ),
        (f"{AWS}?versionId=3&X-Amz-Signature=0f3a", f"{AWS}?versionId=3"),
        (f"{AWS}?AWSAccessKeyId=AKIA&Signature=vjb%3D&Expires=1141889120", AWS),
        (
            "https://storage.googleapis.com/b/a.wav?X-Goog-Algorithm=GOOG4-RSA-SHA256"
            "&X-Goog-Credential=x&X-Goog-Signature=ab&X-Goog-Expires=900&generation=7",
            "https://storage.googleapis.com/b/a.wav?generation=7",
        ),
        (
            "https://storage.googleapis.com/b/a.wav?GoogleAccessId=x%40y&Expires=9&Signature=ab",
            "https://storage.googleapis.com/b/a.wav",
        ),
        (
            "https://d111.cloudfront.net/a.wav?size=large&Policy=eyJ&Signature=nit&Key-Pair-Id=K2",
            "https://d111.cloudfront.net/a.wav?size=large",
        ),
        (
            f"{AZURE}?sv=2024-11-04&st=2026-01-01T00%3A00Z&se=2026-01-02T00%3A00Z&sr=b&sp=r"
            "&spr=https&skoid=1&sktid=2&skt=3&ske=4&sks=b&skv=5&sig=Zm9v%3D&snapshot=9",
            f"{AZURE}?snapshot=9",
        ),
        ("https://h/a.wav?token=s3cret&alt=media", "https://h/a.wav?alt=media"),
        ("https://h/a.wav?access_token=s3cret#t=3", "https://h/a.wav#t=3"),
        ("https://user:pass@h/a.wav", "https://h/a.wav"),
        ("https://ghp_secret@h/a.wav", "https://h/a.wav"),
        ("sftp://user:pass@h/a.wav", "sftp://h/a.wav"),
        ("sftp://user:p@ss@h/a@2x.wav", "sftp://h/a@2x.wav"),
        ("https://user:p@ss@h/a@2x.wav", "https://h/a@2x.wav"),
        ("simplecache::https://ghp_secret@h/a.wav", "simplecache::https://h/a.wav"),
        ("https://h/a.wav?id=1&password=x&jwt=y&client_secret=z", "https://h/a.wav?id=1"),
        ("https://h/a.wav?id=1;sig=x;v=2", "https://h/a.wav?id=1;v=2"),
        ("https://h/a.wav?sig=x;v=2", "https://h/a.wav?v=2"),
        ("https://h/a;sig=x/b;v=2.wav", "https://h/a/b;v=2.wav"),
        ("https://h/a.wav#access_token=x&state=7", "https://h/a.wav#state=7"),
        ("https://h/a.wav?id=1#access_token=x", "https://h/a.wav?id=1"),
        ("https://h/a.wav#", "https://h/a.wav#"),
        ("https://h/a.wav?#t=3", "https://h/a.wav?#t=3"),
        # What is not a signature is part of the name.
        ("sftp://user@h/a.wav", "sftp://user@h/a.wav"),
        ("https://h/get?id=7&expires=soon&st=1&se=2", "https://h/get?id=7&expires=soon&st=1&se=2"),
        ("https://h/a@2x.wav?q=a@b:c@d", "https://h/a@2x.wav?q=a@b:c@d"),
        ("abfs://c@acc.dfs.core.windows.net/a", "abfs://c@acc.dfs.core.windows.net/a"),
        ("hf://datasets/u/r@main/a.wav", "hf://datasets/u/r@main/a.wav"),
        ("s3://b/what?.wav", "s3://b/what?.wav"),
        ("gs://b/a;sig=1#token=2.wav", "gs://b/a;sig=1#token=2.wav"),
        ("https://h/a;v=1.wav?q=1;2#t=1,2", "https://h/a;v=1.wav?q=1;2#t=1,2"),
        ("/data/a?token=x.wav", "/data/a?token=x.wav"),
    ],
)
def test_public_uri_drops_signatures_and_nothing_else(url: str, expected: str) -> None:
    assert public_uri(url) == expected


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


def test_write_then_read_stat_list_remove(folder: str) -> None:
    url = urls.join(folder, "sub", "a #@%.bin")
    writing.write_bytes(url, b"one")
    writing.write_bytes(url, b"three")
    assert reading.read_bytes(url) == b"three"
    with reading.open_read(url) as file:
        assert file.seekable()
        file.seek(2)
        assert file.read() == b"ree"
    info = filesystem.stat(url)
    assert (info.url, info.size) == (url, 5)
    assert info.version
    assert filesystem.exists(url) and filesystem.exists(folder)
    assert filesystem.is_folder(folder) and not filesystem.is_folder(url)
    assert listing.list_names(urls.join(folder, "sub")) == ["a #@%.bin"]
    assert listing.list_names(folder) == []
    assert list(listing.list_files(folder)) == [info]
    writing.remove(url)
    writing.remove(url)
    assert not filesystem.exists(url)
    assert listing.list_names(urls.join(folder, "absent")) == []


def test_version_changes_with_the_content(folder: str) -> None:
    url = urls.join(folder, "a")
    writing.write_bytes(url, b"1")
    before = filesystem.stat(url).version
    writing.write_bytes(url, b"2")
    assert filesystem.stat(url).version != before


def test_list_files_is_recursive_and_sorted(folder: str) -> None:
    names = ["b.wav", "a/z.wav", "a.wav", "a/b/c.wav", "é.wav"]
    for name in names:
        writing.write_bytes(urls.join(folder, name), b"x")
    found = [info.url for info in listing.list_files(folder)]
    assert found == sorted(urls.join(folder, name) for name in names)


def test_glob_files(folder: str) -> None:
    for name in ("a/1.wav", "a/2.mp3", "b/3.wav", "b/c/4.wav"):
        writing.write_bytes(urls.join(folder, name), b"x")

    def matches(pattern: str) -> list[str]:
        found = listing.glob_files(urls.join(folder, pattern))
        return [info.url.removeprefix(folder + "/") for info in found]

    assert matches("*/*.wav") == ["a/1.wav", "b/3.wav"]
    assert matches("**/*.wav") == ["a/1.wav", "b/3.wav", "b/c/4.wav"]
    assert matches("[b]") == ["b/3.wav", "b/c/4.wav"]
    assert matches("*.flac") == []


def test_a_pattern_of_any_depth_follows_each_link_once(tmp_path: Path) -> None:
    for name in ("x.wav", "a/y.wav", "a/b/z.wav", "a/b/n.txt", "a/.hidden/q.wav", "a/.k.wav"):
        writing.write_bytes(f"{tmp_path}/{name}", b"1")
    for number in range(4):  # followed round and round, these are a million folders
        (tmp_path / "a" / "b" / f"loop{number}").symlink_to(tmp_path)

    def found(pattern: str) -> list[str]:
        return [info.url[len(str(tmp_path)) + 1 :] for info in listing.glob_files(pattern)]

    assert found(f"{tmp_path}/**/*.wav") == ["a/b/z.wav", "a/y.wav", "x.wav"]
    assert found(f"{tmp_path}/**") == ["a/b/n.txt", "a/b/z.wav", "a/y.wav", "x.wav"]
    assert found(f"{tmp_path}/*/b/**") == ["a/b/n.txt", "a/b/z.wav"]
    assert found(f"{tmp_path}/**/b/*.wav") == ["a/b/z.wav"]
    assert found(f"{tmp_path}/nowhere/**") == []
    assert found(f"{tmp_path}/a/**.wav") == ["a/y.wav"]  # no component of its own: a plain star


def test_an_encoded_signature_in_a_librarys_words_is_scrubbed() -> None:
    url = "s3://bucket/a b.wav?X-Amz-Signature=0a1b2c3d4e&X-Amz-Credential=KEY%2F2026&v=1"
    query = quote(url.partition("?")[2], safe="")
    words = secrets.scrub(f"no connection to http://host/bucket/a%20b.wav%3F{query} (2 tries)", url)
    assert "0a1b2c3d4e" not in words
    assert "KEY" not in words
    assert words.endswith("(2 tries)")


def test_stat_many_gives_errors_in_place(folder: str) -> None:
    there, absent = urls.join(folder, "a"), urls.join(folder, "b")
    writing.write_bytes(there, b"x")
    found = filesystem.stat_many([absent, there, absent])
    assert list(found) == [absent, there]
    assert isinstance(found[absent], FileNotFoundError)
    assert found[there] == filesystem.stat(there)
    assert filesystem.stat_many([]) == {}


def test_put_file_moves(folder: str, tmp_path: Path) -> None:
    source = tmp_path / "staged"
    source.write_bytes(b"data")
    url = urls.join(folder, "x", "part")
    writing.put_file(str(source), url)
    assert reading.read_bytes(url) == b"data"
    assert not source.exists()


def test_get_file_copies_and_leaves_nothing_on_error(folder: str, tmp_path: Path) -> None:
    url, target = urls.join(folder, "a"), tmp_path / "copy"
    writing.write_bytes(url, b"data")
    reading.get_file(url, str(target))
    assert target.read_bytes() == b"data"
    with pytest.raises(FileNotFoundError):
        reading.get_file(urls.join(folder, "b"), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_put_file_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "staged"
    source.write_bytes(b"data")
    real = os.replace

    def replace(a: Any, b: Any) -> None:
        if str(a) == str(source):
            raise OSError(18, "Invalid cross-device link")
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    writing.put_file(str(source), str(tmp_path / "out" / "part"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part"]
    assert (tmp_path / "out" / "part").read_bytes() == b"data"
    assert not source.exists()


def test_a_failed_local_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "a")
    writing.write_bytes(url, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        writing.write_bytes(url, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert reading.read_bytes(url) == b"old"


def test_create_bytes_makes_a_file_once_and_never_replaces_it(folder: str) -> None:
    url = urls.join(folder, "new", "lease")
    assert writing.create_bytes(url, b"mine") is True
    assert writing.create_bytes(url, b"another's") is False
    assert reading.read_bytes(url) == b"mine"
    assert listing.list_names(urls.join(folder, "new")) == ["lease"]
    writing.remove(url)
    assert writing.create_bytes(url, b"third") is True


def test_create_bytes_lets_one_of_many_win(tmp_path: Path) -> None:
    url = str(tmp_path / "lease")
    start = threading.Barrier(16)

    def create(number: int) -> bool:
        start.wait()
        return writing.create_bytes(url, b"%d" % number)

    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(create, range(16)))
    assert made.count(True) == 1
    assert reading.read_bytes(url) == b"%d" % made.index(True)


def test_create_bytes_on_a_file_system_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted", source)

    monkeypatch.setattr(os, "link", link)
    url = str(tmp_path / "out" / "lease")
    assert writing.create_bytes(url, b"mine") is True
    assert writing.create_bytes(url, b"another's") is False
    assert reading.read_bytes(url) == b"mine"
    assert listing.list_names(str(tmp_path / "out")) == ["lease"]


def test_create_bytes_where_the_store_has_no_exclusive_write(tmp_path: Path) -> None:
    url = f"disk:/{tmp_path}/out/lease"
    assert writing.create_bytes(url, b"mine") is True
    assert writing.create_bytes(url, b"another's") is False
    assert (tmp_path / "out" / "lease").read_bytes() == b"mine"


@pytest.mark.parametrize(("num_short", "is_stored"), [(2, True), (99, False)])
def test_what_the_store_has_only_in_part_is_uploaded_again(
    num_short: int, is_stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = itertools.count()

    def put_file(self: Any, lpath: str, rpath: str, **kwargs: Any) -> None:
        data = Path(lpath).read_bytes()
        self.pipe_file(rpath, data[:3] if next(tries) < num_short else data)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    source = tmp_path / "staged"
    source.write_bytes(b"all of it")
    if is_stored:
        writing.put_file(str(source), "memory://short/part")
        assert reading.read_bytes("memory://short/part") == b"all of it"
    else:
        with pytest.raises(OSError, match="9 bytes were written, and the store has 3 of them"):
            writing.put_file(str(source), "memory://short/part")
    assert source.exists() is not is_stored
    MemoryFileSystem.store.clear()


class _DiskFileSystem(LocalFileSystem):
    """A remote file system that shows files while they grow, as sftp does."""

    protocol = "disk"
    fails = False

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:  # type: ignore[override]
        if self.fails:
            Path(self._strip_protocol(rpath)).write_bytes(b"trunca")
            raise RuntimeError("connection lost")
        super().put_file(lpath, rpath, **kwargs)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:  # type: ignore[override]
        return "/" + str(path).removeprefix("disk://").strip("/")


fsspec.register_implementation("disk", _DiskFileSystem, clobber=True)


def test_a_file_system_without_whole_uploads_gets_a_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"disk:/{tmp_path}/out/part"
    source = tmp_path / "staged"
    source.write_bytes(b"first")
    writing.put_file(str(source), url)
    assert (tmp_path / "out" / "part").read_bytes() == b"first"
    source.write_bytes(b"second")
    monkeypatch.setattr(_DiskFileSystem, "fails", True)
    with pytest.raises(OSError, match="connection lost"):
        writing.put_file(str(source), url)
    assert (tmp_path / "out" / "part").read_bytes() == b"first"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part"]
    assert source.exists()


def test_listing_a_remote_file_system_tells_of_folders_it_cannot_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.wav", "b/2.wav"):
        writing.write_bytes(f"{tmp_path}/{name}", b"x")
    real = _DiskFileSystem.ls

    def ls(self: Any, path: str, **kwargs: Any) -> Any:
        if path.endswith("/a"):
            raise PermissionError("no")
        return real(self, path, **kwargs)

    monkeypatch.setattr(_DiskFileSystem, "ls", ls)
    errors: list[OSError] = []
    found = list(listing.list_files(f"disk:/{tmp_path}", errors.append))
    assert [info.url for info in found] == [f"disk:/{tmp_path}/b/2.wav"]
    assert [type(error) for error in errors] == [PermissionError]
    assert "/a:" in str(errors[0])


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "in" / "deep" / "a.wav").touch()
    (tmp_path / "outside" / "b.wav").touch()
    (tmp_path / "in" / "deep" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "0-again").symlink_to(tmp_path / "in" / "deep")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "in" / "gone.wav").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in" / "pipe.wav")
    found = [info.url for info in listing.list_files(str(tmp_path / "in"))]
    assert [url.removeprefix(f"{tmp_path}/in/") for url in found] == [
        "deep/a.wav",
        "gone.wav",
        "link/b.wav",
        "pipe.wav",
    ]


def test_a_link_to_itself_is_an_error_beside_the_rest(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").touch()
    (tmp_path / "in" / "self").symlink_to("self")
    for listed in (f"{tmp_path}/in", f"{tmp_path}/i*"):
        list_them = listing.glob_files if "*" in listed else listing.list_files
        errors: list[OSError] = []
        found = list(list_them(listed, errors.append))
        assert [info.url for info in found] == [f"{tmp_path}/in/a.wav"]
        assert [error.filename for error in errors] == [f"{tmp_path}/in/self"]
        with pytest.raises(OSError, match="symbolic links"):
            list(list_them(listed))


def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.wav", "b/2.wav"):
        writing.write_bytes(f"{tmp_path}/{name}", b"x")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        list(listing.list_files(str(tmp_path)))
    errors: list[OSError] = []
    found = list(listing.list_files(str(tmp_path), errors.append))
    assert [info.url for info in found] == [f"{tmp_path}/b/2.wav"]
    assert [error.filename for error in errors] == [f"{tmp_path}/a"]


def test_reading_a_pipe_or_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(OSError, match="pipe, socket or device"):
        reading.open_read(str(tmp_path / "pipe.wav"))
    with pytest.raises(IsADirectoryError):
        reading.read_bytes(str(tmp_path))
    with pytest.raises(IsADirectoryError):
        filesystem.stat(str(tmp_path))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "s3://b/x",
            r"s3:// needs the extra \[s3\]: run pip install '.\[s3\]' in Earmark's checkout",
        ),
        (
            "az://b/x",
            r"az:// needs the extra \[azure\]: run pip install '.\[azure\]' in Earmark's checkout",
        ),
        ("nope://b/x", "Protocol not known: nope"),
    ],
)
def test_a_protocol_that_cannot_work_is_a_usage_error(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(protocol: str, **kwargs: Any) -> Any:
        if protocol == "nope":
            raise ValueError("Protocol not known: nope")
        raise ImportError(f"Install what {protocol} needs")

    monkeypatch.setattr(fsspec.core, "filesystem", missing)
    with pytest.raises(UsageError, match=message):
        reading.read_bytes(url)


def test_http_cannot_be_written() -> None:
    with pytest.raises(OutputError, match="can be read, not written"):
        writing.write_bytes("https://h/x?sig=SECRET", b"")


class _BrokenFileSystem(MemoryFileSystem):
    """A store that fails, and quotes the whole URL as it does so."""

    protocol = "broken"
    error: Exception

    def info(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise self.error

    cat_file = open = info  # type: ignore[assignment]


fsspec.register_implementation("broken", _BrokenFileSystem, clobber=True)


class _HttpError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_HttpError(403, "GET https://h/a?X-Amz-Signature=SECRET failed"), PermissionError),
        (_HttpError(404, "https://u:SECRET@h/a?b=1"), FileNotFoundError),
        (_HttpError(500, "see broken://h/a?sig=SECRET"), OSError),
        (TimeoutError("https://h/?token=SECRET"), TimeoutError),
        (PermissionError("https://h/?token=SECRET"), PermissionError),
    ],
)
def test_errors_are_os_errors_without_secrets(
    error: Exception, expected: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_BrokenFileSystem, "error", error, raising=False)
    url = "broken://h/a?sig=SECRET&v=1"
    for act in (filesystem.stat, reading.read_bytes):
        with pytest.raises(expected) as caught:
            act(url)
        assert type(caught.value) is expected
        assert "broken://h/a?v=1" in str(caught.value)
        assert "SECRET" not in str(caught.value)
        assert caught.value.__suppress_context__
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        *((_HttpError(status, ""), True) for status in (408, 425, 429, 500, 502, 503, 504, 599)),
        *((_HttpError(status, ""), False) for status in (400, 401, 403, 404, 409, 410, 412, 416)),
        *((_HttpError(status, ""), False) for status in (501, 505)),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (ConnectionRefusedError(111, "Connection refused"), True),
        (TimeoutError(), True),
        (retries.ShortBodyError("3 of 9"), True),
        (json.JSONDecodeError("Expecting value", "", 0), True),
        (aiohttp.ClientPayloadError("Response payload is not completed"), True),
        (aiohttp.ServerDisconnectedError(), True),
        (requests.exceptions.ConnectionError(), True),
        (aiohttp.InvalidURL("http://["), False),
        (OSError(28, "No space left on device"), False),
        (PermissionError(13, "Permission denied"), False),
        (FileNotFoundError("x"), False),
        (ValueError("x"), False),
    ],
    ids=repr,
)
def test_which_errors_may_pass(error: Exception, may_pass: bool) -> None:
    assert retries.may_pass(error) is may_pass
    wrapped = FileNotFoundError("http says so to everything")
    wrapped.__cause__ = error
    assert retries.may_pass(wrapped) is may_pass


def test_a_store_is_asked_again_until_it_answers_or_patience_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 0.2)
    errors: list[Exception] = [TimeoutError("a")] * 4

    def act() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert retries.ask("store", act, retries.may_pass) == "done"
    assert caplog.records == []
    errors = [TimeoutError("b")] * 100_000
    with pytest.raises(TimeoutError, match="b") as caught:
        retries.ask("store", act, retries.may_pass)
    (note,) = caught.value.__notes__
    assert re.fullmatch(r"tried \d+ times in 0 s; check the network, and try again later", note)
    left = len(errors)
    with pytest.raises(TimeoutError, match="b"):
        retries.ask("store", act, retries.may_pass)
    assert left - len(errors) == 1  # it was given up on a moment ago
    time.sleep(0.25)
    with pytest.raises(TimeoutError, match="b"):
        retries.ask("store", act, retries.may_pass)
    assert left - len(errors) > 2


def test_who_has_never_answered_is_given_up_on_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 0.4)
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 0.05)

    def seconds_until_given_up(store: str, *errors: Exception) -> float:
        left = list(errors)

        def act() -> None:
            raise left.pop(0) if len(left) > 1 else left[0]

        began_s = time.monotonic()
        with pytest.raises(type(errors[-1])):
            retries.ask(store, act, retries.may_pass)
        return time.monotonic() - began_s

    refused = ConnectionRefusedError("refused")
    assert seconds_until_given_up("never", refused) < 0.3
    tls = OSError("certificate")
    tls.__cause__ = type("ClientSSLError", (Exception,), {})()
    with pytest.raises(OSError, match="certificate"):  # lasting, and no answer of the store
        retries.ask("unsafe", lambda: _raise(tls), retries.may_pass)
    assert seconds_until_given_up("unsafe", refused) < 0.3
    # An answer is an answer, whatever it says.
    assert seconds_until_given_up("busy", _HttpError(503, "busy"), refused) > 0.3
    with pytest.raises(FileNotFoundError):
        retries.ask("there", Path("/nowhere/at/all").read_bytes, retries.may_pass)
    assert seconds_until_given_up("there", refused) > 0.3


def _raise(error: Exception) -> None:
    raise error


def test_who_stays_silent_at_first_contact_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 60.0)
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 0.05)
    tries = itertools.count(1)

    def time_out() -> None:
        next(tries)
        time.sleep(0.06)
        raise TimeoutError("silent")

    with pytest.raises(TimeoutError) as caught:
        retries.ask("silent", time_out, retries.may_pass)
    assert next(tries) == 2
    assert caught.value.__notes__ == ["check the address and the network"]


def test_waiting_for_a_store_is_logged_once_and_starts_no_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 60.0)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.01)
    monkeypatch.setattr(retries, "NOTICE_S", 0.1)

    # What refuses is named by what lies at the bottom of the error.
    refused = FileNotFoundError("http says so to everything")
    refused.__cause__ = ConnectionRefusedError(111, "Connect call failed")
    until = time.monotonic() + 0.3

    def refuse() -> str:
        if time.monotonic() < until:
            raise refused
        return "done"

    def ask(number: int) -> str:
        return retries.ask("off", refuse, retries.may_pass, file="off/a", describe=describe)

    describe = lambda error: f"cannot be reached: {retries.cause_words(error)}"  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == {"done"}
        assert {thread.name for thread in threading.enumerate() if "Timer" in thread.name} == set()
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"off/a: cannot be reached: Connection refused \(tried \d+ times in 0 s\); "
        r"trying again for up to 15 s",
        said,
    )


def test_a_file_that_fails_while_its_store_answers_is_given_up_on_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 1.0)
    monkeypatch.setattr(retries, "FILE_S", 0.01)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.01)
    is_up = True

    def other() -> None:
        if not is_up:
            raise ConnectionRefusedError("down")

    def tries_until_given_up(file: str, status: int = 500) -> tuple[int, str]:
        tries = itertools.count()

        def fail() -> None:
            next(tries)
            raise _HttpError(status, "broken")

        with pytest.raises(_HttpError) as caught:
            retries.ask("store", fail, retries.may_pass, file=file, other=other)
        return next(tries), caught.value.__notes__[-1]

    num_tries, note = tries_until_given_up("a")
    assert retries.FILE_TRIES <= num_tries < 20
    assert note.endswith("its store answers for others, so look at this one, and try again later")
    assert tries_until_given_up("a")[0] == 1  # for a while, as a store would be
    assert retries.FILE_TRIES <= tries_until_given_up("b")[0] < 20
    # Too many requests are no trouble of one file, and a store that is down is none, either.
    assert tries_until_given_up("c", 429)[0] > 40
    retries._gave_up_at.clear()
    is_up = False
    assert tries_until_given_up("d")[0] > 40
    assert tries_until_given_up("e")[0] == 1


def test_others_that_are_answered_meanwhile_tell_a_files_trouble_from_the_stores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 60.0)
    monkeypatch.setattr(retries, "FILE_S", 0.01)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.01)
    tries = itertools.count()

    def fail() -> None:
        if next(tries) == 3:
            retries.ask("store", lambda: None, retries.may_pass, file="good")
        raise _HttpError(500, "broken")

    with pytest.raises(_HttpError):
        retries.ask("store", fail, retries.may_pass, file="bad")
    assert next(tries) < 20
    assert "store" not in retries._gave_up_at


def test_whoever_has_little_patience_asks_once_and_gives_up_on_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 60.0)
    tries = itertools.count(1)

    def fail() -> None:
        next(tries)
        raise TimeoutError("silent")

    with pytest.raises(TimeoutError), retries.patient_for(0):
        retries.ask("store", fail, retries.may_pass)
    assert next(tries) == 2
    assert retries._gave_up_at == {}


def test_an_unreachable_store_is_not_an_absent_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_BrokenFileSystem, "error", _HttpError(500, "down"), raising=False)
    with pytest.raises(OSError, match="down"):
        filesystem.exists("broken://h/a")
    monkeypatch.setattr(_BrokenFileSystem, "error", FileNotFoundError("x"), raising=False)
    assert filesystem.exists("broken://h/a") is False


def test_two_readers_of_a_memory_file_have_their_own_position() -> None:
    writing.write_bytes("memory://two/a", b"abc")
    with reading.open_read("memory://two/a") as one, reading.open_read("memory://two/a") as two:
        assert (one.read(2), two.read(1), one.read()) == (b"ab", b"a", b"c")


def test_staging_lies_inside_a_local_output_and_outside_a_remote_one(tmp_path: Path) -> None:
    inside = writing.staging_path(str(tmp_path / "out"), "run")
    assert inside == str(tmp_path / "out" / "_staging" / "run")
    assert Path(inside).is_dir()
    outside = Path(writing.staging_path("memory://x/out", f"test-{os.getpid()}"))
    try:
        assert outside.is_dir()
    finally:
        outside.rmdir()


def test_remove_empty_folder_keeps_what_is_not_empty(tmp_path: Path) -> None:
    writing.write_bytes(f"{tmp_path}/a/b", b"")
    assert writing.remove_empty_folder(f"{tmp_path}/a") is False
    writing.remove(f"{tmp_path}/a/b")
    assert writing.remove_empty_folder(f"{tmp_path}/a") is True
    assert writing.remove_empty_folder(f"{tmp_path}/a") is True
    assert not (tmp_path / "a").exists()
