"""Several processes and Ctrl-C: nobody stays behind to wait for one that has left, and training is not cut short."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from several import together

from nestling.core import ranks


def _interrupted_after(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def _waits_for_one_that_left() -> None:
    if ranks.rank() == 1:
        os._exit(0)
    guard = threading.Timer(30, os._exit, (1,))
    guard.start()
    _interrupted_after(0.3)
    dist.new_group([0, 1], timeout=ranks.ANSWER)  # waits in the library, where Python hears no signal


def test_ctrl_c_ends_a_process_that_waits_for_one_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LEAVING", 0.3)
    with pytest.raises(Exception, match="process 0 terminated with exit code 130"):
        together(2, _waits_for_one_that_left)


def _has_a_handler_of_its_own(folder: Path) -> None:
    heard: list[int] = []
    usual = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    _interrupted_after(0.1)
    time.sleep(1.0)  # what a step takes
    signal.signal(signal.SIGINT, usual)
    assert heard == [signal.SIGINT]
    (folder / str(ranks.rank())).touch()


def _hears_it(folder: Path) -> None:
    _interrupted_after(0.1)
    try:
        time.sleep(10)
    except KeyboardInterrupt:
        (folder / str(ranks.rank())).touch()


@pytest.mark.parametrize("work", [_has_a_handler_of_its_own, _hears_it])
def test_who_hears_ctrl_c_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: object) -> None:
    monkeypatch.setattr(ranks, "LEAVING", 0.5)
    together(2, work, tmp_path)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
