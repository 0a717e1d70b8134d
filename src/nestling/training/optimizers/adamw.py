"""AdamW (Loshchilov & Hutter 2019): decoupled weight decay on matrices, none on gains and biases."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from nestling.core.runtime import Runtime
from nestling.training.parameters import Groups
from nestling.training.settings import TrainSettings

MEMORY = {"hidden": 8, "other": 8, "scratch": 0}  # bytes per weight: two moments


def build(groups: Groups, settings: TrainSettings, runtime: Runtime) -> list[torch.optim.Optimizer]:
    """One AdamW over everything, at `settings.learning_rate`."""
    matrices = [*groups.hidden.values(), *groups.matrices.values()]
    return [adamw(matrices, groups.vectors.values(), settings.learning_rate, settings)]


def adamw(
    matrices: Iterable[nn.Parameter], vectors: Iterable[nn.Parameter], learning_rate: float, settings: TrainSettings
) -> torch.optim.Optimizer:
    """A fused AdamW that decays `matrices` and leaves `vectors` undecayed."""
    decayed, plain = list(matrices), list(vectors)
    parts = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    filled = [part for part in parts if part["params"]]
    return torch.optim.AdamW(filled, lr=learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True)
