"""The stages that a runner makes of a graph."""

from __future__ import annotations

from collections.abc import Iterable

from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

# From reading to commit.
STEPS = ("Skip committed", "Decode", "Cut into windows", "Extract fbank", "Run AST",
         "Assemble rows", "Commit")  # fmt: skip


def stages_with(
    proto: beam_runner_api_pb2.Pipeline, steps: Iterable[str] = STEPS
) -> list[set[str]]:
    """Return which of the steps each stage holds; stages without any are left out."""
    _, stages = FnApiRunner().create_stages(proto)
    names = [[transform.unique_name for transform in stage.transforms] for stage in stages]
    found = [{step for step in steps if any(step in name for name in stage)} for stage in names]
    return [held for held in found if held]
