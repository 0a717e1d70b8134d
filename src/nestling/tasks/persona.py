"""A character set by the system message, with a name never seen in training, kept over several turns."""

from __future__ import annotations

from nestling.core.types import PromptRow
from nestling.world import World
from nestling.world.evaluation import judge
from nestling.world.rubric import in_character

HIGHER_IS_BETTER = True


def problems(world: World, seed: int, count: int) -> list[PromptRow]:
    """System messages with a character, and two to five turns each."""
    return world.evaluation("persona", seed, count)


def check(row: PromptRow, replies: list[str]) -> float:
    """1.0 when every reply carries the character's phrase, its name where asked, and not the assistant's own."""
    return judge(row, replies, in_character)
