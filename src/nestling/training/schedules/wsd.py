"""Warm-up, stable, decay (Hu et al. 2024): the peak rate until the last `decay` share, then a line down to the floor.

The last step still learns: the line would reach the floor one step after the end.
"""

from __future__ import annotations

from nestling.training.schedules._warmup import rise
from nestling.training.settings import TrainSettings


def multiplier(step: int, settings: TrainSettings) -> float:
    """Share of the peak rate at `step` (from 1)."""
    length = round(settings.decay * settings.steps)
    left = settings.steps - step + 1
    fall = min(1.0, left / (length + 1)) if length else 1.0
    return min(rise(step, settings), settings.floor + (1 - settings.floor) * fall)
