"""Threads of native code."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from nestling.core import native

TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads as Linux tells them")
def test_a_thread_that_waits_gives_its_workers_back():
    """They come with its first large computation, go when they are released, and come again with the next one."""
    if not native._openmp():
        pytest.skip("torch computes with another OpenMP here")
    counts: list[int] = []

    def work() -> None:
        torch.set_num_threads(2)
        for step in (lambda: None, compute, native.release_threads, compute, native.release_threads):
            step()
            counts.append(len(list(TASKS.iterdir())))

    def compute() -> None:
        torch.ones(1 << 22).sin()

    threads = torch.get_num_threads()
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    torch.set_num_threads(threads)
    alone, *rest = counts
    assert [count - alone for count in rest] == [1, 0, 1, 0]
