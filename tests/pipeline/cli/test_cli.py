"""The command line: what it hands on, its exit codes, its words; and the progress display."""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from rich.console import Console

from pipeline import __version__
from pipeline.cli import main as cli
from pipeline.config.label import (
    OPTION_KEYS,
    RUN_SCHEMA,
    RunConfig,
    Schema,
    flatten,
    shipped_configs,
)
from pipeline.config.train import TRAIN_SCHEMA, TrainConfig
from pipeline.result.verify import run_verify
from pipeline.terminal.progress import (
    Expected,
    Moment,
    ProgressCounts,
    ProgressDisplay,
    StderrHandler,
    format_audio,
    format_counts,
    format_duration,
    format_line,
    seconds_left,
    share_done,
)
from tests.support.audio_factory import noise, write
from tests.support.paths import ROOT
from transforms.errors import AccountingError, ConfigError, InputError, ModelError

REQUIRED = ["in", "-o", "out", "-m", "model"]
TRAIN = ["train", "-t", "in", "-o", "out", "--hold-out", "fold=1"]


class Calls(list[tuple[Any, ...]]):
    """What the commands were called with; raises or returns what it is told to."""

    result: int = 0
    error: BaseException | None = None

    def take(self, *arguments: Any, **named: Any) -> int:
        self.append((*arguments, *named.values()))
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stands in for the work of every command."""
    calls = Calls()
    for module, name in (
        ("pipeline.labelling.run", "run_label"),
        ("pipeline.labelling.estimate", "run_plan"),
        ("pipeline.result.verify", "run_verify"),
        ("pipeline.result.export", "run_export"),
        ("pipeline.training.run", "run_train"),
    ):
        fake = ModuleType(module)
        setattr(fake, name, calls.take)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.delenv("EARMARK_DEBUG", raising=False)
    return calls


@pytest.fixture(autouse=True)
def _restore_logging() -> Any:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level
    for package in ("pipeline", "transforms"):
        logging.getLogger(package).setLevel(logging.NOTSET)


def label_config(calls: Calls, *arguments: str) -> RunConfig:
    assert cli.main(["label", *arguments]) == 0
    return calls[-1][0]


def test_every_option_reaches_its_key(calls: Calls) -> None:
    given = {
        "--output": "out",
        "--model": "m",
        "--top-k": "3",
        "--scores": None,
        "--precision": "bf16",
        "--device": "cpu",
        "--engine": "torch",
        "--workers": "2",
        "--batch-size": "16",
        "--window-s": "5",
        "--hop-s": "2.5",
        "--limit": "7",
        "--retry-failed": None,
        "--max-failed": "0.5",
        "--quiet": None,
    }
    words = [word for pair in given.items() for word in pair if word is not None]
    config = label_config(calls, "a.wav", "b/", *words)
    values = flatten(config.resolved())
    expected = {
        OPTION_KEYS[flag]: True if text is None else type(values[OPTION_KEYS[flag]])(text)
        for flag, text in given.items()
    }
    assert values == flatten(RunConfig().resolved()) | expected | {"inputs": ["a.wav", "b/"]}


def test_every_option_of_train_reaches_its_key(calls: Calls) -> None:
    given = {
        "--hold-out": "fold=1",
        "--output": "out",
        "--model": "m",
        "--labels": "audioset",
        "--epochs": "3",
        "--batch-size": "16",
        "--learning-rate": "0.5",
        "--seed": "7",
        "--device": "cpu",
        "--precision": "bf16",
        "--cache": "c",
        "--limit": "9",
        "--overwrite": None,
        "--max-failed": "0.5",
        "--quiet": None,
    }
    words = [word for pair in given.items() for word in pair if word is not None]
    assert cli.main(["train", "-t", "a.csv", "--train", "b.tar", *words]) == 0
    (config,) = calls[-1]
    values = flatten(config.resolved())
    expected = {
        key: True if given[flag] is None else type(values[key])(given[flag])
        for flag, key in TRAIN_SCHEMA.option_keys.items()
        if flag in given
    }
    defaults = flatten(TrainConfig().resolved())
    assert values == defaults | expected | {"train": ["a.csv", "b.tar"]}
    assert set(given) == set(TRAIN_SCHEMA.option_keys) - {"--train", "--validation"}


def test_train_takes_several_validation_inputs(calls: Calls) -> None:
    assert cli.main([*TRAIN[:5], "-v", "x.csv", "--validation", "y.csv"]) == 0
    (config,) = calls[-1]
    assert config.validation == ("x.csv", "y.csv")


def test_what_is_trained_on_can_come_from_the_yaml(calls: Calls, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: a.csv\nvalidation: [b.csv]\noutput: y\ntraining: {epochs: 2}\n")
    assert cli.main(["train", "-c", str(path), "--epochs", "4"]) == 0
    (config,) = calls[-1]
    assert (config.train, config.validation, config.output) == (("a.csv",), ("b.csv",), "y")
    assert config.training.epochs == 4


def test_overwrite_reaches_its_key(calls: Calls) -> None:
    assert label_config(calls, *REQUIRED, "--overwrite").overwrite is True


def test_the_options_of_the_commands_are_those_of_the_config() -> None:
    flags = {"INPUT", "--config", "--set"} | set(OPTION_KEYS)
    for command, others in ((cli.label, set()), (cli.plan, {"--segment-s", "--manifest"})):
        names = set(inspect.signature(command).parameters) - {"context", "inputs"}
        assert {"INPUT"} | {f"--{name.replace('_', '-')}" for name in names} == flags | others


def test_the_options_of_train_are_those_of_its_config() -> None:
    names = set(inspect.signature(cli.train).parameters) - {"context", "config", "set"}
    assert {f"--{name.replace('_', '-')}" for name in names} == set(TRAIN_SCHEMA.option_keys)


@pytest.mark.parametrize(
    ("name", "schema"), [("label", RUN_SCHEMA), ("train", TRAIN_SCHEMA)], ids=["label", "train"]
)
def test_the_help_tells_the_config_s_defaults(name: str, schema: Schema[Any]) -> None:
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    told = {
        schema.option_keys[parameter.opts[0]]: match.group(1)
        for parameter in command.params
        if (match := re.search(r"\(default ([\w.-]*\w)", parameter.help or ""))
    }
    assert told == {
        key: "no" if value is False else str(value)
        for key in schema.option_keys.values()
        if (value := schema.defaults[key]) not in (None, [])
    }


def test_the_help_of_train_names_every_recipe() -> None:
    command = typer.main.get_command(cli.app).commands["train"]  # type: ignore[attr-defined]
    (option,) = [parameter for parameter in command.params if "--config" in parameter.opts]
    assert set(shipped_configs("train")) - {"default"} <= set(re.findall(r"\w+", option.help))


def test_the_yaml_gives_what_the_command_line_leaves_out(calls: Calls, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("inputs: [x/]\noutput: y\nmodel: {name: z}\nlabels: {top_k: 2, scores: true}\n")
    config = label_config(calls, "-c", str(path), "--set", "limit=3", "--no-scores", "--top-k", "4")
    assert (config.inputs, config.output, config.model.name) == (("x/",), "y", "z")
    assert (config.labels.top_k, config.labels.scores, config.limit) == (4, False, 3)


def test_inputs_on_the_command_line_replace_those_of_the_yaml(calls: Calls, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("inputs: [x/]\n")
    assert label_config(calls, *REQUIRED, "-c", str(path)).inputs == ("in",)


@pytest.mark.parametrize(
    ("arguments", "own", "beam"),
    [
        (["label", "a"], ["label", "a"], []),
        (["label", "a", "--"], ["label", "a"], []),
        (["label", "--", "--runner=X", "--", "--y"], ["label"], ["--runner=X", "--", "--y"]),
    ],
)
def test_arguments_divide_at_the_first_bare_dashes(
    arguments: list[str], own: list[str], beam: list[str]
) -> None:
    assert cli.split_beam_options(arguments) == (own, beam)


@pytest.mark.parametrize("command", ["label", "plan"])
def test_beam_options_are_handed_on_as_they_are(calls: Calls, command: str) -> None:
    options = ["--runner=PrismRunner", "--experiments", "a", "--output=x"]
    assert cli.main([command, *REQUIRED, "--", *options]) == 0
    config, beam_options, *_ = calls[-1]
    assert config.output == "out"
    assert beam_options == options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["label", *REQUIRED, "--topk", "3"], "No such option: --topk .*--top-k"),
        (["label", *REQUIRED, "--runner=X"], "No such option: --runner.*after a bare --"),
        (["lable"], "No such command 'lable'. Did you mean 'label'"),
        (["label", *REQUIRED, "--top-k", "many"], "'--top-k'"),
        (["label", *REQUIRED, "--hop-s", "0"], r"window.hop_s is 0.0 \(--hop-s\); must be greater"),
        (["label", *REQUIRED, "--set", "windw.hop_s=1"], "did you mean window.hop_s"),
        (["label", *REQUIRED, "--config", "audoset"], "Did you mean audioset"),
        (["label", "-o", "out", "-m", "model"], "no input is given"),
        (["label", "in", "-m", "model"], "no output is given"),
        (["train", "-o", "out"], "nothing to learn from is given; .*--train INPUT"),
        (["train", "-t", "in", "--hold-out", "a=1"], "no output is given"),
        (["train", "-t", "in", "-o", "out"], r"training.keep is best; needs .*--hold-out COLUMN"),
        ([*TRAIN, "--hold-out", "fold"], r"hold_out is fold \(--hold-out\); must be COLUMN=VALUE"),
        ([*TRAIN, "--config", "esc5"], "Did you mean esc50"),
        ([*TRAIN, "--config", "audioset"], "audioset is one for earmark label"),
        ([*TRAIN, "--learning-rate", "-1"], r"learning_rate is -1.0 \(--learning-rate\); must be"),
        ([*TRAIN, "--", "--runner=X"], "earmark train runs no pipeline.*--runner=X"),
        (["verify"], "Missing argument 'DIR'"),
        (["export", "x"], "Missing option '--format'"),
        (["verify", "x", "--", "--runner=X"], "earmark verify runs no pipeline.*--runner=X"),
        (["models", "--", "--runner=X"], "earmark models runs no pipeline"),
    ],
)
def test_wrong_usage_is_two_and_says_what(
    calls: Calls, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert out == ""
    assert calls == []


def test_no_command_shows_the_help_and_is_wrong_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert "Usage: earmark" in out
    assert err == ""


def test_plan_needs_no_output(calls: Calls) -> None:
    assert cli.main(["plan", "in", "-m", "model"]) == 0
    assert calls[-1][0].output is None


@pytest.mark.parametrize("code", [0, 3])
def test_the_job_s_exit_code_is_the_command_s(calls: Calls, code: int) -> None:
    calls.result = code
    assert cli.main(["label", *REQUIRED]) == code


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("top_k is wrong"), 2, "earmark: top_k is wrong\n"),
        (InputError("nothing there"), 2, "earmark: nothing there\n"),
        (ModelError("damaged"), 2, "earmark: damaged\n"),
        (KeyboardInterrupt(), 130, "earmark: interrupted; the same command goes on from here\n"),
        (
            AccountingError("3 of 4 rows"),
            1,
            "earmark: 3 of 4 rows\nEARMARK_DEBUG=1 shows where it comes from.\n",
        ),
        (
            OSError(28, "No space left on device"),
            1,
            "earmark: [Errno 28] No space left on device\n"
            "Once that is mended, run the same command again: it goes on from what is done.\n",
        ),
        (
            OSError("s3://b/x: the store answered 503 [while running 'Commit/Write and commit']"),
            1,
            "earmark: s3://b/x: the store answered 503\n"
            "Once that is mended, run the same command again: it goes on from what is done.\n",
        ),
        (
            RuntimeError(
                "Traceback (most recent call last):\n"
                '  File "storage.py", line 1, in _told\n'
                "TimeoutError: s3://b/x: the store did not answer in time\n\n"
                "During handling of the above exception, another exception occurred:\n\n"
                "Traceback (most recent call last):\n"
                '  File "sdk_worker.py", line 1, in _execute\n'
                "TimeoutError: s3://b/x: the store did not answer in time "
                "[while running 'A/B'] [while running 'C']\n"
            ),
            1,
            "earmark: s3://b/x: the store did not answer in time\n"
            "Once that is mended, run the same command again: it goes on from what is done.\n",
        ),
        (
            RuntimeError("Traceback\ntransforms.errors.AccountingError: 3 [while running 'A']"),
            1,
            "earmark: 3\nEARMARK_DEBUG=1 shows where it comes from.\n",
        ),
    ],
)
def test_errors_become_exit_codes_and_words(
    calls: Calls,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    words: str,
) -> None:
    calls.error = error
    assert cli.main(["label", *REQUIRED]) == code
    assert capsys.readouterr().err == words


def test_debug_shows_the_traceback(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls.error = ValueError("odd")
    monkeypatch.setenv("EARMARK_DEBUG", "1")
    assert cli.main(["verify", "x"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_the_debug_option_is_the_variable(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EARMARK_DEBUG", "")  # so that what the option sets is taken back
    calls.error = InputError("odd")
    assert cli.main(["--debug", "verify", "x"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_sigterm_is_an_interruption(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminated(folder: str, quiet: bool) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    monkeypatch.setattr(sys.modules["pipeline.result.verify"], "run_verify", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["verify", "x"]) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_beam_wraps_is_one_all_the_same(
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    def interrupted(folder: str, quiet: bool) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt as error:
            logging.exception("KeyboardInterrupt [while running 'Label']")
            raise RuntimeError("KeyboardInterrupt [while running 'Label']") from error
        return 0

    monkeypatch.setattr(sys.modules["pipeline.result.verify"], "run_verify", interrupted)
    assert cli.main(["verify", "x"]) == 130
    assert capsys.readouterr().err == "earmark: interrupted; the same command goes on from here\n"


def test_verify_and_export_hand_their_arguments_on(calls: Calls) -> None:
    cli.main(["verify", "x", "--quiet"])
    cli.main(["export", "x", "--format", "csv"])
    cli.main("export x -f raven -o y --threshold 0.5 --top-k 2 -q".split())
    assert calls == [
        ("x", True),
        ("x", "csv", None, None, None, False),
        ("x", "raven", "y", 0.5, 2, True),
    ]


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"earmark {__version__}\n"


def test_models_lists_the_public_ones(capsys: pytest.CaptureFixture[str]) -> None:
    from transforms.models.ast.public import PUBLIC_CHECKPOINTS

    assert cli.main(["models"]) == 0
    table = capsys.readouterr().out
    assert cli.main(["models", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    from_hub = [entry["hub_id"] for entry in entries if entry["source"] == "hub"]
    assert from_hub == [e.hub_id for e in PUBLIC_CHECKPOINTS]
    for entry in entries:
        assert {"window_s", "num_labels", "license", "published"} <= set(entry)
        line = next(line for line in table.splitlines() if f" {entry['name']} " in line)
        assert entry["license"] in line
        assert f"{entry['window_s']:.3f} s" in line


@pytest.mark.parametrize("width", [30, 80, 160])
def test_models_are_named_whole_on_a_terminal_of_any_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    from transforms.models.ast.public import PUBLIC_CHECKPOINTS

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["models"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    words = text.split()
    for entry in PUBLIC_CHECKPOINTS:
        assert entry.hub_id in words
        assert f"{entry.published:.4f}" in words
    assert words.count("BSD-3-Clause") == len(PUBLIC_CHECKPOINTS)
    assert ("Public models" in text) == (width == 160)  # a table where there is room for one
    if width >= 80:
        assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize(
    ("command", "flag"), [("label", "--top-k"), ("train", "--hold-out")], ids=["label", "train"]
)
def test_help_imports_nothing_heavy(command: str, flag: str) -> None:
    script = (
        f"import sys; from pipeline.cli.main import main; code = main(['{command}', '--help']);"
        "heavy = {'torch', 'apache_beam', 'pyarrow', 'av', 'soundfile', 'fsspec', 'numpy'}"
        " & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert flag in done.stdout


def test_wrong_usage_of_train_is_told_before_anything_heavy_is_loaded() -> None:
    script = (
        "import sys; from pipeline.cli.main import main; code = main(['train', '-t', 'x.csv']);"
        "heavy = {'torch', 'apache_beam', 'pyarrow', 'av', 'soundfile'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "training.keep is best" in done.stderr


def test_python_m_pipeline_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "verify", "--nonsense"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such option: --nonsense" in done.stderr


def test_output_that_nobody_reads_is_no_traceback() -> None:
    command = f"{sys.executable} -m pipeline models --json | true"
    # Buffered, as it is by default: the pipe breaks when the buffer is written at the end.
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


# --- The process: its streams, its folder, its signals --------------------------------------


def in_shell(command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a shell's line, in which ``$E`` is the command."""
    environment = {**os.environ, "E": f"{sys.executable} -m pipeline", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    write(folder / "a.wav", noise(1.0), 16_000)
    return folder


@pytest.mark.parametrize(
    "streams",
    [
        "<&- >&- 2>&-",
        pytest.param(">&-", marks=pytest.mark.slow),
        pytest.param("2>/dev/full", marks=pytest.mark.slow),
    ],
    ids=["none at all", "no stdout", "a full log"],
)
def test_a_run_needs_no_standard_streams(
    clips: Path, tiny_model: Path, tmp_path: Path, streams: str
) -> None:
    out = tmp_path / "out"
    label = f"$E label {clips} -o {out} -m {tiny_model} --device cpu --set decode.processes=1"
    done = in_shell(f"{label} {streams}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert run_verify(str(out), quiet=True) == 0


def test_a_log_that_cannot_be_written_costs_its_lines_alone() -> None:
    script = (
        "import logging, sys; from rich.console import Console\n"
        "from pipeline.terminal.std_streams import answer, say, usable_streams\n"
        "with usable_streams():\n"
        "    say('x' * 9999); print('lost', file=sys.stderr, flush=True)\n"
        "    Console(stderr=True).print('lost'); logging.warning('lost'); answer('found')\n"
    )
    done = in_shell(f'{sys.executable} -c "{script}" 2>/dev/full')
    assert (done.returncode, done.stdout) == (0, "found\n")


@pytest.mark.parametrize("arguments", ["models", "models --json", "--help", "--version"])
def test_an_answer_that_cannot_be_written_names_standard_output(arguments: str) -> None:
    done = in_shell(f"$E {arguments} > /dev/full")
    assert (done.returncode, done.stderr) == (
        1,
        "earmark: standard output cannot be written: No space left on device. Mend that, or send "
        "it elsewhere.\n",
    )


def test_files_never_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pipeline.terminal.std_streams import usable_streams\n"
        "with usable_streams():\n"
        "    file = open(sys.argv[1], 'w'); print('lost'); print('lost', file=sys.stderr)\n"
        "    os.write(1, b'lost'); os.write(2, b'lost'); file.write(str(file.fileno() > 2))\n"
    )
    path = tmp_path / "file"
    done = in_shell(f'{sys.executable} -c "{script}" {path} <&- >&- 2>&-')
    assert done.returncode == 0
    assert path.read_text() == "True"


def test_a_current_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = in_shell(f"rmdir {gone}; $E plan {tmp_path} -m {tmp_path}", cwd=gone)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "earmark: the current folder has been removed; change to another one, then run the "
        "command again\n",
    )


@pytest.mark.parametrize(
    "command",
    [
        *(["label", "in", "-m", "m"], ["plan", "in", "-m", "m"], ["stats", "in"]),
        *(["export", "x", "-f", "csv"], ["evaluate", "x"]),
        ["train", "-t", "in", "--hold-out", "fold=1"],
    ],
    ids=lambda command: command[0],
)
def test_the_process_s_memory_is_no_output(
    calls: Calls, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert cli.main([*command, "-o", "memory://out"]) == 2
    assert "memory:// is gone when the command ends" in capsys.readouterr().err
    assert calls == []


def test_a_training_that_a_disk_stopped_goes_on(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.error = OSError(28, "No space left on device", "/x/y")
    assert cli.main(TRAIN) == 1
    assert capsys.readouterr().err == (
        "earmark: /x/y: No space left on device\n"
        "Once that is mended, run the same command again: it goes on from what is done.\n"
    )


@pytest.mark.parametrize("command", [["verify", "label"], ["export", "x", "-f", "csv"]])
def test_only_a_command_that_goes_on_says_so(
    calls: Calls, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    calls.error = OSError(5, "Input/output error", "/x/y")
    assert cli.main(command) == 1
    assert capsys.readouterr().err == (
        "earmark: /x/y: Input/output error\nOnce that is mended, run the same command again.\n"
    )


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_from_the_first_line_on(
    tmp_path: Path, tiny_model: Path, number: signal.Signals, delay_s: float
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "label", tmp_path, "-o", tmp_path / "out",
         "-m", tiny_model],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not catches(process.pid, signal.SIGTERM):  # which Python by itself does not
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay_s)
        process.send_signal(number)
        said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said == ("", "earmark: interrupted; the same command goes on from here\n")


def test_an_interrupt_that_a_callback_swallows_comes_again(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Swallowing:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def run(*_: object) -> int:
        Swallowing()  # gone at once; what its end raises is ignored
        time.sleep(10)
        return 0

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["models"]) == 130
    assert capsys.readouterr().err == "earmark: interrupted; the same command goes on from here\n"


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal by now."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


# What a terminal obeys: it clears the screen, sets a title, rings.
EVIL = "evil\x1b[2J\x1b]0;owned\x07\x9b31m[bold] :dog:"


def test_names_of_folders_do_not_command_the_terminal(
    clips: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, few = tmp_path / EVIL, ["--device", "cpu", "--set", "decode.processes=1"]
    clips = clips.rename(clips.with_name(f"clips {EVIL}"))
    (clips / f"{EVIL}.wav").write_bytes(b"no audio")
    assert cli.main(["label", f"{clips}/", "-o", str(out), "-m", str(tiny_model), *few]) == 3
    assert cli.main(["verify", str(out)]) == 0
    assert cli.main(["export", str(out), "-f", "csv"]) == 0
    assert cli.main(["stats", f"{clips}/", "-o", str(out / "stats"), *few[2:]]) == 3
    next((out / "clips").iterdir()).unlink()
    assert cli.main(["verify", str(out)]) == 3
    assert cli.main(["export", str(out), "-f", "csv"]) == 2
    (out / "run.json").write_text("{}")
    assert cli.main(["verify", str(out)]) == 3
    assert cli.main(["verify", str(tmp_path / f"none {EVIL}")]) == 2
    for said in capsys.readouterr():
        lines = [line for line in said.splitlines() if "evil" in line]
        assert len(lines) >= 4
        assert all("evil\\x1b[2J\\x1b]0;owned\\x07\\x9b31m[bold] :dog:" in line for line in lines)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)


def at(
    clips: int = 0, windows: int = 0, audio_s: float = 0.0, failures: int = 0, s: float = 0.0
) -> Moment:
    return Moment(ProgressCounts(clips, windows, audio_s, failures), elapsed_s=s + 3, working_s=s)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (187, "3:07"), (7387, "2:03:07")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42, "42 s"), (90, "1.5 min"), (3600, "1.0 h"), (7_200_000, "2,000.0 h")],
)
def test_amounts_of_audio_are_short(seconds: float, text: str) -> None:
    assert format_audio(seconds) == text


@pytest.mark.parametrize(
    ("moment", "expected", "share"),
    [
        (at(windows=50), Expected(100, None), 0.5),
        (at(windows=100), Expected(100, None), 0.99),  # an estimate: not said to be the end
        (at(windows=130), Expected(100, None), 0.99),
        (at(clips=8, failures=2, windows=50), Expected(100, 10), 1.0),
        (at(clips=4, failures=1), Expected(None, 10), 0.5),
        (at(windows=5), Expected(None, None), None),
        (at(windows=5), Expected(0, 0), None),
    ],
)
def test_the_share_done_is_never_claimed_too_high(
    moment: Moment, expected: Expected, share: float | None
) -> None:
    assert share_done(moment, expected) == share


@pytest.mark.parametrize(
    ("moment", "expected", "left"),
    [
        (at(windows=25, s=10), Expected(100, None), 30.0),
        (at(windows=25, s=1), Expected(100, None), None),  # too early to tell
        (at(windows=0, s=10), Expected(100, None), None),
        (at(windows=120, s=10), Expected(100, None), None),  # more than estimated
        (at(clips=10, windows=90, s=10), Expected(100, 10), 0.0),
        (at(windows=25, s=10), Expected(), None),
    ],
)
def test_the_time_left_comes_from_the_share(
    moment: Moment, expected: Expected, left: float | None
) -> None:
    assert seconds_left(moment, expected) == left


@pytest.mark.parametrize(
    ("moment", "expected", "text"),
    [
        (at(), Expected(), "0 clips · 0 windows · 0 s of audio"),
        (
            at(1200, 2400, 12_240, 2, s=102),
            Expected(19_200, 9600),
            "1,200/9,600 clips · 2,400/~19,200 windows · 3.4 h of audio · 120× real time"
            " · 2 failed",
        ),
        (
            at(1, 3, 30, s=20),
            Expected(2, None),
            "1 clips · 3 windows · 30 s of audio · 1.5× real time",
        ),
    ],
)
def test_counts_in_words(moment: Moment, expected: Expected, text: str) -> None:
    assert format_counts(moment, expected) == text


def test_a_line_tells_share_and_times() -> None:
    assert format_line(at(2, 25, 250, s=10), Expected(100, 8)) == (
        " 25% · 2/8 clips · 25/~100 windows · 4.2 min of audio · 25× real time"
        " · 13 s elapsed · about 30 s left"
    )


def test_without_a_terminal_there_are_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.terminal.progress.POLL_INTERVAL_S", 0.001)
    monkeypatch.setattr("pipeline.terminal.progress.LINE_INTERVAL_S", 0.01)
    reads = iter(range(1_000_000))

    def read() -> ProgressCounts:
        return ProgressCounts(clips=next(reads))

    with ProgressDisplay(read=read, total_windows=1000):
        time.sleep(0.2)
    out, err = capsys.readouterr()
    first, *lines, last = err.splitlines()
    assert out == ""
    assert first == "labelling about 1,000 windows"
    assert 1 < len(lines) <= 20  # of the two hundred readings
    assert all(re.match(r"  0% · \d+ clips · 0/~1,000 windows", line) for line in lines)
    assert re.match(r"100% · \d+ clips · 0 windows", last)


def test_on_a_terminal_there_is_a_bar_below_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    logger = logging.getLogger("tests.progress")
    logger.addHandler(StderrHandler())
    with ProgressDisplay(
        read=lambda: ProgressCounts(clips=3, windows=6, failures=1),
        total_windows=12,
        console=console,
    ):
        logger.warning("a clip is damaged")
    logger.handlers.clear()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "a clip is damaged\n" in text
    assert "3 clips · 6 windows" in text.rpartition("a clip is damaged")[2]
    assert "1 failed" in text


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(read=ProgressCounts, total_windows=5, quiet=True):
        pass
    assert capsys.readouterr() == ("", "")


def test_the_display_ends_with_the_work_also_when_that_fails() -> None:
    display = ProgressDisplay(read=ProgressCounts, quiet=True)
    with pytest.raises(ValueError, match="broken"), display:
        raise ValueError("broken")
    assert not display._thread.is_alive()
