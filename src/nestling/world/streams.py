"""Random streams whose values never change: built on `random.Random.random` alone, which Python keeps stable."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

from nestling.core.runtime import stream_seed

T = TypeVar("T")


class Stream(random.Random):
    """A named random stream: the same seed and names give the same values on every machine and Python version.

    >>> Stream(1, "a").pick("xyz") == Stream(1, "a").pick("xyz")
    True
    """

    def __new__(cls, *args: str | int) -> Stream:
        """Keeps the names from `random.Random`, which takes one argument."""
        return super().__new__(cls)

    def __init__(self, seed: int, *names: str | int) -> None:
        super().__init__(stream_seed(seed, *names))

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, all equally likely."""
        return items[int(self.random() * len(items))]

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A new list with the items in random order."""
        result = list(items)
        for i in range(len(result) - 1, 0, -1):
            j = int(self.random() * (i + 1))
            result[i], result[j] = result[j], result[i]
        return result

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items (all of them if there are fewer), in random order."""
        if count * 3 > len(items):
            return self.shuffled(items)[:count]
        places: list[int] = []
        while len(places) < count:
            place = int(self.random() * len(items))
            if place not in places:
                places.append(place)
        return [items[place] for place in places]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """One of the items with probability proportional to its weight."""
        left = self.random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]


def bucket(text: str, count: int) -> int:
    """A fixed number from 0 to count - 1 for a text: decides to which split a name belongs, whatever the seed."""
    return hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % count
