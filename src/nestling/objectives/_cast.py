"""Who takes part in learning from replies, and what they say about a batch: each model reads each reply once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nestling.core.errors import UserError
from nestling.core.types import PromptRow, Scorer
from nestling.loading.batches import Batches
from nestling.loading.prompts import PromptLoader
from nestling.model.checkpoint import Checkpoint
from nestling.model.decoder import Decoder
from nestling.model.heads import Scored
from nestling.model.likelihood import token_logprobs
from nestling.objectives._episodes import Episode, closed, pad
from nestling.objectives._materials import Materials
from nestling.objectives._returns import divergence
from nestling.objectives._scoring import pad_ids, read_together
from nestling.tokenizer.bpe import Tokenizer


@dataclass
class Cast:
    """The models and the data. ``reward`` maps ids ``[B, T]`` to numbers ``[B, T]``.

    ``policy`` acts and learns, ``reward`` and ``reference`` stay as they are. ``held_out`` prompts are answered in
    validation only. ``texts`` is needed only for PPO-ptx. ``scorer`` knows the true quality of a reply, where it is
    known (the embedded world's rubric): reported, never learnt from.
    """

    policy: Decoder
    reference: Decoder
    reward: nn.Module
    tokenizer: Tokenizer
    prompts: PromptLoader
    held_out: Sequence[PromptRow] = ()
    texts: Batches | None = None
    scorer: Scorer | None = None

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        return self.policy.output_weight.device


@dataclass(frozen=True)
class Verdicts:
    """N replies and what was said of them.

    ``tokens [N, T]``, ``lengths [N]``, ``actions [N, T]`` as in ``_episodes.pad``; ``logprobs`` of the policy
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
    """Let policy, reference, reward model and scorer judge the episodes; at most ``budget`` padded tokens at a time.

    Every process gives all episodes and gets all verdicts; each model's reading is shared out.
    """
    tokens, lengths, actions = (x.to(cast.device) for x in pad(episodes, end))
    targets = action_targets(tokens, actions)

    def logprobs(model: Decoder) -> Tensor:
        read = partial(token_logprobs, model, temperature=temperature)
        return read_together(read, lengths, budget, tokens, targets)

    acted = logprobs(cast.policy)
    return Verdicts(
        tokens=tokens,
        lengths=lengths,
        actions=actions,
        logprobs=acted,
        log_ratios=acted - logprobs(cast.reference),
        proxy=reward_scores(cast, [closed(episode, end, cast.policy.config.context) for episode in episodes], budget),
        ended=torch.tensor([episode.ended for episode in episodes], device=cast.device),
        truth=[cast.scorer(episode.row, episode.text) for episode in episodes] if cast.scorer else [],
    )


def action_targets(tokens: Tensor, actions: Tensor) -> Tensor:
    """The token chosen at each position ``[N, T]``, and -1, which no model computes, where none was chosen."""
    return torch.where(actions, tokens.roll(-1, dims=1), -1)


def reward_scores(cast: Cast, replies: Sequence[Sequence[int]], budget: int) -> Tensor:
    """The reward model's score ``[N]`` of whole token sequences, read at their last token, which closes the reply."""
    tokens, lengths = (x.to(cast.device) for x in pad_ids(replies, 0))
    scores = read_together(cast.reward, lengths, budget, tokens)
    return scores.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)


class Shifted(nn.Module):
    """Scores moved so that reference responses score 0 on average (the head itself has no bias)."""

    def __init__(self, model: nn.Module, mean: float) -> None:
        super().__init__()
        self.model, self.mean = model, mean

    def forward(self, ids: Tensor) -> Tensor:
        """ids ``[B, T]`` -> scores ``[B, T]`` float32."""
        return self.model(ids) - self.mean


def scored(found: Checkpoint) -> Shifted:
    """A reward model as a module of scores, minus the "reward_mean" that its provenance may hold.

    Raises:
        UserError: the checkpoint has no scalar head.
    """
    if found.head is None:
        raise UserError("this checkpoint has no scalar head", where="reward", fix="train it with the reward stage")
    return Shifted(Scored(found.model, found.head), float(found.provenance.get("reward_mean", 0.0)))


def assemble(materials: Materials) -> Cast:
    """The cast of `materials`: models "policy" (also the reference) and "reward".

    Given: "prompts" (a PromptLoader), and where there are any "held_out" (PromptRows), "texts" (a loader, for PPO-ptx)
    and "scorer".

    Raises:
        UserError: the reward model has no scalar head, or another tokenizer than the policy.
    """
    policy, reward = materials.model("policy"), materials.frozen("reward")
    judge = scored(reward)
    if reward.tokenizer.hash != policy.tokenizer.hash:
        raise UserError("policy and reward model have different tokenizers", where="reward")
    return Cast(
        policy=policy.model,
        reference=materials.frozen("policy").model,
        reward=judge,
        tokenizer=policy.tokenizer,
        prompts=materials.need("prompts"),
        held_out=materials.given.get("held_out", ()),
        texts=materials.given.get("texts"),
        scorer=materials.given.get("scorer"),
    )
