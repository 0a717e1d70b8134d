"""/v1/completions, /v1/embeddings and /tokenize through OpenAI's own client, against the model itself."""

from __future__ import annotations

import base64
import struct

import httpx
import openai
import pytest
import torch

from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request

PROMPT = "one two three"


def complete(client: openai.OpenAI, prompt=PROMPT, **more):
    return client.completions.create(model="tiny", prompt=prompt, **{"temperature": 0, "max_tokens": 12} | more)


@pytest.fixture(scope="module")
def expected(model, tokenizer) -> str:
    """What the engine alone goes on with: a text begins where a document begins."""
    ids = [tokenizer.end_of_text, *tokenizer.encode(PROMPT)]
    [done] = Engine(model, tokenizer, rows=2).generate([Request(ids, Sampling(temperature=0, max_tokens=12))])
    return done.text


def test_a_completion_is_the_engines(client, expected, tokenizer):
    """Text, and counts that include the <|endoftext|> before the prompt."""
    reply = complete(client)
    assert reply.object == "text_completion"
    assert reply.choices[0].text == expected
    assert reply.usage.prompt_tokens == 1 + len(tokenizer.encode(PROMPT))


def test_prompts_may_be_token_ids(client, expected, tokenizer):
    """Ids are taken as they are."""
    ids = [tokenizer.end_of_text, *tokenizer.encode(PROMPT)]
    assert complete(client, ids).choices[0].text == expected
    assert [choice.text for choice in complete(client, [ids, ids]).choices] == [expected] * 2


def test_several_prompts_and_choices(client, expected):
    """Choices are numbered prompt by prompt."""
    reply = complete(client, [PROMPT, "Hello"], n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text == expected for choice in reply.choices] == [True, True, False, False]


def test_a_stream_tells_the_same(client):
    """Texts and log-probabilities of all choices, streamed or not."""
    asked = {"n": 2, "temperature": 1.5, "seed": 3, "logprobs": 2, "echo": True}
    whole = complete(client, ["one two", "Hello"], **asked).choices
    texts, logprobs, finishes = [""] * 4, [[] for _ in range(4)], [None] * 4
    for chunk in complete(client, ["one two", "Hello"], stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            logprobs[choice.index] += choice.logprobs.token_logprobs
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [choice.text for choice in whole]
    assert logprobs == [choice.logprobs.token_logprobs for choice in whole]
    assert finishes == [choice.finish_reason for choice in whole]


def test_echo_scores_the_prompt(client, model, tokenizer):
    """echo with max_tokens 0 gives the log-probability of each token of the prompt, as the model has it."""
    reply = complete(client, echo=True, logprobs=3, max_tokens=0).choices[0]
    ids = tokenizer.encode(PROMPT)
    with torch.inference_mode():
        rows = model(torch.tensor([[tokenizer.end_of_text, *ids]]))[0, :-1].log_softmax(-1)
    assert reply.text == PROMPT
    assert reply.logprobs.token_logprobs == pytest.approx(
        [row[id].item() for row, id in zip(rows, ids, strict=True)], abs=1e-4
    )
    assert "".join(reply.logprobs.tokens) == PROMPT
    offsets = [len(tokenizer.decode(ids[:place])) for place in range(len(ids))]
    assert reply.logprobs.text_offset == offsets
    assert max(reply.logprobs.top_logprobs[0].values()) == pytest.approx(rows[0].max().item(), abs=1e-4)


def test_echo_of_ids_says_nothing_of_the_first(client, tokenizer):
    """Before the first token there is nothing to predict it from."""
    reply = complete(client, tokenizer.encode(PROMPT), echo=True, logprobs=0, max_tokens=2).choices[0]
    assert reply.logprobs.token_logprobs[0] is None
    assert None not in reply.logprobs.token_logprobs[1:]
    assert reply.text.startswith(PROMPT)


def test_the_best_of_several(client):
    """best_of keeps the texts of highest mean log-probability."""
    asked = {"temperature": 2, "seed": 1, "max_tokens": 8, "logprobs": 0}

    def mean(choice) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    every = complete(client, n=6, **asked).choices
    best = complete(client, best_of=6, n=2, **asked).choices
    assert [choice.text for choice in best] == [choice.text for choice in sorted(every, key=mean, reverse=True)[:2]]


def test_a_suffix_is_refused_clearly(client):
    """The model can't fill a gap and says so."""
    with pytest.raises(openai.BadRequestError, match="it cannot fill a gap") as caught:
        complete(client, suffix="end")
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")


# ---- embeddings ----


def test_embeddings_are_mean_pooled_unit_vectors(client, model, tokenizer):
    """One text alone or among others of other lengths, as numbers or base64: the mean of the hidden states, normalised."""
    texts = ["Hello!", "one two three four five six", "Count."]
    told = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for text, entry in zip(texts, told.data, strict=True):
        with torch.inference_mode():
            mean = model.hidden(torch.tensor([tokenizer.encode(text)]))[0].mean(0)
        assert entry.embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    packed = client.embeddings.create(model="tiny", input=texts[1], encoding_format="base64").data[0].embedding
    raw = base64.b64decode(packed) if isinstance(packed, str) else None
    values = list(struct.unpack(f"<{len(raw) // 4}f", raw)) if raw else packed
    assert values == pytest.approx(told.data[1].embedding, abs=1e-6)
    assert told.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in texts)


def test_embeddings_do_not_depend_on_the_parts(client, monkeypatch):
    """Cut into parts of any size, the vectors are the same and in order."""
    texts = [f"one two {n}" for n in range(9)]
    before = [entry.embedding for entry in client.embeddings.create(model="tiny", input=texts).data]
    monkeypatch.setattr("nestling.serving.reading.PART_TOKENS", 16)
    after = [entry.embedding for entry in client.embeddings.create(model="tiny", input=texts).data]
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(before, after, strict=True))


# ---- tokens ----


def test_a_long_text_is_not_cut_into_tokens(service, monkeypatch):
    """The answer would be a hundred times as large."""
    monkeypatch.setattr("nestling.serving.routes.tokens.MOST_TOKENS", 3)
    refused = httpx.post(f"{service.url}/tokenize", json={"prompt": "one two three four five"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "string_above_max_length")


def test_tokens_of_a_text_and_of_a_conversation(service, tokenizer):
    """/tokenize gives ids and pieces; /detokenize goes back."""
    told = httpx.post(f"{service.url}/tokenize", json={"prompt": "one two"}).json()
    assert told["tokens"] == tokenizer.encode("one two")
    assert "".join(piece["text"] for piece in told["pieces"]) == "one two"
    talk = {"messages": [{"role": "user", "content": "Hi"}]}
    ids = httpx.post(f"{service.url}/tokenize", json=talk).json()["tokens"]
    text = httpx.post(f"{service.url}/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
