"""Keys and values of beginnings that texts share: system prompts, earlier turns, one prompt sampled many times.

Beginnings are kept in blocks of `BLOCK` tokens outside the rows of the live texts. A block is known by its tokens and the
block before it, so looking one up is following a chain from the first token. Memory is bounded: where it is used up, the
blocks that were not needed for longest are given up. A row copies what it shares, so giving up a block hurts nobody.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from nestling.model.cache import KVCache

BLOCK = 16
"""Tokens of a block: a beginning is shared up to a multiple of it."""
ROOT = 0
Key = tuple[int, tuple[int, ...]]
"""(number of the block before, the block's tokens)"""


class _Block(NamedTuple):
    number: int
    """Never used again, so that the chain of a block given up leads nowhere."""
    place: int


class Prefixes:
    """Blocks of beginnings, copied out of and into the rows of one cache.

    Args:
        cache: whose rows they come from.
        tokens: how many may be kept.
    """

    def __init__(self, cache: KVCache, tokens: int) -> None:
        layers, two, _, heads, _, size = cache.stored.shape
        self.places = max(1, tokens // BLOCK)
        self._cache = cache
        shape = (layers, two, self.places, heads, BLOCK, size)
        self._stored = torch.empty(shape, device=cache.device, dtype=cache.stored.dtype)
        self._blocks: OrderedDict[Key, _Block] = OrderedDict()
        """Least recently used first; a block is always used later than those that follow it."""
        self._numbers = ROOT
        self.hits = 0
        """Tokens that did not have to be computed."""

    def __len__(self) -> int:
        return len(self._blocks)

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._blocks.clear()

    def known(self, tokens: Sequence[int]) -> int:
        """How many tokens of the beginning of `tokens` are kept."""
        return BLOCK * len(self._chain(tokens))

    def load(self, tokens: Sequence[int], slot: int) -> int:
        """Copy what is kept of the beginning of `tokens` into a row of the cache; returns how many tokens that is."""
        chain = self._chain(tokens)
        if not chain:
            return 0
        places = torch.tensor([self._blocks[key].place for key in chain], device=self._cache.device)
        self._touch(chain)
        found = self._stored[:, :, places].transpose(2, 3).flatten(3, 4)  # [L, 2, H_kv, n · BLOCK, K]
        self._cache.stored[:, :, slot, :, : found.shape[3]] = found
        self.hits += found.shape[3]
        return found.shape[3]

    def store(self, tokens: Sequence[int], slot: int) -> None:
        """Keep the whole blocks of `tokens`, the first tokens of what a row of the cache holds."""
        chain = self._chain(tokens)
        self._touch(chain)  # none of these may make room for those that follow it
        held, fresh = len(chain), []
        number = self._blocks[chain[-1]].number if chain else ROOT
        for block in list(_blocks(tokens))[held : self.places]:
            fresh.append(self._free_place())
            self._numbers += 1
            chain.append((number, block))
            self._blocks[chain[-1]] = _Block(self._numbers, fresh[-1])
            number = self._numbers
        self._touch(chain)
        if fresh:
            span = slice(held * BLOCK, (held + len(fresh)) * BLOCK)
            rows = self._cache.stored[:, :, slot, :, span].unflatten(3, (len(fresh), BLOCK))
            for place, block in zip(fresh, rows.unbind(3), strict=True):  # one call for all takes three times as long
                self._stored[:, :, place] = block

    def _chain(self, tokens: Sequence[int]) -> list[Key]:
        """Keys of the blocks that are kept of the beginning of `tokens`."""
        chain: list[Key] = []
        number = ROOT
        for block in _blocks(tokens):
            found = self._blocks.get((number, block))
            if found is None:
                break
            chain.append((number, block))
            number = found.number
        return chain

    def _touch(self, chain: list[Key]) -> None:
        for key in reversed(chain):
            self._blocks.move_to_end(key)

    def _free_place(self) -> int:
        """A place for one more block, taken from the one used least recently where all are taken."""
        if len(self._blocks) < self.places:
            return len(self._blocks)
        return self._blocks.popitem(last=False)[1].place


def _blocks(tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The whole blocks of a text."""
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        yield tuple(tokens[start : start + BLOCK])
