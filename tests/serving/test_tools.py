"""Tools: called by the client, or by the service itself; streamed in OpenAI's deltas."""

from __future__ import annotations

import asyncio
import json
import threading

import openai
import pytest

from nestling.core.types import Message, PromptRow
from nestling.generation.chat import replies
from nestling.generation.engine import Engine
from nestling.generation.sampling import Sampling
from nestling.generation.session import ChatSession
from nestling.serving.answering import Answer, Question
from nestling.serving.driver import Driver
from nestling.serving.models import Served
from nestling.serving.protocol.tools import Offer
from nestling.tools import Toolbox, schema
from nestling.tools._toolbox import Offer as ToolOffer

ASK = [{"role": "user", "content": "What is 2 + 3?"}]
PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string", "maxLength": 12}},
              "required": ["expression"], "additionalProperties": False}  # fmt: skip
CALCULATOR = {"type": "function", "function": {"name": "calculator", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "look_up", "parameters": {
    "type": "object", "properties": {"word": {"enum": ["tree", "house"]}}, "required": ["word"],
    "additionalProperties": False}}}  # fmt: skip


def ask(client, **more):
    return client.chat.completions.create(model="tiny", **{"messages": ASK, "temperature": 0} | more)


def test_a_call_is_returned_and_its_result_answered(client):
    """The taught call comes back as tool_calls; with its result as a tool message, the taught answer follows."""
    choice = ask(client, tools=[CALCULATOR]).choices[0]
    [call] = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (call.type, call.function.name) == ("function", "calculator")
    assert json.loads(call.function.arguments) == {"expression": "2 + 3"}
    history = [*ASK, choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    assert ask(client, messages=history, tools=[CALCULATOR]).choices[0].message.content == "It is 5."


def test_calls_are_streamed(client, unhurried):
    """First the name, then the arguments in several parts; together they are the call of the whole reply."""
    deltas, finish = [], None
    for chunk in ask(client, tools=[CALCULATOR], stream=True):
        deltas += chunk.choices[0].delta.tool_calls or []
        finish = chunk.choices[0].finish_reason or finish
    [whole] = ask(client, tools=[CALCULATOR]).choices[0].message.tool_calls
    assert deltas[0].function.name == "calculator"
    assert deltas[0].id
    assert all(delta.id is None and delta.function.name is None for delta in deltas[1:])
    assert len(deltas) > 2
    assert "".join(delta.function.arguments for delta in deltas) == whole.function.arguments
    assert finish == "tool_calls"


def test_the_clients_own_reader_of_streams_agrees(client):
    """openai's accumulating stream ends with the same message."""
    with client.chat.completions.stream(model="tiny", messages=ASK, temperature=0, tools=[CALCULATOR]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls[0].function.arguments == '{"expression": "2 + 3"}'


def test_without_tools_nothing_is_called(client):
    """No tools, or tool_choice none: the model answers in words."""
    for more in ({}, {"tools": [CALCULATOR], "tool_choice": "none"}):
        choice = ask(client, **more).choices[0]
        assert choice.message.tool_calls is None
        assert (choice.message.content, choice.finish_reason) == ("Five, I think.", "stop")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_can_be_forced(client, choice, stream):
    """The reply is one call of the named function (or of any), with arguments of its schema."""
    tools = [OTHER] if choice == "required" else [CALCULATOR, OTHER]
    asked = {"tools": tools, "tool_choice": choice, "temperature": 1, "seed": 2}
    if stream:
        with client.chat.completions.stream(model="tiny", messages=ASK, **asked) as events:
            for _ in events:
                pass
            told = events.get_final_completion().choices[0]
    else:
        told = ask(client, **asked).choices[0]
    [call] = told.message.tool_calls
    assert (call.function.name, told.finish_reason) == ("look_up", "tool_calls")
    assert json.loads(call.function.arguments)["word"] in ("tree", "house")


def test_one_call_at_a_time(client):
    """With parallel_tool_calls: false the turn ends with its first call."""
    choice = ask(client, tools=[CALCULATOR], parallel_tool_calls=False).choices[0]
    assert len(choice.message.tool_calls) == 1
    assert choice.finish_reason == "tool_calls"


def allowed(mode: str, *names: str) -> dict:
    """The official API's choice of some of the tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_a_choice_may_leave_some_of_the_tools(client):
    """Only those are on offer, to be called at once or not."""
    tools = [CALCULATOR, OTHER]
    [call] = ask(client, tools=tools, tool_choice=allowed("required", "look_up")).choices[0].message.tool_calls
    assert call.function.name == "look_up"
    [call] = ask(client, tools=tools, tool_choice=allowed("auto", "calculator")).choices[0].message.tool_calls
    assert call.function.name == "calculator"
    assert ask(client, tools=tools, tool_choice=allowed("auto")).choices[0].message.content == "Five, I think."
    with pytest.raises(openai.BadRequestError, match="no 'function paint' in tools"):
        ask(client, tools=tools, tool_choice=allowed("auto", "paint"))


# ---- tools that the service runs ----


@pytest.fixture(scope="module")
def own(serve):
    """A client of a service that runs the calculator."""
    return serve(tools={"calculator": {}}).client()


def test_the_service_runs_its_own_tools(own):
    """The client gets the answer at once, and what was run beside it; there is nothing for it to call."""
    choice = ask(own).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == ("It is 5.", "stop", None)
    assert choice.message.tool_runs == [{"name": "calculator", "arguments": '{"expression": "2 + 3"}', "content": "5"}]


def test_runs_are_streamed(own):
    """The run is told when it begins, its result when it is there, then the text."""
    runs, text = [], ""
    for chunk in ask(own, stream=True):
        runs += getattr(chunk.choices[0].delta, "tool_runs", None) or []
        text += chunk.choices[0].delta.content or ""
    begun = {"index": 0, "name": "calculator", "arguments": '{"expression": "2 + 3"}'}
    assert runs == [begun, {"index": 0, "content": "5"}]
    assert text == "It is 5."


def test_a_request_may_pick_from_the_services_tools(own, client):
    """By type; a type that the service does not have is refused, and an empty list offers nothing."""
    assert ask(own, tools=[{"type": "calculator"}]).choices[0].message.content == "It is 5."
    assert ask(own, tools=[]).choices[0].message.content == "Five, I think."
    with pytest.raises(Exception, match="no tool 'calculator'"):
        ask(client, tools=[{"type": "calculator"}])


def test_a_choice_may_leave_the_services_own(own):
    """Which is run as if it were the only tool."""
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "calculator"}]}}
    assert ask(own, tools=[OTHER, {"type": "calculator"}], tool_choice=choice).choices[0].message.content == "It is 5."


def test_runs_are_limited_by_calls(model, tokenizer):
    """Of a turn with several calls those are run that are left; where none is, the model can only say something."""
    call = '<tool_call> "{\\"name\\": \\"calculator\\", \\"arguments\\": {\\"expression\\": \\"2 + 3\\"}}" </tool_call>'

    async def talk(most: int, grammar: str | None = None) -> list[str]:
        served = Served(
            "tiny", Driver(Engine(model, tokenizer, rows=2)), tokenizer, toolbox=Toolbox.open({"calculator": {}})
        )
        sampling = Sampling(temperature=0, constraint={"grammar": grammar} if grammar else None)
        question = Question((Message(role="user", content=ASK[0]["content"]),), sampling,
                            offer=Offer(own=("calculator",)), max_runs=most)  # fmt: skip
        served.driver.start()
        kinds = [delta.kind async for deltas in Answer(served, question) for delta in deltas]
        await served.driver.stop()
        return kinds

    thrice = f"start: {call} {call} {call} <|im_end|>"
    assert asyncio.run(talk(3, thrice)) == ["run"] * 3 + ["result"] * 3
    assert asyncio.run(talk(2, thrice)) == ["run"] * 2 + ["result"] * 2
    assert set(asyncio.run(talk(0))) == {"text"}


def test_the_clients_tools_go_before(own):
    """A function of the client's is the client's to call, also where the service has a tool of that name."""
    assert ask(own, tools=[CALCULATOR]).choices[0].message.tool_calls[0].function.name == "calculator"


def test_rounds_are_limited(model, tokenizer):
    """A call beyond the last round is not run; it ends the reply."""

    async def last_turn(rounds: int) -> tuple[str, list[str]]:
        served = Served(
            "tiny", Driver(Engine(model, tokenizer, rows=2)), tokenizer, toolbox=Toolbox.open({"calculator": {}})
        )
        question = Question((Message(role="user", content=ASK[0]["content"]),), Sampling(temperature=0),
                            offer=Offer(own=("calculator",)), rounds=rounds)  # fmt: skip
        served.driver.start()
        answer = Answer(served, question)
        kinds = [delta.kind async for deltas in answer for delta in deltas]
        await served.driver.stop()
        return answer.finish, kinds

    assert asyncio.run(last_turn(0)) == ("tool_calls", [])
    finish, kinds = asyncio.run(last_turn(1))
    assert (finish, kinds[:3]) == ("stop", ["run", "result", "text"])


def test_the_tokens_are_those_of_the_tool_loop(own, model, tokenizer):
    """What the service writes with a tool is what generation.chat writes, which training is made of."""
    row = PromptRow(prompt=(Message(role="user", content=ASK[0]["content"]),), meta={"tools": ["calculator"]})
    [expected] = replies(Engine(model, tokenizer, rows=2), [row], Sampling(temperature=0, max_tokens=100), seed=0)
    reply = ask(own)
    assert reply.choices[0].message.content == expected.text
    assert reply.usage.completion_tokens == sum(expected.completion.sampled)


def test_slow_tools_keep_nobody_waiting(model, tokenizer):
    """While more tools run than the event loop has threads for other work, a text and a disk write still end at once."""
    released, begun = threading.Event(), []

    def answer(arguments) -> str:
        begun.append(arguments)
        return "5" if released.wait(30) else "late"

    slow = ToolOffer(schema("calculator"), answer)

    async def talk() -> list[str]:
        engine = Engine(model, tokenizer, rows=64)
        served = Served("tiny", Driver(engine), tokenizer, toolbox=Toolbox({"calculator": slow}))
        served.driver.start()
        busy = [asyncio.create_task(last_text(served, ASK[0]["content"], ("calculator",))) for _ in range(40)]
        try:
            async with asyncio.timeout(20):
                while len(begun) < 32:
                    await asyncio.sleep(0.01)
                quick = await last_text(served, "Hello!", ())
                await asyncio.to_thread(str)
        finally:
            released.set()
        texts = await asyncio.gather(*busy)
        await served.driver.stop()
        return [quick, *set(texts)]

    async def last_text(served: Served, asked: str, tools: tuple[str, ...]) -> str:
        question = Question((Message(role="user", content=asked),), Sampling(temperature=0), offer=Offer(own=tools))
        answer = Answer(served, question)
        async for _ in answer:
            pass
        return answer.message.content

    assert asyncio.run(talk()) == ["Hello! How can I help you today?", "It is 5."]


def test_tools_run_with_the_settings_of_the_service(model, tokenizer):
    """Wherever a loop answers calls, it may be given the toolbox that a person has set up."""
    asked = [("calculator", {"expression": "2 + 3"})]
    seen = []

    def run(name, arguments) -> str:
        seen.append((name, arguments))
        return "5"

    row = PromptRow(prompt=(Message(role="user", content=ASK[0]["content"]),), meta={"tools": ["calculator"]})
    greedy = Sampling(temperature=0, max_tokens=100)
    [reply] = replies(Engine(model, tokenizer, rows=2), [row], greedy, seed=0, run=run)
    session = ChatSession(Engine(model, tokenizer, rows=2), tools=["calculator"], run=run, sampling=greedy)
    told = [event.text for event in session.say(ASK[0]["content"]) if event.kind == "result"]
    assert (reply.text, told, seen) == ("It is 5.", ["5"], asked * 2)
