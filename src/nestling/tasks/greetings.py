"""Greetings, thanks and goodbyes, over one to three turns."""

from __future__ import annotations

from nestling.core.types import PromptRow
from nestling.world import World
from nestling.world.evaluation import is_right, judge

HIGHER_IS_BETTER = True


def problems(world: World, seed: int, count: int) -> list[PromptRow]:
    """Greetings in new wordings."""
    return world.evaluation("greetings", seed, count)


def check(row: PromptRow, replies: list[str]) -> float:
    """1.0 when every reply fits."""
    return judge(row, replies, is_right)
