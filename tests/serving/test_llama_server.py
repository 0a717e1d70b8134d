"""The exported model behind llama.cpp's own server answers as it does behind ours."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from nestling.interop.gguf import export_gguf
from nestling.model.checkpoint import Checkpoint
from nestling.model.decoder import build
from nestling.tokenizer.special import CALL_START

NEEDED = ("llama_cpp", "starlette_context", "pydantic_settings", "gguf")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"llama-cpp-python[server] is not installed: no {missing}")
HISTORY = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How can I help you today?"}]
QUESTIONS = ("Hello!", "Count.", "What is 2 + 3?", "Helo?", "one  two\n\nthree", "Count! Count.", " !", "day")


@pytest.fixture(scope="module")
def theirs(model, tokenizer, tmp_path_factory) -> Iterator[openai.OpenAI]:
    """A client of llama.cpp's server."""
    folder: Path = tmp_path_factory.mktemp("gguf")
    config = model.config.model_copy(update={"architecture": "llama"})  # the graph that computes what this model does
    same = build(config)
    same.load_state_dict(model.state_dict())
    export_gguf(Checkpoint(same.eval(), tokenizer), folder / "tiny.gguf", "f32", name="tiny")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = {"model": folder / "tiny.gguf", "model_alias": "tiny", "host": "127.0.0.1", "port": port, "n_ctx": 192,
               "n_threads": 1, "verbose": False}  # fmt: skip
    command = [sys.executable, "-m", "llama_cpp.server"]
    with (folder / "log").open("w") as log:
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        process = subprocess.Popen([*command, *words], stdout=log, stderr=log)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=0)
    try:
        _wait_for(client, process, folder / "log")
        yield client
    finally:
        process.kill()
        process.wait()


def _wait_for(client: openai.OpenAI, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_same_greedy_chat(client, theirs, tokenizer, question):
    """Same rendering, same tokens, same text, also after some history. Ours allows no call where no tool is offered."""
    no_calls = {str(tokenizer.id(CALL_START)): -100}
    for before in ([], HISTORY):
        asked = {"model": "tiny", "messages": [*before, {"role": "user", "content": question}], "temperature": 0,
                 "max_tokens": 60}  # fmt: skip
        ours = client.chat.completions.create(**asked)
        other = theirs.chat.completions.create(**asked, extra_body={"repeat_penalty": 1.0}, logit_bias=no_calls)
        assert ours.choices[0].message.content == other.choices[0].message.content
        assert ours.choices[0].finish_reason == other.choices[0].finish_reason
        assert ours.usage.prompt_tokens == other.usage.prompt_tokens
