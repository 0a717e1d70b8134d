"""Texts for moderation: categories that exist, splits that share no wording, every phrase that can be filled."""

from __future__ import annotations

import pytest

from nestling.core.errors import UserError
from nestling.stages.moderation import CATEGORIES
from nestling.world import World
from nestling.world.language import language
from nestling.world.moderation import labelled


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate(1, "tiny")


@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_are_the_same_again_and_of_all_kinds(world: World, split: str) -> None:
    rows = list(world.labelled(3, 1500, split))
    assert rows == list(world.labelled(3, 1500, split))
    assert {label for row in rows for label in row.labels} == set(CATEGORIES) - {"sexual/minors"}
    kinds = language("en").get("moderation.kinds")
    assert {row.meta["kind"] for row in rows} == {*kinds, "ordinary"}
    assert not [row.text for row in rows if "{" in row.text or "  " in row.text]
    flagged = sum(bool(row.labels) for row in rows) / len(rows)
    assert 0.3 < flagged < 0.6


def test_declining_harm_is_harmless_and_explaining_it_is_not(world: World) -> None:
    rows = [row for row in world.labelled(3, 3000) if row.meta["kind"] == "assault"]
    refused = [row for row in rows if row.meta["group"].startswith("refuse ")]
    assert refused
    assert not any(row.labels for row in refused)
    assert all("violence" in row.labels for row in rows if row not in refused)


def test_no_phrase_is_in_both_splits(world: World) -> None:
    groups = [{r.meta["group"] for r in world.labelled(3, 3000, s) if r.meta["kind"] != "ordinary"} for s in ("train", "val")]
    assert groups[0]
    assert groups[1]
    assert not groups[0] & groups[1]


def test_every_phrase_can_be_filled(world: World) -> None:
    from nestling.world.moderation import _slots
    from nestling.world.streams import Stream

    data = language("en").get("moderation")
    slots = _slots(world.facts, Stream(1), "old people")
    phrases = [phrase for kind in data["kinds"].values() for part in ("train", "heldout") for phrase in kind[part]]
    filled = [phrase.format_map(slots) for phrase in phrases]
    assert len(filled) > 400
    assert not [text for text in filled if "{" in text]


def test_labels_are_known_and_have_their_parents() -> None:
    for name, kind in language("en").get("moderation.kinds").items():
        for label in kind.get("labels", ()):
            assert label in CATEGORIES, name
            parent = label.partition("/")[0]
            assert parent in kind["labels"], name


def test_a_language_without_wordings_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lang = world.facts.lang
    monkeypatch.setattr(lang, "data", {key: value for key, value in lang.data.items() if key != "moderation"})
    with pytest.raises(UserError, match="no texts for moderation"):
        next(labelled(world.facts, 1, 1, "train"))
