"""Gather the ranked responses that the reward model learns from, from any mixture of sources, and hold some out."""

from __future__ import annotations

from typing import Any

from nestling.core.pipeline import StageContext
from nestling.stages._data import DataStage, draw
from nestling.stages._data import mixture_files as files

VERSION = 3
READS: dict[str, str] = {}
__all__ = ["READS", "VERSION", "Settings", "files", "run"]


class Settings(DataStage):
    """The sources and what a bad row does."""

    KIND = "rankings"


def run(settings: Settings, context: StageContext) -> dict[str, Any]:
    """Write train.jsonl and val.jsonl."""
    return draw(settings, context)
