"""`nestling`: builds the command line and turns errors into one line and an exit code."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from nestling import __version__
from nestling.cli import models, runs, stage_verbs
from nestling.core.errors import Interrupted, UserError
from nestling.core.metrics import say

USER_ERROR, INTERRUPTED = 2, 130


def build_app() -> typer.Typer:
    """The command line with every verb."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_options)
    for verb in (runs.run, runs.report, models.chat, models.generate):
        app.command()(verb)
    stage_verbs.add_to(app)
    return app


def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
) -> None:
    """Nestling raises a ChatGPT: raw text to an aligned chat model."""
    if version:
        print(f"nestling {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: bad input ends in one line and exit code 2; Ctrl-C in 130 and how to go on."""
    try:
        build_app()()
    except UserError as error:
        _fail(f"error: {error}", USER_ERROR)
    except (Interrupted, KeyboardInterrupt) as error:
        _fail(str(error) or "interrupted; the same command goes on where it stopped", INTERRUPTED)


def _fail(line: str, code: int) -> None:
    if "--debug" in sys.argv:
        traceback.print_exc()
    say(line)
    sys.exit(code)


def existing(path: Path) -> Path:
    """The path itself.

    Raises:
        UserError: nothing is there.
    """
    if not path.exists():
        raise UserError("no such file or folder", where=path)
    return path


if __name__ == "__main__":
    main()
