"""Several processes on one machine, as torchrun would start them, and a small decoder for them to train."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from nestling.core import ranks
from nestling.core.runtime import detect, torch_stream
from nestling.loading.batches import TokenBatch
from nestling.model.config import DecoderConfig
from nestling.model.decoder import build
from nestling.objectives.next_token import NextToken, Settings
from nestling.training.hooks import Hook
from nestling.training.loop import TrainResult, train
from nestling.training.settings import TrainSettings

ROWS, CONTEXT, WORDS = 8, 16, 24
LAYOUTS_OF_TWO: dict[str, dict[str, Any]] = {"data": {}, "full": {"shard": "full"}, "tensor": {"tensor": 2}}


def together(world: int, work: Callable[..., Any], *given: Any, method: str = "") -> None:
    """Run `work(*given)` in `world` processes joined into a group; an error in one of them is raised here.

    `method` "spawn" takes seconds more, but gives each process a hash seed of its own, as torchrun does. A fork can't
    train where the backward pass of its parent got threads for GPUs, as it does in torch's builds for them.
    """
    threads = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    method = method or ("spawn" if any(name.startswith("pt_autograd") for name in threads) else "fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(_one, (world, port, work, given), nprocs=world, start_method=method)


def _one(rank: int, world: int, port: int, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
    with ranks.group(torch.device("cpu")):
        work(*given)


class Rows:
    """Rows of random ids; every row learns another number of tokens, so that a mean of means would be wrong."""

    def batch(self, step: int) -> TokenBatch:
        stream = torch_stream(5, "rows", step)
        ids = torch.randint(WORDS, (ROWS, CONTEXT + 1), generator=stream)
        ids[:, 1::2] = ids[:, :-1:2]  # something to learn: every other token repeats the one before
        place = torch.arange(CONTEXT).expand(ROWS, -1)
        weights = (place < torch.randint(2, CONTEXT + 1, (ROWS, 1), generator=stream)).float()
        return TokenBatch(ids[:, :-1], ids[:, 1:], weights, place, torch.zeros_like(place))

    def validation(self) -> list[TokenBatch]:
        return [self.batch(1000 + number) for number in range(2)]


def objective(microbatches: int = 1, seed: int = 1, **model: Any) -> NextToken:
    """Next-token prediction on `Rows`; sizes are such that pieces are uneven."""
    sizes = {"d_model": 20, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 36, "head_size": 6, "qk_norm": True}
    config = DecoderConfig(vocab_size=WORDS, context=CONTEXT, **{**sizes, **model})
    decoder = build(config, torch_stream(seed, "several"))
    stream = torch_stream(seed, "noise")
    with torch.no_grad():
        for parameter in decoder.parameters():  # away from zeros and ones, so that every gradient counts
            parameter.add_(torch.randn(parameter.shape, generator=stream), alpha=0.05)
    rows = Rows()
    return NextToken(Settings(microbatches=microbatches), decoder, rows, torch.ones(WORDS).long(), rows.validation)


def learn(folder: Path, hooks: tuple[Hook, ...] = (), dtype: str = "fp32", model: dict[str, Any] | None = None,
          microbatches: int = 1, what: NextToken | None = None, **changes: Any) -> tuple[TrainResult, NextToken]:  # fmt: skip
    """Train in `folder`; writes the final weights and rows beside, on the main process."""
    what = what or objective(microbatches, **(model or {}))
    plain = {"steps": 6, "learning_rate": 0.02, "log_every": 1, "save_every": 1e9, "compile": "off", "validate_every": 3}
    settings = TrainSettings(**{**plain, **changes})
    result = train(what, settings, folder=folder, runtime=detect("cpu", dtype), seed=3, hooks=hooks, quiet=True)
    if ranks.is_main():
        torch.save({k: v.detach().clone() for k, v in what.model.state_dict().items()}, folder / "weights.pt")
    return result, what


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without timing."""
    timing = ("seconds", "eta", "tokens_per_second", "utilisation")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The final weights that `learn` left."""
    return torch.load(folder / "weights.pt", weights_only=True)


def assert_same(folder: Path, reference: Path, tolerance: float = 1e-5) -> None:
    """Both runs have the same rows and final weights."""
    for ours, theirs in zip(rows_of(folder), rows_of(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    wanted = weights_of(reference)
    for name, tensor in weights_of(folder).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=tolerance, atol=tolerance)
