"""What is reported of each token: its log-probability and the likeliest alternatives, whole or streamed."""

from __future__ import annotations

import pytest
import torch

from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Piece, Request
from nestling.model.decoder import Decoder
from nestling.tokenizer.bpe import Tokenizer

PROMPT = list(range(40, 52))


def streamed(engine: Engine, request: Request) -> tuple[list[Piece], Completion]:
    running = engine.submit(request, stream=True)
    pieces = list(engine.pieces(running))
    assert running.completion is not None
    return pieces, running.completion


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("strategy", [{}, {"strategy": "beam", "options": {"beams": 3}}], ids=["sample", "beam"])
def test_alternatives_are_the_models_likeliest(
    engine: Engine, model: Decoder, temperature: float, strategy: dict
) -> None:
    sampling = Sampling(temperature=temperature, max_tokens=9, top_logprobs=4, **strategy)
    other = Request([3, 4], Sampling(max_tokens=5), seed=3)
    done, without = engine.generate([Request(PROMPT, sampling, seed=2, stop_ids=frozenset()), other])
    assert without.top_logprobs == []
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + done.ids]))[0, len(PROMPT) - 1 : -1]
    best = (logits / (temperature or 1.0)).log_softmax(1).topk(4)
    assert [[token for token, _ in top] for top in done.top_logprobs] == best.indices.tolist()
    values = torch.tensor([[value for _, value in top] for top in done.top_logprobs])
    torch.testing.assert_close(values, best.values, rtol=0, atol=1e-4)
    for token, logprob, top in zip(done.ids, done.logprobs, done.top_logprobs, strict=True):
        assert dict(top).get(token, logprob) == logprob  # the same number, to the last bit


@pytest.mark.parametrize("strategy", [{}, {"strategy": "beam", "options": {"beams": 3}}], ids=["sample", "beam"])
def test_pieces_carry_each_token_once(engine: Engine, tokenizer: Tokenizer, strategy: dict) -> None:
    sampling = Sampling(max_tokens=30, top_logprobs=2, **strategy)
    pieces, done = streamed(engine, Request(PROMPT, sampling, seed=5, stop_ids=frozenset()))
    logs = [log for piece in pieces for log in piece.tokens]
    assert [log.id for log in logs] == done.ids
    assert [log.logprob for log in logs] == done.logprobs
    assert [list(log.alternatives) for log in logs] == done.top_logprobs
    assert "".join(piece.text for piece in pieces if not piece.control) == done.text


def test_a_token_comes_with_its_last_character_and_none_of_a_stop_text(engine: Engine, tokenizer: Tokenizer) -> None:
    script = [*tokenizer.encode("a🙂b"), *(tokenizer.encode(letter)[0] for letter in "stop")]
    sampling = Sampling(strategy="toys.scripted", options={"ids": script}, stop=("stop",))
    pieces, done = streamed(engine, Request([1], sampling))
    assert (done.text, done.ids) == ("a🙂b", script)
    shown = [(piece.text, [log.id for log in piece.tokens]) for piece in pieces]
    assert shown == [("a", script[:1]), ("🙂", script[1:-5]), ("b", script[-5:-4])]


def test_forced_tokens_have_no_log(engine: Engine) -> None:
    request = Request(
        PROMPT, Sampling(max_tokens=6, top_logprobs=1), 1, lambda ids: [7, 8] if len(ids) == 3 else None, frozenset()
    )
    pieces, done = streamed(engine, request)
    assert [log.id for piece in pieces for log in piece.tokens] == [*done.ids[:3], *done.ids[5:]]
    assert [len(top) for top in done.top_logprobs] == [1, 1, 1, 0, 0, 1, 1, 1]
