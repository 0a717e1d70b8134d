"""Clients that vanish mid-stream, for as long as you like: does memory grow, does a row of the batch stay taken?

    OMP_WAIT_POLICY=PASSIVE taskset -c 0,1 python benchmarks/soak.py --minutes 60

24 clients ask all the time, streamed or not; two of three close their connection after a random part of the answer. Memory
of the service (resident, of /proc) is told every half minute; at the end all texts must be done and all rows free.
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
from statistics import mean
from urllib.request import urlopen

from serving import body, free_port, make_model, prompts, server

CLIENTS, EVERY = 24, 30.0


async def visitor(port: int, draw: random.Random, until: float, counts: dict[str, int]) -> None:
    """Asks again and again, and often does not wait for the answer."""
    while time.monotonic() < until:
        asked = body(draw.choice(prompts(40)), stream=draw.random() < 0.7, n=draw.choice([1, 1, 2]), temperature=1)
        content = json.dumps(asked).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        host = "Host: 127.0.0.1\r\nContent-Type: application/json"
        head = f"POST /v1/completions HTTP/1.1\r\n{host}\r\nContent-Length: {len(content)}"
        writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + content)
        patience = draw.choice([0.0, draw.random() * 0.5, 60.0])
        try:
            async with asyncio.timeout(patience):
                while await reader.read(65536):
                    continue
            counts["whole"] += 1
        except TimeoutError:
            counts["vanished"] += 1
        writer.close()


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
        with server([*command, "--store", "none"], port):
            weights = asyncio.run(soak(port, options.minutes * 60))
            time.sleep(2)
            metrics = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    left = float(re.search(r'nestling_open_texts\{model="bench"\} (\S+)', metrics)[1])  # type: ignore[index]
    third = max(len(weights) // 3, 1)
    early, late = mean(weights[third : 2 * third] or weights), mean(weights[2 * third :] or weights)
    print(
        f"memory: {early:.1f} MiB in the second third, {late:.1f} in the last ({late / early - 1:+.1%}); texts left: {left:.0f}"
    )


async def soak(port: int, seconds: float) -> list[float]:
    """MiB at every measurement."""
    until = time.monotonic() + seconds
    counts = {"whole": 0, "vanished": 0}
    visitors = [asyncio.create_task(visitor(port, random.Random(n), until, counts)) for n in range(CLIENTS)]
    weights: list[float] = []
    while time.monotonic() < until:
        await asyncio.sleep(min(EVERY, seconds / 9))
        weights.append(resident(port))
        print(f"{seconds - until + time.monotonic():6.0f} s {weights[-1]:8.1f} MiB  {counts}", flush=True)
    await asyncio.gather(*visitors)
    return weights


if __name__ == "__main__":
    main()
