"""Choosing R of the continuations of R rows: what beam-like searches share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from nestling.core.config import Config
from nestling.generation.sequence import Row
from nestling.generation.strategy import DROP, KEEP, Decoding, View


class Options(Config):
    """Options of searches that end in the best of R hypotheses."""

    beams: int = Field(4, ge=1, le=1024, description="Hypotheses R that are followed at once.")
    length_penalty: float = Field(1.0, ge=0, description="Power α of the length that scores are divided by; 0: none.")


class Beams(Decoding):
    """R rows per request, the best of them first at the end."""

    Settings = Options

    @property
    def rows(self) -> int:
        """The number of beams."""
        return self.settings.beams

    def order(self, rows: Sequence[Row]) -> list[int]:
        """By length-normalised score."""
        scores = [row.score / max(row.count, 1) ** self.settings.length_penalty for row in rows]
        return sorted(range(len(rows)), key=lambda r: -scores[r])


def only_first(view: View) -> Tensor:
    """[G, R] true where a row is a copy of the first one, which it is at the first step."""
    return (view.lengths == 0) & (torch.arange(view.lengths.shape[1], device=view.lengths.device) > 0)


def choose(going_on: Tensor, staying: Tensor, ended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The R best of all continuations of live rows and all rows that have ended, best first.

    Args:
        going_on: [G, R, V] the value of each row with each token appended; rows that ended do not count.
        staying: [G, R] the value of each row as it is.
        ended: [G, R] the rows that have ended.

    Returns:
        parents, tokens (as `Decoding.advance`) and values, [G, R].
    """
    rows, vocabulary = going_on.shape[1:]
    going_on = going_on.masked_fill(ended.unsqueeze(2), -torch.inf).flatten(1)
    candidates = torch.cat([going_on, staying.masked_fill(~ended, -torch.inf)], 1)
    values, indices = candidates.topk(rows, dim=1)
    stays = indices >= rows * vocabulary
    parents = torch.where(stays, indices - rows * vocabulary, indices // vocabulary)
    tokens = torch.where(stays, KEEP, indices % vocabulary)
    return parents, tokens.masked_fill(values == -torch.inf, DROP), values
