"""Which rows a step reads: every row once per epoch, in an order drawn anew for each epoch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from nestling.core.runtime import stream_seed


def epoch_generator(seed: int, name: str, epoch: int) -> np.random.Generator:
    """The random stream of one epoch of the order called `name`."""
    return np.random.Generator(np.random.PCG64(stream_seed(seed, "order", name, epoch)))


class EpochOrder:
    """An endless sequence of row numbers: epoch 0's permutation, epoch 1's, and so on.

    >>> order = EpochOrder(3, seed=0, name="text")
    >>> sorted(order.take(0, 3)[1].tolist())
    [0, 1, 2]
    """

    def __init__(self, count: int, seed: int, name: str) -> None:
        self.count, self.seed, self.name = count, seed, name
        self._permutation = lru_cache(maxsize=2)(self._draw)  # a batch touches two epochs at most, mostly one

    def _draw(self, epoch: int) -> np.ndarray:
        return epoch_generator(self.seed, self.name, epoch).permutation(self.count)

    def take(self, start: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Entries [start, start + number) of the sequence: (epoch [number], row [number])."""
        places = np.arange(start, start + number)
        epochs, within = places // self.count, places % self.count
        rows = np.empty(number, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._permutation(int(epoch))[within[chosen]]
        return epochs, rows
