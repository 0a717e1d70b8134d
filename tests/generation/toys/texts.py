"""A language so small that all of its texts can be listed."""

from __future__ import annotations

import itertools

import torch

from nestling.model.decoder import Decoder

LETTERS, LENGTH = 4, 4
STOP = 0


def all_texts(
    model: Decoder, prompt: list[int], length: int = LENGTH, temperature: float = 1.0
) -> dict[tuple[int, ...], float]:
    """Log-probability of every text that ends with STOP, or has `length` tokens without it."""
    scores: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(LETTERS), repeat=length):
        kept = text[: text.index(STOP) + 1] if STOP in text else text
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *kept[:-1]]]))[0, len(prompt) - 1 :]
        scores[kept] = (logits / temperature).log_softmax(-1)[range(len(kept)), list(kept)].sum().item()
    return scores
