"""What on-policy algorithms share, on toys: what is an action, what is scored, what is kept, when it ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestling.core.errors import UserError
from nestling.core.runtime import detect
from nestling.core.types import Message, PromptRow
from nestling.generation.chat import replies
from nestling.loading.batches import TokenBatch
from nestling.objectives import _toys, ppo
from nestling.objectives._cast import Verdicts, action_targets, score
from nestling.objectives._episodes import Episode, closed, collect, pad
from nestling.objectives._on_policy import Experience, OnPolicy, PolicySettings
from nestling.objectives._scoring import by_length, length_groups
from nestling.objectives.reward import Reward
from nestling.training.contract import Update
from nestling.training.hooks import Hook, Run
from nestling.training.loop import train
from nestling.training.settings import TrainSettings

ROW = PromptRow(prompt=(Message(role="user", content="a"),))
LETTER = 97  # odd, so the toy's reward model doesn't like it


def with_settings(toy: ppo.PPO, **changes: object) -> ppo.PPO:
    return ppo.PPO(toy.settings.model_copy(update=changes), toy.cast, toy.value, toy.seed)


def episode(prompt: list[int], reply: list[int], sampled: list[bool] | None = None, ended: bool = True) -> Episode:
    return Episode(ROW, prompt, reply, sampled or [True] * len(reply), "", ended)


def test_padding_by_hand() -> None:
    # A tool's result (8) was forced into the middle of the first reply.
    asked = [episode([9, 4, 7], [21, 8, 2], [True, False, True]), episode([5], [2])]
    tokens, lengths, actions = pad(asked, filler=0)
    assert tokens.tolist() == [[9, 4, 7, 21, 8, 2], [5, 2, 0, 0, 0, 0]]
    assert actions.int().tolist() == [[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert lengths.tolist() == [6, 2]
    targets = action_targets(tokens, actions)
    assert targets.tolist() == [[-1, -1, 21, -1, 2, -1], [2, -1, -1, -1, -1, -1]]


def test_a_cut_reply_is_closed_within_the_context() -> None:
    assert closed(episode([5, 6], [7, 2]), end=2, context=4) == [5, 6, 7, 2]
    assert closed(episode([5, 6], [7, 8], ended=False), end=2, context=5) == [5, 6, 7, 8, 2]
    assert closed(episode([5, 6], [7, 8], ended=False), end=2, context=4) == [5, 6, 7, 2]


def test_groups_of_similar_length_hold_every_row_once_within_the_budget() -> None:
    lengths = torch.randint(1, 40, (50,), generator=torch.Generator().manual_seed(0))
    groups = list(length_groups(lengths, budget=120))
    assert sorted(torch.cat(groups).tolist()) == list(range(50))
    assert all(len(group) * int(lengths[group].max()) <= 120 for group in groups)


def test_scores_do_not_depend_on_padding_or_grouping() -> None:
    model = _toys.small_decoder(_toys.byte_tokenizer(), 0)
    tokens, lengths = torch.randint(0, 200, (7, 12)), torch.tensor([12, 3, 5, 9, 1, 12, 2])

    def first_logit(ids: torch.Tensor) -> torch.Tensor:
        return model(ids)[..., 0]

    found = by_length(first_logit, lengths, 20, tokens)
    for row, length in enumerate(lengths.tolist()):
        alone = first_logit(tokens[row : row + 1, :length]).detach()[0]
        torch.testing.assert_close(found[row, :length], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_learner_scores_what_the_engine_sampled(temperature: float) -> None:
    toy = with_settings(ppo.toy(0), temperature=temperature)
    rows = [prompt.row for prompt in toy.cast.prompts.batch(0)]
    answers = replies(toy.engine, rows, toy.settings.sampling, 3)
    episodes = collect(toy.engine, toy.cast.tokenizer, rows, toy.settings.sampling, 3)
    scored = score(toy.cast, episodes, end=toy.end, temperature=temperature, budget=200)
    for n, answer in enumerate(answers):
        expected = torch.tensor(answer.completion.logprobs)
        torch.testing.assert_close(scored.logprobs[n][scored.actions[n]], expected, atol=1e-4, rtol=1e-4)
    assert scored.log_ratios.abs().max() == 0  # the reference starts as the policy


def test_forced_tokens_take_no_part() -> None:
    toy = ppo.toy(0)
    forced = episode([LETTER] * 3, [LETTER, 50, 52, toy.end], [True, False, False, True])
    scored = score(toy.cast, [forced], end=toy.end, temperature=1.0, budget=100)
    assert scored.figures()["response_tokens"] == 2
    assert (scored.logprobs[0] != 0).tolist() == [False, False, True, False, False, True, False]


def test_the_penalty_coefficient_steers_to_the_target() -> None:
    low, fixed = with_settings(ppo.toy(0), kl_target=5.0, horizon=100.0), with_settings(ppo.toy(0), kl_target=None)
    for toy in (low, fixed):
        list(toy.updates(1))  # nothing is learnt, so the divergence stays 0
    assert low.beta == pytest.approx(0.01 * (1 - 0.2 * 16 / 100))
    assert fixed.beta == 0.01


def test_it_ends_when_the_budget_is_spent_and_gives_the_best_back() -> None:
    toy = with_settings(ppo.toy(0), kl_budget=1.0)
    before = toy.validate()
    assert toy.finished() is None
    start = {name: x.clone() for name, x in toy.cast.policy.state_dict().items()}
    with torch.no_grad():  # far away, and to the reward model's taste: letters of even code points only
        toy.cast.policy.embedding.weight.mul_(30)
    after = toy.validate()
    assert after["val_kl"] > 1.0
    assert "beyond the budget" in str(toy.finished())
    figures = toy.restore_best()
    assert figures["proxy_reward"] == before["val_proxy_reward"]
    assert all(torch.equal(x, start[name]) for name, x in toy.cast.policy.state_dict().items())


def test_a_lifted_budget_never_ends_and_keeps_the_highest_reward() -> None:
    toy = ppo.toy(0)
    toy.validate()
    toy.best_figures["proxy_reward"] = -100.0
    toy.validate()
    assert toy.best_figures["proxy_reward"] > -100
    toy._kl = 1e6
    assert toy.finished() is None


def test_the_true_reward_is_reported_and_not_learnt() -> None:
    toy = ppo.toy(0)
    plain = toy.experience(1)
    toy.cast = replace(toy.cast, scorer=lambda row, text: float(len(row.prompt[0].content)))
    scored = toy.experience(1)
    mean = sum(len(p.row.prompt[0].content) for p in toy.cast.prompts.batch(0)) / 16
    assert toy.metrics()["true_reward"] == pytest.approx(mean)
    torch.testing.assert_close(scored.returns, plain.returns)


def test_text_is_mixed_in_by_its_own_count() -> None:
    toy = ppo.toy(0)
    update = next(toy.updates(1))
    (text,) = [piece for piece in update.microbatches if isinstance(piece, TokenBatch)]
    (term,) = toy.terms(text)
    logprobs = toy.cast.policy(text.ids).log_softmax(-1).gather(-1, text.targets.unsqueeze(-1)).squeeze(-1)
    assert term.weight == 0.01
    assert update.counts["text_tokens"] == 40
    assert term.sum.item() == pytest.approx(float(-(logprobs.detach() * text.weights).sum()), rel=1e-4)
    with pytest.raises(UserError, match="needs text"):
        ppo.PPO(toy.settings, replace(toy.cast, texts=None), toy.value, 0)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="minibatches must divide"):
        ppo.Settings(rollouts=10, minibatches=3)
    with pytest.raises(UserError, match="another number of prompts"):
        with_settings(ppo.toy(0), rollouts=20)


class Plain(OnPolicy):
    """The smallest algorithm there is: the reply's return, minus the mean return of the replies to its prompt."""

    def weigh(self, verdicts: Verdicts) -> tuple[Experience, dict[str, float]]:
        returns = self.rewards(verdicts).sum(dim=1).unflatten(0, (-1, self.settings.samples_per_prompt))
        gains = (returns - returns.mean(dim=1, keepdim=True)).flatten().unsqueeze(1)
        advantages = torch.where(verdicts.actions, gains, 0.0)
        parts: tuple[Tensor, ...] = (verdicts.tokens, verdicts.lengths, verdicts.actions, verdicts.logprobs)
        return Experience(*parts, advantages), {"spread": float(returns.std(dim=1).mean())}


def plain(samples: int = 4, **changes: object) -> Plain:
    settings = PolicySettings(**{**_toys.POLICY, "samples_per_prompt": samples, "minibatches": 1, **changes})
    return Plain(settings, _toys.cast(1, settings.prompts), 1)


def first_update(toy: OnPolicy) -> Update:
    return next(iter(toy.updates(1)))


def test_a_prompt_gets_several_different_replies_side_by_side() -> None:
    toy = plain(4)
    experience = toy.experience(1)
    asked = [prompt.ids for prompt in toy.cast.prompts.batch(0)]
    assert (len(asked), len(experience.lengths)) == (4, 16)
    for n, row in enumerate(experience.tokens.tolist()):
        assert row[: len(asked[n // 4])] == asked[n // 4]
    assert len({tuple(row) for row in experience.tokens[:4].tolist()}) > 1
    gains = experience.advantages.sum(dim=1) / experience.actions.sum(dim=1)
    torch.testing.assert_close(gains.unflatten(0, (4, 4)).sum(dim=1), torch.zeros(4), atol=1e-5, rtol=0)


def test_an_algorithm_of_one_method_learns(tmp_path: Path) -> None:
    toy = plain(4, minibatches=2)
    before = toy.validate()["val_proxy_reward"]
    loop = TrainSettings(steps=30, optimizer="adamw", learning_rate=0.01, schedule="constant", compile="off")
    result = train(toy, loop, folder=tmp_path, runtime=detect("cpu", "fp32"), seed=1, quiet=True)
    assert toy.validate()["val_proxy_reward"] > before + 0.2
    assert {"spread", "clip_fraction", "kl", "proxy_reward"} <= result.history[-1].keys()


def test_replies_and_tokens_are_counted() -> None:
    update = first_update(plain(4, microbatches=3))
    replies_here = update.microbatches[:-1]  # the last piece is text
    assert update.counts["replies"] == sum(len(piece.lengths) for piece in replies_here) == 16
    assert update.counts["tokens"] == sum(int(piece.actions.sum()) for piece in replies_here)


class _Watch(Hook):
    """Notes the dtype that replies were computed in."""

    def __init__(self, toy: OnPolicy) -> None:
        self.toy, self.seen = toy, set()

    def on_step(self, run: Run) -> None:
        self.seen.add(self.toy.engine._slots.cache.keys[0].dtype)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_replies_are_computed_in_the_dtype_of_training(tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    toy = plain(4)
    watch = _Watch(toy)
    train(toy, TrainSettings(steps=2), folder=tmp_path, runtime=detect("cpu", dtype), seed=1, hooks=[watch], quiet=True)
    assert watch.seen == {expected}


def test_widths_that_change_are_not_compiled_by_themselves(tmp_path: Path) -> None:
    """Each new width would be compiled anew, which never pays; where widths stay, time decides, and is noted."""
    for fixed in (False, True):
        toy, folder = plain(4), tmp_path / str(fixed)
        toy.fixed_shapes = fixed
        train(toy, TrainSettings(steps=5), folder=folder, runtime=detect("cpu", "fp32"), seed=1, quiet=True)
        assert (folder / "resume" / "compile.json").exists() == fixed
    assert not OnPolicy.fixed_shapes
    assert not Reward.fixed_shapes


def test_texts_are_scored_together_as_one_by_one() -> None:
    toy = plain(1)
    rows = [prompt.row for prompt in toy.cast.prompts.batch(0)]
    texts = ["b" * n for n in range(len(rows))]
    together = toy.proxy_scores(rows, texts)
    assert together == pytest.approx([toy.proxy_scores([r], [t])[0] for r, t in zip(rows, texts, strict=True)])
    with pytest.raises(ValueError):
        toy.proxy_scores(rows, texts[1:])
