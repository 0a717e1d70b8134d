"""How much of anything is too much."""

from __future__ import annotations

import ast
import io
import tokenize

import pytest

ROAD = ("corpus", "tokenizer", "loading", "model", "planning", "training", "tools", "generation", "tasks", "objectives",
        "synthesis", "evaluation", "report", "serving")  # fmt: skip
VERBS = {"command", "callback", "get", "post", "put", "patch", "delete", "websocket"}


def lines_of(source) -> int:
    """Physical lines of a file."""
    return source.text.count("\n")


def lines_of_code(source) -> int:
    """Lines that hold code: a token that is no comment, outside docstrings."""
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    held = {line for token in tokens if token.type not in empty for line in range(token.start[0], token.end[0] + 1)}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    firsts = [node.body[0] for node in ast.walk(source.tree) if isinstance(node, documented) and ast.get_docstring(node)]
    return len(held.difference(*(range(text.lineno, text.end_lineno + 1) for text in firsts)))


def test_a_file_fits_in_the_head(any_source, forbid):
    """A file has at most 450 lines, about 300 as a habit."""
    forbid([f"{any_source.name} has {lines_of(any_source)} lines"] if lines_of(any_source) > 450 else [])


def test_a_function_fits_on_a_screen(any_source, forbid):
    """A function has at most 60 lines, about 10 as a habit."""
    spans = ((node, node.end_lineno - node.lineno + 1) for node in any_source.functions())
    forbid(any_source.at(node, f"{node.name} has {span} lines") for node, span in spans if span > 60)


def test_more_than_seven_parameters_are_a_dataclass(source, forbid):
    """A function takes at most 7 parameters (verbs of command line and service aside); more become a dataclass."""
    forbid(
        source.at(node, f"{node.name} takes {len(taken)}")
        for node in source.functions()
        if len(taken := _parameters(node)) > 7 and not _is_verb(node)
    )


def _parameters(node) -> list[str]:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def _is_verb(node) -> bool:
    """A verb of typer or FastAPI, whose parameters are the user's interface."""
    if "typer." in ast.unparse(node.args):
        return True
    calls = (decorator.func for decorator in node.decorator_list if isinstance(decorator, ast.Call))
    return any(isinstance(call, ast.Attribute) and call.attr in VERBS for call in calls)


@pytest.mark.parametrize("folder", ["world", "lineage"])
def test_a_side_room_stays_small(folder, sources, forbid):
    """A side room (world, lineage) has at most 2,500 lines of Python."""
    total = sum(lines_of(source) for source in sources if source.folder == folder)
    forbid([f"src/nestling/{folder} has {total} lines"] if total > 2500 else [])


def test_the_road_stays_readable(sources, forbid):
    """The road from corpus to serving stays under 18,000 lines of code (blank lines, comments and docstrings aside)."""
    total = sum(lines_of_code(source) for source in sources if source.folder in ROAD)
    forbid([f"the road has {total} lines"] if total >= 18_000 else [])
