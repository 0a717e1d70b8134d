"""Always the likeliest token: the baseline that other strategies are compared with, and the smallest example of one."""

from __future__ import annotations

from torch import Tensor

from nestling.generation import filters
from nestling.generation.strategy import Decoding, View


class Strategy(Decoding):
    """One row per request; penalties, bias and constraints apply, temperature and filters change nothing."""

    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """As in `Decoding.advance`; R = 1."""
        return view.own, filters.likeliest(view.penalised)
