"""A model in another family's form behind the service: text, stops, tools of the client's and of the service's own."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
import torch
from families import FORMS, make
from taught import Service, running, say, teach

from nestling.core.types import Message, ToolCall
from nestling.generation.engine import Engine
from nestling.model.config import DecoderConfig
from nestling.model.decoder import build
from nestling.serving.answering import forbidden
from nestling.serving.app import create_app
from nestling.serving.driver import Driver
from nestling.serving.models import Models, Served
from nestling.serving.settings import ServeSettings
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render
from nestling.tools import Toolbox, schema

SUM = "What is 2 + 3?"
CALL = ToolCall(name="calculator", arguments={"expression": "2 + 3"})
FUNCTION = {**schema("calculator")["function"], "name": "adder"}
THEIRS = ToolCall(name="adder", arguments={"a": 2})


@pytest.fixture(scope="module", params=["llama3", "llama2"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A model that knows a few lines by heart; `llama2`'s template has no tools."""
    form = FORMS[request.param]
    short = form["template"].replace("{{ tool | tojson(indent=4) }}", "{{ tool.function.name }} ")  # quickly learnt
    tokenizer = Tokenizer.load(make(tmp_path_factory.mktemp("family"), {**form, "template": short}))
    talks = [render(tokenizer, [say("user", "Hello!"), say("assistant", "Hello, you!")]).ids]
    if request.param == "llama3":
        own = [say("user", SUM), say("assistant", "", CALL), say("tool", "5"), say("assistant", "It is 5.")]
        talks.append(render(tokenizer, own, [schema("calculator")]).ids)
        theirs = [say("user", SUM), say("assistant", "", THEIRS)]
        talks.append(render(tokenizer, theirs, [{"type": "function", "function": FUNCTION}]).ids)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "context": 256}
        model = build(DecoderConfig(vocab_size=tokenizer.vocab_size, **sizes))
        teach(model, talks, steps=120)
    engine = Engine(model.eval(), tokenizer, frozen=True)
    settings = ServeSettings(flush_seconds=0, tools={"calculator": {}})
    served = Served(request.param, Driver(engine), tokenizer, {}, 1, Toolbox.open(settings.tools))
    with running(create_app(settings, Models([served])), served.driver) as started:
        yield started


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return service.client()


@pytest.fixture
def name(service: Service) -> str:
    return next(iter(service.app.state.models)).name


def ask(client: openai.OpenAI, name: str, text: str, **options: object):
    return client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=60, **options
    )


def test_it_answers_and_stops(client: openai.OpenAI, name: str) -> None:
    without = {} if name == "llama2" else {"tool_choice": "none"}
    reply = ask(client, name, "Hello!", **without).choices[0]
    assert (reply.message.content.strip(), reply.finish_reason) == ("Hello, you!", "stop")
    parts = ask(client, name, "Hello!", **without, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == reply.message.content


def test_the_service_runs_its_own_tool(client: openai.OpenAI, name: str) -> None:
    if name == "llama3":
        assert ask(client, name, SUM, tools=[{"type": "calculator"}]).choices[0].message.content == "It is 5."


def test_the_clients_call_comes_as_a_call(client: openai.OpenAI, name: str) -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    if name == "llama2":
        with pytest.raises(openai.BadRequestError, match="template knows no tools"):
            ask(client, name, SUM, tools=tools)
        return
    reply = ask(client, name, SUM, tools=tools).choices[0]
    assert (reply.finish_reason, reply.message.content or "") == ("tool_calls", "")
    [call] = reply.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("adder", {"a": 2})
    deltas = [part.choices[0].delta for part in ask(client, name, SUM, tools=tools, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == ""
    told = [call.function for delta in deltas for call in delta.tool_calls or []]
    assert json.loads("".join(part.arguments or "" for part in told)) == {"a": 2}


def test_what_the_form_cannot_say_is_refused(client: openai.OpenAI, name: str) -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    with pytest.raises(openai.BadRequestError, match=r"no token <tool_call>|knows no tools"):
        ask(client, name, SUM, tools=tools, tool_choice="required")


def test_a_thought_that_the_template_opened_may_end(tmp_path):
    end = "{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    template = FORMS["qwen"]["template"].replace(end, end.replace("assistant\\n", "assistant\\n<think>\\n"))
    assert template != FORMS["qwen"]["template"]
    tokenizer = Tokenizer.load(make(tmp_path, {**FORMS["qwen"], "template": template}))
    opened = render(tokenizer, [Message(role="user", content=SUM)], prompt=True).ids
    closed = [*opened, tokenizer.id("</think>")]
    banned = [forbidden(tokenizer, ids, calls=False, thoughts=False) for ids in (opened, closed)]
    assert [tokenizer.id("</think>") in ids for ids in banned] == [False, True]
    assert all(tokenizer.id("<think>") in ids for ids in banned)
