"""Model folders, and the command that must refuse damaged ones."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cli import main as cli
from tests.support.ast_factory import STATS, make_model
from tests.support.audio_factory import noise, write
from tests.support.model_factory import write_tiny_model
from transforms.models.ast.checkpoints import save_pretrained

GIB = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole and valid model folder."""
    path = tmp_path / "model"
    save_pretrained(make_model(), path, **STATS)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model folder, to be damaged."""
    return write_tiny_model(tmp_path / "model")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.wav"
    write(path, noise(1.0), 16_000)
    return path


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Two GiB more than the process has now: what a file only promises must not be allocated."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * GIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


class Refused:
    """Runs ``earmark label`` with a model that it must refuse; gives the words it says."""

    def __init__(self, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out, self.capsys = out, capsys

    def __call__(self, model: Path | str, *options: str, source: Path | str = "nowhere.wav") -> str:
        # The input does not exist: were it looked at before the model, it would be what is named.
        arguments = ["label", str(source), "-o", str(self.out), "-m", str(model), *options]
        code = cli.main(arguments)
        printed = self.capsys.readouterr()
        assert (code, printed.out) == (2, "")
        assert not self.out.parent.exists()
        assert "Traceback" not in printed.err
        lines = [line for line in printed.err.splitlines() if line.startswith("earmark: ")]
        assert len(lines) == 1, printed.err
        return lines[0]


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    monkeypatch.delenv("EARMARK_DEBUG", raising=False)
    return Refused(tmp_path / "results" / "out", capsys)
