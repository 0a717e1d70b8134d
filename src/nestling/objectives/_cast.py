"""Who takes part in PPO, and what they say about a batch of replies: each model reads each reply once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from nestling.core.types import PromptRow
from nestling.loading.batches import TokenBatch
from nestling.loading.prompts import PromptLoader
from nestling.model.decoder import Decoder
from nestling.model.likelihood import token_logprobs
from nestling.objectives._episodes import Episode, closed, pad
from nestling.objectives._returns import divergence
from nestling.objectives._scoring import by_length, pad_ids
from nestling.tokenizer.bpe import Tokenizer

Scorer = Callable[[PromptRow, str], float]
"""The true quality of a reply, where it is known (the embedded world's rubric). Reported, never learnt from."""


class Texts(Protocol):
    """Where pre-training text comes from: a pure function of the draw."""

    def batch(self, step: int) -> TokenBatch:
        """Packed rows of text."""


@dataclass
class Cast:
    """The models and the data. ``reward`` and ``value`` map ids ``[B, T]`` to numbers ``[B, T]``.

    ``reward`` and ``reference`` stay as they are; ``policy`` acts and learns, ``value`` learns. ``held_out`` prompts
    are answered in validation only. ``texts`` is needed only for PPO-ptx.
    """

    policy: Decoder
    reference: Decoder
    reward: nn.Module
    value: nn.Module
    tokenizer: Tokenizer
    prompts: PromptLoader
    held_out: Sequence[PromptRow] = ()
    texts: Texts | None = None
    scorer: Scorer | None = None

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        return self.policy.output_weight.device


@dataclass(frozen=True)
class Verdicts:
    """N replies and what was said of them.

    ``tokens [N, T]``, ``lengths [N]``, ``actions [N, T]`` as in ``_episodes.Padded``; ``logprobs`` of the policy
    and ``log_ratios`` to the reference ``[N, T]`` in nats; ``proxy [N]`` the reward model's score of the closed reply,
    ``ended [N]`` (bool), ``truth`` the scorer's verdicts (empty without a scorer).
    """

    tokens: Tensor
    lengths: Tensor
    actions: Tensor
    logprobs: Tensor
    log_ratios: Tensor
    proxy: Tensor
    ended: Tensor
    truth: list[float]

    def figures(self) -> dict[str, float]:
        """Means over replies: rewards, divergence from the reference (k1 and k3), entropy per token, length, ends."""
        kl = divergence(self.log_ratios, self.actions)
        figures = {
            "proxy_reward": float(self.proxy.mean()),
            "kl": float(kl.k1.mean()),
            "kl_k3": float(kl.k3.mean()),
            "entropy": float(-self.logprobs[self.actions].mean()),
            "response_tokens": float(self.actions.sum(dim=1).float().mean()),
            "end_rate": float(self.ended.float().mean()),
        }
        return figures | ({"true_reward": sum(self.truth) / len(self.truth)} if self.truth else {})


def score(cast: Cast, episodes: Sequence[Episode], *, end: int, temperature: float, budget: int) -> Verdicts:
    """Let policy, reference, reward model and scorer judge the episodes; at most ``budget`` padded tokens at a time."""
    padded = pad(episodes, end)
    tokens, lengths, actions = (x.to(cast.device) for x in (padded.tokens, padded.lengths, padded.actions))
    targets = action_targets(tokens, actions)

    def logprobs(model: Decoder) -> Tensor:
        read = partial(token_logprobs, model, temperature=temperature)
        return by_length(read, lengths, budget, tokens, targets)

    acted = logprobs(cast.policy)
    return Verdicts(
        tokens=tokens,
        lengths=lengths,
        actions=actions,
        logprobs=acted,
        log_ratios=acted - logprobs(cast.reference),
        proxy=_proxy(cast, episodes, end, budget),
        ended=torch.tensor([episode.ended for episode in episodes], device=cast.device),
        truth=[cast.scorer(episode.row, episode.text) for episode in episodes] if cast.scorer else [],
    )


def action_targets(tokens: Tensor, actions: Tensor) -> Tensor:
    """The token chosen at each position ``[N, T]``, and -1, which no model computes, where none was chosen."""
    return torch.where(actions, tokens.roll(-1, dims=1), -1)


def _proxy(cast: Cast, episodes: Sequence[Episode], end: int, budget: int) -> Tensor:
    """The reward model's score ``[N]``, read at the token that closes each reply."""
    context = cast.policy.config.context
    tokens, lengths = pad_ids([closed(episode, end, context) for episode in episodes], end)
    tokens, lengths = tokens.to(cast.device), lengths.to(cast.device)
    scores = by_length(cast.reward, lengths, budget, tokens)
    return scores.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)


class Shifted(nn.Module):
    """Scores moved so that reference responses score 0 on average (the head itself has no bias)."""

    def __init__(self, model: nn.Module, mean: float) -> None:
        super().__init__()
        self.model, self.mean = model, mean

    def forward(self, ids: Tensor) -> Tensor:
        """ids ``[B, T]`` -> scores ``[B, T]`` float32."""
        return self.model(ids) - self.mean
