"""Cache rows of the live requests, kept together at the front so that a decode step reads the cache in place.

Nothing here knows of sampling. Position bookkeeping is on the host: `Row.cached` tokens of a row are in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.generation.sequence import Row, Running
from nestling.model.cache import KVCache
from nestling.model.decoder import Decoder

PREFILL_TOKENS = 4096
"""Padded prompt tokens per model call: bounds the memory of a call and the pause of those who are decoding."""


class Slots:
    """The table of live rows: `table[i]` is the (request, row) in cache row i.

    Args:
        model: the live module; its weights are read at each call.
        rows: how many rows fit.
        capacity: tokens that a row can hold.
        dtype: of keys and values; the weights' when not given.
    """

    def __init__(self, model: Decoder, rows: int, capacity: int, dtype: torch.dtype | None = None) -> None:
        self.model, self.rows, self.capacity, self.dtype = model, rows, capacity, dtype
        self.table: list[tuple[Running, Row]] = []
        self._cache: KVCache | None = None

    @property
    def free(self) -> int:
        """Rows not in use."""
        return self.rows - len(self.table)

    @property
    def cache(self) -> KVCache:
        """Allocated when first needed, on the model's device."""
        weight = self.model.output_weight
        dtype = self.dtype or weight.dtype
        if self._cache is None or self._cache.keys[0].dtype != dtype or self._cache.device != weight.device:
            self._cache = KVCache(self.model.config, self.rows, self.capacity, weight.device, dtype)
        return self._cache

    def take(self, running: Running, row: Row) -> None:
        """Put a new row behind the live ones."""
        row.slot = len(self.table)
        self.table.append((running, row))

    def release(self, done: set[int]) -> None:
        """Free these slots; rows from the end of the table move into the holes."""
        kept = len(self.table) - len(done)
        holes = sorted(slot for slot in done if slot < kept)
        movers = [slot for slot in range(kept, len(self.table)) if slot not in done]
        if holes:
            self._copy(movers, holes)
        for hole, mover in zip(holes, movers, strict=True):
            self.table[hole] = self.table[mover]
            self.table[hole][1].slot = hole
        del self.table[kept:]

    def follow(self, moves: Sequence[tuple[int, Running, Row]]) -> None:
        """For each (parent, running, row), all at once: the row takes over its slot, with what slot `parent` holds."""
        moved = [(parent, row.slot) for parent, _, row in moves if parent != row.slot]
        if moved:
            self._copy([parent for parent, _ in moved], [slot for _, slot in moved])
        for _, running, row in moves:
            self.table[row.slot] = (running, row)

    def fill(self) -> list[tuple[Running, Tensor]]:
        """Bring every row to the point where one token is pending: prompts, and what was forced on a row.

        Equal prompts are computed once and copied. Returns for each request that is new the model's outputs [T, D] at
        its prompt, the last token excluded.
        """
        work: dict[tuple[int, ...], list[tuple[Running, Row]]] = {}
        for running, row in self.table:
            if running.length(row) - row.cached > 1:
                tokens = tuple(running.pending(row)[:-1])
                work.setdefault(tokens if row.cached == 0 else (-1 - row.slot, *tokens), []).append((running, row))
        fresh: list[tuple[Running, Tensor]] = []
        for keys in _batches(sorted(work, key=len)):
            hidden = self._prefill([(list(key if key[0] >= 0 else key[1:]), work[key][0][1]) for key in keys])
            for key, outputs in zip(keys, hidden, strict=True):
                fresh += self._share(key, work[key], outputs)
        return fresh

    def decode(self) -> Tensor:
        """The last token of each row in the table through the model: hidden [N, D].

        A row that has ended but stays in its request's view is decoded again in place.
        """
        for running, row in self.table:
            row.cached = min(row.cached, running.length(row) - 1)
        self._set_lengths()
        ids = torch.tensor([[row.ids[-1] if row.ids else running.prompt[-1]] for running, row in self.table])
        rows = torch.arange(len(self.table))
        hidden = self.model.hidden(ids.to(self.cache.device), cache=self.cache, rows=rows)[:, 0]
        for _, row in self.table:
            row.cached += 1
        return hidden

    def _prefill(self, work: list[tuple[list[int], Row]]) -> list[Tensor]:
        """Append tokens to rows, right-padded to the longest; outputs [T_i, D] of each."""
        self._set_lengths()
        counts = [len(tokens) for tokens, _ in work]
        ids = torch.zeros(len(work), max(counts), dtype=torch.long)
        for i, (tokens, _) in enumerate(work):
            ids[i, : counts[i]] = torch.tensor(tokens)
        rows = torch.tensor([row.slot for _, row in work])
        device = self.cache.device
        hidden = self.model.hidden(ids.to(device), cache=self.cache, rows=rows, counts=torch.tensor(counts))
        for tokens, row in work:
            row.cached += len(tokens)
        return [hidden[i, :count] for i, count in enumerate(counts)]

    def _share(
        self, key: tuple[int, ...], owners: list[tuple[Running, Row]], hidden: Tensor
    ) -> list[tuple[Running, Tensor]]:
        """Copy the first owner's cache row to the others that wait for the same tokens."""
        first, others = owners[0][1], [row for _, row in owners[1:]]
        if others:
            self._copy([first.slot] * len(others), [row.slot for row in others])
        for row in others:
            row.cached = first.cached
        if key[0] < 0:  # forced tokens, not a prompt
            return []
        return [(running, hidden) for running, row in owners if row is running.rows[0]]

    def _copy(self, parents: list[int], rows: list[int]) -> None:
        self._set_lengths()
        self.cache.copy(torch.tensor(parents), torch.tensor(rows))

    def _set_lengths(self) -> None:
        """Tell the cache how much of each row is valid; what the host knows is what counts."""
        self.cache.lengths[: len(self.table)] = torch.tensor([row.cached for _, row in self.table])


def _batches(keys: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Cut a list of token runs, shortest first, where padding to the longest would pass `PREFILL_TOKENS`."""
    batches: list[list[tuple[int, ...]]] = []
    for key in keys:
        if batches and (len(batches[-1]) + 1) * len(key) <= PREFILL_TOKENS:
            batches[-1].append(key)
        else:
            batches.append([key])
    return batches
