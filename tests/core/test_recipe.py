"""Overrides reach every place of a recipe, and copy what they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nestling.core.errors import UserError
from nestling.core.recipe import changed, load_recipe

DATA: dict[str, Any] = {"a": {"b": [{"c": 1}, {"c": 2}]}, "n": 3, "empty": None}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.b.1.c", {**DATA, "a": {"b": [{"c": 1}, {"c": 9}]}}),
        ("a.d", {**DATA, "a": {**DATA["a"], "d": 9}}),
        ("a", {**DATA, "a": 9}),
        ("empty.x.y", {**DATA, "empty": {"x": {"y": 9}}}),
    ],
)
def test_one_place_is_changed_in_a_copy(path: str, expected: dict[str, Any]) -> None:
    before = {**DATA, "a": {"b": [dict(item) for item in DATA["a"]["b"]]}}
    assert changed(DATA, path.split("."), 9, "--set") == expected
    assert before == DATA


@pytest.mark.parametrize("path", ["n.x", "a.b.2.c", "a.b.c", "a.b.-1"])
def test_a_path_that_leads_nowhere_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=f"^--set {path}: "):
        changed(DATA, path.split("."), 9, f"--set {path}")


def test_a_recipe_may_extend_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 4\nstages:\n  a: {x: {y: 1, z: 2}}\n  b: {v: 1}\n")
    (tmp_path / "more.yaml").write_text("extends: base\nstages:\n  a: {x: {y: 5}}\n  c: {stage: a}\n")
    read = load_recipe(tmp_path / "more.yaml")
    assert (read.name, read.seed) == ("more", 4)
    assert [spec.name for spec in read.stages] == ["a", "b", "c"]
    assert read.stages[0].settings == {"x": {"y": 5, "z": 2}}
    with pytest.raises(UserError, match="recipe can't be read"):
        (tmp_path / "lost.yaml").write_text("extends: nowhere\nstages: {a: {}}\n")
        load_recipe(tmp_path / "lost.yaml")
