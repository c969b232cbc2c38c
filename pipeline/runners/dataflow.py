"""Runs on Dataflow: checks before there is a job, and the job while it lasts.

A mistake that only a worker would notice costs minutes of machines, so it is refused here if
possible. A job outlives the command that submitted it. Its name stays in ``_job.json`` in the
output until it has ended, and no other run starts there before. Tested with the service's client
library, not with the service.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
from collections.abc import Sequence
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
INSTALL = "run pip install '.[gcp]' in Earmark's checkout"
SEE_DOCS = "docs/dataflow.md has the commands."

# A job in one of these states has no worker that writes.
ENDED_STATES = frozenset(
    f"JOB_STATE_{name}" for name in ("DONE", "FAILED", "CANCELLED", "UPDATED", "DRAINED")
)


# --- Checks ----------------------------------------------------------------------------------


def is_dataflow(options: PipelineOptions) -> bool:
    """Return whether the runner is Dataflow's."""
    # Beam accepts names with and without "Runner" at the end, and with the class's module.
    name = str(options.view_as(StandardOptions).runner).lower().rpartition(".")[2]
    name = name.removesuffix("runner")
    return f"{name}runner" == RUNNER.lower()


def check_dataflow(options: PipelineOptions) -> None:
    """Raise ``ConfigError`` for a job that the service would refuse, or that no worker could do."""
    if options.view_as(TestOptions).dry_run:
        raise ConfigError(
            "Beam's dry_run builds a job and submits none; to see what a run would do, use "
            "earmark plan."
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
        # Beam's own message for this names neither value.
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
    """Refuse temporary locations that are no folders of a bucket; Beam would make a bucket."""
    cloud = options.view_as(GoogleCloudOptions)
    names = ("temp_location", "staging_location")
    given = {name: place for name in names if (place := getattr(cloud, name)) is not None}
    if not given:
        raise ConfigError(
            "no temp_location is given for the job's own files; give a folder of a bucket: "
            f"--temp_location=gs://BUCKET/tmp. {SEE_DOCS}"
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
            "no sdk_container_image is given, and Beam's own has neither Earmark nor torch; "
            "build one from deploy/Dockerfile, and give --sdk_container_image=REGISTRY/IMAGE:TAG. "
            f"{SEE_DOCS}"
        )


def validation_problems(options: PipelineOptions) -> list[str]:
    """Return the errors of Beam's own validation of project, region, job name and workers."""
    validator = PipelineOptionsValidator(options, create_runner(RUNNER))
    problems = validator.validate_cloud_options(options.view_as(GoogleCloudOptions))
    problems += options.view_as(WorkerOptions).validate(validator)
    return [" ".join(text.split()).rstrip(".") for text in problems]


def accelerator_of(options: PipelineOptions) -> str | None:
    """Return the GPU that the job requests for each worker (``type:nvidia-l4;count:1;…``)."""
    given: Sequence[str] = options.view_as(GoogleCloudOptions).dataflow_service_options or ()
    experiments: Sequence[str] = options.view_as(DebugOptions).experiments or ()
    found = [text for text in (*given, *experiments) if text.startswith(ACCELERATOR)]
    if len(found) > 1:
        raise ConfigError(
            f"{ACCELERATOR}… is given {len(found)} times ({', '.join(found)}); keep one of them."
        )
    return found[0].removeprefix(ACCELERATOR) if found else None


def check_device(options: PipelineOptions, device: str) -> None:
    """Raise ``ConfigError`` if workers lack the device, or have a GPU that it does not require."""
    accelerator = accelerator_of(options)
    if accelerator is None and device in ("cuda", "mps"):
        raise ConfigError(
            f"inference.device is {device}, and the workers have no such device; request one "
            f"(--dataflow_service_options='{ACCELERATOR}type:nvidia-l4;count:1;"
            "install-nvidia-driver'), or use --device cpu."
        )
    if accelerator is not None and device != "cuda":
        raise ConfigError(
            f"inference.device is {device}, and the workers have a GPU ({accelerator}); use "
            "--device cuda. Otherwise a worker with an unsuitable driver would label on its CPU, "
            "at the price of a GPU."
        )
    if accelerator is not None and "install-nvidia-driver" not in accelerator:
        raise ConfigError(
            f"the workers' GPU is {accelerator}; must end in ;install-nvidia-driver, or there is "
            "no driver for it."
        )


def is_left_running(options: PipelineOptions) -> bool:
    """Return whether the command ends before the job, or only writes a template."""
    if options.view_as(StandardOptions).no_wait_until_finish:
        return True
    is_template = options.view_as(GoogleCloudOptions).template_location is not None
    return is_template and is_dataflow(options)


# --- The job ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataflowJob:
    """A job of the service, in the region of the project that pays for it."""

    project: str
    region: str
    job_id: str

    @property
    def console_url(self) -> str:
        """The job's page in the console."""
        return (
            f"https://console.cloud.google.com/dataflow/jobs/{self.region}/{self.job_id}"
            f"?project={self.project}"
        )

    @property
    def cancel_command(self) -> str:
        """The shell command that cancels the job."""
        return (
            f"gcloud dataflow jobs cancel {self.job_id} --region={self.region} "
            f"--project={self.project}"
        )


def job_of(result: Any, options: PipelineOptions) -> DataflowJob | None:
    """Return the job of a runner's result; None if there is none (a template)."""
    if not getattr(result, "has_job", False):
        return None
    cloud = options.view_as(GoogleCloudOptions)
    return DataflowJob(str(cloud.project), str(cloud.region), result.job_id())


def record_job(output: str, job: DataflowJob) -> None:
    """Record a job in the output that it writes."""
    text = json.dumps(dataclasses.asdict(job), indent=2)
    writing.write_bytes(urls.join(output, JOB_FILE), text.encode() + b"\n")


def recorded_job(output: str) -> DataflowJob | None:
    """Return the job recorded in an output, or None; ``OutputError`` if the file is not valid."""
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
    """Ask the service for a job's state (``JOB_STATE_RUNNING``)."""
    dataflow = importlib.import_module("google.cloud.dataflow")
    request = dataflow.GetJobRequest(project_id=job.project, location=job.region, job_id=job.job_id)
    state: str = dataflow.JobsV1Beta3Client().get_job(request=request).current_state.name
    return state


def check_no_job(output: str) -> None:
    """Raise ``OutputError`` if a job writes to the output, or its state is not known."""
    job = recorded_job(output)
    if job is None:
        return
    place = public_uri(output)
    try:
        state = ask_state(job)
    except Exception as error:  # the client and its import may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutputError(
            f"the Dataflow job {job.job_id} may still write to {place}, and its state cannot be "
            f"read ({reason}). If {job.console_url} shows that it has ended, remove "
            f"{public_uri(urls.join(output, JOB_FILE))}, then run this command again."
        ) from error
    if state not in ENDED_STATES:
        raise OutputError(
            f"the Dataflow job {job.job_id} still writes to {place} ({state}); wait for it "
            f"({job.console_url}) or stop it ({job.cancel_command}), then run this command again."
        )
    writing.remove(urls.join(output, JOB_FILE))


def submit(pipeline: beam.Pipeline, output: str, options: PipelineOptions, *, quiet: bool) -> Any:
    """Submit a pipeline, print the job's id and page, and record the job in the output.

    Return the runner's result, for ``follow``. ``quiet`` prints nothing but the id and page.
    """
    result = pipeline.run()
    job = job_of(result, options)
    if job is None:
        place = options.view_as(GoogleCloudOptions).template_location
        say(f"The template was written to {place}; no job was started.")
        return result
    try:
        record_job(output, job)
    except BaseException:
        _cancel(result, job)  # the next run on this output would not know of the job
        raise
    say(f"Dataflow job {job.job_id}: {job.console_url}")
    if is_left_running(options):
        say(f"The command does not wait for it. To stop it: {job.cancel_command}", quiet=quiet)
    else:
        say("Waiting for the job and counting its commits; Ctrl-C cancels it.", quiet=quiet)
    return result


def follow(result: Any, output: str | None, options: PipelineOptions) -> None:
    """Wait for the end of a job; an interrupt cancels it.

    ``output`` is the result's folder, which records the job until it has ended; None for none.
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
    except Exception as error:  # the interrupt is raised again, whatever the service answers
        logger.warning(
            "The Dataflow job %s could not be cancelled (%s) and continues; to cancel it: %s",
            job.job_id,
            error,
            job.cancel_command,
        )
    else:
        say(f"Cancelling the Dataflow job {job.job_id}, which takes some minutes.")


def _has_ended(result: Any) -> bool:
    try:
        return bool(PipelineState.is_terminal(result.state))
    except Exception as error:  # the next run on this output asks again
        logger.warning("The state of the Dataflow job is not known: %s", error)
        return False
