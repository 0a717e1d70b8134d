"""/v1/responses through OpenAI's own client."""

from __future__ import annotations

import json

import openai
import pytest

from nestling.serving.store.store import Store

SUM = "What is 2 + 3?"
CALCULATOR = {"type": "function", "name": "calculator", "parameters": {"type": "object"}, "strict": False}


def ask(client: openai.OpenAI, **more):
    return client.responses.create(model="tiny", **{"input": "Hello!", "temperature": 0} | more)


def test_a_response(client):
    """Text, status and counts."""
    told = ask(client)
    assert told.output_text == "Hello! How can I help you today?"
    assert (told.status, told.incomplete_details, told.error) == ("completed", None, None)
    assert told.usage.total_tokens == told.usage.input_tokens + told.usage.output_tokens
    assert ask(client, max_output_tokens=3).incomplete_details.reason == "max_output_tokens"


def test_a_conversation_goes_on_by_id(client):
    """previous_response_id stands for all that was said; instructions are not carried over."""
    first = ask(client, input="Hello!", instructions="Be brief.")
    second = ask(client, input="Count.", previous_response_id=first.id)
    spoken = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": first.output_text},
              {"role": "user", "content": "Count."}]  # fmt: skip
    told = ask(client, input=spoken)
    assert (second.output_text, second.usage.input_tokens) == (told.output_text, told.usage.input_tokens)
    assert second.previous_response_id == first.id


def test_responses_can_be_fetched_and_forgotten(client):
    """Until deleted; one that was not stored, or is unknown, is not found."""
    told = ask(client)
    assert client.responses.retrieve(told.id).output_text == told.output_text
    client.responses.delete(told.id)
    for name in (told.id, ask(client, store=False).id):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(name)
    with pytest.raises(openai.BadRequestError, match="no response"):
        ask(client, previous_response_id=told.id)


def test_events_of_a_text(client):
    """The events come in OpenAI's order, are numbered, and add up to the whole response."""
    events = list(ask(client, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[4 : 4 + len(deltas)] == ["output_text.delta"] * len(deltas)
    assert kinds[4 + len(deltas) :] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == events[-1].response.output_text == ask(client).output_text


def test_a_text_comes_in_parts(client):
    """Before it is whole. How many parts depends on how busy the machine is."""
    events = ask(client, max_output_tokens=150, stream=True, extra_body={"logit_bias": {"300": 100}})
    assert sum(event.type == "response.output_text.delta" for event in events) > 1


def test_the_clients_own_reader_of_events_agrees(client):
    """openai's accumulating stream takes every event, of a thought too."""
    with client.responses.stream(model="tiny", input="Think.", temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert final.output[0].content[0].text == "it is easy and quick"
    assert final.output_text == "Done."
    assert final.usage.output_tokens_details.reasoning_tokens > 3
    assert "response.reasoning_text.delta" in kinds


def test_functions(client):
    """A call comes back as an item; sent back with its output, the answer follows."""
    told = ask(client, input=SUM, tools=[CALCULATOR])
    [call] = told.output
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "calculator",
        {"expression": "2 + 3"},
    )
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    assert ask(client, input=[result], previous_response_id=told.id, tools=[CALCULATOR]).output_text == "It is 5."
    history = [{"role": "user", "content": SUM}, call.model_dump(exclude_none=True), result]
    assert ask(client, input=history, tools=[CALCULATOR]).output_text == "It is 5."


@pytest.mark.parametrize("name", ["bad name!", "", "é", "a" * 65])
def test_a_function_of_a_wrong_name_is_refused(client, name):
    """Said as what it is, not as a mistake of the service's."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=[{**CALCULATOR, "name": name}])
    assert caught.value.param == "tools[0].name"


def test_a_streamed_call(client, unhurried):
    """Arguments grow by deltas and are told whole at the end."""
    events = list(ask(client, input=SUM, tools=[CALCULATOR], stream=True))
    parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(parts) == done.arguments == '{"expression": "2 + 3"}'
    assert len(parts) > 1


def test_a_call_can_be_forced(client):
    """tool_choice names the function."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "name": "pick", "parameters": schema, "strict": True}
    [call] = ask(client, tools=[tool], tool_choice={"type": "function", "name": "pick"}).output
    assert call.name == "pick"
    assert 0 <= json.loads(call.arguments)["n"] <= 9


def test_the_services_own_tools_are_items(serve):
    """What the service ran is an mcp_call with its output, before the text, streamed or not."""
    client = serve(tools={"calculator": {}}).client()
    told = ask(client, input=SUM)
    run, message = told.output
    assert (run.type, run.name, run.output) == ("mcp_call", "calculator", "5")
    assert message.content[0].text == told.output_text == "It is 5."
    with client.responses.stream(model="tiny", input=SUM, temperature=0) as stream:
        for _ in stream:
            pass
        assert [item.type for item in stream.get_final_response().output] == ["mcp_call", "message"]
    assert ask(client, input="Count.", previous_response_id=told.id).usage.input_tokens > told.usage.input_tokens


def test_text_formats_and_logprobs(client):
    """A JSON schema is kept; log-probabilities come when included."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    told = ask(client, text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}})
    assert isinstance(json.loads(told.output_text)["ok"], bool)
    part = ask(client, include=["message.output_text.logprobs"], top_logprobs=2).output[0].content[0]
    assert "".join(entry.token for entry in part.logprobs) == part.text
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)


def test_runs_sent_back_are_read(serve):
    """An mcp_call is a call and its result, as in the conversation that goes on by id; a thought is read over."""
    client = serve(tools={"calculator": {}}).client()
    first = ask(client, input=SUM)
    items = [item.model_dump(exclude_none=True) for item in first.output]
    thought = {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    history = [{"role": "user", "content": SUM}, thought, *items, {"role": "user", "content": "Count."}]
    again, by_id = ask(client, input=history), ask(client, input="Count.", previous_response_id=first.id)
    assert (again.usage.input_tokens, again.output_text) == (by_id.usage.input_tokens, by_id.output_text)
    failed = {
        "type": "mcp_call",
        "id": "m",
        "server_label": "s",
        "name": "f",
        "arguments": "{}",
        "error": "no such page",
    }
    without = ask(client, input=[failed | {"error": ""}]).usage.input_tokens
    assert ask(client, input=[failed]).usage.input_tokens > without


def test_calls_are_counted_and_the_limit_is_told(serve):
    """max_tool_calls."""
    client = serve(tools={"calculator": {}}).client()
    told = ask(client, input=SUM, max_tool_calls=1)
    assert [item.type for item in told.output] == ["mcp_call", "message"]
    assert told.max_tool_calls == 1
    assert ask(client).max_tool_calls is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_is_cut_says_so(client, stream):
    """The item as the response."""
    told = ask(client, max_output_tokens=3, stream=stream)
    if stream:
        events = list(told)
        [done] = [event.item for event in events if event.type == "response.output_item.done"]
        assert done.status == "incomplete"
        told = events[-1].response
    assert (told.status, [item.status for item in told.output]) == ("incomplete", ["incomplete"])
    assert [item.status for item in ask(client).output] == ["completed"]


def test_a_choice_may_leave_some_of_the_tools(client):
    """The official API's allowed_tools, flat as tools are here; it comes back as it was sent."""
    tools = [CALCULATOR, {"type": "function", "name": "other", "parameters": {"type": "object"}, "strict": False}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    for chosen in (choice, {"type": "function", "name": "other"}):
        told = ask(client, input=SUM, tools=tools, tool_choice=chosen, max_output_tokens=40)
        assert told.output[0].name == "other"
        assert told.tool_choice.to_dict() == chosen
    assert ask(client, input=SUM, tools=tools, tool_choice=choice | {"mode": "auto", "tools": []}).output_text
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=tools, tool_choice=choice | {"tools": [{"type": "function"}]})
    assert caught.value.param == "tool_choice.tools[0].name"


def test_a_wrong_schema_is_told_by_its_place(client):
    """In the client's words, not the engine's."""
    for schema in ({"type": "nothing"}, None):
        wanted = {"type": "json_schema", "name": "x"} | ({"schema": schema} if schema else {})
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, text={"format": wanted})
        assert caught.value.param == "text.format.schema"
        assert "sampling" not in caught.value.message


def test_what_is_too_long_is_the_input(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, input="one two " * 300)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")


@pytest.mark.parametrize("asked", [{"background": True}, {"conversation": "c"}, {"truncation": "auto"},
                                   {"input": [{"type": "computer_call"}]}, {"input": []},
                                   {"input": [{"role": "user", "content": "Hi"},
                                              {"type": "item_reference", "id": "m"}]}])  # fmt: skip
def test_what_is_not_there_is_refused(client, asked):
    """With 400 and the parameter's name."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **asked)
    assert caught.value.param.split("[")[0] == next(iter(asked))


def test_a_conversation_outlives_the_service(serve, tmp_path):
    """With a store, another service goes on from the id; only for the key that made the response."""
    keys = [{"name": "ann", "secret": "a"}, {"name": "bob", "secret": "b"}]
    store = Store.open(tmp_path / "kept.db")
    first = ask(serve(store=store, keys=keys).client("a"))
    later = serve(store=Store.open(tmp_path / "kept.db"), keys=keys)
    second = ask(later.client("a"), input="Count.", previous_response_id=first.id)
    spoken = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": first.output_text},
              {"role": "user", "content": "Count."}]  # fmt: skip
    assert second.usage.input_tokens == ask(later.client("a"), input=spoken).usage.input_tokens
    assert later.client("a").responses.retrieve(first.id).output_text == first.output_text
    with pytest.raises(openai.NotFoundError):
        later.client("b").responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        later.client("b").responses.delete(first.id)
    later.client("a").responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        later.client("a").responses.retrieve(first.id)


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "store"])
def test_the_latest_responses_of_each_key_stay(serve, tmp_path, kept):
    """One key's responses push out its own oldest ones and nobody else's."""
    keys = [{"name": "ann", "secret": "a"}, {"name": "bob", "secret": "b"}]
    store = Store.open(tmp_path / "kept.db") if kept else None
    service = serve(store=store, keys=keys, kept_responses=2)
    of_bob = ask(service.client("b")).id
    of_ann = [ask(service.client("a")).id for _ in range(3)]
    assert service.client("b").responses.retrieve(of_bob).id == of_bob
    assert [service.client("a").responses.retrieve(name).id for name in of_ann[1:]] == of_ann[1:]
    with pytest.raises(openai.NotFoundError):
        service.client("a").responses.retrieve(of_ann[0])
