"""PPO's own parts on toys: values, advantages, returns, and the whole of it from materials; see test_on_policy.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nestling.core.errors import UserError
from nestling.core.runtime import detect, stream_seed
from nestling.core.types import Message, PromptRow
from nestling.model.checkpoint import Checkpoint
from nestling.model.heads import ScalarHead
from nestling.objectives import _toys, ppo
from nestling.objectives._episodes import closed, collect
from nestling.objectives._materials import Materials
from nestling.tokenizer.conversation import render
from nestling.training.loop import train
from nestling.training.settings import TrainSettings

ROW = PromptRow(prompt=(Message(role="user", content="a"),))
LETTER = 97  # odd, so the toy's reward model doesn't like it


def with_settings(toy: ppo.PPO, **changes: object) -> ppo.PPO:
    return ppo.PPO(toy.settings.model_copy(update=changes), toy.cast, toy.value, toy.seed)


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


def test_an_entropy_bonus_rewards_surprise() -> None:
    plain, bonus = ppo.toy(0), with_settings(ppo.toy(0), entropy_bonus=0.1, lam=1.0)
    without, having = with_settings(plain, lam=1.0).experience(1), bonus.experience(1)
    surprise = -torch.where(having.actions, having.logprobs, 0.0).sum(dim=1)
    first = having.actions.int().argmax(dim=1, keepdim=True)
    gained = (having.returns - without.returns).gather(1, first).squeeze(1)
    torch.testing.assert_close(gained, 0.1 * surprise, atol=1e-4, rtol=1e-4)


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
