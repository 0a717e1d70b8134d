"""Batches of prompts to answer, for reinforcement learning and sampling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from nestling.core.errors import UserError
from nestling.core.types import PromptRow
from nestling.loading.order import EpochOrder
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render


@dataclass(frozen=True)
class Prompt:
    """One prompt, rendered up to "<|im_start|>assistant\\n".

    >>> Prompt(ids=[257, 300], row=PromptRow(prompt=())).ids
    [257, 300]
    """

    ids: list[int]
    row: PromptRow


class PromptLoader:
    """Batches of `batch_rows` prompts; `batch(step)` depends on the seed and the step alone.

    A prompt is rendered with the tools that its row offers.

    Args:
        context: the model's context length.
        reserve: tokens kept free for the answer.
        too_long: "error", or "drop": prompts that do not fit are left out and counted in `.dropped`.

    Raises:
        UserError: a prompt longer than context − reserve, or no prompt.
    """

    def __init__(
        self, rows: Iterable[PromptRow], tokenizer: Tokenizer, context: int, batch_rows: int, seed: int,
        *, reserve: int = 1, too_long: Literal["error", "drop"] = "error",
    ) -> None:  # fmt: skip
        self.batch_rows, self.most = batch_rows, context - reserve
        self.dropped = 0
        self._prompts: list[Prompt] = []
        for number, row in enumerate(rows):
            ids = render(tokenizer, row.prompt, row.tools, prompt=True).ids
            if len(ids) <= self.most:
                self._prompts.append(Prompt(ids, row))
            elif too_long == "error":
                raise UserError(
                    f"prompt {number} has {len(ids)} tokens, {self.most} fit (context {context}, {reserve} to answer)",
                    fix="raise the context, shorten the prompt, or set too_long to drop",
                )
            else:
                self.dropped += 1
        if not self._prompts:
            what = f"all {self.dropped} prompts are longer than {self.most} tokens" if self.dropped else "there is no prompt"
            fix = f"use shorter prompts, a longer context ({context}) or less room for answers ({reserve})"
            raise UserError(what, where="prompts", fix=fix)
        self.row_count = len(self._prompts)
        self.order = EpochOrder(self.row_count, seed, "prompts")

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of one step; a rank takes its slice of the list."""
        _, rows = self.order.take(step * self.batch_rows, self.batch_rows)
        return [self._prompts[row] for row in rows]

    def validation(self) -> Iterator[list[Prompt]]:
        """Every prompt once, in fixed order."""
        for first in range(0, self.row_count, self.batch_rows):
            yield self._prompts[first : first + self.batch_rows]
