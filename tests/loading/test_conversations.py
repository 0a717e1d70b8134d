"""Chat, ranking and prompt loaders on rows small enough to write out."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest
import torch

from nestling.core.errors import UserError
from nestling.core.types import Conversation, Message, PromptRow, Ranking, Response
from nestling.loading.chats import ChatLoader
from nestling.loading.preferences import RankingLoader
from nestling.loading.prompts import PromptLoader
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import parse_reply, render, reply_ids


def _chat(question: str, answer: str) -> Conversation:
    return Conversation(messages=(Message(role="user", content=question), Message(role="assistant", content=answer)))


CHATS = [_chat("q" * n, "a" * (n % 5 + 1)) for n in range(1, 14)]


def test_chat_rows_hold_every_assistant_token_once(tokenizer: Tokenizer) -> None:
    loader = ChatLoader(CHATS, tokenizer, context=96, batch_rows=2, seed=0)
    expected: Counter[int] = Counter()
    for chat in CHATS:
        rendered = render(tokenizer, chat.messages)
        expected += Counter(n for n, written in zip(rendered.ids, rendered.mask, strict=True) if written)
    found: Counter[int] = Counter()
    for batch in loader.validation():
        assert batch.ids.shape == (2, 96)
        found += Counter(batch.targets[batch.weights > 0].tolist())
    assert found == expected
    assert loader.row_count < len(CHATS)
    assert loader.fill > 0.7


def test_chat_positions_restart_with_each_conversation(tokenizer: Tokenizer) -> None:
    batch = next(ChatLoader(CHATS, tokenizer, context=96, batch_rows=2, seed=0).validation())
    start = tokenizer.id("<|im_start|>")
    user = tokenizer.encode("u")[0]
    begins = (batch.ids[:, :-1] == start) & (batch.ids[:, 1:] == user)
    assert (batch.positions[:, :-1][begins] == 0).all()
    learnt = [row[on].unique() for row, on in zip(batch.segments, batch.weights > 0, strict=True)]
    assert begins.sum() == sum(map(len, learnt)) > len(batch)


def test_chat_too_long(tokenizer: Tokenizer) -> None:
    chats = [*CHATS, _chat("q" * 20, "a" * 90)]
    with pytest.raises(UserError, match="conversation 13 has"):
        ChatLoader(chats, tokenizer, 64, 2, 0)
    dropped = ChatLoader(chats, tokenizer, 64, 2, 0, too_long="drop")
    assert (dropped.conversations, dropped.dropped, dropped.cut) == (13, 1, 0)
    cut = ChatLoader([*chats, _chat("q" * 90, "a")], tokenizer, 64, 2, 0, too_long="cut")
    assert (cut.conversations, cut.dropped, cut.cut) == (14, 1, 1)
    with pytest.raises(UserError, match="no conversation"):
        ChatLoader([], tokenizer, 64, 2, 0)


def _said(*parts: str) -> tuple[Message, ...]:
    """Messages from "role: content"."""
    return tuple(Message.from_row(dict(zip(("role", "content"), part.split(": ", 1), strict=True))) for part in parts)


def _learnt(loader: ChatLoader, tokenizer: Tokenizer) -> list[tuple[str, list[str]]]:
    """What each piece reads, in the order of the data, and what is learnt of it."""
    packed, found = loader._packed, []
    assert packed.learnt is not None
    for start, length in zip(packed.pieces.starts, packed.pieces.lengths, strict=True):
        ids, on = packed.stream[start : start + length + 1], packed.learnt[start : start + length + 1]
        parts = [list(part) for mine, part in groupby(range(len(ids)), key=lambda place: bool(on[place])) if mine]
        text = tokenizer.decode(ids.tolist(), control=True)
        found.append((text, [tokenizer.decode(ids[part].tolist(), control=True) for part in parts]))
    return found


def _written(*parts: str) -> str:
    return "".join(f"<|im_start|>{part.replace(': ', chr(10), 1)}<|im_end|>\n" for part in parts)


def test_a_reply_is_learnt_after_what_is_served_before_it(tokenizer: Tokenizer) -> None:
    """A piece ends with each reply that thinks; later ones hold no thought of it, and each reply is learnt once."""
    talk = _said(
        "system: s", "user: 1", "assistant: a", "user: 2", "assistant: <think>hm</think>\n\nb", "user: 3", "assistant: c",
        "user: 4", "assistant: <think>well</think>d", "tool: 9", "assistant: <think>so</think>e", "user: 5", "assistant: f",
        "user: 6",
    )  # fmt: skip
    loader = ChatLoader([Conversation(messages=talk)], tokenizer, 512, 1, seed=0)
    first = ("system: s", "user: 1", "assistant: a", "user: 2")
    second = (*first, "assistant: b", "user: 3", "assistant: c", "user: 4")
    third = (*second, "assistant: d", "tool: 9", "assistant: e", "user: 5", "assistant: f", "user: 6")
    turn = ("assistant: <think>well</think>d", "tool: 9", "assistant: <think>so</think>e")
    assert _learnt(loader, tokenizer) == [
        (_written(*first, "assistant: <think>hm</think>\n\nb"), ["a<|im_end|>", "<think>hm</think>\n\nb<|im_end|>"]),
        (_written(*second, *turn), ["c<|im_end|>", "<think>well</think>d<|im_end|>", "<think>so</think>e<|im_end|>"]),
        (_written(*third), ["f<|im_end|>"]),
    ]
    asked = Conversation(messages=talk[:6])  # nothing is left to learn behind the thought
    assert len(_learnt(ChatLoader([asked], tokenizer, 512, 1, seed=0), tokenizer)) == 1


def test_the_history_of_a_piece_is_the_prompt_that_is_served(tokenizer: Tokenizer) -> None:
    """A client sends back what it was told: the reply without its thought."""
    asked, told = _said("user: 1"), "assistant: <think>hm</think> b"
    reply = reply_ids(tokenizer, _said(told)[0])
    sent = [*asked, parse_reply(tokenizer, reply), *_said("user: 2")]
    prompt = render(tokenizer, sent, prompt=True).ids
    talk = Conversation(messages=(*asked, *_said(told, "user: 2", "assistant: <think>so</think>c")))
    packed = ChatLoader([talk], tokenizer, 512, 1, seed=0)._packed
    second = packed.stream[packed.pieces.starts[1] :].tolist()
    assert second[: len(prompt)] == prompt
    assert tokenizer.decode(second[len(prompt) :], control=True) == "<think>so</think>c<|im_end|>\n"


def test_conversations_without_thoughts_are_one_piece_each(tokenizer: Tokenizer) -> None:
    talks = [
        (
            "user: 1",
            "assistant:  a",
            "user: 2",
            "assistant: b <think>x</think>",
            "user: <think>x</think>",
            "assistant: c",
        ),
        ("system: s", "user: 1", "assistant: a", "tool: 9", "assistant: <think>b", "system: t", "assistant: </think>"),
        ("assistant: a", "user: 2", "assistant: "),
    ]
    loader = ChatLoader([Conversation(messages=_said(*talk)) for talk in talks], tokenizer, 512, 1, seed=0)
    replies = [["a", "b <think>x</think>", "c"], ["a", "<think>b", "</think>"], ["a", ""]]
    wanted = [(_written(*talk).replace("\n a", "\na"), [f"{text}<|im_end|>" for text in said])
              for talk, said in zip(talks, replies, strict=True)]  # fmt: skip
    assert _learnt(loader, tokenizer) == wanted
    assert (loader.conversations, loader.dropped, loader.cut) == (3, 0, 0)
    assert not {tokenizer.id("<think>"), tokenizer.id("</think>")} & set(loader._packed.stream.tolist())


def test_prompts_hold_no_thoughts_of_earlier_replies(tokenizer: Tokenizer) -> None:
    said = _said("user: 1", "assistant: <think>hm</think>b", "user: 2")
    wanted = _written("user: 1", "assistant: b", "user: 2") + "<|im_start|>assistant\n"
    (prompt,) = PromptLoader([PromptRow(prompt=said)], tokenizer, 512, 1, seed=0).batch(0)
    assert tokenizer.decode(prompt.ids, control=True) == wanted
    responses = (Response(content="<think>so</think>x", score=1), Response(content="y", score=0))
    batch = RankingLoader([Ranking(prompt=said, responses=responses)], tokenizer, 512, 1, seed=0).batch(0)
    rows = [
        tokenizer.decode(row[:length].tolist(), control=True)
        for row, length in zip(batch.ids, batch.lengths, strict=True)
    ]
    assert rows == [f"{wanted}<think>so</think>x<|im_end|>", f"{wanted}y<|im_end|>"]
    assert tokenizer.id("<think>") in batch.ids[0].tolist()


def _ranking(prompt: str, *values: float) -> Ranking:
    responses = tuple(Response(content="r" * (n + 1), score=value) for n, value in enumerate(values))
    return Ranking(prompt=(Message(role="user", content=prompt),), responses=responses)


RANKINGS = [_ranking("p", 3, 1, 1), _ranking("pp", 0, 1), _ranking("ppp", 1, 2, 3, 4)]


def test_ranking_batch_by_hand(tokenizer: Tokenizer) -> None:
    batch = next(RankingLoader(RANKINGS, tokenizer, 64, 3, seed=0).validation())
    assert batch.groups.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    # first prompt: 3 > 1 twice, the tie of the last two left out; second: row 4 beats row 3; third: all six
    assert batch.pairs.tolist()[:3] == [[0, 1], [0, 2], [4, 3]]
    assert len(batch.pairs) == 9
    assert batch.pair_weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1] + [1 / 6] * 6)
    assert (batch.values[batch.pairs[:, 0]] > batch.values[batch.pairs[:, 1]]).all()
    ends = batch.ids[torch.arange(9), batch.lengths - 1]
    assert ends.tolist() == [tokenizer.id("<|im_end|>")] * 9
    assert (len(batch), len(batch.pairs), len(batch.ids)) == (3, 9, 9)
    assert (batch.ids[~batch.mask] == tokenizer.id("<|pad|>")).all()
    row = batch.ids[1, : batch.lengths[1]].tolist()
    assert tokenizer.decode(row, control=True) == "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\nrr<|im_end|>"


def test_ranking_microbatches_keep_groups_whole(tokenizer: Tokenizer) -> None:
    batch = next(RankingLoader(RANKINGS, tokenizer, 64, 3, seed=0).validation())
    parts = [batch.rows(0, 1), batch.rows(1, 3)]
    assert parts[1].groups.tolist() == [0, 0, 1, 1, 1, 1]
    assert parts[1].pairs.tolist()[0] == [1, 0]
    assert [len(part) for part in parts] == [1, 2]
    assert parts[1].numbers.tolist() == [1, 2]
    for part in parts:
        assert (part.values[part.pairs[:, 0]] > part.values[part.pairs[:, 1]]).all()
    assert torch.equal(torch.cat([part.pair_weights for part in parts]), batch.pair_weights)


def test_ranking_too_long(tokenizer: Tokenizer) -> None:
    long = Ranking(
        prompt=(Message(role="user", content="p"),),
        responses=(Response(content="r" * 90, score=1), Response(content="r", score=0)),
    )
    with pytest.raises(UserError, match="ranking 1 has a response"):
        RankingLoader([RANKINGS[0], long], tokenizer, 64, 2, 0)
    dropped = RankingLoader([RANKINGS[0], long], tokenizer, 64, 2, 0, too_long="drop")
    assert (dropped.row_count, dropped.dropped) == (1, 1)
    cut = next(RankingLoader([long], tokenizer, 64, 1, 0, too_long="cut").validation())
    assert cut.lengths[0] == 64
    assert cut.ids[0, 63] == tokenizer.id("<|im_end|>")


def test_prompts_end_ready_to_answer(tokenizer: Tokenizer) -> None:
    rows = [PromptRow(prompt=(Message(role="user", content="x" * n),), meta={"n": n}) for n in range(1, 6)]
    loader = PromptLoader(rows, tokenizer, context=64, batch_rows=2, seed=0, reserve=16)
    seen = [prompt for step in range(5) for prompt in loader.batch(step)]
    assert Counter(prompt.row.meta["n"] for prompt in seen) == dict.fromkeys(range(1, 6), 2)
    assert all(tokenizer.decode(p.ids, control=True).endswith("<|im_start|>assistant\n") for p in seen)
    assert all(prompt.ids == render(tokenizer, prompt.row.prompt, prompt=True).ids for prompt in seen)
    assert [p.ids for p in loader.batch(3)] == [p.ids for p in seen[6:8]]
    with pytest.raises(UserError, match="prompt 0 has"):
        PromptLoader(rows, tokenizer, context=32, batch_rows=2, seed=0, reserve=16)
    assert PromptLoader(rows, tokenizer, 38, 2, 0, reserve=16, too_long="drop").dropped == 2
