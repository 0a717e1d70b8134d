"""Numbers on top of a decoder: one per position (rewards and values), or one per label of a text."""

from __future__ import annotations

from collections.abc import Sequence
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


class LabelHead(nn.Module):
    """hidden [.., D] -> logits [.., L] float32, one for each label; labels do not exclude each other.

    Without a bias, as the sequence classifiers of transformers have it.
    """

    def __init__(self, config: DecoderConfig, labels: Sequence[str]) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self.score = nn.Linear(config.d_model, len(self.labels), bias=False)
        nn.init.zeros_(self.score.weight)  # every label starts at one half

    def forward(self, hidden: Tensor) -> Tensor:
        """[.., D] -> [.., L] float32, in full precision: thresholds are compared with these numbers."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.score.weight.float().T


class Labeller(nn.Module):
    """A decoder that reads a text to its end and answers every label's question there."""

    def __init__(self, decoder: Decoder, head: LabelHead) -> None:
        super().__init__()
        self.decoder, self.head = decoder, head

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Right-padded ids [B, T] and their lengths [B] -> logits [B, L] float32, read at each row's last token."""
        hidden = self.decoder.hidden(ids)
        last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
        return self.head(hidden.gather(1, last).squeeze(1))
