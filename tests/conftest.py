"""For every test: one thread, and Ctrl-C that can be heard.

Toys are too small to share, and two threads that wait for each other cost minutes.
"""

from __future__ import annotations

import signal

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One torch thread per test process."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """What was started in the background of a shell ignores Ctrl-C, and so would the programs that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
