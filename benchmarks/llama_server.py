"""The same model behind our service and behind llama.cpp's own server: are the greedy answers the same?

    pip install 'llama-cpp-python[server]'
    python benchmarks/llama_server.py runs/demo

The model is exported as an f32 GGUF file. llama.cpp renders the chat template that is in the file, tokenizes and computes by
itself; both servers are asked through OpenAI's client. A `llama-server` on the path is used instead of the Python package's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import openai

from nestling.core.types import Conversation
from nestling.interop.agreement import conversations, prompt_ids
from nestling.interop.gguf import export_gguf
from nestling.model import checkpoint
from nestling.model.locate import checkpoint_folder
from nestling.tokenizer.special import CALL_START
from serving import free_port, server

PLAIN = {"repeat_penalty": 1.0}  # the Python package's server has 1.1


def llama_command(file: Path, port: int, context: int) -> list[str]:
    """Starts llama.cpp's server."""
    place = ["--port", str(port), "--host", "127.0.0.1", "--model", str(file)]
    if found := shutil.which("llama-server"):
        return [found, *place, "--ctx-size", str(context), "--jinja", "--parallel", "1"]
    return [sys.executable, "-m", "llama_cpp.server", *place, "--n_ctx", str(context), "--n_threads", "1"]


def ask(port: int, asked: list[Conversation], tokens: int, **more: object) -> list[str]:
    """Greedy answers to all prompts."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
    name = client.models.list().data[0].id
    rows = [[{"role": message.role, "content": message.content} for message in one.messages] for one in asked]
    greedy = {"model": name, "temperature": 0, "max_tokens": tokens, **more}
    told = [client.chat.completions.create(messages=row, **greedy) for row in rows]
    return [one.choices[0].message.content or "" for one in told]


def main() -> None:
    """Ask both, count, show what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    found = checkpoint.load(checkpoint_folder(options.model))
    context = found.model.config.context
    asked = [one for one in conversations(options.prompts, chat=True)
             if len(prompt_ids(found, one)) + options.tokens <= context]  # fmt: skip
    calls = found.tokenizer.special.get(CALL_START)
    no_calls = {} if calls is None else {str(calls): -100}  # ours allows no call where no tool is offered
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.gguf"
        export_gguf(found, file, "f32", name="model")
        port = free_port()
        with server(llama_command(file, port, context), port):
            theirs = ask(port, asked, options.tokens, extra_body=PLAIN, logit_bias=no_calls)
        port = free_port()
        ours_command = [str(Path(sys.executable).with_name("nestling")), "serve", f"model={options.model}"]
        with server([*ours_command, "--port", str(port), "--store", "none"], port):
            ours = ask(port, asked, options.tokens)
    for one, left, right in zip(asked, ours, theirs, strict=True):
        if left != right:
            print(f"{one.messages[-1].content!r}\n  ours:   {left!r}\n  theirs: {right!r}")
    same = sum(left == right for left, right in zip(ours, theirs, strict=True))
    print(f"{options.model}: {same} of {len(asked)} greedy answers are the same ({options.tokens} tokens at most)")
    sys.exit(same < len(asked))


if __name__ == "__main__":
    main()
