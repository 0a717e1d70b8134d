"""Proximal policy optimisation against a reward model (Ouyang et al. 2022, section 3.5; Stiennon et al. 2020).

What PPO adds to `_on_policy`: a value model, initialised from the reward model, that says how much reward a state still
promises. Score and KL penalty are spread over the sampled tokens, advantages are estimated against the values (GAE) and
whitened over the whole batch, and the value model learns beside the policy, its loss clipped like the policy's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from nestling.model.heads import ScalarHead, Scored
from nestling.objectives import _on_policy, _returns, _toys
from nestling.objectives._cast import Cast, Verdicts, assemble, scored
from nestling.objectives._materials import Materials
from nestling.objectives._on_policy import Experience, OnPolicy, PolicySettings, without_dropout
from nestling.objectives._scoring import read_together
from nestling.training.contract import Term

READS = ("policy", "reward")
IMPROVES = ("val_proxy_reward", "up")
scramble_masked = _on_policy.scramble_masked


class Settings(PolicySettings):
    """Settings of PPO."""

    value_clip: float = Field(0.2, gt=0)
    """How far a value may move from its old estimate before its gradient ends."""
    value_weight: float = Field(0.5, ge=0)
    """Weight of the value loss; the value model is a network of its own."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per sampled token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's trade-off: 1 is the plain return, 0 the one-step temporal difference."""


@dataclass(frozen=True)
class Valued(Experience):
    """Experience with the ``values`` at sampling time and the ``returns`` that they are taught, both ``[N, T]``."""

    values: Tensor
    returns: Tensor


class PPO(OnPolicy):
    """Policy optimisation with a learnt value; ``value`` maps ids ``[B, T]`` to numbers ``[B, T]``."""

    settings: Settings

    def __init__(self, settings: Settings, cast: Cast, value: nn.Module, seed: int) -> None:
        super().__init__(settings, cast, seed)
        without_dropout(value)
        self.value = value

    def trainable(self) -> dict[str, nn.Module]:
        """Policy and value model."""
        return {"policy": self.cast.policy, "value": self.value}

    def weigh(self, verdicts: Verdicts) -> tuple[Valued, dict[str, float]]:
        """Advantages and value targets from rewards and values; advantages whitened over the whole batch."""
        actions, budget = verdicts.actions, self.settings.score_tokens
        values = read_together(self.value, verdicts.lengths, budget, verdicts.tokens)
        gamma, lam = self.settings.gamma, self.settings.lam
        advantages, returns = _returns.advantages_and_returns(
            self.rewards(verdicts), values, actions, gamma=gamma, lam=lam
        )
        whitened = _returns.whiten(advantages, actions, _returns.moments(advantages, actions))
        explained = {"value_explained_variance": _returns.explained_variance(values[actions], returns[actions])}
        return Valued(
            verdicts.tokens, verdicts.lengths, actions, verdicts.logprobs, whitened, values=values, returns=returns
        ), explained

    def reply_terms(self, microbatch: Any, logprobs: Tensor) -> list[Term]:
        """Policy and value loss."""
        losses = _returns.clipped_value_losses(
            self.value(microbatch.tokens), microbatch.values, microbatch.returns, microbatch.actions,
            self.settings.value_clip,
        )  # fmt: skip
        value = Term("value_loss", losses.sum(), per="tokens", weight=self.settings.value_weight)
        return [*super().reply_terms(microbatch, logprobs), value]


def build(settings: Settings, materials: Materials) -> PPO:
    """PPO on `materials`: models "policy" (also the reference) and "reward" (also where the value model starts).

    What the stage gives, and errors, as in `_cast.assemble`.
    """
    cast = assemble(materials)
    return PPO(settings, cast, scored(materials.model("reward")), materials.seed)


def toy(seed: int, microbatches: int = 1) -> PPO:
    """A two-layer policy learns to write even token ids, with the alphabet as its pre-training text."""
    settings = Settings(**_toys.POLICY, microbatches=microbatches)
    value = _toys.small_decoder(_toys.byte_tokenizer(), seed)
    return PPO(settings, _toys.cast(seed, settings.prompts), Scored(value, ScalarHead(value.config)), seed)
