"""Objectives under several processes: 1, 2 and 4 see the same replies, losses, figures and weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from several import assert_same, rows_of, together

import nestling.training.parallel  # noqa: F401 - once, before the processes part: it takes seconds
from nestling.core import ranks
from nestling.core.registry import find
from nestling.core.runtime import detect
from nestling.objectives import _toys, ppo, reward
from nestling.objectives._share import fair_share
from nestling.training.contract import Objective
from nestling.training.hooks import Hook, Run
from nestling.training.loop import train
from nestling.training.settings import TrainSettings

SETTINGS = {
    "steps": 4, "optimizer": "adamw", "epsilon": 1e-4, "learning_rate": 0.003, "log_every": 1, "validate_every": 2,
    "save_every": 1e9, "compile": "off",
}  # fmt: skip


def adaptive() -> ppo.PPO:
    """The toy of PPO with everything that looks at the whole batch: whitening, adaptive penalty, budget, best policy."""
    toy = ppo.toy(1, microbatches=2)
    settings = toy.settings.model_copy(
        update={"samples_per_prompt": 2, "epochs": 2, "beta": 0.1, "kl_target": 0.5, "horizon": 50.0, "kl_budget": 50.0}
    )
    return ppo.PPO(settings, _toys.cast(1, settings.prompts), toy.value, 1)


MADE = {"ppo": adaptive} | {name: lambda n=name: find("objectives", n).toy(1, 2) for name in ("reward", "classify")}


def _learn(folder: Path, name: str, hooks: tuple[Hook, ...] = (), changes: dict[str, Any] | None = None) -> None:
    objective: Objective = MADE[name]()
    settings = TrainSettings(**{**SETTINGS, **(changes or {})})
    train(objective, settings, folder=folder, runtime=detect("cpu", "fp32"), seed=3, hooks=hooks, quiet=True)
    kept = {f"{m}.{k}": v for m, part in objective.trainable().items() for k, v in part.state_dict().items()}
    state = objective.state_dict().get("best", {})
    if ranks.is_main():
        torch.save({**kept, **{f"best.{name}": tensor for name, tensor in state.items()}}, folder / "weights.pt")


@pytest.fixture(scope="module", params=list(MADE))
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What one process learns."""
    folder = tmp_path_factory.mktemp("alone")
    _learn(folder, request.param)
    return request.param, folder


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_learn_what_one_learns(alone: tuple[str, Path], tmp_path: Path, processes: int) -> None:
    together(processes, _learn, tmp_path, alone[0])
    assert_same(tmp_path, alone[1])
    assert len(rows_of(tmp_path)) == SETTINGS["steps"]


class _Die(Hook):
    def on_step(self, run: Run) -> None:
        if run.step == 2 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_ends_the_run_and_a_restart_goes_on(alone: tuple[str, Path], tmp_path: Path) -> None:
    name, whole = alone
    with pytest.raises(Exception, match=r"SIGKILL|another process of this run ended"):
        together(2, _learn, tmp_path, name, (_Die(),), {"save_every": 0})
    assert not (tmp_path / "weights.pt").exists()
    together(2, _learn, tmp_path, name)
    assert_same(tmp_path, whole)


def test_sharding_an_uneven_objective_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"calls its models unevenly.*use shard: none"):
        together(2, _learn, tmp_path, "reward", (), {"parallel": {"shard": "full"}})


def _too_many(folder: Path) -> None:
    toy = reward.toy(1)
    toy.rankings.batch_prompts = 1
    next(iter(toy.updates(1)))


def test_fewer_items_than_processes_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"batch_prompts: fewer than there are processes \(got 1\); use at least 2"):
        together(2, _too_many, tmp_path)


def test_shares_hold_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from nestling.objectives import _share

    monkeypatch.setattr(_share, "readers", lambda: 3)
    shares = []
    for number in range(3):
        monkeypatch.setattr(_share, "reader", lambda n=number: n)
        shares += range(*fair_share(7))
    assert shares == list(range(7))
