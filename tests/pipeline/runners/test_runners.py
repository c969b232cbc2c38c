"""One run on every runner that can be had: the same units, the same rows, and nothing done twice.

The runners that are no Python packages come by ``tests/support/provision_runners.py``. Where one is
missing its tests are skipped, and say what is missing; with REQUIRE_RUNNERS=1 they fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc

from benchmarks.reliability.kill_runs import (
    INTERRUPTED,
    Run,
    Setup,
    check_same_names,
    check_same_rows,
    committed_files,
    files_below,
    num_commits,
)
from pipeline.labelling.run import run_label
from pipeline.result.verify import run_verify
from tests.support import provision_runners
from tests.support.audio_factory import write_noise
from tests.support.labelling import small_config, wait_until
from tests.support.model_factory import write_tiny_model
from tests.support.paths import ROOT

# A worker that loses its runner says so from a thread of its own.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

NUM_CLIPS, SLOW_CLIPS, WINDOWS_PER_UNIT = 6, 24, 2
PATIENCE_S = 120.0

# A worker that dies takes the job's try with it; Flink makes no second one unless it is told to.
TRY_AGAIN = """
restart-strategy.type: fixed-delay
restart-strategy.fixed-delay.attempts: 2
restart-strategy.fixed-delay.delay: 100 ms
"""

# What Flink's own shell scripts would work out is said outright.
FLINK_CLUSTER = """
jobmanager.rpc.address: localhost
jobmanager.rpc.port: {rpc_port}
jobmanager.bind-host: localhost
rest.address: localhost
rest.bind-address: localhost
rest.port: {rest_port}
taskmanager.host: localhost
taskmanager.bind-host: localhost
taskmanager.numberOfTaskSlots: 1
taskmanager.cpu.cores: 1
taskmanager.memory.framework.heap.size: 128m
taskmanager.memory.framework.off-heap.size: 128m
taskmanager.memory.task.heap.size: 256m
taskmanager.memory.task.off-heap.size: 0
taskmanager.memory.network.min: 64m
taskmanager.memory.network.max: 64m
taskmanager.memory.managed.size: 128m
taskmanager.memory.jvm-metaspace.size: 256m
taskmanager.memory.jvm-overhead.min: 192m
taskmanager.memory.jvm-overhead.max: 192m
io.tmp.dirs: {folder}
blob.storage.directory: {folder}
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short clips, and one file that holds no audio: its failure is a row on every runner."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(NUM_CLIPS - 1):
        write_noise(folder / f"{index}.wav", 0.5 + 0.2 * index, seed=index)
    (folder / "no_audio.wav").write_bytes(b"no audio at all")
    return folder


class Labeller:
    """Runs ``earmark label`` with given options for Beam."""

    def __init__(self, model: Path, clips: Path) -> None:
        self._model, self._clips = model, clips

    def __call__(self, output: Path, options: Sequence[str]) -> int:
        units = {"windows": WINDOWS_PER_UNIT}
        config = small_config(self._model, output, self._clips, units=units, max_failed=0.5)
        return run_label(config, list(options))


@pytest.fixture(scope="module")
def label(tiny_model: Path, clips: Path) -> Labeller:
    return Labeller(tiny_model, clips)


@pytest.fixture(scope="module")
def reference(label: Labeller, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker in this process gives."""
    out = tmp_path_factory.mktemp("reference") / "out"
    assert label(out, []) == 0
    return out


# --- Runners, as Beam's options --------------------------------------------------------------


TWO = ["--runner=FnApiRunner", "--direct_num_workers=2"]
# Those that are Python packages, and need nothing else.
IN_PYTHON = {
    "fn_api": ["--runner=FnApiRunner"],
    "fn_api_threads": [*TWO, "--direct_running_mode=multi_threading"],
    "fn_api_processes": [*TWO, "--direct_running_mode=multi_processing"],
    # DirectRunner looks for a Prism first. Nor may it take the one that another test has started in
    # this process.
    "direct": [
        *("--runner=DirectRunner", "--prism_location=/no/such/prism"),
        "--experiments=disable_prism_server_singleton",
    ],
    "bundle_based_direct": [
        "--runner=apache_beam.runners.direct.direct_runner.BundleBasedDirectRunner"
    ],
}


@pytest.fixture
def options(runner: str, request: pytest.FixtureRequest) -> list[str]:
    return IN_PYTHON.get(runner) or request.getfixturevalue(runner)


@pytest.fixture(scope="module")
def job_service(servers: Servers, worker_pool: int) -> list[str]:
    """Beam's own job service in Python, with workers that are started elsewhere."""
    module = "apache_beam.runners.portability.local_job_service_main"
    port = servers.start(sys.executable, "-m", module, "--job_port={port}")
    return ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}", *external(worker_pool)]


@pytest.fixture(scope="module")
def prism() -> list[str]:
    return ["--runner=PrismRunner", f"--prism_location={provisioned('prism')}"]


@pytest.fixture(scope="module")
def direct_on_prism() -> list[str]:
    return ["--runner=DirectRunner", f"--prism_location={provisioned('prism')}"]


@pytest.fixture(scope="module")
def flink(flink_job_server: int) -> list[str]:
    """Flink in one JVM, which is kept for all tests; workers are threads of this process."""
    return flink_options(flink_job_server)


@pytest.fixture(scope="module")
def flink_job_server(servers: Servers) -> int:
    return start_job_server(servers, "[local]")


def flink_options(job_port: int, master: str = "[local]") -> list[str]:
    return [
        "--runner=FlinkRunner",
        f"--flink_master={master}",
        f"--job_endpoint=localhost:{job_port}",
        "--parallelism=2",
    ]


@pytest.fixture(scope="module")
def flink_with_pool(
    flink_job_server: int, worker_pool: int, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Flink in one JVM, with workers that are processes of their own, and two further tries."""
    folder = tmp_path_factory.mktemp("flink")
    (folder / "flink-conf.yaml").write_text(TRY_AGAIN)
    conf = f"--flink_conf_dir={folder}"
    return [*flink_options(flink_job_server), *external(worker_pool), conf]


@pytest.fixture(scope="module")
def flink_cluster(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A job manager and two task managers of one slot each, which start their own workers.

    They could not share a worker pool: both number their workers alike.
    """
    master = start_flink_cluster(servers, tmp_path_factory.mktemp("flink"))
    job_port = start_job_server(servers, master)
    worker = {"command": str(ROOT / "deploy" / "beam_worker.py"), "env": servers.environment}
    started = ["--environment_type=PROCESS", f"--environment_config={json.dumps(worker)}"]
    return [*flink_options(job_port, master), *started]


@pytest.fixture(scope="module")
def prism_server(servers: Servers) -> int:
    """Prism as a service of its own, which outlives the command."""
    return servers.start(provisioned("prism"), "--job_port={port}", "--serve_http=false")


def external(pool_port: int) -> list[str]:
    return ["--environment_type=EXTERNAL", f"--environment_config=localhost:{pool_port}"]


def provisioned(name: str) -> str:
    """The file of a runner; skips without it, or fails with REQUIRE_RUNNERS=1."""
    with provision_runners.alone():  # CI fetches them beside its first tests
        found = provision_runners.read(name)
    if found.path is None:
        reason = (
            f"the runner {name} is MISSING ({found.missing}): "
            "python3 tests/support/provision_runners.py"
        )
        if os.environ.get("REQUIRE_RUNNERS") == "1":
            pytest.fail(f"REQUIRE_RUNNERS=1, and {reason}")
        pytest.skip(reason)
    return found.path


# --- What they need beside this process ------------------------------------------------------


class Servers:
    """Processes that serve a port on this machine, until the tests have ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What they and their workers have in their environment."""
        return {
            # Workers are started as ``python``, whichever that is on the PATH.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *command: str) -> int:
        """Run a command; ``{port}`` in its words is the port it serves, given back."""
        port = free_port()
        self.run([word.format(port=port) for word in command])
        wait_until(lambda: is_served(port), f"{command} to serve {port}")
        return port

    def run(self, command: Sequence[str]) -> None:
        """Run a command; what it says goes into a file of its own."""
        log = self._folder / f"{len(self.processes)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)

    def count(self, text: str) -> int:
        """How often they have said something so far."""
        return sum(log.read_text(errors="replace").count(text) for log in self._folder.iterdir())

    def stop(self) -> None:
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    started = Servers(tmp_path_factory.mktemp("servers"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def worker_pool(servers: Servers) -> int:
    """Starts a worker process whenever a runner asks for one; the port it listens on."""
    module = "apache_beam.runners.worker.worker_pool_main"
    return servers.start(sys.executable, "-m", module, "--service_port={port}")


def start_job_server(servers: Servers, flink_master: str) -> int:
    command = ["java", "-jar", provisioned("flink"), f"--flink-master={flink_master}"]
    return servers.start(*command, "--job-port={port}", "--artifact-port=0", "--expansion-port=0")


def start_flink_cluster(servers: Servers, folder: Path) -> str:
    """Start a standalone cluster on this machine; gives its master's address."""
    jar, rest_port = provisioned("flink"), free_port()
    (folder / "flink-conf.yaml").write_text(
        FLINK_CLUSTER.format(rpc_port=free_port(), rest_port=rest_port, folder=folder) + TRY_AGAIN
    )
    for main_class in (
        "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint",
        "org.apache.flink.runtime.taskexecutor.TaskManagerRunner",
        "org.apache.flink.runtime.taskexecutor.TaskManagerRunner",
    ):
        command = ["java", "-cp", jar, main_class, "--configDir", str(folder)]
        servers.run(command)
    overview = f"http://localhost:{rest_port}/overview"

    def has_two() -> bool:
        try:
            with urllib.request.urlopen(overview, timeout=5) as answer:
                return bool(json.load(answer)["taskmanagers"] == 2)
        except OSError:
            return False

    wait_until(has_two, "two task managers")
    return f"localhost:{rest_port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_served(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port), timeout=1).close()
    except OSError:
        return False
    return True


# --- The test --------------------------------------------------------------------------------


def check_like(out: Path, reference: Path) -> None:
    """The same units in the same files, the same rows, and verify finds it whole."""
    check_same_names(files_below(out), files_below(reference))
    check_same_rows(out, reference)
    assert run_verify(str(out)) == 0


@pytest.mark.parametrize(
    "runner",
    [
        *IN_PYTHON,
        *("job_service", "prism", "direct_on_prism", "flink"),
        pytest.param("flink_cluster", marks=pytest.mark.slow),
    ],
)
def test_every_runner_gives_the_same_result_and_does_nothing_twice(
    runner: str,
    options: list[str],
    label: Labeller,
    reference: Path,
    servers: Servers,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    assert label(out, options) == 0
    check_like(out, reference)
    if runner.startswith("flink"):
        assert servers.count("switched from RUNNING to FINISHED") > 0  # it was Flink that did it
        assert servers.count("switched from RUNNING to FAILED") == 0  # and at the first try

    before = committed_files(out)
    assert label(out, options) == 0
    assert committed_files(out) == before

    lost = min((out / "windows").glob("*.parquet"))
    lost.unlink()
    assert label(out, options) == 0
    check_like(out, reference)
    after = committed_files(out)
    changed = {name for name in after if after[name] != before[name]}
    assert {Path(name).stem for name in changed} == {lost.stem}


@pytest.fixture(scope="module")
def slow_inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model that takes a unit long enough to be met in the middle of it, and clips."""
    folder = tmp_path_factory.mktemp("slow")
    model = write_tiny_model(folder / "model", hidden_size=64, frequency_stride=10, time_stride=10)
    for index in range(SLOW_CLIPS):
        write_noise(folder / "clips" / f"{index:02}.wav", seed=index)
    return model, folder / "clips"


def worker_processes(servers: Servers) -> list[int]:
    """The worker processes that servers have started."""
    ours = {process.pid for process in servers.processes}
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not folder.name.isdigit() or os.getsid(int(folder.name)) not in ours:
                continue
            command = (folder / "cmdline").read_bytes()
            if b"SdkHarness" in command or b"beam_worker.py" in command:
                found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="workers are found by /proc")
@pytest.mark.parametrize(
    "runner", ["flink_with_pool", pytest.param("flink_cluster", marks=pytest.mark.slow)]
)
def test_a_worker_that_is_killed_in_the_middle_costs_nothing(
    runner: str,
    options: list[str],
    servers: Servers,
    slow_inputs: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    model, clips = slow_inputs
    label = Labeller(model, clips)
    assert label(tmp_path / "reference", []) == 0

    out, killed = tmp_path / "out", []

    def kill_one() -> None:
        wait_until(lambda: num_commits(out) >= 2 and worker_processes(servers) != [], "a worker")
        os.kill(worker_processes(servers)[0], signal.SIGKILL)
        killed.append(num_commits(out))

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    assert label(out, options) == 0
    killer.join()
    assert killed and killed[0] < SLOW_CLIPS // WINDOWS_PER_UNIT, (
        "it was over before the worker died"
    )
    check_like(out, tmp_path / "reference")


def test_an_interrupt_ends_the_job_too(
    prism_server: int,
    slow_inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, clips = slow_inputs
    out = tmp_path / "out"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tmp").mkdir()
    setup = Setup([clips], model, tmp_path / "tmp", WINDOWS_PER_UNIT)
    runner = ["--runner=PrismRunner", f"--job_endpoint=localhost:{prism_server}"]
    run = Run(setup, out, "--engine", "torch", "--", *runner, cold=True)
    wait_until(lambda: num_commits(out) > 0 or run.exit_code() is not None, "a commit")
    run.send(signal.SIGINT, to_group=False)
    assert run.wait() == 130, run.words()
    assert run.words().endswith(INTERRUPTED)
    with grpc.insecure_channel(f"localhost:{prism_server}") as channel:
        service = beam_job_api_pb2_grpc.JobServiceStub(channel)
        jobs = service.GetJobs(beam_job_api_pb2.GetJobsRequest(), timeout=PATIENCE_S)
    states = [beam_job_api_pb2.JobState.Enum.Name(job.state) for job in jobs.job_info]
    assert states == ["CANCELLED"]
