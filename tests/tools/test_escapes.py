"""Attempts to use up this machine from the Python tool. What counts is what happened outside, not what the code was told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from sandboxes.arena import Arena, becomes, is_waiting

MB = 1 << 20
# ---- processes ----


def test_fork_bomb(arena: Arena) -> None:
    code = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
    assert arena.run(code, seconds=1).startswith("error: ")
    assert arena.most_processes <= 3, "the code and what stands around it"


@pytest.mark.parametrize(
    "start",
    [
        "os.posix_spawn('/bin/sleep', ['sleep', '30'], {})",
        "subprocess.Popen(['sleep', '30'], start_new_session=True)",
        "os.system('sleep 30 &')",
        "multiprocessing.Process(target=time.sleep, args=(30,)).start()",
        "libc.syscall(435, (ctypes.c_uint64 * 11)(), 88)",  # clone3
        "libc.syscall(56, 0x10000000, 0, 0, 0, 0)",  # clone into a new user namespace (x86-64)
        "libc.vfork() or libc._exit(0)",
        "os.execv('/bin/sleep', ['sleep', '30'])",
    ],
)
def test_no_program_is_started(arena: Arena, start: str) -> None:
    begun = time.monotonic()
    arena.run(f"import ctypes, multiprocessing, os, subprocess, time\nlibc = ctypes.CDLL(None)\n{start}")
    assert time.monotonic() - begun < 8, "it did not become a sleeping program"
    assert arena.most_processes <= 3


def test_threads_can_not_pile_up(arena: Arena) -> None:
    code = """
import threading, time
threading.stack_size(65536)
started = 0
try:
    for _ in range(20_000):
        threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
        started += 1
except RuntimeError:
    pass
started
"""
    assert arena.run(code) == "0"


def test_daemon_is_not_left_behind(arena: Arena) -> None:
    """A double fork with a session of its own, as daemons do; the arena looks for survivors."""
    code = """
import os, time
def part(action):
    try:
        return action()
    except OSError:
        return None
if part(os.fork) == 0:
    part(os.setsid)
    if part(os.fork) == 0:
        time.sleep(30)
part(os.setsid); part(lambda: os.setpgid(0, 0))
for number in (0, 1, 2):
    os.close(number)
time.sleep(0.2)
"""
    arena.run(code)
    assert arena.processes() == []


def test_loop_that_ignores_signals_is_ended(arena: Arena) -> None:
    code = """
import os, signal
for number in signal.valid_signals():
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
os.close(1); os.close(2)
while True:
    pass
"""
    begun = time.monotonic()
    assert arena.run(code, seconds=0.6).startswith("error: ")
    assert time.monotonic() - begun < 3


def test_waiting_is_ended(arena: Arena) -> None:
    begun = time.monotonic()
    assert arena.run("import time\nprint('here', flush=True)\ntime.sleep(60)", seconds=1.5) == (
        "error: stopped after 1.5 s\nhere"
    )
    assert time.monotonic() - begun < 3


def test_processor_time_is_limited_by_the_kernel_as_well(arena: Arena) -> None:
    """The clock is not asked here: what counts up is the processor's time."""
    answer = arena.run("import resource\n[resource.getrlimit(resource.RLIMIT_CPU), resource.setrlimit]", seconds=3)
    assert answer.startswith("[(3, 3),")
    code = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (60, 60))"
    assert arena.run(code).startswith("error: "), "limits can't be raised"


def test_code_ends_with_whoever_started_it(arena: Arena) -> None:
    """kill -9 of the program that asks leaves nothing running."""
    program = f"""
import tempfile
tempfile.tempdir = {str(arena.private)!r}
from nestling.tools import python
python.call("import time; time.sleep(60)", python.Settings(seconds=60, wrapper={arena.wrapper!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    assert becomes(lambda: any(is_waiting(number) for number in arena.processes()), seconds=15), "it runs"
    process.kill()
    process.wait()
    assert becomes(lambda: arena.processes() == [], seconds=5)
    subprocess.run(["rm", "-rf", *arena.private.iterdir()], check=True)


# ---- memory, disk, output ----


def test_memory_bomb(arena: Arena) -> None:
    code = "hoard = []\nwhile True:\n    hoard.append(bytearray(10 * 2**20))"
    assert arena.run(code, memory=200).startswith("error: MemoryError")
    assert arena.most_memory < 260 * MB


@pytest.mark.parametrize(
    "code",
    [
        "import mmap\nhoard = [mmap.mmap(-1, 2**26) for _ in range(100)]\nfor m in hoard: m.write(b'x' * 2**26)",
        "import os\nwhile True: os.write(os.memfd_create('a'), b'x' * 2**22)",
        "import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.shmget(0, 2**28, 0o1600), libc.shmget(0, 2**28, 0o1600))",
        "x = 'x' * 2**40",
        "import os\nhoard = []\nwhile True:\n    r, w = os.pipe(); os.set_blocking(w, False); os.write(w, b'x' * 65536)",
    ],
)
def test_other_ways_to_memory(arena: Arena, code: str) -> None:
    before = _segments()
    arena.run(code, memory=200, seconds=2)
    assert arena.most_memory < 260 * MB
    assert _segments() == before


def _segments() -> set[str]:
    """The large segments of shared memory on this machine, by their ids."""
    table = Path("/proc/sysvipc/shm")
    rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
    return {row[1] for row in rows if int(row[3]) == 2**28}


@pytest.mark.parametrize(
    "code",
    [
        "with open('big', 'wb') as f:\n    while True: f.write(b'x' * 2**20)",
        "n = 0\nwhile True:\n    n += 1\n    open(f'{n}', 'wb').write(b'x' * 2**20)",
        "n = 0\nwhile True:\n    n += 1\n    open(f'{n}', 'wb')",
        "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')",
        "import os\nwhile True:\n    os.mkdir('d' * 250); os.chdir('d' * 250)",
        "import os\nf = os.open('a', os.O_RDWR | os.O_CREAT)\nos.posix_fallocate(f, 0, 2**33)",
        "import os\nwhile True: os.write(0, b'x' * 2**20)",
    ],
)
def test_disk(arena: Arena, code: str) -> None:
    """At most the file and folder limits, and what is written between two looks."""
    assert arena.run(code, file=4, folder=16, seconds=2).startswith("error: ")
    assert arena.most_disk < 200 * MB
    assert list(arena.private.iterdir()) == []


def test_folders_that_lock_themselves_are_cleared(arena: Arena) -> None:
    code = """
import os
for mode in (0, 0o300, 0o100, 0o400):
    os.makedirs(f"d{mode}/inner")
    os.umask(0o777 & ~mode)
    os.mkdir(f"e{mode}")
    os.umask(0o022)
os.symlink("..", "up"); os.symlink("/", "root"); os.symlink("self", "self")
"""
    arena.run(code)
    assert list(arena.private.iterdir()) == []


def test_endless_output(arena: Arena) -> None:
    begun = time.monotonic()
    answer = arena.run("while True: print('x' * 1000)", characters=500)
    assert answer.startswith("error: stopped: more than 16 MB of output")
    assert len(answer) < 700
    assert time.monotonic() - begun < 8
