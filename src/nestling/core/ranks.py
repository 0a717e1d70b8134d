"""Who am I among the processes of this run, and what do they say to each other. On one process all of it is nothing.

`torchrun --nproc-per-node 4 -m nestling run RECIPE` starts several; `group` joins them for the time of a run. Processes
that read the same data (they share the layers of one model) count as one reader: `reader` and `readers` say whose turn
it is, and `sum_over_ranks` adds every reader once. What is sent is numbers and JSON, never a pickle.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nestling.core.errors import Interrupted, UserError
from nestling.core.metrics import say
from nestling.core.runtime import Launch, launched

if TYPE_CHECKING:
    import torch

ANSWER = timedelta(minutes=20)  # silence of a process in a collective after which the others give it up
PATIENCE = timedelta(days=30)  # how long the others wait while only the main process works
LEAVING = 3.0  # seconds after Ctrl-C in which a process leaves by itself, or else is ended
MOMENT = 3.0  # seconds that the others give the main process to say what they would say too
INTERRUPTED = 130  # exit code after Ctrl-C
LOST = ("gloo", "Gloo", "NCCL", "Connection", "Broken pipe", "timed out", "Timed out", "socket", "TCPStore")


@dataclass
class _Readers:
    """How the data is shared out: this process's place among `count` readers, and the group that has one of each."""

    index: int | None = None
    count: int | None = None
    group: Any = None


_READERS = _Readers()


def _dist() -> ModuleType:
    import torch.distributed  # here, because torch takes seconds and a single process asks nothing of it

    return torch.distributed


def is_distributed() -> bool:
    """True when torchrun started several processes and the group is up."""
    return "torch.distributed" in sys.modules and _dist().is_available() and _dist().is_initialized()


def rank() -> int:
    """This process's number, 0 on a single process."""
    if is_distributed():
        return _dist().get_rank()
    launch = launched()
    return launch.rank if launch else 0


def world_size() -> int:
    """How many processes share the run."""
    return _dist().get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Only the main process writes artifacts and speaks."""
    return rank() == 0


def reader() -> int:
    """Which share of the data is this process's, from 0."""
    return rank() if _READERS.index is None else _READERS.index


def readers() -> int:
    """Into how many shares the data goes."""
    return world_size() if _READERS.count is None else _READERS.count


@contextmanager
def reading_as(index: int, count: int, group: Any) -> Iterator[None]:
    """Share the data out differently: as reader `index` of `count`, where `group` holds one process of each reader."""
    before = (_READERS.index, _READERS.count, _READERS.group)
    _READERS.index, _READERS.count, _READERS.group = index, count, group
    try:
        yield
    finally:
        _READERS.index, _READERS.count, _READERS.group = before


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started; nothing on a single one.

    Raises:
        UserError: another process ended or doesn't answer any more.
    """
    launch = launched()
    if launch is None or is_distributed():
        yield
        return
    with _leaving_on_ctrl_c():
        _join(launch, device)
        try:
            with answering():
                yield
        finally:
            _dist().destroy_process_group()


@contextmanager
def _leaving_on_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends this process even where it can't hear it; training, which has a handler of its own, may save first.

    Python hears a signal between two of its own instructions, and a library that waits for another process comes to none.
    Such a wait has no end where Ctrl-C came a moment earlier to the other one. So a thread hears it too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    usual, left = signal.getsignal(signal.SIGINT), threading.Event()
    heard, told = socket.socketpair()

    def watch() -> None:
        while number := heard.recv(1):  # nothing once the other end is closed
            ours = number[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) == usual
            if ours and not left.wait(LEAVING):
                if is_first_to_say("interrupted", patience=0):
                    say("interrupted; run the same command again to go on")
                os._exit(INTERRUPTED)

    with heard, told:
        told.setblocking(False)
        before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            left.set()
            signal.set_wakeup_fd(before)
            told.close()
            watcher.join()


@contextmanager
def answering() -> Iterator[None]:
    """Say in one line that another process is gone, in place of what the transport says.

    Raises:
        UserError: another process ended or doesn't answer any more.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, Interrupted) or not _is_loss(error):
            raise
        fix = "its own message stands above; run the same command again to go on from what was saved"
        raise UserError("another process of this run ended or doesn't answer", fix=fix) from error


def _join(launch: Launch, device: torch.device) -> None:
    import torch

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _dist().init_process_group(backend, timeout=ANSWER, rank=launch.rank, world_size=launch.world)


def _is_loss(error: RuntimeError) -> bool:
    """Whether the error tells of a process that is gone; Gloo raises plain RuntimeErrors."""
    return isinstance(error, _dist().DistError) or any(word in str(error) for word in LOST)


def barrier() -> None:
    """Wait until every process is here."""
    if is_distributed():
        _dist().barrier()


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over all readers (float64, so token counts stay exact)."""
    return _summed(values, _READERS.group) if is_distributed() else values


def sum_over_all(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over all processes, readers of the same data too."""
    return _summed(values, None) if is_distributed() else values


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape on every process, summed over all readers in place."""
    if is_distributed():
        _dist().all_reduce(tensor, group=_READERS.group)
    return tensor


def _summed(values: dict[str, float], among: Any) -> dict[str, float]:
    import torch

    keys = sorted(values)
    total = torch.tensor([values[key] for key in keys], dtype=torch.float64)
    _dist().all_reduce(total, group=among)
    return dict(zip(keys, total.tolist(), strict=True))


def gather(value: Any) -> list[Any]:
    """The JSON value of every process, in the order of ranks."""
    if not is_distributed():
        return [value]
    import torch

    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world_size())]
    _dist().all_gather(sizes, torch.tensor([len(data)]))
    longest = max(int(size) for size in sizes)
    padded = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    _dist().all_gather(padded, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(padded, sizes, strict=True)]


def from_main(value: Any) -> Any:
    """The main process's JSON value, on every process."""
    return gather(value if is_main() else None)[0]


def is_first_to_say(what: str, patience: float = MOMENT) -> bool:
    """Whether nobody else of those that torchrun started has said this. Also outside a run, and after it.

    Args:
        patience: seconds that the main process has to say it first.
    """
    launch = launched()
    if launch is None or launch.world == 1:
        return True
    import torch.distributed

    try:
        with warnings.catch_warnings(action="ignore"):
            store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=MOMENT)))
        end = time.monotonic() + (0 if launch.rank == 0 else patience)
        while time.monotonic() < end and not store.check([what]):
            time.sleep(0.05)
        return bool(store.add(what, 1) == 1)
    except RuntimeError:  # who holds the store has gone: better twice than never
        return True


def tell(what: str, word: str) -> None:
    """Let the other processes know of an event; said once, it stays said."""
    if is_distributed():
        _dist().distributed_c10d._get_default_store().set(what, word)


def first_told(*whats: str) -> str:
    """Wait, however long it takes, until one of the events was told of; returns its name (the first one's of several)."""
    store = _dist().distributed_c10d._get_default_store()
    end = time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < end:
        for what in whats:
            if store.check([what]):
                return what
        time.sleep(0.1)
    raise UserError("the main process did not come to this", value=whats[-1], fix="run the same command again")
