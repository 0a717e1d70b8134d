"""Texts for moderation: categories that exist, splits that share no wording, every phrase that can be filled."""

from __future__ import annotations

import numpy as np
import pytest

from nestling.core.errors import UserError
from nestling.corpus.sources import world as source
from nestling.stages.moderation import CATEGORIES
from nestling.world import World, moderation
from nestling.world.language import language
from nestling.world.moderation import Slots, held_out, labelled
from nestling.world.streams import Stream


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


def test_what_an_assistant_says_in_few_words_or_in_character_is_among_the_ordinary(world: World) -> None:
    ordinary = {row.text for row in world.labelled(3, 12000) if row.meta["kind"] == "ordinary"}
    assert {"I do not know.", "Nestling.", "You are welcome."} <= ordinary
    signs = [role["sign"] for role in world.facts.lang.data["personas"]["roles"]]
    assert all(any(text.startswith(sign) for text in ordinary) for sign in signs)
    assert any(text.startswith("You are ") for text in ordinary)  # system messages are judged too


def test_declining_harm_is_harmless_and_explaining_it_is_not(world: World) -> None:
    rows = [row for row in world.labelled(3, 3000) if row.meta["kind"] == "assault"]
    refused = [row for row in rows if row.meta["group"].startswith("refuse ")]
    assert refused
    assert not any(row.labels for row in refused)
    assert all("violence" in row.labels for row in rows if row not in refused)


def test_documents_take_the_bare_texts_along(world: World) -> None:
    """As many as asked for, of the split, with other documents as they are without them."""
    plain = list(source.documents(source.Settings(size="tiny", count=40), 1, "train", []))
    mixed = list(source.documents(source.Settings(size="tiny", count=400, moderation=0.75), 1, "train", []))
    bare = [document for document in mixed if document.meta["kind"] == "moderation"]
    assert 250 < len(bare) < 350
    assert len({document.id for document in mixed}) == 400
    assert [document.text for document in bare] == [row.text for row in world.labelled(1, len(bare))]
    assert [document for document in mixed if document not in bare][:40] == plain
    val = source.documents(source.Settings(size="tiny", count=400, moderation=0.75), 1, "val", [])
    texts = [document.text for document in val if document.meta["kind"] == "moderation"]
    assert texts == [row.text for row in world.labelled(1, len(texts), "val")]


def test_no_phrase_is_in_both_splits(world: World) -> None:
    groups = [
        {r.meta["group"] for r in world.labelled(3, 3000, s) if r.meta["kind"] != "ordinary"} for s in ("train", "val")
    ]
    assert groups[0]
    assert groups[1]
    assert not groups[0] & groups[1]


def test_what_is_learnt_never_says_what_is_held_out(world: World) -> None:
    """Not even with other people, places and words in it; nor does it speak of a held-out group."""
    lang = world.facts.lang
    rows = [row for row in world.labelled(3, 6000) if row.meta["kind"] != "ordinary"]
    held = [row for row in world.labelled(3, 3000, "val") if row.meta["kind"] != "ordinary"]
    assert not {row.text for row in rows} & {row.text for row in held}
    for group in lang.get("moderation.groups.heldout"):
        assert not [row.text for row in rows if group.format(t="").strip() in row.text.lower()], group
    assert held_out(lang, "assault").fullmatch("Rob Mara Vale with a knife")
    assert held_out(lang, "insult").fullmatch("You dumb liar, nobody in Ostrania needs you.")
    assert not held_out(lang, "assault").fullmatch("rob the bank with a knife in secret")


def test_texts_stand_in_talks_as_long_as_a_window_of_the_model_whatever_they_say(world: World) -> None:
    """One in 19 is longer than 500 characters (140 tokens): of the harmful, alike and ordinary, so length tells nothing."""
    rows = list(world.labelled(3, 6000))
    parts = {
        "harmful": [row for row in rows if row.labels],
        "alike": [row for row in rows if not row.labels and row.meta["kind"] != "ordinary"],
        "ordinary": [row for row in rows if row.meta["kind"] == "ordinary"],
    }
    for name, part in parts.items():
        lengths = np.array([len(row.text) for row in part])
        shares = [(lengths > least).mean() for least in (150, 300, 500)]
        assert shares == [pytest.approx(share, abs=0.02) for share in (0.2, 0.107, 0.053)], name
        assert lengths.max() <= moderation.LONGEST, name


def test_what_is_surrounded_is_whole_and_stands_anywhere(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts bare and surrounded: what is cut at the ends of a window is never what the labels speak of."""
    monkeypatch.setattr(moderation, "HURRIED", 0.0)
    monkeypatch.setattr(moderation, "PLAIN", 0.0)
    texts = [row.text for row in world.labelled(3, 2000) if row.labels]
    monkeypatch.setattr(moderation, "SURROUNDED", 0.0)
    bare = [row.text for row in world.labelled(3, 2000) if row.labels]
    around = [tuple(map(len, text.split(one, 1))) for text, one in zip(texts, bare, strict=True)]
    assert all(len(sides) == 2 for sides in around)
    long = [sides for sides in around if sum(sides) > 200]
    assert len(long) > 0.1 * len(texts)
    first, last = (sum(not sides[end] for sides in long) / len(long) for end in (0, 1))
    assert 0.05 < first < 0.3
    assert 0.05 < last < 0.3


def test_phrases_become_many_texts(world: World) -> None:
    texts = {row.text for row in world.labelled(3, 5000) if row.meta["kind"] != "ordinary"}
    assert len(texts) > 0.9 * 4000


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_wording_can_be_filled(world: World, split: str) -> None:
    data = language("en").get("moderation")
    slots = Slots(world.facts, Stream(1), split)
    slots["x"] = "it"
    lists = [
        kind["train" if split == "train" else "heldout"] for kind in (*data["kinds"].values(), *data["forms"].values())
    ]
    lists += data["parts"].values() if split == "train" else []
    filled = [wording.format_map(slots) for choices in lists for wording in choices for _ in range(3)]
    assert len(filled) > 500
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
