"""Optimise the assistant against the reward model (PPO), and compare it with where it started on held-out prompts."""

from __future__ import annotations

from typing import Any

from nestling.core.pipeline import StageContext
from nestling.objectives import ppo
from nestling.stages.align import READS, Comparison, align

VERSION = 1
__all__ = ["READS", "VERSION", "Settings", "run"]


class Settings(Comparison):
    """PPO's settings, and how the result is compared."""

    objective: ppo.Settings = ppo.Settings()


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Align with PPO."""
    return align(ppo, settings.objective, settings, context)
