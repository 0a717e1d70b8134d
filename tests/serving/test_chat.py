"""/v1/chat/completions through OpenAI's own client."""

from __future__ import annotations

import json

import openai
import pytest
import torch

from nestling.core.types import Message
from nestling.tokenizer.conversation import render

HELLO = [{"role": "user", "content": "Hello!"}]
COUNT = [{"role": "user", "content": "Count."}]
THINK = [{"role": "user", "content": "Think."}]
COUNTED = "one two three four five six seven eight nine ten"


def ask(client: openai.OpenAI, messages=HELLO, **more):
    return client.chat.completions.create(model="tiny", messages=messages, **{"temperature": 0} | more)


def told(client: openai.OpenAI, messages=HELLO, **more) -> tuple[str, list, str]:
    """Text, logprobs and finish of a stream's only choice."""
    text, logprobs, finish = "", [], ""
    for chunk in ask(client, messages, stream=True, **more):
        [choice] = chunk.choices
        text += choice.delta.content or ""
        logprobs += choice.logprobs.content if choice.logprobs else []
        finish = choice.finish_reason or finish
    return text, logprobs, finish


def test_a_reply(client):
    """What the model was taught comes back, with OpenAI's fields around it."""
    reply = ask(client)
    assert (reply.object, reply.model) == ("chat.completion", "tiny")
    [choice] = reply.choices
    assert choice.message.content == "Hello! How can I help you today?"
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "stop", None)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.system_fingerprint == ask(client).system_fingerprint


def test_the_prompt_is_rendered_as_in_training(client, tokenizer):
    """prompt_tokens is the length of the one renderer's prompt, system turn and parts of content included."""
    messages = [{"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]}]  # fmt: skip
    ours = [Message(role="system", content="Be brief."), Message(role="user", content="Hello!")]
    assert ask(client, messages).usage.prompt_tokens == len(render(tokenizer, ours, prompt=True).ids)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_stream_tells_what_the_whole_reply_tells(client, temperature):
    """Text, log-probabilities and reason to end are the same, streamed or not."""
    asked = {"temperature": temperature, "seed": 5, "logprobs": True, "top_logprobs": 3, "max_tokens": 30}
    whole = ask(client, COUNT, **asked).choices[0]
    text, logprobs, finish = told(client, COUNT, **asked)
    assert (text, finish) == (whole.message.content, whole.finish_reason)
    assert logprobs == whole.logprobs.content


def test_a_stream_can_tell_its_usage(client):
    """With include_usage the last chunk has no choice and the counts of the whole reply; the others say null."""
    chunks = list(ask(client, COUNT, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == ask(client, COUNT).usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_seed_decides(client):
    """The same seed gives the same reply, another one another; without a seed replies differ."""
    asked = {"temperature": 2, "max_tokens": 30}
    first, again, other = (ask(client, seed=seed, **asked).choices[0].message.content for seed in (1, 1, 2))
    assert first == again != other
    assert len({ask(client, **asked).choices[0].message.content for _ in range(3)}) == 3


def test_several_choices(client):
    """n choices differ, keep their order in a stream, and the first is the one that n = 1 gives."""
    asked = {"temperature": 2, "max_tokens": 20, "seed": 3}
    whole = [choice.message.content for choice in ask(client, n=3, **asked).choices]
    assert len(set(whole)) == 3
    assert whole[0] == ask(client, **asked).choices[0].message.content
    texts = ["", "", ""]
    for chunk in ask(client, n=3, stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == whole


@pytest.mark.parametrize("stop", ["four", ["nine", " four"]])
def test_stop_texts(client, stop):
    """The text ends before the first stop text, streamed or not."""
    reply = ask(client, COUNT, stop=stop).choices[0]
    assert (reply.message.content.strip(), reply.finish_reason) == ("one two three", "stop")
    assert told(client, COUNT, stop=stop)[0] == reply.message.content


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens(client, name):
    """Both names of the limit end the reply with length; the counts are exact."""
    reply = ask(client, COUNT, **{name: 5})
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (5, "length")
    assert COUNTED.startswith(reply.choices[0].message.content)


def test_log_probabilities_are_the_models(client, model, tokenizer):
    """logprob is log softmax of the model's own logits, and the alternatives are the likeliest tokens."""
    entries = ask(client, COUNT, logprobs=True, top_logprobs=4).choices[0].logprobs.content
    prompt = render(tokenizer, [Message(role="user", content="Count.")], prompt=True).ids
    ids = tokenizer.encode(COUNTED)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert [bytes(entry.bytes).decode() for entry in entries] == [tokenizer.decode([token]) for token in ids]
    for entry, row, token in zip(entries, expected, ids, strict=True):
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        best = row.topk(4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert entry.top_logprobs[0].token == tokenizer.decode([best.indices[0].item()], control=True)


def test_a_bias_moves_a_token(client, tokenizer):
    """A token with bias -100 is not written; one with +100 is all that is written."""
    banned, *_ = tokenizer.encode(" four")
    assert " four" not in ask(client, COUNT, logit_bias={str(banned): -100}).choices[0].message.content
    [loved] = tokenizer.encode(" ten")
    reply = ask(client, COUNT, logit_bias={str(loved): 100}, max_tokens=4)
    assert reply.choices[0].message.content == " ten" * 4


def test_penalties_reach_the_engine(client, tokenizer):
    """With a bias alone one token repeats; a frequency penalty on top lets others in."""
    [loved] = tokenizer.encode(" ten")
    asked = {"logit_bias": {str(loved): 30}, "max_tokens": 40, "temperature": 0}
    assert ask(client, COUNT, **asked).choices[0].message.content == " ten" * 40
    assert ask(client, COUNT, frequency_penalty=2, **asked).choices[0].message.content != " ten" * 40
    assert ask(client, COUNT, presence_penalty=2, **asked).choices[0].message.content == " ten" * 40


def test_a_json_schema_is_kept(client):
    """response_format forces the shape; what is written parses, streamed or not."""
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99, "minimum": 0}},
              "required": ["age"], "additionalProperties": False}  # fmt: skip
    format = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    reply = ask(client, response_format=format, temperature=1, seed=1).choices[0]
    assert list(json.loads(reply.message.content)) == ["age"]
    assert reply.finish_reason == "stop"
    assert told(client, response_format=format, temperature=1, seed=1)[0] == reply.message.content


def test_a_json_object(client):
    """json_object gives some object."""
    reply = ask(client, response_format={"type": "json_object"}, temperature=1, seed=4, max_tokens=120).choices[0]
    assert reply.finish_reason == "length" or isinstance(json.loads(reply.message.content), dict)
    assert reply.message.content.startswith("{")


def test_constraints_beyond_openais(client):
    """A choice and a regular expression, as other servers of open models offer them."""
    picked = ask(client, extra_body={"constraint": {"choice": ["red", "green"]}}).choices[0].message.content
    assert picked in ("red", "green")
    number = ask(client, extra_body={"constraint": {"regex": r"\d{3}"}}).choices[0].message.content
    assert len(number) == 3
    assert number.isdecimal()


# ---- thinking ----


def test_a_thought_is_told_apart(client):
    """What stands between <think> and </think> is reasoning_content and is counted; content is the rest."""
    reply = ask(client, THINK)
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content) == ("Done.", "it is easy and quick")
    assert reply.usage.completion_tokens_details.reasoning_tokens > 3
    deltas = [chunk.choices[0].delta for chunk in ask(client, THINK, stream=True)]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == "it is easy and quick"


@pytest.mark.parametrize("effort", ["none", "minimal"])
def test_no_effort_is_no_thought(client, effort):
    """The model may not open a thought."""
    assert not hasattr(ask(client, THINK, reasoning_effort=effort).choices[0].message, "reasoning_content")


def test_effort_bounds_the_thought(client):
    """A low effort closes a thought after an eighth of the room: of 16 tokens, after 2."""
    reply = ask(client, THINK, reasoning_effort="low", max_tokens=16)
    thought = reply.choices[0].message.reasoning_content
    assert "it is easy and quick".startswith(thought)
    assert 0 < len(thought) < len("it is easy and quick")
    assert ask(client, THINK, reasoning_effort="high").choices[0].message.reasoning_content == "it is easy and quick"


def test_a_service_may_open_the_thought(serve):
    """With opens_thought, effort begins the turn with <think>, and the thought is told the same way."""
    client = serve(opens_thought=True).client()
    message = ask(client, THINK, reasoning_effort="high").choices[0].message
    assert (message.content, message.reasoning_content) == ("Done.", "it is easy and quick")
    assert ask(client, COUNT).choices[0].message.content == COUNTED
