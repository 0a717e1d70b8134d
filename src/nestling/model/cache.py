"""Keys and values of past tokens, so that a new token costs one position instead of the whole text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.core.errors import UserError
from nestling.model.config import DecoderConfig


@dataclass(frozen=True)
class CacheStep:
    """One call's place in the cache: which rows get how many tokens, and where.

    Example: rows of length 3 and 5 get 2 and 1 new tokens, padded to T = 2: positions [[3, 4], [5, 6]],
    slots [[3, 4], [5, bin]], span 6.
    """

    cache: KVCache
    rows: Tensor
    """[B] cache rows, long."""
    rows_on_host: Tensor
    """The same there, where lengths are counted: no GPU is waited for."""
    row_slice: slice | None
    """The same rows where they are consecutive: reading is then a view instead of a copy."""
    counts: Tensor
    """[B] valid new tokens, on the host."""
    positions: Tensor
    """[B, T] place of each new token in its row's text."""
    slots: Tensor
    """[B, T] where each is stored; padding goes to the bin behind the last slot."""
    span: int
    """S: how many slots are read, the longest row after this call."""

    def layer(self, index: int) -> LayerMemory:
        """The part of one layer."""
        return LayerMemory(self, self.cache.keys[index], self.cache.values[index])

    def commit(self) -> None:
        """Count the new tokens as present; called when all layers have stored theirs."""
        self.cache.lengths[self.rows_on_host] += self.counts


@dataclass(frozen=True)
class LayerMemory:
    """One layer's keys and values during one call."""

    step: CacheStep
    keys: Tensor
    values: Tensor

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new k and v, each [B, T, H_kv, K]; return all of the rows' keys and values, [B, H_kv, S, K]."""
        step = self.step
        place = (step.rows.unsqueeze(1), slice(None), step.slots)
        self.keys[place] = k.detach().to(self.keys.dtype)
        self.values[place] = v.detach().to(self.values.dtype)
        return self._read(self.keys), self._read(self.values)

    def _read(self, stored: Tensor) -> Tensor:
        seen = stored[:, :, : self.step.span]
        if self.step.row_slice is not None:
            return seen[self.step.row_slice]
        return seen.index_select(0, self.step.rows)


class KVCache:
    """`rows` independent texts of up to `capacity` tokens each. `lengths` [rows] (on the host) says how long each is.

    No gradient flows through what is stored. Rows are slots: a finished text's row is `reset` and given to the next;
    beams `copy` rows.
    """

    def __init__(
        self,
        config: DecoderConfig,
        rows: int,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate; `capacity` is the model's context when not given.

        Raises:
            UserError: a capacity beyond the model's context.
        """
        capacity = config.context if capacity is None else capacity
        if not 0 < capacity <= config.context:
            raise UserError(
                "the cache can't be longer than the model's context",
                where="capacity",
                value=capacity,
                fix=f"use 1 to {config.context}",
            )
        shape = (config.n_layers, 2, rows, config.kv_heads, capacity + 1, config.head)  # + 1: the bin for padding
        self.stored = torch.zeros(shape, device=device, dtype=dtype)
        """[L, 2, rows, H_kv, capacity + 1, K]: keys and values of all layers in one piece, so that a copy is one call."""
        self.keys = [layer[0] for layer in self.stored]
        self.values = [layer[1] for layer in self.stored]
        self.rows, self.capacity = rows, capacity
        self.device = torch.device(device)
        self.lengths = torch.zeros(rows, dtype=torch.long)

    def begin(self, width: int, rows: Tensor | slice | None = None, counts: Tensor | None = None) -> CacheStep:
        """Plan a call that brings `width` tokens (padding included) to each of `rows`.

        Args:
            rows: [B] cache rows, or consecutive ones as a slice; all of them when not given.
            counts: [B] how many of the `width` tokens are valid, from the left; all when not given.

        Raises:
            UserError: a row would grow beyond the capacity.
        """
        row_slice = _as_slice(rows, self.rows)
        if not isinstance(rows, Tensor):
            rows = torch.arange(self.rows)[row_slice]
        rows = rows.cpu()
        counts = torch.full_like(rows, width) if counts is None else counts.cpu()
        lengths = self.lengths[rows]
        grown = lengths + counts
        span = int(grown.max())
        if span > self.capacity:
            worst = int(grown.argmax())
            raise UserError(
                f"a text of {int(lengths[worst])} tokens can't grow by {int(counts[worst])}: "
                f"the cache holds {self.capacity}",
                fix="use a shorter prompt, fewer new tokens, or a model with a longer context",
            )
        positions = lengths.unsqueeze(1) + torch.arange(width)
        slots = positions
        if width > 1:
            slots = positions.where(positions < grown.unsqueeze(1), self.capacity)
            positions = positions.clamp_max(self.capacity - 1)
        to = self.device
        return CacheStep(self, rows.to(to), rows, row_slice, counts, positions.to(to), slots.to(to), span)

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget the texts of `rows` [n] (all when not given)."""
        if rows is None:
            self.lengths.zero_()
        else:
            self.lengths[rows.cpu()] = 0

    def truncate(self, rows: Tensor, lengths: Tensor) -> None:
        """Keep the first `lengths` [n] tokens of `rows` [n]; for tokens that were tried and rejected."""
        rows = rows.cpu()
        self.lengths[rows] = torch.minimum(self.lengths[rows], lengths.cpu())

    def copy(self, parents: Tensor, rows: Tensor) -> None:
        """Make row rows[i] a copy of row parents[i], for all i at once: [0, 0] -> [0, 1] splits a beam in two."""
        span = int(self.lengths[parents.cpu()].max())
        source, target = parents.to(self.device), rows.to(self.device)
        self.stored[:, :, target, :, :span] = self.stored[:, :, source, :, :span]
        self.lengths[rows.cpu()] = self.lengths[parents.cpu()]


def _as_slice(rows: Tensor | slice | None, total: int) -> slice | None:
    """Consecutive rows as a slice."""
    if rows is None:
        return slice(0, total)
    if isinstance(rows, slice):
        return rows
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and bool((rows[1:] > rows[:-1]).all()):
        return slice(first, last + 1)
    return None
