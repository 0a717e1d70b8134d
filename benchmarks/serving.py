"""The service under load: beside transformers' generate behind FastAPI, beside the engine without a service, and fairness.

    taskset -c 0,1 python benchmarks/serving.py

Everybody has the same random weights of about 7 M parameters (6 layers, d_model 256, context 256, vocabulary 4,096), the
same prompts of 32 tokens and writes 128 tokens greedily. The load comes from this process, on the same cores. Rounds
alternate; the medians of all rounds are printed, with the bars of the project.

    transformers   FastAPI around generate, one request at a time; 16 clients
    whole          nestling serve, 16 clients that wait for the whole text
    streamed       nestling serve, 16 clients that read it token by token
    engine         the engine alone, a batch of 16, in a process of its own
    first token    nestling serve, 64 streams at once: slowest first token / median
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Process
from pathlib import Path
from statistics import median

PROMPT, TOKENS, CLIENTS, STREAMS = 32, 128, 16, 64
TURNS = 5
VOCABULARY = 4096
SIZE = {"architecture": "qwen3", "d_model": 256, "n_layers": 6, "n_heads": 4, "context": 256}
HERE = Path(__file__).parent


def make_model(folder: Path) -> None:
    """Random weights, and a tokenizer of the full size trained on words that nobody knows."""
    import torch

    from nestling.model import checkpoint
    from nestling.model.decoder import build
    from nestling.model.hub import make_config
    from nestling.tokenizer.bpe import Tokenizer
    from nestling.tokenizer.special import CHAT

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(4000)]
    texts = [" ".join(draw.choices(words, k=40)) for _ in range(500)]
    tokenizer = Tokenizer.train(texts, vocab_size=VOCABULARY - len(CHAT)).with_special(CHAT)
    assert tokenizer.vocab_size == VOCABULARY
    config = make_config(SIZE | {"vocab_size": tokenizer.vocab_size})
    checkpoint.save(folder, build(config, torch.Generator().manual_seed(1)), tokenizer)


def prompts(count: int) -> list[list[int]]:
    return [[300 + (place * 31 + n * 17) % 3000 for place in range(PROMPT)] for n in range(count)]


def body(prompt: list[int], **more: object) -> dict[str, object]:
    return {"model": "bench", "prompt": prompt, "max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 0, **more}


# ---- the load ----


async def request(port: int, asked: dict[str, object]) -> tuple[float, float, int]:
    """(seconds to the first event, seconds in all, tokens), with as little work for the client as there can be."""
    content = json.dumps(asked).encode()
    host = "Host: 127.0.0.1\r\nContent-Type: application/json"
    head = f"POST /v1/completions HTTP/1.1\r\n{host}\r\nContent-Length: {len(content)}\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + content)
    received, first = b"", 0.0
    while part := await reader.read(65536):
        received += part
        if not first and b'"text"' in received:
            first = time.perf_counter() - started
    writer.close()
    status = received.split(b" ", 2)[1]
    assert status == b"200", received[:500]
    return first, time.perf_counter() - started, TOKENS


def load(port: int, clients: int, **more: object) -> tuple[float, list[float]]:
    """Tokens per second over all clients, and each one's time to the first token."""

    async def all_at_once() -> tuple[float, list[float]]:
        started = time.perf_counter()
        found = await asyncio.gather(*[request(port, body(prompt, **more)) for prompt in prompts(clients)])
        return clients * TOKENS / (time.perf_counter() - started), [first for first, _, _ in found]

    return asyncio.run(all_at_once())


# ---- who is measured ----


@contextmanager
def server(command: list[str], port: int) -> Iterator[int]:
    """A server process, once it answers; its log goes to a file, since a full pipe would stop it."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
        try:
            while not _answers(port):
                log.seek(0)
                assert process.poll() is None, log.read().decode()
                time.sleep(0.2)
            yield port
        finally:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def serve_engine(folder: Path) -> None:
    """Without a service: for each line of standard input write a batch of 16 and print the tokens per second."""
    from nestling.generation.engine import Engine
    from nestling.generation.sampling import Sampling
    from nestling.generation.sequence import Request
    from nestling.model import checkpoint

    found = checkpoint.load(folder)
    engine = Engine(found.model, found.tokenizer, rows=CLIENTS, frozen=True)
    sampling = Sampling(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS)
    for _ in sys.stdin:
        started = time.perf_counter()
        done = engine.generate([Request(prompt, sampling) for prompt in prompts(CLIENTS)])
        print(sum(len(one.ids) for one in done) / (time.perf_counter() - started), flush=True)


@contextmanager
def engine_alone(folder: Path) -> Iterator[Callable[[], float]]:
    """Tokens per second of a batch of 16 without a service, in a process that has nothing else to do."""
    command = [sys.executable, __file__, "--engine", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def once() -> float:
            stdin.write("\n")
            stdin.flush()
            return float(stdout.readline())

        yield once
        stdin.close()


def several(once: Callable[[], float]) -> float:
    """The median of some turns, each of a fifth of a second, after one that finds the caches full of others' data."""
    return median([once() for _ in range(1 + TURNS)][1:])


def main() -> None:
    """Alternate the rounds and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        serve_engine(options.engine)
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "bench"
        # not here: what torch leaves in memory would slow the clients down, which share the server's cores
        maker = Process(target=make_model, args=[folder])
        maker.start()
        maker.join()
        ours, theirs = free_port(), free_port()
        serve = [str(Path(sys.executable).with_name("nestling")), "serve", f"bench={folder}", "--port", str(ours)]
        generate = [
            sys.executable,
            str(HERE / "peers" / "generate_server.py"),
            str(folder),
            str(theirs),
            str(options.threads),
        ]
        with server([*serve, "--store", "none"], ours), server(generate, theirs), engine_alone(folder) as alone:
            for number in range(options.rounds + 1):
                row = {
                    "transformers": load(theirs, CLIENTS)[0],
                    "whole": several(lambda: load(ours, CLIENTS)[0]),
                    "engine": several(alone),
                    "streamed": several(lambda: load(ours, CLIENTS, stream=True)[0]),
                }
                first = load(ours, STREAMS, stream=True)[1]
                row["first token"] = max(first) / median(first)
                if number:  # the first round warms up
                    for name, value in row.items():
                        figures.setdefault(name, []).append(value)
    report(figures)


def report(figures: dict[str, list[float]]) -> None:
    middle = {name: median(values) for name, values in figures.items()}
    for name, values in figures.items():
        unit = "ratio" if name == "first token" else "tokens/s"
        print(f"{name:14} {middle[name]:10.2f} {unit:9} {min(values):.2f} to {max(values):.2f}")
    against = [ours / theirs for ours, theirs in zip(figures["whole"], figures["transformers"], strict=True)]
    overhead = [1 - ours / bare for ours, bare in zip(figures["streamed"], figures["engine"], strict=True)]
    print(f"throughput against transformers   {median(against):6.2f} ×   bar: at least 3")
    print(f"overhead of a stream              {median(overhead):6.1%}     bar: at most 15 %")
    print(f"slowest / median first token      {middle['first token']:6.2f}     bar: at most 5")


if __name__ == "__main__":
    main()
