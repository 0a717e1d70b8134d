"""Warm-up, then the peak rate to the end."""

from __future__ import annotations

from nestling.training.schedules._warmup import rise
from nestling.training.settings import TrainSettings


def multiplier(step: int, settings: TrainSettings) -> float:
    """Share of the peak rate at `step` (from 1)."""
    return rise(step, settings)
