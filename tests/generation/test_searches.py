"""Stochastic beam, exhaustive, contrastive and diverse beam search against slow and obvious versions of themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from toys.models import random_model
from toys.texts import LENGTH, LETTERS, STOP, all_texts

from nestling.core.errors import UserError
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Request
from nestling.generation.strategies.stochastic_beam import conditioned
from nestling.model.decoder import Decoder
from nestling.tokenizer.bpe import Tokenizer

STOPS = frozenset([STOP])


# ---- stochastic beam search ----

DRAWS = 3000


def draws(toy: Decoder, letters: Tokenizer, beams: int, temperature: float) -> list[list[tuple[int, ...]]]:
    sampling = Sampling(strategy="stochastic_beam", max_tokens=3, temperature=temperature, options={"beams": beams})
    requests = [Request([1, 3], sampling, seed, stop_ids=STOPS) for seed in range(DRAWS)]
    found = Engine(toy, letters, rows=1024).generate(requests)
    return [[tuple(c.ids) for c in (done, *done.others)] for done in found]


def close(found: float, probability: float) -> bool:
    """Within five standard deviations of a relative frequency."""
    return abs(found - probability) < 5 * math.sqrt(probability * (1 - probability) / DRAWS) + 1e-9


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_stochastic_beams_draw_without_replacement(toy: Decoder, letters: Tokenizer, temperature: float) -> None:
    """How often each text is first, and is among two, against the sum over all orders in which it can be drawn."""
    p = {text: math.exp(score) for text, score in all_texts(toy, [1, 3], 3, temperature).items()}
    found = draws(toy, letters, 2, temperature)
    assert all(len(set(texts)) == 2 for texts in found)
    for text, chance in p.items():
        second = sum(other * chance / (1 - other) for name, other in p.items() if name != text)
        assert close(sum(texts[0] == text for texts in found) / DRAWS, chance)
        assert close(sum(text in texts for texts in found) / DRAWS, chance + second)


def test_as_many_stochastic_beams_as_texts_find_all(toy: Decoder, letters: Tokenizer) -> None:
    texts = all_texts(toy, [2], 2)
    sampling = Sampling(strategy="stochastic_beam", max_tokens=2, options={"beams": 50})
    done = Engine(toy, letters, rows=50).generate([Request([2], sampling, stop_ids=STOPS)])[0]
    found = {tuple(c.ids): sum(c.logprobs) for c in (done, *done.others)}
    assert found == pytest.approx(texts, abs=1e-4)


def test_conditioned_gumbels_have_the_maximum_and_the_distribution() -> None:
    """Gumbels drawn freely and moved to the maximum that they happen to have anyway are unchanged."""
    generator = torch.Generator().manual_seed(0)
    likely = torch.randn(3, 4, 9, generator=generator)
    gumbels = likely - torch.rand(3, 4, 9, generator=generator).log().neg().log()
    own = gumbels.amax(2)
    torch.testing.assert_close(conditioned(likely, gumbels, own), gumbels, rtol=1e-4, atol=1e-4)
    moved = conditioned(likely, gumbels, own - 3)
    torch.testing.assert_close(moved.amax(2), own - 3)
    formula = -torch.log(torch.exp(-(own - 3))[..., None] - torch.exp(-own)[..., None] + torch.exp(-gumbels))
    torch.testing.assert_close(moved, formula, rtol=1e-3, atol=1e-3)


# ---- exhaustive search ----


@pytest.mark.parametrize("prompt", [[1], [2, 3], [3, 3, 1, 2]])
def test_exhaustive_search_finds_the_best_of_all(toy: Decoder, letters: Tokenizer, prompt: list[int]) -> None:
    scores = all_texts(toy, prompt)
    sampling = Sampling(strategy="exhaustive", max_tokens=LENGTH, options={"rows": LETTERS ** (LENGTH - 1)})
    done = Engine(toy, letters, rows=64).generate([Request(prompt, sampling, stop_ids=STOPS)])[0]
    best = sorted(scores, key=lambda text: -scores[text])
    assert [tuple(c.ids) for c in (done, *done.others)][:10] == best[:10]


def test_exhaustive_search_in_the_tree_of_the_likeliest(model: Decoder, tokenizer: Tokenizer) -> None:
    """Of all texts made of the two likeliest tokens at each place, listed by hand."""
    prompt = [5, 9]

    @torch.no_grad()
    def tree(ids: list[int], score: float) -> list[tuple[float, list[int]]]:
        if len(ids) == 5:
            return [(score, ids)]
        values, tokens = model(torch.tensor([prompt + ids]))[0, -1].log_softmax(0).topk(2)
        branches = zip(tokens.tolist(), values.tolist(), strict=True)
        return list(itertools.chain(*(tree([*ids, token], score + value) for token, value in branches)))

    sampling = Sampling(strategy="exhaustive", max_tokens=5, top_k=2, options={"rows": 16})
    done = Engine(model, tokenizer, rows=16).generate([Request(prompt, sampling, stop_ids=frozenset())])[0]
    leaves = sorted(tree([], 0.0), reverse=True)
    assert len(leaves) == 32
    assert [c.ids for c in (done, *done.others)] == [ids for _, ids in leaves[:16]]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_tokens": 3, "top_k": 10}, "10 tokens at each of 3 places are 1,000 texts with 100 beginnings"),
        ({"max_tokens": 100}, "4 tokens at each of 100 places are about 10^60 texts with about 10^60 beginnings"),
        ({"max_tokens": 10**9, "top_k": 2}, "about 10^301029996 texts"),
    ],
)
def test_exhaustive_search_refuses_with_the_count(
    toy: Decoder, letters: Tokenizer, tokenizer: Tokenizer, model: Decoder, settings: dict, says: str
) -> None:
    engine = Engine(model, tokenizer) if settings["max_tokens"] == 3 else Engine(toy, letters)
    with pytest.raises(UserError) as caught:
        engine.submit(Request([1], Sampling(strategy="exhaustive", **settings)))
    assert says in str(caught.value)
    assert "more than 32 rows" in str(caught.value)


# ---- contrastive search ----


@torch.no_grad()
def contrastive_by_hand(
    model: Decoder, tokenizer: Tokenizer, prompt: list[int], length: int, k: int = 4, alpha: float = 0.6
) -> list[int]:
    """Su et al., eq. 5, with the whole text read anew for every candidate, in float64."""
    ids = list(prompt)
    banned = [tokenizer.special[name] for name in ("<|pad|>", "<|im_start|>") if name in tokenizer.special]
    for _ in range(length):
        logits = model.unembed(model.hidden(torch.tensor([ids]))[0, -1]).double()
        logits[banned] = -torch.inf
        likely, tokens = logits.softmax(0).topk(k)
        scores = []
        for chance, token in zip(likely.tolist(), tokens.tolist(), strict=True):
            hidden = torch.nn.functional.normalize(model.hidden(torch.tensor([[*ids, token]]))[0].double(), dim=1)
            scores.append((1 - alpha) * chance - alpha * (hidden[:-1] @ hidden[-1]).max().item())
        ids.append(tokens[max(range(k), key=scores.__getitem__)].item())
    return ids[len(prompt) :]


@pytest.mark.parametrize(("k", "alpha"), [(4, 0.6), (2, 0.3), (7, 0.9), (1, 0.5), (5, 0.0)])
def test_contrastive_search_is_its_formula(model: Decoder, tokenizer: Tokenizer, k: int, alpha: float) -> None:
    for prompt in ([5, 9, 200], [77]):
        expected = contrastive_by_hand(model, tokenizer, prompt, 15, k, alpha)
        sampling = Sampling(strategy="contrastive", max_tokens=16, options={"candidates": k, "alpha": alpha})
        done = Engine(model, tokenizer).generate([Request(prompt, sampling, stop_ids=frozenset())])[0]
        assert done.ids[:-1] == expected
    greedy = Engine(model, tokenizer).generate([Request(prompt, Sampling(temperature=0, max_tokens=15))])[0].ids
    assert (expected == greedy) == (alpha == 0 or k == 1)


def test_a_candidate_that_stops_is_only_a_candidate(model: Decoder, tokenizer: Tokenizer) -> None:
    """A stop token among the k likeliest ends the text when it is chosen, not when it is looked at."""
    expected = contrastive_by_hand(model, tokenizer, [5, 9, 200], 15)
    for place in range(1, 15):
        stop = expected[place]
        sampling = Sampling(strategy="contrastive", max_tokens=40)
        done = Engine(model, tokenizer).generate([Request([5, 9, 200], sampling, stop_ids=frozenset([stop]))])[0]
        assert done.ids == expected[: expected.index(stop) + 1]
        assert done.finish == "stop"


def test_more_candidates_than_tokens(toy: Decoder, letters: Tokenizer) -> None:
    sampling = Sampling(strategy="contrastive", max_tokens=6, options={"candidates": 9})
    done = Engine(toy, letters, rows=9).generate([Request([1], sampling, stop_ids=frozenset())])[0]
    assert done.ids[:-1] == contrastive_by_hand(toy, letters, [1], 5, LETTERS)


# ---- diverse beam search ----


def diverse(engine: Engine, **options: float) -> list[Completion]:
    sampling = Sampling(strategy="diverse_beam", max_tokens=10, options=options)
    done = engine.generate([Request([5, 9, 200], sampling, stop_ids=frozenset())])[0]
    return [done, *done.others]


def test_one_group_is_beam_search(engine: Engine) -> None:
    sampling = Sampling(strategy="beam", max_tokens=10, options={"beams": 4})
    done = engine.generate([Request([5, 9, 200], sampling, stop_ids=frozenset())])[0]
    assert [c.ids for c in (done, *done.others)] == [c.ids for c in diverse(engine, beams=4, groups=1)]


@torch.no_grad()
def test_groups_of_one_are_greedy_with_a_price(engine: Engine, model: Decoder) -> None:
    """Each group by hand: the likeliest token after λ was taken off for every earlier group's token of this step."""
    texts: list[list[int]] = [[] for _ in range(4)]
    for _ in range(10):
        taken: list[int] = []
        for text in texts:
            scores = model(torch.tensor([[5, 9, 200, *text]]))[0, -1].log_softmax(0)
            scores[[engine.tokenizer.special["<|pad|>"], engine.tokenizer.special["<|im_start|>"]]] = -torch.inf
            for token in taken:
                scores[token] -= 0.8
            text.append(int(scores.argmax()))
            taken.append(text[-1])
    found = diverse(engine, beams=4, groups=4, diversity=0.8)
    assert sorted(c.ids for c in found) == sorted(texts)
    assert found == sorted(found, key=lambda c: -sum(c.logprobs))


def test_groups_must_be_equal(engine: Engine) -> None:
    with pytest.raises(UserError, match="does not divide the beams evenly"):
        diverse(engine, beams=4, groups=3)


def test_a_strong_price_makes_first_words_differ() -> None:
    model = random_model(300)
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 3, vocab_size=300)
    engine = Engine(model, tokenizer)
    assert len({c.ids[0] for c in diverse(engine, beams=4, groups=4, diversity=50.0)}) == 4
    assert len({c.ids[0] for c in diverse(engine, beams=4, groups=1)}) < 4
