"""Several short pieces in one row, none seeing another: best fit, then batches by copying slices."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nestling.loading.batches import BatchArrays, TokenBatch


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Put pieces into rows, longest first, each into the fullest row that still has room.

    Args:
        lengths: slots of each piece, all between 1 and `capacity`.

    Returns:
        for each row, the numbers of its pieces.

    >>> best_fit(np.array([3, 5, 2, 4]), capacity=7)
    [[1, 2], [3, 0]]
    """
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free slots -> rows that have exactly so many
    sizes: list[int] = []  # the keys of `room`, sorted
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        place = bisect_left(sizes, length)
        if place == len(sizes):
            row, free = len(rows), capacity
            rows.append([])
        else:
            free = sizes[place]
            row = room[free].pop()
            if not room[free]:
                del room[free], sizes[place]
        rows[row].append(piece)
        left = free - length
        if left and left not in room:
            room[left] = []
            insort(sizes, left)
        if left:
            room[left].append(row)
    return rows


@dataclass(frozen=True)
class Pieces:
    """Pieces of one flat token stream; piece n reads stream[start : start + length] and learns the slots one later.

    >>> Pieces(np.array([0, 4]), np.array([3, 2])).lengths.sum()
    np.int64(5)
    """

    starts: np.ndarray
    """[N] first slot of each piece in the stream."""
    lengths: np.ndarray
    """[N] slots that are read; the stream holds one token more."""

    def split(self, context: int) -> Pieces:
        """Pieces longer than `context` cut into parts of at most `context` slots."""
        parts = -(-self.lengths // context)
        owner = np.repeat(np.arange(len(parts)), parts)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
        lengths = np.minimum(self.lengths[owner] - nth * context, context)
        return Pieces(self.starts[owner] + nth * context, lengths)


class PackedRows:
    """Rows of packed pieces over a stream of ids and, where not every token is learnt, a mask beside it.

    Args:
        stream: [N] token ids (a memory map or an array).
        learnt: [N] bool, true where a token is learnt when it is a target; None means everywhere.
        context: slots per row, T.
        pad: id that fills unused slots (never learnt).
    """

    def __init__(self, stream: np.ndarray, learnt: np.ndarray | None, pieces: Pieces, context: int, pad: int) -> None:
        self.stream, self.learnt, self.pieces, self.context, self.pad = stream, learnt, pieces, context, pad
        self.rows = best_fit(pieces.lengths, context)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fill(self) -> float:
        """Share of all slots that hold tokens."""
        return float(self.pieces.lengths.sum() / max(1, len(self.rows) * self.context))

    def batch(self, rows: Sequence[int] | np.ndarray, batch_rows: int) -> TokenBatch:
        """The chosen rows, followed by empty ones up to `batch_rows`."""
        out = BatchArrays(batch_rows, self.context, self.pad)
        for place, row in enumerate(rows):
            self._fill_row(out, place, self.rows[row])
        return out.tensors()

    def in_order(self, batch_rows: int) -> Iterator[TokenBatch]:
        """Every row once, in fixed order; the last batch is filled up with rows of weight 0."""
        for first in range(0, len(self), batch_rows):
            yield self.batch(range(first, min(first + batch_rows, len(self))), batch_rows)

    def _fill_row(self, out: BatchArrays, place: int, pieces: Sequence[int]) -> None:
        end = 0
        for segment, piece in enumerate(pieces):
            start, length = int(self.pieces.starts[piece]), int(self.pieces.lengths[piece])
            slots = slice(end, end + length)
            tokens = self.stream[start : start + length + 1]
            out.ids[place, slots] = tokens[:-1]
            out.targets[place, slots] = tokens[1:]
            out.weights[place, slots] = 1.0 if self.learnt is None else self.learnt[start + 1 : start + length + 1]
            out.positions[place, slots] = np.arange(length)
            out.segments[place, slots] = segment
            end += length
        out.segments[place, end:] = len(pieces)
        out.positions[place, end:] = np.arange(self.context - end)
