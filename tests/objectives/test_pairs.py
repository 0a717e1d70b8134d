"""Pairs of rankings, their loss and calibration, by hand and against plain loops."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from nestling.objectives import _pairs


def test_pairs_by_hand() -> None:
    # Prompt 0 has grades 2, 1, 1: two pairs (the tie gives none). Prompt 1 has grades 0, 5: one pair.
    pairs = _pairs.all_pairs(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2.0, 1.0, 1.0, 0.0, 5.0]))
    assert list(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == [(0, 1), (0, 2), (4, 3)]
    assert pairs.weights.tolist() == [0.5, 0.5, 1.0]
    assert pairs.group.tolist() == [0, 0, 1]


def test_loss_is_instructgpts() -> None:
    """-1 / C(K, 2) sum log sigmoid(r_w - r_l) per prompt, in float64, over two prompts of 4 and 6 responses."""
    stream = torch.Generator().manual_seed(0)
    sizes, expected, group, grades, scores = (4, 6), 0.0, [], [], []
    for prompt, size in enumerate(sizes):
        rewards = torch.randn(size, generator=stream, dtype=torch.float64).tolist()
        order = torch.randperm(size, generator=stream).tolist()
        losses = []
        for i, j in combinations(range(size), 2):
            better, worse = (i, j) if order[i] > order[j] else (j, i)
            losses.append(-math.log(1 / (1 + math.exp(-(rewards[better] - rewards[worse])))))
        expected += sum(losses) / math.comb(size, 2)
        group += [prompt] * size
        grades += order
        scores += rewards
    pairs = _pairs.all_pairs(torch.tensor(group), torch.tensor(grades))
    flat = torch.tensor(scores, dtype=torch.float64)
    total = _pairs.pair_losses(flat[pairs.better] - flat[pairs.worse], pairs.weights).sum()
    assert float(total) == pytest.approx(expected, rel=1e-7)


def test_all_ties_give_no_pairs_and_no_gradient() -> None:
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    pairs = _pairs.all_pairs(torch.tensor([0, 0]), torch.tensor([3.0, 3.0]))
    _pairs.pair_losses(scores[pairs.better] - scores[pairs.worse], pairs.weights).sum().backward()
    assert len(pairs.better) == 0
    assert scores.grad.tolist() == [0.0, 0.0]


def test_a_tie_of_the_model_is_half_right() -> None:
    assert _pairs.right(torch.tensor([1.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_reliability_by_hand() -> None:
    sure = math.log(0.97 / 0.03)  # confidence 0.97, in the last bar
    bars = _pairs.reliability([sure, sure, sure, -sure, 0.0])
    assert [(bar.low, bar.n) for bar in bars] == [(0.5, 1), (0.95, 4)]
    assert bars[1].confidence == pytest.approx(0.97)
    assert bars[1].accuracy == pytest.approx(0.75)
    assert _pairs.calibration_error(bars) == pytest.approx(4 / 5 * 0.22)


def test_a_calibrated_model_has_no_error() -> None:
    """Labels drawn with the model's own probabilities: the error shrinks to sampling noise."""
    stream = torch.Generator().manual_seed(1)
    margins = 2 * torch.randn(20000, generator=stream)
    kept = torch.rand(20000, generator=stream) < torch.sigmoid(margins)
    honest = torch.where(kept, margins, -margins)
    assert _pairs.calibration_error(_pairs.reliability(honest.tolist())) < 0.015
    assert _pairs.calibration_error(_pairs.reliability((3 * honest).tolist())) > 0.1
