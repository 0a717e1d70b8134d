"""What every algorithm has in common that learns from its own replies: one step, from prompts to updates.

    answer   the current policy replies to the step's prompts, through the generation engine
    judge    policy, reference and reward model read every reply once (`_cast.score`)
    weigh    the algorithm turns verdicts into an advantage for every sampled token          <- what a new file writes
    learn    epochs x minibatches of clipped updates, optionally mixed with the pre-training loss

An algorithm is a subclass of `OnPolicy` with `weigh`, and with `reply_terms` where its loss is not the clipped one. What
is the same for all of them lives here: the KL penalty with its adaptive coefficient and budget, validation on held-out
prompts, the best policy so far, the state for resuming. Tokens that were forced into a reply (tool results) are context,
never actions. A reply cut by the token limit is scored as if it were closed, minus a penalty, so that the reward model
never reads a form that it was not trained on.

Several processes share the work and not the knowledge: each answers its part of the prompts, each model reads each reply
in one of them, and all know all verdicts, so that whatever is computed over the whole batch is the same on any number.

The engine computes in the dtype of the policy's weights, which the loop keeps in bf16 under `precision: auto` where the
hardware is fast at it; log-probabilities that are learnt from are computed anew by the learner's own code.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.ranks import gather, reader, readers, sum_over_ranks
from nestling.core.runtime import stream_seed, torch_stream
from nestling.core.types import Message, PromptRow
from nestling.generation.chat import prompt_ids
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.loading.batches import TokenBatch
from nestling.model.adapters import trained
from nestling.model.decoder import Decoder
from nestling.model.likelihood import next_token_loss_sum, token_logprobs
from nestling.objectives import _returns
from nestling.objectives._cast import Cast, Verdicts, action_targets, reward_scores, score
from nestling.objectives._episodes import Episode, collect
from nestling.objectives._share import fair_share
from nestling.tokenizer.conversation import reply_ids
from nestling.training.contract import Objective, Term, Update


class PolicySettings(Config):
    """Settings that every on-policy algorithm has."""

    rollouts: int = Field(64, gt=0)
    """Replies per step."""
    samples_per_prompt: int = Field(1, gt=0)
    """Replies to each prompt; divides `rollouts`."""
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
    """Reward per nat of surprise of each sampled token (maximum-entropy RL: no second pass over the vocabulary)."""
    text_weight: float = Field(0.0, ge=0)
    """Weight of the pre-training loss per text token (PPO-ptx), beside the policy loss per reply token."""
    score_tokens: int = Field(4096, gt=0)
    """Padded tokens per forward pass when replies are scored."""

    @model_validator(mode="after")
    def _divides(self) -> PolicySettings:
        for name in ("minibatches", "samples_per_prompt"):
            if self.rollouts % (parts := getattr(self, name)):
                raise UserError(f"{name} must divide rollouts", value=parts, fix=f"rollouts={self.rollouts}")
        return self

    @property
    def prompts(self) -> int:
        """Prompts per step."""
        return self.rollouts // self.samples_per_prompt

    @property
    def sampling(self) -> Sampling:
        """The policy's own distribution: no filter that the learner's log-probabilities would not know of."""
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class Experience:
    """A step's replies with all that learning needs; N replies, right-padded to T tokens.

    ``tokens [N, T]``, ``lengths [N]``; per position ``[N, T]``: ``actions`` (bool, see ``_episodes.pad``),
    ``logprobs`` at sampling time and ``advantages``. An algorithm that needs more per position adds fields.
    """

    tokens: Tensor
    lengths: Tensor
    actions: Tensor
    logprobs: Tensor
    advantages: Tensor

    def take(self, rows: Tensor) -> Experience:
        """Some replies, trimmed to the longest of them."""
        width = int(self.lengths[rows].max())
        parts = {f.name: getattr(self, f.name)[rows] for f in fields(self)}
        return replace(self, **{name: x[:, :width] if x.dim() == 2 else x for name, x in parts.items()})


class OnPolicy(Objective):
    """Policy optimisation as the module says. State beside the parameters: the penalty coefficient, the best policy."""

    fixed_shapes = False

    def __init__(self, settings: PolicySettings, cast: Cast, seed: int) -> None:
        if settings.prompts != cast.prompts.batch_rows:
            raise UserError("the loader gives another number of prompts", where="rollouts", value=settings.rollouts)
        if settings.text_weight and cast.texts is None:
            raise UserError("mixing in pre-training loss needs text", where="text_weight", value=settings.text_weight)
        fair_share(settings.rollouts // settings.minibatches, "rollouts per minibatch")
        self.settings, self.cast, self.seed = settings, cast, seed
        for frozen in (cast.reference, cast.reward):
            frozen.requires_grad_(False)
        for model in (cast.policy, cast.reference, cast.reward):
            without_dropout(model)
        self.engine = Engine(cast.policy, cast.tokenizer, rows=settings.rollouts)
        self.end = cast.tokenizer.turn_end
        self.beta = settings.beta
        self.best: dict[str, Tensor] = {}
        self.best_figures: dict[str, float] = {}
        self._kl, self._held_out_kl = 0.0, 0.0
        self._metrics: dict[str, float] = {}
        self._tally = {"clipped": 0.0, "actions": 0.0}

    # --- what an algorithm says ----------------------------------------------------------------------------------

    @abstractmethod
    def weigh(self, verdicts: Verdicts) -> tuple[Experience, dict[str, float]]:
        """The step's experience, and further figures of it. The replies to one prompt stand together.

        Everything over the whole batch (whitening, baselines of a group) happens here, never in ``terms``.
        """

    def reply_terms(self, microbatch: Any, logprobs: Tensor) -> list[Term]:
        """The loss on replies, from the policy's present log-probabilities ``[N, T]``; PPO's clipped surrogate."""
        losses, clipped = _returns.clipped_policy_losses(
            logprobs, microbatch.logprobs, microbatch.advantages, microbatch.actions, self.settings.clip
        )
        self._tally["clipped"] += float(clipped.sum())
        self._tally["actions"] += float(microbatch.actions.sum())
        return [Term("policy_loss", losses.sum(), per="tokens")]

    def rewards(self, verdicts: Verdicts) -> Tensor:
        """Reward of each sampled token ``[N, T]``: KL penalty, entropy bonus, and the reply's score at its end."""
        scores = verdicts.proxy - self.settings.missing_end_penalty * (~verdicts.ended).float()
        rewards = _returns.shaped_rewards(verdicts.log_ratios, scores, verdicts.actions, self.beta)
        return rewards - self.settings.entropy_bonus * torch.where(verdicts.actions, verdicts.logprobs, 0.0)

    # --- one step ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The algorithm's name, which is its file's."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def policy(self) -> Decoder:
        """What acts and learns."""
        return self.cast.policy

    def trainable(self) -> dict[str, nn.Module]:
        """The policy."""
        return {"policy": self.cast.policy}

    def updates(self, step: int) -> Iterator[Update]:
        """Fresh replies of the current policy, then ``epochs x minibatches`` updates on them."""
        if self.cast.held_out and not self.best:
            self.validate()  # The starting policy is a candidate too: a run that only harms gives it back.
        experience = self.experience(step)
        self._tally = {"clipped": 0.0, "actions": 0.0}
        parts = self.settings.minibatches
        for epoch in range(self.settings.epochs):
            stream = torch_stream(self.seed, f"{self.name} order", step, epoch)
            order = torch.randperm(len(experience.lengths), generator=stream)
            for k, rows in enumerate(order.chunk(parts)):
                draw = ((step - 1) * self.settings.epochs + epoch) * parts + k
                yield self._update(experience.take(rows.to(experience.lengths.device)), draw)
        self._finish_step()

    def experience(self, step: int) -> Experience:
        """Sample, score and weigh one batch."""
        prompts = self.cast.prompts.batch(step - 1)
        rows = [prompt.row for prompt in prompts for _ in range(self.settings.samples_per_prompt)]
        verdicts = self._answer(rows, stream_seed(self.seed, f"{self.name} replies", step, 0))
        experience, figures = self.weigh(verdicts)
        self._metrics = verdicts.figures() | figures
        return experience

    def _answer(self, rows: Sequence[PromptRow], seed: int) -> Verdicts:
        """The current policy's replies, scored; every process answers its share of the rows and learns of all."""
        start, stop = fair_share(len(rows))
        mine = collect(self.engine, self.cast.tokenizer, rows[start:stop], self.settings.sampling, seed, start)
        written = [(e.prompt, e.reply, e.sampled, e.text, e.ended) for e in mine]
        every = [episode for part in gather(written) for episode in part] if readers() > 1 else written
        episodes = [Episode(row, *parts) for row, parts in zip(rows, every, strict=True)]
        temperature, budget = self.settings.temperature, self.settings.score_tokens
        return score(self.cast, episodes, end=self.end, temperature=temperature, budget=budget)

    def _update(self, minibatch: Experience, draw: int) -> Update:
        """This process's share of a minibatch in pieces of similar length, and of its text."""
        by_size = torch.argsort(minibatch.lengths, stable=True)[reader() :: readers()]
        pieces: list[Any] = [minibatch.take(rows) for rows in by_size.chunk(self.settings.microbatches)]
        counts = {"tokens": float(minibatch.actions.sum()), "replies": float(len(minibatch.lengths))}
        if self.settings.text_weight and self.cast.texts:
            text = self.cast.texts.batch(draw)
            pieces.append(text.rows(*fair_share(len(text), "text_rows")).to(self.cast.device))
            counts["text_tokens"] = float(text.weights.sum())
        return Update(pieces, counts)

    def terms(self, microbatch: Experience | TokenBatch) -> list[Term]:
        """The algorithm's loss on replies, or the pre-training loss on text."""
        if isinstance(microbatch, TokenBatch):
            loss = next_token_loss_sum(self.cast.policy, microbatch)
            return [Term("text_loss", loss, per="text_tokens", weight=self.settings.text_weight)]
        targets = action_targets(microbatch.tokens, microbatch.actions)
        temperature = self.settings.temperature
        logprobs = token_logprobs(self.cast.policy, microbatch.tokens, targets, temperature=temperature)
        return self.reply_terms(microbatch, logprobs)

    def _finish_step(self) -> None:
        """After the last update: the clip fraction, and the coefficient of the next step."""
        self._kl = self._metrics["kl"]
        self._metrics["beta"] = self.beta
        tally = sum_over_ranks(self._tally)
        self._metrics["clip_fraction"] = tally["clipped"] / max(tally["actions"], 1.0)
        if self.settings.kl_target:
            target, horizon = self.settings.kl_target, self.settings.horizon
            self.beta = _returns.next_beta(
                self.beta, self._kl, target=target, sequences=self.settings.rollouts, horizon=horizon
            )

    def metrics(self) -> dict[str, float]:
        """Rewards, divergence, entropy, length and ends of the step's replies, and how the updates went."""
        return self._metrics

    # --- what came of it -----------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Figures on the held-out prompts (`val_…`), with the same random numbers each time; keeps the best policy.

        Best is the highest held-out reward of the reward model among the policies within the KL budget.
        """
        if not self.cast.held_out:
            return {}
        figures = self._answer(self.cast.held_out, stream_seed(self.seed, f"{self.name} held out")).figures()
        within = self.settings.kl_budget is None or figures["kl"] <= self.settings.kl_budget
        if within and figures["proxy_reward"] > self.best_figures.get("proxy_reward", float("-inf")):
            self.best_figures = figures
            self.best = {name: x.detach().to("cpu", copy=True) for name, x in trained(self.cast.policy).items()}
        self._held_out_kl = figures["kl"]
        return {f"val_{name}": value for name, value in figures.items()}

    def finished(self) -> str | None:
        """Ends training when the divergence of the last replies is beyond the budget."""
        budget, kl = self.settings.kl_budget, max(self._kl, self._held_out_kl)
        if budget is None or kl <= budget:
            return None
        return f"the policy is {kl:.1f} nats per reply from the reference, beyond the budget of {budget:g}"

    def restore_best(self) -> dict[str, float]:
        """Put the best policy so far in place and return its held-out figures (empty when nothing was validated)."""
        if self.best:
            self.cast.policy.load_state_dict(self.best, strict=False)  # what is frozen is as it was
        return self.best_figures

    def proxy_scores(self, rows: Sequence[PromptRow], texts: Sequence[str]) -> list[float]:
        """The reward model's score of one text per prompt, read as `validate` reads it; a text too long is cut."""
        whole = [self._closed(row, text) for row, text in zip(rows, texts, strict=True)]
        return reward_scores(self.cast, whole, self.settings.score_tokens).tolist()

    def _closed(self, row: PromptRow, text: str) -> list[int]:
        """Ids of prompt and reply, up to the token that closes it."""
        reply = reply_ids(self.cast.tokenizer, Message(role="assistant", content=text))
        prompt = prompt_ids(self.cast.tokenizer, row.prompt, row.tools)
        return [*(prompt + reply[:-1])[: self.cast.policy.config.context - 1], self.end]

    def state_dict(self) -> dict[str, Any]:
        """The coefficient and the best policy."""
        best = {"best": self.best, "best_figures": self.best_figures}
        return {"beta": self.beta, "held_out_kl": self._held_out_kl, **best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.beta, self._held_out_kl = float(state["beta"]), float(state["held_out_kl"])
        self.best, self.best_figures = dict(state["best"]), dict(state["best_figures"])


def without_dropout(model: nn.Module) -> None:
    """Sampling and learning must see the same function, or the ratio of the first update isn't 1."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def scramble_masked(microbatch: Experience | TokenBatch, seed: int) -> Experience | TokenBatch:
    """For the contract tests: other padding, other numbers wherever no token was sampled, other unlearnt text."""
    stream = torch_stream(seed, "scramble")
    if isinstance(microbatch, TokenBatch):
        noise = torch.randint(0, 256, microbatch.targets.shape, generator=stream)
        return replace(microbatch, targets=torch.where(microbatch.weights > 0, microbatch.targets, noise))
    changed = {}
    for name in (field.name for field in fields(microbatch)):
        known: Tensor = getattr(microbatch, name)
        if known.is_floating_point():
            changed[name] = torch.where(microbatch.actions, known, torch.randn(known.shape, generator=stream))
    places = torch.arange(microbatch.tokens.shape[1])
    noise = torch.randint(0, 256, microbatch.tokens.shape, generator=stream)
    inside = places < microbatch.lengths.unsqueeze(1)
    return replace(microbatch, tokens=torch.where(inside, microbatch.tokens, noise), **changed)
