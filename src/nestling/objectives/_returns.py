"""The arithmetic of learning from padded replies: penalties, advantages, clipped losses, divergence estimates.

Pure functions on tensors of shape ``[B, T]`` (B sequences, T positions). ``actions`` is a boolean mask: true where the
target of a position was *sampled* by the policy. Prompt, tool results and padding are false, and every function skips
them: a forced token in the middle of a reply neither earns reward nor discounts what comes after it.
Knows no model, no tokenizer and no text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def last_action(actions: Tensor) -> Tensor:
    """Position ``[B]`` of the last sampled token of each row of ``actions [B, T]``; 0 where a row has none."""
    places = torch.arange(actions.shape[1], device=actions.device).expand_as(actions)
    return torch.where(actions, places, 0).amax(dim=1)


def shaped_rewards(log_ratios: Tensor, scores: Tensor, actions: Tensor, beta: float) -> Tensor:
    """Reward of each action: ``-beta * (log pi - log pi_ref)``, with the sequence's score added at its last action.

    ``log_ratios [B, T]`` in nats, ``scores [B]``; returns ``[B, T]``, zero where ``actions`` is false.
    Ouyang et al. 2022, equation 2, spread over tokens as in Ziegler et al. 2019.
    """
    rewards = torch.where(actions, -beta * log_ratios, 0.0)
    rows = actions.any(dim=1)
    ends = last_action(actions)
    rewards[rows, ends[rows]] += scores[rows].to(rewards.dtype)
    return rewards


def advantages_and_returns(
    rewards: Tensor, values: Tensor, actions: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the value targets, both ``[B, T]`` and zero where ``actions`` is false.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = sum_k (gamma lam)^k delta_{t+k} (Schulman et al. 2016, equation 16),
    where t + 1 is the next *action* of the row; after the last action the value is 0, because the reply is over.
    The value target is A_t + V_t. Runs in float64: one backward sweep over T, vectorised over B.
    """
    rewards64, values64 = rewards.double(), values.double()
    advantages = torch.zeros_like(rewards64)
    next_value = torch.zeros_like(rewards64[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(rewards.shape[1])):
        acts = actions[:, t]
        delta = rewards64[:, t] + gamma * next_value - values64[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(acts, advantage, 0.0)
        next_advantage = torch.where(acts, advantage, next_advantage)
        next_value = torch.where(acts, values64[:, t], next_value)
    returns = torch.where(actions, advantages + values64, 0.0)
    return advantages.to(values.dtype), returns.to(values.dtype)


def moments(values: Tensor, mask: Tensor) -> dict[str, float]:
    """Count, sum and sum of squares over the true places of ``mask``: what ``whiten`` needs, additive over ranks."""
    chosen = values[mask].double()
    return {"count": float(chosen.numel()), "sum": float(chosen.sum()), "squares": float(chosen.square().sum())}


def whiten(values: Tensor, mask: Tensor, over: Mapping[str, float], *, floor: float = 1e-6) -> Tensor:
    """``values [B, T]`` moved and scaled to mean 0 and variance 1 by the moments ``over``; 0 where ``mask`` is false.

    The moments are those of the whole batch of experience, so this is called before minibatches are cut. A constant
    batch becomes all zeros.
    """
    count = max(over["count"], 1.0)
    mean = over["sum"] / count
    deviation = math.sqrt(max(over["squares"] / count - mean * mean, 0.0))
    return torch.where(mask, (values.double() - mean) / (deviation + floor), 0.0).to(values.dtype)


def clipped_policy_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, actions: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic surrogate per action ``[B, T]``, and where the clip removed the gradient (boolean).

    ``-min(rho A, clip(rho, 1 - clip, 1 + clip) A)`` with rho = exp(new - old): Schulman et al. 2017, equation 7.
    """
    # Masked before exp: a padded target may have any log-probability, and inf * 0 would reach the gradient as nan.
    ratio = torch.where(actions, logprobs - old_logprobs, 0.0).exp()
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    losses = torch.where(actions, -torch.minimum(free, bounded), 0.0)
    return losses, actions & (bounded < free)


def clipped_value_losses(values: Tensor, old_values: Tensor, returns: Tensor, actions: Tensor, clip: float) -> Tensor:
    """Half the squared error of the value per action ``[B, T]``; moving further than ``clip`` from the old value earns
    nothing (the larger of the clipped and the unclipped error counts)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns).square(), (near - returns).square())
    return torch.where(actions, 0.5 * errors, 0.0)


@dataclass(frozen=True)
class Divergence:
    """KL(policy || reference) of each sequence, estimated from its own samples, in nats ``[B]``.

    ``k1`` sums log pi - log pi_ref: unbiased, may be negative. ``k3`` sums rho - 1 - log rho with rho = pi_ref / pi:
    also unbiased, never negative, usually of lower variance (Schulman, "Approximating KL divergence", 2020).
    """

    k1: Tensor
    k3: Tensor


def divergence(log_ratios: Tensor, actions: Tensor) -> Divergence:
    """Both estimates from ``log_ratios = log pi - log pi_ref [B, T]`` of tokens sampled from pi."""
    ratios = torch.where(actions, log_ratios, 0.0).double()
    return Divergence(k1=ratios.sum(dim=1), k3=(torch.exp(-ratios) - 1 + ratios).sum(dim=1))


def explained_variance(predictions: Tensor, targets: Tensor) -> float:
    """1 - Var(target - prediction) / Var(target) of two equal 1-D tensors: 1 is perfect, 0 no better than a constant.

    0 when the targets are constant.
    """
    spread = targets.double().var(unbiased=False)
    if targets.numel() == 0 or spread <= 1e-12:
        return 0.0
    return float(1 - (targets.double() - predictions.double()).var(unbiased=False) / spread)


def next_beta(beta: float, kl: float, *, target: float, sequences: int, horizon: float) -> float:
    """The adaptive penalty coefficient after a batch of ``sequences`` with mean divergence ``kl`` (nats per sequence).

    Proportional controller in log space (Ziegler et al. 2019, section 2.2): the relative error is clipped to ±0.2 and
    applied at a rate of ``sequences / horizon``.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * sequences / horizon)
