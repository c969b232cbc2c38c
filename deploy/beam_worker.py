#!/usr/bin/env python3
"""Start of a Beam worker without a container: the command of ``--environment_type=PROCESS``.

    --environment_config='{"command": "/path/to/beam_worker.py", "env": {"PATH": "/venv/bin:/bin"}}'

A task manager of Flink or Spark runs this command once and ends it with the job. The command asks
where the job's services are, then becomes the worker, as in Beam's image. The first ``python3`` on
the PATH must have Earmark. Unlike with a worker pool, the log goes to the task manager's.
"""

from __future__ import annotations

import argparse
import os

import grpc
from apache_beam.portability.api import beam_provision_api_pb2, beam_provision_api_pb2_grpc
from google.protobuf import json_format, text_format


def main() -> None:
    """Ask the runner for its services and work for it until the job ends."""
    parser = argparse.ArgumentParser(description="Start a Beam worker; called by a runner.")
    parser.add_argument("--id", required=True, help="the runner's name for this worker")
    parser.add_argument("--provision_endpoint", required=True, help="host:port of the services")
    given, _ = parser.parse_known_args()  # runners pass more, each its own
    with grpc.insecure_channel(given.provision_endpoint) as channel:
        service = beam_provision_api_pb2_grpc.ProvisionServiceStub(channel)
        info = service.GetProvisionInfo(
            beam_provision_api_pb2.GetProvisionInfoRequest(),
            metadata=(("worker_id", given.id),),
            timeout=60,
        ).info
    os.environ |= {
        "WORKER_ID": given.id,
        "PIPELINE_OPTIONS": json_format.MessageToJson(info.pipeline_options),
        "LOGGING_API_SERVICE_DESCRIPTOR": text_format.MessageToString(info.logging_endpoint),
        "CONTROL_API_SERVICE_DESCRIPTOR": text_format.MessageToString(info.control_endpoint),
        "RUNNER_CAPABILITIES": " ".join(info.runner_capabilities),
    }
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main([])


if __name__ == "__main__":
    main()
