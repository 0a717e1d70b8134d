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
        logits = view.penalised()[:, 0]  # [G, V]
        settings = [running.sampling for running in view.requests]
        if all(s.greedy for s in settings):
            tokens = logits.argmax(1)
        else:
            shaped = _shape(logits, view)
            tokens = filters.draw(shaped, view.uniforms())
            if any(s.greedy for s in settings):
                tokens = torch.where(view.column("temperature") == 0, logits.argmax(1), tokens)
        return torch.zeros_like(tokens).unsqueeze(1), tokens.unsqueeze(1)


def _shape(logits: Tensor, view: View) -> Tensor:
    """Temperature and the filters that at least one request asks for, [G, V]."""
    settings = [running.sampling for running in view.requests]
    if any(s.temperature != 1 for s in settings):
        logits = filters.temperature(logits, view.column("temperature"))
    if any(s.top_k for s in settings):
        logits = filters.top_k(logits, view.column("top_k"))
    if any(s.top_p < 1 for s in settings):
        logits = filters.top_p(logits, view.column("top_p"))
    if any(s.min_p for s in settings):
        logits = filters.min_p(logits, view.column("min_p"))
    return logits
