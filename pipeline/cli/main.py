"""The command line's entry: parses, runs a command, turns errors into exit codes and words.

argv ─split at a bare "--"─▶ typer ─▶ a job (nothing has run yet) ─▶ run, errors to exit codes
"""

from __future__ import annotations

import builtins
import os
import re
import sys
import traceback
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

from pipeline.cli.commands import app
from pipeline.cli.interrupts import Interrupts
from pipeline.exit_codes import EXIT_INTERRUPTED, EXIT_UNEXPECTED, EXIT_USAGE, INTERRUPTED
from pipeline.terminal.logs import configure_logging, is_debugging
from pipeline.terminal.std_streams import usable_streams
from transforms import errors
from transforms.errors import AnswerError, EarmarkError, OutputLostError, UsageError, in_words
from transforms.process.limits import RAISE_LIMIT
from transforms.process.user import settle_user

RUN_AGAIN = "Fix that, then run the same command again."
RESUME = "Fix that, then run the same command again to resume."
SEE_DEBUG = "EARMARK_DEBUG=1 shows where it comes from."

# What Python, the loader of libraries and the system say where a limit is too small.
OF_A_LIMIT = ("can't start new thread", "failed to map segment", "Cannot allocate memory")

RESUMING = ("label", "train")  # commands that do only what is missing

# Words that a command without arguments does not take.
UNEXPECTED = re.compile(r"Got unexpected extra argument\S* \((.*)\)")

# An exception in the text of a traceback, and what Beam adds to its message.
RAISED = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Exception)): (.*)$", re.MULTILINE)
RUNNING_STEP = re.compile(r" \[while running '[^\n]*'\]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return the exit code."""
    settle_user()
    with usable_streams():
        return _main(*split_beam_options(sys.argv[1:] if argv is None else argv))


def split_beam_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide arguments at the first bare ``--``: Earmark's before it, Beam's after it."""
    arguments = list(arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _main(arguments: list[str], beam_options: list[str]) -> int:
    interrupts = Interrupts()
    try:
        with interrupts:
            code = _run(arguments, beam_options)
        if interrupts.came and code == EXIT_INTERRUPTED:  # typer caught it, and printed nothing
            return _fail(EXIT_INTERRUPTED, INTERRUPTED)
        return code
    except KeyboardInterrupt:
        return _fail(EXIT_INTERRUPTED, INTERRUPTED)
    except TyperException as error:
        # Without a command typer has printed the help, and its error has no words.
        return _fail(EXIT_USAGE, _parse_error(error)) if error.format_message() else EXIT_USAGE
    except UsageError as error:
        return _fail(EXIT_USAGE, str(error))
    except BrokenPipeError:
        # The reader has had enough (`earmark models | head`). What is still buffered must not
        # raise again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNEXPECTED
    except AnswerError as error:
        return _fail(EXIT_UNEXPECTED, str(error))
    except Exception as error:  # the last resort: every error must become an exit code
        if interrupts.came and not isinstance(error, OutputLostError):
            return _fail(EXIT_INTERRUPTED, INTERRUPTED)
        resumes = next((word for word in arguments if not word.startswith("-")), "") in RESUMING
        return _fail(EXIT_UNEXPECTED, _describe(error, RESUME if resumes else RUN_AGAIN))


def _run(arguments: list[str], beam_options: list[str]) -> int:
    command = typer.main.get_command(app)
    parsed = command.main(
        args=arguments, prog_name="earmark", standalone_mode=False, obj=beam_options
    )
    # --help and --version have done their work by now, and give an exit code instead of a job.
    code: int = parsed or 0
    if callable(parsed):
        _check_current_folder()
        configure_logging(quiet=False)
        code = parsed()
    sys.stdout.flush()  # a reader that has gone is an error to handle here, and noise at exit
    return code


def _check_current_folder() -> None:
    """Check that there is a current folder: some libraries abort the process without one."""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError as error:
        raise UsageError(
            "the current folder has been removed; change to another one, then run the command again"
        ) from error


def _fail(code: int, message: str) -> int:
    """Print what went wrong, and return the exit code."""
    if is_debugging():
        traceback.print_exc()
    if code != EXIT_INTERRUPTED:  # its words are ours; and an interrupted import may not work again
        from transforms.sources.clip_ids import for_terminal  # imports numpy

        message = for_terminal(message, keep_lines=True)
    print(f"earmark: {message}", file=sys.stderr)
    return code


def _describe(error: Exception, next_step: str) -> str:
    """Return what went wrong, and ``next_step`` where the system, a disk or a store is to blame.

    Beam adds where in its graph an error arose, and gives a worker's as a whole traceback.
    """
    if isinstance(error, EarmarkError):
        return RUNNING_STEP.sub("", f"{error}\n{SEE_DEBUG}")
    raised = RAISED.findall(f"{type(error).__name__}: {error}")
    kind, text = raised[-1] if raised else (type(error).__name__, str(error))
    text = RUNNING_STEP.sub("", text)
    if hasattr(errors, kind):
        return f"{text}\n{SEE_DEBUG}"
    if issubclass(getattr(builtins, kind, Exception), OSError):
        if isinstance(error, OSError) and error.filename is not None:
            text = in_words(error)
        return f"{text}\n{next_step}"
    if kind == "MemoryError" or any(words in text for words in OF_A_LIMIT):
        text = f"{text or 'no memory'}; {RAISE_LIMIT}"
    return f"{kind}: {text}\n{SEE_DEBUG}"


def _parse_error(error: TyperException) -> str:
    message = error.format_message()
    if hasattr(error, "possibilities"):
        message += ". Options for Beam go after a bare --"
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "earmark"
    extra = UNEXPECTED.match(message)
    if extra and command.endswith(" train"):
        message += f". The clips to learn from are given as --train {extra[1].split()[0]}"
    return f"{message}\n{command} --help lists the options."
