"""A decoding strategy that writes what it is told: Sampling(strategy="toys.scripted", options={"ids": [...]})."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.core.config import Config
from nestling.generation.strategy import Decoding, View


class Options(Config):
    """What to write."""

    ids: tuple[int, ...]
    """The tokens; the last is repeated."""


class Strategy(Decoding):
    """Its n-th sampled token is the n-th of the script."""

    Settings = Options

    def advance(self, view: View) -> tuple[Tensor, Tensor]:
        """As in `Decoding.advance`."""
        script = torch.tensor(self.settings.ids)
        tokens = script[view.lengths.clamp_max(len(script) - 1)]
        return torch.zeros_like(tokens), tokens
