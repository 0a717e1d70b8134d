"""Moderation around the chat model, with a moderator that knows one bad word."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import httpx
import openai
import pytest
from waiting import wait_until

from nestling.serving.guarding import PART, Guard, Watched
from nestling.serving.moderation import Moderator, Verdict
from nestling.serving.protocol.deltas import Delta
from nestling.serving.store.store import Store


class OneWord(Moderator):
    """Flags texts with a word, as violence; reads so many characters at once."""

    def __init__(self, word: str, window: int = 10**6) -> None:
        self.word, self.window = word, window
        self.seen: list[str] = []
        self.batches: list[list[str]] = []

    def judge(self, texts):
        """As a moderator does."""
        self.seen += texts
        self.batches.append(list(texts))
        found = [self.word in text for text in texts]
        return [Verdict(bad, {"violence": bad}, {"violence": float(bad)}) for bad in found]

    def recent(self, text, new):
        """As a moderator does, whose tokens are characters."""
        return text[-max(self.window, new + self.window // 4) :]


def ask(service, content: str, **more):
    return service.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], temperature=0, **more
    )


@pytest.fixture
def store(tmp_path):
    opened = Store.open(tmp_path / "store.db")
    yield opened
    opened.close()


def test_a_flagged_question_is_not_answered(serve, store):
    """400 with the category; the verdict is in the store, and harmless ones are not."""
    service = serve(moderator=OneWord("Hello"), store=store)
    with pytest.raises(openai.BadRequestError, match="violence") as caught:
        ask(service, "Hello!")
    assert caught.value.code == "content_policy_violation"
    assert ask(service, "Count.").choices[0].finish_reason == "stop"
    [(text, verdict)] = store.moderation.judged()
    assert (text, verdict.direction, verdict.categories) == ("Hello!", "input", {"violence": True})


@pytest.mark.parametrize("stream", [False, True])
def test_a_flagged_reply_is_cut_off(serve, store, stream):
    """Nothing of the judged part is told, and the reason is content_filter."""
    service = serve(moderator=OneWord("seven"), store=store)
    told = ask(service, "Count.", stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in told]
        text, finish = "".join(choice.delta.content or "" for choice in chunks), chunks[-1].finish_reason
    else:
        text, finish = told.choices[0].message.content, told.choices[0].finish_reason
    assert (text, finish) == ("", "content_filter")
    assert wait_until(lambda: service.driver.load == 0)
    assert store.moderation.judged()[0][1].direction == "output"


def test_a_long_reply_is_judged_part_by_part(serve):
    """Each judgement sees all that was written so far; what passed was told before the next."""
    moderator = OneWord("nowhere")
    service = serve(moderator=moderator)
    reply = ask(service, "Count.", stream=True, max_tokens=150, logit_bias={"300": 100})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
    seen = moderator.seen[1:]
    assert len(seen) >= len(text) // (2 * PART)
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(seen))
    assert seen[-1] == text


def replied(parts, moderator, key="ann"):
    """What is told of a reply that comes in parts, and what it was flagged for."""

    async def batches():
        for part in parts:
            yield [Delta("text", part)]

    async def collect():
        watched = Watched(Guard(moderator), batches(), key)
        return "".join([one.text async for told in watched.told() for one in told]), watched.flagged

    return asyncio.run(collect())


def test_a_part_of_a_long_reply_costs_what_any_other_does(tmp_path):
    """Nothing is read again from the beginning; what is read far back is judged in longer parts."""
    for window in (300, 4000):
        costs = []
        for length in (8000, 16000):
            moderator = OneWord(HARM, window)
            assert replied(["ten chars "] * (length // 10), moderator) == ("ten chars " * (length // 10), "")
            costs.append(sum(map(len, moderator.seen)))
            assert max(map(len, moderator.seen)) <= 1.25 * window + PART
        assert costs[1] < 2.4 * costs[0]
        assert costs[1] < 10 * 16000


def test_no_place_of_a_long_reply_hides_harm():
    """Wherever it stands, between two parts too, nothing of it is told."""
    for place in range(1500, 1500 + 2 * PART, 7):
        text = f"{'x' * place}{HARM}{'y' * 800}"
        told, flagged = replied([text[n : n + 7] for n in range(0, len(text), 7)], OneWord(HARM, 300))
        assert flagged == "violence"
        assert text.startswith(told)
        assert place - 2 * PART < len(told) < place + len(HARM)


def test_the_endpoint(serve):
    """/v1/moderations tells the verdicts; moderation can be served without judging the chat."""
    service = serve(moderator=OneWord("Hello"), moderation=False)
    told = service.client().moderations.create(input=["Hello!", "Count."])
    assert [result.flagged for result in told.results] == [True, False]
    [result] = httpx.post(f"{service.url}/v1/moderations", json={"input": "Hello!"}).json()["results"]
    assert result["category_scores"] == {"violence": 1.0}
    assert ask(service, "Hello!").choices[0].finish_reason == "stop"


HARM = "Hello there"
"""What the moderator flags, in no line of the model's."""
CALL = {"id": "c", "type": "function", "function": {"name": "calculator", "arguments": "{}"}}
GO_ON = {"role": "user", "content": "Go on."}
CUT = [{"role": "user", "content": half} for half in HARM.split()]
CHATS = {
    "an earlier message": [{"role": "user", "content": HARM}, {"role": "assistant", "content": "Yes?"}, GO_ON],
    "the system's": [{"role": "system", "content": HARM}, GO_ON],
    "the developer's": [{"role": "developer", "content": HARM}, GO_ON],
    "a tool's": [GO_ON, {"role": "assistant", "tool_calls": [CALL]},
                 {"role": "tool", "tool_call_id": "c", "content": HARM}],
    "an assistant's": [GO_ON, {"role": "assistant", "content": HARM}, GO_ON],
    "one in two messages": [*CUT],
    "one in three messages": [{"role": "user", "content": "Oh,"}, *CUT, GO_ON],
    "one around a reply": [CUT[0], {"role": "assistant", "content": "Yes?"}, CUT[1]],
    "one around blanks": [CUT[0], {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": " "},
                          {"role": "assistant", "content": "Yes?"}, CUT[1]],
    "one in the results of two calls": [
        GO_ON, {"role": "assistant", "tool_calls": [CALL, CALL | {"id": "d"}]},
        *({"role": "tool", "tool_call_id": id, "content": half["content"]} for id, half in zip("cd", CUT, strict=True))],
    "a call's": [GO_ON, {"role": "assistant", "tool_calls": [
        CALL | {"function": {"name": "calculator", "arguments": f'{{"expression": "{HARM}"}}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": "5"}],
}  # fmt: skip
RESPONSES = {
    "instructions": {"input": "Go on.", "instructions": HARM},
    "an earlier item": {"input": [{"role": "user", "content": HARM}, GO_ON]},
    "one in two items": {"input": CUT},
    "an output": {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                            {"type": "function_call_output", "call_id": "c", "output": HARM}]},
    "a run's output": {"input": [GO_ON, {"type": "mcp_call", "id": "m", "server_label": "s", "name": "f",
                                         "arguments": "{}", "output": HARM}]},
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_every_text_of_a_chat_is_judged(serve, name):
    """Whoever is said to have said it, and wherever it stands."""
    service = serve(moderator=OneWord(HARM))
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="violence") as caught:
            service.client().chat.completions.create(model="tiny", messages=CHATS[name], stream=stream)
        assert (caught.value.code, caught.value.param) == ("content_policy_violation", "messages")
    assert wait_until(lambda: service.driver.load == 0)


@pytest.mark.parametrize("name", RESPONSES)
def test_every_text_of_a_response_is_judged(serve, name):
    """The error names the input."""
    with pytest.raises(openai.BadRequestError, match="violence") as caught:
        serve(moderator=OneWord(HARM)).client().responses.create(model="tiny", **RESPONSES[name])
    assert caught.value.param == "input"


def test_what_a_conversation_repeats_is_judged_once(serve):
    """A long history costs nothing again, its new texts are one batch, and what was flagged stays flagged."""
    moderator = OneWord(HARM)
    client = serve(moderator=moderator).client()
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count."}]
    client.chat.completions.create(model="tiny", messages=said, max_tokens=3)
    assert moderator.batches[0] == ["Be brief.", "Count."]
    moderator.batches.clear()
    more = [*said, {"role": "assistant", "content": "one"}, GO_ON, {"role": "user", "content": "Count."}]
    client.chat.completions.create(model="tiny", messages=more, max_tokens=3, n=2)
    assert moderator.batches[0] == ["one", "Go on. Count.", "Count. Go on. Count.", "Go on."]
    for _ in range(2):
        with pytest.raises(openai.BadRequestError):
            ask_text(client, HARM)


def test_as_many_verdicts_are_remembered_as_have_room(monkeypatch):
    """The latest ones."""
    monkeypatch.setattr("nestling.serving.guarding.KNOWN", 2)
    moderator = OneWord(HARM)
    guard = Guard(moderator)
    for text in ("a", "b", "a", "c", "a", "b"):
        asyncio.run(guard.admit([text], "ann"))
    assert moderator.batches == [["a"], ["b"], ["c"], ["b"]]


# ---- /v1/completions ----


def ask_text(client, prompt, **more):
    return client.completions.create(model="tiny", prompt=prompt, **{"temperature": 0, "max_tokens": 40} | more)


def test_every_prompt_is_judged(serve, store, tokenizer):
    """As a text or as ids, with others, echoed or not."""
    client = serve(moderator=OneWord(HARM), store=store).client()
    prompts = (HARM, [HARM], ["Count.", HARM], tokenizer.encode(HARM), [tokenizer.encode("Hi"), tokenizer.encode(HARM)])
    for prompt in prompts:
        for more in ({}, {"stream": True}, {"echo": True, "max_tokens": 0}):
            with pytest.raises(openai.BadRequestError, match="violence") as caught:
                ask_text(client, prompt, **more)
            assert (caught.value.code, caught.value.param) == ("content_policy_violation", "prompt")
    assert {(text, verdict.direction) for text, verdict in store.moderation.judged()} == {(HARM, "input")}


@pytest.mark.parametrize("stream", [False, True])
def test_a_flagged_completion_is_cut_off(serve, store, stream):
    """Nothing of the judged part is told; the other prompt's text is."""
    service = serve(moderator=OneWord("seven"), store=store)
    prompts = ["one two three four", "Hello! How"]
    told = ask_text(service.client(), prompts, stream=stream, max_tokens=24)
    texts, finishes = ["", ""], ["", ""]
    for chunk in told if stream else [told]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert (texts[0], finishes[0]) == ("", "content_filter")
    assert texts[1]
    assert finishes[1] in ("stop", "length")
    assert wait_until(lambda: service.driver.load == 0)
    [(text, verdict)] = store.moderation.judged()
    assert "seven" in text
    assert verdict.direction == "output"


def test_the_best_of_several_is_none_that_was_cut_off(serve):
    """A text of which nothing may be told is chosen last."""
    client = serve(moderator=OneWord("e")).client()
    asked = {"prompt": "It", "temperature": 2, "seed": 3, "max_tokens": 2}
    every = client.completions.create(model="tiny", n=8, **asked).choices
    kept = sum(choice.finish_reason != "content_filter" for choice in every)
    assert 0 < kept < 8
    best = client.completions.create(model="tiny", best_of=8, n=kept, **asked).choices
    assert all(choice.finish_reason != "content_filter" for choice in best)


def test_a_long_completion_is_judged_part_by_part(serve):
    """As a chat's reply is."""
    moderator = OneWord("nowhere")
    reply = ask_text(
        serve(moderator=moderator).client(), "Count.", stream=True, max_tokens=150, logit_bias={"300": 100}
    )
    text = "".join(chunk.choices[0].text for chunk in reply)
    seen = moderator.seen[1:]
    assert len(seen) >= len(text) // (2 * PART)
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(seen))
    assert seen[-1] == text


# ---- tools of the service's own ----


def test_what_a_tool_of_the_service_says_is_judged_with_the_reply(serve):
    """And what it is asked: both are told to the client, so they are judged as the reply is."""
    service = serve(moderator=OneWord('"2 + 3"}5'), tools={"calculator": {}})
    choice = ask(service, "What is 2 + 3?").choices[0]
    assert choice.finish_reason == "content_filter"
    assert not hasattr(choice.message, "tool_runs")


def test_the_model_that_judged_is_named(serve):
    """Whatever name the client sent."""
    client = serve(moderator=OneWord("Hello")).client()
    told = client.moderations.create(input="Hello!", model="omni-moderation-latest")
    assert told.model == "nestling-moderation"


# ---- the page ----


def test_every_text_of_a_conversation_is_judged(serve, store):
    """The system prompt, and messages before the last one; what is kept of it goes with the conversation."""
    service = serve(moderator=OneWord(HARM), store=store)
    with httpx.Client(base_url=f"{service.url}/api", timeout=60) as page:
        for system, first in ((HARM, "Count."), ("", HARM)):
            id = page.post("/conversations", json={"system": system}).json()["id"]
            asked = page.post(f"/conversations/{id}/messages", json={"content": first}).json()["id"]
            page.post(f"/conversations/{id}/messages", json={"content": "Go on.", "parent": asked})
            answer = page.post(f"/conversations/{id}/reply", json={})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_policy_violation")
            assert HARM in [text for text, verdict in store.moderation.judged() if verdict.flagged]
            page.delete(f"/conversations/{id}")
            assert store.moderation.judged() == []


def test_a_refused_request_costs_no_tokens(serve):
    """It was read by nobody but the guard."""
    service = serve(moderator=OneWord(HARM), tokens_per_minute=60)
    for _ in range(4):
        with pytest.raises(openai.BadRequestError):
            ask(service, f"{HARM} {'one ' * 20}")
        with pytest.raises(openai.BadRequestError):
            ask_text(service.client(), f"{HARM} {'one ' * 20}")
    assert ask(service, "Count.").choices[0].message.content
