"""Every file of generation/strategies keeps the contract of a decoding strategy; a new file is tested by being there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nestling.core import registry
from nestling.core.errors import UserError
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Request
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder, build
from nestling.model.likelihood import token_logprobs
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT, PAD, TURN_START

NAMES = registry.names("generation.strategies")
TREES = {"exhaustive": {"top_k": 1}}
"""What a strategy needs beside its defaults to write a long text."""
PROMPTS = [[5, 9, 200], [77], list(range(30, 60)), [104, 105], [9] * 17]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Toys are too small to share among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat"] * 3, vocab_size=270).with_special(CHAT)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "context": 64}
    model = build(DecoderConfig(vocab_size=tokenizer.vocab_size, **sizes)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def complete(model: Decoder, tokenizer: Tokenizer, requests: list[Request], rows: int = 64) -> list[Completion]:
    return Engine(model, tokenizer, rows=rows).generate(requests)


def asked(name: str, seed: int = 0, **changes: object) -> list[Request]:
    sampling = Sampling(strategy=name, **{"max_tokens": 12, **TREES.get(name, {}), **changes})
    return [Request(ids, sampling, seed=seed + i) for i, ids in enumerate(PROMPTS)]


def test_the_same_seed_gives_the_same_text(model: Decoder, tokenizer: Tokenizer, name: str) -> None:
    first, again = (complete(model, tokenizer, asked(name)) for _ in range(2))
    assert [c.ids for c in first] == [c.ids for c in again]
    other = complete(model, tokenizer, asked(name, seed=1000))
    samples = registry.find("generation.strategies", name).Strategy.SAMPLES
    assert ([c.ids for c in other] != [c.ids for c in first]) == samples


def test_who_shares_the_batch_does_not_matter(model: Decoder, tokenizer: Tokenizer, name: str) -> None:
    together = complete(model, tokenizer, asked(name))
    alone = [complete(model, tokenizer, [request])[0] for request in asked(name)]
    assert [c.ids for c in together] == [c.ids for c in alone]
    strangers = [request for other in NAMES for request in asked(other, seed=9, max_tokens=7)]
    mixed = complete(model, tokenizer, [r for pair in zip(strangers, asked(name), strict=False) for r in pair])
    assert [c.ids for c in mixed[1::2]] == [c.ids for c in alone]


def test_max_tokens_and_valid_ids(model: Decoder, tokenizer: Tokenizer, name: str) -> None:
    banned = {tokenizer.id(PAD), tokenizer.id(TURN_START)}
    for limit in (1, 2, 9):
        for done in complete(model, tokenizer, asked(name, max_tokens=limit)):
            assert 1 <= len(done.ids) <= limit
            assert len(done.ids) == len(done.sampled) == len(done.logprobs)
            assert all(0 <= token < tokenizer.vocab_size for token in done.ids)
            assert not banned & set(done.ids)


def test_the_context_is_a_limit(model: Decoder, tokenizer: Tokenizer, name: str) -> None:
    long = Request([5] * 60, asked(name, max_tokens=50)[0].sampling, stop_ids=frozenset())
    done = complete(model, tokenizer, [long])[0]
    assert (len(done.ids), done.finish) == (4, "length")


def test_stop_tokens_end_the_text(model: Decoder, tokenizer: Tokenizer, name: str) -> None:
    free = complete(model, tokenizer, asked(name))
    stops = frozenset(token for done in free for token in done.ids[4:])  # tokens that it is known to write
    reasons = set()
    for request in asked(name):
        done = complete(model, tokenizer, [Request(request.ids, request.sampling, request.seed, stop_ids=stops)])[0]
        assert (done.finish == "stop") == (done.ids[-1] in stops)
        assert not stops & set(done.ids[:-1])
        reasons.add(done.finish)
    assert "stop" in reasons


def test_stop_texts_end_the_text(model: Decoder, tokenizer: Tokenizer, name: str) -> None:
    letters = tuple(chr(code) for code in range(97, 123))
    for done in complete(model, tokenizer, asked(name, max_tokens=40, stop=letters)):
        assert not any(letter in done.text for letter in letters)
        assert done.finish == "stop" or not any(letter in tokenizer.decode(done.ids) for letter in letters)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_equal_recomputation(model: Decoder, tokenizer: Tokenizer, name: str, temperature: float) -> None:
    """The cached rows followed the parents: the whole text, computed anew, has the log-probabilities returned."""
    requests = asked(name, temperature=temperature)
    for request, done in zip(requests, complete(model, tokenizer, requests), strict=True):
        text = torch.tensor([[*request.ids, *done.ids]])
        with torch.no_grad():
            anew = token_logprobs(model, text[:, :-1], text[:, 1:], temperature=temperature or 1.0)[0]
        torch.testing.assert_close(done.logprobs, anew[len(request.ids) - 1 :].tolist(), rtol=0, atol=1e-4)


def test_streaming_gives_the_same_text(model: Decoder, tokenizer: Tokenizer, name: str) -> None:
    request = asked(name, stop=("zz",))[2]
    assert "".join(Engine(model, tokenizer).stream(request)) == complete(model, tokenizer, [request])[0].text


def test_an_unknown_option_is_named(model: Decoder, tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(UserError, match="no_such_option"):
        complete(model, tokenizer, asked(name, options={"no_such_option": 1}))


def test_every_row_is_returned_best_first(model: Decoder, tokenizer: Tokenizer, name: str) -> None:
    rows = Engine(model, tokenizer)._strategy(asked(name)[0].sampling).rows
    for done in complete(model, tokenizer, asked(name)):
        assert len(done.others) <= rows - 1
        assert all(not other.others and 1 <= len(other.ids) <= 12 for other in done.others)
        texts = [tuple(c.ids) for c in [done, *done.others]]
        assert len(set(texts)) == len(texts)


def test_a_constraint_is_obeyed(model: Decoder, tokenizer: Tokenizer, name: str) -> None:
    """Rows of a search fork and are dropped: each has its own place in the grammar."""
    requests = asked(name, constraint={"regex": "(ab|cd)+(x|y[0-9]{2})"}, max_tokens=40)
    strangers = asked(name, max_tokens=7)
    mixed = complete(model, tokenizer, [r for pair in zip(strangers, requests, strict=True) for r in pair], rows=320)
    for done in mixed[1::2]:
        for text in (done, *done.others):
            if text.finish == "stop":
                assert re.fullmatch("(ab|cd)+(x|y[0-9]{2})", text.text)
            else:
                assert re.match("(ab|cd)*", text.text)
    assert [c.ids for c in mixed[::2]] == [c.ids for c in complete(model, tokenizer, strangers)]


def test_no_stop_before_min_tokens(model: Decoder, tokenizer: Tokenizer, name: str) -> None:
    """Half of all tokens would stop the text."""
    stops = frozenset(range(0, tokenizer.vocab_size, 2))
    for request in asked(name, min_tokens=5):
        done = complete(model, tokenizer, [replace(request, stop_ids=stops)])[0]
        assert len(done.ids) > 5
        assert not stops & set(done.ids[:5])
