"""What the benchmarks have in common: the machine, paired rounds, tables, pictures, JSON.

Where versions or settings are compared, each round runs every case once, in turn and from another
one on each time, so that what else the machine does falls on all of them alike; the figure of a
case is the median of its rounds.

Nothing is imported here that a machine with torch alone may lack: ``gpu`` runs there too.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from transforms.models.ast.config import ASTConfig

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]

RATE_HZ = 16_000
WINDOW_SAMPLES = 164_080  # what 1024 frames hold
NUM_DISTINCT_FILES = 10
_NUM_POOLED = 2  # the class and the distillation token
WINDOWS_PER_FILE = 10  # of the noise that a small model labels

_LIBRARIES = (
    *("apache-beam", "torch", "torchaudio", "numpy", "pyarrow", "soundfile", "av", "soxr"),
    *("openvino", "nncf", "transformers"),
)
# What of a processor decides how fast it multiplies.
_PROCESSOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")

# What else the machine was doing when this process began: later, it is the benchmark itself.
_LOAD_BEFORE = os.getloadavg()[0]

_RUN = """
import json, resource, sys
{prelude}
from pipeline.config.label import RunConfig
from pipeline.labelling.run import run_label
code = run_label(RunConfig.model_validate(json.loads(sys.argv[1])), [])
own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"exit_code": code, "peak_kb": own}}))
"""


def machine() -> dict[str, Any]:
    """The machine, the versions and the date: what figures mean nothing without."""
    return {
        "processor": _processor(),
        "processor_flags": _processor_flags(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "load_before": _LOAD_BEFORE,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    return _of_processor("model name") or platform.processor() or "unknown"


def _processor_flags() -> list[str]:
    found = _of_processor("flags").split()
    return [flag for flag in _PROCESSOR_FLAGS if flag in found]


def _of_processor(key: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    values = [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
    return values[0] if values else ""


def _versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def paired_rounds(cases: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What every case gives in every round.

    The cases of a round run one after another, and each round begins with the next one.
    """
    found: dict[str, list[T]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            found[name].append(cases[name]())
    return found


def median(values: Sequence[float]) -> float:
    """The middle one, or the mean of the two in the middle."""
    return float(statistics.median(values))


def spread(values: Sequence[float]) -> float:
    """How far the rounds lie apart: largest less smallest, as a share of the median."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table as Markdown has it, numbers to the right: fit to be copied into a README."""
    print(f"| {' | '.join(header)} |")
    print(f"|---|{'--:|' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(_cell(value) for value in row)} |")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_results(target: Path, result: Mapping[str, Any]) -> None:
    """The figures with the machine that they are from, as JSON."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


@contextlib.contextmanager
def drawn(target: Path, title: str) -> Iterator[Any]:
    """Axes to draw on; a PNG once the block ends."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.0, 4.5), layout="constrained")
    axes.set_title(title)
    yield axes
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


# The model: how much there is to compute


def count_flops(config: ASTConfig, *, pooled_alone: bool = False) -> int:
    """Floating-point operations of a window: multiplications and additions of matrix products.

    With T tokens of width D, an MLP of width I and Q tokens that are wanted of a block, a block
    takes 4TD² for keys and values, 4QD² for queries and the projection of the output, 4QTD for
    scores and the sum of values, 4QDI for the MLP. All blocks want all tokens (Q = T), unless only
    what is pooled is computed of the last. LayerNorm, GELU and softmax are not counted.

    Args:
        config: The model's.
        pooled_alone: As ``ASTModel.embed`` computes it: of the last block, the two tokens that are
            pooled. False: what AST is said to take, 261 GFLOP for AST base with 1024 frames.
    """
    width, mlp_width = config.hidden_size, config.intermediate_size
    tokens = config.num_tokens

    def block(wanted: int) -> int:
        projections = 4 * tokens * width**2 + 4 * wanted * width**2
        return projections + 4 * wanted * tokens * width + 4 * wanted * width * mlp_width

    patches = 2 * (tokens - _NUM_POOLED) * width * config.patch_size**2
    last = block(_NUM_POOLED if pooled_alone else tokens)
    return patches + (config.num_hidden_layers - 1) * block(tokens) + last


# Data: files of noise, and runs over them


def write_sources(folder: Path, windows_per_file: int) -> list[Path]:
    """A few distinct files of noise, each of so many windows."""
    import soundfile

    generator = np.random.default_rng(0)
    paths = []
    for index in range(NUM_DISTINCT_FILES):
        path = folder / f"source-{index}.wav"
        noise = generator.normal(0, 0.1, WINDOW_SAMPLES * windows_per_file)
        soundfile.write(path, noise, RATE_HZ, subtype="PCM_16")
        paths.append(path)
    return paths


def link_inputs(folder: Path, num_files: int, sources: Sequence[Path]) -> Path:
    """A folder of links to a few distinct files, which cost no disk."""
    target = folder / f"input-{num_files}"
    target.mkdir()
    for index in range(num_files):
        os.link(sources[index % len(sources)], target / f"{index:05}{sources[0].suffix}")
    return target


def write_noise(folder: Path, window_counts: Iterable[int]) -> tuple[Path, dict[int, Path]]:
    """What memory and scaling are measured with.

    Returns:
        A small model, and for each count a folder of noise that has so many windows.
    """
    from tests.support.model_factory import write_tiny_model

    model = write_tiny_model(folder / "model", hidden_size=192, num_attention_heads=3)
    sources = write_sources(folder, WINDOWS_PER_FILE)
    inputs = {
        count: link_inputs(folder, count // WINDOWS_PER_FILE, sources) for count in window_counts
    }
    return model, inputs


def run_apart(code: str, argument: str) -> str:
    """What a piece of Python prints, run in a process of its own.

    Raises:
        SystemExit: It failed; with what it said.
    """
    return _run([sys.executable, "-c", code, argument], {})


class CutOffError(Exception):
    """A program did not end in time and was killed.

    Attributes:
        output: What it had printed until then.
    """

    def __init__(self, output: str) -> None:
        super().__init__("it did not end in time")
        self.output = output


def run_module(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> str:
    """What ``python -m module`` prints, in a process of its own, as users start it.

    Args:
        module: Its name.
        arguments: Of the command line.
        environment: Variables that it sees beside this process's own.
        timeout_s: Seconds after which it and its children are killed; None for no limit.

    Raises:
        SystemExit: It failed; with what it said.
        CutOffError: It was killed.
    """
    return _run([sys.executable, "-m", module, *arguments], environment or {}, timeout_s)


def _run(
    command: Sequence[str], environment: Mapping[str, str], timeout_s: float | None = None
) -> str:
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,  # so that its children can be killed with it
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _kill_group(process.pid)
            raise CutOffError(process.communicate()[0]) from None
        except BaseException:
            _kill_group(process.pid)
            raise
    if process.returncode != 0:
        raise SystemExit(errors or f"{' '.join(command)} ended with {process.returncode}")
    return output


def _kill_group(process_id: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGKILL)


def label_apart(source: Path, model: Path, *, prelude: str = "", **changes: Any) -> dict[str, Any]:
    """``earmark label`` over a folder, in a process of its own.

    Args:
        source: The folder.
        model: The checkpoint.
        prelude: Python that the process runs first.
        **changes: Sections of the configuration.

    Returns:
        ``seconds``, start-up included; ``peak_mb`` of the labelling process, without its decoders
        and workers; ``run``, what run.json says.

    Raises:
        SystemExit: The run failed; with what it said.
    """
    with tempfile.TemporaryDirectory() as output:
        config = {
            "inputs": [str(source)],
            "output": output,
            "quiet": True,
            "model": {"name": str(model)},
            "inference": {"device": "cpu", "precision": "fp32"},
            "labels": {"scores": True},
            **changes,
        }
        began_s = time.monotonic()
        said = run_apart(_RUN.format(prelude=prelude), json.dumps(config))
        seconds = time.monotonic() - began_s
        result = json.loads(said.splitlines()[-1])
        if result["exit_code"] != 0:
            raise SystemExit(f"{source}: labelling it ended with {result['exit_code']}, not with 0")
        run = json.loads((Path(output) / "run.json").read_text())
    return {"seconds": seconds, "peak_mb": result["peak_kb"] / 1024, "run": run}
