"""Cache rows of the live requests, kept together at the front so that a decode step reads the cache in place.

Nothing here knows of sampling. Position bookkeeping is on the host: `Row.cached` tokens of a row are in the cache. A row
with one token more than that is ready to decode; one with more is filled first, a bounded number of tokens per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nestling.generation.prefixes import BLOCK, Prefixes
from nestling.generation.sequence import Row, Running
from nestling.model.cache import KVCache
from nestling.model.decoder import Decoder

PREFILL_TOKENS = 4096
"""Padded tokens per model call: bounds the memory of a call. Prompt tokens of a step in which nobody decodes."""


@dataclass(frozen=True)
class Limits:
    """What an engine may spend.

    >>> Limits(prefill=256).prefill
    256
    """

    prefill: int = 512
    """Prompt tokens computed in a step while others decode: how long they may be made to wait."""
    prefixes: int | None = None
    """Tokens of shared beginnings kept beside the rows; 0: none, None: as many as four rows hold."""


class _Chunk(NamedTuple):
    """Tokens to be appended to a row."""

    running: Running
    row: Row
    tokens: list[int]


class Slots:
    """The table of live rows: `table[i]` is the (request, row) in cache row i.

    Args:
        model: its weights are read at each call.
        rows: how many rows fit.
        capacity: tokens that a row can hold.
        dtype: of keys and values; the weights' when not given.
        limits: what a step and the memory for shared beginnings may cost.
    """

    def __init__(
        self, model: Decoder, rows: int, capacity: int, dtype: torch.dtype | None = None, limits: Limits = Limits()
    ) -> None:
        self.model, self.rows, self.capacity, self.dtype, self.limits = model, rows, capacity, dtype, limits
        self.table: list[tuple[Running, Row]] = []
        self.filling: set[Running] = set()
        """Requests with a row that is not ready: they take no part in this step's decisions."""
        self._cache: KVCache | None = None
        self._prefixes: Prefixes | None = None

    @property
    def free(self) -> int:
        """Rows not in use."""
        return self.rows - len(self.table)

    @property
    def cache(self) -> KVCache:
        """Allocated when first needed, on the model's device; shared beginnings live beside it."""
        if self._cache is None:
            weight = self.model.output_weight
            dtype = self.dtype or weight.dtype
            self._cache = KVCache(self.model.config, self.rows, self.capacity, weight.device, dtype)
            kept = 4 * self.capacity if self.limits.prefixes is None else self.limits.prefixes
            self._prefixes = Prefixes(self._cache, kept) if kept else None
        return self._cache

    @property
    def prefixes(self) -> Prefixes | None:
        """What is kept of beginnings that texts share."""
        return self._prefixes if self.cache else None

    def forget(self) -> None:
        """The weights may be others, of another dtype, on another device: nothing computed before now is reused."""
        weight, cache = self.model.output_weight, self._cache
        if cache is not None and (cache.stored.dtype, cache.device) != (self.dtype or weight.dtype, weight.device):
            self._cache = None
        elif self._prefixes is not None:
            self._prefixes.clear()

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

    def keep(self, running: Running) -> None:
        """Keep the whole text of a request that is done: it may be the beginning of the next turn."""
        if self.prefixes is not None and running.width == 1:
            row = running.rows[0]
            self.prefixes.store([*running.prompt, *row.ids][: row.cached], row.slot)

    def follow(self, moves: Sequence[tuple[int, Running, Row]]) -> None:
        """For each (parent, running, row), all at once: the row takes over its slot, with what slot `parent` holds."""
        moved = [(parent, row.slot) for parent, _, row in moves if parent != row.slot]
        if moved:
            self._copy([parent for parent, _ in moved], [slot for _, slot in moved])
        for _, running, row in moves:
            self.table[row.slot] = (running, row)

    # ---- prompts and forced tokens ----

    def fill(self) -> None:
        """Bring rows nearer to one pending token, within the limits of a step, those in the first slots first.

        What the cache knows is copied: the prompt of a live row, and beginnings that were kept. Where two rows need the
        same tokens now, one computes them and the other copies them in the next round. `filling` says who is not ready.
        """
        unfilled = self._unfilled()
        if unfilled:
            budget = self.limits.prefill if len(unfilled) < len(self.table) else PREFILL_TOKENS
            while budget > 0 and (work := self._plan(unfilled, budget)):
                for batch in _batches(work):
                    self._prefill(batch)
                budget -= sum(len(chunk.tokens) for chunk in work)
            unfilled = self._unfilled()
        self.filling = {running for running, _ in unfilled}

    def _unfilled(self) -> list[tuple[Running, Row]]:
        return [(running, row) for running, row in self.table if running.length(row) - row.cached > 1]

    def _plan(self, unfilled: list[tuple[Running, Row]], budget: int) -> list[_Chunk]:
        """What to compute in one round, at most `budget` tokens, after copying what can be copied."""
        self._copy_twins(unfilled)
        work: list[_Chunk] = []
        begun: set[tuple[int, ...]] = set()
        for running, row in unfilled:
            if running.reads_prompt and not row.ids and row is not running.rows[0]:
                continue  # its twin's outputs are the ones that are read
            self._load(running, row)
            tokens = running.pending(row)[: min(budget, running.length(row) - row.cached - 1)]
            mark = self._mark(running, row)
            if tokens and mark not in begun:
                begun.add(mark)
                work.append(_Chunk(running, row, tokens))
                budget -= len(tokens)
        return work

    def _copy_twins(self, unfilled: list[tuple[Running, Row]]) -> None:
        """Rows whose whole prompt is in another live row take it from there."""
        filled = {_text(running): row for running, row in self.table if row.cached >= len(running.prompt) - 1}
        wanting = [(running, row) for running, row in unfilled if row.cached < len(running.prompt) - 1]
        pairs = [(filled[text], running, row) for running, row in wanting if (text := _text(running)) in filled]
        if pairs:
            self._copy([source.slot for source, _, _ in pairs], [row.slot for _, _, row in pairs])
        for _, running, row in pairs:
            _reuse(running, row, len(running.prompt) - 1)

    def _load(self, running: Running, row: Row) -> None:
        """Take the beginning of a prompt from what was kept, where that is more than the row has."""
        missing = len(running.prompt) - 1 - row.cached
        prompt = running.prompt[:-1]
        if missing < BLOCK or running.reads_prompt or self.prefixes is None:
            return
        if self.prefixes.known(prompt) > row.cached:
            _reuse(running, row, self.prefixes.load(prompt, row.slot))

    def _mark(self, running: Running, row: Row) -> tuple[int, ...]:
        """Equal for rows that would compute the same tokens now."""
        if row.cached >= len(running.prompt):
            return (-1 - row.slot,)  # forced tokens, which nobody shares
        text = _text(running)
        shared = self.prefixes is not None and not running.reads_prompt
        return text[: 1 + row.cached + BLOCK] if shared else text

    def _prefill(self, work: list[_Chunk]) -> None:
        """Append tokens to rows."""
        rows = torch.tensor([chunk.row.slot for chunk in work])
        hidden = self._append([chunk.tokens for chunk in work], rows)
        for i, (running, row, tokens) in enumerate(work):
            in_prompt = row.cached < len(running.prompt)
            row.cached += len(tokens)
            if in_prompt and running.reads_prompt:
                running.outputs.append(hidden[i, : len(tokens)])
            elif in_prompt and self.prefixes is not None:
                self.prefixes.store(running.prompt[: row.cached], row.slot)

    # ---- one token ----

    def decode(self, proposals: Mapping[int, list[int]] = {}) -> Tensor:
        """The last token of each row in the table, and what is proposed behind it, through the model: hidden [N, T, D].

        Args:
            proposals: tokens of a row, by its slot, that may come next; only the outputs at their places count them as
                present, until the row's `cached` is raised.

        A row that has ended but stays in its request's view is decoded again in place. Outputs of rows that are not
        ready, and at padding, are meaningless; the place that they write to is written again.
        """
        ready: list[Row] = []
        texts: list[list[int]] = []
        for running, row in self.table:
            last = running.length(row) - 1
            if row.cached >= last:
                row.cached = last
                ready.append(row)
                texts.append([row.ids[-1] if row.ids else running.prompt[-1]])
            else:
                texts.append([0])
        for slot, proposed in proposals.items():
            texts[slot] += proposed
        hidden = self._append(texts, slice(0, len(texts)))
        for row in ready:
            row.cached += 1
        return hidden

    def _append(self, texts: list[list[int]], rows: Tensor | slice) -> Tensor:
        """These tokens through the model, one list for each of these rows, right-padded to the longest."""
        cache, width, counts = self._set_lengths(), max(map(len, texts)), None
        if width > 1:
            counts = torch.tensor([len(text) for text in texts])
            texts = [text + [0] * (width - len(text)) for text in texts]
        ids = torch.from_numpy(np.array(texts)).to(cache.device)
        return self.model.hidden(ids, cache=cache, rows=rows, counts=counts)

    def _copy(self, parents: list[int], rows: list[int]) -> None:
        self._set_lengths().copy(torch.tensor(parents), torch.tensor(rows))

    def _set_lengths(self) -> KVCache:
        """The cache, told how much of each row is valid; what the host knows is what counts."""
        cache = self.cache
        cache.lengths.numpy()[: len(self.table)] = [row.cached for _, row in self.table]
        return cache


def _reuse(running: Running, row: Row, length: int) -> None:
    """So many tokens of the prompt are in the row now, by copying; for the request those of its first row count."""
    if row is running.rows[0]:
        running.reused += length - row.cached
    row.cached = length


def _text(running: Running) -> tuple[int, ...]:
    """The prompt without its last token, and before it whose it is: everybody's, or only that request's own.

    A strategy that reads the outputs at the prompt must have them computed for its request, once.
    """
    return (id(running) if running.reads_prompt else 0, *running.prompt[:-1])


def _batches(work: list[_Chunk]) -> list[list[_Chunk]]:
    """Cut a list of token runs, shortest first, where padding to the longest would pass `PREFILL_TOKENS`."""
    batches: list[list[_Chunk]] = []
    for chunk in sorted(work, key=lambda chunk: len(chunk.tokens)):
        if batches and (len(batches[-1]) + 1) * len(chunk.tokens) <= PREFILL_TOKENS:
            batches[-1].append(chunk)
        else:
            batches.append([chunk])
    return batches
