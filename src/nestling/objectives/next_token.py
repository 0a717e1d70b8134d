"""Next-token prediction: pre-training on text and supervised fine-tuning on conversations are the same objective.

Loss = Σ weight · -log p(target) / Σ weight over the whole update; what is learnt and what is only read is the loader's
affair, through the weights of its batches. Held-out loss is also given in bits per byte of text, which tokenizers of
different sizes share: Σ -log2 p over text tokens / bytes of their text. Control tokens count in the loss, not in bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from nestling.core.config import Config
from nestling.core.errors import UserError
from nestling.core.ranks import sum_over_ranks
from nestling.core.runtime import stream_seed, torch_stream
from nestling.loading.batches import Batches, TokenBatch
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder
from nestling.model.decoder import build as build_decoder
from nestling.model.experts import active_share, balance_loss
from nestling.model.likelihood import next_token_loss_sum, token_logprobs
from nestling.objectives._materials import Materials
from nestling.objectives._share import own_share
from nestling.training.contract import MICROBATCH, Objective, Term, Update

READS = ("model",)
IMPROVES = ("val_loss", "down")


class Settings(Config):
    """Settings of next-token prediction."""

    microbatches: int = Field(default=1, ge=1, description="Pieces that a batch is computed in; same gradient.")
    validation_batches: int = Field(default=0, ge=0, description="Most batches of a validation; 0 takes all there are.")


Validation = Callable[[], Iterable[TokenBatch]]
"""Gives the held-out batches anew, in the same order each time: a loader's bound `validation`."""


class NextToken(Objective):
    """Trains a decoder on the batches of a loader.

    Args:
        byte_lengths: [V] bytes of text behind each id, 0 for control tokens.
        validation: held-out batches; None validates nothing.
    """

    def __init__(
        self, settings: Settings, model: Decoder, batches: Batches, byte_lengths: Tensor, validation: Validation | None
    ) -> None:
        self.settings, self.model, self.batches, self.validation = settings, model, batches, validation
        self.device = model.output_weight.device
        self.byte_lengths = byte_lengths.to(self.device)
        self._slots_per_token = 1.0
        self._ahead: dict[int, TokenBatch] = {}  # the next step's batch

    def trainable(self) -> dict[str, nn.Module]:
        """The decoder."""
        return {"model": self.model}

    def updates(self, step: int) -> Iterator[Update]:
        """One update: the loader's batch of this step in pieces of whole rows; of several processes each takes its share.

        Raises:
            UserError: the rows can't be divided into the microbatches, or among the processes.
        """
        batch = self._ahead.pop(step, None)
        batch = self._rows(step) if batch is None else batch
        rows, pieces = len(batch), self.settings.microbatches
        if rows % pieces:
            fix = f"use a divisor of {rows}"
            raise UserError(f"{rows} rows don't divide into microbatches", where="microbatches", value=pieces, fix=fix)
        size = rows // pieces
        counts = sum_over_ranks(batch.counts)
        self._slots_per_token = batch.ids.numel() / max(1.0, batch.counts["tokens"])
        yield Update([batch.rows(start, start + size) for start in range(0, rows, size)], counts)
        if self.device.type == "cuda":  # it is still computing what was asked of it
            self._ahead = {step + 1: self._rows(step + 1)}

    def _rows(self, step: int) -> TokenBatch:
        """This process's share of a step's batch."""
        return _own_rows(self.batches.batch(step - 1))

    def terms(self, microbatch: TokenBatch) -> list[Term]:
        """Cross-entropy in nats, summed over learnt tokens; of a model with experts also how evenly they were used.

        The latter is a mean over all slots of a microbatch, and so depends on how the batch is divided into them.
        """
        terms = [Term("cross_entropy", next_token_loss_sum(self.model, microbatch.to(self.device)), per="tokens")]
        if (experts := self.model.config.experts) is not None and experts.balance and torch.is_grad_enabled():
            terms.append(Term("expert_balance", balance_loss(self.model), per=MICROBATCH, weight=experts.balance))
        return terms

    def validate(self) -> dict[str, float]:
        """Held-out `val_loss` in nats per learnt token, and `val_bpb`, bits per byte of text."""
        if self.validation is None:
            return {}
        sums = {"nats": 0.0, "tokens": 0.0, "text_nats": 0.0, "bytes": 0.0}
        for batch in islice(self.validation(), self.settings.validation_batches or None):
            for name, value in self._held_out(_own_rows(batch).to(self.device)).items():
                sums[name] += value
        sums = sum_over_ranks(sums)
        bits = sums["text_nats"] / math.log(2)
        return {"val_loss": sums["nats"] / max(1.0, sums["tokens"]), "val_bpb": bits / max(1.0, sums["bytes"])}

    def _held_out(self, batch: TokenBatch) -> dict[str, float]:
        """Sums over one batch, from one forward pass."""
        wanted = batch.targets.masked_fill(batch.weights == 0, -1)
        found = token_logprobs(self.model, batch.ids, wanted, positions=batch.positions, segments=batch.segments)
        nats = -found.double() * batch.weights
        text = self.byte_lengths[batch.targets] > 0
        return {
            "nats": float(nats.sum()),
            "tokens": float(batch.weights.sum()),
            "text_nats": float(nats[text].sum()),
            "bytes": float(batch.byte_count(self.byte_lengths)),
        }

    def flops_per_token(self) -> float:
        """6 N + 12 · layers · T · H K of every slot (Chowdhery et al. 2022, appendix B), per learnt token.

        N are the weights that multiply: the embedding is a look-up, the output layer is not. A frozen weight costs 4: the
        product that would give its own gradient is left out.
        """
        model, config = self.model, self.model.config
        tables = [*model.positions.parameters(), *([] if config.tied else model.embedding.parameters())]
        looked_up = {id(table) for table in tables}
        multiplying = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in looked_up]
        products = sum((6 if p.requires_grad else 4) * p.numel() * active_share(p, model) for p in multiplying)
        attention = 12 * config.n_layers * config.context * config.n_heads * config.head
        return (products + attention) * self._slots_per_token


def _own_rows(batch: TokenBatch) -> TokenBatch:
    return batch.rows(*own_share(len(batch), "batch_rows"))


def build(settings: Settings, materials: Materials) -> NextToken:
    """Next-token prediction on `materials`: model "model", given "batches" and, where there is one, "validation"."""
    found = materials.model("model")
    byte_lengths = torch.tensor(found.tokenizer.byte_lengths)
    validation = materials.given.get("validation")
    return NextToken(settings, found.model, materials.need("batches"), byte_lengths, validation)


class _CountingRows:
    """Rows that count upwards by a row's own stride, in two documents and a padded tail: [6, 16] of 24 ids."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch(self, step: int) -> TokenBatch:
        """Six rows that depend on the seed and the step alone."""
        stream = torch_stream(self.seed, "toy", step)
        start, stride = (torch.randint(low, 24, (6, 1), generator=stream) for low in (0, 1))
        line = (start + stride % 3 * torch.arange(17)) % 24
        place = torch.arange(16)
        segments = ((place >= 7).long() + (place >= 13)).expand(6, -1)
        weights = ((place % 7 > 1) & (place < 13)).float().expand(6, -1)
        positions = torch.where(place < 7, place, torch.where(place < 13, place - 7, place - 13)).expand(6, -1)
        return TokenBatch(line[:, :-1], line[:, 1:], weights, positions, segments)

    def validation(self) -> Iterator[TokenBatch]:
        """Three batches that training doesn't draw."""
        held_out = _CountingRows(stream_seed(self.seed, "held out"))
        return (held_out.batch(step) for step in range(3))


def toy(seed: int, microbatches: int = 1) -> NextToken:
    """Learns to count in a decoder of two small layers; every third place is only read, and rows end in padding."""
    config = DecoderConfig(vocab_size=24, context=16, d_model=32, n_layers=2, n_heads=2, d_ff=64)
    rows = _CountingRows(seed)
    settings = Settings(microbatches=microbatches)
    model = build_decoder(config, torch_stream(seed, "toy model"))
    return NextToken(settings, model, rows, torch.ones(24, dtype=torch.long), rows.validation)


def scramble_masked(microbatch: TokenBatch, seed: int) -> TokenBatch:
    """Other targets where nothing is learnt, and other ids in documents of which nothing is learnt."""
    stream = torch_stream(seed, "scramble")

    def other(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, torch.randint(int(values.max()) + 1, values.shape, generator=stream), values)

    same = microbatch.segments.unsqueeze(1) == microbatch.segments.unsqueeze(2)  # [B, T, T]
    learnt = (same * microbatch.weights.unsqueeze(1)).sum(-1) > 0
    changes: dict[str, Any] = {
        "targets": other(microbatch.targets, microbatch.weights == 0),
        "ids": other(microbatch.ids, ~learnt),
    }
    return replace(microbatch, **changes)
