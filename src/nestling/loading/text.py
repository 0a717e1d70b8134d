"""Batches of running text from shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from nestling.core.errors import UserError
from nestling.loading.batches import BatchArrays, TokenBatch
from nestling.loading.order import EpochOrder, epoch_generator
from nestling.loading.packing import PackedRows, Pieces
from nestling.loading.shards import Shards

RowMode = Literal["documents", "stream", "windows"]


class TextLoader:
    """Batches of text; `batch(step)` depends on the seed and the step alone.

    Three ways to make rows of T slots:
    - "documents": whole documents packed by best fit; only documents longer than T are cut. Positions restart and
      documents don't see each other. The way for short documents, whose tails mean little without their heads.
    - "stream": the stream cut every T tokens at an offset drawn per epoch; masked and restarted like the above.
    - "windows": as "stream", but one running text: nothing is masked, positions run through.

    In each epoch every row comes exactly once. "stream" and "windows" leave out less than 2 T tokens at the ends.

    Args:
        context: slots per row, T.
        batch_rows: rows per batch, B, over all ranks: each rank takes its `.rows(a, b)`.

    Raises:
        UserError: the text is shorter than one row.
    """

    def __init__(self, shards: Shards, context: int, batch_rows: int, seed: int, mode: RowMode = "documents") -> None:
        self.shards, self.context, self.batch_rows, self.seed, self.mode = shards, context, batch_rows, seed, mode
        self._packed: PackedRows | None = None
        if mode == "documents":
            pieces = Pieces(shards.offsets[:-1], np.diff(shards.offsets)).split(context)
            self._packed = PackedRows(shards, None, pieces, context, shards.end_of_text)  # type: ignore[arg-type]
            self.row_count = len(self._packed)
        else:
            self.row_count = max(1, (shards.tokens - context) // context)
            if shards.tokens < context + 1:
                raise UserError(
                    f"the text has {shards.tokens} tokens, less than one row of {context} + 1",
                    where=shards.folder, fix="use more text or a smaller context",
                )  # fmt: skip
        self.order = EpochOrder(self.row_count, seed, "text")

    @property
    def fill(self) -> float:
        """Share of slots that hold tokens (1 unless documents are packed whole)."""
        return self._packed.fill if self._packed else 1.0

    def batch(self, step: int) -> TokenBatch:
        """The batch of one step, [B, T]."""
        epochs, rows = self.order.take(step * self.batch_rows, self.batch_rows)
        if self._packed:
            return self._packed.batch(rows, self.batch_rows)
        shifts = {int(epoch): self._shift(int(epoch)) for epoch in np.unique(epochs)}
        starts = [shifts[int(epoch)] + int(row) * self.context for epoch, row in zip(epochs, rows, strict=True)]
        return self._cut(starts, self.batch_rows)

    def _shift(self, epoch: int) -> int:
        """Where the first row of an epoch begins: anywhere that leaves room for all rows, within one row."""
        slack = min(self.context - 1, self.shards.tokens - 1 - self.row_count * self.context)
        return int(epoch_generator(self.seed, "shift", epoch).integers(slack + 1))

    def validation(self) -> Iterator[TokenBatch]:
        """All text once, in fixed order; the last batch is filled up with rows of weight 0."""
        if self._packed:
            yield from self._packed.in_order(self.batch_rows)
            return
        starts = list(range(0, self.shards.tokens - 1, self.context))
        for first in range(0, len(starts), self.batch_rows):
            yield self._cut(starts[first : first + self.batch_rows], self.batch_rows)

    def _cut(self, starts: list[int], rows: int) -> TokenBatch:
        """Rows of the stream that begin at `starts`; a row over the end is padded."""
        out = BatchArrays(rows, self.context, self.shards.end_of_text)
        for place, start in enumerate(starts):
            tokens = self.shards[start : start + self.context + 1]
            length = len(tokens) - 1
            out.ids[place, :length] = tokens[:-1]
            out.targets[place, :length] = tokens[1:]
            out.weights[place, :length] = 1.0
            if length < self.context:
                out.segments[place, length:] = 1
        if self.mode == "stream":
            self._mask_documents(out)
        return out.tensors()

    def _mask_documents(self, out: BatchArrays) -> None:
        """A segment begins at every end-of-text token (text never contains one); positions restart there."""
        begins = (out.ids == self.shards.end_of_text) & (out.weights > 0)
        out.segments += np.cumsum(begins, axis=1)
        slots = np.arange(self.context)
        out.positions[:] = slots - np.maximum.accumulate(np.where(begins, slots, 0), axis=1)
