"""The outside of the sandbox: what can be isolated on this machine, and one process run in it, watched and cleared away.

Around the process stands bubblewrap where it works (its own file tree), else namespaces by `unshare` (network, processes,
IPC, users), else nothing; inside, the process locks itself in with resource limits, Landlock and seccomp
(`_confined.py`). Any one of these may be missing on a machine, so `isolation` says by which means each thing is kept,
after having tried them, and names what is not.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

from nestling.tools._schema import shorten

WRAPPERS = ("bubblewrap", "namespaces", "none")
NOT_CONFINED = 91
PATIENCE = 1.0  # seconds that a killed process has to be gone
TICK = 0.05  # seconds between two looks at the folder
FLOOD = 1 << 24  # bytes of output that nobody will read
ENTRIES = 1000  # files and folders that the code may leave in its folder
OPEN_FILES = 64


class Isolation(NamedTuple):
    """One thing that is kept from the code, and by what; None where nothing on this machine keeps it."""

    what: str
    how: str | None


@dataclass(frozen=True)
class Layers:
    """What works here, tried on a process that was thrown away."""

    wrapper: str
    landlock: int
    """Version of the kernel's Landlock, 0 without."""
    seccomp: bool


@dataclass(frozen=True)
class Limits:
    """Seconds of wall clock and of processor, bytes of memory, of a file, of the folder, characters of output."""

    seconds: float
    memory: int
    file: int
    folder: int
    characters: int


@dataclass(frozen=True)
class Outcome:
    """What the process wrote, cut to size, and why it was stopped or with which status it ended."""

    text: str
    stopped: str | None
    status: int


@cache
def probe(wrapper: str = "auto") -> Layers | None:
    """The layers that work with this wrapper, or with the best one; None where it does not work at all."""
    if wrapper == "auto":
        return next((layers for name in WRAPPERS if (layers := probe(name))), None)
    if sys.platform != "linux":
        return Layers(wrapper, 0, False) if wrapper == "none" else None
    with tempfile.TemporaryDirectory(prefix="nestling-") as folder:
        job = {"folder": folder, "readable": _readable()}
        try:
            result = subprocess.run(
                _command(wrapper, Path(folder), []), input=json.dumps(job), cwd=folder, env=_environment(folder),
                capture_output=True, text=True, timeout=20, check=True,
            )  # fmt: skip
            closed = json.loads(result.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            return None
    return Layers(wrapper, closed["landlock"], bool(closed["seccomp"]))


def isolation(layers: Layers | None) -> list[Isolation]:
    """Everything that code is to be kept from, each with the means that keep it from it."""
    layers = layers or Layers("none", 0, False)
    wrapped = {"bubblewrap": "bubblewrap", "namespaces": "namespaces"}.get(layers.wrapper)
    seccomp = "seccomp" if layers.seccomp else None
    landlock = f"Landlock {layers.landlock}" if layers.landlock else None
    tree = "bubblewrap" if wrapped == "bubblewrap" else None
    plain_user = "RLIMIT_NPROC" if os.getuid() != 0 else None  # does not bind root
    linux = sys.platform == "linux"
    return [
        _kept("files elsewhere", tree, f"{landlock} + seccomp" if landlock and seccomp else None),
        _kept("network", wrapped, seccomp),
        _kept("starting processes and threads", seccomp, plain_user),
        _kept("other processes", wrapped, seccomp),
        _kept("privileges", "no capabilities, no_new_privs" if linux else None),
        _kept("memory", "RLIMIT_AS" if linux else None),
        _kept("processor time", "RLIMIT_CPU"),
        _kept("size of files", "RLIMIT_FSIZE, folder watched"),
        _kept("running time", "killed as a group"),
        _kept("length of output", "cut, killed when flooding"),
        _kept("environment and open files", "clean environment, nothing inherited"),
    ]


def _kept(what: str, *ways: str | None) -> Isolation:
    return Isolation(what, ", ".join(filter(None, ways)) or None)


def execute(code: str, limits: Limits, layers: Layers, packages: bool = False) -> Outcome:
    """Run Python code in a private folder that is gone afterwards.

    Args:
        packages: whether the packages installed beside this one can be imported.
    """
    extra = [sysconfig.get_paths()[key] for key in ("purelib", "platlib")] if packages else []
    with _private_folder() as folder:
        job = {
            "code": code, "folder": str(folder), "readable": _readable() + extra, "packages": extra,
            "limits": _resources(limits), "landlock": bool(layers.landlock), "seccomp": layers.seccomp,
        }  # fmt: skip
        with _unnamed(folder / "job", json.dumps(job)) as file:
            process = subprocess.Popen(
                _command(layers.wrapper, folder, extra), stdin=file, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, cwd=folder, env=_environment(str(folder)), start_new_session=True,
            )  # fmt: skip
        return _Watch(process, folder, limits).run()


def _unnamed(path: Path, text: str) -> BinaryIO:
    """A file open for reading whose name is gone: unlike a pipe it can neither be full nor break."""
    path.write_text(text, encoding="utf-8")
    file = path.open("rb")
    path.unlink()
    return file


def _resources(limits: Limits) -> dict[str, int]:
    return {
        "AS": limits.memory, "CPU": math.ceil(limits.seconds), "FSIZE": limits.file, "CORE": 0, "NPROC": 1,
        "NOFILE": OPEN_FILES, "MEMLOCK": 0, "MSGQUEUE": 0,
    }  # fmt: skip


def _environment(folder: str) -> dict[str, str]:
    """All that the code finds. The same code gives the same output: sets are ordered alike in every run."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        "PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads
    }  # fmt: skip


def _readable() -> list[str]:
    """What an interpreter needs to read while it runs: its library and the system's."""
    own = [sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib")]
    own.append(os.path.join(sys.base_prefix, "lib"))
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"]
    return [path for path in dict.fromkeys(own + system) if os.path.exists(path)]


def _command(wrapper: str, folder: Path, extra: list[str]) -> list[str]:
    """The interpreter on `_confined.py`, without user packages or the script's folder, and what stands around it."""
    script = str(Path(__file__).with_name("_confined.py"))
    executable = os.path.realpath(sys.executable)
    python = [executable, "-s", "-S", "-P", "-B", "-X", "utf8", script]
    if wrapper == "bubblewrap":
        seen = [part for path in [*_readable(), *extra, executable, script] for part in ("--ro-bind", path, path)]
        place = ["--dev", "/dev", "--bind", str(folder), str(folder), "--chdir", str(folder)]
        return ["bwrap", "--unshare-all", "--die-with-parent", *seen, *place, "--", *python]
    if wrapper == "namespaces":
        kinds = ["--user", "--map-root-user", "--net", "--pid", "--ipc", "--uts"]
        return ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "--fork", "--kill-child", "--", *python]
    return python


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for one call. `rm` clears it, because it copes with any depth and with folders that lock themselves."""
    folder = Path(tempfile.mkdtemp(prefix="nestling-"))
    try:
        yield folder
    finally:
        _quietly("rm", "-rf", "--", str(folder))
        if folder.exists():
            _quietly("chmod", "-R", "u+rwX", "--", str(folder))
            _quietly("rm", "-rf", "--", str(folder))


def _quietly(*command: str) -> None:
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _over(folder: Path, limit: int) -> bool:
    """Whether a folder holds more bytes or more entries than it may; a path too long to be read is too much as well."""
    entries = size = 0
    stack = [str(folder)]
    while stack:
        try:
            with os.scandir(stack.pop()) as found:
                for entry in found:
                    entries += 1
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(entry.path)
                    if entries > ENTRIES or size > limit:
                        return True
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # gone meanwhile, or locked by the code itself
        except OSError:
            return True
    return False


def _lives(group: int) -> bool:
    """Whether a process group has a member that runs; one that only waits to be collected by its parent does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except OSError:
            continue  # gone meanwhile
        if int(its_group) == group and state not in "ZX":
            return True
    return False


@dataclass
class _Watch:
    """Reads what a process writes and ends it, with everything that it started, at the first limit."""

    process: subprocess.Popen[bytes]
    folder: Path
    limits: Limits
    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    total: int = 0

    def run(self) -> Outcome:
        """Follow the process to its end."""
        assert self.process.stdout
        with self.process.stdout as output:
            try:
                stopped = self._follow(output, time.monotonic() + self.limits.seconds)
            finally:
                self._kill()
        return Outcome(self._text(), stopped, self.process.returncode)

    def _follow(self, output: IO[bytes], deadline: float) -> str | None:
        """Read until the process ends by itself (None) or reaches a limit (which one)."""
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            looked = time.monotonic()
            while self.process.poll() is None:
                self._read_or_wait(selector, output, max(0.0, min(TICK, deadline - time.monotonic())))
                now = time.monotonic()
                if now >= deadline:
                    return f"stopped after {self.limits.seconds:g} s"
                if self.total > FLOOD:
                    return f"stopped: more than {FLOOD >> 20} MB of output"
                if now - looked >= TICK and _over(self.folder, self.limits.folder):
                    return f"stopped: more than {self.limits.folder >> 20} MB or {ENTRIES} files in the folder"
                looked = now if now - looked >= TICK else looked
            while selector.get_map() and selector.select(0) and self._read(output):
                continue
        return None

    def _read_or_wait(self, selector: selectors.BaseSelector, output: IO[bytes], seconds: float) -> None:
        """Up to `seconds`, for output as long as there can be any, then for the end."""
        if selector.get_map():
            if selector.select(seconds) and not self._read(output):
                selector.unregister(output)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)

    def _read(self, output: IO[bytes]) -> int:
        """Keep the first and the last of what comes; 0 at the end."""
        data = os.read(output.fileno(), 1 << 16)
        self.total += len(data)
        half = 2 * self.limits.characters  # bytes: at most 4 for a character
        room = half - len(self.head)
        self.head += data[:room]
        self.tail = (self.tail + data[max(0, room) :])[-half:]
        return len(data)

    def _kill(self) -> None:
        """End the whole group. What stood inside a wrapper dies a moment later than it: wait until that is gone too."""
        group, ended = self.process.pid, self.process.poll() is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self.process.wait()
        patience = time.monotonic() + PATIENCE
        while not ended and time.monotonic() < patience and _lives(group):
            time.sleep(0.002)

    def _text(self) -> str:
        """All of the output, or its head and tail."""
        if self.total == len(self.head) + len(self.tail):
            return shorten((self.head + self.tail).decode("utf-8", "replace"), self.limits.characters)
        half = self.limits.characters // 2
        head, tail = self.head.decode("utf-8", "replace")[:half], self.tail.decode("utf-8", "replace")[-half:]
        return f"{head}\n… {self.total} bytes of output, the middle is left out …\n{tail}"
