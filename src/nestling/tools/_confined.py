"""The inside of the sandbox: a process of its own that locks itself in, then runs the code it was given.

Started by `_sandbox.py` as a plain script with a clean environment; it imports nothing of this project. It reads one job
(JSON) from standard input and goes through doors that close behind it, in this order: resource limits, capabilities and
no_new_privs, Landlock (files, TCP, signals), seccomp (system calls). A door that the job asks for and that does not
close ends the process before any of the code has run.

Landlock: https://docs.kernel.org/userspace-api/landlock.html. The seccomp filter is a list of what is allowed, built by
libseccomp: one process with one thread, files, memory, clocks; no sockets, no new processes, no signals to others, and
no change of owner, mode or time of a file, which Landlock would let through.
"""

from __future__ import annotations

import ast
import ctypes
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType, TracebackType

NAME = "<code>"
SHOWN_FRAMES = 5
NOT_CONFINED = 91  # exit status: a door did not close, nothing was run

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
LEAST_LANDLOCK = 3  # Linux 6.2; before that a file that can be read could be truncated
READ_FILE, READ_FOLDER, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
EXECUTE, MAKE_DEVICES_AND_SOCKETS = 1 << 0, 1 << 6 | 1 << 9 | 1 << 11

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 1, 24, 38, 47, 4
PR_SET_NAME, PR_GET_NAME = 15, 16
CAPABILITY_VERSION = 0x20080522

ALLOW, REFUSE, NOT_KNOWN = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
EQUAL, MASKED_EQUAL = 4, 7

ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev lseek close close_range dup dup2 dup3 pipe pipe2 fcntl ioctl
flock fsync fdatasync ftruncate fallocate sendfile copy_file_range open openat creat stat lstat fstat newfstatat statx
statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd chdir fchdir mkdir mkdirat
rmdir unlink unlinkat rename renameat renameat2 symlink symlinkat link linkat umask fadvise64 readahead
mmap munmap mprotect mremap madvise brk msync mincore membarrier
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack pause restart_syscall
poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd eventfd2 timerfd_create
timerfd_settime timerfd_gettime sendto recvfrom shutdown getsockopt setsockopt getsockname getpeername
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getitimer setitimer alarm
sysinfo uname getpid gettid getppid getuid geteuid getgid getegid getgroups getpgrp getpgid getsid getresuid getresgid
getrlimit getpriority sched_yield sched_getaffinity sched_getparam sched_getscheduler set_tid_address set_robust_list
get_robust_list rseq futex getrandom arch_prctl getcpu get_mempolicy capget wait4 waitid exit exit_group
"""


class _Compare(ctypes.Structure):
    """libseccomp's `struct scmp_arg_cmp`."""

    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    """Landlock's `struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def main() -> None:
    """Read the job, close the doors, run the code."""
    job = json.loads(sys.stdin.buffer.read())
    if "code" not in job:
        sys.stdout.write(json.dumps(_what_closes(job)))
        return
    try:
        _confine(job)
    except OSError as error:
        sys.stdout.write(f"{error}")
        sys.stdout.flush()
        os._exit(NOT_CONFINED)
    _execute(job["code"])


def _what_closes(job: dict) -> dict[str, int]:
    """Try each door and say which ones closed: {"landlock": version or 0, "seccomp": 0 or 1}."""
    closed = {}
    for name, close in (("landlock", _restrict_files), ("seccomp", _restrict_calls)):
        try:
            closed[name] = close(job)
        except OSError:
            closed[name] = 0
    return closed


def _confine(job: dict) -> None:
    _limit(job["limits"])
    sys.path += job["packages"]
    if sys.platform == "linux":
        _drop_power()
    if job["landlock"]:
        _restrict_files(job)
    if job["seccomp"]:
        _restrict_calls(job)


def _limit(limits: dict[str, int]) -> None:
    """Resource limits by their names, both soft and hard, so that they can't be raised again."""
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}", None)  # some systems lack some
        if which is not None:
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))


def _drop_power() -> None:
    """No capabilities, none to gain by starting a program, and an end when whoever started this ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused for numbers beyond the last and for plain users
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    _must(libc.capset(header, none), "capset")
    _must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _must(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")


def _restrict_files(job: dict) -> int:
    """Landlock: read what is listed, write in the folder, no TCP, no signal to the outside; gives the kernel's version."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.syscall
    call.argtypes = [ctypes.c_long] * 5
    version = call(LANDLOCK_CREATE, 0, 0, 1, 0)
    if version < LEAST_LANDLOCK:
        raise OSError(errno.ENOSYS, "Landlock is missing or too old")
    files = (1 << (16 if version >= 5 else 15)) - 1
    handled = [files, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0]
    attributes = (ctypes.c_uint64 * 3)(*handled)
    size = 8 * (3 if version >= 6 else 2 if version >= 4 else 1)
    rules = _must(call(LANDLOCK_CREATE, ctypes.addressof(attributes), size, 0, 0), "Landlock")
    own = files & ~(EXECUTE | MAKE_DEVICES_AND_SOCKETS | 1 << 15)
    granted = [(path, READ_FILE | READ_FOLDER) for path in job["readable"]]
    granted += [("/dev/null", READ_FILE | WRITE_FILE), ("/dev/zero", READ_FILE), ("/dev/urandom", READ_FILE)]
    for path, rights in [*granted, (job["folder"], own)]:
        _grant(call, rules, path, rights)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _must(call(LANDLOCK_RESTRICT, rules, 0, 0, 0), "Landlock")
    os.close(rules)
    return version


def _grant(call: Callable[..., int], rules: int, path: str, rights: int) -> None:
    """One rule; what does not exist here needs none."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= READ_FILE | WRITE_FILE
    rule = _Beneath(rights, place)
    _must(call(LANDLOCK_ADD, rules, 1, ctypes.addressof(rule), 0), "Landlock")
    os.close(place)


def _restrict_calls(job: dict) -> int:
    """seccomp: only `ALLOWED` calls, and a few others with harmless arguments."""
    library = ctypes.CDLL("libseccomp.so.2")  # OSError where it is not installed
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    add = library.seccomp_rule_add_array
    add.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Compare)]
    rules = library.seccomp_init(REFUSE)
    for name, action, conditions in [*((name, ALLOW, ()) for name in ALLOWED.split()), *_conditional()]:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number != -1:  # a call that this architecture or an old libseccomp does not know stays refused
            compared = (_Compare * len(conditions))(*(_Compare(*condition) for condition in conditions))
            _must(add(rules, action, number, len(conditions), compared), name)
    _must(library.seccomp_load(rules), "seccomp")
    return 1


def _conditional() -> list[tuple[str, int, tuple[tuple[int, int, int, int], ...]]]:
    """Calls allowed with some arguments: (name, action, conditions on arguments that hold together)."""
    own = (0, EQUAL, os.getpid(), 0)
    stream_pair = ((0, EQUAL, 1, 0), (1, MASKED_EQUAL, 0xF, 1))  # a datagram pair could send to any socket on disk
    return [
        ("kill", ALLOW, (own,)),
        ("tgkill", ALLOW, (own,)),
        ("socketpair", ALLOW, stream_pair),  # asyncio wakes itself through one
        ("prlimit64", ALLOW, ((0, EQUAL, 0, 0), (2, EQUAL, 0, 0))),  # asking, not setting
        ("prctl", ALLOW, ((0, EQUAL, PR_SET_NAME, 0),)),
        ("prctl", ALLOW, ((0, EQUAL, PR_GET_NAME, 0),)),
        ("clone3", NOT_KNOWN, ()),  # the C library then tries clone, and says that it is refused
    ]


def _must(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno() or -result
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _execute(code: str) -> None:
    """Run the code as a program; the value of a last line that is an expression is shown, as at Python's prompt."""
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.excepthook = partial(_complain, code)
    tree = ast.parse(code, NAME)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NAME, "exec"), module.__dict__)
    if last is not None:
        exec(compile(ast.Interactive([last]), NAME, "single"), module.__dict__)


def _complain(code: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Where in the code and what: the last line says what. Memory is freed first, for there may be none left."""
    import linecache  # only here: every import delays every call
    import traceback

    traceback.clear_frames(trace)
    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    places = [place for place in traceback.extract_tb(trace) if place.filename == NAME]
    lines = [f"  line {place.lineno}, in {place.name}: {place.line}\n" for place in places[-SHOWN_FRAMES:]]
    sys.stdout.flush()
    sys.stdout.write("".join(["\n", *lines, *traceback.format_exception_only(kind, error)]))


if __name__ == "__main__":
    main()
