"""Where a MODEL argument's checkpoint lies: a checkpoint folder, a stage folder or a whole run folder may be named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nestling.core.errors import UserError
from nestling.core.storage import read_json
from nestling.model import peft

MODEL = "model"  # folder of the checkpoint inside a stage's folder


def checkpoint_folder(path: str | Path) -> Path:
    """The folder with config.json (or with an adapter) behind `path`.

    Args:
        path: a checkpoint or adapter folder, a stage folder that holds `model/`, or a run folder, of which the last
            finished stage with a generating model is meant (a reward model answers nothing).

    Raises:
        UserError: no checkpoint is there.
    """
    path = Path(path)
    for candidate in (path, path / MODEL):
        if (candidate / "config.json").exists() or peft.is_adapter(candidate):
            return candidate
    if (path / "recipe.json").exists():
        for spec in reversed(read_json(path / "recipe.json")["stages"]):
            candidate = path / spec["name"] / MODEL
            if (path / spec["name"] / "stage.json").exists() and _generates(candidate):
                return candidate
    raise UserError("no model here", where=path, fix="name a run folder, a checkpoint folder or a Hugging Face folder")


def places(path: str | Path) -> Iterator[Path]:
    """Where something saved may lie behind `path`: there, in its `model/`, in that of a run's stages, the last first."""
    path = Path(path)
    yield from (path, path / MODEL)
    if (path / "recipe.json").exists():
        yield from (path / spec["name"] / MODEL for spec in reversed(read_json(path / "recipe.json")["stages"]))


def _generates(folder: Path) -> bool:
    if peft.is_adapter(folder):
        return peft.writes_text(folder)
    if not (folder / "config.json").exists():
        return False
    names = read_json(folder / "config.json").get("architectures") or [""]
    return not names[0].endswith("ForSequenceClassification")
