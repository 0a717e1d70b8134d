"""A model that is small, random and therefore opinionated about nothing."""

from __future__ import annotations

import torch

from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder, build

CONTEXT = 256


def random_model(vocabulary: int, **changes: object) -> Decoder:
    """Weights large enough that the likeliest token is clear and depends on the whole past."""
    settings = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "context": CONTEXT, **changes}
    model = build(DecoderConfig(vocab_size=vocabulary, **settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()
