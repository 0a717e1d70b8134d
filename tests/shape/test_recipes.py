"""Every recipe that is shipped can be read, and every stage of it be resolved, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nestling.core.errors import UserError
from nestling.core.pipeline import plan
from nestling.core.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_recipes_are_shipped():
    """The demo is among the recipes."""
    assert "demo" in [path.stem for path in RECIPES]


@pytest.fixture(autouse=True)
def data(tmp_path_factory, monkeypatch):
    """Empty files in the place of the optional real data, which is not part of the project: resolving only looks for them."""
    folder = tmp_path_factory.mktemp("data")
    for path in RECIPES:
        for name in re.findall(r"\$NESTLING_DATA/([\w./]+\w)", path.read_text()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    monkeypatch.setenv("NESTLING_DATA", str(folder))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_built(path, tmp_path):
    """Every stage, setting and input of a shipped recipe exists; its description is a sentence for the report."""
    recipe = load_recipe(path)
    plans = plan(recipe, tmp_path)
    assert [stage.spec.name for stage in plans] == [spec.name for spec in recipe.stages]
    assert recipe.description.endswith(".")
    assert list(tmp_path.iterdir()) == [], "resolving a recipe writes nothing"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_check_of_recipes_can_fail(path, tmp_path):
    """An unknown setting in any stage is found before the run starts."""
    first = load_recipe(path).stages[0].name
    with pytest.raises(UserError, match="unknown setting"):
        plan(load_recipe(path, [f"{first}.no_such_setting=1"]), tmp_path)
