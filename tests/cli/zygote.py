"""The real command line without paying seconds of imports for each call: a process that has imported it and forks.

Reads one JSON object per line and answers each with {"code", "out", "err"}; a negative code is the signal that ended it.
The child is what `nestling` is: its own process with its own exit code and streams, running `main`.

    {"words": ["run", "demo"], "signal": 9, "when": "runs/demo/corpus/*.tmp", "after": 0.5, "largest_file": 50000}

    signal        sent to the child `delay` seconds after a file matches the pattern `when`, or `after` seconds from its start
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
        late = time.monotonic() - started >= order.get("after", float("inf"))
        if waiting and (late or ("when" in order and glob.glob(order["when"], include_hidden=True))):
            time.sleep(order.get("delay", 0))
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
