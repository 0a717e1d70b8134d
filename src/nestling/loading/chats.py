"""Batches of conversations, packed; only what the assistant writes is learnt.

A reply is learnt after what came before it as it is served: without the thoughts of earlier replies. So a conversation is
learnt in as many pieces as it has replies with thoughts (see `_pieces`), and in one where nobody thinks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from nestling.core.errors import UserError
from nestling.core.types import Conversation, Message
from nestling.loading.batches import TokenBatch
from nestling.loading.order import EpochOrder
from nestling.loading.packing import PackedRows, Pieces
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import ASKING, render, split_thought

TooLong = Literal["error", "drop", "cut"]
"""What happens to an item that does not fit the context: stop, leave it out and count it, or keep its beginning."""


class ChatLoader:
    """Packed conversations; `batch(step)` depends on the seed and the step alone.

    Args:
        context: slots per row, T.
        batch_rows: rows per batch, B, over all ranks.
        too_long: "error", "drop" (counted in `.dropped`), or "cut" (counted in `.cut`; dropped when nothing that the
            assistant wrote is left).

    Raises:
        UserError: a conversation longer than the context under "error"; or none left to learn from.
    """

    def __init__(
        self, conversations: Iterable[Conversation], tokenizer: Tokenizer, context: int, batch_rows: int, seed: int,
        *, too_long: TooLong = "error",
    ) -> None:  # fmt: skip
        self.context, self.batch_rows, self.too_long = context, batch_rows, too_long
        self.dropped = self.cut = 0
        ids: list[np.ndarray] = []
        learnt: list[np.ndarray] = []
        for number, conversation in enumerate(conversations):
            for start, end in _pieces(tokenizer, conversation.messages):
                rendered = render(tokenizer, conversation.messages[:end], conversation.tools, learnt=start)
                length = self._allowed(number, len(rendered.ids), rendered.mask)
                if length:
                    ids.append(np.array(rendered.ids[:length], dtype=np.uint32))
                    learnt.append(np.array(rendered.mask[:length], dtype=bool))
        if not ids:
            raise UserError(
                "no conversation to learn from", where="chats", fix="give data with assistant turns that fit"
            )
        self.conversations = len(ids)
        lengths = np.array([len(part) for part in ids], dtype=np.int64)
        pieces = Pieces(np.cumsum(lengths) - lengths, lengths - 1)
        self._packed = PackedRows(np.concatenate(ids), np.concatenate(learnt), pieces, context, tokenizer.filler)
        self.row_count = len(self._packed)
        self.order = EpochOrder(self.row_count, seed, "chats")

    def _allowed(self, number: int, length: int, mask: list[bool]) -> int:
        """How many tokens of a conversation are kept; 0 leaves it out."""
        most = self.context + 1
        if length > most and self.too_long == "error":
            raise UserError(
                f"conversation {number} has {length} tokens, the context holds {most}",
                fix="raise the context, or set too_long to drop or cut",
            )
        kept = length if length <= most else most if self.too_long == "cut" else 0
        if not any(mask[1:kept]):
            kept = 0
        self.dropped += kept == 0
        self.cut += 0 < kept < length
        return kept

    @property
    def fill(self) -> float:
        """Share of slots that hold tokens."""
        return self._packed.fill

    def batch(self, step: int) -> TokenBatch:
        """The batch of one step, [B, T]."""
        _, rows = self.order.take(step * self.batch_rows, self.batch_rows)
        return self._packed.batch(rows, self.batch_rows)

    def validation(self) -> Iterator[TokenBatch]:
        """Every row once, in fixed order; the last batch is filled up with rows of weight 0."""
        return self._packed.in_order(self.batch_rows)


def _pieces(tokenizer: Tokenizer, messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """(start, end) of each piece: messages up to `end` are read, and what the assistant says from `start` on is learnt.

    A piece ends with every reply that begins with a thought, for what follows is served without it. Each assistant message
    is learnt once.
    """
    start = 0
    asked = [place for place, message in enumerate(messages) if message.role in ASKING]
    for begin, end in pairwise([0, *asked, len(messages)]):
        if any(split_thought(tokenizer, message)[0] is not None for message in messages[begin:end]):
            yield start, end
            start = end
    if not start or any(message.role == "assistant" for message in messages[start:]):
        yield start, len(messages)
