"""Chat, ranking and prompt loaders on rows small enough to write out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from nestling.core.errors import UserError
from nestling.core.types import Conversation, Message, PromptRow, Ranking, Response
from nestling.loading.chats import ChatLoader
from nestling.loading.preferences import RankingLoader
from nestling.loading.prompts import PromptLoader
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render


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
    assert batch.counts == {"prompts": 3.0, "pairs": 9.0, "sequences": 9.0}
    assert (batch.ids[~batch.mask] == tokenizer.id("<|pad|>")).all()
    row = batch.ids[1, : batch.lengths[1]].tolist()
    assert tokenizer.decode(row, control=True) == "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\nrr<|im_end|>"
    assert tokenizer.decode(row[batch.prompt_lengths[1] :]) == "rr"


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
    assert (dropped.row_count, dropped.dropped, dropped.dropped_rankings) == (1, 1, 1)
    cut = next(RankingLoader([long], tokenizer, 64, 1, 0, too_long="cut").validation())
    assert cut.lengths[0] == 64
    assert cut.ids[0, 63] == tokenizer.id("<|im_end|>")


def test_prompts_end_ready_to_answer(tokenizer: Tokenizer) -> None:
    rows = [PromptRow(prompt=(Message(role="user", content="x" * n),), meta={"n": n}) for n in range(1, 6)]
    loader = PromptLoader(rows, tokenizer, context=64, batch_rows=2, seed=0, reserve=16)
    seen = [prompt for step in range(5) for prompt in loader.batch(step)]
    assert Counter(prompt.number for prompt in seen) == dict.fromkeys(range(5), 2)
    assert len({prompt.seed for prompt in seen}) == 10
    assert all(tokenizer.decode(p.ids, control=True).endswith("<|im_start|>assistant\n") for p in seen)
    assert all(prompt.row.meta["n"] == prompt.number + 1 for prompt in seen)
    assert [p.ids for p in loader.batch(3)] == [p.ids for p in seen[6:8]]
    with pytest.raises(UserError, match="prompt 0 has"):
        PromptLoader(rows, tokenizer, context=32, batch_rows=2, seed=0, reserve=16)
    assert PromptLoader(rows, tokenizer, 38, 2, 0, reserve=16, too_long="drop").dropped == 2


def test_resuming_on_other_data_is_refused(tokenizer: Tokenizer) -> None:
    loader = ChatLoader(CHATS, tokenizer, 96, 2, 0)
    loader.restore(loader.state())
    with pytest.raises(UserError, match="content"):
        ChatLoader([_chat("other", "a"), *CHATS[1:]], tokenizer, 96, 2, 0).restore(loader.state())
    rankings = RankingLoader(RANKINGS, tokenizer, 64, 3, seed=0)
    rankings.restore(rankings.state())
    with pytest.raises(UserError, match="seed"):
        RankingLoader(RANKINGS, tokenizer, 64, 3, seed=1).restore(rankings.state())
