"""Which jobs leave this machine, what of them is refused, and what an interrupt does to one."""

from __future__ import annotations

from typing import Any

import pytest
from apache_beam.runners.portability.portable_runner import PipelineResult

from pipeline.config.label import RunConfig
from pipeline.runners.job_service import wait_for
from pipeline.runners.options import check_runner, is_remote, pipeline_options
from transforms.errors import ConfigError

FLINK = "--runner=FlinkRunner"
EXTERNAL = ("--environment_type=EXTERNAL", "--environment_config=localhost:50000")


@pytest.mark.parametrize(
    ("options", "remote"),
    [
        ([], False),
        (["--runner=DirectRunner"], False),
        ([FLINK], False),
        ([FLINK, "--flink_master=[local]"], False),
        ([FLINK, "--flink_master=localhost:8081"], False),
        ([FLINK, "--flink_master=http://localhost:8081"], False),
        ([FLINK, "--flink_master=127.0.0.1:8081"], False),
        ([FLINK, "--flink_master=[::1]:8081"], False),
        ([FLINK, "--flink_master=10.0.0.1:8081"], True),
        ([FLINK, "--flink_master=https://flink.example:8081"], True),
        ([FLINK, "--flink_master=local.example:8081"], True),
        ([FLINK, "--flink_master=[flink:8081"], True),
        ([FLINK, "--flink_master=[local]", "--job_endpoint=jobs.example:8099"], True),
        (["--runner=flink", "--flink_master=10.0.0.1:8081"], True),
        (["--runner=PrismRunner"], False),
        (["--runner=PrismRunner", "--job_endpoint=jobs.example:8099"], True),
        (["--runner=PortableRunner", "--job_endpoint=localhost:8099"], False),
        (["--runner=PortableRunner", "--job_endpoint=embed"], False),
        (["--runner=SparkRunner", "--spark_master_url=local[*]"], False),
        (["--runner=SparkRunner", "--spark_master_url=spark://host:7077"], True),
        (["--runner=dataflow"], True),
    ],
)
def test_what_counts_as_remote(options: list[str], remote: bool) -> None:
    assert is_remote(pipeline_options(RunConfig(), options)) is remote


@pytest.mark.parametrize(
    "options",
    [
        [FLINK, "--flink_master=localhost:8081"],
        [FLINK, "--flink_master=10.0.0.1:8081", "--environment_type=DOCKER"],
        [FLINK, "--flink_master=[local]", "--environment_type=DOCKER"],
        ["--runner=PortableRunner", "--job_endpoint=localhost:8099"],
        ["--runner=SparkRunner", "--spark_master_url=spark://host:7077"],
    ],
)
def test_workers_without_earmark_are_refused(options: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"neither Earmark nor torch.*--environment_type=LOOPBACK"
    ):
        check_runner(pipeline_options(RunConfig(), options))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--runner=DirectRunner"],
        ["--runner=PrismRunner"],
        [FLINK, "--flink_master=[local]"],
        [FLINK, "--flink_master=localhost:8081", "--environment_type=LOOPBACK"],
        [FLINK, "--flink_master=localhost:8081", *EXTERNAL],
        [FLINK, "--flink_master=10.0.0.1:8081", "--environment_config=registry/earmark:gpu"],
        [
            FLINK,
            "--flink_master=10.0.0.1:8081",
            "--environment_options=docker_container_image=registry/earmark:gpu",
        ],
        ["--runner=PortableRunner", "--job_endpoint=localhost:8099", *EXTERNAL],
        ["--runner=SparkRunner"],
    ],
)
def test_workers_that_have_earmark_are_not_refused(options: list[str]) -> None:
    check_runner(pipeline_options(RunConfig(), options))


def test_options_of_a_job_server_are_known_where_they_go_to_one() -> None:
    folder = "--flink_conf_dir=/etc/flink"
    pipeline_options(RunConfig(), [FLINK, folder])
    with pytest.raises(ConfigError, match="knows no pipeline option --flink_conf_dir"):
        pipeline_options(RunConfig(), [folder])
    with pytest.raises(ConfigError, match="knows no pipeline option --flink_config"):
        pipeline_options(RunConfig(), [FLINK, "--flink_config=/etc/flink"])


class Jobs:
    """A job service whose job is interrupted; notes what it is asked to cancel."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def Cancel(self, request: Any) -> None:  # noqa: N802
        self.cancelled.append(request.job_id)
        raise ConnectionError("it has gone")


def test_an_interrupt_cancels_a_job_and_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: PipelineResult, duration: float | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PipelineResult, "wait_until_finish", interrupt)
    jobs = Jobs()
    with pytest.raises(KeyboardInterrupt):
        wait_for(PipelineResult(jobs, "job-1", iter(()), iter(())))
    assert jobs.cancelled == ["job-1"]
