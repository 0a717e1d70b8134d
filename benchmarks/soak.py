"""Clients that vanish mid-stream, for as long as you like: does memory grow, does a row of the batch stay taken?

    OMP_WAIT_POLICY=PASSIVE taskset -c 0,1 python benchmarks/soak.py --minutes 60

24 clients ask all the time for completions, chats and responses, streamed or not; two of three close their connection
after a random part of the answer. Responses go into a store. Memory of the service (resident, of /proc) is told every half
minute, at the end its slope after the first third. Then no text may be open, and the engine must have come to rest, which
it does not while a row of the batch is taken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import linear_regression, mean
from urllib.request import urlopen

from serving import body, free_port, make_model, prompts, server

CLIENTS, EVERY = 24, 30.0


async def visitor(port: int, draw: random.Random, until: float, counts: dict[str, int]) -> None:
    """Asks again and again, and often does not wait for the answer."""
    while time.monotonic() < until:
        path, asked = question(draw)
        content = json.dumps(asked).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        host = "Host: 127.0.0.1\r\nContent-Type: application/json"
        head = f"POST {path} HTTP/1.1\r\n{host}\r\nContent-Length: {len(content)}"
        writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + content)
        patience = draw.choice([0.0, draw.random() * 0.5, 60.0])
        try:
            async with asyncio.timeout(patience):
                status = (await reader.readline()).split(b" ", 2)[1:2]
                while await reader.read(65536):
                    continue
            counts["whole" if status == [b"200"] else "refused"] += 1
        except TimeoutError:
            counts["vanished"] += 1
        writer.close()


def question(draw: random.Random) -> tuple[str, dict[str, object]]:
    """(path, body) of one of the three ways to ask."""
    more: dict[str, object] = {"stream": draw.random() < 0.7, "temperature": 1}
    words = " ".join(str(draw.randint(0, 30)) for _ in range(8))
    match draw.choice(["completions", "completions", "chat", "responses"]):
        case "chat":
            said = [{"role": "user", "content": words}]
            return "/v1/chat/completions", {"model": "bench", "messages": said, "max_tokens": 96, **more}
        case "responses":
            return "/v1/responses", {"model": "bench", "input": words, "max_output_tokens": 96, **more}
    return "/v1/completions", body(draw.choice(prompts(40)), n=draw.choice([1, 1, 2]), **more)


def resident(port: int) -> float:
    """MiB of the process that listens on a port."""
    found = subprocess.run(["ss", "-tlnpH", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
    process = re.search(r"pid=(\d+)", found)
    assert process, found
    status = Path("/proc", process[1], "status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def main() -> None:
    """Run the visitors and print what the service weighs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with tempfile.TemporaryDirectory() as place:
        make_model(Path(place) / "bench")
        port = free_port()
        command = [
            str(Path(sys.executable).with_name("nestling")),
            "serve",
            f"bench={place}/bench",
            "--port",
            str(port),
        ]
        with server([*command, "--store", f"{place}/soak.db"], port):
            weights = asyncio.run(soak(port, options.minutes * 60))
            time.sleep(2)
            left, steps = figure(port, "open_texts"), figure(port, "engine_steps")
            time.sleep(3)
            turning = figure(port, "engine_steps") - steps
    tell(weights, left, turning)


def figure(port: int, name: str) -> float:
    """One of the service's own figures."""
    metrics = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return float(re.search(rf'nestling_{name}\{{model="bench"\}} (\S+)', metrics)[1])  # type: ignore[index]


def tell(weights: list[tuple[float, float]], left: float, turning: float) -> None:
    """The last lines."""
    calm = weights[len(weights) // 3 :]
    half = len(calm) // 2
    early, late = mean(size for _, size in calm[:half] or calm), mean(size for _, size in calm[half:])
    slope = linear_regression(*zip(*calm, strict=True)).slope * 3600 if len(calm) > 1 else 0.0
    print(f"memory: {early:.1f} MiB in the second third, {late:.1f} in the last ({late / early - 1:+.1%}), "
          f"{slope:+.1f} MiB per hour after the first third")  # fmt: skip
    print(f"texts left open: {left:.0f}; engine at rest: {'yes' if turning == 0 else 'no, a row is still taken'}")


async def soak(port: int, seconds: float) -> list[tuple[float, float]]:
    """(seconds, MiB) at every measurement."""
    until = time.monotonic() + seconds
    counts = {"whole": 0, "vanished": 0, "refused": 0}
    visitors = [asyncio.create_task(visitor(port, random.Random(n), until, counts)) for n in range(CLIENTS)]
    weights: list[tuple[float, float]] = []
    while time.monotonic() < until:
        await asyncio.sleep(min(EVERY, seconds / 9))
        weights.append((seconds - until + time.monotonic(), resident(port)))
        print("{:6.0f} s {:8.1f} MiB ".format(*weights[-1]), counts, flush=True)
    await asyncio.gather(*visitors)
    return weights


if __name__ == "__main__":
    main()
