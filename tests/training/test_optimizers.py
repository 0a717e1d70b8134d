"""Muon against a plain float64 reference, parameter groups, and the schedules."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_objective import Blocks

from nestling.core.registry import find, names
from nestling.core.runtime import detect
from nestling.training.optimizers.muon import Muon, orthogonal
from nestling.training.parameters import group, hidden_names, named_parameters
from nestling.training.settings import TrainSettings

SHAPES = [(8, 8), (16, 8), (8, 16), (16, 8), (8, 8), (5, 12)]


def reference_step(weight: Tensor, grad: Tensor, momentum: Tensor, lr: float, beta: float, decay: float) -> Tensor:
    """Muon on one matrix, in float64, step by step as the paper's page writes it; `momentum` changes in place."""
    momentum.copy_(beta * momentum + (1 - beta) * grad)
    x = (1 - beta) * grad + beta * momentum
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if transposed else x
    scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
    return weight * (1 - lr * decay) - lr * scale * x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_batched_muon_equals_the_plain_one(dtype: torch.dtype, tolerance: float) -> None:
    stream = torch.Generator().manual_seed(3)
    weights = [nn.Parameter(torch.randn(shape, generator=stream)) for shape in SHAPES]
    expected = [w.detach().double() for w in weights]
    momenta = [torch.zeros_like(w) for w in expected]
    optimizer = Muon(weights, lr=0.1, momentum=0.95, weight_decay=0.5, dtype=dtype)
    for _ in range(4):
        for index, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=stream)
            expected[index] = reference_step(expected[index], weight.grad.double(), momenta[index], 0.1, 0.95, 0.5)
        optimizer.step()
    for weight, right in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), right, atol=tolerance, rtol=tolerance)


def test_muon_agrees_with_torch() -> None:
    mine, theirs = (nn.Parameter(torch.ones(6, 4).tril()) for _ in range(2))
    ours = Muon([mine], lr=0.1, momentum=0.9, weight_decay=0.1, dtype=torch.bfloat16)
    torchs = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.1)
    stream = torch.Generator().manual_seed(0)
    for _ in range(3):
        mine.grad = torch.randn(6, 4, generator=stream)
        theirs.grad = mine.grad.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-2)


def test_orthogonal_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal(matrices, torch.float32))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.25
    assert float(torch.linalg.svdvals(matrices).max()) > 5


def test_groups_are_decided_by_place_and_dimension() -> None:
    modules = {"a": Blocks()}
    groups = group(named_parameters(modules), hidden_names(modules))
    assert set(groups.hidden) == {"a.blocks.0.1.weight", "a.blocks.1.1.weight"}
    assert set(groups.matrices) == {"a.embedding.weight", "a.head.weight"}
    assert all(p.ndim == 1 for p in groups.vectors.values())
    total = sum(len(part) for part in (groups.hidden, groups.matrices, groups.vectors))
    assert total == len(list(modules["a"].parameters()))


def test_a_shared_parameter_is_stepped_once() -> None:
    blocks = Blocks()
    assert len(named_parameters({"a": blocks, "b": blocks})) == len(list(blocks.parameters()))


@pytest.mark.parametrize("name", names("training.optimizers"))
def test_only_matrices_decay(name: str) -> None:
    modules = {"m": Blocks()}
    groups = group(named_parameters(modules), hidden_names(modules))
    settings = TrainSettings(steps=1, optimizer=name, weight_decay=0.5, learning_rate=0.1)
    for parameter in modules["m"].parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in find("training.optimizers", name).build(groups, settings, detect("cpu", "fp32")):
        optimizer.step()
    for parameter in groups.vectors.values():
        assert torch.all(parameter == 1)
    for parameter in [*groups.hidden.values(), *groups.matrices.values()]:
        assert torch.all(parameter < 1)


@pytest.mark.parametrize("name", names("training.schedules"))
def test_every_schedule_rises_first_and_stays_in_bounds(name: str) -> None:
    settings = TrainSettings(steps=100, warmup=0.1, decay=0.4, floor=0.1)
    values = [find("training.schedules", name).multiplier(step, settings) for step in range(1, 101)]
    assert values[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert all(0 < value <= 1 for value in values)
    assert all(a >= b for a, b in pairwise(values[9:]))


def test_schedules_by_hand() -> None:
    settings = TrainSettings(steps=10, warmup=0.2, decay=0.4)
    wsd = find("training.schedules", "wsd").multiplier
    assert [wsd(step, settings) for step in range(1, 11)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    cosine = find("training.schedules", "cosine").multiplier
    assert cosine(6, settings) == pytest.approx(0.5)
    assert cosine(10, settings) == pytest.approx(0.0)


def test_settings_refuse_a_negative_rate(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        TrainSettings(steps=1, learning_rate=-1)
