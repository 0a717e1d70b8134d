"""What a request is told of the tokens that did not have to be computed for it."""

from __future__ import annotations

import random
import string

import pytest

from nestling.generation.engine import Engine
from nestling.generation.prefixes import BLOCK
from nestling.generation.sampling import Sampling
from nestling.generation.sequence import Request


def fresh_words() -> str:
    """A text that no other test has asked about."""
    return "".join(random.SystemRandom().choices(string.ascii_lowercase, k=60))


def whole_blocks(tokens: int) -> int:
    """What of a prompt can be known: whole blocks before its last token, which is always computed."""
    return (tokens - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_tells_the_tokens_that_were_known(client, stream):
    """None of a new text but the beginning that every chat has; the second time all whole blocks of the prompt."""
    asked = [{"role": "user", "content": fresh_words()}]

    def cached(**more) -> tuple[int, int]:
        given = {"model": "tiny", "messages": asked, "max_tokens": 2, **more}
        if stream:
            chunks = client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
            usage = list(chunks)[-1].usage
        else:
            usage = client.chat.completions.create(**given).usage
        return usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens

    first, length = cached()
    assert first < BLOCK
    assert length > 2 * BLOCK
    assert cached() == (whole_blocks(length), length)
    assert cached(n=3) == (whole_blocks(length), length)


def test_choices_of_a_new_text_are_computed_once(client):
    """Three choices share the prompt of one request, which was new: nothing of it counts as known."""
    asked = [{"role": "user", "content": fresh_words()}]
    usage = client.chat.completions.create(model="tiny", messages=asked, max_tokens=2, n=3).usage
    assert usage.prompt_tokens_details.cached_tokens < BLOCK


def test_a_response_that_goes_on_knows_what_was_said(client):
    """The next turn finds the turns before it, the reply included."""
    first = client.responses.create(model="tiny", input=fresh_words(), max_output_tokens=3)
    assert first.usage.input_tokens_details.cached_tokens < BLOCK
    second = client.responses.create(model="tiny", input="x", previous_response_id=first.id, max_output_tokens=3)
    assert second.usage.input_tokens_details.cached_tokens >= whole_blocks(first.usage.input_tokens)


def test_completions_count_each_prompt_once(client):
    """Known parts of all prompts together."""
    prompts = [fresh_words(), fresh_words()]
    lengths = [client.completions.create(model="tiny", prompt=one, max_tokens=1).usage.prompt_tokens for one in prompts]
    usage = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=1).usage
    assert usage.prompt_tokens == sum(lengths)
    assert usage.prompt_tokens_details.cached_tokens == sum(map(whole_blocks, lengths))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_engine_counts_what_it_copied(model, tokenizer, frozen):
    """Of two equal prompts in one batch one is computed, the other copies all but its last token."""
    asked = Request(tokenizer.encode("one two three four five six " * 3), Sampling(temperature=0, max_tokens=2))
    done = Engine(model, tokenizer, rows=4, frozen=frozen).generate([asked, asked])
    assert [one.reused for one in done] == [0, len(asked.ids) - 1]
