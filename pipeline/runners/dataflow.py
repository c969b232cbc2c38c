"""A run on Dataflow: what can be wrong before there is a job, and the job while it lasts.

    options ─check─▶ (exit 2, nothing written) ─submit─▶ job ─watch─▶ done, failed, cancelled
                                                          └─▶ _job.json in the output, meanwhile

A mistake that only a worker could notice costs minutes of machines, so as much as possible is
refused here. A job outlives the command that submitted it: its name lies in the output until it
has ended, and no other run starts there before that. Checked against the service's client
library, not against the service.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    TestOptions,
    WorkerOptions,
)
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.runners.runner import PipelineState, create_runner

from pipeline.runners.job_service import wait_for
from pipeline.terminal.std_streams import say
from transforms.errors import ConfigError, OutputError
from transforms.storage import reading, urls, writing
from transforms.storage.secrets import public_uri

logger = logging.getLogger(__name__)

RUNNER = "DataflowRunner"
JOB_FILE = "_job.json"
ACCELERATOR = "worker_accelerator="
INSTALL = "pip install 'earmark[gcp]'"
SEE_DOCS = "docs/dataflow.md has the commands."

# Of a job that is in one of these states, no worker writes any more.
ENDED_STATES = frozenset(
    f"JOB_STATE_{name}" for name in ("DONE", "FAILED", "CANCELLED", "UPDATED", "DRAINED")
)


# --- Before there is a job -------------------------------------------------------------------


def is_dataflow(options: PipelineOptions) -> bool:
    """Whether the runner is Dataflow's."""
    # Beam takes its runners' names with and without their ending.
    name = str(options.view_as(StandardOptions).runner).lower().removesuffix("runner")
    return f"{name}runner" == RUNNER.lower()


def check_dataflow(options: PipelineOptions) -> None:
    """Refuse a job that the service would refuse, or that no worker could do.

    Raises:
        ConfigError: An option is missing or does not go with another.
    """
    if options.view_as(TestOptions).dry_run:
        raise ConfigError(
            "Beam's dry_run builds a job and submits none; earmark plan says what there is to do."
        )
    _check_installed()
    _check_places(options)
    _check_worker_software(options)
    cloud = options.view_as(GoogleCloudOptions)
    if accelerator_of(options) and cloud.flexrs_goal is not None:
        raise ConfigError(
            f"flexrs_goal is {cloud.flexrs_goal}, and FlexRS has no GPUs; leave it out, or leave "
            f"{ACCELERATOR}… out of dataflow_service_options."
        )
    workers = options.view_as(WorkerOptions)
    problems = validation_problems(options)
    if workers.num_workers and workers.max_num_workers:
        # Beam's own words for this name neither value.
        problems = [text for text in problems if "num_workers" not in text]
        if workers.num_workers > workers.max_num_workers:
            problems.append(
                f"num_workers is {workers.num_workers}; must be at most max_num_workers, "
                f"{workers.max_num_workers}"
            )
    if problems:
        raise ConfigError(f"Dataflow: {'; '.join(problems)}. {SEE_DOCS}")


def _check_installed() -> None:
    try:
        importlib.import_module("apache_beam.runners.dataflow.internal.apiclient")
    except ImportError as error:
        raise ConfigError(
            f"runner {RUNNER} needs a package that is not installed ({error}): {INSTALL}"
        ) from error


def _check_places(options: PipelineOptions) -> None:
    """Refuse temporary places that are none; Beam would ask the cloud to make a bucket."""
    cloud = options.view_as(GoogleCloudOptions)
    places = {
        "temp_location": cloud.temp_location,
        "staging_location": cloud.staging_location,
    }
    given = {name: place for name, place in places.items() if place is not None}
    if not given:
        raise ConfigError(
            "no temp_location is given, where Dataflow keeps the job's own files; give a folder "
            f"of a bucket: --temp_location=gs://BUCKET/tmp. {SEE_DOCS}"
        )
    for name, place in given.items():
        if not str(place).startswith("gs://"):
            raise ConfigError(f"{name} is {place}; must be a folder of a bucket, gs://BUCKET/…")


def _check_worker_software(options: PipelineOptions) -> None:
    """Refuse a job whose workers would have no Earmark."""
    setup = options.view_as(SetupOptions)
    sources = (
        options.view_as(WorkerOptions).sdk_container_image,
        setup.setup_file,
        setup.requirements_file,
        setup.extra_packages,
    )
    if not any(sources):
        raise ConfigError(
            "no sdk_container_image is given, and Beam's own holds neither Earmark nor torch; "
            "build one from deploy/Dockerfile, and give --sdk_container_image=REGISTRY/IMAGE:TAG. "
            f"{SEE_DOCS}"
        )


def validation_problems(options: PipelineOptions) -> list[str]:
    """What Beam's own validation says of project, region, job name and workers."""
    validator = PipelineOptionsValidator(options, create_runner(RUNNER))
    problems = validator.validate_cloud_options(options.view_as(GoogleCloudOptions))
    problems += options.view_as(WorkerOptions).validate(validator)
    return [" ".join(text.split()).rstrip(".") for text in problems]


def accelerator_of(options: PipelineOptions) -> str | None:
    """What the job asks for as each worker's GPU, ``type:nvidia-l4;count:1;…``; None for none."""
    given: Sequence[str] = options.view_as(GoogleCloudOptions).dataflow_service_options or ()
    experiments: Sequence[str] = options.view_as(DebugOptions).experiments or ()
    found = [text for text in (*given, *experiments) if text.startswith(ACCELERATOR)]
    if len(found) > 1:
        raise ConfigError(
            f"{ACCELERATOR}… is given {len(found)} times ({', '.join(found)}); keep one of them."
        )
    return found[0].removeprefix(ACCELERATOR) if found else None


def check_device(options: PipelineOptions, device: str) -> None:
    """Refuse a device that does not go with the workers.

    Args:
        options: Beam's.
        device: ``inference.device``.

    Raises:
        ConfigError: Workers have a GPU and need not use it, or are to use one and have none.
    """
    accelerator = accelerator_of(options)
    if accelerator is None and device in ("cuda", "mps"):
        raise ConfigError(
            f"inference.device is {device}, and the workers have no such device; ask for one "
            f"(--dataflow_service_options='{ACCELERATOR}type:nvidia-l4;count:1;"
            "install-nvidia-driver'), or use --device cpu."
        )
    if accelerator is not None and device != "cuda":
        raise ConfigError(
            f"inference.device is {device}, and the workers have a GPU ({accelerator}); use "
            "--device cuda. Otherwise a worker whose driver does not fit would label on its CPU, "
            "at the price of a GPU."
        )
    if accelerator is not None and "install-nvidia-driver" not in accelerator:
        raise ConfigError(
            f"the workers' GPU is {accelerator}; must end in ;install-nvidia-driver, without which "
            "there is no driver for it."
        )


def is_left_running(options: PipelineOptions) -> bool:
    """Whether the command ends before the job does: not waited for, or only made a template of."""
    if options.view_as(StandardOptions).no_wait_until_finish:
        return True
    is_template = options.view_as(GoogleCloudOptions).template_location is not None
    return is_template and is_dataflow(options)


# --- While there is one ----------------------------------------------------------------------


@dataclass(frozen=True)
class DataflowJob:
    """A job of the service.

    Attributes:
        project: The project that pays for it.
        region: Where it runs.
        job_id: The service's name for it.
    """

    project: str
    region: str
    job_id: str

    @property
    def console_url(self) -> str:
        """Where people can look at it."""
        return (
            f"https://console.cloud.google.com/dataflow/jobs/{self.region}/{self.job_id}"
            f"?project={self.project}"
        )

    @property
    def cancel_command(self) -> str:
        """What ends it."""
        return (
            f"gcloud dataflow jobs cancel {self.job_id} --region={self.region} "
            f"--project={self.project}"
        )


def job_of(result: Any, options: PipelineOptions) -> DataflowJob | None:
    """The job that a runner's result stands for; None where there is none (a template)."""
    if not getattr(result, "has_job", False):
        return None
    cloud = options.view_as(GoogleCloudOptions)
    return DataflowJob(str(cloud.project), str(cloud.region), result.job_id())


def record_job(output: str, job: DataflowJob) -> None:
    """Leave a job's name in the output that it writes."""
    text = json.dumps(dataclasses.asdict(job), indent=2)
    writing.write_bytes(urls.join(output, JOB_FILE), text.encode() + b"\n")


def recorded_job(output: str) -> DataflowJob | None:
    """The job that has written an output last, as far as is known.

    Raises:
        OutputError: The file is not Earmark's.
    """
    url = urls.join(output, JOB_FILE)
    try:
        return DataflowJob(**json.loads(reading.read_bytes(url)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"{public_uri(url)} does not name a Dataflow job ({error}); if no job writes "
            "to this folder, remove it and run this command again."
        ) from error


def ask_state(job: DataflowJob) -> str:
    """The service's word for how a job is: ``JOB_STATE_RUNNING``."""
    dataflow = importlib.import_module("google.cloud.dataflow")
    request = dataflow.GetJobRequest(project_id=job.project, location=job.region, job_id=job.job_id)
    state: str = dataflow.JobsV1Beta3Client().get_job(request=request).current_state.name
    return state


def check_no_job(output: str, ask: Callable[[DataflowJob], str] | None = None) -> None:
    """Refuse an output that a job still writes to.

    Args:
        output: The result's folder.
        ask: Gives a job's state; None asks the service.

    Raises:
        OutputError: There is such a job, or it cannot be told whether there is.
    """
    job = recorded_job(output)
    if job is None:
        return
    place = public_uri(output)
    try:
        state = (ask or ask_state)(job)
    except Exception as error:  # whatever a client of the service may raise, its import included
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutputError(
            f"the Dataflow job {job.job_id} may still write to {place}, and cannot be asked for "
            f"({reason}). If {job.console_url} shows that it has ended, remove "
            f"{public_uri(urls.join(output, JOB_FILE))}, then run this command again."
        ) from error
    if state not in ENDED_STATES:
        raise OutputError(
            f"the Dataflow job {job.job_id} still writes to {place} ({state}); wait for it "
            f"({job.console_url}) or stop it ({job.cancel_command}), then run this command again."
        )
    writing.remove(urls.join(output, JOB_FILE))


def submit(pipeline: beam.Pipeline, output: str, options: PipelineOptions, *, quiet: bool) -> Any:
    """Hand a pipeline to the service, say which job it is, and leave its name in the output.

    Args:
        pipeline: What is to be done.
        output: The result's folder.
        options: Beam's.
        quiet: Say no more than the job's name and place.

    Returns:
        The runner's result, for ``follow``.
    """
    result = pipeline.run()
    job = job_of(result, options)
    if job is None:
        place = options.view_as(GoogleCloudOptions).template_location
        say(f"No job has been started: the template was written to {place}.")
        return result
    try:
        record_job(output, job)
    except BaseException:
        _cancel(result, job)  # a job that the next run on this output would not know of
        raise
    say(f"Dataflow job {job.job_id}: {job.console_url}")
    if is_left_running(options):
        say(f"It is not waited for. To stop it: {job.cancel_command}", quiet=quiet)
    else:
        say("It is waited for; Ctrl-C cancels it. What it commits is counted here.", quiet=quiet)
    return result


def follow(result: Any, output: str | None, options: PipelineOptions) -> None:
    """Wait for a job's end; whoever interrupts that ends the job.

    Args:
        result: The runner's.
        output: The result's folder, where the job's name lies until it has ended; None for none.
        options: Beam's.
    """
    job = job_of(result, options)
    if job is None:
        wait_for(result)
        return
    try:
        result.wait_until_finish()
    except KeyboardInterrupt:
        _cancel(result, job)
        raise
    finally:
        if output is not None and _has_ended(result):
            writing.remove(urls.join(output, JOB_FILE))


def _cancel(result: Any, job: DataflowJob) -> None:
    try:
        result.cancel()
    except Exception as error:  # the interrupt must come through, whatever the service says
        logger.warning(
            "The Dataflow job %s could not be cancelled (%s) and goes on: %s",
            job.job_id,
            error,
            job.cancel_command,
        )
    else:
        say(f"The Dataflow job {job.job_id} is being cancelled; that takes some minutes.")


def _has_ended(result: Any) -> bool:
    try:
        return bool(PipelineState.is_terminal(result.state))
    except Exception as error:  # the next run on this output asks again
        logger.warning("Whether the Dataflow job has ended is not known: %s", error)
        return False
