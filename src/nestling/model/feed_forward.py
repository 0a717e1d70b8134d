"""The feed-forward sub-layer: two thirds of a block's parameters, applied to each position alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.model.config import DecoderConfig


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return torch.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu_squared": _relu_squared,
}


class FeedForward(nn.Module):
    """down(act(up(x))), as in Transformer and GPT."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.ff, bias=config.bias)
        self.down = nn.Linear(config.ff, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        return self.down(self.activation(self.up(x)))


class GatedFeedForward(nn.Module):
    """down(act(gate(x)) · up(x)): SwiGLU when the activation is silu (Shazeer, 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.ff, bias=config.bias)
        self.up = nn.Linear(config.d_model, config.ff, bias=config.bias)
        self.down = nn.Linear(config.ff, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        return self.down(self.activation(self.gate(x)) * self.up(x))


def make_feed_forward(config: DecoderConfig) -> nn.Module:
    """The feed-forward that the configuration asks for."""
    return GatedFeedForward(config) if config.gated else FeedForward(config)
