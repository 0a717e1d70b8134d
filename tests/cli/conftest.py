"""The command line for tests: calls of `nestling` with real processes, exit codes and streams, and a tiny finished run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TINY = Path(__file__).parents[1] / "stages" / "tiny.yaml"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Nestling = Callable[..., Done]


@pytest.fixture(scope="session")
def nestling() -> Iterator[Nestling]:
    """`nestling(*words)` as a process of its own, forked from one that has imported everything."""
    command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdin
        assert server.stdout

        def call(*words: object) -> Done:
            server.stdin.write(json.dumps([str(word) for word in words]) + "\n")
            server.stdin.flush()
            return Done(**json.loads(server.stdout.readline()))

        yield call
        server.stdin.close()


@pytest.fixture(scope="session")
def refused(nestling: Nestling) -> Callable[..., str]:
    """The one line with which a command is refused: exit code 2, nothing else that looks like an error."""

    def call(*words: object) -> str:
        done = nestling(*words)
        assert done.code == 2, done
        said = [line for line in done.err.splitlines() if not line.startswith(("[", "skipped "))]
        assert len(said) == 1, done.err
        assert said[0].startswith("error: ")
        assert "Traceback" not in done.err + done.out
        return said[0].removeprefix("error: ")

    return call


@pytest.fixture(scope="session")
def finished(nestling: Nestling, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with every stage done."""
    out = tmp_path_factory.mktemp("finished") / "tiny"
    done = nestling("run", TINY, "--out", out, "--dtype", "fp32", "--threads", "1", "--quiet")
    assert done.code == 0, done.err
    return out
