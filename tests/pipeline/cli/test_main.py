"""The command line: what it hands on, its exit codes, its words."""

from __future__ import annotations

import re

import pytest

from pipeline import __version__
from pipeline.cli import main as cli
from tests.support.fake_commands import REQUIRED, TRAINING, Calls
from transforms.errors import AccountingError, ConfigError, InputError, ModelError


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
        (
            [*TRAINING, "--hold-out", "fold"],
            r"hold_out is fold \(--hold-out\); must be COLUMN=VALUE",
        ),
        ([*TRAINING, "--config", "esc5"], "Did you mean esc50"),
        ([*TRAINING, "--config", "audioset"], "audioset is one for earmark label"),
        (
            [*TRAINING, "--learning-rate", "-1"],
            r"learning_rate is -1.0 \(--learning-rate\); must be",
        ),
        ([*TRAINING, "--", "--runner=X"], "earmark train runs no pipeline.*--runner=X"),
        *(
            (["label", "in", "-m", "m", "-o", name], r"--output is \S+, and a result is a folder")
            for name in ("list.csv", "-", "gs://b/labels.PARQUET", "x.jsonl/")
        ),
        (["plan", "in", "-m", "m", "-o", "x.csv"], r"--output is x\.csv, and a result is a folder"),
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
        (KeyboardInterrupt(), 130, "earmark: interrupted; run the same command again to resume\n"),
        (
            AccountingError("3 of 4 rows"),
            1,
            "earmark: 3 of 4 rows\nEARMARK_DEBUG=1 shows where it comes from.\n",
        ),
        (
            OSError(28, "No space left on device"),
            1,
            "earmark: [Errno 28] No space left on device\n"
            "Fix that, then run the same command again to resume.\n",
        ),
        (
            OSError("s3://b/x: the store answered 503 [while running 'Commit/Write and commit']"),
            1,
            "earmark: s3://b/x: the store answered 503\n"
            "Fix that, then run the same command again to resume.\n",
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
            "Fix that, then run the same command again to resume.\n",
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


@pytest.mark.parametrize(("variable", "options"), [("1", []), ("", ["--debug"])])
def test_debugging_shows_the_traceback(
    calls: Calls,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    options: list[str],
) -> None:
    calls.error = ValueError("odd")
    monkeypatch.setenv("EARMARK_DEBUG", variable)  # so that what the option sets is taken back
    assert cli.main([*options, "verify", "x"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"earmark {__version__}\n"


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


@pytest.mark.parametrize(
    ("command", "again"),
    [
        (TRAINING, "again to resume"),
        (["verify", "label"], "again"),
        (["export", "x", "-f", "csv"], "again"),
    ],
)
def test_only_a_command_that_goes_on_says_so(
    calls: Calls, capsys: pytest.CaptureFixture[str], command: list[str], again: str
) -> None:
    calls.error = OSError(5, "Input/output error", "/x/y")
    assert cli.main(command) == 1
    assert capsys.readouterr().err == (
        f"earmark: /x/y: Input/output error\nFix that, then run the same command {again}.\n"
    )
