"""Warm-up, then half a cosine down to the floor at the last step (Loshchilov & Hutter 2017)."""

from __future__ import annotations

import math

from nestling.training.schedules._warmup import rise
from nestling.training.settings import TrainSettings


def multiplier(step: int, settings: TrainSettings) -> float:
    """Share of the peak rate at `step` (from 1)."""
    warm = round(settings.warmup * settings.steps)
    if step <= warm:
        return rise(step, settings)
    progress = (step - warm) / max(1, settings.steps - warm)
    return settings.floor + (1 - settings.floor) * 0.5 * (1 + math.cos(math.pi * progress))
