"""A run on Dataflow, as far as it can be checked without Dataflow.

The job is built for good, by Beam's own client of the service, from our graph and our configs; what
it would upload is kept here instead. The service is played by a result that does the work in this
process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import fsspec
import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow.internal import apiclient
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineState

from pipeline.cli import main as cli
from pipeline.config.label import RunConfig
from pipeline.config.load import load_config
from pipeline.graph import build_graph
from pipeline.labelling.estimate import run_plan
from pipeline.labelling.plan import ResolvedRun
from pipeline.labelling.plan_on_workers import build_deferred_graph
from pipeline.labelling.run import run_label
from pipeline.labelling.stats import run_stats
from pipeline.result.state import ResultState
from pipeline.runners.dataflow import JOB_FILE, DataflowJob, check_no_job, recorded_job
from pipeline.runners.options import pipeline_options
from pipeline.terminal.time_report import UNTIMED
from tests.support import audio_factory
from tests.support.flex_template import IMAGE, launcher
from tests.support.stages import STEPS, stages_with
from tests.support.unit_factory import file_unit
from transforms.errors import ConfigError, ModelError, OutputError
from transforms.inference.backbones import InferenceSettings
from transforms.label_audio import LabelSettings, make_settings
from transforms.models.ast.checkpoints import resolve_model
from transforms.results.write_units import CommitSettings
from transforms.storage import filesystem, reading, writing

REQUIRED = {
    "project": "proj-1",
    "region": "us-central1",
    "temp_location": "gs://mybucket/tmp",
    "sdk_container_image": IMAGE,
}
L4 = "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"
T4 = "worker_accelerator=type:nvidia-tesla-t4;count:1;install-nvidia-driver"
JOB = DataflowJob("proj-1", "us-central1", "2026-01-01_00_00_00-1")


def flags(**changes: str | None) -> list[str]:
    """The options that no config can know, as they come behind ``--``."""
    given = {**REQUIRED, **changes}
    return ["--no_auth", *(f"--{name}={text}" for name, text in given.items() if text is not None)]


@contextlib.contextmanager
def without_cloud() -> Iterator[dict[str, bytes]]:
    """Keep what would be uploaded, by its URL; nothing asks a bucket for its policy."""
    staged: dict[str, bytes] = {}

    def keep(
        self: object, place: str, name: str, stream: Any, *rest: object, **more: object
    ) -> None:
        staged[f"{place}/{name}"] = stream.read()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apiclient.DataflowApplicationClient, "stage_file", keep)
        patch.setattr(GoogleCloudOptions, "_warn_if_soft_delete_policy_enabled", lambda *_: None)
        yield staged


@pytest.fixture(autouse=True)
def staged(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    monkeypatch.setenv("PATH", "")  # no gcloud, which Beam would ask for a region
    with without_cloud() as found:
        yield found


# --- The job ---------------------------------------------------------------------------------


class Built(NamedTuple):
    """A job as it would be handed to the service."""

    job: dict[str, Any]
    proto: beam_runner_api_pb2.Pipeline
    staged: set[str]

    @property
    def pool(self) -> dict[str, Any]:
        (pool,) = self.job["environment"]["workerPools"]
        return dict(pool)


Draw = Callable[[beam.Pipeline, LabelSettings, CommitSettings], None]


def draw_planned(pipeline: beam.Pipeline, label: LabelSettings, commit: CommitSettings) -> None:
    """A run whose units are known."""
    build_graph(pipeline, [file_unit("u", 2), file_unit("v", 3)], label, commit, print)


def draw_deferred(pipeline: beam.Pipeline, label: LabelSettings, commit: CommitSettings) -> None:
    """A run that begins with its own planning."""
    resolved = ResolvedRun(
        urls=("gs://mybucket/recordings",),
        state=ResultState(commit.output),
        label=label,
        commit=commit,
        run={},
        limit=None,
        keeps=True,
        truth=None,
        retry_failed=False,
    )
    build_deferred_graph(pipeline, resolved, UNTIMED)


def build(
    folder: Path, options: PipelineOptions, model: Path, device: str, draw: Draw = draw_planned
) -> Built:
    with without_cloud() as uploaded:
        options.view_as(GoogleCloudOptions).template_location = str(folder / "job.json")
        inference = InferenceSettings(device=device)  # type: ignore[arg-type]
        label = make_settings(resolve_model(str(model)), inference=inference)
        commit = CommitSettings(
            "gs://mybucket/out", "run", "f" * 64, label.model.sha256, label.rows
        )
        pipeline = beam.Pipeline(options=options)
        draw(pipeline, label, commit)
        pipeline.run()
    staged = {url.rpartition("/")[2]: data for url, data in uploaded.items()}
    proto = beam_runner_api_pb2.Pipeline.FromString(staged.pop("pipeline.pb"))
    return Built(json.loads(staged.pop("job.json")), proto, set(staged))


@pytest.fixture(scope="module")
def jobs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """The jobs of both configs, by the device that they label on."""
    folder = tmp_path_factory.mktemp("jobs")
    found = {}
    for device, name in (("cuda", "dataflow_gpu"), ("cpu", "dataflow_cpu")):
        config = load_config(RunConfig, name)
        assert config.inference.device == device
        found[device] = build(folder, pipeline_options(config, flags()), tiny_model, device)
    return found


def test_the_gpu_job_is_what_its_config_says(jobs: dict[str, Built]) -> None:
    environment, pool = jobs["cuda"].job["environment"], jobs["cuda"].pool
    assert jobs["cuda"].job["type"] == "JOB_TYPE_BATCH"
    assert environment["serviceOptions"] == [L4]
    assert "no_use_multiple_sdk_containers" in environment["experiments"]
    assert "use_multiple_sdk_containers" not in environment["experiments"]
    assert "use_runner_v2" in environment["experiments"]
    assert (pool["machineType"], pool["numWorkers"]) == ("g2-standard-8", 4)
    assert (pool["diskSizeGb"], pool["numThreadsPerWorker"]) == (100, 4)
    assert pool["autoscalingSettings"] == {"algorithm": "AUTOSCALING_ALGORITHM_NONE"}
    assert "ipConfiguration" not in pool


def test_the_cpu_job_is_what_its_config_says(jobs: dict[str, Built]) -> None:
    environment, pool = jobs["cpu"].job["environment"], jobs["cpu"].pool
    assert "serviceOptions" not in environment
    assert "no_use_multiple_sdk_containers" in environment["experiments"]
    assert (pool["machineType"], pool["numThreadsPerWorker"]) == ("n2-standard-8", 2)
    assert pool["autoscalingSettings"] == {
        "algorithm": "AUTOSCALING_ALGORITHM_BASIC",
        "maxNumWorkers": 10,
    }


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_all_steps_run_in_one_environment_of_our_image(jobs: dict[str, Built], device: str) -> None:
    (image,) = jobs[device].pool["sdkHarnessContainerImages"]
    assert image["containerImage"] == IMAGE
    environments = jobs[device].proto.components.environments
    (payload,) = {
        beam_runner_api_pb2.DockerPayload.FromString(environment.payload).container_image
        for environment in environments.values()
    }
    assert payload == IMAGE
    used = {
        transform.environment_id
        for transform in jobs[device].proto.components.transforms.values()
        if transform.environment_id
    }
    assert len(used) == 1
    # A hint on a step would give it an environment, and machines, of its own.
    assert [dict(environment.resource_hints) for environment in environments.values()] == [
        {}
    ] * len(environments)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_reading_to_commit_is_one_stage_of_the_job(jobs: dict[str, Built], device: str) -> None:
    assert stages_with(jobs[device].proto) == [set(STEPS)]


def test_a_job_that_plans_for_itself_is_small_and_keeps_the_stage(
    tmp_path: Path, tiny_model: Path
) -> None:
    options = pipeline_options(load_config(RunConfig, "dataflow_gpu"), flags())
    built = build(tmp_path, options, tiny_model, "cuda", draw_deferred)
    planning = ("List and compare", "Cut containers")
    stages = stages_with(built.proto, (*planning, *STEPS))
    assert stages == [{planning[0]}, {planning[1]}, set(STEPS)]
    assert len(json.dumps(built.job)) < 1 << 20
    assert len({e.payload for e in built.proto.components.environments.values()}) == 1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_nothing_is_staged_that_workers_would_install(jobs: dict[str, Built], device: str) -> None:
    # The list of what is installed here is for the service's own warnings.
    assert jobs[device].staged == {"submission_environment_dependencies.txt"}
    options = jobs[device].job["environment"]["sdkPipelineOptions"]["options"]
    assert options["save_main_session"] is False
    assert not options.get("setup_file")


def test_the_main_session_stays_here_unless_it_is_asked_for() -> None:
    def saved(*given: str) -> object:
        return pipeline_options(RunConfig(), list(given)).get_all_options()["save_main_session"]

    assert saved() is False
    assert saved("--save_main_session") is True


# --- What is refused before there is a job ----------------------------------------------------


REFUSED = ["inputs=memory://in", "output=memory://refused/out"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dataflow_gpu", flags(temp_location=None), "no temp_location is given"),
        (
            "dataflow_gpu",
            flags(temp_location="/tmp/x"),
            "temp_location is /tmp/x; must be a folder",
        ),
        ("dataflow_gpu", flags(project=None), "project"),
        ("dataflow_gpu", flags(region=None), "region"),
        ("dataflow_gpu", flags(job_name="Not Valid"), "job_name"),
        ("dataflow_gpu", flags(sdk_container_image=None), "build one from deploy/Dockerfile"),
        ("dataflow_gpu", flags(max_num_workers="2"), "num_workers is 4; must be at most"),
        ("dataflow_gpu", flags(flexrs_goal="COST_OPTIMIZED"), "FlexRS has no GPUs"),
        ("dataflow_gpu", flags(dry_run="True"), "to see what a run would do, use earmark plan"),
        (
            "dataflow_gpu",
            flags(dataflow_service_options="worker_accelerator=type:nvidia-l4;count:1"),
            "must end in ;install-nvidia-driver",
        ),
        (
            "dataflow_gpu",
            [*flags(), f"--dataflow_service_options={L4}", f"--dataflow_service_options={T4}"],
            "is given 2 times",
        ),
        ("dataflow_cpu", flags(dataflow_service_options=L4), "at the price of a GPU"),
    ],
)
def test_a_job_that_could_not_be_done_is_refused_before_anything_is_written(
    name: str, options: list[str], message: str
) -> None:
    config = load_config(RunConfig, name, REFUSED)
    with pytest.raises(ConfigError, match=message):
        run_label(config, options)
    assert not filesystem.exists("memory://refused/out")


def test_a_gpu_that_the_workers_have_not_is_refused() -> None:
    sets = [*REFUSED, "inference.device=cuda"]
    with pytest.raises(ConfigError, match="the workers have no such device"):
        run_label(load_config(RunConfig, "dataflow_cpu", sets), flags())


def test_a_local_output_is_refused(tmp_path: Path) -> None:
    sets = ["inputs=memory://in", f"output={tmp_path}/out", "model.name=x/y"]
    with pytest.raises(ConfigError, match="--output is the local path"):
        run_label(load_config(RunConfig, "dataflow_cpu", sets), flags())
    assert not (tmp_path / "out").exists()


def test_without_the_client_of_the_service_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr("pipeline.runners.dataflow.importlib.import_module", fail)
    config = load_config(RunConfig, "dataflow_cpu", REFUSED)
    with pytest.raises(ConfigError, match=r"pip install '.\[gcp\]'"):
        run_label(config, flags())


def test_options_behind_the_dashes_take_the_place_of_the_config_s() -> None:
    config = load_config(RunConfig, "dataflow_gpu")
    options = pipeline_options(config, flags(dataflow_service_options=T4, num_workers="9"))
    cloud = options.view_as(GoogleCloudOptions)
    assert cloud.dataflow_service_options == [T4]
    assert options.get_all_options()["num_workers"] == 9
    assert options.get_all_options()["machine_type"] == "g2-standard-8"
    more = pipeline_options(config, ["--experiments=enable_data_sampling"]).get_all_options()
    assert more["experiments"] == ["no_use_multiple_sdk_containers", "enable_data_sampling"]


def test_stats_waits_for_its_job() -> None:
    config = load_config(RunConfig, "dataflow_cpu", ["inputs=memory://in"])
    with pytest.raises(ConfigError, match="leave out no_wait_until_finish"):
        run_stats(config, [*flags(), "--no_wait_until_finish"])


# --- The job while it lasts -------------------------------------------------------------------


class Service:
    """Plays Dataflow: the job does its work in this process, when it is waited for.

    Attributes:
        state: What the service says of the job.
        calls: What was asked of it.
    """

    has_job = True

    def __init__(self) -> None:
        self.state = PipelineState.RUNNING
        self.calls: list[str] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self._pipeline: beam.Pipeline | None = None

    def run(self, pipeline: beam.Pipeline) -> Service:
        self.calls.append("run")
        self._pipeline = pipeline
        return self

    def job_id(self) -> str:
        return JOB.job_id

    def wait_until_finish(self) -> None:
        self.calls.append("wait")
        self.meanwhile()
        self.work()

    def work(self) -> None:
        assert self._pipeline is not None
        FnApiRunner().run_pipeline(self._pipeline, PipelineOptions([])).wait_until_finish()
        self.state = PipelineState.DONE

    def cancel(self) -> None:
        self.calls.append("cancel")
        self.state = PipelineState.CANCELLING


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    monkeypatch.setattr(beam.Pipeline, "run", lambda pipeline: service.run(pipeline))
    return service


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Iterator[RunConfig]:
    """Two clips and a model, in a store."""
    store = fsspec.filesystem("memory")
    for index in range(2):
        clip = audio_factory.write(tmp_path / f"{index}.wav", audio_factory.noise(1.0), 16_000)
        store.put_file(str(clip), f"/df/in/{index}.wav")
    for path in tiny_model.iterdir():
        store.put_file(str(path), f"/df/model/{path.name}")
    yield load_config(
        RunConfig,
        "dataflow_cpu",
        [
            *("decode.processes=1", "inputs=memory://df/in", "output=memory://df/out"),
            "model.name=memory://df/model",
        ],
    )
    store.rm("/df", recursive=True)


def status() -> str:
    return str(json.loads(reading.read_bytes("memory://df/out/run.json"))["status"])


def test_a_job_is_named_and_waited_for(
    service: Service, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    service.meanwhile = lambda: seen.append(recorded_job("memory://df/out"))
    assert run_label(config, flags()) == 0
    assert service.calls == ["run", "wait"]
    assert seen == [JOB]
    assert not filesystem.exists(f"memory://df/out/{JOB_FILE}")
    assert (status(), filesystem.exists("memory://df/out/_SUCCESS")) == ("done", True)
    err = capsys.readouterr().err
    assert f"Dataflow job {JOB.job_id}: https://console.cloud.google.com/dataflow/jobs/" in err
    assert "us-central1/2026-01-01_00_00_00-1?project=proj-1" in err
    assert "2 items found: 2 labelled, 0 failed" in err


def test_ctrl_c_cancels_the_job_and_the_output_stays_its_own_until_it_has_ended(
    service: Service, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    service.meanwhile = interrupt
    with pytest.raises(KeyboardInterrupt):
        run_label(config, flags())
    assert service.calls == ["run", "wait", "cancel"]
    assert recorded_job("memory://df/out") == JOB
    states = iter(["JOB_STATE_CANCELLING", "JOB_STATE_CANCELLED"])
    monkeypatch.setattr("pipeline.runners.dataflow.ask_state", lambda job: next(states))
    with pytest.raises(OutputError, match=r"still writes to memory://df/out \(JOB_STATE_CANCEL"):
        run_label(config, flags())
    service.meanwhile = lambda: None
    assert run_label(config, flags()) == 0
    assert status() == "done"


def test_a_job_need_not_be_waited_for(
    service: Service,
    config: RunConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = iter(["JOB_STATE_RUNNING", "JOB_STATE_DONE"])
    monkeypatch.setattr("pipeline.runners.dataflow.ask_state", lambda job: next(states))
    assert run_label(config, [*flags(), "--no_wait_until_finish"]) == 0
    assert service.calls == ["run"]
    assert status() == "running"
    err = capsys.readouterr().err
    assert f"To stop it: gcloud dataflow jobs cancel {JOB.job_id} --region=us-central1" in err
    assert "earmark verify memory://df/out" in err
    with pytest.raises(OutputError, match="still writes"):
        check_no_job("memory://df/out")
    service.work()  # the graph's last step is the job's, not the command's
    assert status() == "done"
    check_no_job("memory://df/out")
    assert recorded_job("memory://df/out") is None


def test_a_job_that_cannot_be_asked_for_keeps_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    writing.write_bytes(
        f"memory://asked/out/{JOB_FILE}", json.dumps(dataclasses.asdict(JOB)).encode()
    )

    def fail(job: DataflowJob) -> str:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr("pipeline.runners.dataflow.ask_state", fail)
    with pytest.raises(OutputError, match=r"state cannot be read \(no route\).* remove memory://"):
        check_no_job("memory://asked/out")
    writing.write_bytes(f"memory://asked/out/{JOB_FILE}", b"nonsense")
    with pytest.raises(OutputError, match="does not name a Dataflow job"):
        check_no_job("memory://asked/out")


def test_the_launcher_writes_a_template_and_ends(
    config: RunConfig,
    staged: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The store of these tests ends with the process, and the command would not have it.
    monkeypatch.setattr("pipeline.cli.commands.check_output_lasts", lambda output: None)
    given = [
        f"--input={config.inputs[0]}",
        f"--output={config.output}",
        f"--model={config.model.name}",
        "--config=dataflow_gpu",
        "--set=labels.top_k=3;decode.processes=1",
        "--runner=DataflowRunner",
        "--template_location=gs://mybucket/t/job.json",
        *flags(),
    ]
    assert cli.main(launcher.make_command(given)) == 0
    job = json.loads(staged["gs://mybucket/t/job.json"])
    assert job["environment"]["serviceOptions"] == [L4]
    assert "The template was written to" in capsys.readouterr().err
    assert recorded_job("memory://df/out") is None
    run = json.loads(reading.read_bytes("memory://df/out/run.json"))
    assert (run["status"], run["config"]["labels"]["top_k"]) == ("running", 3)


def test_a_model_on_this_machine_is_refused(config: RunConfig, tiny_model: Path) -> None:
    model = config.model.model_copy(update={"name": str(tiny_model)})
    with pytest.raises(ModelError, match="is on this machine, and the runner works on others"):
        run_label(config.model_copy(update={"model": model}), flags())
    assert not filesystem.exists("memory://df/out/run.json")


def test_plan_needs_neither_the_gpu_nor_the_cloud(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    beam_section = load_config(RunConfig, "dataflow_gpu").beam
    inference = config.inference.model_copy(update={"device": "cuda"})
    changes = {"inference": inference, "beam": beam_section}
    assert run_plan(config.model_copy(update=changes), []) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Estimate from 2 clips: 2 s of audio, 2 windows." in out
    assert "docs/dataflow.md has a formula for the cost" in out
    assert "Time on this machine" not in out
