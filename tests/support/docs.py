"""What pages of the docs show: blocks of code, commands and their options."""

from __future__ import annotations

import re
from typing import Any

import typer

from pipeline.cli import main as cli

COMMANDS: Any = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def marked_block(text: str, marker: str) -> str:
    """Return the code block behind a marker of a page."""
    (found,) = re.findall(rf"<!-- {marker} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    return str(found)


def options_of(command: str) -> set[str]:
    """Return every spelling of every option of a command."""
    parameters = COMMANDS[command].params
    return {name for one in parameters for name in (*one.opts, *one.secondary_opts)}


def unknown_options(command: str, *arguments: str) -> set[str]:
    """Return the options among the arguments that the command does not have."""
    return {word for word in arguments if word.startswith("--")} - options_of(command)
