"""Moderation around the chat model, with a moderator that knows one bad word."""

from __future__ import annotations

from itertools import pairwise

import httpx
import openai
import pytest

from nestling.serving.guarding import PART
from nestling.serving.moderation import Moderator, Verdict
from nestling.serving.store.store import Store


class OneWord(Moderator):
    """Flags texts with a word, as violence."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.seen: list[str] = []

    def judge(self, texts):
        """As a moderator does."""
        self.seen += texts
        found = [self.word in text for text in texts]
        return [Verdict(bad, {"violence": bad}, {"violence": float(bad)}) for bad in found]


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
    assert service.driver.load == 0
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


def test_the_endpoint(serve):
    """/v1/moderations tells the verdicts; moderation can be served without judging the chat."""
    service = serve(moderator=OneWord("Hello"), moderation=False)
    told = service.client().moderations.create(input=["Hello!", "Count."])
    assert [result.flagged for result in told.results] == [True, False]
    [result] = httpx.post(f"{service.url}/v1/moderations", json={"input": "Hello!"}).json()["results"]
    assert result["category_scores"] == {"violence": 1.0}
    assert ask(service, "Hello!").choices[0].finish_reason == "stop"
