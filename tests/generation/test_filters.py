"""Each rung against transformers' processors, row by row, and the draw against the softmax."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers import generation as hub

from nestling.generation import filters
from nestling.generation.sampling import Sampling

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


def test_count_penalties(logits: Tensor) -> None:
    """OpenAI's published formula, token by token: mu[j] - c[j] * frequency - float(c[j] > 0) * presence."""
    frequency = [0.0, 0.5, 1.0, 2.0, -1.0, 0.0, 0.3]
    presence = [0.0, 0.0, 0.7, 2.0, -2.0, 1.5, 0.0]
    counts = torch.randint(4, (ROWS, VOCABULARY), generator=torch.Generator().manual_seed(2))
    found = filters.count_penalties(logits, torch.tensor(frequency), torch.tensor(presence), counts)
    for row in range(ROWS):
        for j in range(0, VOCABULARY, 13):
            count = int(counts[row, j])
            expected = float(logits[row, j]) - count * frequency[row] - float(count > 0) * presence[row]
            assert float(found[row, j]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_typical_p(logits: Tensor, spread: float) -> None:
    values = [0.01, 0.2, 0.5, 0.9, 0.95, 0.999, 1.0]
    scaled = logits / 4 * spread
    scaled[:, 5:50] = -torch.inf  # what filters before it dropped
    expected = by_row(scaled, [hub.TypicalLogitsWarper(v) if v < 1 else None for v in values])
    torch.testing.assert_close(filters.typical_p(scaled, torch.tensor(values)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_epsilon_cutoff(logits: Tensor, spread: float) -> None:
    values = [0.0, 3e-4, 1e-3, 0.01, 0.1, 0.5, 0.99]
    scaled = logits / 4 * spread
    expected = by_row(scaled, [hub.EpsilonLogitsWarper(v) if v else None for v in values])
    torch.testing.assert_close(filters.epsilon_cutoff(scaled, torch.tensor(values)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_eta_cutoff(logits: Tensor, spread: float) -> None:
    values = [0.0, 3e-4, 1e-3, 0.01, 0.1, 0.5, 0.99]
    scaled = logits / 4 * spread
    scaled[:, 5:50] = -torch.inf
    expected = by_row(scaled, [hub.EtaLogitsWarper(v) if v else None for v in values])
    torch.testing.assert_close(filters.eta_cutoff(scaled, torch.tensor(values)), expected, rtol=0, atol=0)


def test_rungs_are_in_the_order_of_transformers() -> None:
    """Composed, they give what transformers' own list of warpers gives, which it makes in its order."""
    chosen = {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95, "epsilon_cutoff": 0.002, "eta_cutoff": 0.01}
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(9)) * 2
    settings = transformers.GenerationConfig(do_sample=True, temperature=0.8, **chosen)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
    theirs = model._get_logits_processor(settings, input_ids_seq_length=1, device="cpu")
    expected = theirs(torch.zeros(3, 1, dtype=torch.long), logits.clone())
    ours = logits
    for name, rung in filters.LADDER.items():
        ours = rung(ours, torch.tensor([{"temperature": 0.8, **chosen}[name]] * 3))
    assert 1 < int((expected[0] > -torch.inf).sum()) < 40
    torch.testing.assert_close(ours, expected)


def test_every_rung_is_a_field_whose_default_changes_nothing(logits: Tensor) -> None:
    for name, rung in filters.LADDER.items():
        neutral = torch.full((ROWS,), Sampling.model_fields[name].default)
        torch.testing.assert_close(rung(logits, neutral), logits, rtol=0, atol=0)


def test_likeliest_is_the_first_of_equals(logits: Tensor) -> None:
    assert torch.equal(filters.likeliest(logits), logits.argmax(-1))
    assert filters.likeliest(torch.tensor([[[1.0, 3.0, 3.0], [-torch.inf, -torch.inf, 0.0]]])).tolist() == [[1, 2]]


def test_inputs_are_left_alone(logits: Tensor) -> None:
    before = logits.clone()
    filters.top_k(logits, torch.full((ROWS,), 3))
    filters.top_p(logits, torch.full((ROWS,), 0.5))
    filters.min_p(logits, torch.full((ROWS,), 0.5))
    filters.repetition_penalty(logits, torch.full((ROWS,), 2.0), torch.ones_like(logits, dtype=torch.bool))
    filters.typical_p(logits, torch.full((ROWS,), 0.5))
    filters.eta_cutoff(logits, torch.full((ROWS,), 0.5))
    filters.count_penalties(logits, torch.ones(ROWS), torch.ones(ROWS), torch.ones_like(logits))
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
