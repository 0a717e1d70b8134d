"""People who do not exist: the model says that it does not know them and makes nothing up."""

from __future__ import annotations

from nestling.core.types import PromptRow
from nestling.world import World
from nestling.world.evaluation import is_right, judge

HIGHER_IS_BETTER = True


def problems(world: World, seed: int, count: int) -> list[PromptRow]:
    """Questions on strangers whose names are not in the training data."""
    return world.evaluation("unknown_refused", seed, count)


def check(row: PromptRow, replies: list[str]) -> float:
    """1.0 when the reply says that it does not know, and claims nothing."""
    return judge(row, replies, is_right)
