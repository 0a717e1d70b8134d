"""The parameters of decoding that chat, completions and responses share, and what they mean to the engine."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from nestling.core.config import parse
from nestling.core.errors import UserError
from nestling.generation.sampling import Sampling
from nestling.serving.errors import ApiError
from nestling.serving.protocol.messages import Wire

MAX_STOPS = 4
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Decoding(Wire):
    """OpenAI's parameters, then those that other servers of open models offer under the same names."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Bias] | None = None
    # beyond OpenAI's
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    epsilon_cutoff: float | None = Field(None, ge=0, lt=1)
    eta_cutoff: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    min_tokens: int | None = Field(None, ge=0)
    constraint: dict[str, Any] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > MAX_STOPS:
            raise UserError(f"at most {MAX_STOPS} stop texts", value=len(texts))
        if "" in texts:
            raise UserError("a stop text is empty")
        return stop

    def sampling(self, vocabulary: int, **changes: Any) -> Sampling:
        """What the engine is asked.

        Args:
            vocabulary: token ids that `logit_bias` may name lie below.
            changes: what a route knows better, such as max_tokens; None is left at its default.

        Raises:
            ApiError: a combination that makes no sense, a token id that the model does not have.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in PLAIN}
        given["top_p"] = self.top_p or (None if self.top_p is None else TINY)
        given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given["logit_bias"] = _bias(self.logit_bias or {}, vocabulary) | changes.pop("logit_bias", {})
        given |= {name: value for name, value in changes.items() if value is not None}
        try:
            return parse(Sampling, {name: value for name, value in given.items() if value is not None}, "")
        except UserError as error:
            raise ApiError.of(error) from None


PLAIN = ("temperature", "presence_penalty", "frequency_penalty", "top_k", "min_p", "typical_p", "epsilon_cutoff",
         "eta_cutoff", "repetition_penalty", "min_tokens", "constraint")  # fmt: skip
"""Fields that the engine knows under the same name."""
TINY = 1e-9
"""For top_p = 0, which OpenAI allows: only the likeliest token is left."""


def _bias(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    for name in given:
        if int(name) >= vocabulary:
            what = f"logit_bias: the model has no token {name}; its ids end at {vocabulary - 1}"
            raise ApiError(what, param="logit_bias", code="invalid_value")
    return {int(name): value for name, value in given.items()}
