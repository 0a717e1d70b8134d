"""The reward model: a decoder that learns, from rankings, how good people find a response (Ouyang et al. 2022).

All pairs of a prompt stand in one microbatch and weigh 1 / (number of pairs): loss = -1/C(K, 2) sum log sigmoid(r_w -
r_l), averaged over prompts (equation 1). A tie gives no pair. The score is read at the token that closes the response.
Because only differences are learnt, the mean is free: `reference_score` measures it on reference responses, and whoever
optimises the reward subtracts it, so that a reference response scores 0 on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor, nn

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.intervals import Interval, bootstrap
from nestling.core.ranks import sum_over_ranks
from nestling.core.types import Conversation, Ranking
from nestling.loading.preferences import RankingBatch, RankingLoader
from nestling.model.heads import ScalarHead, Scored
from nestling.objectives import _toys
from nestling.objectives._materials import Materials
from nestling.objectives._pairs import Bin, all_pairs, calibration_error, pair_losses, reliability, right
from nestling.objectives._scoring import length_groups, pad_ids, read_together
from nestling.objectives._share import fair_share
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render
from nestling.training.contract import Objective, Term, Update

READS = ("model",)
IMPROVES = ("val_pair_loss", "down")


class Settings(Config):
    """Settings of the reward model."""

    microbatches: int = Field(1, gt=0)
    """Pieces that a step is computed in; the gradient is the same."""
    score_tokens: int = Field(2048, gt=0)
    """Padded tokens per forward pass."""


@dataclass(frozen=True)
class Judgement:
    """How well a reward model orders held-out responses. Accuracy is over pairs, its interval resamples prompts.

    ``Judgement(accuracy=0.88, interval=Interval(0.85, 0.91), pairs=1200, prompts=150, calibration_error=0.03, ...)``
    """

    accuracy: float
    interval: Interval
    pairs: int
    prompts: int
    loss: float
    calibration_error: float
    bars: list[Bin]

    def figures(self, prefix: str = "") -> dict[str, float]:
        """Flat numbers for a row of metrics."""
        return {
            f"{prefix}pairwise_accuracy": self.accuracy,
            f"{prefix}pairwise_accuracy_low": self.interval.low,
            f"{prefix}pairwise_accuracy_high": self.interval.high,
            f"{prefix}pairs": float(self.pairs),
            f"{prefix}pair_loss": self.loss,
            f"{prefix}calibration_error": self.calibration_error,
        }


def judge(scores: Sequence[Sequence[float]], grades: Sequence[Sequence[float]]) -> Judgement:
    """Compare a model's scores with the grades of each prompt's responses; ties of the grades are left out.

    Raises:
        ValueError: there is no pair to compare.
    """
    group = torch.tensor([place for place, row in enumerate(scores) for _ in row])
    flat = torch.tensor([x for row in scores for x in row], dtype=torch.float64)
    pairs = all_pairs(group, torch.tensor([x for row in grades for x in row], dtype=torch.float64))
    if len(pairs.group) == 0:
        raise ValueError("no two responses to a prompt differ in grade")
    margins = flat[pairs.better] - flat[pairs.worse]
    counts = torch.bincount(pairs.group, minlength=len(scores))
    hits = torch.bincount(pairs.group, weights=right(margins), minlength=len(scores))
    asked = counts > 0
    bars = reliability(margins.tolist())
    return Judgement(
        accuracy=float(hits.sum() / counts.sum()),
        interval=bootstrap(hits[asked].tolist(), counts[asked].tolist()),
        pairs=len(margins),
        prompts=int(asked.sum()),
        loss=float(pair_losses(margins, pairs.weights).sum() / asked.sum()),
        calibration_error=calibration_error(bars),
        bars=bars,
    )


class Reward(Objective):
    """Learns a score from rankings; the loss is counted in prompts, each of which weighs the same.

    ``held_out`` is judged in validation; ``truth`` are the same rankings in the same order with noise-free grades.
    """

    fixed_shapes = False

    def __init__(
        self,
        settings: Settings,
        model: Scored,
        rankings: RankingLoader,
        held_out: RankingLoader | None = None,
        truth: RankingLoader | None = None,
    ) -> None:
        self.settings, self.model = settings, model
        self.rankings, self.held_out, self.truth = rankings, held_out, truth
        self._hits = self._pairs = 0.0

    def trainable(self) -> dict[str, nn.Module]:
        """The decoder with its scalar head."""
        return {"reward": self.model}

    def updates(self, step: int) -> Iterator[Update]:
        """One update: the step's prompts, in pieces of whole prompts."""
        batch = self.rankings.batch(step - 1)
        start, stop = fair_share(len(batch), "batch_prompts")
        batch = batch.rows(start, stop).to(self._device)
        self._hits = self._pairs = 0.0
        size = -(-len(batch) // self.settings.microbatches)
        pieces = [batch.rows(first, min(first + size, len(batch))) for first in range(0, len(batch), size)]
        counts = {"prompts": float(len(batch)), "tokens": float(batch.lengths.sum())}
        yield Update(pieces, sum_over_ranks(counts))

    def terms(self, microbatch: RankingBatch) -> list[Term]:
        """The sum over prompts of their weighted pairwise losses."""
        scores = self._read(microbatch)
        better, worse = microbatch.pairs.unbind(dim=1)
        margins = scores[better] - scores[worse]
        self._hits += float(right(margins.detach()).sum())
        self._pairs += float(len(margins))
        return [Term("pair_loss", pair_losses(margins, microbatch.pair_weights).sum(), per="prompts")]

    def _read(self, batch: RankingBatch) -> Tensor:
        """The score of each response ``[R]``; rows of similar length go together, so that short ones carry no padding."""
        groups = list(length_groups(batch.lengths.cpu(), self.settings.score_tokens))
        scores = []
        for rows in groups:
            lengths = batch.lengths[rows]
            scores.append(_final(self.model(batch.ids[rows, : int(lengths.max())]), lengths))
        return torch.cat(scores)[torch.cat(groups).argsort().to(batch.ids.device)]

    def metrics(self) -> dict[str, float]:
        """The share of the step's training pairs that were in the right order before it learnt from them."""
        total = sum_over_ranks({"hits": self._hits, "pairs": self._pairs})
        return {"pairwise_accuracy": total["hits"] / total["pairs"]} if total["pairs"] else {}

    def judgements(self) -> dict[str, Judgement]:
        """How the held-out responses are ordered: "" against the grades, "noise_free_" against the true ones."""
        if self.held_out is None:
            return {}
        scores = [row for batch in self.held_out.validation() for row in self._scores(batch)]
        found = {"": judge(scores, _values(self.held_out))}
        return found | ({"noise_free_": judge(scores, _values(self.truth))} if self.truth else {})

    def _scores(self, batch: RankingBatch) -> list[list[float]]:
        scores = read_together(self.model, batch.lengths, self.settings.score_tokens, batch.ids.to(self._device))
        return _per_prompt(_final(scores.cpu(), batch.lengths), batch)

    def validate(self) -> dict[str, float]:
        """Held-out accuracy with its interval, loss and calibration; see `judgements`."""
        figures: dict[str, float] = {}
        for prefix, judgement in self.judgements().items():
            figures |= judgement.figures(f"val_{prefix}")
        return figures

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def build(settings: Settings, materials: Materials) -> Reward:
    """The reward model on `materials`: model "model" (the SFT checkpoint), given "rankings" (a RankingLoader).

    Optional: "held_out" (a RankingLoader), and "truth", a loader made from `with_truth` of the same held-out rankings.
    """
    found = materials.model("model")
    head = found.head or ScalarHead(found.model.config).to(materials.runtime.device)
    given = materials.given
    scored = Scored(found.model, head)
    return Reward(settings, scored, materials.need("rankings"), given.get("held_out"), given.get("truth"))


def with_truth(rankings: Sequence[Ranking]) -> list[Ranking] | None:
    """The rankings graded by ``meta["noise_free"]`` (one number per response), or None where one lacks it."""
    if not rankings or not all(ranking.meta.get("noise_free") for ranking in rankings):
        return None
    return [
        ranking.model_copy(update={"responses": tuple(
            response.model_copy(update={"score": grade, "rank": None})
            for response, grade in zip(ranking.responses, ranking.meta["noise_free"], strict=True)
        )})
        for ranking in rankings
    ]  # fmt: skip


def reference_score(
    model: Scored, tokenizer: Tokenizer, references: Sequence[Conversation], budget: int = 4096
) -> float:
    """The mean score of the last reply of reference conversations (demonstrations).

    Subtract it, and a demonstration scores 0 on average, as InstructGPT's reward model was shifted before RL.
    Conversations longer than the context are left out.

    Raises:
        UserError: none is left.
    """
    rows = [_up_to_reply(tokenizer, conversation) for conversation in references]
    rows = [row for row in rows if 0 < len(row) <= model.decoder.config.context]
    if not rows:
        raise UserError("no reference response fits the context", where="references", value=len(references))
    tokens, lengths = pad_ids(rows, 0)
    device = next(model.parameters()).device
    return float(_final(read_together(model, lengths, budget, tokens.to(device)).cpu(), lengths).mean())


def _up_to_reply(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """The conversation's ids up to the token that closes the assistant's last reply."""
    rendered = render(tokenizer, conversation.messages, conversation.tools)
    written = [place for place, mine in enumerate(rendered.mask) if mine]
    return rendered.ids[: written[-1] + 1] if written else []


def _final(scores: Tensor, lengths: Tensor) -> Tensor:
    """scores ``[R, T]`` at the last token of each row, ``[R]``."""
    return scores.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)


def _values(loader: RankingLoader) -> list[list[float]]:
    """The grades of each ranking's responses, in the order of `validation`."""
    return [row for batch in loader.validation() for row in _per_prompt(batch.values, batch)]


def _per_prompt(values: Tensor, batch: RankingBatch) -> list[list[float]]:
    sizes = torch.bincount(batch.groups, minlength=len(batch)).tolist()
    return [part.tolist() for part in values.split(sizes)]


def toy(seed: int, microbatches: int = 1) -> Reward:
    """Rankings by the letter "a", a decoder of two layers."""
    tokenizer = _toys.byte_tokenizer()
    decoder = _toys.small_decoder(tokenizer, seed)
    rows, context = _toys.letter_rankings(40, seed), decoder.config.context
    train, held_out = (
        RankingLoader(part, tokenizer, context, batch_prompts=6, seed=seed) for part in (rows[:30], rows[30:])
    )
    settings = Settings(microbatches=microbatches)
    return Reward(settings, Scored(decoder, ScalarHead(decoder.config)), train, held_out)


def scramble_masked(microbatch: RankingBatch, seed: int) -> RankingBatch:
    """Other tokens wherever a response has ended."""
    stream = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, microbatch.ids.shape, generator=stream)
    return replace(microbatch, ids=torch.where(microbatch.mask, microbatch.ids, noise))
