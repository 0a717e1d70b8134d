"""The ladder from raw logits to the distribution that is sampled. Each rung is a pure function on [B, V].

Every parameter is a tensor [B]: each row of the batch has its own. A dropped token gets -inf. Ties at a threshold are
kept together. The order is that of transformers' `generate`, with OpenAI's penalties between the two halves:

1. `repetition_penalty`, `count_penalties` (frequency, presence), logit bias: logits are moved, none is dropped;
2. what may not be written at all (end tokens before `min_tokens`, what a constraint forbids) goes to -inf;
3. `LADDER`: temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff. Each sees what the one before kept.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUCLEUS_GUESS = 256  # tokens sorted before sorting all: the nucleus of a trained model is nearly always smaller


def repetition_penalty(logits: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """Make tokens that occurred less likely: positive logits are divided, negative ones multiplied (CTRL, eq. in §4.1).

    Args:
        logits: [B, V].
        penalty: [B], 1.0 changes nothing.
        seen: [B, V] true where the token already occurred in the row.
    """
    factor = penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * factor, logits / factor), logits)


def count_penalties(logits: Tensor, frequency: Tensor, presence: Tensor, counts: Tensor) -> Tensor:
    """OpenAI's two penalties: logit − frequency · count − presence · [count > 0].

    Args:
        logits: [B, V].
        frequency: [B], per occurrence.
        presence: [B], once for a token that occurred.
        counts: [B, V] how often the row's generated text has each token.
    """
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def temperature(logits: Tensor, value: Tensor) -> Tensor:
    """Divide [B, V] by value [B]; a row with 0 keeps its logits (its largest is taken, see `draw`)."""
    return logits / torch.where(value == 0, 1.0, value)[:, None]


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the k[b] largest logits of each row of [B, V]; 0 keeps all (Fan et al. 2018)."""
    width = min(int(k.max()), logits.shape[1])
    if width == 0:
        return logits
    threshold = _largest(logits, width).gather(1, (k.clamp(1, width) - 1)[:, None])
    return _cut(logits, threshold, k > 0)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches p[b]; 1 keeps all (Holtzman et al. 2020)."""
    if bool((p >= 1).all()):
        return logits
    total = logits.logsumexp(1, keepdim=True)
    width = min(NUCLEUS_GUESS, logits.shape[1])
    while True:
        largest = _largest(logits, width)
        reached = (largest - total).exp().cumsum(1)
        if width == logits.shape[1] or bool(((reached[:, -1] >= p) | (p >= 1)).all()):
            break
        width = logits.shape[1]
    kept = (reached[:, :-1] < p[:, None]).sum(1, keepdim=True)  # tokens before the one that reaches p
    return _cut(logits, largest.gather(1, kept), p < 1)


def min_p(logits: Tensor, share: Tensor) -> Tensor:
    """Drop tokens less likely than share[b] of the row's likeliest; 0 keeps all (Nguyen et al. 2024)."""
    threshold = logits.amax(1, keepdim=True) + share.log()[:, None]
    return logits.masked_fill(logits < threshold, -torch.inf)


def typical_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the smallest set of tokens of typical information whose probability reaches p[b]; 1 keeps all.

    Typical is −log P(token) close to the entropy of the distribution (Meister et al. 2023, eq. 10).
    """
    logprobs = logits.log_softmax(1)
    distance = (-logprobs - _entropy(logprobs)).abs()
    nearest, order = distance.sort(1)
    reached = logprobs.exp().gather(1, order).cumsum(1)
    kept = (reached < p[:, None]).sum(1, keepdim=True).clamp_max(logits.shape[1] - 1)
    return logits.masked_fill((distance > nearest.gather(1, kept)) & (p < 1)[:, None], -torch.inf)


def epsilon_cutoff(logits: Tensor, cutoff: Tensor) -> Tensor:
    """Drop tokens less likely than cutoff[b], but never the likeliest; 0 keeps all (Hewitt et al. 2022, §4.1)."""
    return _drop_below(logits, logits.log_softmax(1), cutoff.log()[:, None])


def eta_cutoff(logits: Tensor, cutoff: Tensor) -> Tensor:
    """Drop tokens less likely than min(ε, √ε · exp(−entropy)), ε = cutoff[b]; 0 keeps all (Hewitt et al. 2022, eq. 4)."""
    logprobs = logits.log_softmax(1)
    epsilon = cutoff.log()[:, None]
    return _drop_below(logits, logprobs, torch.minimum(epsilon, epsilon / 2 - _entropy(logprobs)))


LADDER = {
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
    "typical_p": typical_p,
    "epsilon_cutoff": epsilon_cutoff,
    "eta_cutoff": eta_cutoff,
}
"""The rungs that shape a distribution, in order; each is named like the field of `Sampling` that it reads."""


def _largest(logits: Tensor, count: int) -> Tensor:
    """[B, V] -> [B, count] the largest of each row in order; on a CPU by numpy, which needs a fifth of torch's time."""
    if not logits.is_cpu:
        return logits.topk(count, dim=1).values
    rest = logits.shape[1] - count
    return torch.from_numpy(np.sort(np.partition(logits.numpy(), rest, axis=1)[:, rest:], axis=1)).flip(1)


def _cut(logits: Tensor, threshold: Tensor, rows: Tensor) -> Tensor:
    """Drop tokens of [B, V] below threshold [B, 1], in these rows [B] only."""
    return logits.masked_fill(logits < threshold.masked_fill(~rows[:, None], -torch.inf), -torch.inf)


def _drop_below(logits: Tensor, logprobs: Tensor, threshold: Tensor) -> Tensor:
    """Drop tokens whose log-probability [B, V] is below threshold [B, 1], but never the likeliest of a row."""
    return logits.masked_fill((logprobs < threshold) & (logits < logits.amax(1, keepdim=True)), -torch.inf)


def _entropy(logprobs: Tensor) -> Tensor:
    """[B, 1] in nats; a dropped token (-inf) adds nothing."""
    return -(logprobs.exp() * logprobs).nansum(1, keepdim=True)


def likeliest(logits: Tensor) -> Tensor:
    """[.., V] -> [..] the first of the likeliest; on a CPU by numpy, which needs a tenth of torch's time."""
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.is_cpu else logits.argmax(-1)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution: softmax(logits) [B, V] at uniform [B] in [0, 1).

    A row needs one random number per token, so its draw cannot depend on who shares the batch. Returns [B].
    """
    precision = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    weights = (logits - logits.amax(1, keepdim=True)).exp()
    cumulative = weights.cumsum(1, dtype=precision)
    below_one = uniform.to(precision).clamp_max(1 - torch.finfo(precision).eps).to(logits.device)
    reached = cumulative > (below_one * cumulative[:, -1])[:, None]
    return likeliest(reached.to(torch.uint8))
