"""Attempts to reach out of the Python tool. What counts is what happened outside, not what the code was told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandboxes.arena import SECRET, Arena, becomes, is_waiting

TRY = """
import os, sys
def attempt(action, *arguments, **named):
    try:
        result = action(*arguments, **named)
        print("DONE", getattr(action, "__name__", action), result)
    except Exception:
        pass
"""
"""Tries one thing after the other and goes on."""


# ---- network ----


@pytest.fixture
def listeners(arena: Arena) -> Iterator[dict[str, socket.socket]]:
    """Open doors on this machine that nobody may come through."""
    kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
    opened = {name: socket.socket(socket.AF_INET, kind) for name, kind in kinds.items()}
    for name in kinds:
        opened[name].bind(("127.0.0.1", 0))
    for name, kind in (("stream", socket.SOCK_STREAM), ("datagram", socket.SOCK_DGRAM)):
        opened[name] = socket.socket(socket.AF_UNIX, kind)
        opened[name].bind(str(arena.outside / name))
        opened[f"abstract-{name}"] = socket.socket(socket.AF_UNIX, kind)
        opened[f"abstract-{name}"].bind(f"\0nestling-{os.getpid()}-{name}")
    for listener in opened.values():
        if listener.type == socket.SOCK_STREAM:
            listener.listen()
        listener.setblocking(False)
    yield opened
    for listener in opened.values():
        listener.close()


def test_network(arena: Arena, listeners: dict[str, socket.socket]) -> None:
    names = {name: listener.getsockname() for name, listener in listeners.items()}
    code = f"""{TRY}
import ctypes, socket
names = {names!r}
def connect(family, kind, name):
    with socket.socket(family, kind) as s:
        s.connect(name); s.send(b"hello")
def pair(kind, name):
    left, right = socket.socketpair(socket.AF_UNIX, kind)
    left.sendto(b"hello", name)
def message(kind, name):
    left, right = socket.socketpair(socket.AF_UNIX, kind)
    left.sendmsg([b"hello"], [], 0, name)
INET, UNIX = socket.AF_INET, socket.AF_UNIX
attempt(connect, INET, socket.SOCK_STREAM, names["tcp"])
attempt(connect, INET, socket.SOCK_DGRAM, names["udp"])
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
    for name in ("stream", "datagram", "abstract-stream", "abstract-datagram"):
        attempt(connect, UNIX, kind, names[name])
        attempt(pair, kind, names[name])
        attempt(message, kind, names[name])
attempt(socket.getaddrinfo, "example.org", 80)
attempt(socket.create_server, ("127.0.0.1", 0))
attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 0)
attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
attempt(socket.socket, socket.AF_VSOCK, socket.SOCK_STREAM)
ring = ctypes.CDLL(None).syscall(425, 4, (ctypes.c_char * 120)())  # io_uring_setup: it opens sockets of its own
print("DONE io_uring") if ring >= 0 else None
"""
    answer = arena.run(code)
    assert answer == "(no output)", "nothing succeeded"
    for name, listener in listeners.items():
        with pytest.raises(BlockingIOError):
            listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(100)
        assert name


# ---- files, environment, other processes ----


def test_reading_elsewhere(arena: Arena, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Many ways to the same file: by name, links, descriptors, /proc, other programs, other libraries."""
    secret = arena.outside / "secret.txt"
    code = f"""{TRY}
import ctypes, glob, mmap, shutil, sqlite3, importlib.machinery
parent, secret = os.getppid(), {str(secret)!r}
def show(path):
    return open(path, "rb").read()
def through(folder):
    return os.open("secret.txt", os.O_RDONLY, dir_fd=os.open(folder, os.O_PATH | os.O_DIRECTORY))
def reopened(path):
    return show(f"/proc/self/fd/{{os.open(path, os.O_PATH)}}")
def linked(make, name):
    make(secret, name)
    return show(name)
def by_library(path):
    libc = ctypes.CDLL(None)
    fd = libc.open(path.encode(), 0)
    buffer = ctypes.create_string_buffer(200)
    libc.read(fd, buffer, 200)
    return buffer.value
for path in (secret, "/etc/passwd", "/etc/shadow", "/proc/self/root" + secret, f"/proc/{{parent}}/root" + secret,
             "/proc/1/root" + secret, "/proc/1/environ", f"/proc/{{parent}}/environ", f"/proc/{{parent}}/mem",
             "/proc/self/cwd/../../outside/secret.txt", "../../outside/secret.txt", "/proc/self/environ",
             "/proc/thread-self/root" + secret, "/dev/mem", "/dev/sda", "/dev/vda", "/proc/kcore",
             *(f"/proc/{{n}}/environ" for n in range(parent - 50, parent + 50)),
             *(f"/proc/{{parent}}/fd/{{n}}" for n in range(30))):
    attempt(show, path)
    attempt(reopened, path)
    attempt(by_library, path)
    attempt(shutil.copyfile, path, "copy")
attempt(through, os.path.dirname(secret))
attempt(linked, os.symlink, "soft")
attempt(linked, os.link, "hard")
attempt(os.rename, secret, "mine")
attempt(os.listdir, os.path.dirname(secret)); attempt(os.listdir, "/"); attempt(os.listdir, os.path.expanduser("~root"))
attempt(sqlite3.connect, "file:" + secret + "?mode=ro", uri=True)
attempt(importlib.machinery.SourceFileLoader("x", secret).load_module)
attempt(os.chroot, "/proc/1/root")
print(dict(os.environ), glob.glob("/root/*"), glob.glob("/home/*"), glob.glob({str(arena.outside)!r} + "/*"))
for fd in range(3, 256):
    attempt(os.read, fd, 1000)
"""
    inherited = os.open(secret, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        answer = arena.run(code, characters=100_000, seconds=20)
    finally:
        os.close(inherited)
    assert answer.rstrip().endswith("[] [] []"), answer[-500:]
    assert SECRET not in answer
    assert "root:" not in answer
    assert "NESTLING_SECRET" not in answer
    assert (arena.outside / "secret.txt").read_text() == SECRET


def test_writing_elsewhere(arena: Arena) -> None:
    target = arena.outside / "secret.txt"
    (arena.outside / "folder").mkdir()
    before = _snapshot(arena.outside)
    library = _snapshot(Path(os.__file__).parent, pattern="os.py")
    code = f"""{TRY}
import ctypes, shutil
outside, target, library = {str(arena.outside)!r}, {str(target)!r}, os.__file__
open("mine", "w").write("mine")
def write(path, mode):
    with open(path, mode) as f:
        f.write("changed")
for path in (target, library, outside + "/new", "/proc/self/root" + target, "/proc/1/root" + target):
    for mode in ("w", "a", "r+", "x"):
        attempt(write, path, mode)
    attempt(os.open, path, os.O_RDONLY | os.O_TRUNC)
    attempt(os.open, path, os.O_RDONLY | os.O_CREAT)
    attempt(os.truncate, path, 0)
    attempt(os.unlink, path)
    attempt(os.chmod, path, 0o777)
    attempt(os.chown, path, 1, 1)
    attempt(os.utime, path, (1, 1))
    attempt(os.setxattr, path, "user.a", b"b")
    attempt(os.rename, "mine", path)
    attempt(os.replace, "mine", path)
    attempt(os.link, "mine", path + "2")
    attempt(os.symlink, "/etc", path + "3")
for action in (os.mkdir, os.mkfifo, os.mknod):
    attempt(action, outside + "/made")
attempt(os.rmdir, outside + "/folder"); attempt(shutil.move, outside + "/folder", "folder")
attempt(write, "/tmp/nestling-was-here", "w"); attempt(write, "/dev/shm/nestling-was-here", "w")
attempt(write, "/proc/self/oom_score_adj", "w"); attempt(write, "/proc/sys/kernel/core_pattern", "w")
os.symlink(outside, "out"); attempt(write, "out/new", "w"); attempt(os.chmod, "out/secret.txt", 0o777)
libc = ctypes.CDLL(None)
for call in (libc.mount, libc.umount, libc.unshare, libc.setns, libc.pivot_root, libc.reboot, libc.sethostname):
    if call(0, 0, 0, 0, 0) == 0: print("DONE", call)
if libc.unshare(0x10000000) == 0: print("DONE unshare")
"""
    arena.run(code)
    assert _snapshot(arena.outside) == before
    assert _snapshot(Path(os.__file__).parent, pattern="os.py") == library
    assert not Path("/tmp/nestling-was-here").exists()
    assert not Path("/dev/shm/nestling-was-here").exists()


def _snapshot(folder: Path, pattern: str = "**/*") -> list[tuple[object, ...]]:
    """All that can be seen of files: names, kinds, owners, times, content."""
    found = []
    for path in sorted(folder.glob(pattern)):
        about = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        attributes = os.listxattr(path)
        found.append((path, about.st_mode, about.st_uid, about.st_gid, about.st_mtime_ns, content, attributes))
    return found


def test_symbolic_links_are_not_followed_when_clearing_up(arena: Arena) -> None:
    code = f"import os\nos.symlink({str(arena.outside)!r}, 'out')\nos.mkdir('d')\nos.symlink('../../..', 'd/up')"
    before = _snapshot(arena.outside)
    assert arena.run(code) == "(no output)"
    assert _snapshot(arena.outside) == before


def test_signals_and_other_processes(arena: Arena) -> None:
    """A process beside gets no signal, is not traced and not read; nor is the one that asks."""
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    victim = subprocess.Popen([sys.executable, "-c", f"x = {SECRET!r}; import time; time.sleep(60)"])
    try:
        code = f"""{TRY}
import ctypes, signal
libc = ctypes.CDLL(None)
for process in ({victim.pid}, {os.getpid()}, os.getppid(), 1, -{os.getpgid(0)}, -{victim.pid}):
    if process != os.getpid():
        attempt(os.kill, process, signal.SIGUSR1)
        attempt(os.killpg, abs(process), signal.SIGUSR1)
        attempt(lambda: signal.pidfd_send_signal(os.pidfd_open(process), signal.SIGUSR1))
        libc.syscall(200, process, int(signal.SIGUSR1))  # tkill on x86-64
        libc.syscall(234, process, process, int(signal.SIGUSR1))  # tgkill
        libc.syscall(129, process, int(signal.SIGUSR1), (ctypes.c_char * 128)())  # rt_sigqueueinfo
        if process > 1:
            libc.ptrace(16, process, 0, 0)  # attach
            libc.ptrace(0x4206, process, 0, 0)  # seize
            attempt(os.sched_setaffinity, process, {{0}})
            attempt(os.setpriority, os.PRIO_PROCESS, process, 19)
            attempt(libc.prlimit, process, 0, 0, 0)
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
here = ctypes.create_string_buffer(4096)
local, remote = Part(ctypes.addressof(here), 4096), Part(id({SECRET!r}) & ~4095, 4096)
if libc.process_vm_readv({victim.pid}, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) > 0: print("DONE read")
"""
        affinity, priority = os.sched_getaffinity(victim.pid), os.getpriority(os.PRIO_PROCESS, victim.pid)
        answer = arena.run(code)
        assert victim.poll() is None, "a signal arrived"
        assert received == []
        status = Path(f"/proc/{victim.pid}/status").read_text()
        assert "TracerPid:\t0" in status
        assert "(stopped)" not in status
        assert os.sched_getaffinity(victim.pid) == affinity
        assert os.getpriority(os.PRIO_PROCESS, victim.pid) == priority
        assert "DONE read" not in answer
    finally:
        victim.kill()
        victim.wait()
        signal.signal(signal.SIGUSR1, before)


def test_code_has_no_privileges(arena: Arena) -> None:
    """Looked at from outside, while the code waits."""
    seen: list[str] = []

    def look() -> None:
        def code_is_there() -> bool:
            seen[:] = [_status(number) for number in arena.processes() if is_waiting(number)]
            return bool(seen)

        becomes(code_is_there, seconds=8)

    watcher = threading.Thread(target=look)
    watcher.start()
    arena.run("import time\ntime.sleep(0.7)")
    watcher.join()
    assert seen, "the code was seen"
    for status in seen:
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == int(fields["CapBnd"], 16) == 0
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
        assert fields["Threads"] == "1"


def _status(process: int) -> str:
    return Path(f"/proc/{process}/status").read_text()
