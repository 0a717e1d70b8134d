"""Recipes: a YAML file that lists the stages of a run, each with its settings.

name: demo
seed: 1
stages:
  corpus: {documents: 4000}
  tokenizer: {vocab_size: 2048}
  sft_again: {stage: sft, reads: {model: sft}}    # an instance under another name, reading another stage
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import field_validator

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

    @field_validator("name")
    @classmethod
    def _a_folder(cls, name: str) -> str:
        return _folder_name(name)


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

    @field_validator("name")
    @classmethod
    def _a_folder(cls, name: str) -> str:
        return _folder_name(name)


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError("this can't be the name of a folder", value=name, fix="use letters, digits, dots, - and _")
    return name


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `--set` overrides.

    Raises:
        UserError: no such file, broken YAML, unknown key or stage name.
    """
    data = {"name": re.sub(r"[^\w.-]+", "-", path.stem), **_read(path)}
    if not isinstance(data.get("stages"), dict) or not data["stages"]:
        raise UserError("a recipe needs a mapping `stages:` of stage name to settings", where=path)
    for override in overrides:
        data = _apply(data, override)
    return build_recipe(data, where=f"{path}: ")


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, laid over the recipe beside it that it `extends`, where it does."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe can't be read: {error.strerror}", where=path) from None
    except UnicodeDecodeError:
        raise UserError("this is not UTF-8 text", where=path, fix="a recipe is a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"broken YAML{_spot(error)}", where=path) from None
    if not isinstance(data, dict):
        raise UserError("a recipe needs a mapping `stages:` of stage name to settings", where=path)
    if (base := data.pop("extends", None)) is None:
        return data
    if base == path.stem:
        raise UserError("a recipe can't extend itself", where=path, value=base)
    return _laid_over(_read(path.with_name(f"{base}.yaml")), data)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings in one, inner mappings likewise; elsewhere what is above counts."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = _laid_over(inner, value)
        merged[key] = value
    return merged


def _spot(error: yaml.YAMLError) -> str:
    """Where YAML broke and why, in the words of its reader."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f" in line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return f": {error}"


def build_recipe(data: Mapping[str, Any], where: str = "") -> Recipe:
    """A recipe from plain data, as `load_recipe` reads it; `where` begins error messages, "file: " or nothing."""
    specs = [_spec(str(name), {} if body is None else body, where) for name, body in data["stages"].items()]
    return parse(Recipe, {**data, "stages": specs}, where)


def _spec(name: str, body: Any, where: str) -> StageSpec:
    if not isinstance(body, Mapping):
        raise UserError("a stage's settings must be a mapping", where=f"{where}stages.{name}", value=body)
    settings = {key: value for key, value in body.items() if key not in ("stage", "reads")}
    plain = {"name": name, "stage": body.get("stage", name), "reads": body.get("reads") or {}, "settings": settings}
    return parse(StageSpec, plain, f"{where}stages.{name}")


def _apply(data: dict[str, Any], override: str) -> dict[str, Any]:
    """`--set pretrain.training.steps=10`: the first word is a stage's name or a key of the recipe itself."""
    dotted, equals, text = override.partition("=")
    if not equals:
        fix = "write it as stage.key=value"
        raise UserError("an override has the form key=value", where="--set", value=override, fix=fix)
    where = f"--set {dotted}".strip()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value is not YAML{_spot(error)}", where=where, value=text) from None
    path = dotted.removeprefix("stages.").split(".")
    if len(path) > 1 and path[0] not in data["stages"]:
        raise UserError("the recipe has no such stage", where=where, fix=nearest(path[0], data["stages"]))
    if path[0] in data["stages"]:
        return changed(data, ["stages", *path], value, where)
    if path[0] not in ("seed", "name", "description"):
        known = [*data["stages"], "seed", "name", "description"]
        raise UserError("the recipe has no such stage or key", where=where, fix=nearest(path[0], known))
    return {**data, path[0]: value}


def changed(inside: Any, path: Sequence[str], value: Any, where: str) -> Any:
    """A copy of nested mappings and lists with `value` at a path; a number names a place of a list, from 0.

    >>> changed({"a": [{"b": 1}]}, ["a", "0", "b"], 2, "--set a.0.b")
    {'a': [{'b': 2}]}

    Raises:
        UserError: the path leads through a plain value, or beyond a list's end.
    """
    if not path:
        return value
    first, *rest = path
    if isinstance(inside, list):
        if not first.isdigit() or int(first) >= len(inside):
            raise UserError(f"the list has no place {first!r}", where=where, fix=f"use 0 to {len(inside) - 1}")
        return [changed(item, rest, value, where) if n == int(first) else item for n, item in enumerate(inside)]
    if not isinstance(inside, Mapping | None):
        raise UserError(f"no setting {first!r} inside a plain value", where=where, value=inside)
    return {**(inside or {}), first: changed((inside or {}).get(first), rest, value, where)}
