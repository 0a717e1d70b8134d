"""What all contenders share: the same text in the same rows, the clock, and the loss on held-out rows.

A contender is `python PEER.py TOKENS SECONDS PRECISION FROM [RATE]`: it trains for so many seconds, counted `from` its
process' start ("start": imports and compiling count) or from its fifth step ("warm"), and prints one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nestling.loading.shards import Shards

CONTEXT = 256
ROWS = 32
HELD_OUT = 256
WARM = 5  # steps: compiling and first allocations are over


class Clock:
    """Says how far a run is, and remembers when its steps ended."""

    def __init__(self, started: float, seconds: float, origin: str) -> None:
        self.started, self.seconds, self.origin = started, seconds, origin
        self.marks: list[float] = []

    def mark(self) -> None:
        """A step has ended."""
        self.marks.append(time.time())

    def share(self) -> float:
        """Of the time that is over, 0 to 1."""
        if self.origin == "start":
            return min(1.0, (time.time() - self.started) / self.seconds)
        return min(1.0, (time.time() - self.marks[WARM - 1]) / self.seconds) if len(self.marks) >= WARM else 0.0

    def rate(self, step: int) -> float:
        """Share of the peak learning rate in a step, from 0: 50 steps up, a cosine over the time down to a tenth."""
        return min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * self.share())))

    def figures(self) -> dict[str, float]:
        """Speed, steps and peak memory in GB."""
        lengths = [later - earlier for earlier, later in itertools.pairwise(self.marks[WARM - 1 :])]
        return {
            "tokens_per_second": round(ROWS * CONTEXT / median(lengths)) if lengths else 0,
            "steps": len(self.marks),
            "seconds": round(self.marks[-1] - self.started, 1),
            "memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }


def arguments(rate: float) -> argparse.Namespace:
    """A contender's command line; `rate` is the learning rate that is taken when none is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tokens", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("precision", choices=["fp32", "bf16"])
    parser.add_argument("origin", choices=["start", "warm"])
    parser.add_argument("rate", type=float, nargs="?", default=rate)
    return parser.parse_args()


def report(clock: Clock, model: nn.Module, logits: Callable[[Tensor], Tensor], held_out: np.ndarray) -> None:
    """Print the run's line."""
    figures = clock.figures()
    model.eval()
    loss = {"val_loss": round(held_out_loss(logits, held_out), 4)}
    print(json.dumps(figures | loss | {"parameters": sum(p.numel() for p in model.parameters())}))


def stream(tokens: Path, split: str) -> np.ndarray:
    """All ids of a split, one after another, end-of-text tokens between documents included."""
    shards = Shards.open(tokens / split)
    return np.asarray(shards[0 : len(shards)], dtype=np.int64)


def batch(ids: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, [ROWS, CONTEXT] each, at random places that depend on the step only."""
    places = np.random.default_rng(step).integers(0, len(ids) - CONTEXT - 1, ROWS)
    rows = torch.from_numpy(np.stack([ids[place : place + CONTEXT + 1] for place in places]))
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def held_out_loss(logits: Callable[[Tensor], Tensor], ids: np.ndarray) -> float:
    """Mean cross-entropy in nats per token over the first `HELD_OUT` rows."""
    total = 0.0
    for first in range(0, HELD_OUT, ROWS):
        places = (first + np.arange(ROWS)) * CONTEXT
        rows = torch.from_numpy(np.stack([ids[place : place + CONTEXT + 1] for place in places]))
        scores = logits(rows[:, :-1]).float()
        total += functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total / (HELD_OUT * CONTEXT)
