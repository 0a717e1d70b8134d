"""What every file of objectives/ must keep: its toy is finite, learns, splits, resumes and looks only where it may."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nestling.core.config import Config
from nestling.core.errors import Interrupted
from nestling.core.registry import find, names
from nestling.core.runtime import detect
from nestling.training.contract import MICROBATCH, Objective, Update
from nestling.training.hooks import Hook, Run
from nestling.training.loop import train
from nestling.training.settings import TrainSettings

OBJECTIVES = names("objectives")
SETTINGS = TrainSettings(
    steps=30, optimizer="adamw", learning_rate=0.01, schedule="constant", log_every=1, compile="off", save_every=1e9
)
FP32 = detect("cpu", "fp32")


@pytest.fixture(params=OBJECTIVES)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return find("objectives", request.param)


def first_update(objective: Objective) -> Update:
    return next(iter(objective.updates(1)))


def gradients(objective: Objective, update: Update, rows: list[object] | None = None) -> dict[str, Tensor]:
    """The gradient of an update's decomposing terms, optionally with other microbatches in its place."""
    modules = objective.trainable()
    for part in modules.values():
        part.zero_grad()
    for microbatch in rows or update.microbatches:
        terms = [term for term in objective.terms(microbatch) if term.per != MICROBATCH]
        torch.stack([term.weight * term.sum / update.counts[term.per] for term in terms]).sum().backward()
    found = {}
    for name, part in modules.items():
        found.update({f"{name}.{path}": p.grad.clone() for path, p in part.named_parameters() if p.grad is not None})
    return found


def test_it_offers_what_a_stage_needs(module: ModuleType) -> None:
    assert issubclass(module.Settings, Config)
    assert all(isinstance(role, str) for role in module.READS)
    assert callable(module.build)


def test_its_toy_is_finite(module: ModuleType) -> None:
    objective = module.toy(1)
    update = first_update(objective)
    for microbatch in update.microbatches:
        for term in objective.terms(microbatch):
            assert term.sum.ndim == 0
            assert math.isfinite(float(term.sum.detach()))
            assert term.per == MICROBATCH or update.counts[term.per] > 0
    found = gradients(objective, update)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert any(gradient.abs().sum() > 0 for gradient in found.values())


def test_it_improves_in_thirty_steps(module: ModuleType, tmp_path: Path) -> None:
    objective = module.toy(1)
    name, direction = module.IMPROVES
    with torch.no_grad():
        before = objective.validate()[name]
    train(objective, SETTINGS, folder=tmp_path, runtime=FP32, seed=1, quiet=True)
    with torch.no_grad():
        after = objective.validate()[name]
    assert after > before if direction == "up" else after < before, f"{name}: {before} -> {after}"


def test_its_gradient_does_not_depend_on_the_number_of_microbatches(module: ModuleType) -> None:
    whole = gradients(toy := module.toy(1), first_update(toy))
    for count in (2, 3):
        objective = module.toy(1, microbatches=count)
        update = first_update(objective)
        assert len(update.microbatches) >= count
        for name, gradient in gradients(objective, update).items():
            torch.testing.assert_close(gradient, whole[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class _StopAt(Hook):
    def on_step(self, run: Run) -> None:
        if run.step == 3:
            run.save()
            raise Interrupted("here")


def test_it_resumes_bit_for_bit(module: ModuleType, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"steps": 6, "validate_every": 2})

    def rows(folder: Path, *hooks: Hook) -> list[dict[str, float]]:
        result = train(module.toy(1), settings, folder=folder, runtime=FP32, seed=1, hooks=hooks, quiet=True)
        timing = ("seconds", "eta", "tokens_per_second", "utilisation")
        return [{key: value for key, value in row.items() if key not in timing} for row in result.history]

    whole = rows(tmp_path / "whole")
    with pytest.raises(Interrupted):
        rows(tmp_path / "cut", _StopAt())
    again = rows(tmp_path / "cut")
    assert again[-3:] == whole[-3:]


def test_masked_positions_have_no_gradient(module: ModuleType) -> None:
    objective = module.toy(1)
    update = first_update(objective)
    other = [module.scramble_masked(microbatch, 5) for microbatch in update.microbatches]
    plain, scrambled = gradients(objective, update), gradients(objective, update, other)
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, scrambled[name], atol=1e-7, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
