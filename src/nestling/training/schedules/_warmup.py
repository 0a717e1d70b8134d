"""The rise from zero that every schedule begins with."""

from __future__ import annotations

from nestling.training.settings import TrainSettings


def rise(step: int, settings: TrainSettings) -> float:
    """Linear from 1/w at step 1 to 1 at step w, w = warmup share of the steps; 1 afterwards."""
    length = round(settings.warmup * settings.steps)
    return min(1.0, step / length) if length else 1.0
