"""Model "auto": the router's choice decides who answers, and with how much effort."""

from __future__ import annotations

import numpy as np
import openai
import pytest

from nestling.core.types import Message
from nestling.evaluation.routing import Candidate, Outcome, Table, Trial
from nestling.serving.router import Learning, Router, fit


def routed(serve, effort: str, model: str = "tiny"):
    """A client of a service whose router has one candidate."""
    router = Router({"only": Candidate(model=model, effort=effort)}, np.zeros((9, 1), dtype=np.float32), [1.0], 0.0)
    return serve(router=router, tools={"calculator": {}}).client()


def ask(client, content: str, **more):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="auto", messages=messages, temperature=0, **more)


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


def trained() -> Router:
    """A router that learnt: greetings from anybody, sums with tools, thoughts from the large model alone."""
    candidates = {
        "small": Candidate(model="tiny"),
        "small with tools": Candidate(model="tiny", effort="tools"),
        "large, thinking": Candidate(model="large", effort="thinking"),
    }
    costs = dict(zip(candidates, (1.0, 2.0, 9.0), strict=True))
    asked = {
        **{f"Hello{end}": (1, 1, 1) for end in ("!", "", " there!", " you!", " again!")},
        **{f"What is {a} + {b}?": (0, 1, 0) for a in range(2, 5) for b in range(2, 4)},
        **{f"Think{end}": (0, 0, 1) for end in (".", "!", " hard.", " again.", " well.")},
    }
    rows = [
        Trial(
            prompt=(Message(role="user", content=text),),
            outcomes={name: Outcome(score=s, cost=costs[name]) for name, s in zip(candidates, scores, strict=True)},
        )
        for text, scores in asked.items()
    ]
    return fit([row.prompt for row in rows], Table.of(rows, list(candidates)), candidates, Learning(features=512))


def test_without_tools_nobody_is_chosen_for_them(serve):
    """Where the service runs none, the best of the others answers; a router that knows no other still does."""
    chosen = trained().choose([Message(role="user", content="What is 2 + 3?")], tools=False)
    assert chosen.effort != "tools"
    weights = np.zeros((9, 2), dtype=np.float32)
    weights[-1, 1] = 5  # the one with tools is by far the likelier
    two = {"plain": Candidate(model="tiny"), "tools": Candidate(model="large", effort="tools")}
    router = Router(two, weights, [1.0, 1.0], 0.0)
    for tools, wish, model in (({}, None, "tiny"), ({"calculator": {}}, None, "large"), ({"calculator": {}}, "none", "tiny")):
        client = serve(router=router, names=("tiny", "large"), tools=tools).client()
        more = {} if wish is None else {"tool_choice": wish}
        assert ask(client, "What is 2 + 3?", **more).model == model
    only = Router({"a": Candidate(model="tiny", effort="tools")}, np.zeros((9, 1), dtype=np.float32), [1.0], 0.0)
    assert only.choose([Message(role="user", content="Hi")], tools=False).name == "a"


def test_a_trained_router_picks_model_and_effort(serve, tmp_path):
    """Per request, out of two served models, from the folder that training wrote."""
    trained().save(tmp_path / "router")
    router = Router.load(tmp_path / "router")
    client = serve(router=router, names=("tiny", "large"), tools={"calculator": {}}).client()
    greeted, added, thought = (ask(client, content) for content in ("Hello!", "What is 2 + 3?", "Think."))
    assert (greeted.model, greeted.choices[0].message.content) == ("tiny", "Hello! How can I help you today?")
    assert (added.model, added.choices[0].message.content) == ("tiny", "It is 5.")
    assert (thought.model, thought.choices[0].message.reasoning_content) == ("large", "it is easy and quick")
    assert [one.id for one in client.models.list()] == ["tiny", "large", "auto"]
