"""The loop on a toy: gradients, updates, rows, stopping, bad numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from toy_objective import Toy

from nestling.core.config import parse
from nestling.core.errors import UserError
from nestling.core.runtime import Runtime, detect
from nestling.training.hooks import Hook, Run, Sampling
from nestling.training.loop import TrainResult, train
from nestling.training.resume import saved
from nestling.training.settings import TrainSettings

FP32 = detect("cpu", "fp32")


def settings(**changes: object) -> TrainSettings:
    return TrainSettings(**{"steps": 20, "optimizer": "adamw", "learning_rate": 0.02, "log_every": 1, **changes})


def run(
    toy: Toy, folder: Path, runtime: Runtime = FP32, hooks: tuple[Hook, ...] = (), **changes: object
) -> TrainResult:
    return train(toy, settings(**changes), folder=folder, runtime=runtime, seed=7, hooks=hooks, quiet=True)


def losses(result: TrainResult) -> list[float]:
    return [row["loss"] for row in result.history]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(tmp_path: Path, optimizer: str) -> None:
    result = run(Toy(), tmp_path, optimizer=optimizer, steps=60)
    assert losses(result)[-1] < 0.5 * losses(result)[0]


def test_first_steps_equal_plain_adamw_by_hand(tmp_path: Path) -> None:
    toy = Toy()
    result = run(toy, tmp_path / "a", steps=3, schedule="constant", warmup=0.0, clip=0.1, weight_decay=0.0)
    other = Toy()
    optimizer = torch.optim.AdamW(other.model.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    for step in (1, 2, 3):
        (update,) = list(other.updates(step))
        other.coefficient /= 0.9  # the toy lowers it after its last yield, which the loop reaches after learning
        ids = update.microbatches[0]
        error = (other.model(ids) - other.answers[ids]).square().sum() / 12
        loss = error + 0.01 * other.coefficient * other.model.head.weight.square().sum()
        other.coefficient *= 0.9
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 0.1)
        optimizer.step()
        assert result.history[step - 1]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for mine, theirs in zip(toy.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_accumulation_changes_nothing(tmp_path: Path, dtype: str) -> None:
    runtime = detect("cpu", dtype)
    whole = losses(run(Toy(microbatches=1), tmp_path / "1", runtime))
    parts = losses(run(Toy(microbatches=3), tmp_path / "3", runtime))
    assert parts == pytest.approx(whole, rel=1e-4 if dtype == "fp32" else 3e-2)


def test_bf16_follows_fp32_and_gives_back_full_precision(tmp_path: Path) -> None:
    toy = Toy()
    low = losses(run(toy, tmp_path / "low", detect("cpu", "bf16"), steps=40))
    high = losses(run(Toy(), tmp_path / "high", steps=40))
    assert low == pytest.approx(high, rel=0.1)
    weight = toy.model.head.weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float()), "the masters' fine steps were lost"


def test_several_updates_per_step_share_a_learning_rate(tmp_path: Path) -> None:
    result = run(Toy(updates_per_step=3), tmp_path, steps=10, schedule="cosine")
    assert result.tokens == 10 * 3 * 12
    assert [row["coefficient"] for row in result.history] == pytest.approx([0.9**k for k in range(1, 11)])
    assert len({row["lr"] for row in result.history}) == 10


def test_rows_hold_what_a_reader_needs(tmp_path: Path) -> None:
    result = run(Toy(), tmp_path, steps=12, log_every=5, validate_every=4)
    assert [row["step"] for row in result.history] == [1, 4, 5, 8, 10, 12]
    last = result.history[-1]
    assert last["loss"] == pytest.approx(last["error"] + 0.01 * 0.9**11 * last["size"], rel=1e-5)
    assert {
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "utilisation",
        "seconds",
        "eta",
        "val_error",
    } <= last.keys()
    assert last["eta"] == 0
    assert "val_error" not in result.history[2]


def test_the_objective_can_end_training(tmp_path: Path) -> None:
    toy = Toy()
    toy.stop_after = 5
    result = run(toy, tmp_path)
    assert (result.steps, result.stopped) == (5, "enough")
    again = run(Toy(), tmp_path)
    assert (again.steps, again.stopped) == (5, "enough"), "a finished run does not start again"


def test_hooks_see_every_step_and_may_add_to_the_row(tmp_path: Path) -> None:
    class Marks(Hook):
        def on_step(self, run: Run) -> None:
            run.row["mark"] = 2.0 * run.step

    sampled: list[int] = []
    result = run(Toy(), tmp_path, hooks=(Marks(), Sampling(8, sampled.append)))
    assert [row["mark"] for row in result.history] == [2.0 * k for k in range(1, 21)]
    assert sampled == [8, 16, 20]


def test_a_loss_that_is_no_number_names_the_step_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    toy = Toy()
    toy.poison = 6
    with pytest.raises(
        UserError, match=r"not finite any more in step 6 .*got 0\.02.*lower learning rate.*step-00000005"
    ):
        run(toy, tmp_path, save_every=0)
    assert saved(tmp_path / "resume")[0].name == "step-00000005"
    assert toy.model.training
    assert run(Toy(), tmp_path).steps == 20


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    toy = Toy()
    toy.model.embedding.weight.requires_grad_(False)
    before = toy.model.embedding.weight.clone()
    run(toy, tmp_path, detect("cpu", "bf16"))
    assert torch.equal(before, toy.model.embedding.weight)


@pytest.mark.parametrize(
    ("setting", "value", "nearest"), [("optimizer", "moun", "muon"), ("schedule", "cosin", "cosine")]
)
def test_an_unknown_name_is_refused_with_the_settings(setting: str, value: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"^sft.training.{setting}: .* did you mean '{nearest}'"):
        parse(TrainSettings, {"steps": 1, setting: value}, "sft.training")


@pytest.mark.parametrize("choice", ["on", "off", "auto"])
def test_compile_may_be_written_in_yaml_without_quotes(choice: str) -> None:
    data = yaml.safe_load(f"{{steps: 1, compile: {choice}}}")
    assert parse(TrainSettings, data, "training").compile == choice
