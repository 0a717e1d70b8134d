"""Speculation is only faster: the same tokens at temperature 0, the same distribution otherwise."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from toys.models import random_model

from nestling.core.errors import UserError
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request
from nestling.generation.slots import Limits
from nestling.generation.speculation import LookUp, settle
from nestling.model.decoder import Decoder
from nestling.model.likelihood import token_logprobs
from nestling.tokenizer.bpe import Tokenizer

NO_STOP: frozenset[int] = frozenset()
PROMPTS = [[5, 9, 200], [77], list(range(30, 60)), [7, 8, 9] * 9, [9] * 17]


@pytest.fixture
def near(model: Decoder) -> Decoder:
    """A draft model that often agrees."""
    generator = torch.Generator().manual_seed(1)
    draft = random_model(model.config.vocab_size)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    return draft


def engine_with(model: Decoder, tokenizer: Tokenizer, draft: Decoder | None, **settings: object) -> Engine:
    engine = Engine(model, tokenizer, **{"rows": 8, **settings})
    if draft is not None:
        engine.draft_with(draft)
    return engine


def measured(p: Tensor, q: Tensor) -> Tensor:
    """The distribution of the token that `settle` gives, when proposals come from q: by going through all numbers.

    Midpoints of cells stand for the uniform numbers; both enter in steps, so the sum is exact up to one cell.
    """
    cells = 256
    middle = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    first, second = (grid.flatten() for grid in torch.meshgrid(middle, middle, indexing="ij"))
    total = torch.zeros_like(p)
    for token, chance in enumerate(q.tolist()):
        if chance == 0:
            continue
        size = len(first)
        proposed = torch.full((size,), token)
        tokens, _ = settle(p.expand(size, -1), proposed, q.expand(size, -1), (first, second))
        total += chance * tokens.bincount(minlength=len(p)) / size
    return total


@pytest.mark.parametrize("seed", range(6))
def test_what_is_settled_is_distributed_as_wanted(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(2, 6, generator=generator, dtype=torch.float64) * 2).softmax(1)
    p[seed % 6] = 0  # filtered out
    p = p / p.sum()
    for proposing in (
        q,
        p,
        torch.eye(6, dtype=torch.float64)[seed % 6],
        torch.eye(6, dtype=torch.float64)[int(p.argmax())],
    ):
        torch.testing.assert_close(measured(p, proposing), p, rtol=0, atol=6 / 256)


@pytest.mark.parametrize("drafted", [True, False], ids=["draft", "look-up"])
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 3, "repetition_penalty": 1.5, "presence_penalty": 0.5},
    ],
    ids=["plain", "filtered"],
)
def test_texts_are_distributed_as_without(tokenizer: Tokenizer, drafted: bool, changes: dict) -> None:
    """All texts of three tokens over a vocabulary of four, counted with and without, against their exact chances."""
    model, draft = random_model(tokenizer.vocab_size), random_model(tokenizer.vocab_size, d_model=16)
    allowed = {40: 100.0, 41: 100.0, 42: 100.0, 43: 100.0}  # nothing else can come
    sampling = Sampling(max_tokens=3, logit_bias=allowed, **changes)
    prompt = [40, 41, 42, 40, 41, 43, 40, 41]
    engine = engine_with(model, tokenizer, draft if drafted else None, rows=250)
    many = 6000
    counts: list[Counter[tuple[int, ...]]] = []
    for speculate in (0, 3):
        seeds = range(many * speculate, many * speculate + many)
        done = engine.generate([Request(prompt, sampling, s, stop_ids=NO_STOP, speculate=speculate) for s in seeds])
        counts.append(Counter(tuple(d.ids) for d in done))
    assert sum(d.proposed for d in done) >= many
    assert 0 < sum(d.accepted for d in done) < sum(d.proposed for d in done)
    plain, speculated = counts
    distance = sum(abs(plain[text] - speculated[text]) for text in {*plain, *speculated}) / 2 / many
    assert distance < 0.05  # two samples of this size over 64 texts differ by 0.04 at most


@pytest.mark.parametrize("source", ["draft", "look-up", "itself"])
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_greedy_gives_the_same_tokens(
    model: Decoder, near: Decoder, tokenizer: Tokenizer, source: str, frozen: bool
) -> None:
    draft = {"draft": near, "look-up": None, "itself": model}[source]
    engine = engine_with(model, tokenizer, draft, frozen=frozen, rows=3)
    for strategy in ("sample", "greedy"):
        sampling = Sampling(strategy=strategy, temperature=0, max_tokens=40, repetition_penalty=1.0)
        plain = engine.generate([Request(p, sampling) for p in PROMPTS])
        done = engine.generate([Request(p, sampling, speculate=k) for k, p in enumerate(PROMPTS, 1)])
        assert [d.ids for d in done] == [d.ids for d in plain]
        assert [d.finish for d in done] == [d.finish for d in plain]
        assert all(d.accepted <= d.proposed for d in done)
        assert sum(d.accepted for d in done) > 0
        if source == "itself":
            assert all(d.accepted == d.proposed for d in done)


def test_fewer_steps_are_needed(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = engine_with(model, tokenizer, model)
    running = engine.submit(Request([1, 2], Sampling(temperature=0, max_tokens=40), stop_ids=NO_STOP, speculate=4))
    steps = 0
    while running.completion is None:
        engine.step()
        steps += 1
    assert steps == 8


@pytest.mark.parametrize("drafted", [True, False], ids=["draft", "look-up"])
def test_log_probabilities_and_neighbours(model: Decoder, near: Decoder, tokenizer: Tokenizer, drafted: bool) -> None:
    """Cached rows hold what was written, whoever shares the batch, also through tool results and long prompts."""

    def interject(ids: list[int]) -> list[int] | None:
        return [3, 4, 5] if len(ids) in (5, 12) else None

    engine = engine_with(model, tokenizer, near if drafted else None, limits=Limits(prefill=9))
    sampling = Sampling(temperature=0.7, max_tokens=25)
    asked = [Request(p, sampling, i, interject, NO_STOP, speculate=i % 4) for i, p in enumerate(PROMPTS * 2)]
    asked.append(Request([1, 2, 3], Sampling(strategy="beam", max_tokens=9)))
    together = engine.generate(asked)
    for request, done in zip(asked, together, strict=True):
        alone = engine_with(model, tokenizer, near if drafted else None, limits=Limits(prefill=9)).generate([request])[
            0
        ]
        assert alone.ids == done.ids
        text = torch.tensor([[*request.ids, *done.ids]])
        with torch.no_grad():
            exact = token_logprobs(model, text[:, :-1], text[:, 1:], temperature=request.sampling.temperature)[0]
        for logprob, expected, sampled in zip(done.logprobs, exact[len(request.ids) - 1 :], done.sampled, strict=True):
            assert not sampled or logprob == pytest.approx(float(expected), abs=1e-4)
    assert not engine._speculation._lookups


def test_look_up_follows_the_longest_and_latest_ending() -> None:
    lookup = LookUp()
    assert lookup.propose([1, 2, 3, 4], 3) == []
    assert lookup.propose([1, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert lookup.propose([1, 2, 3, 4, 1, 2, 9, 5, 1, 2], 2) == [9, 5]
    assert lookup.propose([1, 2, 3, 4, 1, 2, 9, 5, 1, 2, 3], 2) == [4, 1]


def test_refusals(model: Decoder, engine: Engine) -> None:
    with pytest.raises(UserError, match="vocabulary"):
        engine.draft_with(random_model(7))
    with pytest.raises(UserError, match="speculation"):
        engine.generate([Request([1], Sampling(strategy="beam"), speculate=2)])
