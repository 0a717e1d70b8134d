"""The command line, and a tiny run with every stage done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from calls import CALM, TINY, CommandLine


@pytest.fixture(scope="session")
def nestling() -> Iterator[CommandLine]:
    """`nestling(*words)`."""
    with CommandLine() as line:
        yield line


@pytest.fixture(scope="session")
def finished(nestling: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with every stage done. Not to be written into."""
    out = tmp_path_factory.mktemp("finished") / "tiny"
    done = nestling("run", TINY, "--out", out, *CALM)
    assert done.code == 0, done.err
    return out
