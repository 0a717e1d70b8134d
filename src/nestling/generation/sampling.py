"""What a request asks of decoding, and its private source of randomness."""

from __future__ import annotations

import random
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from nestling.core.config import Config, nearest
from nestling.core.errors import UserError
from nestling.core.runtime import python_stream, torch_stream

UNIFORM_BITS = 32
LogitBias = Annotated[float, Field(ge=-100, le=100)]
CONSTRAINTS = {
    "json_schema": "a JSON schema",
    "json_object": "true",
    "regex": "a regular expression",
    "choice": "a list of texts",
    "grammar": "a Lark grammar",
}
"""The kinds of `Sampling.constraint`, and what each is given."""


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
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted from the logit of each token written at least once (OpenAI)."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted from the logit of a token for each time that it was written (OpenAI)."
    )
    logit_bias: dict[int, LogitBias] = Field(
        {}, description="Token id -> what is added to its logit, from -100 (never) to 100 (always)."
    )
    typical_p: float = Field(
        1.0, gt=0, le=1, description="Keep the tokens of most typical information that together reach this probability."
    )
    epsilon_cutoff: float = Field(0.0, ge=0, lt=1, description="Drop tokens less likely than this.")
    eta_cutoff: float = Field(
        0.0, ge=0, lt=1, description="Drop tokens less likely than min(this, √this · exp(−entropy))."
    )
    max_tokens: int = Field(128, ge=1, description="Sampled tokens after which generation stops with finish 'length'.")
    min_tokens: int = Field(0, ge=0, description="Sampled tokens before which no stop token may be written.")
    top_logprobs: int = Field(
        0, ge=0, le=100, description="How many of the likeliest tokens are kept beside each sampled one."
    )
    constraint: dict[str, Any] | None = Field(
        None, description="What the text must be: {json_schema}, {json_object: true}, {regex}, {choice} or {grammar}."
    )
    stop: tuple[str, ...] = Field((), description="Texts that end the generation; they are not part of the result.")
    options: dict[str, Any] = Field({}, description="Settings of the strategy itself, such as {beams: 4}.")

    @model_validator(mode="after")
    def _lengths_agree(self) -> Sampling:
        if self.min_tokens > self.max_tokens:
            raise UserError("more than max_tokens", where="min_tokens", value=self.min_tokens, fix="lower it")
        return self

    @field_validator("constraint")
    @classmethod
    def _one_known_constraint(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            check_constraint(value)
        return value

    @property
    def greedy(self) -> bool:
        """Whether every token is the likeliest one."""
        return self.temperature == 0

    @property
    def scoring_temperature(self) -> float:
        """The temperature at which returned log-probabilities are computed: the sampling one, and 1 for greedy."""
        return self.temperature or 1.0


def check_constraint(value: dict[str, Any]) -> None:
    """See that a constraint has one known kind and the right type of value; what is inside is read by `constraints`.

    Raises:
        UserError: no kind, several, an unknown one, or a value of the wrong type.
    """
    if len(value) != 1:
        raise UserError("a constraint is exactly one of its kinds", value=sorted(value), fix=f"give one of {_KINDS}")
    [(kind, given)] = value.items()
    if kind not in CONSTRAINTS:
        raise UserError("no such constraint", value=kind, fix=nearest(kind, CONSTRAINTS))
    fits = {
        "json_schema": isinstance(given, dict),
        "json_object": given is True,
        "choice": isinstance(given, (list, tuple)) and bool(given) and all(isinstance(text, str) for text in given),
    }
    if not fits.get(kind, isinstance(given, str)):
        raise UserError("a value of another type is needed", where=kind, value=given, fix=f"give {CONSTRAINTS[kind]}")


def check_tokens(sampling: Sampling, vocabulary: int) -> None:
    """See that a request only speaks of tokens that the model has.

    Raises:
        UserError: a biased token outside the vocabulary.
    """
    for token in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            where, fix = "sampling.logit_bias", f"use 0 to {vocabulary - 1}"
            raise UserError("the model does not know this token", where=where, value=token, fix=fix)


_KINDS = ", ".join(CONSTRAINTS)


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
