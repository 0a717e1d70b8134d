"""Recipes pointed at what the user has: a model to start from instead of pre-training, conversations to learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nestling.core.errors import UserError
from nestling.core.recipe import Recipe, StageSpec
from nestling.core.registry import find
from nestling.model.locate import checkpoint_folder

BASE = "pretrain"  # the stage whose model the user's takes the place of


def from_model(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe without pre-training and what only that needs; its model is the one in the folder.

    Raises:
        UserError: no model there, or a recipe that pre-trains none.
    """
    place = str(checkpoint_folder(folder).resolve())
    replaced = {spec.name for spec in recipe.stages if spec.stage == BASE}
    if not replaced:
        fix = "name it as an input of a stage: reads: {model: FOLDER}"
        raise UserError("the recipe has no pre-training that a model could take the place of", where="--model", fix=fix)
    dropped = set(replaced)
    for spec in reversed(recipe.stages):
        if spec.name in dropped:
            dropped |= set(_inputs(spec).values())
    stages = []
    for spec in recipe.stages:
        if spec.name not in dropped:
            kept = {role: source for role, source in spec.reads.items() if source not in dropped}
            ours = {role: place for role, source in _inputs(spec).items() if source in replaced}
            stages.append(spec.model_copy(update={"reads": kept | ours}))
    return recipe.model_copy(update={"stages": tuple(stages)})


def _inputs(spec: StageSpec) -> Mapping[str, str]:
    """Where each input of a stage comes from, by role."""
    roles = {role.rstrip("?"): default for role, default in find("stages", spec.stage).READS.items()}
    return {role: spec.reads.get(role, default) for role, default in roles.items()}


def on_conversations(recipe: Recipe, path: Path) -> Recipe:
    """The recipe whose conversations are those of a file or folder.

    Raises:
        UserError: no such file, or a recipe that learns no conversations.
    """
    if not path.exists():
        raise UserError("no such file or folder", where="--conversations", value=str(path))
    if not any(spec.stage == "conversations" for spec in recipe.stages):
        raise UserError("the recipe learns no conversations", where="--conversations")
    sources = [{"source": "files", "settings": {"paths": [str(path)]}}]
    stages = [
        spec.model_copy(update={"settings": {**spec.settings, "sources": sources}})
        if spec.stage == "conversations"
        else spec
        for spec in recipe.stages
    ]
    return recipe.model_copy(update={"stages": tuple(stages)})
