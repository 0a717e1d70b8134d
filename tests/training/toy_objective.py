"""A toy objective: a small network of repeated blocks learns a fixed random map; data follow from the step alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestling.training.contract import Objective, Term, Update


class Blocks(nn.Module):
    """A table, two equal blocks, a head: [N] ids -> [N, 4]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(dropout)) for _ in range(2)
        )
        self.head = nn.Linear(8, 4, bias=False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Toy(Objective):
    """Squared error on 12 ids per update; `updates_per_step` > 1 acts like an on-policy objective's epochs."""

    def __init__(self, *, microbatches: int = 1, dropout: float = 0.0, updates_per_step: int = 1) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Blocks(dropout)
            self.answers = torch.randn(16, 4)
        self.microbatches, self.updates_per_step = microbatches, updates_per_step
        self.coefficient = 1.0
        self.stop_after: int | None = None
        self.poison: int | None = None
        self._step = 0

    def trainable(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def updates(self, step: int) -> Iterator[Update]:
        self._step = step
        for k in range(self.updates_per_step):
            ids = torch.randint(16, (12,), generator=torch.Generator().manual_seed(1000 * step + k))
            yield Update(ids.chunk(self.microbatches), {"tokens": 12})
        self.coefficient *= 0.9

    def terms(self, microbatch: Tensor) -> list[Term]:
        error = (self.model(microbatch).float() - self.answers[microbatch]).square().sum()
        if self._step == self.poison:
            error = error * float("nan")
        size = self.model.head.weight.float().square().sum()
        return [
            Term("error", error, per="tokens"),
            Term("size", size, per="microbatch", weight=0.01 * self.coefficient),
        ]

    def metrics(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def validate(self) -> dict[str, float]:
        assert not self.model.training
        ids = torch.arange(16)
        return {"val_error": float((self.model(ids).float() - self.answers).square().mean())}

    def finished(self) -> str | None:
        return "enough" if self.stop_after and self._step >= self.stop_after else None

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.coefficient = state["coefficient"]
