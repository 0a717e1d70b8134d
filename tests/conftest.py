"""For every test: one thread. Toys are too small to share, and two threads that wait for each other cost minutes."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One torch thread per test process."""
    torch.set_num_threads(1)
