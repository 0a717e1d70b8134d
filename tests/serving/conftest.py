"""A chat model small enough to be taught a few lines by heart in seconds, and a real server in front of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import openai
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from nestling.core.types import Message, ToolCall
from nestling.generation.engine import Engine
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


def say(role: str, content: str = "", *calls: ToolCall) -> Message:
    return Message(role=role, content=content, tool_calls=calls)


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
        talks = lessons(tokenizer)
        width = max(map(len, talks))
        ids = torch.tensor([talk + [-100] * (width - len(talk)) for talk in talks])
        optimizer = torch.optim.AdamW(made.parameters(), lr=4e-3)
        for _ in range(150):
            logits = made(ids[:, :-1].clamp_min(0))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return made.eval()


@dataclass(frozen=True)
class Service:
    """A running server."""

    url: str
    app: FastAPI
    driver: Driver
    server: uvicorn.Server

    def client(self, key: str = "none") -> openai.OpenAI:
        """The official client; it does not try again, so that an error is seen."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def running(app: FastAPI, driver: Driver) -> Iterator[Service]:
    """uvicorn in a thread, on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        port = listener.getsockname()[1]
        yield Service(f"http://127.0.0.1:{port}", app, driver, server)
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


Serve = Callable[..., Service]


@pytest.fixture(scope="session")
def make_app(model: Decoder, tokenizer: Tokenizer) -> Callable[..., tuple[FastAPI, Driver]]:
    """`make_app(rows=…, …)`: an app around the model "tiny"; settings by name, and what `create_app` takes besides."""

    def make(store=None, moderator=None, router=None, **settings) -> tuple[FastAPI, Driver]:
        chosen = ServeSettings(**{"flush_seconds": 0} | settings)
        engine = Engine(model, tokenizer, rows=chosen.rows, capacity=chosen.capacity, frozen=True)
        driver = Driver(engine, max_requests=chosen.max_requests, flush_seconds=chosen.flush_seconds)
        served = Served("tiny", driver, tokenizer, {"stage": "test"}, 1, Toolbox.open(chosen.tools))
        return create_app(chosen, Models([served]), store, moderator=moderator, router=router), driver

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

    def slowly(engine) -> None:
        time.sleep(0.02)
        step(engine)

    monkeypatch.setattr(Engine, "step", slowly)
