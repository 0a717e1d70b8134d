"""Choosing R of the continuations of R rows: what beam-like searches share."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.generation.strategy import DROP, KEEP, View


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
