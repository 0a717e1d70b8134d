"""Proximal policy optimisation against a reward model (Ouyang et al. 2022, section 3.5; Stiennon et al. 2020).

One step: answer the prompts with the current policy, score every reply once (reward model, reference, value model),
spread score and KL penalty over the sampled tokens, estimate advantages and whiten them over the whole batch; then
take ``epochs x minibatches`` clipped updates of policy and value model, optionally mixed with the pre-training loss.
Tokens that were forced into a reply (tool results) are context, never actions.

Where code differs from the paper: a reply cut by the token limit is scored as if it were closed, minus a penalty, so
that the reward model never reads a form that it was not trained on; and the entropy bonus, off by default, is part of
the reward (maximum-entropy RL), so it needs no second pass over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.ranks import sum_over_ranks
from nestling.core.runtime import stream_seed, torch_stream
from nestling.core.types import Message, PromptRow
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.loading.batches import TokenBatch
from nestling.loading.prompts import PromptLoader
from nestling.model.decoder import Decoder
from nestling.model.heads import ScalarHead, Scored
from nestling.model.likelihood import next_token_loss_sum, token_logprobs
from nestling.objectives import _returns, _toys
from nestling.objectives._cast import Cast, Scorer, Shifted, Verdicts, action_targets, score
from nestling.objectives._episodes import collect
from nestling.objectives._materials import Materials
from nestling.objectives._scoring import by_length
from nestling.objectives._share import own_share
from nestling.tokenizer.conversation import render, reply_ids
from nestling.tokenizer.special import TURN_END
from nestling.training.contract import Objective, Term, Update

READS = ("policy", "reward")
IMPROVES = ("val_proxy_reward", "up")


class Settings(Config):
    """Settings of PPO."""

    rollouts: int = Field(64, gt=0)
    """Replies per step."""
    max_tokens: int = Field(48, gt=0)
    """Most tokens of a reply."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of sampling and of every log-probability, reference included."""
    epochs: int = Field(1, gt=0)
    """Passes over the step's replies."""
    minibatches: int = Field(2, gt=0)
    """Optimiser updates per pass; divides `rollouts`."""
    microbatches: int = Field(1, gt=0)
    """Pieces, of similar length, that a minibatch is computed in; the gradient is the same."""
    clip: float = Field(0.2, gt=0)
    """How far the probability ratio of a token may move from 1 before its gradient ends."""
    value_clip: float = Field(0.2, gt=0)
    """How far a value may move from its old estimate before its gradient ends."""
    value_weight: float = Field(0.5, ge=0)
    """Weight of the value loss; the value model is a network of its own."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per sampled token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's trade-off: 1 is the plain return, 0 the one-step temporal difference."""
    beta: float = Field(0.05, ge=0)
    """First coefficient of the KL penalty per token, in reward per nat."""
    kl_target: float | None = Field(6.0, gt=0)
    """Divergence (nats per reply) that the adaptive coefficient steers to; None keeps `beta` fixed."""
    horizon: float = Field(1000.0, gt=0)
    """Replies over which the adaptive coefficient reacts; smaller is faster."""
    kl_budget: float | None = Field(12.0, gt=0)
    """Divergence (nats per reply) at which training stops and beyond which no state is kept; None lifts the budget."""
    missing_end_penalty: float = Field(1.0, ge=0)
    """Subtracted from the score of a reply that the token limit cut."""
    entropy_bonus: float = Field(0.0, ge=0)
    """Reward per nat of surprise of each sampled token."""
    text_weight: float = Field(0.0, ge=0)
    """Weight of the pre-training loss per text token (PPO-ptx), beside the policy loss per reply token."""
    score_tokens: int = Field(4096, gt=0)
    """Padded tokens per forward pass when replies are scored."""

    @model_validator(mode="after")
    def _divides(self) -> Settings:
        if self.rollouts % self.minibatches:
            raise UserError("minibatches must divide rollouts", value=self.minibatches, fix=f"rollouts={self.rollouts}")
        return self

    @property
    def sampling(self) -> Sampling:
        """The policy's own distribution: no filter that the learner's log-probabilities would not know of."""
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class Experience:
    """A step's replies with all that learning needs; N replies, right-padded to T tokens.

    ``tokens [N, T]``, ``lengths [N]``; per position ``[N, T]``: ``actions`` (bool, see ``_episodes.Padded``),
    ``logprobs`` and ``values`` at sampling time, ``advantages`` (whitened over the batch), ``returns``.
    """

    tokens: Tensor
    lengths: Tensor
    actions: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def take(self, rows: Tensor) -> Experience:
        """Some replies, trimmed to the longest of them."""
        width = int(self.lengths[rows].max())
        parts = (getattr(self, f.name)[rows] for f in fields(self))
        return Experience(*(x[:, :width] if x.dim() == 2 else x for x in parts))


class PPO(Objective):
    """Policy optimisation as the module says. State beside the parameters: the penalty coefficient, the best policy."""

    def __init__(self, settings: Settings, cast: Cast, seed: int) -> None:
        if settings.rollouts != cast.prompts.batch_rows:
            raise UserError("the loader gives another number of prompts", where="rollouts", value=settings.rollouts)
        if settings.text_weight and cast.texts is None:
            raise UserError("mixing in pre-training loss needs text", where="text_weight", value=settings.text_weight)
        self.settings, self.cast, self.seed = settings, cast, seed
        for frozen in (cast.reference, cast.reward):
            frozen.requires_grad_(False)
        for model in (cast.policy, cast.reference, cast.reward, cast.value):
            _without_dropout(model)
        self.engine = Engine(cast.policy, cast.tokenizer, rows=settings.rollouts)
        self.end = cast.tokenizer.id(TURN_END)
        self.beta = settings.beta
        self.best: dict[str, Tensor] = {}
        self.best_figures: dict[str, float] = {}
        self._kl, self._held_out_kl = 0.0, 0.0
        self._metrics: dict[str, float] = {}
        self._tally: dict[str, float] = {}

    @property
    def policy(self) -> Decoder:
        """What acts and learns."""
        return self.cast.policy

    def trainable(self) -> dict[str, nn.Module]:
        """Policy and value model."""
        return {"policy": self.cast.policy, "value": self.cast.value}

    def updates(self, step: int) -> Iterator[Update]:
        """Fresh replies of the current policy, then ``epochs x minibatches`` updates on them."""
        if self.cast.held_out and not self.best:
            self.validate()  # The starting policy is a candidate too: a run that only harms gives it back.
        experience = self.experience(step)
        self._tally = {"clipped": 0.0, "actions": 0.0}
        parts = self.settings.minibatches
        for epoch in range(self.settings.epochs):
            order = torch.randperm(len(experience.lengths), generator=torch_stream(self.seed, "ppo order", step, epoch))
            for k, rows in enumerate(order.chunk(parts)):
                draw = ((step - 1) * self.settings.epochs + epoch) * parts + k
                yield self._update(experience.take(rows.to(experience.lengths.device)), draw)
        self._finish_step()

    def experience(self, step: int) -> Experience:
        """Sample, score and weigh one batch. Everything over the whole batch happens here, never in ``terms``."""
        start, stop = own_share(self.settings.rollouts, "ppo.rollouts")
        rows = [prompt.row for prompt in self.cast.prompts.batch(step - 1)[start:stop]]
        scored = self._answer(rows, stream_seed(self.seed, "ppo replies", step, start))
        budget, actions = self.settings.score_tokens, scored.actions
        values = by_length(self.cast.value, scored.lengths, budget, scored.tokens)
        scores = scored.proxy - self.settings.missing_end_penalty * (~scored.ended).float()
        rewards = _returns.shaped_rewards(scored.log_ratios, scores, actions, self.beta)
        rewards = rewards - self.settings.entropy_bonus * torch.where(actions, scored.logprobs, 0.0)
        gamma, lam = self.settings.gamma, self.settings.lam
        advantages, returns = _returns.advantages_and_returns(rewards, values, actions, gamma=gamma, lam=lam)
        explained = {"value_explained_variance": _returns.explained_variance(values[actions], returns[actions])}
        self._metrics = mean_over_ranks(scored.figures() | explained)
        whitened = _returns.whiten(advantages, actions, sum_over_ranks(_returns.moments(advantages, actions)))
        return Experience(scored.tokens, scored.lengths, actions, scored.logprobs, values, whitened, returns)

    def _answer(self, rows: Sequence[PromptRow], seed: int) -> Verdicts:
        """The current policy's replies, scored."""
        temperature, budget = self.settings.temperature, self.settings.score_tokens
        episodes = collect(self.engine, self.cast.tokenizer, rows, self.settings.sampling, seed)
        return score(self.cast, episodes, end=self.end, temperature=temperature, budget=budget)

    def _update(self, minibatch: Experience, draw: int) -> Update:
        """A minibatch in pieces of similar length, and its share of text."""
        by_size = torch.argsort(minibatch.lengths, stable=True)
        pieces: list[Any] = [minibatch.take(rows) for rows in by_size.chunk(self.settings.microbatches)]
        counts = {"tokens": float(minibatch.actions.sum())}
        if self.settings.text_weight and self.cast.texts:
            text = self.cast.texts.batch(draw)
            pieces.append(text.to(self.cast.device))
            counts["text_tokens"] = float(text.weights.sum())
        return Update(pieces, sum_over_ranks(counts))

    def terms(self, microbatch: Experience | TokenBatch) -> list[Term]:
        """Policy and value loss of replies, or the pre-training loss of text."""
        if isinstance(microbatch, TokenBatch):
            loss = next_token_loss_sum(self.cast.policy, microbatch)
            return [Term("text_loss", loss, per="text_tokens", weight=self.settings.text_weight)]
        tokens, actions = microbatch.tokens, microbatch.actions
        targets = action_targets(tokens, actions)
        logprobs = token_logprobs(self.cast.policy, tokens, targets, temperature=self.settings.temperature)
        policy, clipped = _returns.clipped_policy_losses(
            logprobs, microbatch.logprobs, microbatch.advantages, actions, self.settings.clip
        )
        value = _returns.clipped_value_losses(
            self.cast.value(tokens), microbatch.values, microbatch.returns, actions, self.settings.value_clip
        )
        self._tally["clipped"] = self._tally.get("clipped", 0.0) + float(clipped.sum())
        self._tally["actions"] = self._tally.get("actions", 0.0) + float(actions.sum())
        return [
            Term("policy_loss", policy.sum(), per="tokens"),
            Term("value_loss", value.sum(), per="tokens", weight=self.settings.value_weight),
        ]

    def _finish_step(self) -> None:
        """After the last update: the clip fraction, and the coefficient of the next step."""
        self._kl = self._metrics["kl"]
        self._metrics["beta"] = self.beta
        self._metrics["clip_fraction"] = self._tally["clipped"] / max(self._tally["actions"], 1.0)
        if self.settings.kl_target:
            target, horizon = self.settings.kl_target, self.settings.horizon
            self.beta = _returns.next_beta(
                self.beta, self._kl, target=target, sequences=self.settings.rollouts, horizon=horizon
            )

    def metrics(self) -> dict[str, float]:
        """Rewards, divergence, entropy, length and ends of the step's replies, and how the updates went."""
        return self._metrics

    def validate(self) -> dict[str, float]:
        """Figures on the held-out prompts (`val_…`), with the same random numbers each time; keeps the best policy.

        Best is the highest held-out reward of the reward model among the policies within the KL budget.
        """
        if not self.cast.held_out:
            return {}
        figures = self._answer(self.cast.held_out, stream_seed(self.seed, "ppo held out")).figures()
        figures = mean_over_ranks(figures)
        within = self.settings.kl_budget is None or figures["kl"] <= self.settings.kl_budget
        if within and figures["proxy_reward"] > self.best_figures.get("proxy_reward", float("-inf")):
            self.best_figures = figures
            self.best = {name: x.detach().to("cpu", copy=True) for name, x in self.cast.policy.state_dict().items()}
        self._held_out_kl = figures["kl"]
        return {f"val_{name}": value for name, value in figures.items()}

    def finished(self) -> str | None:
        """Ends training when the divergence of the last replies is beyond the budget."""
        budget, kl = self.settings.kl_budget, max(self._kl, self._held_out_kl)
        if budget is None or kl <= budget:
            return None
        return f"the policy is {kl:.1f} nats per reply from the reference, beyond the budget of {budget:g}"

    def proxy_scorer(self) -> Scorer:
        """The reward model as a scorer of (row, text), read as `validate` reads it; a text too long is cut."""

        def scorer(row: PromptRow, text: str) -> float:
            reply = reply_ids(self.cast.tokenizer, Message(role="assistant", content=text))
            prompt = render(self.cast.tokenizer, row.prompt, row.meta.get("tools", ()), prompt=True).ids
            whole = [*(prompt + reply[:-1])[: self.cast.policy.config.context - 1], self.end]
            with torch.no_grad():
                return float(self.cast.reward(torch.tensor([whole], device=self.cast.device))[0, -1])

        return scorer

    def restore_best(self) -> dict[str, float]:
        """Put the best policy so far in place and return its held-out figures (empty when nothing was validated)."""
        if self.best:
            self.cast.policy.load_state_dict(self.best)
        return self.best_figures

    def state_dict(self) -> dict[str, Any]:
        """The coefficient and the best policy."""
        best = {"best": self.best, "best_figures": self.best_figures}
        return {"beta": self.beta, "held_out_kl": self._held_out_kl, **best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.beta, self._held_out_kl = float(state["beta"]), float(state["held_out_kl"])
        self.best, self.best_figures = dict(state["best"]), dict(state["best_figures"])


def mean_over_ranks(figures: dict[str, float]) -> dict[str, float]:
    """Each figure averaged over the ranks, which hold equally many replies: all of them then decide alike."""
    total = sum_over_ranks(figures | {"ranks": 1.0})
    return {name: total[name] / total["ranks"] for name in figures}


def _without_dropout(model: nn.Module) -> None:
    """Sampling and learning must see the same function, or the ratio of the first update isn't 1."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def build(settings: Settings, materials: Materials) -> PPO:
    """PPO on `materials`: models "policy" (also the reference) and "reward" (also where the value model starts).

    Given: "prompts" (a PromptLoader of `rollouts` rows), and where there are any "held_out" (PromptRows), "texts" (a
    loader, for PPO-ptx) and "scorer". The reward model's provenance may hold "reward_mean", which is subtracted.

    Raises:
        UserError: the reward model has no scalar head, or another tokenizer than the policy.
    """
    policy = materials.model("policy")
    value, reward = materials.model("reward"), materials.frozen("reward")
    if value.head is None or reward.head is None:
        raise UserError("this checkpoint has no scalar head", where="reward", fix="train it with the reward stage")
    if reward.tokenizer.hash != policy.tokenizer.hash:
        raise UserError("policy and reward model have different tokenizers", where="reward")
    mean = float(reward.provenance.get("reward_mean", 0.0))
    cast = Cast(
        policy=policy.model,
        reference=materials.frozen("policy").model,
        reward=Shifted(Scored(reward.model, reward.head), mean),
        value=Shifted(Scored(value.model, value.head), mean),
        tokenizer=policy.tokenizer,
        prompts=materials.need("prompts"),
        held_out=materials.given.get("held_out", ()),
        texts=materials.given.get("texts"),
        scorer=materials.given.get("scorer"),
    )
    return PPO(settings, cast, materials.seed)


def toy(seed: int, microbatches: int = 1) -> PPO:
    """A two-layer policy learns to write even token ids, with the alphabet as its pre-training text."""
    tokenizer = _toys.byte_tokenizer()
    policy, reference, value = (_toys.small_decoder(tokenizer, seed) for _ in range(3))
    settings = Settings(
        rollouts=16, max_tokens=8, minibatches=2, microbatches=microbatches, beta=0.01, kl_target=None, kl_budget=None,
        text_weight=0.01,
    )  # fmt: skip
    rows = _toys.letter_prompts(28, seed)
    prompts = PromptLoader(rows[:20], tokenizer, policy.config.context, settings.rollouts, seed, reserve=8)
    cast = Cast(
        policy=policy,
        reference=reference,
        reward=_toys.Taste(),
        value=Scored(value, ScalarHead(value.config)),
        tokenizer=tokenizer,
        prompts=prompts,
        held_out=rows[20:],
        texts=_toys.Alphabet(),
    )
    return PPO(settings, cast, seed)


def scramble_masked(microbatch: Experience | TokenBatch, seed: int) -> Experience | TokenBatch:
    """Other padding, and other numbers wherever no token was sampled; other targets where text is not learnt."""
    stream = torch_stream(seed, "scramble")
    if isinstance(microbatch, TokenBatch):
        noise = torch.randint(0, 256, microbatch.targets.shape, generator=stream)
        return replace(microbatch, targets=torch.where(microbatch.weights > 0, microbatch.targets, noise))
    changed = {}
    for name in ("logprobs", "values", "advantages", "returns"):
        known: Tensor = getattr(microbatch, name)
        changed[name] = torch.where(microbatch.actions, known, torch.randn(known.shape, generator=stream))
    places = torch.arange(microbatch.tokens.shape[1])
    noise = torch.randint(0, 256, microbatch.tokens.shape, generator=stream)
    inside = places < microbatch.lengths.unsqueeze(1)
    return replace(microbatch, tokens=torch.where(inside, microbatch.tokens, noise), **changed)
