"""A chat model small enough to be taught a few lines by heart in seconds, and a real server in front of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import openai
import pytest
import torch
from fastapi import FastAPI
from taught import Service, running, say, teach

from nestling.core.types import ToolCall
from nestling.generation.engine import Engine
from nestling.generation.sequence import Running
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder, build
from nestling.serving.app import create_app
from nestling.serving.driver import Driver
from nestling.serving.models import Models, Served
from nestling.serving.settings import ServeSettings
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.conversation import render
from nestling.tokenizer.special import CHAT, THINK_END, THINK_START, TURN_END
from nestling.tools import Toolbox

CONTEXT = 192
CALL = ToolCall(name="calculator", arguments={"expression": "2 + 3"})
SUM = "What is 2 + 3?"
LINES = {
    "Hello!": "Hello! How can I help you today?",
    "Count.": "one two three four five six seven eight nine ten",
    SUM: "Five, I think.",
}
THOUGHT, CONCLUSION = "it is easy and quick", "Done."


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [
        *LINES,
        *LINES.values(),
        THOUGHT,
        CONCLUSION,
        '{"name": "calculator", "arguments": {"expression": "2 + 3"}}',
    ]
    texts += ["It is 5.", "system", "user", "assistant", "tool", "Tools: calculator", "Think."]
    return Tokenizer.train(texts * 3, vocab_size=360).with_special(CHAT)


def lessons(tokenizer: Tokenizer) -> list[list[int]]:
    """What the model learns by heart."""
    asked = say("user", SUM)
    talks = [render(tokenizer, [say("user", a), say("assistant", b)]).ids for a, b in LINES.items()]
    worked = [asked, say("assistant", "", CALL), say("tool", "5"), say("assistant", "It is 5.")]
    talks.append(render(tokenizer, worked, ["calculator"]).ids)
    thought = [tokenizer.id(THINK_START), *tokenizer.encode(THOUGHT), tokenizer.id(THINK_END)]
    opening = render(tokenizer, [say("user", "Think.")], prompt=True).ids
    talks.append([*opening, *thought, *tokenizer.encode(CONCLUSION), tokenizer.id(TURN_END)])
    return talks


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Decoder:
    """A few hundred steps on five conversations."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = build(DecoderConfig(vocab_size=tokenizer.vocab_size, d_model=64, n_layers=2, n_heads=4, context=CONTEXT))
        teach(made, lessons(tokenizer), steps=150)
    return made.eval()


Serve = Callable[..., Service]


@pytest.fixture(scope="session")
def make_app(model: Decoder, tokenizer: Tokenizer) -> Callable[..., tuple[FastAPI, Driver]]:
    """`make_app(rows=…, …)`: an app around the model "tiny"; settings by name, and what `create_app` takes besides.

    `names` serves it under several names, each with a driver of its own; that of the first is returned.
    """

    def make(
        store=None, moderator=None, router=None, runs=None, names=("tiny",), **settings
    ) -> tuple[FastAPI, Driver]:
        chosen = ServeSettings(**{"flush_seconds": 0} | settings)
        served = []
        for name in names:
            engine = Engine(model, tokenizer, rows=chosen.rows, capacity=chosen.capacity, frozen=True)
            driver = Driver(engine, max_requests=chosen.max_requests, flush_seconds=chosen.flush_seconds)
            served.append(Served(name, driver, tokenizer, {"stage": "test"}, 1, Toolbox.open(chosen.tools)))
        app = create_app(chosen, Models(served), store, moderator=moderator, router=router, runs=runs)
        return app, served[0].driver

    return make


@pytest.fixture(scope="session")
def serve(make_app) -> Iterator[Serve]:
    """Starts servers that end with the tests."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running(*make_app(**settings)))


@pytest.fixture(scope="session")
def service(serve: Serve) -> Service:
    """A server with the settings as they are."""
    return serve()


@pytest.fixture(scope="session")
def client(service: Service) -> openai.OpenAI:
    return service.client()


@pytest.fixture
def unhurried(monkeypatch):
    """An engine that takes its time, so that a client on a busy machine still sees a stream piece by piece."""
    step = Engine.step

    def slowly(engine) -> list[Running]:
        time.sleep(0.02)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slowly)
