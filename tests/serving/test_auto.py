"""Model "auto": the router's choice decides who answers, and with how much effort."""

from __future__ import annotations

import numpy as np
import openai
import pytest

from nestling.evaluation.routing import Candidate
from nestling.serving.router import Router


def routed(serve, effort: str, model: str = "tiny"):
    """A client of a service whose router has one candidate."""
    router = Router({"only": Candidate(model=model, effort=effort)}, np.zeros((9, 1), dtype=np.float32), [1.0], 0.0)
    return serve(router=router, tools={"calculator": {}}).client()


def ask(client, content: str):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="auto", messages=messages, temperature=0)


def test_direct_is_without_tools_and_thought(serve):
    """The reply names the model that gave it; auto stands in the list."""
    client = routed(serve, "direct")
    reply = ask(client, "What is 2 + 3?")
    assert (reply.model, reply.choices[0].message.content) == ("tiny", "Five, I think.")
    assert not hasattr(ask(client, "Think.").choices[0].message, "reasoning_content")
    assert [one.id for one in client.models.list()] == ["tiny", "auto"]


def test_tools_are_the_services(serve):
    """Its own tools are on offer."""
    assert ask(routed(serve, "tools"), "What is 2 + 3?").choices[0].message.content == "It is 5."


def test_thinking_opens_a_thought(serve):
    """The turn begins with <think>."""
    client = routed(serve, "thinking")
    assert ask(client, "Think.").choices[0].message.reasoning_content == "it is easy and quick"
    assert client.responses.create(model="auto", input="Think.", temperature=0).output_text == "Done."


def test_a_router_of_other_models_is_refused(serve):
    """It names what is served."""
    with pytest.raises(openai.BadRequestError, match="none of the router's models"):
        ask(routed(serve, "direct", "huge"), "Hi")
