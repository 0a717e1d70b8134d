"""C++ that comes with the package, compiled once per machine with the machine's own instructions; the threads it runs on.

What was compiled is kept in the user's cache folder, under a name that follows from the source, the compiler, the options and
the machine's instructions. Where something is missing there is no library, and its user goes on without.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

# Not -ffast-math: linked with it, a library turns off subnormal numbers for the whole process when it is loaded.
OPTIONS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
    "-freciprocal-math", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
COMPILERS = ("g++", "clang++", "c++")
SOFT = 1
"""OpenMP's word for a pause that keeps all settings."""


@cache
def compiled(source: Path) -> ctypes.CDLL | None:
    """The library that a C++ file becomes on this machine; None when there is no compiler or it fails."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    try:
        macros = subprocess.run(
            [compiler, "-march=native", "-E", "-dM", "-x", "c++", os.devnull], capture_output=True, check=True
        ).stdout  # name the compiler's version and the machine's instructions
        key = hashlib.sha256(macros + source.read_bytes() + repr(OPTIONS).encode()).hexdigest()[:16]
        path = Path.home() / ".cache" / "nestling" / f"{source.stem}-{key}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            subprocess.run([compiler, *OPTIONS, str(source), "-o", str(temporary)], capture_output=True, check=True)
            temporary.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return None


def release_threads() -> None:
    """End the calling thread's OpenMP workers; new ones come when it computes again, in a tenth of a millisecond.

    GNU's OpenMP lets workers spin while they wait only as long as all that the process has are no more than its cores. Beyond
    that they sleep at every barrier, which takes a small model half its speed. So a thread that has computed and will wait,
    or may end, gives its workers back.
    """
    for library in _openmp():
        library.omp_pause_resource_all(SOFT)


@cache
def _openmp() -> tuple[ctypes.CDLL, ...]:
    """GNU's OpenMP, as often as it is loaded: torch may bring its own."""
    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line} if maps.exists() else set()
    libraries = [ctypes.CDLL(path) for path in sorted(paths)]
    return tuple(library for library in libraries if hasattr(library, "omp_pause_resource_all"))
