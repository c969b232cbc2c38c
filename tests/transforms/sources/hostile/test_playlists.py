"""Playlists: no file or address that they name is opened."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import audio_factory
from tests.support.containers import END, member
from tests.support.paths import ROOT
from tests.support.stores.web_server import WebServer, serve_folder
from tests.support.watched_label import SECRET, Label, snapshot


@pytest.fixture
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """A server with ``secret.wav``."""
    folder = tmp_path_factory.mktemp("www")
    (folder / "secret.wav").write_bytes(SECRET)
    with serve_folder(folder) as server:
        yield server


def playlists(target: str) -> dict[str, str]:
    """Files that make players open other files."""
    segment = '<SegmentBase indexRange="0-9"/>'
    port = target.rpartition(":")[2].partition("/")[0] if target.startswith("http") else "9"
    return {
        "hls": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n"
        "#EXT-X-ENDLIST\n",
        "hls_key": f'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n'
        f"#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "m3u": f"#EXTM3U\n#EXTINF:1,a\n{target}\n",
        "ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
        "concat": f"concat:{target}|{target}",
        "subfile": f"subfile,,start,0,end,0,,:{target}",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m=audio {port} RTP/AVP 0\na=control:{target}\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="audio/mp4">'
        f'<Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL>{segment}'
        "</Representation></AdaptationSet></Period></MPD>",
        "asx": f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
        "pls": f"[playlist]\nFile1={target}\nNumberOfEntries=1\n",
        "reference": f"[Reference]\nRef1={target}\n",
        "xspf": f'<playlist version="1"><trackList><track><location>{target}</location></track>'
        "</trackList></playlist>",
    }


def put_playlists(label: Label, url: str) -> int:
    targets = {"file": str(label.outside / "secret.wav"), "relative": "secret.wav", "http": url}
    targets["file_url"] = f"file://{label.outside}/secret.wav"
    (label.top / "cwd" / "secret.wav").write_bytes(SECRET)
    texts = {f"{a}-{b}": t for a, url in targets.items() for b, t in playlists(url).items()}
    for number, (name, text) in enumerate(texts.items()):
        ending = ("wav", "mp3", "m4a", "ogg")[number % 4]
        (label.inside / f"{name}.{ending}").write_text(text)
    (label.inside / "x.tar").write_bytes(
        b"".join(member(f"{name}.wav", text.encode()) for name, text in texts.items()) + END
    )
    return 2 * len(texts)


def test_files_that_a_playlist_names_are_never_opened(label: Label, web: WebServer) -> None:
    num_files = put_playlists(label, f"{web.url}/secret.wav")
    assert label() == 0
    assert label.labelled() == set()
    assert len(label.errors()) == num_files
    assert web.requests == []


# Those with a question mark are not on every machine.
SYSTEM_CALLS = "?open,?creat,openat,?openat2,connect,?unlink,unlinkat,?rename,?renameat,renameat2"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace sees what libraries open")
def test_decoders_open_nothing_but_their_input(
    label: Label, web: WebServer, tmp_path: Path
) -> None:
    put_playlists(label, f"{web.url}/secret.wav")
    (label.inside / "good.mp3").write_bytes(
        audio_factory.encode(audio_factory.noise(0.5), 16_000, "mp3")
    )
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-s", "4096", "-e", f"trace={SYSTEM_CALLS}"]
    command += ["-o", str(trace), sys.executable, "-m", "pipeline", "label", str(label.inside)]
    command += ["-o", str(label.out), "-m", str(label.model), "--device", "cpu", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "scratch")}
    kept = (label.out, trace, tmp_path / "scratch")
    before = snapshot(tmp_path, kept)
    done = subprocess.run(
        command, env=environment, cwd=tmp_path / "cwd", capture_output=True, text=True, check=False
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not look here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 3, done.stderr
    assert snapshot(tmp_path, kept) == before
    assert list((tmp_path / "scratch").glob("earmark*")) == []  # torch leaves an empty folder
    calls = trace.read_text(errors="replace")
    assert "good.mp3" in calls
    assert "secret.wav" not in calls
    assert f"htons({web.port})" not in calls
    assert web.requests == []
    writing = [
        line
        for line in calls.splitlines()
        if ("O_WRONLY" in line or "O_RDWR" in line or "O_CREAT" in line) and "= -1" not in line
        if f'"{tmp_path}/' in line
    ]
    allowed = (f'"{label.out}/', f'"{tmp_path}/scratch/')
    assert [line for line in writing if not any(place in line for place in allowed)] == []
    assert label.labelled() == {"good.mp3"}
