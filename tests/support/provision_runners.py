"""Fetches the Beam runners that are no Python packages, for ``test_runners.py``.

    python3 tests/support/provision_runners.py [prism] [flink]

Each comes by its own registry's client, at the version of Beam that is installed (before that:
which ``setup.py`` asks for), and stays in ``$EARMARK_RUNNERS`` (``~/.cache/earmark-runners``):

- Prism, by ``go install``. A minute or two of both cores where Go has nothing of it yet.
- Flink's job server, by Maven. Where the registry does not serve that of this Beam, an older one is
  put together from its parts: job servers and SDKs speak a protocol that is kept stable.

What is there already is left alone. What cannot be had is no error of the others: why stands in
``<runner>.json``, where the tests find it, and the exit code is 1. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 900.0

PRISM = "github.com/apache/beam/sdks/v2/go/cmd/prism"
FLINK_VERSION = "1.19"
# The last Beam whose job server for that Flink could be put together from a registry that serves
# its parts and not the whole.
PARTS_VERSION = "2.62.0"
MAVEN_PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1"


class MissingError(Exception):
    """A runner cannot be had; says why."""


@dataclass(frozen=True)
class Provisioned:
    """What became of a runner.

    Attributes:
        path: Its file; None if it could not be had.
        what: Its name and version, for people.
        missing: Why it could not be had; None if it could.
    """

    path: str | None
    what: str
    missing: str | None = None


def beam_version() -> str:
    """The installed Beam's, else the first one that ``setup.py`` takes."""
    try:
        return importlib.metadata.version("apache-beam")
    except importlib.metadata.PackageNotFoundError:
        pin = re.search(r'"apache-beam==([\d.]+)\.\*"', (ROOT / "setup.py").read_text())
        if pin is None:
            raise
        return f"{pin.group(1)}.0"


def folder() -> Path:
    """Where the runners of this Beam lie."""
    root = os.environ.get("EARMARK_RUNNERS") or Path.home() / ".cache" / "earmark-runners"
    return Path(root) / beam_version()


def read(name: str) -> Provisioned:
    """What is known of a runner."""
    try:
        found = Provisioned(**json.loads((folder() / f"{name}.json").read_text()))
    except FileNotFoundError:
        return Provisioned(None, name, "it has not been fetched")
    if found.path is not None and not Path(found.path).exists():
        return Provisioned(None, name, f"{found.path} has gone")
    return found


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While nobody else fetches runners into the folder, which is waited for."""
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str], **environment: str) -> None:
    """Run a client of a registry.

    Raises:
        MissingError: It is not installed, or failed.
    """
    if shutil.which(command[0]) is None:
        raise MissingError(f"{command[0]} is not installed")
    try:
        subprocess.run(
            command,
            env={**os.environ, **environment},
            cwd=tempfile.gettempdir(),  # no module, no project
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"{command[0]} did not end within {PATIENCE_S:g} s") from error
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stdout.splitlines() if line.strip()]
        told = [line for line in lines if "ERROR" in line] or lines[-1:]
        raise MissingError(f"{' '.join(command[:2])} failed: {' '.join(told[:1])}") from error


def fetch_prism(target: Path, version: str) -> Provisioned:
    """Build Prism with Go."""
    run(["go", "install", f"{PRISM}@v{version}"], GOBIN=str(target), CGO_ENABLED="0")
    return Provisioned(str(target / "prism"), f"Prism {version}")


def fetch_flink(target: Path, version: str) -> Provisioned:
    """Have Maven bring a job server."""
    if shutil.which("java") is None:
        raise MissingError("java is not installed")
    name = f"beam-runners-flink-{FLINK_VERSION}"
    whole = f"org.apache.beam:{name}-job-server:{version}"
    maven = ["mvn", "--batch-mode", "--quiet"]
    try:
        run([*maven, f"{MAVEN_PLUGIN}:copy", f"-Dartifact={whole}", f"-DoutputDirectory={target}"])
        jar, served = target / f"{name}-job-server-{version}.jar", version
    except MissingError as error:
        print(f"flink: {error}; trying the parts of {PARTS_VERSION}", flush=True)
        jar, served = target / "flink-job-server.jar", PARTS_VERSION
        put_together(jar, name, maven)
    return Provisioned(str(jar), f"Flink {FLINK_VERSION} behind the job server of Beam {served}")


POM = """<project xmlns="http://maven.apache.org/POM/4.0.0">
<modelVersion>4.0.0</modelVersion>
<groupId>earmark</groupId><artifactId>flink</artifactId><version>1</version>
<dependencies><dependency>
<groupId>org.apache.beam</groupId><artifactId>{name}</artifactId><version>{version}</version>
</dependency><dependency>
<groupId>org.slf4j</groupId><artifactId>slf4j-jdk14</artifactId><version>1.7.30</version>
</dependency></dependencies></project>
"""


def put_together(jar: Path, name: str, maven: Sequence[str]) -> None:
    """A jar that holds nothing but where its parts lie."""
    parts = jar.parent / "flink-parts"
    pom = jar.parent / "flink-pom.xml"
    pom.write_text(POM.format(name=name, version=PARTS_VERSION))
    run(
        [
            *maven,
            f"{MAVEN_PLUGIN}:copy-dependencies",
            f"--file={pom}",
            "-DincludeScope=runtime",
            f"-DoutputDirectory={parts}",
        ]
    )
    names = [f"{parts.name}/{part.name}" for part in sorted(parts.glob("*.jar"))]
    main_class = "org.apache.beam.runners.flink.FlinkJobServerDriver"
    lines = ["Manifest-Version: 1.0", f"Main-Class: {main_class}", f"Class-Path: {' '.join(names)}"]
    with zipfile.ZipFile(jar, "w") as file:
        file.writestr("META-INF/MANIFEST.MF", "".join(map(manifest_line, lines)) + "\n")


def manifest_line(text: str) -> str:
    """A line as a manifest has it: of 72 bytes at most, what is longer goes on behind a space."""
    rest = [text[at : at + 70] for at in range(70, len(text), 70)]
    return "\n ".join([text[:70], *rest]) + "\n"


FETCHERS: dict[str, Callable[[Path, str], Provisioned]] = {
    "prism": fetch_prism,
    "flink": fetch_flink,
}


def provision(name: str) -> Provisioned:
    """Fetch a runner unless it is there, and note what came of it."""
    found = read(name)
    if found.missing is None:
        return found
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    try:
        found = FETCHERS[name](target, beam_version())
    except MissingError as error:
        found = Provisioned(None, name, str(error))
    with tempfile.NamedTemporaryFile("w", dir=target, delete=False) as file:
        json.dump(asdict(found), file)
    Path(file.name).rename(target / f"{name}.json")
    return found


def main() -> int:
    """Fetch what is asked for; 1 if something is missing."""
    parser = argparse.ArgumentParser(
        description="Fetch runners for tests/pipeline/runners/test_runners.py."
    )
    parser.add_argument("names", nargs="*", metavar="RUNNER", help=f"of {', '.join(FETCHERS)}")
    names = parser.parse_args().names or list(FETCHERS)
    unknown = [name for name in names if name not in FETCHERS]
    if unknown:
        parser.error(f"no runner {unknown[0]}; there are {', '.join(FETCHERS)}")
    code = 0
    with alone():
        for name in names:
            found = provision(name)
            told = f"MISSING: {found.missing}" if found.missing else f"{found.what}, {found.path}"
            print(f"{name}: {told}", flush=True)
            code = 1 if found.missing else code
    return code


if __name__ == "__main__":
    sys.exit(main())
