"""What all data stages share: draw both splits from the sources and write them as rows that anyone can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nestling.core.config import Config, parse
from nestling.core.errors import UserError
from nestling.core.metrics import Progress, say
from nestling.core.pipeline import StageContext
from nestling.core.registry import find
from nestling.core.storage import BadRows, write_rows
from nestling.core.types import Row
from nestling.corpus.mixture import Mixture, Source
from nestling.corpus.splits import Split

SPLITS: tuple[Split, ...] = ("train", "val")
SHOWN = 5  # skipped rows that are printed; all of them stand in skipped.jsonl


Kind = Literal["documents", "conversations", "rankings", "prompts", "problems", "labels"]


class DataStage(Config):
    """Settings of every data stage."""

    KIND: ClassVar[Kind]
    """What the stage gathers: the function of a source that it calls."""

    sources: tuple[Source, ...] = Field((Source(),), min_length=1, description="Where the data comes from.")
    # Left out of the stage's key: what finished without skipping is the same either way, and stages that stand on it
    # must not begin anew because a later one met a bad row.
    on_bad_row: BadRows = Field("stop", exclude=True, description="At a bad row: stop, or skip and count it.")

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        for place, source in enumerate(self.sources):
            where = f"sources.{place}"
            module = find("corpus.sources", source.source, f"{where}.source")
            if not hasattr(module, self.KIND):
                raise UserError(f"this source has no {self.KIND}", where=f"{where}.source", value=source.source)
            parse(module.Settings, source.settings, f"{where}.settings")
        return self


def mixture_files(settings: DataStage, seed: int) -> list[Path]:
    """The files that the sources read: part of the stage's key."""
    return Mixture(settings.sources, seed, settings.on_bad_row).files()


def draw(settings: DataStage, context: StageContext) -> dict[str, Any]:
    """Write train.jsonl and val.jsonl; returns counts for the report."""
    kind = settings.KIND
    mixture = Mixture(settings.sources, context.seed, settings.on_bad_row, f"{context.name}.sources")
    report: dict[str, Any] = {}
    for split in SPLITS:
        sizes: Counter[str] = Counter()
        items = mixture.read(kind, split)
        with Progress(f"{context.name} {split}", None, kind, context.quiet) as progress:
            rows = _counted(items, sizes, progress)
            report[f"{split}_{kind}"] = write_rows(context.folder / f"{split}.jsonl", rows)
        if kind == "documents":
            report[f"{split}_bytes"] = sizes["bytes"]
    skipped = list(dict.fromkeys(mixture.tally.skipped))  # each split reads every row and meets the same bad ones
    for line in skipped[:SHOWN]:
        say(f"skipped {line}")
    if len(skipped) > SHOWN:
        say(f"… and {len(skipped) - SHOWN:,} more rows, listed in {context.folder / 'skipped.jsonl'}")
    write_rows(context.folder / "skipped.jsonl", ({"reason": line} for line in skipped))
    world = any(source.source == "world" for source in settings.sources)
    return report | {"sources": mixture.tally.items, "skipped": len(skipped), "synthetic": world}


def _counted(items: Iterator[Row], sizes: Counter[str], progress: Progress) -> Iterator[dict[str, Any]]:
    for item in items:
        row = item.to_row()
        sizes["bytes"] += len(row.get("text", "").encode())
        progress.advance()
        yield row
