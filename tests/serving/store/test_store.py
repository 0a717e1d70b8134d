"""Conversations and feedback, in both databases."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from nestling.core.errors import UserError
from nestling.core.types import Message, ToolCall
from nestling.serving.store.database import Database
from nestling.serving.store.records import (
    Candidate,
    Conflict,
    ConversationChanges,
    Missing,
    TokenRecord,
    Verdict,
    VoteRecord,
)
from nestling.serving.store.schema import METADATA, MODEL_VERSIONS


def test_a_reply_comes_back_as_it_was_written(store, talk, reply):
    given = reply(
        "801", system="Be brief.", tools=["calculator"], sampling={"temperature": 0.5}, seed=2**63 - 1, thinking="add",
        steps=[{"role": "tool", "content": "801"}], prompt_tokens=12, completion_tokens=3, finish="length",
        seconds=0.25, first_token_seconds=0.125,
        tokens=[TokenRecord(text="801", logprob=-0.5, top=[TokenRecord(text="802", logprob=-1.5)])],
    )  # fmt: skip
    _, question, [answer] = talk("What is 412 + 389?", given)
    assert answer == store.conversations.message(answer.id)
    assert (answer.role, answer.parent, answer.content, answer.thinking) == ("assistant", question.id, "801", "add")
    assert answer.steps == [{"role": "tool", "content": "801"}]
    assert answer.reply is not None
    for name in ("system", "tools", "sampling", "seed", "prompt_tokens", "completion_tokens", "finish", "seconds"):
        assert getattr(answer.reply, name) == getattr(given, name), name
    assert (answer.reply.model, answer.reply.checkpoint) == ("small", "small-1")
    assert store.conversations.tokens(answer.id) == given.tokens


def test_variants_are_siblings_and_the_path_follows_the_tip(store, reply):
    conversations = store.conversations
    id = conversations.create().id
    first = conversations.ask(id, "Hi", None)
    one = conversations.answer(id, first.id, reply("Hello!"))
    other = conversations.answer(id, first.id, reply("Hey."))
    edited = conversations.ask(id, "Good day", None)
    more = conversations.ask(id, "Who are you?", one.id)
    messages = conversations.messages(id)
    assert [m.id for m in messages] == [first.id, one.id, other.id, edited.id, more.id]
    assert [m.id for m in messages if m.parent == first.id] == [one.id, other.id]
    assert [m.id for m in messages if m.parent is None] == [first.id, edited.id]
    assert conversations.get(id).tip == more.id
    assert [m.content for m in conversations.path(id, more.id)] == ["Hi", "Hello!", "Who are you?"]
    assert [m.content for m in conversations.path(id, other.id)] == ["Hi", "Hey."]
    assert conversations.path(id, None) == []


def test_messages_take_turns(store, talk, reply):
    id, question, [answer] = talk("Hi", "Hello!")
    with pytest.raises(UserError, match="follows one of the assistant"):
        store.conversations.ask(id, "Hi?", question.id)
    with pytest.raises(UserError, match="follows a user's message"):
        store.conversations.answer(id, answer.id, reply())
    elsewhere, _, _ = talk("Hi", "Hello!")
    with pytest.raises(Missing):
        store.conversations.ask(elsewhere, "Hi", answer.id)


def test_a_message_is_never_older_than_its_parent(store, monkeypatch):
    id = store.conversations.create().id
    first = store.conversations.ask(id, "Hi", None)
    monkeypatch.setattr(time, "time", lambda: first.created - 3600)
    second = store.conversations.answer(id, first.id, _plain())
    assert second.created > first.created
    assert [m.id for m in store.conversations.messages(id)] == [first.id, second.id]


def test_changes_touch_what_is_given(store, talk):
    id, question, _ = talk("Hi", "Hello!")
    before = store.conversations.get(id)
    assert before.title == "Hi"
    after = store.conversations.change(id, ConversationChanges(title="Greeting", tip=question.id))
    assert (after.title, after.tip, after.system) == ("Greeting", question.id, before.system)
    with pytest.raises(Missing):
        store.conversations.change(id, ConversationChanges(tip="nowhere"))


@pytest.mark.parametrize(
    ("words", "found"),
    [("小猫", "cat"), ("猫", "cat"), ("MAT", "mat"), ("50%", "percent"), ("_", "underscore"), ("a\\b", "backslash"),
     ("nothing", None)],
)  # fmt: skip
def test_search_finds_any_part_of_a_text(store, words, found):
    texts = {"cat": "一只小猫坐在垫子上", "mat": "The cat sat on the mat", "percent": "up by 50%", "underscore": "a_b",
             "backslash": "a\\b", "plain": "up by 50 points, axb"}  # fmt: skip
    for title, content in texts.items():
        id = store.conversations.create(ConversationChanges(title=title)).id
        store.conversations.ask(id, content, None)
    page = store.conversations.page(search=words)
    assert [c.title for c in page.data] == ([found] if found else [])
    assert all(words.lower() in c.snippet.lower() for c in page.data)


def test_a_title_is_found_too(store):
    store.conversations.create(ConversationChanges(title="关于猫"))
    assert [c.title for c in store.conversations.page(search="猫").data] == ["关于猫"]


def test_pages_list_everything_once(store):
    ids = [store.conversations.create().id for _ in range(7)]
    seen, after = [], None
    while True:
        page = store.conversations.page(limit=3, after=after)
        seen += [c.id for c in page.data]
        after = page.next
        if after is None:
            break
    assert seen == ids[::-1]
    with pytest.raises(UserError, match="not the `next`"):
        store.conversations.page(after="nonsense")


def test_owners_do_not_see_each_other(store, talk):
    ann, bob = store.of("ann"), store.of("bob")
    id = ann.conversations.create().id
    question = ann.conversations.ask(id, "Secret", None)
    answer = ann.conversations.answer(id, question.id, _plain())
    flag = ann.feedback.flag(answer.id, "spam")
    assert bob.conversations.page(search="Secret").data == []
    for forbidden in (
        lambda: bob.conversations.get(id), lambda: bob.conversations.delete(id), lambda: bob.conversations.messages(id),
        lambda: bob.conversations.ask(id, "x", None), lambda: bob.feedback.vote(answer.id, VoteRecord(value=1)),
        lambda: bob.feedback.unflag(flag.id), lambda: bob.conversations.tokens(answer.id),
        lambda: bob.feedback.rank(id, [[answer.id], [question.id]]),
    ):  # fmt: skip
        with pytest.raises(Missing):
            forbidden()
    assert bob.feedback.flags() == []
    assert bob.feedback.stats().messages == 0
    assert store.feedback.stats().messages == 2
    assert len(ann.feedback.flags()) == 1


def test_votes_replace_each_other(store, talk):
    _, question, [answer] = talk("Hi", "Hello!")
    store.feedback.vote(answer.id, VoteRecord(value=1))
    store.feedback.vote(answer.id, VoteRecord(value=-1, reason="wrong", comment="no"))
    assert store.conversations.message(answer.id).vote == VoteRecord(value=-1, reason="wrong", comment="no")
    store.feedback.unvote(answer.id)
    assert store.conversations.message(answer.id).vote is None
    with pytest.raises(Missing):
        store.feedback.unvote(answer.id)
    with pytest.raises(UserError, match="only replies"):
        store.feedback.vote(question.id, VoteRecord(value=1))


def test_votes_at_once_are_one_vote(store, talk):
    """The same person in two tabs."""
    _, _, [answer] = talk("Hi", "Hello!")
    votes = [VoteRecord(value=value) for value in (1, -1) * 8]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda vote: store.feedback.vote(answer.id, vote), votes))
    assert store.conversations.message(answer.id).vote in votes


def test_rankings_keep_order_and_ties(store, talk):
    id, question, answers = talk("Hi", "a", "b", "c")
    a, b, c = [m.id for m in answers]
    ranking = store.feedback.rank(id, [[c], [a, b]], "c is best")
    [kept] = store.feedback.rankings(id)
    assert (kept.parent, kept.comment, kept.id) == (question.id, "c is best", ranking.id)
    assert [sorted(group) for group in kept.order] == [[c], sorted([a, b])]
    for wrong in ([[a]], [[a], [a]], [[a], [question.id]]):
        with pytest.raises(UserError, match="ranking takes"):
            store.feedback.rank(id, wrong)


def test_a_comparison_is_blind_until_it_is_decided(store, talk, reply):
    id, question, _ = talk("Hi")
    two = [Candidate(model="small"), Candidate(model="large", sampling={"temperature": 0})]
    comparison = store.arena.compare(id, question.id, two)
    asked = {side: store.arena.candidate(comparison.id, side).model for side in ("a", "b")}
    assert sorted(asked.values()) == ["large", "small"]
    assert comparison.identities is None
    with pytest.raises(Conflict, match="not written"):
        store.arena.decide(comparison.id, "a")
    for side, model in asked.items():
        message = store.arena.answer(comparison.id, side, reply(f"from {side}", model))
        assert message.blind
        assert message.reply is None
    with pytest.raises(Conflict, match="written already"):
        store.arena.answer(comparison.id, "a", reply())
    assert store.conversations.get(id).tip == question.id
    decided = store.arena.decide(comparison.id, "b", "clearer")
    assert {side: who.model for side, who in decided.identities.items()} == asked
    assert decided.identities["a"].checkpoint == f"{asked['a']}-1"
    assert store.conversations.get(id).tip == decided.b
    assert store.conversations.message(decided.a).reply.model == asked["a"]
    with pytest.raises(Conflict, match="decided"):
        store.arena.decide(comparison.id, "a")
    table = store.arena.table()
    assert [row.model for row in table.data] == [asked["b"], asked["a"]]
    assert (table.votes, table.undecided, table.same_model) == (1, 0, 0)


def test_sides_are_drawn(store, talk):
    id, question, _ = talk("Hi")
    two = [Candidate(model="small"), Candidate(model="large")]
    firsts = {store.arena.candidate(store.arena.compare(id, question.id, two).id, "a").model for _ in range(40)}
    assert firsts == {"small", "large"}


def test_replies_that_are_there_can_be_compared(store, talk, reply):
    id, _, answers = talk("Hi", reply("x", "small"), reply("y", "small"))
    comparison = store.arena.compare_replies(id, [m.id for m in answers])
    assert {comparison.a, comparison.b} == {m.id for m in answers}
    store.arena.decide(comparison.id, "tie")
    assert store.arena.table().same_model == 1
    assert [c.id for c in store.arena.of(id)] == [comparison.id]
    for wrong in ([answers[0].id], [answers[0].id] * 2):
        with pytest.raises(UserError, match="two"):
            store.arena.compare_replies(id, wrong)


def test_two_checkpoints_of_one_name_are_two_players(store, talk, reply):
    old, new = reply("x", "m"), reply("y", "m")
    new = new.model_copy(update={"version": new.version.model_copy(update={"checkpoint": "m-2"})})
    id, _, answers = talk("Hi", old, new)
    comparison = store.arena.compare_replies(id, [m.id for m in answers])
    store.arena.decide(comparison.id, "a" if comparison.a == answers[1].id else "b")
    assert [row.model for row in store.arena.table().data] == ["m (m-2)", "m (m-1)"]


def test_deleting_a_conversation_deletes_all_that_belongs_to_it(store, talk, reply):
    id, question, answers = talk("Hi", "a", "b")
    kept, _, _ = talk("Stay", "here")
    store.feedback.vote(answers[0].id, VoteRecord(value=1))
    store.feedback.flag(answers[1].id, "spam")
    store.feedback.rank(id, [[m.id] for m in answers])
    store.arena.compare_replies(id, [m.id for m in answers])
    store.arena.compare(id, question.id, [Candidate(model="x"), Candidate(model="y")])
    store.moderation.add([
        Verdict(direction="input", moderator="m", flagged=False, message=question.id),
        Verdict(direction="input", moderator="m", flagged=True, text="loose"),
    ])  # fmt: skip
    store.conversations.delete(id)
    expected = {"conversations": 1, "messages": 2, "replies": 1, "model_versions": 1, "verdicts": 1}
    with store.database.read() as connection:
        left = {name: len(connection.execute(select(table)).all()) for name, table in METADATA.tables.items()}
    assert {name: count for name, count in left.items() if count} == expected
    assert store.conversations.get(kept).title == "Stay"
    with pytest.raises(Missing):
        store.conversations.get(id)
    assert store.moderation.forget() == 1


def test_a_very_long_conversation_can_be_deleted(store, reply):
    """SQLite stops a cascade 1,000 rows deep, so parents must not cascade."""
    from nestling.serving.store.messages import add_message

    id = store.conversations.create().id
    with store.database.write() as connection:
        parent = None
        for turn in range(1200):
            parent = add_message(connection, id, parent, {"role": ("user", "assistant")[turn % 2], "content": "x"})
    assert len(store.conversations.path(id, parent)) == 1200
    store.conversations.delete(id)
    assert store.feedback.stats().messages == 0


def test_old_conversations_can_be_deleted_together(store, talk):
    talk("old", "x")
    cut = time.time()
    talk("new", "x")
    assert store.conversations.delete_all(before=cut) == 1
    assert [c.title for c in store.conversations.page().data] == ["new"]


def test_verdicts_are_kept_with_their_texts(store, talk):
    _, question, [answer] = talk("Bad words", "No.")
    given = Verdict(direction="input", moderator="m1", flagged=True, categories={"hate": True}, scores={"hate": 0.9})
    store.moderation.add([
        given.model_copy(update={"message": question.id}), given.model_copy(update={"text": "loose"}), given,
    ])  # fmt: skip
    assert store.moderation.of(question.id) == [given.model_copy(update={"message": question.id})]
    assert store.moderation.of(answer.id) == []
    assert [text for text, _ in store.moderation.judged()] == ["Bad words", "loose"]


def test_text_that_a_database_cannot_hold_is_mended(store, reply):
    id = store.conversations.create(ConversationChanges(title="\0", sampling={"stop": ["\ud800", "\0"]})).id
    question = store.conversations.ask(id, "a\0b\ud83d", None)
    assert question.content == "a\ufffdb\ufffd"
    assert store.conversations.get(id).sampling == {"stop": ["\ufffd", "\ufffd"]}
    assert store.conversations.page(search="\0").data[0].id == id


def test_writers_at_once_lose_nothing(store, reply):
    """Eight threads write to one conversation and to their own."""
    shared = store.conversations.create().id
    question = store.conversations.ask(shared, "Hi", None)

    def work(number: int) -> list[str]:
        ids = []
        for turn in range(5):
            ids.append(store.conversations.answer(shared, question.id, reply(f"{number}.{turn}", f"m{turn}")).id)
            store.feedback.vote(ids[-1], VoteRecord(value=1))
            own = store.conversations.create().id
            store.conversations.ask(own, "Mine", None)
        return ids

    with ThreadPoolExecutor(8) as pool:
        written = [id for ids in pool.map(work, range(8)) for id in ids]
    kept = {m.id for m in store.conversations.messages(shared) if m.vote is not None}
    assert kept == set(written)
    assert store.feedback.stats().conversations == 41
    with store.database.read() as connection:
        assert len(connection.execute(select(MODEL_VERSIONS.c.id)).all()) == 5


def test_a_failed_write_leaves_nothing(store, talk, reply):
    id, question, _ = talk("Hi")
    with pytest.raises(RuntimeError), store.database.write() as connection:
        from nestling.serving.store.messages import add_reply

        add_reply(connection, id, question.id, reply())
        raise RuntimeError
    assert [m.id for m in store.conversations.messages(id)] == [question.id]


def test_every_commit_reaches_the_disk(tmp_path):
    database = Database.open(tmp_path / "s.db")
    with database.read() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        }
        assert found == {"journal_mode": "wal", "synchronous": 2}
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    database.close()


def _plain():
    from nestling.serving.store.records import ModelVersion, Written

    return Written(version=ModelVersion(name="small"), content="Hello!")


def test_responses_are_kept_for_their_owner(store):
    """In both databases: the latest few, whole, and gone when they are to go."""
    said = (
        Message(role="user", content="Hi\0"),
        Message(role="assistant", tool_calls=(ToolCall(name="f", arguments={}),)),
    )
    ann, bob = store.of("ann").responses, store.of("bob").responses
    bob.keep({"id": "resp_b", "output": []}, said, limit=2)
    for number in range(3):
        ann.keep({"id": f"resp_{number}", "output": [{"text": "猫"}]}, said, limit=2)
    assert [ann.get(f"resp_{number}") is not None for number in range(3)] == [False, True, True]
    body, messages = ann.get("resp_2")
    assert body == {"id": "resp_2", "output": [{"text": "猫"}]}
    assert messages == (said[0].model_copy(update={"content": "Hi\ufffd"}), said[1])
    assert (bob.get("resp_2"), bob.forget("resp_2"), bob.get("resp_b") is not None) == (None, False, True)
    assert store.responses.forget_all(before=time.time() - 60) == 0
    assert store.responses.forget_all() == 3
