"""The embedded world as the judge of a run that was trained in it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nestling.core.config import Config
from nestling.core.types import PromptRow, Scorer
from nestling.world import World, rubric


class WorldSettings(Config):
    """Which world: the same settings as those of the source that the run learnt from."""

    world_seed: int | None = Field(None, description="Seed of the facts; none means the run's seed.")
    size: Literal["tiny", "small", "medium"] = Field("small", description="How many people, towns and objects exist.")
    language: str = Field("en", description="Language of the wordings.")

    def world(self, seed: int) -> World:
        """The world itself, in a run of this seed."""
        return World.generate(seed if self.world_seed is None else self.world_seed, self.size, self.language)


def rubric_scorer(settings: WorldSettings, seed: int) -> Scorer:
    """The rubric's total for a reply to a prompt of this world."""
    world = settings.world(seed)

    def score(row: PromptRow, text: str) -> float:
        return world.score(row.meta, text).total

    return score


def correctness(settings: WorldSettings, seed: int) -> Scorer:
    """How right the content of a reply to a prompt of this world is, in [0, 1], however it is said."""
    facts = settings.world(seed).facts

    def score(row: PromptRow, text: str) -> float:
        return rubric.correct(facts, row.meta, text)

    return score
