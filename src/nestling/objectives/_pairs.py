"""The arithmetic of rankings: pairs, the pairwise loss, accuracy and calibration. Pure functions, no model.

A batch of rankings is flat: R responses, ``group [R]`` says which prompt each belongs to and ``grades [R]`` how good
it is (higher is better; only the order within a group matters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """P comparisons: ``better[p]`` is preferred to ``worse[p]`` (indices of responses) in prompt ``group[p]``.

    ``weights[p]`` is 1 / (number of comparisons of that prompt), so a prompt weighs 1 however many responses it has.
    """

    better: Tensor
    worse: Tensor
    group: Tensor
    weights: Tensor


def all_pairs(group: Tensor, grades: Tensor) -> Pairs:
    """Every comparison between two responses of the same prompt with different grades. A tie says nothing: no pair.

    InstructGPT (Ouyang et al. 2022, equation 1) divides by C(K, 2); with ties the divisor is the number of pairs left.
    """
    preferred = (group[:, None] == group[None, :]) & (grades[:, None] > grades[None, :])
    better, worse = preferred.nonzero(as_tuple=True)
    of = group[better]
    groups = int(group.max()) + 1 if group.numel() else 0
    counts = torch.bincount(of, minlength=groups)
    return Pairs(better, worse, of, 1.0 / counts[of].float())


def pair_losses(margins: Tensor, weights: Tensor) -> Tensor:
    """Weighted ``-log sigmoid(r_better - r_worse)`` of each pair, from the margins ``[P]``."""
    return -F.logsigmoid(margins) * weights


def right(margins: Tensor) -> Tensor:
    """1 where the margin of a pair is positive, a half where the model ties, else 0: ``[P]`` float64."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram. Example: ``Bin(0.6, 0.7, n=40, confidence=0.65, accuracy=0.7)``."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def reliability(margins: Sequence[float], bins: int = 10) -> list[Bin]:
    """How often the model is right where it claims probability p. ``margins``: r_better - r_worse of held-out pairs.

    The confidence is sigmoid(|margin|), the probability it gives the response *it* prefers, so it lies in [0.5, 1] and
    ``bins`` equal bars cover that range; empty bars are left out.
    """
    margin = torch.as_tensor(margins, dtype=torch.float64)
    confidence, hits = torch.sigmoid(margin.abs()), right(margin)
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    bars = []
    for k in range(bins):
        inside = place == k
        if n := int(inside.sum()):
            low, high = 0.5 + 0.5 * k / bins, 0.5 + 0.5 * (k + 1) / bins
            bars.append(Bin(low, high, n, float(confidence[inside].mean()), float(hits[inside].mean())))
    return bars


def calibration_error(bars: Sequence[Bin]) -> float:
    """Expected calibration error: the gap between confidence and accuracy, averaged over pairs (Guo et al. 2017)."""
    total = sum(bar.n for bar in bars)
    return sum(bar.n * abs(bar.confidence - bar.accuracy) for bar in bars) / total if total else 0.0
