"""Exhaustive search: read every text there is and return the best. For toys, and to see what a search misses.

Texts are made of the tokens that the request's filters leave, so `top_k: 3` asks for the best text in the tree of the
three likeliest tokens at each place. All beginnings are held at once; a request whose tree is too wide is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Row
from nestling.generation.strategies import _beams
from nestling.generation.strategy import Decoding, View


class Options(Config):
    """Options of exhaustive search."""

    rows: int = Field(32, ge=1, le=65536, description="How many beginnings are held at once; the engine needs as many.")


class Strategy(Decoding):
    """One row per beginning; the last token needs none of its own, since only the best ends are kept."""

    Settings = Options

    @property
    def rows(self) -> int:
        """The number of beginnings."""
        return self.settings.rows

    def check(self, sampling: Sampling, vocabulary: int) -> None:
        """Refuse a tree with more beginnings than rows."""
        branches, places = min(sampling.top_k or vocabulary, vocabulary), sampling.max_tokens
        if branches > 1 and places - 1 > math.log(self.rows, branches):
            raise UserError(
                f"{branches} tokens at each of {places} places are {_power(branches, places)} texts with "
                f"{_power(branches, places - 1)} beginnings, more than {self.rows} rows",
                where="sampling.strategy exhaustive",
                fix="lower top_k or max_tokens, or raise options.rows",
            )

    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """All continuations; where they are more than rows, at the last token, the likeliest."""
        totals = view.scores.masked_fill(_beams.only_first(view), -torch.inf)
        going_on = totals.unsqueeze(2) + view.logprobs.masked_fill(view.shaped == -torch.inf, -torch.inf)
        parents, tokens, _ = _beams.choose(going_on, view.scores, view.ended)
        return parents, tokens

    def order(self, rows: Sequence[Row]) -> list[int]:
        """The likeliest first."""
        return sorted(range(len(rows)), key=lambda r: -rows[r].score)


def _power(base: int, exponent: int) -> str:
    """A power to read: in full up to a billion, then as one of ten."""
    digits = exponent * math.log10(base)
    return f"{base**exponent:,}" if digits < 9 else f"about 10^{digits:.0f}"
