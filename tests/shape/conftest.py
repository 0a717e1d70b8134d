"""Reads every Python file once (ast only, nothing is imported) and hands it to the shape tests.

A test that asks for `source` runs once per file of `src/nestling`; one that asks for `any_source` also visits the
tests and benchmarks. The docstring of a test is the sentence that it guards, and `forbid` fails with it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "nestling"
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file: its text and its syntax tree."""

    path: Path

    @property
    def name(self) -> str:
        """The path below the repository root, such as `src/nestling/core/errors.py`."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def folder(self) -> str:
        """The folder of the road that the file is in ("core"), or its own stem beside them ("__init__")."""
        return self.parts[0].removesuffix(".py")

    @property
    def parts(self) -> tuple[str, ...]:
        """The path's parts below `src/nestling`, or below the root for other files."""
        return self.path.relative_to(SRC if SRC in self.path.parents else ROOT).parts

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    @property
    def module(self) -> str:
        """The dotted name below `nestling`: "core.errors"; a package's `__init__` is the package."""
        parts = [part.removesuffix(".py") for part in self.parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def functions(self) -> Iterator[FunctionNode]:
        """Every function and method, nested ones too."""
        return (node for node in ast.walk(self.tree) if isinstance(node, FunctionNode))

    def at(self, node: ast.AST, what: str) -> str:
        """ "src/…/file.py:12 what" — the form of every complaint."""
        return f"{self.name}:{getattr(node, 'lineno', 1)} {what}"


@cache
def package_sources() -> tuple[Source, ...]:
    """Every file of the package, sorted."""
    return tuple(Source(path) for path in sorted(SRC.rglob("*.py")))


@cache
def all_sources() -> tuple[Source, ...]:
    """The package, its tests and its benchmarks."""
    others = [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    return (*package_sources(), *(Source(path) for path in others))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, sources in (("source", package_sources), ("any_source", all_sources)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, sources(), ids=lambda source: source.name)


@pytest.fixture
def sources() -> tuple[Source, ...]:
    """The whole package, for rules about how files hang together."""
    return package_sources()


@pytest.fixture
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture
def forbid(request: pytest.FixtureRequest) -> Callable[[Iterable[str]], None]:
    """Fail with the test's own sentence and every offence found."""

    def check(offences: Iterable[str]) -> None:
        found = list(offences)
        if found:
            sentence = " ".join(request.function.__doc__.split())
            pytest.fail("\n  ".join([sentence, *found]), pytrace=False)

    return check


def dotted(node: ast.AST) -> str:
    """`torch.distributed.init` for an attribute chain, a bare name for a name, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


@pytest.fixture
def dotted_name() -> Callable[[ast.AST], str]:
    """`dotted`, as a fixture, so that test files need no import from here."""
    return dotted
