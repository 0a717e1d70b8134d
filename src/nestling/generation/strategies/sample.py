"""Draw each token from the model's distribution, shaped by temperature and filters; at temperature 0 the likeliest."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.generation import filters
from nestling.generation.strategy import Decoding, View


class Strategy(Decoding):
    """One row per request, one uniform number per token."""

    SAMPLES = True

    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """As in `Decoding.advance`; R = 1."""
        greedy = view.parameters.values("greedy")
        if all(greedy):
            tokens = filters.likeliest(view.penalised)
        else:
            tokens = filters.draw(view.shaped[:, 0], view.uniforms()).unsqueeze(1)
            if any(greedy):
                certain = filters.likeliest(view.penalised)
                tokens = torch.where(view.parameters.column("temperature")[:, None] == 0, certain, tokens)
        return view.own, tokens
