"""Beam search against the enumeration of all texts of a toy."""

from __future__ import annotations

import itertools

import pytest
import torch
from toys.models import random_model

from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.model.decoder import Decoder
from nestling.tokenizer.bpe import Tokenizer

LETTERS, LENGTH = 4, 4
STOP = 0


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    return Tokenizer.characters(["abc"], byte_fallback=False)  # ids: a b c <|endoftext|>


@pytest.fixture
def toy(letters: Tokenizer) -> Decoder:
    return random_model(letters.vocab_size, context=16)


def all_texts(model: Decoder, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Log-probability of every text that ends with STOP, or has LENGTH tokens without it."""
    scores: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(LETTERS), repeat=LENGTH):
        kept = text[: text.index(STOP) + 1] if STOP in text else text
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prompt, *kept[:-1]]]))[0, len(prompt) - 1 :].log_softmax(-1)
        scores[kept] = logprobs[range(len(kept)), list(kept)].sum().item()
    return scores


def search(
    model: Decoder, letters: Tokenizer, prompt: list[int], beams: int, alpha: float
) -> tuple[tuple[int, ...], float]:
    sampling = Sampling(strategy="beam", max_tokens=LENGTH, options={"beams": beams, "length_penalty": alpha})
    request = Request(prompt, sampling, stop_ids=frozenset([STOP]))
    done = Engine(model, letters, rows=400).generate([request])[0]
    return tuple(done.ids), sum(done.logprobs)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("prompt", [[1], [2, 3], [0, 0, 1, 2]])
def test_a_wide_beam_finds_the_best_of_all(toy: Decoder, letters: Tokenizer, prompt: list[int], alpha: float) -> None:
    scores = all_texts(toy, prompt)
    assert sum(torch.tensor(list(scores.values())).exp().tolist()) == pytest.approx(1, abs=1e-5)
    best = max(scores, key=lambda text: scores[text] / len(text) ** alpha)
    found, score = search(toy, letters, prompt, LETTERS**LENGTH, alpha)
    assert found == best
    assert score == pytest.approx(scores[best], abs=1e-4)


def test_one_beam_is_greedy_and_more_are_likelier(toy: Decoder, letters: Tokenizer) -> None:
    gains = []
    for prompt in itertools.product(range(LETTERS), repeat=3):
        greedy = Request(list(prompt), Sampling(temperature=0, max_tokens=LENGTH), stop_ids=frozenset([STOP]))
        done = Engine(toy, letters).generate([greedy])[0]
        assert search(toy, letters, list(prompt), 1, 0.0)[0] == tuple(done.ids)
        gains.append(search(toy, letters, list(prompt), 8, 0.0)[1] - sum(done.logprobs))
    assert max(gains) > 0.01
    assert sum(gains) > 0
