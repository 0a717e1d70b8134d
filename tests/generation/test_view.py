"""What requests ask of logits, in one batch: each row gets its own, and nothing of its neighbours'."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import generation as hub

from nestling.core.config import parse
from nestling.core.errors import UserError
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Completion, Request
from nestling.model.decoder import Decoder
from nestling.tokenizer.bpe import Tokenizer

PROMPT = [5, 9, 200, 9]
LENGTH = 25


def write(engine: Engine, *samplings: Sampling, stops: frozenset[int] = frozenset()) -> list[Completion]:
    return engine.generate([Request(PROMPT, sampling, seed=4, stop_ids=stops) for sampling in samplings])


@torch.no_grad()
def by_hand(model: Decoder, tokenizer: Tokenizer, processors: list, **settings: float) -> list[int]:
    """Greedy decoding with transformers' processors and OpenAI's formula, one token at a time without a cache."""
    ids = list(PROMPT)
    banned = [tokenizer.special["<|pad|>"], tokenizer.special["<|im_start|>"]]
    for _ in range(LENGTH):
        logits = model(torch.tensor([ids]))[:, -1].float()
        logits[:, banned] = -torch.inf
        for processor in processors:
            logits = processor(torch.tensor([ids]), logits)
        written = ids[len(PROMPT) :]
        for token in set(written):
            logits[0, token] -= written.count(token) * settings.get("frequency", 0) + settings.get("presence", 0)
        ids.append(int(logits.argmax()))
    return ids[len(PROMPT) :]


def test_penalties_and_bias_share_a_batch(engine: Engine, model: Decoder, tokenizer: Tokenizer) -> None:
    base = {"temperature": 0.0, "max_tokens": LENGTH}
    bias = {7: 4.0, 30: -100.0}
    asked = [
        ({}, by_hand(model, tokenizer, [])),
        ({"repetition_penalty": 1.6}, by_hand(model, tokenizer, [hub.RepetitionPenaltyLogitsProcessor(1.6)])),
        ({"frequency_penalty": 0.9}, by_hand(model, tokenizer, [], frequency=0.9)),
        ({"presence_penalty": 1.9}, by_hand(model, tokenizer, [], presence=1.9)),
        ({"frequency_penalty": -1.0, "presence_penalty": 2.0}, by_hand(model, tokenizer, [], frequency=-1, presence=2)),
        (
            {"logit_bias": bias},
            by_hand(model, tokenizer, [hub.SequenceBiasLogitsProcessor([[[k], v] for k, v in bias.items()])]),
        ),
    ]
    assert len({tuple(expected) for _, expected in asked}) == len(asked)  # each setting matters
    found = write(engine, *(Sampling(**base, **settings) for settings, _ in asked))
    assert [done.ids for done in found] == [expected for _, expected in asked]


def test_filters_share_a_batch(engine: Engine) -> None:
    """A request's tokens do not depend on the filters of others, and each filter changes this text."""
    each = [
        {},
        {"top_k": 2},
        {"top_p": 0.3},
        {"min_p": 0.5},
        {"typical_p": 0.2},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.9},
        {"temperature": 0.0},
    ]
    samplings = [Sampling(max_tokens=LENGTH, **settings) for settings in each]
    together = [done.ids for done in write(engine, *samplings)]
    assert together == [write(engine, sampling)[0].ids for sampling in samplings]
    for a, b in itertools.combinations(together[:5], 2):
        assert a != b


def test_no_stop_token_before_min_tokens(engine: Engine) -> None:
    free = write(engine, Sampling(max_tokens=LENGTH))[0].ids
    stops = frozenset(free[2:4])
    early, late = write(engine, Sampling(max_tokens=LENGTH), Sampling(max_tokens=LENGTH, min_tokens=8), stops=stops)
    assert len(early.ids) <= 3
    assert early.finish == "stop"
    assert len(late.ids) > 8
    assert not stops & set(late.ids[:8])


def test_logprobs_are_the_models_whatever_is_asked(engine: Engine, model: Decoder) -> None:
    settings = {"frequency_penalty": 2.0, "logit_bias": {7: 3.0}, "top_k": 5, "min_tokens": 4, "temperature": 0.7}
    done = write(engine, Sampling(max_tokens=LENGTH, **settings))[0]
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *done.ids]]))[0, len(PROMPT) - 1 : -1]
    expected = (logits / 0.7).log_softmax(1)[range(len(done.ids)), done.ids]
    torch.testing.assert_close(torch.tensor(done.logprobs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"logit_bias": {10**6: 1.0}}, "logit_bias: the model does not know this token (got 1000000)"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: the model does not know this token (got -1)"),
    ],
)
def test_tokens_that_do_not_exist(engine: Engine, settings: dict, says: str) -> None:
    with pytest.raises(UserError) as caught:
        engine.submit(Request(PROMPT, Sampling(**settings)))
    assert says in str(caught.value)
    assert not engine.busy


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"presence_penalty": 3}, "sampling.presence_penalty: must be less than or equal to 2"),
        ({"logit_bias": {"5": 101}}, "sampling.logit_bias.5: must be less than or equal to 100"),
        ({"min_tokens": 9, "max_tokens": 8}, "sampling.min_tokens: more than max_tokens (got 9)"),
        ({"typical_p": 0}, "sampling.typical_p: must be greater than 0"),
        ({"eta_cutoff": 1}, "sampling.eta_cutoff: must be less than 1"),
        ({"constraint": {}}, "sampling.constraint: a constraint is exactly one of its kinds (got [])"),
        ({"constraint": {"regexp": "a"}}, "did you mean 'regex'?"),
        ({"constraint": {"choice": []}}, "sampling.constraint.choice: a value of another type is needed (got [])"),
        ({"constraint": {"json_object": False}}, "give true"),
        ({"constraint": {"json_schema": "{}"}}, "give a JSON schema"),
    ],
)
def test_bad_settings_are_named(settings: dict, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Sampling, settings, "sampling")
    assert says in str(caught.value)
