"""Training speed and quality per minute beside Hugging Face Trainer and a plain compiled PyTorch loop.

    taskset -c 0,1 python benchmarks/training.py --run runs/books --seconds 40 --repeats 2     tokens per second, warm
    taskset -c 0,1 python benchmarks/training.py --run runs/books --race 300                   loss after five minutes

Everyone trains 7 M parameters (6 layers, d_model 256, context 256, vocabulary 4,096) on the shards of one run (`nestling run
books --until tokenize` makes them), 8,192 tokens a step, one after another on the same machine, in turns. In the race time
begins with the process and with an empty compiler cache: imports and compiling count. The peers stop by the clock. Ours
takes a number of steps, which a short pilot run chooses so that the time suffices, its saving and validation included; its
wall time is printed. Losses are those of the same held-out rows, read by transformers where the checkpoint is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

HERE = Path(__file__).parent
PEERS = {
    "trainer fp32": ["hf_trainer.py", "fp32"],
    "trainer bf16": ["hf_trainer.py", "bf16"],
    "plain fp32": ["plain_loop.py", "fp32"],
    "plain bf16": ["plain_loop.py", "bf16"],
}
OURS = "nestling"
BARS = {"trainer": 2.5, "plain": 1.5}  # times the tokens per second of the better of each kind
NATS = 0.4  # that ours is to be below each after five minutes
READS = {"tokens": "tokenize", "tokenizer": "tokenizer"}
PILOT, SHARE = 30, 0.985  # steps of the pilot run; share of the time that is planned with
Figures = dict[str, float]


@dataclass(frozen=True)
class Setup:
    """What is the same in all runs of one call."""

    run: Path
    seconds: float
    race: bool
    threads: int
    settings: list[str]
    rates: dict[str, str] = field(default_factory=dict)


def peer(name: str, setup: Setup) -> Figures:
    """Run one peer in a process of its own."""
    script, precision = PEERS[name]
    origin = "start" if setup.race else "warm"
    tail = [str(setup.run / "tokenize"), str(setup.seconds), precision, origin]
    rate = setup.rates.get(name) or setup.rates.get(name.split()[0])
    return json.loads(_call([sys.executable, str(HERE / "peers" / script), *tail, *([rate] if rate else [])])[0])


def ours(setup: Setup, steps: int) -> Figures:
    """Run Nestling's pre-training for so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        _recipe(Path(folder, "training.yaml"), setup.run, steps)
        command = [
            str(Path(sys.executable).with_name("nestling")),
            "run",
            f"{folder}/training.yaml",
            "--out",
            f"{folder}/run",
        ]
        extra = [part for setting in setup.settings for part in ("--set", setting)]
        _, seconds, memory = _call([*command, "--threads", str(setup.threads), "--quiet", *extra])
        rows = [json.loads(line) for line in Path(folder, "run/pretrain/metrics.jsonl").read_text().splitlines()]
        held_out = [sys.executable, str(HERE / "peers" / "held_out.py")]
        measured = _call([*held_out, f"{folder}/run/pretrain/model", str(setup.run / "tokenize")])[0]
        late = rows[len(rows) // 3 :]
        return {
            "tokens_per_second": round(median(row["tokens_per_second"] for row in late)),
            "steps": rows[-1]["step"],
            "seconds": round(seconds, 1),
            "memory_gb": memory,
            "utilisation": round(median(row["utilisation"] for row in late), 3),
            **json.loads(measured),
        }


def steps_for(setup: Setup) -> int:
    """How many steps of ours fit into the time, by a pilot run."""
    found = ours(setup, PILOT)
    length = 8192 / found["tokens_per_second"]
    if not setup.race:
        return max(PILOT, round(setup.seconds / length))
    return max(PILOT, int((SHARE * setup.seconds - (found["seconds"] - PILOT * length)) / length))


def _recipe(path: Path, run: Path, steps: int) -> None:
    recipe = yaml.safe_load((HERE / "training.yaml").read_text())
    stage = recipe["stages"]["pretrain"]
    stage["reads"] = {role: str((run / kind).resolve()) for role, kind in READS.items()}
    stage["training"]["steps"] = steps
    path.write_text(yaml.safe_dump(recipe))


def _call(command: list[str]) -> tuple[str, float, float]:
    """Last line of a command's output, its seconds and its peak memory in GB, with an empty compiler cache."""
    cache = tempfile.mkdtemp()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        started = time.time()
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.time() - started
        shutil.rmtree(cache)
        out.seek(0)
        errors.seek(0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed\n{errors.read()[-3000:]}")
        lines = out.read().strip().splitlines()
    return lines[-1] if lines else "", seconds, round(usage.ru_maxrss / 2**20, 2)


def table(found: dict[str, list[Figures]], race: bool) -> None:
    """Medians of each contender, ratios and bars."""
    middle = {name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    mine = middle.get(OURS)
    for name, row in middle.items():
        line = (
            f"{name:14} {row['tokens_per_second']:8,.0f} tokens/s {row['memory_gb']:5.2f} GB {row['steps']:5.0f} steps"
        )
        line += f" {row['seconds']:6.1f} s  loss {row['val_loss']:.4f}"
        if mine and name != OURS:
            ratio, gap = mine["tokens_per_second"] / row["tokens_per_second"], mine["val_loss"] - row["val_loss"]
            line += f"  ours {ratio:.2f} x, {gap:+.3f} nats"
        print(line + (f"  {row['utilisation']:.0%} of the measured peak" if "utilisation" in row else ""))
    for kind, bar in BARS.items() if mine else ():
        rivals = [row for name, row in middle.items() if name.startswith(kind)]
        if not rivals:
            continue
        ratio = mine["tokens_per_second"] / max(row["tokens_per_second"] for row in rivals)
        print(f"bar: {bar} x the best {kind}: {ratio:.2f}, {'met' if ratio >= bar else 'missed'}")
        if race:
            gap = min(row["val_loss"] for row in rivals) - mine["val_loss"]
            print(f"bar: {NATS} nats below the best {kind}: {gap:.3f}, {'met' if gap >= NATS else 'missed'}")


def main() -> None:
    """Let them take turns, print each run as it ends, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run folder with tokenize/ and tokenizer/")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--race", type=float, default=0.0, help="train everyone for so many seconds from a cold start")
    parser.add_argument("--steps", type=int, default=0, help="steps of ours; by default a pilot run chooses them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[*PEERS, OURS])
    parser.add_argument("--set", nargs="*", default=[], help="settings of ours, as of `nestling run --set`")
    parser.add_argument(
        "--rates", nargs="*", default=[], help="peak learning rates of peers: trainer=0.001 or plain=0.003"
    )
    parser.add_argument(
        "--log", type=Path, help="a file that gets each run's line; what it holds already joins the table"
    )
    asked = parser.parse_args()
    rates = dict(pair.split("=") for pair in asked.rates)
    setup = Setup(asked.run, asked.race or asked.seconds, bool(asked.race), asked.threads, asked.set, rates)
    steps, found = asked.steps, _earlier(asked.log)
    for _ in range(asked.repeats):
        for name in asked.only:
            if name == OURS:
                steps = steps or steps_for(setup)
            row = ours(setup, steps) if name == OURS else peer(name, setup)
            found.setdefault(name, []).append(row)
            print(json.dumps({"who": name, **row}), flush=True)
            if asked.log:
                with asked.log.open("a") as log:
                    log.write(json.dumps({"who": name, **row}) + "\n")
    table(found, setup.race)


def _earlier(log: Path | None) -> dict[str, list[Figures]]:
    found: dict[str, list[Figures]] = {}
    rows: list[dict[str, Any]] = []
    if log and log.exists():
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        found.setdefault(row.pop("who"), []).append(row)
    return found


if __name__ == "__main__":
    main()
