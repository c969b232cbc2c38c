"""Deployment on Dataflow: the image of the workers, the flex template, the documentation."""

from __future__ import annotations

import json
import re
import shlex

import apache_beam as beam
import pytest
import yaml
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli import main as cli
from pipeline.config.label import RunConfig
from pipeline.config.load import load_config
from pipeline.labelling.run import check_runner, pipeline_options
from tests.support.docs import unknown_options
from tests.support.flex_template import IMAGE, launcher
from tests.support.paths import ROOT

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
PARAMETERS = {
    parameter["name"]: parameter
    for parameter in json.loads(
        (ROOT / "deploy" / "flex_template" / "metadata.json").read_text(encoding="utf-8")
    )["parameters"]
}


def test_the_image_has_one_python_and_the_installed_beam() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    pythons = {text for base in bases for text in re.findall(r"python:?(3\.?\d\d)", base)}
    assert {text.replace(".", "") for text in pythons} == {"311"}
    assert f"apache/beam_python3.11_sdk:{beam.version.__version__}" in bases
    assert DOCKERFILE.rstrip().endswith('ENTRYPOINT ["/opt/apache/beam/boot"]')


def test_the_image_copies_existing_files_and_all_that_setup_needs() -> None:
    copied = {
        name
        for line in re.findall(r"^COPY (?!--)(.*)$", DOCKERFILE, re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert all((ROOT / name).exists() for name in copied)
    assert {"setup.py", "pyproject.toml", "LICENSE", "pipeline", "transforms", "configs"} <= copied


def test_the_build_passes_the_arguments_of_the_image() -> None:
    build = yaml.safe_load((ROOT / "deploy" / "cloudbuild.yaml").read_text(encoding="utf-8"))
    (step,) = build["steps"]
    given = {text for word in step["args"] for text in re.findall(r"--build-arg=(\w+)=", word)}
    assert given == set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)) == {"TORCH", "MODEL"}
    used = {text for word in step["args"] for text in re.findall(r"\$\{(\w+)\}", word)}
    assert used == set(build["substitutions"])


def test_the_parameters_of_the_template_are_those_of_the_launcher() -> None:
    own = {"input", "set", *launcher.OPTIONS}
    known = PipelineOptions([]).get_all_options()
    assert set(PARAMETERS) - own == {"sdk_container_image"} <= set(known)
    assert own <= set(PARAMETERS)
    required = {name for name, found in PARAMETERS.items() if not found.get("isOptional")}
    assert required == {"input", "output", "model", "sdk_container_image"}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("input", ["gs://b/x", "https://h/a.csv", "gs://b/a b/*.wav"], ["/data", "x", "gs://"]),
        ("output", ["gs://b/out"], ["out", "s3://b/out", "gs://"]),
        ("model", ["esc10", "MIT/ast@main", "gs://b/m", "a/b@c0ffee"], ["/m", "a/b/c", ""]),
        ("sdk_container_image", [IMAGE, "gcr.io/p/i@sha256:0f"], ["", "-x", "a b"]),
        ("config", ["dataflow_gpu", "dataflow_cpu"], ["local", "dataflow_tpu"]),
        ("set", ["", "labels.top_k=5", "limit=3;labels.scores=true"], ["labels", "a=1;b"]),
    ],
)
def test_patterns_accept_good_parameters_and_reject_bad_ones(
    name: str, good: list[str], bad: list[str]
) -> None:
    (pattern,) = PARAMETERS[name]["regexes"]
    assert [text for text in good if not re.fullmatch(pattern, text)] == []
    assert [text for text in bad if re.fullmatch(pattern, text)] == []


def test_the_launcher_passes_on_the_options_that_beam_knows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--input", "gs://b/in", "--output=gs://b/out", "--model=esc10", "--set=",
             "--num_workers=2", "--no_use_public_ips", "--launched_by=service"]  # fmt: skip
    assert launcher.make_command(given) == [
        *("label", "gs://b/in", "--config", "dataflow_gpu", "--output", "gs://b/out"),
        *("--model", "esc10", "--", "--num_workers=2", "--no_use_public_ips"),
    ]
    assert "dropped --launched_by" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="stray follows no option"):
        launcher.make_command(["--num_workers=2", "stray"])


# --- The document ----------------------------------------------------------------------------

DOCUMENT = (ROOT / "docs" / "dataflow.md").read_text(encoding="utf-8")


def commands_of(program: str) -> list[list[str]]:
    """Return the words of every command of a program in the document."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"{program} ")]


def test_the_commands_in_the_document_have_existing_options() -> None:
    found = commands_of("earmark")
    assert [words[0] for words in found] == ["plan", "label", "verify"]
    for words in found:
        own, beam_options = cli.split_beam_options(words)
        assert unknown_options(*own) == set()
        pipeline_options(RunConfig(), beam_options)  # refuses what Beam does not know


def test_the_label_command_in_the_document_would_be_submitted() -> None:
    (words,) = [words for words in commands_of("earmark") if words[0] == "label"]
    names = {"PROJECT": "proj-1", "REGION": "us-central1", "BUCKET": "mybucket", "IMAGE": IMAGE,
             "WORKER": "w@proj-1.iam.gserviceaccount.com", "MODEL": "a/b"}  # fmt: skip
    words = [re.sub(r"\$(\w+)", lambda found: names[found[1]], word) for word in words]
    own, beam_options = cli.split_beam_options(words)
    named = own[own.index("--config") + 1]
    run_config = load_config(RunConfig, named)
    check_runner(pipeline_options(run_config, beam_options), run_config.inference.device)


def test_the_document_names_existing_files_and_parameters() -> None:
    for path in re.findall(r"(?<![\w/])((?:deploy|configs|tests|docs)/[\w./]+\w)", DOCUMENT):
        assert (ROOT / path).exists(), path
    (run,) = [
        words
        for words in commands_of("gcloud")
        if words[:3] == ["dataflow", "flex-template", "run"]
    ]
    given = [word.removeprefix("--parameters=") for word in run if word.startswith("--parameters=")]
    names = {pair.partition("=")[0] for text in given for pair in text.split(",")}
    assert names == {name for name, found in PARAMETERS.items() if not found.get("isOptional")}
    assert set(re.findall(r"_([A-Z]+)=", DOCUMENT)) == {"IMAGE", "MODEL", "TORCH"}


def test_the_costs_in_the_document_follow_from_its_prices() -> None:
    rows = re.findall(r"^\| ([a-z]\d-[\w-]+), \w+ \| (.*) \|$", DOCUMENT, re.MULTILINE)
    assert len(rows) == 3
    for _, text in rows:
        cpus, memory, disk, gpu, price, speed, cost = map(float, text.split(" | "))
        hourly = cpus * 0.056 + memory * 0.003557 + disk * 0.000298 + gpu
        assert price == round(hourly, 2)
        assert cost == round(1000 * hourly / speed, 2)
    assert round(10_000 / (4 * 2370), 2) == 1.05
    assert round(4 * 1.26 * 1.30, 1) == 6.6
