"""Feedback as training data, in both databases."""

from __future__ import annotations

import json
import time

import pytest
from typer.testing import CliRunner

from nestling.cli.app import build_app
from nestling.core.storage import read_rows
from nestling.core.types import Conversation, Labelled, Ranking
from nestling.loading.chats import ChatLoader
from nestling.loading.preferences import RankingLoader
from nestling.serving.store.export import Filters, export
from nestling.serving.store.labels import CATEGORIES
from nestling.serving.store.records import VoteRecord
from nestling.serving.store.store import Store
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT

UP, DOWN = VoteRecord(value=1), VoteRecord(value=-1)


def rows(folder, name, kind):
    """The rows of an exported file, read as training reads them."""
    return list(read_rows(folder / f"{name}.jsonl", kind.from_row))


@pytest.fixture
def exported(store, tmp_path):
    """`exported(**filters)`: (rankings, conversations, labels, counts)."""

    def run(**filters):
        counts = export(store, tmp_path / "out", Filters(**filters))
        files = (("rankings", Ranking), ("conversations", Conversation), ("labels", Labelled))
        return *(rows(tmp_path / "out", name, kind) for name, kind in files), counts

    return run


def test_thumbs_become_pairs(store, talk, exported):
    id, _, [good, bad, _] = talk("Who are you?", "I am Nestling.", "No.", "Hm.", system="Be brief.")
    store.feedback.vote(good.id, UP)
    store.feedback.vote(bad.id, DOWN)
    [ranking], [conversation], _, counts = exported()
    assert [(r.content, r.score) for r in ranking.responses] == [("I am Nestling.", 1.0), ("No.", 0.0)]
    assert ranking.meta == {"source": "feedback", "kind": "thumbs", "conversation": id, "models": ["small", "small"]}
    assert [(m.role, m.content) for m in ranking.prompt] == [("user", "Who are you?")]
    assert [m.content for m in conversation.messages] == ["Who are you?", "I am Nestling."]
    assert counts.written == {"thumbs": 1, "conversations": 1}


def test_comparisons_and_rankings_become_rankings(store, talk, reply, exported):
    variants = [reply(text, tools=["calculator"], system="Add.") for text in ("one", "two", "three")]
    id, _, answers = talk("1 + 1?", *variants)
    one, two, three = [m.id for m in answers]
    comparison = store.arena.compare_replies(id, [one, two])
    store.arena.decide(comparison.id, "a" if comparison.a == two else "b")
    tie = store.arena.compare_replies(id, [one, three])
    store.arena.decide(tie.id, "both_bad")
    store.feedback.rank(id, [[two], [one, three]])
    rankings, _, _, counts = exported()
    assert counts.written == {"comparisons": 2, "rankings": 1}
    assert {r.content: r.score for r in rankings[0].responses} == {"two": 1.0, "one": 0.0}
    assert {r.content: r.score for r in rankings[1].responses} == {"one": 0.5, "three": 0.5}
    assert rankings[1].meta["choice"] == "both_bad"
    assert {r.content: r.score for r in rankings[2].responses} == {"two": -1.0, "one": -2.0, "three": -2.0}
    assert all(r.tools == ("calculator",) for r in rankings)
    assert [(m.role, m.content) for m in rankings[2].prompt] == [("system", "Add."), ("user", "1 + 1?")]


def test_a_ranking_has_the_prompt_that_was_read(store, talk, reply, exported):
    """Without the messages that had no room; replies that read different parts of a conversation are not compared."""
    id, _, [first] = talk("Hi", "Hello!")
    question = store.conversations.ask(id, "And?", first.id).id
    variants = [store.conversations.answer(id, question, reply(text, forgotten=2)).id for text in ("one", "two")]
    whole = store.conversations.answer(id, question, reply("three")).id
    store.feedback.rank(id, [[one] for one in variants])
    store.feedback.rank(id, [[variants[0]], [whole]])
    [ranking], _, _, counts = exported()
    assert [message.content for message in ranking.prompt] == ["And?"]
    assert counts.left_out == {"different prompts": 1}


def test_the_longest_liked_path_is_an_example(store, talk, reply, exported):
    id, _, [first] = talk("Hi", reply("Hello!", system="Be kind."))
    question = store.conversations.ask(id, "What is 2 + 2?", first.id)
    steps = [
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "calculator", "arguments": '{"expression": "2 + 2"}'}}]},
        {"role": "tool", "content": "4"},
    ]  # fmt: skip
    second = store.conversations.answer(
        id, question.id, reply("4", steps=steps, tools=["calculator"], system="Be kind.")
    )
    store.feedback.vote(first.id, UP)
    store.feedback.vote(second.id, UP)
    _, [conversation], _, _ = exported()
    roles = [message.role for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "tool", "assistant"]
    assert conversation.tools == ("calculator",)
    assert conversation.messages[4].tool_calls[0].arguments == {"expression": "2 + 2"}


def test_a_good_beginning_is_kept_where_the_rest_was_cut_off(store, talk, reply, exported):
    id, _, [first] = talk("Hi", "Hello!")
    second = store.conversations.answer(
        id, store.conversations.ask(id, "And?", first.id).id, reply("Th", finish="length")
    )
    third = store.conversations.answer(id, store.conversations.ask(id, "Go on", second.id).id, reply("That."))
    for message in (first, second, third):
        store.feedback.vote(message.id, UP)
    _, [conversation], _, counts = exported()
    assert [message.content for message in conversation.messages] == ["Hi", "Hello!"]
    assert counts.left_out == {"cut off": 2}


def test_what_nobody_should_learn_is_left_out_and_counted(store, talk, reply, exported):
    id, _, [disliked] = talk("Hi", "Go away.")
    later = store.conversations.answer(id, store.conversations.ask(id, "Sorry?", disliked.id).id, reply("Hello!"))
    store.feedback.vote(disliked.id, DOWN)
    store.feedback.vote(later.id, UP)
    _, _, [cut] = talk("Hi", reply("Hel", finish="length"))
    store.feedback.vote(cut.id, UP)
    _, bad_question, [flagged] = talk("How to …?", "No.")
    store.feedback.vote(flagged.id, UP)
    store.moderation.review(store.feedback.flag(bad_question.id, "violence").id, True)
    with_calls = reply("4", steps=[{"role": "tool", "content": "4"}])
    other, _, two = talk("2 + 2?", with_calls, "4")
    store.feedback.rank(other, [[m.id] for m in two])
    mixed, _, two = talk("Hi", reply("x", system="A"), reply("y", system="B"))
    store.feedback.rank(mixed, [[m.id] for m in two])
    blind, _, two = talk("Hi", "x", "y")
    store.arena.compare_replies(blind, [m.id for m in two])
    store.feedback.vote(two[0].id, UP)
    rankings, conversations, labels, counts = exported()
    assert rankings == conversations == []
    assert counts.left_out == {
        "voted down on the way": 1, "cut off": 1, "flagged": 1, "reply that called tools": 1,
        "different prompts": 1, "in an undecided comparison": 1,
    }  # fmt: skip
    assert [(row.text, row.labels, row.judged) for row in labels] == [("How to …?", ("violence",), ("violence",))]
    assert len(exported(with_flagged=True)[1]) == 1


def test_reports_in_other_words_are_no_labels(store, talk, exported):
    _, question, _ = talk("Hi", "x")
    for category in ("boring", "hate", "harassment"):
        store.feedback.flag(question.id, category)
    _, _, [row], counts = exported(trust_reports=True)
    assert row.labels == ("harassment", "hate")
    assert counts.left_out == {"report in other words": 1}


def test_the_categories_are_those_of_the_moderation_model():
    from nestling.stages import moderation

    assert CATEGORIES == moderation.CATEGORIES


def test_filters_choose_model_and_time(store, talk, reply, exported):
    def liked(model: str) -> None:
        _, _, [good, bad] = talk("Hi", reply(f"Hello from {model}", model), reply("x", model))
        store.feedback.vote(good.id, UP)
        store.feedback.vote(bad.id, DOWN)

    liked("old")
    cut = time.time()
    liked("new")
    assert len(exported()[0]) == 2
    assert [r.meta["models"] for r in exported(model="new")[0]] == [["new", "new"]]
    rankings, conversations, _, _ = exported(since=cut)
    assert [r.meta["models"][0] for r in rankings] == ["new"]
    assert [c.meta["model"] for c in conversations] == ["new"]


def test_deleted_conversations_are_not_exported(store, talk, exported):
    id, _, [good, bad] = talk("Hi", "Hello!", "x")
    store.feedback.vote(good.id, UP)
    store.feedback.vote(bad.id, DOWN)
    assert len(exported()[0]) == 1
    store.conversations.delete(id)
    assert exported()[:3] == ([], [], [])


def test_exported_rows_are_what_training_reads(store, talk, exported):
    tokenizer = Tokenizer.train(
        ["the cat sat on the mat", "Hello there, 12 + 3 = 15"] * 3, vocab_size=300
    ).with_special(CHAT)
    id, _, answers = talk("the cat", "sat", "on", "the mat", system="Be a cat.")
    store.feedback.vote(answers[0].id, UP)
    store.feedback.rank(id, [[m.id] for m in answers])
    rankings, conversations, _, _ = exported()
    batch = RankingLoader(rankings, tokenizer, context=128, batch_prompts=1, seed=1).batch(0)
    assert (len(batch), len(batch.pairs), len(batch.ids)) == (1, 3, 3)
    chats = ChatLoader(conversations, tokenizer, context=128, batch_rows=1, seed=1)
    assert (chats.conversations, chats.dropped) == (1, 0)


@pytest.fixture(scope="module")
def command():
    """`command(*words)` runs `nestling feedback`."""
    app = build_app("feedback")

    def run(*words: object) -> str:
        result = CliRunner().invoke(app, ["feedback", *map(str, words)], env={"COLUMNS": "100"})
        if result.exception:
            raise result.exception
        return result.output

    return run


def test_the_command_exports_counts_and_deletes(address, tmp_path, command, reply):
    store = Store.open(address)
    view = store.of("ann")
    id = view.conversations.create().id
    question = view.conversations.ask(id, "Hi", None)
    for text, vote in (("Hello!", UP), ("x", DOWN)):
        view.feedback.vote(view.conversations.answer(id, question.id, reply(text)).id, vote)
    comparison = view.arena.compare_replies(id, [
        view.conversations.answer(id, question.id, reply("y", model)).id for model in ("small", "large")
    ])  # fmt: skip
    view.arena.decide(comparison.id, "a")
    assert "thumbs" in command("export", address, "--out", tmp_path / "data")
    assert len(rows(tmp_path / "data", "rankings", Ranking)) == 2
    told = json.loads((tmp_path / "data" / "feedback.json").read_text())
    assert told == {"written": {"thumbs": 1, "comparisons": 1, "conversations": 1}, "left_out": {}}
    assert "Bradley" in command("stats", address)
    command("delete", address, "--everything", "--owner", "bob")
    assert store.feedback.stats().conversations == 1
    command("delete", address, "--conversation", id)
    assert not any(store.feedback.stats().model_dump().values())
    store.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "missing.db", "--out", "x"], "no such store"),
        (["export", "missing.db"], "name a folder"),
        (["delete", "missing.db"], "give one of"),
        (["delete", "missing.db", "--everything", "--before", "2026-01-01"], "give one of"),
        (["export", "missing.db", "--out", "x", "--since", "yesterday"], "not a day"),
        (["stats", "mysql://x/y"], "no database of this kind"),
    ],
)
def test_mistakes_end_in_one_line(command, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        command(*words)
