"""Small sums without any tool."""

from __future__ import annotations

from nestling.core.types import PromptRow
from nestling.world import World
from nestling.world.evaluation import is_right, judge

HIGHER_IS_BETTER = True


def problems(world: World, seed: int, count: int) -> list[PromptRow]:
    """Sums, differences and products of numbers up to 20."""
    return world.evaluation("arithmetic_without", seed, count)


def check(row: PromptRow, replies: list[str]) -> float:
    """1.0 for the right number and no other."""
    return judge(row, replies, is_right)
