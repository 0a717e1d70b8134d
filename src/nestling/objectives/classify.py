"""A classifier: a decoder that reads a text and says, of every category, whether the text belongs to it.

Categories do not exclude each other, so each has a logit and a binary cross-entropy of its own; the loss is their mean
over all judgements, one per text and category that somebody looked at. What nobody judged teaches nothing.
Scores are calibrated and thresholds chosen afterwards, on texts that were not learnt: `stages/moderation.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nestling.core.config import Config
from nestling.core.ranks import sum_over_ranks
from nestling.core.runtime import python_stream
from nestling.core.types import Labelled
from nestling.loading.labels import LabelBatch, LabelLoader
from nestling.model.heads import LabelHead, Labeller
from nestling.objectives import _toys
from nestling.objectives._materials import Materials
from nestling.objectives._scoring import length_groups
from nestling.objectives._share import fair_share
from nestling.training.contract import Objective, Term, Update

READS = ("model",)
IMPROVES = ("val_loss", "down")


class Settings(Config):
    """Settings of a classifier."""

    microbatches: int = Field(1, gt=0)
    """Pieces that a step is computed in; the gradient is the same."""
    score_tokens: int = Field(2048, gt=0)
    """Padded tokens per forward pass."""


class Classify(Objective):
    """Learns categories from labelled texts; the loss is counted in judgements. ``held_out`` is for validation."""

    fixed_shapes = False

    def __init__(
        self, settings: Settings, model: Labeller, texts: LabelLoader, held_out: LabelLoader | None = None
    ) -> None:
        self.settings, self.model, self.texts, self.held_out = settings, model, texts, held_out
        self._right = self._judged = 0.0

    def trainable(self) -> dict[str, nn.Module]:
        """The decoder with its head."""
        return {"classifier": self.model}

    def updates(self, step: int) -> Iterator[Update]:
        """One update: the step's texts, in pieces."""
        batch = self.texts.batch(step - 1)
        start, stop = fair_share(len(batch), "batch_rows")
        batch = batch.rows(start, stop).to(self._device)
        self._right = self._judged = 0.0
        size = -(-len(batch) // self.settings.microbatches)
        pieces = [batch.rows(first, min(first + size, len(batch))) for first in range(0, len(batch), size)]
        counts = {"judgements": float(batch.judged.sum()), "tokens": float(batch.lengths.sum())}
        yield Update(pieces, sum_over_ranks(counts))

    def terms(self, microbatch: LabelBatch) -> list[Term]:
        """The sum of the binary cross-entropies of all judgements."""
        logits = self._read(microbatch)
        judged = microbatch.judged
        self._right += float(((logits.detach() > 0) == microbatch.targets.bool())[judged].sum())
        self._judged += float(judged.sum())
        return [Term("binary_cross_entropy", _losses(logits, microbatch).sum(), per="judgements")]

    def _read(self, batch: LabelBatch) -> Tensor:
        """The logits of each text ``[N, L]``; rows of similar length go together, so that short ones need no padding."""
        groups = list(length_groups(batch.lengths.cpu(), self.settings.score_tokens))
        logits = [self.model(batch.ids[rows, : int(batch.lengths[rows].max())], batch.lengths[rows]) for rows in groups]
        return torch.cat(logits)[torch.cat(groups).argsort().to(batch.ids.device)]

    def metrics(self) -> dict[str, float]:
        """The share of the step's judgements that were right before it learnt from them."""
        total = sum_over_ranks({"right": self._right, "judged": self._judged})
        return {"judgement_accuracy": total["right"] / total["judged"]} if total["judged"] else {}

    @torch.no_grad()
    def logits(self, texts: LabelLoader) -> Tensor:
        """Of every text of a loader, in the order of its ``rows``: ``[N, L]`` float32 on the CPU."""
        return torch.cat([self._read(batch.to(self._device)).cpu() for batch in texts.validation()])

    def validate(self) -> dict[str, float]:
        """Held-out loss, and the shares of right judgements and of texts whose judgements are all right."""
        if self.held_out is None:
            return {}
        logits, judged, targets = self.logits(self.held_out), self.held_out.judged, self.held_out.targets
        whole = LabelBatch(torch.empty(0), torch.empty(len(logits)), targets, judged)
        right = (logits > 0) == targets.bool()
        return {
            "val_loss": float(_losses(logits, whole).sum() / judged.sum()),
            "val_judgement_accuracy": float(right[judged].float().mean()),
            "val_exact_accuracy": float((right | ~judged).all(dim=1).float().mean()),
        }

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _losses(logits: Tensor, batch: LabelBatch) -> Tensor:
    """Binary cross-entropy of each judgement, one after the other; what nobody judged is left out."""
    return F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none")[batch.judged]


def build(settings: Settings, materials: Materials) -> Classify:
    """The classifier on `materials`: model "model" (any decoder), given "texts" (a LabelLoader); "held_out" optional.

    Given "classifier" (a Labeller with the loader's categories) is trained further in place of a fresh head.
    """
    texts: LabelLoader = materials.need("texts")
    held_out = materials.given.get("held_out")
    if (model := materials.given.get("classifier")) is None:
        decoder = materials.model("model").model
        model = Labeller(decoder, LabelHead(decoder.config, texts.categories).to(materials.runtime.device))
    return Classify(settings, model, texts, held_out)


def toy(seed: int, microbatches: int = 1) -> Classify:
    """Which of "a", "b" and "c" a text of letters holds; a third of the rows was not judged for one of them."""
    tokenizer = _toys.byte_tokenizer()
    decoder = _toys.small_decoder(tokenizer, seed)
    stream, rows = python_stream(seed, "toy labels"), []
    for number in range(60):
        text = "".join(stream.choices("abcdef", k=stream.randint(1, 6)))
        judged = tuple(name for name in "abc" if number % 3 or name != stream.choice("abc"))
        rows.append(Labelled(text=text, labels=tuple(name for name in judged if name in text), judged=judged))
    train, held_out = (LabelLoader(part, tokenizer, 64, 12, seed, "abc") for part in (rows[:40], rows[40:]))
    model = Labeller(decoder, LabelHead(decoder.config, "abc"))
    return Classify(Settings(microbatches=microbatches), model, train, held_out)


def scramble_masked(microbatch: LabelBatch, seed: int) -> LabelBatch:
    """Other tokens wherever a text has ended, and other labels where nobody looked."""
    stream = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, microbatch.ids.shape, generator=stream)
    inside = torch.arange(microbatch.ids.shape[1]) < microbatch.lengths.unsqueeze(1)
    targets = torch.where(microbatch.judged, microbatch.targets, 1 - microbatch.targets)
    return replace(microbatch, ids=torch.where(inside, microbatch.ids, noise), targets=targets)
