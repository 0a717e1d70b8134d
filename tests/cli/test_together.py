"""What several processes say: a mistake that all of them find is told once, one's own is heard."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nestling.cli import app
from nestling.core.errors import Interrupted, UserError

WORLD = 3


def _one(rank: int, port: int, folder: Path, errors: dict[int, Exception]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    sys.argv, sys.stderr = ["nestling", "doctor"], (folder / str(rank)).open("w", buffering=1)
    if rank not in errors:
        return

    def fails(called: str | None = None) -> None:
        raise errors[rank]

    app.build_app = fails  # type: ignore[assignment]
    code = 130 if isinstance(errors[rank], Interrupted) else 2
    with pytest.raises(SystemExit, match=str(code)):
        app.main()


def said(folder: Path, errors: dict[int, Exception]) -> list[str]:
    """The lines of all processes of a command that ends in these errors; the store is where torchrun has it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    torch.multiprocessing.start_processes(_one, (store.port, folder, errors), nprocs=WORLD, start_method="fork")
    return [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


def test_a_mistake_that_all_find_is_told_once_by_the_main_process(tmp_path: Path) -> None:
    error = UserError("must divide the 3 processes", where="training.parallel.tensor", value=2)
    lines = said(tmp_path, dict.fromkeys(range(WORLD), error))
    assert lines == ["error: training.parallel.tensor: must divide the 3 processes (got 2)"]


def test_one_that_some_find_is_told_once_by_one_of_them(tmp_path: Path) -> None:
    (line,) = said(tmp_path, dict.fromkeys((1, 2), UserError("this machine has no such device")))
    assert line in {f"[process {rank}] error: this machine has no such device" for rank in (1, 2)}


def test_different_mistakes_are_all_told(tmp_path: Path) -> None:
    lines = said(tmp_path, {0: UserError("the others are gone"), 2: UserError("the disk is full")})
    assert lines == ["error: the others are gone", "[process 2] error: the disk is full"]


@pytest.mark.parametrize("words", [["", "", ""], ["step 3", "step 3", "a signal"]])
def test_ctrl_c_is_told_once(tmp_path: Path, words: list[str]) -> None:
    (line,) = said(tmp_path, dict(enumerate(map(Interrupted, words))))
    assert line in {word or "interrupted" for word in words}
