"""Loading the native step leaves the arithmetic of the rest of the process alone."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from nestling.generation import native
assert float("1e-310") * 1.0 > 0, "subnormal numbers were off before"
library = native._library()
assert float("1e-310") * 1.0 > 0, "the library turned subnormal numbers off"
print("loaded" if library else "no compiler")
"""


def test_subnormal_numbers_stay_on() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
