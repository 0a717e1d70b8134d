"""Known people wrongly refused: the share of answerable questions that the model does not answer. Lower is better."""

from __future__ import annotations

from nestling.core.types import PromptRow
from nestling.world import World
from nestling.world.evaluation import judge
from nestling.world.rubric import refused

HIGHER_IS_BETTER = False


def problems(world: World, seed: int, count: int) -> list[PromptRow]:
    """Questions on people and towns of the world."""
    return world.evaluation("known_refused", seed, count)


def check(row: PromptRow, replies: list[str]) -> float:
    """1.0 when the reply refuses, or when there is none."""
    return judge(row, replies, lambda facts, truth, text: refused(facts, text) or not text.strip())
