"""The folder is the registry: every entry of every registry folder is found by its name, and says what it is."""

from __future__ import annotations

import importlib
import re

import pytest

from nestling.core.errors import UserError
from nestling.core.registry import find, names

FOLDERS = (
    "corpus.sources",
    "model.architectures",
    "training.optimizers",
    "training.schedules",
    "tools",
    "generation.strategies",
    "tasks",
    "objectives",
    "stages",
)
OFFERS = {
    "corpus.sources": ("Settings", "toy"),
    "model.architectures": ("Config", "build", "tiny"),
    "training.schedules": ("multiplier",),
    "training.optimizers": ("build",),
    "tools": ("call",),
    "tasks": ("HIGHER_IS_BETTER", "problems", "check"),
    "generation.strategies": ("Strategy",),
    "objectives": ("READS", "Settings", "build", "toy"),
    "stages": ("VERSION", "READS", "Settings", "run"),
}
ENTRIES = [(folder, name) for folder in FOLDERS for name in names(folder)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_registry_has_entries_and_says_what_they_offer(folder):
    """A newcomer learns from the folder's own docstring what a file in it must offer."""
    assert names(folder), f"nothing is registered in {folder}"
    assert importlib.import_module(f"nestling.{folder}").__doc__


@pytest.mark.parametrize(("folder", "name"), ENTRIES)
def test_an_entry_is_found_by_its_name(folder, name):
    """The name is a word that can be typed, in a recipe or with dashes on the command line."""
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    module = find(folder, name)
    assert find(folder, name.replace("_", "-")) is module
    assert module.__name__ == f"nestling.{folder}.{name}"


@pytest.mark.parametrize(("folder", "name"), ENTRIES)
def test_an_entry_offers_what_its_neighbours_do(folder, name):
    """All files of a registry can take each other's place."""
    module = find(folder, name)
    assert module.__doc__
    assert [wanted for wanted in OFFERS.get(folder, ()) if not hasattr(module, wanted)] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_unknown_name_lists_the_folder_and_suggests_the_nearest(folder):
    """One letter too many is answered with the right word."""
    right = names(folder)[0]
    with pytest.raises(UserError) as error:
        find(folder, right + "x")
    assert all(name in str(error.value) for name in names(folder))
    assert f"did you mean {right!r}?" in str(error.value)


def test_an_experiment_may_live_outside():
    """A dotted name is imported as it is."""
    assert find("tools", "nestling.tools.calculator") is find("tools", "calculator")
