"""The same text for everyone: consecutive rows of token ids out of shards, and the loss on held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nestling.loading.shards import Shards

CONTEXT = 256
ROWS = 32
HELD_OUT = 256


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
