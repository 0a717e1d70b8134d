"""C++ that comes with the package, compiled once per machine with the machine's own instructions.

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
