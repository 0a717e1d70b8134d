"""`nestling`: builds the command line and turns errors into one line and an exit code.

Only the verb that is called is imported; of the others the first sentence is read for `--help`. torch alone takes seconds.
"""

from __future__ import annotations

import ast
import importlib
import keyword
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling import __version__
from nestling.core import ranks
from nestling.core.errors import Interrupted, UserError
from nestling.core.metrics import say
from nestling.core.registry import names

USER_ERROR, INTERRUPTED = 2, ranks.INTERRUPTED
ANSWERS = ("chat", "generate", "decode-lab", "serve", "export", "verify-export", "merge", "import")
"""Verbs that train nothing."""
VERBS = {
    "run": "runs",
    "report": "runs",
    "plan": "plan",
    "doctor": "doctor",
    "chat": "models",
    "generate": "models",
    "decode-lab": "decode_lab",
    "serve": "serve",
    "feedback": "feedback",
    "export": "exporting",
    "verify-export": "exporting",
    "import": "importing",
    "merge": "importing",
}
"""Verb -> the file of cli/ whose function it is; every file of stages/ is a verb too."""
_UsageError: Any = typer.BadParameter.__base__  # typer carries click inside it from some version on; the name moved


def build_app(called: str | None = None) -> typer.Typer:
    """The command line with every verb.

    Args:
        called: the verb that will run; the others are only listed. None: all are ready to run.
    """
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_options)
    for verb, file in VERBS.items():
        ready = called in (None, verb)
        app.command(verb)(
            getattr(importlib.import_module(f"nestling.cli.{file}"), _function(verb)) if ready else _listed(file, verb)
        )
    for stage in names("stages"):
        verb = stage.replace("_", "-")
        ready = called in (None, verb)
        app.command(verb)(importlib.import_module("nestling.cli.stage_verbs").verb(stage) if ready else _listed(stage))
    return app


def _function(verb: str) -> str:
    """The Python name of a verb: verify-export -> verify_export, import -> import_."""
    name = verb.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def _listed(file: str, verb: str | None = None) -> Any:
    """A verb that can't run, with the docstring of a function of cli/, or of a file of stages/, read without import."""
    path = Path(__file__).parents[1] / ("cli" if verb else "stages") / f"{file}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == _function(verb or "")]

    def listed() -> None:
        return None

    listed.__doc__ = (ast.get_docstring(functions[0] if functions else tree) or "").split("\n")[0]
    return listed


def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.", is_eager=True)] = False,
) -> None:
    """Nestling raises a ChatGPT: raw text to an aligned chat model."""


def main() -> None:
    """Entry point: bad input ends in one line and exit code 2; Ctrl-C in 130 and how to go on."""
    words = sys.argv[1:]
    if words == ["--version"]:
        print(f"nestling {__version__}")
        return
    try:
        app = build_app(next((word for word in words if not word.startswith("-")), ""))
        if (
            app(args=words or ["--help"], prog_name="nestling", standalone_mode=False) == INTERRUPTED
        ):  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except UserError as error:
        _fail(f"error: {error}", USER_ERROR)
    except _UsageError as error:
        _fail(f"error: {_usage(error)}", USER_ERROR)
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        _fail(str(error) or "interrupted", INTERRUPTED)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which takes seconds to import
            raise
        what = ". ".join(str(error).split(". ")[:2])  # and how much was asked for
        trains = words[:1] and words[0] not in ANSWERS
        less = "higher objective.microbatches, or training.recompute=blocks" if trains else "fewer or shorter texts"
        _fail(f"error: {what}; compute less at once: {less}", USER_ERROR)


def _usage(error: Any) -> str:
    """What is wrong with the words of a command, in one line."""
    what = " ".join(error.format_message().split()).removesuffix(".")
    return f"{what[:1].lower()}{what[1:]}; {error.ctx.command_path if error.ctx else 'nestling'} --help lists what there is"


def _fail(line: str, code: int) -> None:
    if "--debug" in sys.argv:
        traceback.print_exc()
    if code == INTERRUPTED:  # all hear it, and who leaves late is waited for
        if ranks.is_first_to_say("interrupted", patience=0):
            say(line)
    elif ranks.is_first_to_say(line):
        say(line if ranks.is_main() else f"[process {ranks.rank()}] {line}")
    sys.exit(code)


if __name__ == "__main__":
    main()
