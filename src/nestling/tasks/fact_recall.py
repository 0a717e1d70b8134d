"""Facts of the world recalled: a question in a wording not seen in training gets the right value and no wrong one."""

from __future__ import annotations

from nestling.core.types import PromptRow
from nestling.world import World
from nestling.world.evaluation import is_right, judge

HIGHER_IS_BETTER = True


def problems(world: World, seed: int, count: int) -> list[PromptRow]:
    """Questions on people and towns of the world."""
    return world.evaluation("fact_recall", seed, count)


def check(row: PromptRow, replies: list[str]) -> float:
    """1.0 for the right fact."""
    return judge(row, replies, is_right)
