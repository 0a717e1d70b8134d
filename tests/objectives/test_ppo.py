"""PPO's experience and bookkeeping on toys: what is an action, what is scored, what is kept, when it ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestling.core.errors import UserError
from nestling.core.runtime import detect, stream_seed
from nestling.core.types import Message, PromptRow
from nestling.generation.chat import replies
from nestling.loading.batches import TokenBatch
from nestling.model.checkpoint import Checkpoint
from nestling.model.heads import ScalarHead
from nestling.objectives import _toys, ppo
from nestling.objectives._cast import action_targets, score
from nestling.objectives._episodes import Episode, closed, collect, pad
from nestling.objectives._materials import Materials
from nestling.objectives._scoring import by_length, length_groups
from nestling.tokenizer.conversation import render
from nestling.training.loop import train
from nestling.training.settings import TrainSettings

ROW = PromptRow(prompt=(Message(role="user", content="a"),))
LETTER = 97  # odd, so the toy's reward model doesn't like it


def episode(prompt: list[int], reply: list[int], sampled: list[bool] | None = None, ended: bool = True) -> Episode:
    return Episode(ROW, prompt, reply, sampled or [True] * len(reply), "", ended)


def with_settings(toy: ppo.PPO, **changes: object) -> ppo.PPO:
    return ppo.PPO(toy.settings.model_copy(update=changes), toy.cast, toy.value, toy.seed)


def test_padding_by_hand() -> None:
    # A tool's result (8) was forced into the middle of the first reply.
    padded = pad([episode([9, 4, 7], [21, 8, 2], [True, False, True]), episode([5], [2])], filler=0)
    assert padded.tokens.tolist() == [[9, 4, 7, 21, 8, 2], [5, 2, 0, 0, 0, 0]]
    assert padded.actions.int().tolist() == [[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert padded.lengths.tolist() == [6, 2]
    targets = action_targets(padded.tokens, padded.actions)
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


def test_the_first_update_starts_at_ratio_one() -> None:
    toy = ppo.toy(0)
    update = next(toy.updates(1))
    experience = update.microbatches[0]
    policy, value = toy.terms(experience)
    assert policy.sum.item() == pytest.approx(-experience.advantages[experience.actions].sum().item(), abs=1e-4)
    assert value.sum.item() == pytest.approx(
        0.5 * experience.returns[experience.actions].square().sum().item(), rel=1e-4
    )
    assert toy._tally["clipped"] == 0
    assert update.counts["tokens"] == experience.actions.sum()


def test_advantages_are_whitened_over_the_whole_batch() -> None:
    experience = ppo.toy(0).experience(1)
    chosen = experience.advantages[experience.actions]
    assert chosen.mean().item() == pytest.approx(0, abs=1e-5)
    assert chosen.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert not experience.advantages[~experience.actions].any()


def test_the_return_holds_score_penalty_and_missing_end() -> None:
    """With lam = 1 the value target at the first action is the undiscounted sum of the reply's rewards."""
    toy = with_settings(ppo.toy(0), lam=1.0, beta=0.5, missing_end_penalty=3.0)
    with torch.no_grad():  # another policy than the reference, so that the penalty counts
        toy.cast.policy.embedding.weight += 0.1 * torch.randn_like(toy.cast.policy.embedding.weight)
    rows = [prompt.row for prompt in toy.cast.prompts.batch(0)]
    experience = toy.experience(1)
    seed = stream_seed(toy.seed, "ppo replies", 1, 0)
    episodes = collect(toy.engine, toy.cast.tokenizer, rows, toy.settings.sampling, seed)
    for n, found in enumerate(episodes):
        whole = torch.tensor([closed(found, toy.end, 64)])
        expected = float(toy.cast.reward(whole)[0, -1]) - (0.0 if found.ended else 3.0)
        with torch.no_grad():
            logprobs = [model(whole[:, :-1]).log_softmax(-1) for model in (toy.cast.policy, toy.cast.reference)]
        for place, token in enumerate(found.reply, len(found.prompt) - 1):
            expected -= 0.5 * float(logprobs[0][0, place, token] - logprobs[1][0, place, token])
        first = len(found.prompt) - 1
        assert experience.returns[n, first].item() == pytest.approx(expected, abs=1e-3)


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


def test_an_entropy_bonus_rewards_surprise() -> None:
    plain, bonus = ppo.toy(0), with_settings(ppo.toy(0), entropy_bonus=0.1, lam=1.0)
    without, having = with_settings(plain, lam=1.0).experience(1), bonus.experience(1)
    surprise = -torch.where(having.actions, having.logprobs, 0.0).sum(dim=1)
    first = having.actions.int().argmax(dim=1, keepdim=True)
    gained = (having.returns - without.returns).gather(1, first).squeeze(1)
    torch.testing.assert_close(gained, 0.1 * surprise, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_trains_from_materials(tmp_path: Path, dtype: str) -> None:
    toy = ppo.toy(0)
    tokenizer, runtime = toy.cast.tokenizer, detect("cpu", dtype)
    models = {}
    for role in ("policy", "reward"):
        decoder = _toys.small_decoder(tokenizer, 0)
        models[role] = Checkpoint(decoder, tokenizer, None if role == "policy" else ScalarHead(decoder.config))
    models["reward"].head.score.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    models["reward"].provenance["reward_mean"] = 2.5
    given = {"prompts": toy.cast.prompts, "held_out": toy.cast.held_out}
    settings = toy.settings.model_copy(update={"text_weight": 0.0, "epochs": 2})
    objective = ppo.build(settings, Materials(runtime, 1, tmp_path, models=models, given=given))
    assert objective.validate()["val_kl"] == pytest.approx(0, abs=0.05 if dtype == "bf16" else 1e-4)
    loop = TrainSettings(
        steps=6, optimizer="adamw", learning_rate=0.02, schedule="constant", compile="off", log_every=1
    )
    result = train(objective, loop, folder=tmp_path, runtime=runtime, seed=1, quiet=True)
    assert result.history[-1]["kl"] > 0
    assert all(0 <= row["clip_fraction"] <= 1 for row in result.history)
    row, text = toy.cast.held_out[0], "b"
    ids = render(tokenizer, [*row.prompt, Message(role="assistant", content=text)]).ids[:-1]  # without the last "\n"
    expected = float(objective.cast.reward(torch.tensor([ids]))[0, -1])
    found, cut = objective.proxy_scores([row, row], [text, "b" * 100])
    assert found == pytest.approx(expected, abs=1e-2 if dtype == "bf16" else 1e-5)
    assert cut != found


def test_it_improves_in_bf16(tmp_path: Path) -> None:
    toy = ppo.toy(1)
    before = toy.validate()["val_proxy_reward"]
    loop = TrainSettings(steps=30, optimizer="adamw", learning_rate=0.01, schedule="constant", compile="off")
    train(toy, loop, folder=tmp_path, runtime=detect("cpu", "bf16"), seed=1, quiet=True)
    assert toy.validate()["val_proxy_reward"] > before + 0.2


def test_a_reward_model_without_a_head_is_refused(tmp_path: Path) -> None:
    toy = ppo.toy(0)
    models = dict.fromkeys(("policy", "reward"), Checkpoint(toy.cast.policy, toy.cast.tokenizer))
    with pytest.raises(UserError, match="no scalar head"):
        ppo.build(toy.settings, Materials(detect("cpu", "fp32"), 1, tmp_path, models=models))
