"""Recipes: a YAML file that lists the stages of a run, each with its settings.

    name: demo
    seed: 1
    stages:
      corpus: {documents: 4000}
      tokenizer: {vocab_size: 2048}
      sft_again: {stage: sft, reads: {model: sft}}    # an instance under another name, reading another stage
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from nestling.core.config import Config, nearest, parse
from nestling.core.errors import UserError


class StageSpec(Config):
    """One stage of a recipe, its settings still plain data."""

    name: str
    """What the stage is called in this recipe; also its folder in the run."""
    stage: str
    """The file in `stages/` that runs it."""
    reads: dict[str, str] = {}
    """For each input role another stage of the recipe, or a path."""
    settings: dict[str, Any] = {}
    """What the stage's own settings class will check."""


class Recipe(Config):
    """A run, as data."""

    name: str
    """Names the run folder."""
    description: str = ""
    """A sentence for the report."""
    seed: int = 1
    """Drives every random stream of the run."""
    stages: tuple[StageSpec, ...]
    """In the order in which they run."""


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `--set` overrides.

    Raises:
        UserError: no such file, broken YAML, unknown key or stage name.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe can't be read: {error.strerror}", where=path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"broken YAML: {error}", where=path) from None
    if not isinstance(data, dict) or not isinstance(data.get("stages"), dict) or not data["stages"]:
        raise UserError("a recipe needs a mapping `stages:` of stage name to settings", where=path)
    data.setdefault("name", path.stem)
    for override in overrides:
        _apply(data, override)
    return build_recipe(data, where=str(path))


def build_recipe(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data, as `load_recipe` reads it."""
    specs = [_spec(name, body or {}, where) for name, body in data["stages"].items()]
    return parse(Recipe, {**data, "stages": specs}, where)


def _spec(name: str, body: Any, where: str) -> StageSpec:
    if not isinstance(body, Mapping):
        raise UserError("a stage's settings must be a mapping", where=f"{where}: stages.{name}", value=body)
    settings = {key: value for key, value in body.items() if key not in ("stage", "reads")}
    plain = {"name": name, "stage": body.get("stage", name), "reads": body.get("reads") or {}, "settings": settings}
    return parse(StageSpec, plain, f"{where}: stages.{name}")


def _apply(data: dict[str, Any], override: str) -> None:
    """`--set pretrain.training.steps=10`: the first word is a stage's name or a key of the recipe itself."""
    dotted, equals, text = override.partition("=")
    if not equals:
        raise UserError("an override has the form key=value", where="--set", value=override)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError("value is not YAML", where=f"--set {dotted}", value=text) from None
    *path, last = dotted.removeprefix("stages.").split(".")
    target = data
    if path or last in data["stages"]:
        target = data["stages"]
    elif last not in Recipe.model_fields:
        known = [*data["stages"], "seed", "name"]
        raise UserError("unknown setting", where=f"--set {dotted}", fix=nearest(last, known))
    if path and path[0] not in target:
        raise UserError("the recipe has no such stage", where=f"--set {dotted}", fix=nearest(path[0], target))
    for part in path:
        target[part] = target = dict(target.get(part) or {})
    target[last] = value
