"""The ladder from raw logits to the distribution that is sampled. Each rung is a pure function on [B, V].

Every parameter is a tensor [B]: each row of the batch has its own. A dropped token gets -inf. The usual order is
repetition_penalty, temperature, top_k, top_p, min_p. Ties at a threshold are kept together.
"""

from __future__ import annotations

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


def temperature(logits: Tensor, value: Tensor) -> Tensor:
    """Divide [B, V] by value [B]; a row with 0 keeps its logits (its largest is taken, see `draw`)."""
    return logits / torch.where(value == 0, 1.0, value)[:, None]


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the k[b] largest logits of each row of [B, V]; 0 keeps all (Fan et al. 2018)."""
    width = min(int(k.max()), logits.shape[1])
    if width == 0:
        return logits
    largest = logits.topk(width, dim=1).values
    threshold = largest.gather(1, (k.clamp(1, width) - 1)[:, None])
    return logits.masked_fill((logits < threshold) & (k > 0)[:, None], -torch.inf)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches p[b]; 1 keeps all (Holtzman et al. 2020)."""
    if bool((p >= 1).all()):
        return logits
    total = logits.logsumexp(1, keepdim=True)
    width = min(NUCLEUS_GUESS, logits.shape[1])
    while True:
        largest = logits.topk(width, dim=1).values
        reached = (largest - total).exp().cumsum(1)
        if width == logits.shape[1] or bool(((reached[:, -1] >= p) | (p >= 1)).all()):
            break
        width = logits.shape[1]
    kept = (reached[:, :-1] < p[:, None]).sum(1, keepdim=True)  # tokens before the one that reaches p
    return logits.masked_fill((logits < largest.gather(1, kept)) & (p < 1)[:, None], -torch.inf)


def min_p(logits: Tensor, share: Tensor) -> Tensor:
    """Drop tokens less likely than share[b] of the row's likeliest; 0 keeps all (Nguyen et al. 2024)."""
    threshold = logits.amax(1, keepdim=True) + share.log()[:, None]
    return logits.masked_fill(logits < threshold, -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution: softmax(logits) [B, V] at uniform [B] in [0, 1).

    A row needs one random number per token, so its draw cannot depend on who shares the batch. Returns [B].
    """
    precision = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    weights = (logits - logits.amax(1, keepdim=True)).exp()
    cumulative = weights.cumsum(1, dtype=precision)
    below_one = uniform.to(precision).clamp_max(1 - torch.finfo(precision).eps).to(logits.device)
    reached = cumulative > (below_one * cumulative[:, -1])[:, None]
    return reached.to(torch.uint8).argmax(1)
