"""Runners behind a job service: Flink, Spark, Prism, and others with Beam's protocol.

The command submits a job to the service, which gives bundles to workers. These are threads of the
command itself (LOOPBACK, the default if everything is on this machine), processes of a running
worker pool (EXTERNAL), processes that the service starts (PROCESS), or containers (DOCKER, the
default otherwise).
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, SetupOptions

from transforms.errors import ConfigError

SEE_DOCS = "docs/runners.md has the commands."

# The options that name a runner's machines. Each runner accepts the address of a job service.
MASTERS: Mapping[str, tuple[str, ...]] = {
    "flinkrunner": ("flink_master", "job_endpoint"),
    "sparkrunner": ("spark_master_url", "job_endpoint"),
    "prismrunner": ("job_endpoint",),
    "portablerunner": ("job_endpoint",),
}

# Masters without an address, which are started for the job on this machine.
STARTED_HERE = re.compile(r"\[?(local|auto|collection|embed)(\[[\d,*]+\])?\]?", re.IGNORECASE)

# Options for a batch that Flink's job server accepts and Beam's Python does not know, from the job
# server's answer to DescribePipelineOptions. Not number_of_execution_retries, which has no effect
# on a batch: Flink's own restart-strategy governs its retries.
JOB_SERVER_OPTIONS: Mapping[str, frozenset[str]] = {
    "flinkrunner": frozenset(
        {
            "attached_mode",
            "disable_metrics",
            "enable_heap_dumps",
            "environment_expiration_millis",
            "execution_mode_for_batch",
            "faster_copy",
            "flink_conf_dir",
            "load_balance_bundles",
            "max_bundle_size",
            "max_bundle_time_mills",
            "object_reuse",
            "operator_chaining",
            "re_iterable_group_by_key_result",
            "use_data_stream_for_batch",
        }
    )
}


def is_on_this_machine(address: str | None) -> bool:
    """Return whether a master or endpoint is on this machine (``[local]``, ``localhost:8081``)."""
    if not address or STARTED_HERE.fullmatch(address.strip()):
        return True
    address = address.strip()
    try:
        host = urlsplit(address if "//" in address else f"//{address}").hostname or ""
    except ValueError:  # brackets around something else than an IPv6 address
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def has_all_machines_here(runner: str, options: PipelineOptions) -> bool:
    """Return whether a runner's (its class in lower case) service and workers are here."""
    values = options.get_all_options()
    return all(is_on_this_machine(values.get(name)) for name in MASTERS.get(runner, ()))


def check_workers(runner: str, options: PipelineOptions) -> None:
    """Raise ``ConfigError`` if workers would run in Beam's own image, which has no Earmark."""
    portable, setup = options.view_as(PortableOptions), options.view_as(SetupOptions)
    if runner not in MASTERS or portable.environment_type not in (None, "DOCKER"):
        return
    if portable.environment_type is None and _is_loopback(runner, options):
        return
    image = portable.environment_config
    image = image or portable.lookup_environment_option("docker_container_image")
    if image or setup.setup_file or setup.requirements_file or setup.extra_packages:
        return
    raise ConfigError(
        "workers would run in Beam's own image, which has neither Earmark nor torch; give "
        "--environment_type=LOOPBACK (threads of this command), --environment_type=EXTERNAL with "
        "--environment_config=HOST:PORT (a worker pool), --environment_type=PROCESS with "
        "deploy/beam_worker.py, or --environment_type=DOCKER with "
        f"--environment_config=IMAGE (built from deploy/Dockerfile). {SEE_DOCS}"
    )


def _is_loopback(runner: str, options: PipelineOptions) -> bool:
    """Return whether Beam's default workers are threads of this process."""
    values = options.get_all_options()
    if values["output_executable_path"]:
        return False
    if runner == "flinkrunner":
        return values["flink_master"] in ("[local]", "[auto]")
    if runner == "sparkrunner":
        return STARTED_HERE.fullmatch(values["spark_master_url"]) is not None
    return runner == "prismrunner"


def wait_for(result: Any) -> None:
    """Wait for the end of a pipeline; an interrupt cancels the job of a job service."""
    try:
        result.wait_until_finish()
    except KeyboardInterrupt:
        from apache_beam.runners.portability import portable_runner

        if isinstance(result, portable_runner.PipelineResult):
            # A service that this command started may have ended already.
            with contextlib.suppress(Exception):
                result.cancel()
        raise
