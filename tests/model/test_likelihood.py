from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nestling.model import likelihood
from nestling.model.decoder import build
from nestling.model.hub import make_config
from nestling.model.likelihood import (
    hidden_logprobs,
    logits_logprobs,
    next_token_loss_sum,
    token_logprobs,
    weighted_loss_sum,
)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """The formula in float64, all logits at once."""
    logits = hidden.double() @ weight.double().T / temperature
    return logits.log_softmax(-1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("chunk", [None, 1, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_and_gradients_against_float64(chunk: int | None, temperature: float) -> None:
    hidden, weight = seeded(3, 11, 16).requires_grad_(), seeded(50, 16, seed=1).requires_grad_()
    targets = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(2))
    targets[1, :4] = -100
    outer = seeded(3, 11, seed=3)
    got = hidden_logprobs(hidden, weight, targets, temperature=temperature, chunk=chunk)
    want = exact(hidden, weight, targets, temperature) * (targets >= 0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((got * outer).sum(), (hidden, weight))
    expected = torch.autograd.grad((want * outer).sum(), (hidden, weight))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert gradients[0][1, :4].abs().max() == 0


@pytest.mark.parametrize("one_pass", [None, likelihood._loss_and_gradient])  # uncompiled: seconds for the same numbers
@pytest.mark.parametrize("chunk", [None, 5])
def test_loss_sum_and_gradients_against_float64(chunk: int | None, one_pass: likelihood.OnePass | None) -> None:
    hidden, weight = seeded(3, 11, 16).requires_grad_(), seeded(50, 16, seed=1).requires_grad_()
    targets = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(3, 11, generator=torch.Generator().manual_seed(3))
    weights[0, :6] = 0
    got = weighted_loss_sum(hidden, weight, targets, weights, chunk=chunk, one_pass=one_pass)
    want = -(exact(hidden, weight, targets) * weights).sum()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    gradients = torch.autograd.grad(got * 0.25, (hidden, weight))
    expected = torch.autograd.grad(want * 0.25, (hidden, weight))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_wanted_token_gives_zero_and_zero_gradients() -> None:
    hidden, weight = seeded(2, 3, 4).requires_grad_(), seeded(5, 4).requires_grad_()
    loss = weighted_loss_sum(hidden, weight, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.abs().max() == weight.grad.abs().max() == 0


def test_logits_at_hand_give_the_same_as_the_learner_computes() -> None:
    model = build(
        make_config({"vocab_size": 50, "context": 16, "d_model": 32, "n_layers": 2, "n_heads": 4, "init": "gpt2"})
    )
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    learner = token_logprobs(model, ids, targets, temperature=0.8)
    torch.testing.assert_close(learner, logits_logprobs(model(ids), targets, temperature=0.8), rtol=0, atol=1e-6)


def test_a_uniform_model_has_the_loss_log_v() -> None:
    model = build(make_config({"vocab_size": 64, "context": 16, "d_model": 32, "n_layers": 1, "n_heads": 4}))
    torch.nn.init.zeros_(model.output_weight)
    ids = torch.zeros(2, 8, dtype=torch.long)
    batch = SimpleNamespace(ids=ids, targets=ids, weights=torch.ones(2, 8), positions=None, segments=None)
    assert next_token_loss_sum(model, batch).item() == pytest.approx(16 * math.log(64), rel=1e-6)


def test_under_autocast_the_error_is_bf16s_own() -> None:
    hidden, weight = seeded(400, 64).requires_grad_(), (seeded(300, 64, seed=1) / 8).requires_grad_()
    targets = torch.randint(0, 300, (400,), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = weighted_loss_sum(hidden, weight, targets, torch.ones(400))
        logprobs = hidden_logprobs(hidden, weight, targets)
    assert got.dtype == logprobs.dtype == torch.float32
    want = -exact(hidden, weight, targets)
    assert got.item() == pytest.approx(want.sum().item(), rel=2e-3)
    assert (logprobs + want).abs().max() < 0.05
    gradients = torch.autograd.grad(got, (hidden, weight))
    expected = torch.autograd.grad(want.sum(), (hidden, weight))
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).norm() / b.norm() < 0.01
