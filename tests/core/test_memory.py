"""Freed memory stays with the process, where the C library can be told so."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

STEP = """
import resource, sys, torch
from nestling.core.runtime import detect, keep_freed_memory
detect("cpu", "fp32")
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    parts = [torch.zeros(1_000_000) for _ in range(20)]  # 80 MB
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_the_next_step_gets_the_last_ones_pages() -> None:
    faults = {}
    for choice in ("keep", "plain"):
        command = [sys.executable, "-c", STEP, choice]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[choice] = int(found.stdout)
    assert faults["keep"] < faults["plain"] / 4
