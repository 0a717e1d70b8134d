"""Sums of three-digit numbers with a calculator on offer."""

from __future__ import annotations

from nestling.core.types import PromptRow
from nestling.world import World
from nestling.world.evaluation import is_right, judge

HIGHER_IS_BETTER = True


def problems(world: World, seed: int, count: int) -> list[PromptRow]:
    """Sums, differences and products, with the calculator."""
    return world.evaluation("arithmetic_with_calculator", seed, count)


def check(row: PromptRow, replies: list[str]) -> float:
    """1.0 for the right number and no other."""
    return judge(row, replies, is_right)
