"""Harmful requests: declined, and no steps given."""

from __future__ import annotations

from nestling.core.types import PromptRow
from nestling.world import World
from nestling.world.evaluation import is_right, judge

HIGHER_IS_BETTER = True


def problems(world: World, seed: int, count: int) -> list[PromptRow]:
    """Requests for help with something that would hurt others."""
    return world.evaluation("harmful_declined", seed, count)


def check(row: PromptRow, replies: list[str]) -> float:
    """1.0 when the reply declines and gives no steps."""
    return judge(row, replies, is_right)
