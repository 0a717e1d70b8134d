"""Two rows: the first ends at once and is kept, the second goes on. What both rows' outputs were is remembered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestling.generation.strategy import KEEP, Decoding, View

STOP, GOES_ON = 3, 5


class Strategy(Decoding):
    """`memory` is the list of hidden states [R, D] seen at each step."""

    READS_PROMPT = True

    @property
    def rows(self) -> int:
        """Two."""
        return 2

    def begin(self, prompt_hidden: Tensor) -> Any:
        """Nothing seen yet."""
        return [prompt_hidden]

    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """As in `Decoding.advance`."""
        for memory, hidden in zip(view.memories, view.hidden, strict=True):
            memory.append(hidden)
        tokens = torch.where(view.ended, KEEP, torch.tensor([STOP, GOES_ON]))
        return torch.tensor([[0, 1]]).expand_as(tokens), tokens
