"""Several sources read as one, each with a weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from nestling.core import registry
from nestling.core.config import Config, parse
from nestling.core.errors import UserError
from nestling.core.storage import BadRows
from nestling.corpus.splits import Split, unit_hash


class Source(Config):
    """One source of a mixture, as a recipe writes it."""

    source: str = Field("world", description="a file of corpus/sources, or a dotted module")
    settings: dict[str, Any] = Field({}, description="that source's settings")
    weight: float = Field(1.0, gt=0, description="times each training item is taken: 0.5 keeps half, 2 takes all twice")


@dataclass
class Tally:
    """What was read, for the report.

    >>> Tally(items={"world": 10}).items
    {'world': 10}
    """

    items: dict[str, int] = field(default_factory=dict)
    """Items per source, as taken (after weights)."""
    skipped: list[str] = field(default_factory=list)
    """One line per item left out: what and where."""


@dataclass(frozen=True)
class Mixture:
    """Sources read one after the other (loaders shuffle), always in the same order.

    Args:
        where: the settings' place in the recipe, for error messages.

    >>> mixture = Mixture((Source(source="world", settings={"count": 3}),), seed=1)
    >>> [document.id for document in mixture.read("documents", "train")]   # doctest: +SKIP
    ['train-0000000', 'train-0000001', 'train-0000002']
    """

    sources: Sequence[Source]
    seed: int
    on_bad_row: BadRows = "stop"
    where: str = "sources"
    tally: Tally = field(default_factory=Tally)

    def files(self) -> list[Path]:
        """The files that the sources read.

        Raises:
            UserError: one is missing.
        """
        found: list[Path] = []
        for place, source in enumerate(self.sources):
            module = registry.find("corpus.sources", source.source)
            settings = self._settings(module, source, place)
            found += module.files(settings) if hasattr(module, "files") else []
        return found

    def read(self, what: str, split: Split) -> Iterator[Any]:
        """The items of one split; those taken again keep their id.

        Args:
            what: documents, conversations, rankings, prompts, problems or labels.

        Raises:
            UserError: a source has none of these, or can't be read.
        """
        for place, source in enumerate(self.sources):
            module = registry.find("corpus.sources", source.source)
            if not hasattr(module, what):
                raise UserError(f"this source has no {what}", where=f"{self.where}.{place}", value=source.source)
            settings = self._settings(module, source, place)
            weight = source.weight if split == "train" else 1.0
            items = getattr(module, what)(settings, self.seed, split, self.tally.skipped)
            for number, item in enumerate(items):
                for _ in range(_times(weight, f"{place}:{number}")):
                    self.tally.items[source.source] = self.tally.items.get(source.source, 0) + 1
                    yield item

    def _settings(self, module: Any, source: Source, place: int) -> Config:
        given = dict(source.settings)
        if "on_bad_row" in module.Settings.model_fields:
            given.setdefault("on_bad_row", self.on_bad_row)
        return parse(module.Settings, given, f"{self.where}.{place}.settings")


def _times(weight: float, key: str) -> int:
    """How often an item is taken: the whole part of the weight, and once more for that fraction of the items."""
    return math.floor(weight) + (unit_hash(f"weight:{key}") < weight % 1)
