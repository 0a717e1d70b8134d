"""Let the SFT model answer the prompts of the rankings too, and have a labeller mark its replies among the others.

So the reward model has seen the kind of text that it will judge in reinforcement learning, with the faults that the
policy really has: InstructGPT's labellers ranked samples of its models too (Ouyang et al., 2022, section 3.4). It takes
a labeller who can mark any reply: the embedded world.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from nestling.core.config import Config
from nestling.core.metrics import Progress
from nestling.core.pipeline import StageContext
from nestling.core.runtime import stream_seed
from nestling.core.storage import write_rows
from nestling.core.types import PromptRow, Ranking
from nestling.generation.chat import replies
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.model import checkpoint
from nestling.model.locate import checkpoint_folder
from nestling.stages._training import read_split
from nestling.stages._truth import WorldSettings
from nestling.stages.align import fits
from nestling.world import World

VERSION = 1
READS = {"model": "sft", "rankings": "rankings"}
CHUNK = 256  # prompts answered between two lines of progress


class Settings(Config):
    """How many replies of whom stand in a comparison."""

    given: int = Field(4, ge=1, le=8, description="Responses kept of each ranking.")
    sampled: int = Field(3, ge=1, le=8, description="Replies of the model beside them; equal ones count once.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the replies.")
    max_tokens: int = Field(64, ge=1, description="Longest reply.")
    noise: float = Field(0.1, ge=0, le=1, description="How often the labeller errs.")
    rows: int = Field(64, ge=1, description="Replies decoded together.")
    world: WorldSettings = WorldSettings()


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Write train.jsonl and val.jsonl; report how many replies of the model came in."""
    start = checkpoint.load(checkpoint_folder(context.reads["model"]), context.runtime.device)
    engine = Engine(start.model, start.tokenizer, rows=settings.rows, frozen=True)
    world, report = settings.world.world(context.seed), {}
    for split in ("train", "val"):
        found = read_split(context.reads["rankings"], split, Ranking)
        rankings = [row for row in found if fits(row, start, settings.max_tokens)]
        with Progress(f"{context.name} {split}", len(rankings), "prompts", context.quiet) as progress:
            rows = list(_compared(settings, world, engine, rankings, stream_seed(context.seed, split), progress))
        report[f"{split}_rankings"] = write_rows(context.folder / f"{split}.jsonl", (row.to_row() for row in rows))
        report[f"{split}_sampled"] = sum(len(row.responses) for row in rows) - sum(
            min(len(row.responses), settings.given) for row in rankings
        )
        report[f"{split}_dropped"] = len(found) - len(rankings)
    return {**report, "synthetic": True}


def _compared(
    settings: Settings, world: World, engine: Engine, rankings: list[Ranking], seed: int, progress: Progress
) -> Iterator[Ranking]:
    """Each ranking with some of its responses replaced by the model's, all marked anew by one labeller."""
    sampling = Sampling(temperature=settings.temperature, max_tokens=settings.max_tokens)
    for begin in range(0, len(rankings), CHUNK):
        part = rankings[begin : begin + CHUNK]
        asked = [row for row in part for _ in range(settings.sampled)]
        answers = [reply.text for reply in replies(engine, asked, sampling, stream_seed(seed, begin))]
        for place, row in enumerate(part):
            own = answers[place * settings.sampled : (place + 1) * settings.sampled]
            given = [response.content for response in row.responses[: settings.given]]
            texts = list(dict.fromkeys([*given, *filter(None, own)]))[:9]
            truth = {key: value for key, value in row.meta.items() if key != "noise_free"}
            prompt = PromptRow(prompt=row.prompt, meta=truth)
            yield world.labelled_answers(prompt, texts, seed, settings.noise)
        progress.advance(len(part))
