"""What a request asks of decoding, and its private source of randomness."""

from __future__ import annotations

import random
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from nestling.core.config import Config
from nestling.core.runtime import python_stream, torch_stream

UNIFORM_BITS = 32


class Sampling(Config):
    """Decoding parameters of one request; requests with different parameters share a batch.

    >>> Sampling(temperature=0).greedy
    True
    """

    strategy: str = Field("sample", description="A file of generation/strategies: sample, greedy, beam, …")
    temperature: float = Field(1.0, ge=0, le=100, description="Divides the logits; 0 always takes the likeliest token.")
    top_k: int = Field(0, ge=0, description="Keep only the k likeliest tokens; 0 keeps all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the likeliest tokens that together reach this probability.")
    min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens less likely than this share of the likeliest one.")
    repetition_penalty: float = Field(
        1.0, gt=0, description="Divide positive and multiply negative logits of tokens already seen by this (CTRL)."
    )
    max_tokens: int = Field(128, ge=1, description="Sampled tokens after which generation stops with finish 'length'.")
    stop: tuple[str, ...] = Field((), description="Texts that end the generation; they are not part of the result.")
    options: dict[str, Any] = Field({}, description="Settings of the strategy itself, such as {beams: 4}.")

    @property
    def greedy(self) -> bool:
        """Whether every token is the likeliest one."""
        return self.temperature == 0

    @property
    def scoring_temperature(self) -> float:
        """The temperature at which returned log-probabilities are computed: the sampling one, and 1 for greedy."""
        return self.temperature or 1.0


class Noise:
    """The random stream of one request. What others in the batch do never changes it."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random: random.Random | None = None
        self._generator: torch.Generator | None = None

    def uniform(self) -> float:
        """The next number of [0, 1) on a grid of 2^-32, so that it stays below 1 in any later rounding."""
        if self._random is None:
            self._random = python_stream(self._seed, "tokens")
        return self._random.getrandbits(UNIFORM_BITS) / (1 << UNIFORM_BITS)

    def gumbel(self, *shape: int) -> Tensor:
        """Standard Gumbel noise of this shape, float32 on the CPU; -log(-log u)."""
        if self._generator is None:
            self._generator = torch_stream(self._seed, "gumbel")
        uniforms = torch.rand(shape, generator=self._generator, dtype=torch.float64).clamp_min(1e-300)
        return -torch.log(-torch.log(uniforms)).float()
