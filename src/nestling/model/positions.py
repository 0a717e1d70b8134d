"""How order enters a decoder. Each scheme is one small module with three places to act; all but one are empty.

What a scheme gives is computed once per forward pass, not once per layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nestling.model.config import DecoderConfig
from nestling.model.rope import DynamicScaling, plain_frequencies

Rotation = tuple[Tensor, Tensor]
"""(cos, sin), each [B or 1, T, 1, K/2] float32."""


class Positions(nn.Module):
    """No positions at all ("none"): a causal mask alone lets a decoder count. Other schemes fill one of the places."""

    reads_lengths = False
    """Whether `rotation` looks at the texts' lengths."""

    def embed(self, positions: Tensor) -> Tensor | None:
        """What is added to the token embeddings, [B or 1, T, D], or None. `positions` is [B or 1, T]."""
        return None

    def rotation(self, positions: Tensor, longest: Tensor | None = None) -> Rotation | None:
        """By which angles queries and keys are rotated, or None. `longest` is the length of each row's text, [B]."""
        return None

    def penalty(self, distance: Tensor) -> Tensor | None:
        """What is added to attention scores, [.., H, T, S], or None. `distance` [.., T, S] is query minus key index."""
        return None


class LearnedPositions(Positions):
    """A trained vector for each position (GPT-1 to GPT-3)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.context, config.d_model)

    def embed(self, positions: Tensor) -> Tensor:
        """[B or 1, T] -> [B or 1, T, D]"""
        return self.table(positions)


class SinusoidalPositions(Positions):
    """sin and cos of geometrically spaced frequencies, first all sines, then all cosines (Vaswani et al., 2017, 3.5).

    The paper interleaves the two; the order only permutes features, and this one is the usual implementation's.
    """

    table: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        angles = _angles(config.context, plain_frequencies(10_000.0, config.d_model))
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], -1), persistent=False)

    def embed(self, positions: Tensor) -> Tensor:
        """[B or 1, T] -> [B or 1, T, D]"""
        return self.table[positions]


class RotaryPositions(Positions):
    """Rotation of query and key pairs by position · frequency, so that scores see only distances (Su et al., 2021)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        scaling = config.rope_scaling
        frequencies = (
            plain_frequencies(config.rope_theta, config.head)
            if scaling is None
            else scaling.frequencies(config.rope_theta, config.head)
        )
        angles = _angles(config.context, frequencies)
        amplitude = 1.0 if scaling is None else scaling.amplitude
        self.register_buffer("cos", angles.cos() * amplitude, persistent=False)
        self.register_buffer("sin", angles.sin() * amplitude, persistent=False)

    def rotation(self, positions: Tensor, longest: Tensor | None = None) -> Rotation:
        """[B or 1, T] -> (cos, sin), each [B or 1, T, 1, K/2]"""
        return self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)


class DynamicRotaryPositions(Positions):
    """Rotary positions whose frequencies follow from each text's length: nothing can be tabulated."""

    reads_lengths = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.rope_scaling is not None
        self.scaling, self.theta, self.head = config.rope_scaling, config.rope_theta, config.head

    def rotation(self, positions: Tensor, longest: Tensor | None = None) -> Rotation:
        """[B or 1, T], [B or 1] -> (cos, sin), each [B or 1, T, 1, K/2]"""
        lengths = positions.amax(-1) + 1 if longest is None else longest
        frequencies = self.scaling.frequencies(self.theta, self.head, lengths)  # [B or 1, K/2]
        angles = (positions.float().unsqueeze(-1) * frequencies.unsqueeze(-2)).unsqueeze(-2)
        return angles.cos(), angles.sin()


class AlibiPositions(Positions):
    """A penalty on scores that grows with distance, steeper in some heads than in others (Press et al., 2022)."""

    slopes: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor(alibi_slopes(config.n_heads)).view(-1, 1, 1), persistent=False)

    def penalty(self, distance: Tensor) -> Tensor:
        """[.., T, S] -> [.., H, T, S]"""
        return -self.slopes * distance.unsqueeze(-3)


SCHEMES: dict[str, type[Positions]] = {
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
    "rope": RotaryPositions,
    "alibi": AlibiPositions,
}


def make_positions(config: DecoderConfig) -> Positions:
    """The scheme that the configuration asks for."""
    if config.positions == "rope" and isinstance(config.rope_scaling, DynamicScaling):
        return DynamicRotaryPositions(config)
    return SCHEMES[config.positions](config) if config.positions in SCHEMES else Positions()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs (x[i], x[i + K/2]) of [B, T, H, K]; the pairing is the one of Llama checkpoints."""
    cos, sin = rotation
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8/H), 2^(-16/H), … for H a power of two; otherwise the paper's mixture of two such series."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * power, 2)]
    return slopes + between[: heads - power]


def _angles(context: int, frequencies: Tensor) -> Tensor:
    """position · frequency, [context, size/2] float32."""
    return torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
