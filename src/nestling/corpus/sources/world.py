"""The embedded synthetic world: text whose truth is known. Offline, endless, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import Field

from nestling.core.config import Config
from nestling.core.runtime import python_stream
from nestling.core.types import Conversation, Document, Labelled, Problem, PromptRow, Ranking
from nestling.corpus.splits import Split
from nestling.world import World

_ENDLESS = 10**9


class Settings(Config):
    """How much of which world."""

    world_seed: int | None = Field(None, description="seed of the facts; none means the run's seed")
    size: Literal["tiny", "small", "medium"] = Field("small", description="how many people, towns and objects exist")
    language: str = Field("en", description="language of the wordings")
    bytes: int | None = Field(None, ge=1, description="draw documents until so many bytes of text; none means by count")
    count: int = Field(1000, ge=1, description="how many items to draw for training")
    val_share: float = Field(0.1, gt=0, le=1, description="size of the validation split as a share of training's")
    kinds: dict[str, float] | None = Field(None, description="weights of the kinds of dialogues or prompts; none means all")
    moderation: float = Field(0.0, ge=0, lt=1, description="share of the documents that are texts of `labels`, bare")
    noise: float = Field(0.1, ge=0, le=1, description="how often a ranking's labeller errs")


def documents(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[Document]:
    """Facts told in many ways, stories, letters, sums; a budget in bytes ends with the document that fills it."""
    drawn = _documents(settings, seed, split)
    if settings.bytes is None:
        yield from islice(drawn, _count(settings, split))
        return
    left = settings.bytes * (settings.val_share if split == "val" else 1.0)
    for document in drawn:
        yield document
        left -= len(document.text.encode())
        if left <= 0:
            return


def _documents(settings: Settings, seed: int, split: Split) -> Iterator[Document]:
    """Endless documents, with texts of `labels` among them where they are wanted."""
    world, stream = world_of(settings, seed), python_stream(seed, "moderation", split)
    texts = enumerate(world.labelled(seed, _ENDLESS, split) if settings.moderation else ())
    for document in world.documents(seed, split=split):
        yield document
        while stream.random() < settings.moderation:
            place, row = next(texts)
            yield Document(id=f"{split}-m{place:07d}", text=row.text, source="world", meta={"kind": "moderation"})


def conversations(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[Conversation]:
    """Dialogues about the world; `meta` holds the truth."""
    yield from world_of(settings, seed).dialogues(seed, _count(settings, split), split, settings.kinds)


def rankings(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[Ranking]:
    """Prompts with 4 to 9 responses of known quality, as a labeller who errs now and then ranks them."""
    yield from world_of(settings, seed).rankings(seed, _count(settings, split), split, noise=settings.noise)


def prompts(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[PromptRow]:
    """Prompts to answer; `meta` holds what the rubric needs."""
    yield from world_of(settings, seed).prompts(seed, _count(settings, split), split, settings.kinds)


def problems(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[Problem]:
    """Problems whose answer a program checks."""
    yield from world_of(settings, seed).problems(seed, _count(settings, split), split)


def labels(settings: Settings, seed: int, split: Split, skipped: list[str]) -> Iterator[Labelled]:
    """Texts with categories of moderation, harmful ones and look-alikes."""
    yield from world_of(settings, seed).labelled(seed, _count(settings, split), split)


def toy(folder: Path, what: str) -> Settings:
    """Settings for the contract test: a dozen items of a tiny world."""
    return Settings(size="tiny", count=12, val_share=0.5)


def world_of(settings: Settings, seed: int) -> World:
    """The world that these settings describe."""
    return _generate(settings.world_seed if settings.world_seed is not None else seed, settings.size, settings.language)


@lru_cache(maxsize=2)
def _generate(seed: int, size: str, language: str) -> World:
    return World.generate(seed, size=size, language=language)


def _count(settings: Settings, split: Split) -> int:
    return settings.count if split == "train" else max(1, round(settings.count * settings.val_share))
