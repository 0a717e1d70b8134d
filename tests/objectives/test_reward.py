"""The reward model: its loss from the loader's batches, its judgement of held-out rankings, its mean."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from nestling.core.errors import UserError
from nestling.core.runtime import detect
from nestling.core.types import Conversation, Message, Ranking, Response
from nestling.loading.preferences import RankingLoader
from nestling.model.checkpoint import Checkpoint
from nestling.model.heads import ScalarHead, Scored
from nestling.objectives import _toys, reward
from nestling.objectives._materials import Materials
from nestling.objectives._pairs import all_pairs
from nestling.training.loop import train
from nestling.training.settings import TrainSettings


def ranking(*grades: float, noise_free: list[float] | None = None) -> Ranking:
    prompt = (Message(role="user", content="hi"),)
    responses = tuple(Response(content="ab"[k % 2] * (k + 1), score=grade) for k, grade in enumerate(grades))
    return Ranking(prompt=prompt, responses=responses, meta={"noise_free": noise_free} if noise_free else {})


def test_the_loss_is_a_loop_over_pairs_read_at_the_closing_token() -> None:
    objective = reward.toy(3)
    torch.nn.init.normal_(objective.model.head.score.weight, generator=torch.Generator().manual_seed(0))
    (update,) = objective.updates(1)
    (batch,) = update.microbatches
    scores = objective.model(batch.ids).detach()
    end = objective.rankings._tokenizer.id("<|im_end|>")
    expected = 0.0
    for prompt in range(len(batch)):
        rows = (batch.groups == prompt).nonzero().flatten().tolist()
        losses = []
        for i in rows:
            for j in rows:
                if batch.values[i] > batch.values[j]:
                    places = [int((batch.ids[k] == end).nonzero()[-1]) for k in (i, j)]
                    margin = float(scores[i, places[0]] - scores[j, places[1]])
                    losses.append(math.log1p(math.exp(-margin)))
        expected += sum(losses) / math.comb(len(rows), 2)
    (term,) = objective.terms(batch)
    assert float(term.sum.detach()) == pytest.approx(expected, rel=1e-5)
    assert update.counts[term.per] == 6


def test_the_loaders_pairs_are_all_pairs_without_ties() -> None:
    batch = reward.toy(3).rankings.batch(0)
    pairs = all_pairs(batch.groups, batch.values)
    mine = set(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True))
    assert {(better, worse) for better, worse in batch.pairs.tolist()} == mine


def test_judgement_by_hand() -> None:
    # Prompt 0: two of three pairs right. Prompt 1: its one pair wrong. Prompt 2 is tied and not counted.
    found = reward.judge([[3.0, 1.0, 2.0], [0.0, 1.0], [5.0, 6.0]], [[3, 2, 1], [1, 0], [2, 2]])
    assert (found.accuracy, found.pairs, found.prompts) == (0.5, 4, 2)
    assert found.interval.low == 0.0
    assert found.interval.high == pytest.approx(2 / 3)
    softplus = [math.log1p(math.exp(-margin)) for margin in (2, 1, -1, -1)]
    assert found.loss == pytest.approx((sum(softplus[:3]) / 3 + softplus[3]) / 2)


def test_only_ties_can_not_be_judged() -> None:
    with pytest.raises(ValueError):
        reward.judge([[1.0, 2.0]], [[3, 3]])


def test_noise_free_grades_are_judged_apart() -> None:
    """The labels of the second response are the reverse of the truth: an accuracy of a is 1 - a against the truth."""
    toy = reward.toy(0)
    rows = [ranking(1.0, 0.0, noise_free=[0.0, 1.0]) for _ in range(3)]
    truth = reward.with_truth(rows)
    assert truth is not None
    loaders = [RankingLoader(part, toy.rankings._tokenizer, 64, 2, 0) for part in (rows, truth)]
    objective = reward.Reward(toy.settings, toy.model, toy.rankings, *loaders)
    torch.nn.init.normal_(objective.model.head.score.weight, generator=torch.Generator().manual_seed(0))
    figures = objective.validate()
    assert figures["val_pairwise_accuracy"] in (0.0, 1.0)
    assert figures["val_noise_free_pairwise_accuracy"] == 1 - figures["val_pairwise_accuracy"]


def test_truth_needs_every_row() -> None:
    assert reward.with_truth([ranking(1, 0, noise_free=[1, 0]), ranking(1, 0)]) is None


def test_validation_scores_do_not_depend_on_the_batch() -> None:
    toy = reward.toy(1)
    torch.nn.init.normal_(toy.model.head.score.weight, generator=torch.Generator().manual_seed(0))
    whole = toy.validate()
    toy.settings = reward.Settings(score_tokens=1)  # a row at a time
    assert toy.validate() == pytest.approx(whole, abs=1e-5)


def test_the_reference_score_is_the_mean_at_the_closing_tokens() -> None:
    tokenizer = _toys.byte_tokenizer()
    decoder = _toys.small_decoder(tokenizer, 0)
    model = Scored(decoder, ScalarHead(decoder.config))
    torch.nn.init.normal_(model.head.score.weight, generator=torch.Generator().manual_seed(0))
    talks = [
        Conversation(messages=(Message(role="user", content="a"), Message(role="assistant", content=text)))
        for text in ("b", "cdef", "x" * 100)  # the last one is longer than the context
    ]
    scores = []
    for talk in talks[:2]:
        ids = reward._up_to_reply(tokenizer, talk)
        assert ids[-1] == tokenizer.id("<|im_end|>")
        scores.append(float(model(torch.tensor([ids]))[0, -1].detach()))
    assert reward.reference_score(model, tokenizer, talks) == pytest.approx(sum(scores) / 2, abs=1e-5)
    with pytest.raises(UserError, match="no reference response"):
        reward.reference_score(model, tokenizer, talks[2:])


def test_a_reference_is_read_after_what_is_served_before_it() -> None:
    tokenizer = _toys.byte_tokenizer()
    said = [Message(role="user", content="a"), Message(role="assistant", content="<think>hm</think>b"), *[
        Message(role="user", content="c"), Message(role="assistant", content="<think>so</think>d")]]  # fmt: skip
    text = tokenizer.decode(reward._up_to_reply(tokenizer, Conversation(messages=tuple(said))), control=True)
    assert "assistant\nb<|im_end|>" in text
    assert text.endswith("assistant\n<think>so</think>d<|im_end|>")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_trains_from_materials(tmp_path: Path, dtype: str) -> None:
    toy = reward.toy(1)
    found = Checkpoint(toy.model.decoder, toy.rankings._tokenizer)
    runtime = detect("cpu", dtype)
    given = {"rankings": toy.rankings, "held_out": toy.held_out}
    objective = reward.build(reward.Settings(), Materials(runtime, 1, tmp_path, models={"model": found}, given=given))
    settings = TrainSettings(steps=15, optimizer="adamw", learning_rate=0.01, schedule="constant", compile="off")
    train(objective, settings, folder=tmp_path, runtime=runtime, seed=1, quiet=True)
    assert objective.validate()["val_pairwise_accuracy"] > 0.8
