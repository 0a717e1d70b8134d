"""Calling `nestling` from tests: real processes, real exit codes and streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

TINY = Path(__file__).parents[1] / "stages" / "tiny.yaml"
CALM = ("--dtype", "fp32", "--threads", "1", "--quiet")
"""Options of a run whose weights are compared with another's."""


@dataclass(frozen=True)
class Done:
    """How a command ended; a negative code is the signal that ended it."""

    code: int
    out: str
    err: str


class CommandLine:
    """`nestling(*words)`, each call a process of its own, forked from one that has imported everything: zygote.py."""

    def __enter__(self) -> CommandLine:
        command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate()

    def __call__(self, *words: object, **order: object) -> Done:
        """Run a command to its end; `order` as in zygote.py."""
        assert self._server.stdin
        assert self._server.stdout
        line = json.dumps({"words": [str(word) for word in words], **order}, default=str)
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()
        return Done(**json.loads(self._server.stdout.readline()))

    def refused(self, *words: object, **order: object) -> str:
        """The one line with which a command is refused: exit code 2, and nothing beside it but the stages' own lines."""
        done = self(*words, **order)
        assert done.code == 2, done
        said = [line for line in done.err.splitlines() if not line.startswith(("[", "skipped "))]
        assert len(said) == 1, done.err
        assert said[0].startswith("error: "), done.err
        return said[0].removeprefix("error: ")
