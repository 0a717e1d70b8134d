"""Batches of labelled texts for a classifier; every text is framed as in pre-training, between two <|endoftext|>.

The second one is where the classifier answers: by then it has read everything, and knows that there is no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.core.config import nearest
from nestling.core.errors import UserError
from nestling.core.types import Labelled
from nestling.loading.batches import padded
from nestling.loading.chats import TooLong
from nestling.loading.order import EpochOrder
from nestling.tokenizer.bpe import Tokenizer

FRAME = 2  # tokens around a text


def framed(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """A text's ids as a classifier reads them: <|endoftext|> before and after."""
    return [tokenizer.end_of_text, *ids, tokenizer.end_of_text]


@dataclass(frozen=True)
class LabelBatch:
    """Several texts and what is known about them. Letters: N texts, T slots, L categories."""

    ids: Tensor
    """[N, T] long, right-padded."""
    lengths: Tensor
    """[N] long: tokens of each row; labels are read at slot lengths − 1."""
    targets: Tensor
    """[N, L] float32: 1 where the category applies."""
    judged: Tensor
    """[N, L] bool: whether anybody looked; targets elsewhere mean nothing."""

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, start: int, stop: int) -> LabelBatch:
        """The texts [start, stop)."""
        part = slice(start, stop)
        return LabelBatch(self.ids[part], self.lengths[part], self.targets[part], self.judged[part])

    def to(self, device: torch.device) -> LabelBatch:
        """The batch on a device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


class LabelLoader:
    """Batches of `batch_rows` texts; `batch(step)` depends on the seed and the step alone.

    Args:
        context: most tokens of a text, its frame included.
        categories: the labels, in the order of the classifier's logits.
        too_long: "error", "drop" or "cut" (a text keeps its beginning); `.dropped` and `.cut` count.

    Raises:
        UserError: a label that is no category, a text longer than the context under "error", or no text at all.
    """

    def __init__(
        self, rows: Sequence[Labelled], tokenizer: Tokenizer, context: int, batch_rows: int, seed: int,
        categories: Sequence[str], *, too_long: TooLong = "cut",
    ) -> None:  # fmt: skip
        self.context, self.batch_rows, self.too_long = context, batch_rows, too_long
        self.categories = tuple(categories)
        self.dropped = self.cut = 0
        self._filler = tokenizer.filler
        for number, row in enumerate(rows):
            _check(number, row, self.categories)
        encoded = tokenizer.encode_batch([row.text for row in rows])
        fitted = [self._fitted(number, ids) for number, ids in enumerate(encoded)]
        self.rows = [row for row, ids in zip(rows, fitted, strict=True) if ids is not None]
        """The texts that are left, in the order of `validation`."""
        self._ids = [framed(tokenizer, ids) for ids in fitted if ids is not None]
        if not self._ids:
            raise UserError("no text to learn from", where="labels", fix="give texts that fit the context")
        self.targets = _table([row.labels for row in self.rows], self.categories)
        """[N, L] float32 of all rows."""
        every = self.categories
        self.judged = _table([every if row.judged is None else row.judged for row in self.rows], every).bool()
        """[N, L] bool of all rows."""
        self.order = EpochOrder(len(self._ids), seed, "labels")

    def _fitted(self, number: int, ids: list[int]) -> list[int] | None:
        room = self.context - FRAME
        if len(ids) <= room:
            return ids
        if self.too_long == "error":
            raise UserError(
                f"text {number} has {len(ids)} tokens, the context has room for {room}",
                fix="raise the context, or set too_long to drop or cut",
            )
        if self.too_long == "drop":
            self.dropped += 1
            return None
        self.cut += 1
        return ids[:room]

    def batch(self, step: int) -> LabelBatch:
        """The batch of one step."""
        _, rows = self.order.take(step * self.batch_rows, self.batch_rows)
        return self._batch(rows.tolist())

    def validation(self) -> Iterator[LabelBatch]:
        """Every text once, in fixed order."""
        for first in range(0, len(self.rows), self.batch_rows):
            yield self._batch(range(first, min(first + self.batch_rows, len(self.rows))))

    def _batch(self, places: Sequence[int]) -> LabelBatch:
        ids, lengths = padded([self._ids[place] for place in places], self._filler, self.context)
        chosen = torch.tensor(list(places))
        return LabelBatch(ids, lengths, self.targets[chosen], self.judged[chosen])


def _check(number: int, row: Labelled, categories: Sequence[str]) -> None:
    for name in (*row.labels, *(row.judged or ())):
        if name not in categories:
            raise UserError(f"text {number} has a label that is no category", value=name, fix=nearest(name, categories))


def _table(names: Sequence[Sequence[str]], categories: Sequence[str]) -> Tensor:
    """[N, L] float32: 1 where row n names category l."""
    column = {name: place for place, name in enumerate(categories)}
    table = torch.zeros(len(names), len(categories))
    for row, named in enumerate(names):
        table[row, [column[name] for name in named]] = 1.0
    return table
