"""Training and validation, divided the same way every time: rows by a hash of what they are, one text by position."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "val"]

_SMALL = 200  # rows; below this, a share by chance could leave a split empty, so exact numbers are drawn


def unit_hash(key: str) -> float:
    """A number in [0, 1) that depends on the key alone.

    >>> unit_hash("a") == unit_hash("a") != unit_hash("b")
    True
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") / 2**64


def split_rows(rows: Iterable[T], key: Callable[[T], str], val_share: float, split: Split) -> Iterator[T]:
    """The rows of one split, in their order. Rows with equal keys always fall on the same side.

    Args:
        key: what a row is known by: its id, or its prompt, so that no prompt stands on both sides.
        val_share: expected share of validation; small data get it exactly, with at least one row on each side.
    """
    rest = iter(rows)
    head = list(islice(rest, _SMALL))
    if len(head) < _SMALL:
        held_out = _lowest({key(row) for row in head}, val_share)
        yield from (row for row in head if (key(row) in held_out) == (split == "val"))
        return
    yield from (row for row in chain(head, rest) if (unit_hash(key(row)) < val_share) == (split == "val"))


def _lowest(keys: set[str], share: float) -> set[str]:
    """The keys with the lowest hashes: `share` of them, at least one unless there is only one."""
    if len(keys) < 2 or share == 0:
        return set()
    number = min(max(1, round(share * len(keys))), len(keys) - 1)
    return set(sorted(keys, key=unit_hash)[:number])


def split_text(text: str, val_share: float, split: Split) -> str:
    """The first part of a running text for training, its end for validation, divided by characters.

    >>> split_text("0123456789", 0.1, "val")
    '9'
    """
    cut = int(len(text) * (1 - val_share))
    return text[:cut] if split == "train" else text[cut:]
