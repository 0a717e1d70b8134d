"""What a training step reads. Letters: B rows, T slots per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

_MULTIPLE = 32  # rows are padded to a multiple of this many slots: few shapes, little waste


@dataclass(frozen=True)
class TokenBatch:
    """Packed rows of tokens. Slot t of a row reads `ids[t]` and learns `targets[t]`, which follows it.

    One row that holds "a b" and "c" as two documents, T = 4, end-of-text e:
    ids [e a b e], targets [a b e c], positions [0 1 2 0], segments [0 0 0 1], weights [1 1 1 1].
    """

    ids: Tensor
    """[B, T] long."""
    targets: Tensor
    """[B, T] long."""
    weights: Tensor
    """[B, T] float32; 0 where nothing is learnt (padding, what others wrote)."""
    positions: Tensor
    """[B, T] long; restart at 0 with every document."""
    segments: Tensor
    """[B, T] long; slots see each other only within one segment. Padding is a segment of its own."""

    def to(self, device: torch.device | str) -> Self:
        """The batch on another device; the way to a GPU leads through pinned memory, so that nobody waits for it."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        if torch.device(device).type == "cuda" and self.ids.device.type == "cpu":
            parts = {name: part.contiguous().pin_memory() for name, part in parts.items()}
        return replace(self, **{name: part.to(device, non_blocking=True) for name, part in parts.items()})

    def rows(self, start: int, stop: int) -> Self:
        """Rows [start, stop) as a batch: a microbatch, or one rank's share."""
        return replace(self, **{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counts(self) -> dict[str, float]:
        """Units in this batch: `tokens` that are learnt (sum of weights) and `sequences` (rows)."""
        return {"tokens": float(self.weights.sum()), "sequences": float(len(self.ids))}

    def byte_count(self, byte_lengths: Tensor) -> int:
        """Bytes of the text that the weighted targets stand for: the denominator of bits per byte.

        Args:
            byte_lengths: [V] bytes of each id, 0 for control tokens.
        """
        return int(byte_lengths.to(self.targets.device)[self.targets][self.weights > 0].sum())


class Batches(Protocol):
    """Where training batches come from: a pure function of the step."""

    def batch(self, step: int) -> TokenBatch:
        """The batch of a step, from 0."""


class BatchArrays:
    """A TokenBatch under construction, as numpy arrays that start out as padding."""

    def __init__(self, rows: int, context: int, pad: int) -> None:
        self.ids = np.full((rows, context), pad, dtype=np.int64)
        self.targets = np.full((rows, context), pad, dtype=np.int64)
        self.weights = np.zeros((rows, context), dtype=np.float32)
        self.positions = np.tile(np.arange(context), (rows, 1))
        self.segments = np.zeros((rows, context), dtype=np.int64)

    def tensors(self) -> TokenBatch:
        """The finished batch."""
        parts = (self.ids, self.targets, self.weights, self.positions, self.segments)
        return TokenBatch(*map(torch.from_numpy, parts))


def padded(rows: Sequence[Sequence[int]], filler: int, context: int) -> tuple[Tensor, Tensor]:
    """Rows of ids, right-padded with `filler` to at most `context` slots, [N, T] long, and their lengths, [N] long."""
    lengths = [len(row) for row in rows]
    width = min(context, math.ceil(max(lengths) / _MULTIPLE) * _MULTIPLE)
    ids = torch.full((len(rows), width), filler)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    return ids, torch.tensor(lengths)
