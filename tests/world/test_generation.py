"""The world is the same everywhere, and its splits do not leak into each other."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from nestling.core.errors import UserError
from nestling.world import World
from nestling.world.dialogues import SHARES
from nestling.world.documents import KINDS
from nestling.world.evaluation import KINDS as CAPABILITIES
from nestling.world.facts import ATTRIBUTES
from nestling.world.language import language
from nestling.world.streams import Stream

FINGERPRINT = """
import hashlib, json
from nestling.world import World
world, digest = World.generate(5, "tiny"), hashlib.sha256()
for split in ("train", "val"):
    rows = [*world.documents(3, 80, split), *world.dialogues(3, 120, split), *world.rankings(3, 30, split),
            *world.prompts(3, 40, split), *world.problems(3, 20, split)]
    for row in rows:
        digest.update(json.dumps(row.to_row()).encode())
for kind in ("fact_recall", "persona", "preference"):
    for row in world.evaluation(kind, 3, 20):
        digest.update(json.dumps(row.to_row()).encode())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate(1)


def test_bytes_do_not_depend_on_the_process():
    """Two processes with different string hashing write the same bytes."""
    digests = set()
    for hash_seed in ("0", "12345"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


def test_streams_keep_their_values():
    """Stored values: they may never change, or every world does."""
    stream = Stream(7, "test")
    assert [stream.number(0, 99) for _ in range(6)] == STREAM_VALUES
    assert sorted(Stream(7, "x").shuffled("abcdef")) == list("abcdef")
    assert len(set(Stream(7, "y").several(range(30), 5))) == 5


STREAM_VALUES = [4, 39, 88, 4, 35, 68]


def test_more_documents_begin_with_the_fewer(world):
    first, second = list(world.documents(2, 30)), list(world.documents(2, 60))
    assert second[:30] == first


def test_size_in_bytes_is_reached(world):
    total = sum(len(document.text.encode()) for document in world.documents(2, size=50_000))
    assert 50_000 <= total < 60_000


def test_train_and_val_share_no_document(world):
    train = {document.text for document in world.documents(1, 2000)}
    val = [document.text for document in world.documents(1, 500, "val")]
    assert not [text for text in val if text in train]


def test_every_fact_appears_often_and_in_many_wordings(world):
    """In 2 MB of text: every person's every value stands near the name in at least eight places."""
    texts = [document.text for document in world.documents(1, size=2_000_000)]
    for person in world.facts.people[:10]:
        about = [text for text in texts if person.name in text]
        for attribute in ATTRIBUTES["people"]:
            value = str(getattr(person, attribute))
            assert sum(value in text for text in about) >= 8, (person.name, attribute)


def test_every_fact_has_eight_wordings():
    for kind in ("people", "towns"):
        for attribute, form in language("en").get("facts")[kind].items():
            assert len(set(form["statements"]["train"])) >= 8, attribute
            assert len(set(form["questions"]["train"])) >= 8, attribute
            assert len(form["questions"]["heldout"]) >= 3, attribute


def _leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


def test_no_wording_is_both_trained_and_held_out():
    """Every pair of lists `train` / `heldout` of the data files is disjoint."""
    lists = {path: set(value) for path, value in _leaves(language("en").data) if path[-1] in ("train", "heldout")}
    pairs = [path for path in lists if path[-1] == "train"]
    assert len(pairs) > 60
    for path in pairs:
        held_out = lists[(*path[:-1], "heldout")]
        assert held_out
        assert not lists[path] & held_out, path


def test_no_held_out_question_is_trained_elsewhere():
    """Not even under another kind: all user turns of training on one side, all held-out ones on the other."""
    sides: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for path, value in _leaves({name: language("en").get(name) for name in ("chat", "personas", "facts")}):
        if path[-1] in sides:
            sides[path[-1]] |= set(value)
    assert not sides["train"] & sides["heldout"]


def test_evaluation_repeats_no_user_turn_of_training(world):
    """No question of an evaluation row is a user turn of the training dialogues, and no stranger or persona is."""
    seen, texts = set(), []
    for conversation in world.dialogues(1, 6000):
        seen |= {message.content for message in conversation.messages if message.role == "user"}
        texts += [message.content for message in conversation.messages]
    everything = "\n".join(texts)
    for capability in CAPABILITIES:
        for row in world.evaluation(capability, 1, 60):
            asked = [row.prompt[-1].content, *row.meta["turns"]]
            assert not seen & set(asked), capability
            for truth in row.meta["truths"]:
                if truth["kind"] in ("unknown", "persona"):
                    assert truth["name"] not in everything, truth["name"]


def test_strangers_of_training_documents_are_training_strangers(world):
    """Names of the evaluation's strangers occur in no document."""
    text = "\n".join(document.text for document in world.documents(1, 4000))
    for row in world.evaluation("unknown_refused", 1, 100):
        assert row.meta["name"] not in text


@pytest.mark.parametrize("size", ["tiny", "small", "medium"])
def test_worlds_of_every_size(size):
    facts = World.generate(3, size).facts
    assert len({person.name for person in facts.people}) == len(facts.people)
    assert len(set(facts.towns)) == len(facts.towns)
    assert all(person.friend is not person for person in facts.people)
    assert all(person.sibling.sibling is person for person in facts.people if person.sibling)


def test_no_name_is_also_a_value():
    """A last name such as Potter would look like a job to the rubric."""
    words = language("en")
    values = {value for pool in ("jobs", "foods", "pets", "hobbies") for value in words.get("things")[pool]}
    values |= {month.lower() for month in words.get("grammar.months")}
    names = words.get("names")
    every = [*names["last"], *names["fresh"]["last"]]
    for group in ("first", "fresh", "story"):
        every += [*names[group]["she"], *names[group]["he"]]
    assert not [name for name in every if name.lower() in values]


def test_kinds_asked_for_are_the_kinds_drawn(world):
    kinds = {conversation.meta["kind"] for conversation in world.dialogues(1, 60, kinds={"fact": 1, "story": 1})}
    assert kinds == {"fact", "story"}
    assert {conversation.meta["kind"] for conversation in world.dialogues(1, 1500)} == set(SHARES)
    assert {document.meta["kind"] for document in world.documents(1, 120)} == set(KINDS)


@pytest.mark.parametrize(("call", "word"), [
    (lambda: World.generate(1, "huge"), "tiny"), (lambda: World.generate(1, language="xx"), "en"),
    (lambda: list(World.generate(1, "tiny").dialogues(1, 1, kinds={"poem": 1})), "fact"),
    (lambda: World.generate(1, "tiny").evaluation("flying", 1, 1), "fact_recall")])
def test_unknown_names_are_user_errors(call, word):
    with pytest.raises(UserError, match=word):
        call()


def test_rows_survive_json(world):
    for row in [*world.dialogues(1, 40), *world.rankings(1, 10), *world.evaluation("persona", 1, 5)]:
        assert type(row).from_row(json.loads(json.dumps(row.to_row()))) == row


def test_a_fingerprint_can_change():
    """The determinism test above can fail: another seed gives other bytes."""
    texts = ["".join(document.text for document in World.generate(seed, "tiny").documents(seed, 5)) for seed in (1, 2)]
    assert len({hashlib.sha256(text.encode()).hexdigest() for text in texts}) == 2
