"""Is anything read more often than it should be? Copies in a text, held-out text in it, rows that come again too soon."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from nestling.loading.batches import Batches, TokenBatch
from nestling.loading.shards import Shards

SHORT = 32  # tokens below which two documents may well say the same
LOOKED_AT = 200_000  # documents of each split
REMEMBERED = 200_000  # rows


def copies(train: Shards, held_out: Shards) -> dict[str, float]:
    """`copied_share`: documents of the training text that stood there before, word for word; `leaked_share`: held-out ones
    that stand in the training text. Of the first `LOOKED_AT` documents that are not short."""
    known = Counter(_documents(train))
    leaked = [document in known for document in _documents(held_out)]
    copied = 1 - len(known) / known.total() if known else 0.0
    return {"copied_share": round(copied, 5), "leaked_share": round(sum(leaked) / max(1, len(leaked)), 5)}


def _documents(shards: Shards) -> Iterator[int]:
    """A fingerprint of each document."""
    bounds = zip(shards.offsets[:-1].tolist(), shards.offsets[1:].tolist(), strict=True)
    long = ((start, stop) for start, stop in bounds if stop - start >= SHORT)
    return (hash(shards[start:stop].tobytes()) for start, stop in islice(long, LOOKED_AT))


class Counted:
    """A loader whose rows are counted as they pass, by their content."""

    def __init__(self, batches: Batches) -> None:
        self._batches, self._seen = batches, Counter[int]()

    def batch(self, step: int) -> TokenBatch:
        """The loader's batch."""
        found = self._batches.batch(step)
        for row in found.ids.numpy():
            content = hash(row.tobytes())
            if content in self._seen or len(self._seen) < REMEMBERED:
                self._seen[content] += 1
        return found

    def repeated_share(self, epochs: float) -> float:
        """The share of the rows so far that came more often than so many passes over the data explain."""
        extra = sum(max(0, count - math.ceil(epochs)) for count in self._seen.values())
        return round(extra / max(1, self._seen.total()), 5)
