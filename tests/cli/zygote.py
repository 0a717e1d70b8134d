"""The real command line without paying seconds of imports for each call: a process that has imported it and forks.

Reads one JSON object per line and answers each with {"code", "out", "err"}; a negative code is the signal that ended it.
The child is what `nestling` is: its own process with its own exit code and streams, running `main`.

    {"words": ["run", "demo"], "signal": 9, "when": "runs/demo/corpus/*.tmp", "after": 0.5, "largest_file": 50000}

    signal        sent to the child `after` seconds from its start; or by itself, as soon as it touches a file while one
                  matches the pattern `when`, so that no moment is too short
    largest_file  bytes; a longer file can't be written, as on a full disk
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any

from nestling.cli.app import main
from nestling.core.registry import find, names


def call(order: dict[str, Any]) -> dict[str, object]:
    """One command."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            become(order, out, err)
        code = wait(child, order)
        texts = {}
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            texts[name] = file.read().decode()
        return {"code": code, **texts}


def wait(child: int, order: dict[str, Any]) -> int:
    """Until the child has ended; on the way it gets its signal."""
    started, waiting = time.monotonic(), "signal" in order
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if waiting and time.monotonic() - started >= order.get("after", float("inf")):
            os.kill(child, order["signal"])
            waiting = False
        time.sleep(0.001)


def become(order: dict[str, Any], out: IO[bytes], err: IO[bytes]) -> None:
    """In the child: run the command and leave."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    if "largest_file" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"], resource.RLIM_INFINITY))
    if "when" in order:
        sys.addaudithook(signal_at(order["when"], order["signal"]))
    sys.argv = ["nestling", *order["words"]]
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


def signal_at(when: str, number: int) -> Callable[[str, object], None]:
    """A hook that sends this process a signal, once, before it opens, renames, makes or removes anything further."""
    left = [number]

    def hook(event: str, _: object) -> None:
        if left and event in ("open", "os.rename", "os.mkdir", "os.remove") and glob.glob(when, include_hidden=True):
            os.kill(os.getpid(), left.pop())

    return hook


def serve() -> None:
    """Import everything, then answer."""
    for file in ("runs", "models", "stage_verbs"):
        importlib.import_module(f"nestling.cli.{file}")
    for stage in names("stages"):
        find("stages", stage)
    for late in ("torch._dynamo", "torch._subclasses.fake_tensor", "matplotlib.figure", "matplotlib.backends.backend_svg"):
        importlib.import_module(late)  # what a run imports on its way, seconds of it
    for line in sys.stdin:
        print(json.dumps(call(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
