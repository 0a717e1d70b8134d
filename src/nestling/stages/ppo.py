"""Optimise the assistant against the reward model (PPO), and compare it with where it started on held-out prompts."""

from __future__ import annotations

from typing import Any

from nestling.core.pipeline import StageContext
from nestling.objectives import ppo
from nestling.planning.work import Known, Work
from nestling.stages.align import READS, Comparison, align, replies_work

VERSION = 1
__all__ = ["READS", "VERSION", "Settings", "run", "work"]


class Settings(Comparison):
    """PPO's settings, and how the result is compared."""

    objective: ppo.Settings = ppo.Settings()


def work(settings: Settings, known: Known) -> Work | None:
    """What a step reads, before the prompts are known."""
    return replies_work(settings.objective, settings, known)


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Align with PPO."""
    return align(ppo, settings.objective, settings, context)
