"""Each rung against transformers' processors, row by row, and the draw against the softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import generation as hub

from nestling.generation import filters

ROWS, VOCABULARY = 7, 700


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 4


def by_row(logits: Tensor, processors: list) -> Tensor:
    ids = torch.zeros(1, 1, dtype=torch.long)
    return torch.cat([p(ids, logits[i : i + 1].clone()) if p else logits[i : i + 1] for i, p in enumerate(processors)])


def test_temperature(logits: Tensor) -> None:
    values = [0.1, 0.5, 0.7, 1.0, 1.3, 2.0, 10.0]
    expected = by_row(logits, [hub.TemperatureLogitsWarper(v) for v in values])
    torch.testing.assert_close(filters.temperature(logits, torch.tensor(values)), expected)


def test_top_k(logits: Tensor) -> None:
    values = [1, 2, 5, 50, 699, 5000, 0]
    expected = by_row(logits, [hub.TopKLogitsWarper(v) if v else None for v in values])
    torch.testing.assert_close(filters.top_k(logits, torch.tensor(values)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])  # nearly uniform rows need more than the first guess
def test_top_p(logits: Tensor, spread: float) -> None:
    values = [0.01, 0.3, 0.5, 0.9, 0.95, 0.999, 1.0]
    scaled = logits / 4 * spread
    expected = by_row(scaled, [hub.TopPLogitsWarper(v) if v < 1 else None for v in values])
    torch.testing.assert_close(filters.top_p(scaled, torch.tensor(values)), expected, rtol=0, atol=0)


def test_min_p(logits: Tensor) -> None:
    values = [0.0, 0.01, 0.05, 0.1, 0.5, 0.9, 1.0]
    expected = by_row(logits, [hub.MinPLogitsWarper(v) if v else None for v in values])
    torch.testing.assert_close(filters.min_p(logits, torch.tensor(values)), expected, rtol=0, atol=0)


def test_repetition_penalty(logits: Tensor) -> None:
    values = [1.0, 1.1, 1.2, 1.5, 2.0, 0.8, 5.0]
    history = torch.randint(VOCABULARY, (ROWS, 30), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(ROWS, VOCABULARY, dtype=torch.bool).scatter(1, history, True)
    expected = torch.cat(
        [
            hub.RepetitionPenaltyLogitsProcessor(v)(history[i : i + 1], logits[i : i + 1].clone())
            for i, v in enumerate(values)
        ]
    )
    torch.testing.assert_close(filters.repetition_penalty(logits, torch.tensor(values), seen), expected)


def test_inputs_are_left_alone(logits: Tensor) -> None:
    before = logits.clone()
    filters.top_k(logits, torch.full((ROWS,), 3))
    filters.top_p(logits, torch.full((ROWS,), 0.5))
    filters.min_p(logits, torch.full((ROWS,), 0.5))
    filters.repetition_penalty(logits, torch.full((ROWS,), 2.0), torch.ones_like(logits, dtype=torch.bool))
    assert torch.equal(before, logits)


def test_draw_has_the_softmax_distribution() -> None:
    logits = torch.tensor([2.0, -torch.inf, 1.0, 0.5, -1.0])
    grid = (torch.arange(100_000) + 0.5) / 100_000  # a fine grid of uniforms, so the counts are exact
    tokens = filters.draw(logits.expand(len(grid), -1), grid)
    frequency = tokens.bincount(minlength=5) / len(grid)
    torch.testing.assert_close(frequency, logits.softmax(0), rtol=0, atol=3e-5)


def test_draw_at_the_edges_never_takes_a_dropped_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    assert filters.draw(logits, torch.tensor([0.0, 1 - 2**-32], dtype=torch.float64)).tolist() == [1, 2]
