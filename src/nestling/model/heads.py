"""A number per position on top of a decoder: rewards and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder


class ScalarHead(nn.Module):
    """hidden [.., D] -> [..] float32. Without a bias, which a difference of rewards would not see."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.score = nn.Linear(config.d_model, 1, bias=False)
        nn.init.zeros_(self.score.weight)  # rewards and values start at zero, not at noise

    def forward(self, hidden: Tensor) -> Tensor:
        """[.., D] -> [..] float32: in full precision, since objectives take small differences of these numbers."""
        with torch.autocast(hidden.device.type, enabled=False):
            return (hidden.float() @ self.score.weight.float().T).squeeze(-1)


class Scored(nn.Module):
    """A decoder whose output is one number per position."""

    def __init__(self, decoder: Decoder, head: ScalarHead) -> None:
        super().__init__()
        self.decoder, self.head = decoder, head

    def forward(self, ids: Tensor, **where: Any) -> Tensor:
        """ids [B, T] -> scores [B, T] float32; other arguments as in `Decoder.hidden`."""
        return self.head(self.decoder.hidden(ids, **where))
