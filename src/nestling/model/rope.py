"""Frequencies of rotary positions, and four published ways to stretch them over a longer context.

Plain RoPE turns pair i of a head by position · θ^(-2i/K). A model trained on short texts reads longer ones when the slow
pairs are slowed down further; the ways differ in which pairs, and by how much. Each is a settings class with two methods.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from nestling.core.config import Config


class Scaling(Config):
    """What all ways share."""

    kind: str = Field(description="Way of stretching.")
    factor: float = Field(ge=1, description="How many times longer the context becomes.")

    def frequencies(self, theta: float, size: int, longest: Tensor | None = None) -> Tensor:
        """Radians per position of each pair: [K/2] float32; [.., K/2] where it depends on the text's length.

        Args:
            theta: RoPE's base.
            size: head size K.
            longest: [..] length of the text so far, for the way that looks at it.
        """
        return plain_frequencies(theta, size)

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by; scores grow by its square."""
        return 1.0


class LinearScaling(Scaling):
    """Positions are divided by the factor: every pair turns more slowly (Chen et al., 2023)."""

    kind: Literal["linear"] = Field("linear", description="Way of stretching.")

    def frequencies(self, theta: float, size: int, longest: Tensor | None = None) -> Tensor:
        """[K/2] float32"""
        return plain_frequencies(theta, size) / self.factor


class DynamicScaling(Scaling):
    """A larger base once a text is longer than what was trained on ("dynamic NTK", Peng et al., 2023, appendix B.2).

    All frequencies follow from the text's length L: θ · (factor · L / L₀ - (factor - 1))^(K / (K - 2)). Keys that a cache
    holds keep the angles of the length at which they came, as in transformers; beyond L₀ a text read at once and the
    same text read token by token therefore differ.
    """

    kind: Literal["dynamic"] = Field("dynamic", description="Way of stretching.")
    original_context: int = Field(ge=1, description="Tokens that the model was trained on.")

    def frequencies(self, theta: float, size: int, longest: Tensor | None = None) -> Tensor:
        """longest [..] -> [.., K/2] float32"""
        length = torch.tensor(0) if longest is None else longest
        length = length.clamp_min(self.original_context)
        base = theta * (self.factor * length / self.original_context - (self.factor - 1)) ** (size / (size - 2))
        return 1.0 / base.unsqueeze(-1) ** _exponents(size).to(base.device)


class Llama3Scaling(Scaling):
    """Slow pairs are slowed by the factor, fast ones stay, those between are mixed (Llama 3.1)."""

    kind: Literal["llama3"] = Field("llama3", description="Way of stretching.")
    original_context: int = Field(ge=1, description="Tokens that the model was trained on.")
    low_freq_factor: float = Field(1.0, gt=0, description="Pairs that turn less often over that length are slowed.")
    high_freq_factor: float = Field(4.0, gt=0, description="Pairs that turn more often over it stay as they are.")

    def frequencies(self, theta: float, size: int, longest: Tensor | None = None) -> Tensor:
        """[K/2] float32"""
        plain = plain_frequencies(theta, size)
        turns = self.original_context / (2 * math.pi / plain)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain


class YarnScaling(Scaling):
    """As Llama 3's, with a ramp over pair numbers, and scores made a little sharper (Peng et al., 2023, 3.2 to 3.4)."""

    kind: Literal["yarn"] = Field("yarn", description="Way of stretching.")
    original_context: int = Field(ge=1, description="Tokens that the model was trained on.")
    beta_fast: float = Field(32.0, gt=0, description="Pairs that turn more often over that length stay.")
    beta_slow: float = Field(1.0, gt=0, description="Pairs that turn less often over it are slowed by the factor.")
    truncate: bool = Field(True, description="The ramp begins and ends at whole pairs.")
    attention_factor: float | None = Field(None, gt=0, description="Amplitude; 0.1 ln(factor) + 1 when not set.")

    def frequencies(self, theta: float, size: int, longest: Tensor | None = None) -> Tensor:
        """[K/2] float32"""
        first, last = self._pair(self.beta_fast, theta, size), self._pair(self.beta_slow, theta, size)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        width = last - first if last != first else 0.001
        slowed = ((torch.arange(size // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
        plain = plain_frequencies(theta, size)
        return plain / self.factor * slowed + plain * (1 - slowed)

    def _pair(self, turns: float, theta: float, size: int) -> float:
        """The number of the pair that turns this often over the original context."""
        return size * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        return yarn_amplitude(self.factor) if self.attention_factor is None else self.attention_factor


RopeScaling = Annotated[LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]
SCALINGS: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}


def yarn_amplitude(factor: float, strength: float = 1.0) -> float:
    """0.1 · strength · ln(factor) + 1 (Peng et al., 2023, equation 22)."""
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


def plain_frequencies(theta: float, size: int) -> Tensor:
    """θ^(-2i/K), [K/2] float32."""
    return 1.0 / theta ** _exponents(size)


def _exponents(size: int) -> Tensor:
    return torch.arange(0, size, 2, dtype=torch.float32) / size
