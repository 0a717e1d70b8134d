"""A place where sandboxed code is watched from outside: which processes it has, how large they grow, what it leaves."""

from __future__ import annotations

import glob
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nestling.tools import _sandbox, python
from nestling.tools.python import Settings

SECRET = "the-secret-of-the-hill"


def complete(wrapper: str) -> bool:
    """Whether everything is isolated on this machine with this wrapper."""
    layers = _sandbox.probe(wrapper)
    return layers is not None and all(kept.how for kept in _sandbox.isolation(layers))


@dataclass
class Arena:
    """Runs code in one kind of sandbox; `outside` is a folder that it must not touch, with a secret in it."""

    root: Path
    wrapper: str
    most_processes: int = 0
    most_memory: int = 0
    most_disk: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def private(self) -> Path:
        """Where the private folders of calls are made."""
        return self.root / "private"

    @property
    def outside(self) -> Path:
        """A folder beside them."""
        return self.root / "outside"

    def run(self, code: str, **settings: object) -> str:
        """The tool's answer; meanwhile the code's processes and folder are watched."""
        self._done.clear()
        watcher = threading.Thread(target=self._watch)
        watcher.start()
        try:
            chosen = {"seconds": 10, "wrapper": self.wrapper, **settings}
            return python.call(code, Settings(**chosen))  # type: ignore[arg-type]
        finally:
            self._done.set()
            watcher.join()

    def processes(self) -> list[int]:
        """The processes that were started with a private folder of this arena, and all that these started."""
        mark = str(self.private).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if mark in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
                except (OSError, ProcessLookupError):
                    continue
        return found

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            found = self.processes()
            self.most_processes = max(self.most_processes, len(found))
            self.most_memory = max(self.most_memory, sum(map(_resident, found)))
            self.most_disk = max(self.most_disk, _size(self.private))


def _resident(process: int) -> int:
    """Bytes of memory that a process has in use."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _size(folder: Path) -> int:
    """Bytes on disk of a folder and the folders in it, three deep."""
    total = 0
    for pattern in ("*", "*/*", "*/*/*"):
        for path in glob.iglob(str(folder / pattern)):
            try:
                total += os.lstat(path).st_blocks * 512
            except OSError:
                continue
    return total


def is_waiting(process: int) -> bool:
    """Whether a process has got as far as sleeping in the code."""
    try:
        return "nanosleep" in Path(f"/proc/{process}/wchan").read_text()
    except OSError:
        return False


def becomes(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False
