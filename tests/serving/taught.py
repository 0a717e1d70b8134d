"""What tests of the service share: teaching a small model a few lines by heart, and a real server in front of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import openai
import torch
import uvicorn
from fastapi import FastAPI

from nestling.core.types import Message, ToolCall
from nestling.model.decoder import Decoder
from nestling.serving.driver import Driver


def say(role: str, content: str = "", *calls: ToolCall) -> Message:
    return Message(role=role, content=content, tool_calls=calls)


def teach(model: Decoder, talks: Sequence[list[int]], steps: int) -> None:
    """So many steps on all talks at once, until they are known by heart."""
    width = max(map(len, talks))
    ids = torch.tensor([[*talk, *[-100] * (width - len(talk))] for talk in talks])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        logits = model(ids[:, :-1].clamp_min(0))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


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
        try:
            yield Service(f"http://127.0.0.1:{port}", app, driver, server)
        finally:
            server.should_exit = True
            thread.join(timeout=10)
        assert not thread.is_alive()
