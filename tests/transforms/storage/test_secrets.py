"""Secrets: what signs a URL, passwords and tokens stay out of everything that is written or said.

A server on this machine gives each file only to who shows the right signature. Every byte that a
command leaves behind or prints is then searched for every secret, in each spelling: the files as
they are, Parquet as its values and footers. What is no secret (``?id=42``) must still be there,
because it is part of the name.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, unquote_plus, urlsplit

import pyarrow.parquet as pq
import pytest

from pipeline.cli import main as cli
from pipeline.config.label import NOT_WRITTEN, RunConfig
from pipeline.config.load import load_config
from tests.support.audio_factory import encode, noise
from tests.support.containers import audio_table, parquet_bytes, tar_bytes
from tests.support.fake_hub import TOKEN, serve_hub, use_hub
from tests.support.paths import ROOT
from tests.support.stores.web_server import QuietHandler, serve
from transforms.storage import retries

RATE = 16_000

# What a request must show, and the secrets in it.
AWS = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIASECRETCREDENTIAL%2F20260101%2Fus%2Fs3"
    "&X-Amz-Date=20260101T000000Z&X-Amz-Expires=60&X-Amz-SignedHeaders=host"
    "&X-Amz-Security-Token=FwoGsecretsession%2B%2Ftoken%3D&X-Amz-Signature=0awssecretsignature0"
)
AZURE = "sv=2024-11-04&se=2026-02-02T00%3A00%3A00Z&sr=c&sp=rl&sig=azure%2Bsecret%2Fsignature%3D"
GOOGLE = (
    "X-Goog-Algorithm=GOOG4-RSA-SHA256&X-Goog-Credential=googlesecretcredential%40x.iam%2Fauto"
    "&X-Goog-Expires=60&X-Goog-Signature=9g00glesecretsignature9"
)
BEARER = "token=plainsecrettoken"
OTHERS = "AWSAccessKeyId=AKIAOLDSECRET&Signature=oldsecret%2Bsignature%3D&Expires=1893456000"
USER = "someuser:secret-pass%21word"
WRONG = "X-Amz-Signature=wrongsecretsignature&X-Amz-Credential=AKIAWRONGSECRET"
QUERIES = (AWS, AZURE, GOOGLE, BEARER, OTHERS)
SECRETS = (
    *("AKIASECRETCREDENTIAL", "FwoGsecretsession", "0awssecretsignature0"),
    *("azure%2Bsecret%2Fsignature", "googlesecretcredential", "9g00glesecretsignature9"),
    *("plainsecrettoken", "AKIAOLDSECRET", "oldsecret%2Bsignature", "secret-pass%21word"),
    *("wrongsecretsignature", "AKIAWRONGSECRET", TOKEN),
)


def spellings(secret: str) -> set[bytes]:
    """A secret as it stands in a URL, undone, doubly encoded, and in base64."""
    texts = {secret, unquote(secret), unquote_plus(secret), secret.replace("%", "%25")}
    texts.add(unquote(secret).replace("/", "\\/"))
    found = {text.encode() for text in texts}
    return found | {base64.b64encode(text) for text in found}


ALL_SPELLINGS = frozenset().union(*map(spellings, SECRETS))


@dataclass
class SignedServer:
    """Files over HTTP, each only with its signature.

    Attributes:
        address: Host and port.
        files: Content by path; a path is asked for with ``?id=42`` as part of its name, or without.
        requires: The query (or ``user:password``) that a path asks for.
        gone: Paths that are 404 whatever is shown.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requires: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    def put(self, path: str, content: bytes, requires: str) -> str:
        """Serve a file; its full URL, signed."""
        self.files[path], self.requires[path] = content, requires
        return self.url(path)

    def url(self, path: str, query: str | None = None) -> str:
        """The URL of a file with what it requires, or another query."""
        shown = self.requires[path] if query is None else query
        if shown == USER:
            return f"http://{USER}@{self.address}{path}"
        return f"http://{self.address}{path}{'&' if '?' in path else '?'}{shown}"


@pytest.fixture
def server() -> Iterator[SignedServer]:
    state = SignedServer()

    class Handler(QuietHandler):
        def answer(self) -> None:
            parts = urlsplit(self.path)
            path = next((p for p in (parts.path, f"{parts.path}?id=42") if p in state.files), "")
            if not path or path in state.gone:
                self.reply(404, f"no such file: {self.path}".encode())
                return
            required = state.requires[path]
            if required == USER:
                pair = base64.b64encode(unquote(USER).encode()).decode()
                allowed = self.headers.get("Authorization") == f"Basic {pair}"
            else:
                # Stores compare what the query says, whichever way it is encoded.
                allowed = set(parse_qsl(required)) <= set(parse_qsl(parts.query))
            if allowed:
                content = state.files[path]
                self.reply_content(content, {"ETag": f'"{hash(content)}"'})
            else:
                # Stores repeat the request in what they answer.
                self.reply(403, f"SignatureDoesNotMatch: {self.path}".encode())

    with serve(Handler) as port:
        state.address = f"127.0.0.1:{port}"
        yield state


def wav(seed: int = 0) -> bytes:
    return encode(noise(1.0, seed=seed), RATE, "wav")


def tar_of(*names: str) -> bytes:
    return tar_bytes([(name, wav(seed)) for seed, name in enumerate(names)])


def parquet_of(num_rows: int) -> bytes:
    cells = ({"bytes": wav(seed), "path": f"{seed}.wav"} for seed in range(num_rows))
    return parquet_bytes(audio_table(*cells))


def lines(*rows: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class Command:
    """Runs a command of Earmark, keeps every word of it, and checks its exit code."""

    def __init__(self, model: Path | str, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.model, self.out, self.capfd = model, out, capfd
        self.said = ""

    def __call__(self, name: str, *arguments: str, code: int | tuple[int, ...] = 0) -> None:
        options: list[str] = []
        if name in ("label", "plan"):
            options = [] if "-o" in arguments else ["-o", str(self.out)]
            options += ["--set", "decode.processes=1", "--set", "inference.batch_size=4"]
            if "-m" not in arguments:
                options += ["-m", str(self.model)]
        found = cli.main([name, *arguments, *options])
        captured = self.capfd.readouterr()
        self.said += captured.out + captured.err
        assert found in (code if isinstance(code, tuple) else (code,)), captured

    def rows(self, part: str) -> list[dict[str, Any]]:
        found = [
            row
            for path in (self.out / part).glob("*.parquet")
            for row in pq.read_table(path).to_pylist()
        ]
        return sorted(found, key=lambda row: row["clip_id"])

    def check(self) -> None:
        """No secret is in what was said or written."""
        check({"what was printed": self.said.encode(), **everything_in(self.out)})


def check(places: Mapping[str, bytes]) -> None:
    for place, content in places.items():
        for secret in ALL_SPELLINGS:
            at = content.find(secret)
            around = content[max(0, at - 200) : at + 200]
            assert at < 0, f"{place} holds {secret!r}: …{around!r}…"


def everything_in(folder: Path) -> dict[str, bytes]:
    """Every file of a folder: its name, its bytes, and Parquet's values and footers as text."""
    found = {}
    for path in folder.rglob("*"):
        found[f"the name of {path}"] = str(path.relative_to(folder)).encode()
        if path.is_file():
            found[str(path)] = path.read_bytes()
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                values = table.drop_columns([*{"embedding"} & set(table.schema.names)])
                footer = pq.read_metadata(path).metadata
                found[f"the rows of {path}"] = repr((values.to_pylist(), footer)).encode()
    return found


@pytest.fixture(params=["1", pytest.param("", marks=pytest.mark.slow)], ids=["debug", "plain"])
def command(
    tiny_model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Command]:
    """With tracebacks, which print causes and the contexts of exceptions too; and without."""
    monkeypatch.setattr(retries, "RETRY_S", 0.0)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("EARMARK_DEBUG", request.param)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    level = logging.root.level
    yield Command(tiny_model, tmp_path / "out", capfd)
    logging.root.setLevel(level)


# --- Everything succeeds -------------------------------------------------------------------


def test_signed_inputs_of_every_kind_leave_no_secret(
    command: Command, server: SignedServer, tmp_path: Path
) -> None:
    inputs = [
        server.put(f"/audio/{number}.wav?id=42", wav(number), query)
        for number, query in enumerate((*QUERIES, USER))
        if query != USER
    ]
    inputs.append(server.put("/audio/user.wav", wav(7), USER))
    inputs.append(server.put("/shards/a.tar", tar_of("x.wav", "y.wav"), AZURE))
    inputs.append(server.put("/shards/b.parquet", parquet_of(2), GOOGLE))
    listed = [server.put(f"/listed/{number}.wav", wav(number), q) for number, q in
              enumerate((AWS, BEARER, USER))]  # fmt: skip
    manifest = lines(
        *({"uri": url, "label": f"n{number}"} for number, url in enumerate(listed)),
        {"uri": server.url("/shards/a.tar"), "member": "x.wav", "start_s": 0, "end_s": 0.5},
    )
    inputs.append(server.put("/lists/m.jsonl", manifest, AWS))
    command("plan", *inputs)
    command("label", *inputs)
    clips = command.rows("clips")
    host = f"http://{server.address}"
    assert {row["clip_id"] for row in clips} == {
        *(f"{host}/audio/{number}.wav?id=42" for number in range(5)),
        f"{host}/audio/user.wav",
        *(f"{host}/listed/{number}.wav" for number in range(3)),
        *(f"{host}/shards/a.tar#{name}.wav" for name in "xy"),
        *(f"{host}/shards/b.parquet#row={number}" for number in range(2)),
        f"{host}/shards/a.tar#x.wav@0.000-0.500",
    }
    assert not command.rows("errors")
    run = json.loads((command.out / "run.json").read_text())
    assert f"{host}/audio/0.wav?id=42" in run["config"]["inputs"]
    # Again: the same ids, so there is nothing to do. Signatures change from day to day.
    command("label", *inputs)
    assert "Nothing to do" in command.said
    command("verify", str(command.out))
    for kind in ("csv", "audacity", "raven"):
        command("export", str(command.out), "--format", kind)
    command.check()


def test_a_config_file_may_hold_signed_inputs(
    command: Command, server: SignedServer, tmp_path: Path
) -> None:
    url = server.put("/a.wav", wav(), AWS)
    labels = server.put("/labels.txt", b"a\nb\nc\nd\ne\n", BEARER)
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"inputs": [url], "model": {"labels": labels}}))  # JSON is YAML
    command("label", "-c", str(config))
    run = (command.out / "run.json").read_text()
    assert f"http://{server.address}/a.wav" in run
    assert f"http://{server.address}/labels.txt" in run
    command.check()
    other = f"model.labels={server.put('/none.txt', b'', AZURE)}"
    command("label", "-c", str(config), "--set", other, code=2)
    server.gone.add("/labels.txt")
    command("label", "-c", str(config), code=2)
    command.check()


@pytest.mark.parametrize("query", [AWS, BEARER, AZURE, USER])
def test_a_signed_model_folder_leaves_no_secret(
    command: Command, server: SignedServer, tiny_model: Path, query: str
) -> None:
    clip = server.put("/a.wav", wav(), GOOGLE)
    for path in tiny_model.iterdir():
        server.put(f"/model/{path.name}", path.read_bytes(), query)
    server.requires["/model"] = query
    folder = server.url("/model")
    command("label", clip, "-m", folder)
    run = json.loads((command.out / "run.json").read_text())
    assert run["model"]["name"] == f"http://{server.address}/model"
    command.check()
    # And where it is not given: no weights, another signature, damage.
    server.gone.add("/model/model.safetensors")
    command("label", clip, "-m", folder, "--overwrite", code=2)
    command("label", clip, "-m", server.url("/model", WRONG), "--overwrite", code=2)
    server.gone.clear()
    server.files["/model/model.safetensors"] = b"garbage" * 100
    command("label", clip, "-m", folder, "--overwrite", code=2)
    command("plan", clip, "-m", folder, code=2)
    command.check()


def test_the_hubs_token_leaves_no_trace(
    command: Command, server: SignedServer, tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clip = server.put("/a.wav", wav(), AWS)
    with serve_hub(tiny_model) as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        command("label", clip, "-m", "org/tiny")
        assert any(TOKEN in request for request in hub.requests)
        hub.status = 500
        command("label", clip, "-m", "org/other", "--overwrite", code=2)
    command("label", clip, "-m", "org/another", "--overwrite", code=2)
    command.check()


def test_beams_keys_and_passwords_are_not_written(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    beam = {
        "s3_secret_access_key": "secretkeysecret",
        "s3_session_token": "secrettokensecret",
        "azure_connection_string": "AccountName=a;AccountKey=secretaccountsecret==",
        "experiments": ["plain", f"https://h.example/x?id=42&{AZURE}"],
        "job_name": f"see https://h.example/y?{AWS}",
        "s3_disable_ssl": True,
    }
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"inputs": [str(tmp_path / "a.wav")], "beam": beam}))
    behind = ["--", "--s3_access_key_id=secretbehindsecret", f"--labels=https://h.example/z?{AWS}"]
    arguments = ["label", "-c", str(config), "-o", str(command.out), "-m", str(command.model)]
    assert cli.main([*arguments, "--set", "decode.processes=1", *behind]) == 0
    run = json.loads((command.out / "run.json").read_text())
    assert run["config"]["beam"] == {
        "s3_secret_access_key": NOT_WRITTEN,
        "s3_session_token": NOT_WRITTEN,
        "azure_connection_string": NOT_WRITTEN,
        "experiments": ["plain", "https://h.example/x?id=42"],
        "job_name": "see https://h.example/y",
        "s3_disable_ssl": True,
    }
    captured = command.capfd.readouterr()
    command.said = captured.out + captured.err
    command.check()
    written = everything_in(command.out)
    for place, content in {**written, "what was printed": command.said.encode()}.items():
        for secret in (b"secretkey", b"secrettoken", b"secretaccount", b"secretbehind"):
            assert secret not in content, place
    # What was written is a configuration still.
    config.write_text(json.dumps(run["config"]))
    assert load_config(RunConfig, str(config)).resolved() == run["config"]


# --- Something fails -----------------------------------------------------------------------


def test_what_fails_leaves_no_secret_in_error_rows(command: Command, server: SignedServer) -> None:
    cut_tar = tar_of("x.wav", "y.wav", "z.wav")[:40_000]
    manifest = lines(
        {"uri": server.put("/gone.wav", wav(), AWS), "note": "one"},
        {"uri": server.url("/gone.wav", WRONG).replace("gone", "never"), "note": "two"},
        {"uri": server.url(server_path(server, "/refused.wav", AZURE), WRONG)},
        {"uri": server.put("/garbage.wav?id=42", b"no audio" * 99, GOOGLE)},
        {"uri": server.put("/user.wav", b"no audio" * 99, USER)},
        {"uri": f"http://{USER}@127.0.0.1:9/closed.wav"},
        {"uri": f"http://nowhere.invalid/a.wav?{BEARER}"},
        {"uri": f"s3://bucket/a.wav?{AWS}"},
        {"uri": f"nosuch://bucket/a.wav?{AWS}"},
        {"uri": f"http://[::1/a.wav?{AWS}"},
        {"uri": server.put("/cut.tar", cut_tar, OTHERS), "member": "z.wav"},
        {"uri": server.url("/cut.tar"), "member": "never.wav"},
        {"uri": server.url("/cut.tar"), "row": 5},
        {"uri": server.put("/deep.jsonl", b"{}", AWS)},
        {"uri": server.url("/gone.wav"), "start_s": -1},
        {"uri": 5, "note": server.url("/gone.wav")},
        {"uri": [server.url("/gone.wav")]},
        {"uri": server.url("/garbage.wav?id=42"), "start_s": server.url("/gone.wav")},
        {"uri": server.url("/cut.tar"), "row": server.url("/gone.wav")},
        {"uri": server.url("/gone.wav") + "\0"},
    )
    server.gone.add("/gone.wav")
    inputs = [
        server.put("/m.jsonl", manifest + b"not json " + AWS.encode() + b"\n", AWS),
        server.url("/cut.tar"),
        server.put("/cut.parquet", parquet_of(2)[:-30], BEARER),
        server.put("/a.wav", wav(), AWS),
    ]
    command("label", *inputs, "--max-failed", "1", code=3)
    errors = command.rows("errors")
    assert len(errors) >= 15
    assert any(row["clip_id"].endswith("/garbage.wav?id=42") for row in errors)
    command.check()
    command("verify", str(command.out))
    # The error rows as a manifest elsewhere: the signatures are gone, and so it is refused anew.
    elsewhere = Command(command.model, command.out.with_name("elsewhere"), command.capfd)
    tables = [str(path) for path in (command.out / "errors").glob("*.parquet")]
    elsewhere("label", *tables, "--max-failed", "1", code=3)
    elsewhere.check()
    command.check()


def server_path(server: SignedServer, path: str, query: str) -> str:
    server.put(path, wav(), query)
    return path


@pytest.mark.parametrize("name", ["label", "plan"])
def test_an_input_that_cannot_be_had_is_named_without_its_signature(
    command: Command, server: SignedServer, name: str
) -> None:
    for path in ("/a.wav", "/a.tar", "/a.parquet", "/a.jsonl", "/a.csv", "/a.txt"):
        server.put(path, b"garbage" * 40, AWS)
        command(name, server.url(path, WRONG), code=(2, 3))
    for url in (
        server.url("/a.parquet", AWS),
        f"http://{server.address}/none.wav?{AZURE}",
        f"http://{USER}@{server.address}/none.jsonl",
        f"http://127.0.0.1:9/a.tar?{GOOGLE}",
        f"http://nowhere.invalid/a.jsonl?{BEARER}",
        f"http://[::1/a.wav?{OTHERS}",
        f"nosuch://bucket/a.wav?{AWS}",
        f"s3://bucket/*.wav?{AWS}",
        f"http://{server.address}:99999/a.wav?{AWS}",
    ):
        command(name, url, code=(2, 3) if name == "label" else (0, 2))
    command.check()


def test_an_output_that_cannot_be_written_is_named_without_its_signature(
    command: Command, server: SignedServer
) -> None:
    clip = server.put("/a.wav", wav(), AWS)
    out = f"http://{USER}@{server.address}/out?{BEARER}"
    command("label", clip, "-o", out, code=2)
    command("verify", f"http://{server.address}/out?{AWS}", code=2)
    command("export", f"http://{USER}@{server.address}/out", "--format", "csv", code=2)
    command.check()


def test_retry_failed_takes_the_signatures_of_the_inputs_given_now(
    command: Command, server: SignedServer
) -> None:
    # The result knows no signature, so that yesterday's cannot be used up, and today's are.
    good = server.put("/good.wav", wav(1), AWS)
    server.put("/late.wav", wav(2), AZURE)
    server.put("/s.tar", tar_of("x.wav", "y.wav"), AWS)

    def inputs(query: str, tar_query: str) -> list[str]:
        manifest = lines({"uri": good}, {"uri": server.url("/late.wav", query)})
        listing = server.put("/m.jsonl", manifest, BEARER)
        return [listing, server.url("/s.tar", tar_query)]

    command("label", *inputs(WRONG, AWS), "--max-failed", "1")
    assert [row["uri"] for row in command.rows("errors")] == [f"http://{server.address}/late.wav"]
    command("label", *inputs(WRONG, AWS), "--max-failed", "1", "--retry-failed")
    assert len(command.rows("errors")) == 1
    command("label", *inputs(AZURE, AWS), "--retry-failed")
    assert not command.rows("errors")
    assert len(command.rows("clips")) == 4
    command.check()


def test_metadata_and_truth_that_are_signed_urls_lose_their_signatures(
    command: Command, server: SignedServer
) -> None:
    url = server.put("/a.wav", wav(), AWS)
    row = {
        "uri": url,
        "source": f"https://bucket.example/b.wav?id=42&{AWS}",
        "links": [f"https://acc.blob.example/c?{AZURE}", "plain"],
        "deep": {"thumbnail": f"https://{USER}@host.example/d.png"},
        "prose": f"downloaded from https://x.example/e.wav?v=2&{GOOGLE} on Monday",
        "query": "token=is part of this sentence",
        "labels": [f"https://x.example/label?{BEARER}"],
        f"https://x.example/key?{OTHERS}": 1,
        "clip_id": f"https://x.example/mine?id=42&{BEARER}",
    }
    command("label", server.put("/m.jsonl", lines(row), BEARER))
    (clip,) = command.rows("clips")
    assert json.loads(clip["metadata"]) == {
        "source": "https://bucket.example/b.wav?id=42",
        "links": ["https://acc.blob.example/c", "plain"],
        "deep": {"thumbnail": "https://host.example/d.png"},
        "prose": "downloaded from https://x.example/e.wav?v=2 on Monday",
        "query": "token=is part of this sentence",
        "https://x.example/key": 1,
    }
    assert clip["clip_id"] == "https://x.example/mine?id=42"
    assert clip["truth"] == ["https://x.example/label"]
    command.check()


# --- The process ---------------------------------------------------------------------------


@pytest.mark.slow
def test_children_temporary_files_and_beams_own_words_hold_no_secret(
    server: SignedServer, tiny_model: Path, tmp_path: Path
) -> None:
    # As users start it, in a process of its own, everything that logs at its loudest.
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    inputs = [server.put(f"/{n}.wav", wav(n), q) for n, q in enumerate((*QUERIES, USER))]
    inputs.append(server.put("/bad.wav", b"no audio" * 99, AWS))
    inputs.append(server.put("/a.tar", tar_of("x.wav")[:20_000], GOOGLE))
    out = tmp_path / "out"
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"inputs": inputs}))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "label", "-c", config, "-o", out, "-m", tiny_model,
         "--max-failed", "1", "--", "--default_sdk_harness_log_level=DEBUG"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "EARMARK_DEBUG": "1", "TMPDIR": str(temporary), "HF_TOKEN": TOKEN,
             "PYTHONASYNCIODEBUG": "1"},
    )  # fmt: skip
    seen: set[str] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.update(str(path) for path in temporary.rglob("*"))
            for name in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(name.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = process.communicate(timeout=120)
    stop.set()
    watcher.join()
    assert process.returncode == 3, said
    assert any("decode" in text or "spawn" in text or "forkserver" in text for text in seen)
    places = {"output": said.encode(), "names and command lines": "\n".join(seen).encode(),
              **everything_in(out), **everything_in(temporary)}  # fmt: skip
    check(places)
