"""Training speed and quality per minute beside Hugging Face Trainer and a plain compiled PyTorch loop.

    taskset -c 0,1 python benchmarks/training.py --run runs/books --seconds 60 --repeats 2     tokens per second
    taskset -c 0,1 python benchmarks/training.py --run runs/books --race 300                   loss after five minutes

Everyone trains about 7 M parameters (6 layers, d_model 256, context 256, vocabulary 4,096) on the shards of the same run
(`nestling run books --until tokenize` makes them), 8,192 tokens a step, one after another on the same machine. Times start
with the process: imports and compiling count. Losses are those of the same held-out rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import yaml

HERE = Path(__file__).parent
PEERS = {
    "trainer fp32": ["hf_trainer.py", "fp32"],
    "trainer bf16": ["hf_trainer.py", "bf16"],
    "plain fp32": ["plain_loop.py", "fp32"],
    "plain bf16": ["plain_loop.py", "bf16"],
}


def peer(name: str, tokens: Path, seconds: float) -> dict[str, float]:
    """Run one peer in a process of its own."""
    script, precision = PEERS[name]
    command = [sys.executable, str(HERE / "peers" / script), str(tokens), str(seconds), precision]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=_fresh())
    return json.loads(found.stdout.strip().splitlines()[-1])


def ours(run: Path, steps: int, threads: int, extra: list[str]) -> dict[str, float]:
    """Run Nestling's pre-training for so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = yaml.safe_load((HERE / "training.yaml").read_text())
        stage = recipe["stages"]["pretrain"]
        stage["reads"] = {role: str((run / kind).resolve()) for role, kind in _READS.items()}
        stage["training"]["steps"] = steps
        Path(folder, "training.yaml").write_text(yaml.safe_dump(recipe))
        command = [str(Path(sys.executable).with_name("nestling")), "run", f"{folder}/training.yaml", "--out", f"{folder}/run"]
        started = time.time()
        subprocess.run(
            [*command, "--threads", str(threads), "--quiet", *extra], check=True, capture_output=True, env=_fresh()
        )
        seconds = time.time() - started
        rows = [json.loads(line) for line in Path(folder, "run/pretrain/metrics.jsonl").read_text().splitlines()]
        late = rows[len(rows) // 3 :]
        measured = subprocess.run(
            [sys.executable, str(HERE / "peers" / "held_out.py"), f"{folder}/run/pretrain/model", str(run / "tokenize")],
            check=True, capture_output=True, text=True, env=_fresh(),
        )  # fmt: skip
        return {
            "tokens_per_second": round(median(row["tokens_per_second"] for row in late)),
            "utilisation": round(median(row["utilisation"] for row in late), 3),
            "steps": steps,
            "seconds": round(seconds, 1),
            **json.loads(measured.stdout.strip().splitlines()[-1]),
        }


_READS = {"tokens": "tokenize", "tokenizer": "tokenizer"}


def _fresh() -> dict[str, str]:
    """An environment whose compiler cache is empty: a cold start."""
    return {**os.environ, "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp()}


def main() -> None:
    """Alternate all of them and print a table with ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run folder with tokenize/ and tokenizer/")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--race", type=float, default=0.0, help="train everyone for so many seconds from a cold start")
    parser.add_argument("--steps", type=int, default=0, help="steps of ours; chosen from a first measurement by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[*PEERS, "nestling"])
    parser.add_argument("--set", nargs="*", default=[], help="settings of ours, as of `nestling run --set`")
    asked = parser.parse_args()
    extra = [part for setting in asked.set for part in ("--set", setting)]
    seconds, best = asked.race or asked.seconds, {}
    for _ in range(asked.repeats):
        for name in asked.only:
            if name == "nestling":
                found = ours(asked.run, asked.steps or round(seconds * 1.5), asked.threads, extra)
            else:
                found = peer(name, asked.run / "tokenize", seconds)
            print(json.dumps({"who": name, **found}), flush=True)
            if name not in best or found["tokens_per_second"] > best[name]["tokens_per_second"]:
                best[name] = found
    if "nestling" in best:
        mine = best["nestling"]
        for name, found in best.items():
            ratio = mine["tokens_per_second"] / found["tokens_per_second"]
            print(f"{name:14} {found['tokens_per_second']:7,} tokens/s  ours {ratio:5.2f} x  loss {found['val_loss']:.4f}"
                  f"  ours {mine['val_loss'] - found['val_loss']:+.4f}  {found['seconds']} s")  # fmt: skip


if __name__ == "__main__":
    main()
