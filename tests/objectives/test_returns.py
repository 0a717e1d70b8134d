"""PPO's arithmetic against slow, obvious versions, hand-worked numbers and exact enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nestling.objectives import _returns


def random_batch(seed: int, rows: int = 5, width: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values [B, T] in float64 and a mask with holes (forced tokens), leading and trailing padding."""
    stream = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, width, generator=stream, dtype=torch.float64)
    values = torch.randn(rows, width, generator=stream, dtype=torch.float64)
    actions = torch.rand(rows, width, generator=stream) < 0.6
    actions[0] = False
    actions[1] = False
    actions[1, 4] = True
    return torch.where(actions, rewards, 0.0), values, actions


def slow_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 of the GAE paper, written as its double sum, for one row without holes."""
    following = [*values[1:], 0.0][: len(values)]
    deltas = [r + gamma * after - now for r, after, now in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_equal_the_double_sum_over_the_actions_alone(gamma: float, lam: float) -> None:
    rewards, values, actions = random_batch(0)
    advantages, returns = _returns.advantages_and_returns(rewards, values, actions, gamma=gamma, lam=lam)
    for row in range(len(actions)):
        places = actions[row].nonzero().flatten().tolist()
        expected = slow_advantages(rewards[row, places].tolist(), values[row, places].tolist(), gamma, lam)
        assert advantages[row, places].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[row, places].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, values[row, places].tolist(), strict=True)], abs=1e-12
        )
    assert not advantages[~actions].any()
    assert not returns[~actions].any()


def test_advantage_by_hand() -> None:
    # gamma 1, lam 0.5: deltas are 1 + 3 - 2 = 2 and 4 + 0 - 3 = 1, so A = [2 + 0.5, 1] and the returns are A + V.
    actions = torch.tensor([[False, True, True, False]])
    rewards = torch.tensor([[0.0, 1.0, 4.0, 0.0]])
    values = torch.tensor([[9.0, 2.0, 3.0, 9.0]])
    advantages, returns = _returns.advantages_and_returns(rewards, values, actions, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[0.0, 2.5, 1.0, 0.0]]
    assert returns.tolist() == [[0.0, 4.5, 4.0, 0.0]]


def test_float32_input_keeps_float64_accuracy() -> None:
    rewards, values, actions = random_batch(3, rows=4, width=400)
    exact, _ = _returns.advantages_and_returns(rewards, values, actions)
    rounded, _ = _returns.advantages_and_returns(rewards.float(), values.float(), actions)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-5)


def test_shaped_rewards_by_hand() -> None:
    # The score lands on the last action (position 2 of row 0, although position 3 follows), the penalty on each action.
    log_ratios = torch.tensor([[5.0, 0.5, -1.0, 7.0], [1.0, 1.0, 1.0, 1.0]])
    actions = torch.tensor([[False, True, True, False], [False, False, False, False]])
    rewards = _returns.shaped_rewards(log_ratios, torch.tensor([3.0, 8.0]), actions, beta=0.2)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.1, 3.2, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_whitening_over_actions_only() -> None:
    values = torch.tensor([[1.0, 100.0], [3.0, -100.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False], [True, False]])
    whitened = _returns.whiten(values, mask, _returns.moments(values, mask))
    assert whitened.flatten().tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0], abs=1e-5)


def test_whitening_by_parts_equals_whitening_the_whole() -> None:
    values, _, mask = random_batch(1)
    halves = [_returns.moments(values[:2], mask[:2]), _returns.moments(values[2:], mask[2:])]
    together = {key: halves[0][key] + halves[1][key] for key in halves[0]}
    whole = _returns.whiten(values, mask, _returns.moments(values, mask))
    torch.testing.assert_close(_returns.whiten(values[2:], mask[2:], together), whole[2:])


def test_whitening_a_constant_gives_zero() -> None:
    values, mask = torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool)
    assert _returns.whiten(values, mask, _returns.moments(values, mask)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),  # good and already likelier: bounded at 1.2
        (0.5, 2.0, -1.0, False),  # good but less likely: the gradient stays
        (0.5, -2.0, 1.6, True),  # bad and already rarer: bounded at 0.8
        (1.5, -2.0, 3.0, False),  # bad but likelier: the gradient stays
    ],
)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    losses, cut = _returns.clipped_policy_losses(new, old, torch.full_like(old, advantage), mask, clip=0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert cut.item() is clipped
    assert (new.grad.item() == 0) is clipped


def test_masked_positions_get_no_gradient_even_from_infinities() -> None:
    new = torch.tensor([[-1.0, -math.inf, 0.5]], requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    losses, _ = _returns.clipped_policy_losses(new, torch.full((1, 3), -1.0), torch.ones(1, 3), mask, clip=0.2)
    losses.sum().backward()
    assert new.grad[0, 1] == 0
    assert torch.isfinite(new.grad).all()


@pytest.mark.parametrize(
    ("value", "loss", "moves"),
    [
        (0.1, 0.5 * 0.9**2, True),  # within the clip: the plain error
        (0.5, 0.5 * 0.8**2, False),  # ran ahead of the clip towards the target: counted as 0.2, no gradient
        (-0.5, 0.5 * 1.5**2, True),  # ran away from the target: the larger, unclipped error
    ],
)
def test_value_loss_by_hand(value: float, loss: float, moves: bool) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    one = torch.ones(1, 1)
    losses = _returns.clipped_value_losses(values, 0 * one, one, one.bool(), clip=0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert (values.grad.item() != 0) is moves


def test_divergence_estimates_match_the_exact_kl() -> None:
    """Weighted by the policy's probabilities, both estimates of a one-token reply are exactly KL(p || q)."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    estimates = _returns.divergence((p / q).log().unsqueeze(1), torch.ones(3, 1, dtype=torch.bool))
    assert float((p * estimates.k1).sum()) == pytest.approx(exact)
    assert float((p * estimates.k3).sum()) == pytest.approx(exact)
    assert (estimates.k3 >= 0).all()


def test_divergence_ignores_forced_tokens() -> None:
    estimates = _returns.divergence(torch.tensor([[1.0, 50.0]]), torch.tensor([[True, False]]))
    assert estimates.k1.tolist() == [1.0]


def test_adaptive_coefficient_by_hand() -> None:
    assert _returns.next_beta(0.1, 6.0, target=6.0, sequences=100, horizon=1000) == pytest.approx(0.1)
    assert _returns.next_beta(0.1, 60.0, target=6.0, sequences=100, horizon=1000) == pytest.approx(0.1 * 1.02)
    assert _returns.next_beta(0.1, 0.0, target=6.0, sequences=100, horizon=1000) == pytest.approx(0.1 * 0.98)
    assert _returns.next_beta(0.1, 6.6, target=6.0, sequences=100, horizon=1000) == pytest.approx(0.1 * 1.01)


def test_explained_variance() -> None:
    targets = torch.tensor([1.0, 2.0, 3.0])
    assert _returns.explained_variance(targets + 7, targets) == pytest.approx(1.0)
    assert _returns.explained_variance(torch.zeros(3), targets) == pytest.approx(0.0)
    assert _returns.explained_variance(targets, torch.ones(3)) == 0.0


def test_gradient_at_the_old_policy_is_the_policy_gradient() -> None:
    """Over every two-token reply of a three-letter policy, the surrogate's expected gradient at ratio 1 is that of the
    expected reward (enumerated exactly), because V = 0, gamma = lam = 1 and an unwhitened advantage is the return."""
    logits = torch.tensor([[0.3, -0.2, 0.1], [0.5, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0], [2.0, 0.0, -1.0]], dtype=torch.float64)
    first, second = logits.log_softmax(-1)
    expected = (first.exp()[:, None] * second.exp()[None, :] * reward).sum()
    (exact,) = torch.autograd.grad(expected, logits, retain_graph=True)

    replies = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    logprobs = torch.stack([first[replies[:, 0]], second[replies[:, 1]]], dim=1)
    mask = torch.ones(9, 2, dtype=torch.bool)
    scores = reward[replies[:, 0], replies[:, 1]]
    rewards = _returns.shaped_rewards(torch.zeros(9, 2, dtype=torch.float64), scores, mask, beta=0.0)
    advantages, _ = _returns.advantages_and_returns(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    losses, _ = _returns.clipped_policy_losses(logprobs, logprobs.detach(), advantages, mask, clip=0.2)
    probabilities = logprobs.detach().sum(dim=1).exp()
    (surrogate,) = torch.autograd.grad((probabilities[:, None] * losses).sum(), logits)
    torch.testing.assert_close(-surrogate, exact)
