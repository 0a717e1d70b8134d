"""The real command line without paying seconds of imports for each call: a process that has imported it and forks.

Reads one JSON list of words per line; answers each with {"code", "out", "err"}. The child is what `nestling` is: its own
process with its own exit code and streams, running `main`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from typing import IO

from nestling.cli.app import main
from nestling.core.registry import find, names


def call(words: list[str]) -> dict[str, object]:
    """One command."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            become(words, out, err)
        _, status = os.waitpid(child, 0)
        texts = {}
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            texts[name] = file.read().decode()
        return {"code": os.waitstatus_to_exitcode(status), **texts}


def become(words: list[str], out: IO[bytes], err: IO[bytes]) -> None:
    """In the child: run the command and leave."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.argv = ["nestling", *words]
    code = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Import everything, then answer."""
    for file in ("runs", "models", "stage_verbs"):
        importlib.import_module(f"nestling.cli.{file}")
    for stage in names("stages"):
        find("stages", stage)
    for line in sys.stdin:
        print(json.dumps(call(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
