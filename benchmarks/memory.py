"""Predicted against measured peak memory of training: each configuration in a process of its own, a few steps long.

    python benchmarks/memory.py                    # the table, about 5 minutes on two cores
    python benchmarks/memory.py --pages            # the same with a page of its own for each tensor, without a heap
    python benchmarks/memory.py --device cuda      # memory that tensors hold on a GPU
    python benchmarks/memory.py --one '{"model": {"d_model": 256}, "rows": 8, "optimizer": "muon", "precision": "bf16"}'

Measured is the most that was resident between the first step and the last, less what the process held after it had trained
a toy, when all code was loaded and before the model was there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nestling.core.machine import PeakMemory, held_memory
from nestling.core.registry import find
from nestling.core.runtime import Runtime, detect
from nestling.loading.batches import TokenBatch
from nestling.model.config import DecoderConfig
from nestling.model.decoder import build
from nestling.model.hub import make_config
from nestling.objectives.next_token import NextToken, Settings
from nestling.planning.activations import Microbatch
from nestling.planning.memory import Learning, training_memory
from nestling.training import loop
from nestling.training.hooks import Hook, Run
from nestling.training.settings import TrainSettings

PAGES = "262144"  # bytes from which glibc maps memory, instead of cutting it from its heap
SMALL = {"d_model": 256, "n_layers": 6, "n_heads": 4, "vocab_size": 4096, "context": 256}
GPT = {"architecture": "gpt2", "d_model": 384, "n_layers": 4, "n_heads": 6, "vocab_size": 8192, "context": 512}
LLAMA = {"architecture": "llama", "d_model": 512, "n_layers": 10, "n_heads": 8, "vocab_size": 8192, "context": 128}
MIXED = {"architecture": "qwen3_moe", "d_model": 256, "n_layers": 4, "n_heads": 4, "vocab_size": 4096, "context": 256}
JOBS: list[dict[str, Any]] = [
    {"model": SMALL, "rows": 8, "optimizer": "muon"},
    {"model": SMALL, "rows": 32, "optimizer": "muon"},
    {"model": SMALL, "rows": 16, "optimizer": "muon", "pieces": 4},
    {"model": SMALL, "rows": 16, "optimizer": "muon", "recompute": "blocks"},
    {"model": GPT, "rows": 4, "optimizer": "adamw"},
    {"model": LLAMA, "rows": 1, "optimizer": "muon"},
    {"model": LLAMA, "rows": 2, "optimizer": "adamw", "pieces": 2},
    {"model": MIXED, "rows": 8, "optimizer": "muon"},
]


class Rows:
    """Batches of random ids."""

    def __init__(self, config: DecoderConfig, rows: int) -> None:
        self.vocabulary, self.shape = config.vocab_size, (rows, config.context)

    def batch(self, step: int) -> TokenBatch:
        """The batch of a step."""
        stream, (rows, width) = torch.Generator().manual_seed(step), self.shape
        ids = torch.randint(0, self.vocabulary, (rows, width + 1), generator=stream)
        places = torch.arange(width).expand(self.shape)
        ones, zeros = torch.ones(self.shape), torch.zeros(self.shape, dtype=torch.long)
        return TokenBatch(ids[:, :-1], ids[:, 1:], ones, places, zeros)


class Watch(Hook):
    """The most memory held in the steps so far."""

    def on_start(self, run: Run) -> None:
        """Begin."""
        self.memory = PeakMemory(run.runtime.device)

    def on_step(self, run: Run) -> None:
        """Look."""
        self.peak = self.memory.read()


def trained(config: DecoderConfig, rows: int, job: dict[str, Any], runtime: Runtime) -> int:
    """Train a few steps; the peak in bytes."""
    settings = TrainSettings(
        steps=3, optimizer=job["optimizer"], recompute=job.get("recompute", "none"), compile=job.get("compile", "off"),
        save_every=1e9,
    )  # fmt: skip
    watch, model = Watch(), build(config).to(runtime.device)
    lengths = torch.ones(config.vocab_size).long()
    objective = NextToken(Settings(microbatches=job.get("pieces", 1)), model, Rows(config, rows), lengths, None)
    with tempfile.TemporaryDirectory() as folder:
        loop.train(objective, settings, folder=Path(folder), runtime=runtime, seed=1, hooks=[watch], quiet=True)
    return watch.peak


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes predicted before and measured after."""
    runtime = detect(job.get("device", "cpu"), job.get("precision", "bf16"))
    pieces, recompute = job.get("pieces", 1), job.get("recompute", "none")
    config, rows = make_config(job["model"]), job["rows"]
    batch = Microbatch(rows // pieces, config.context, runtime.dtype, str(runtime.device), packed=True)
    optimiser = find("training.optimizers", job["optimizer"]).MEMORY
    heap = not job.get("pages", False)
    if not heap:
        loop.keep_freed_memory = lambda: None
    predicted = training_memory(config, Learning(batch, optimiser, pieces, recompute == "blocks", heap=heap))
    toy = make_config({"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "context": 16})
    trained(toy, pieces, job, runtime)
    before = held_memory(runtime.device)  # everything is loaded
    measured = trained(config, rows, job, runtime) - before
    return {"predicted": predicted.peak, "measured": measured, **asdict(predicted)}


def apart(job: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process."""
    words = [sys.executable, __file__, "--one", json.dumps(job)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one line per configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", type=json.loads)
    parser.add_argument("--pages", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", default="off", choices=("off", "on"))
    given = parser.parse_args()
    if given.one:
        if given.one.get("pages") and os.environ.get("MALLOC_MMAP_THRESHOLD_") != PAGES:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = PAGES  # read when a process begins
            os.execv(sys.executable, [sys.executable, *sys.argv])
        print(json.dumps(measure(given.one)))
        return
    print(f"{'model':>20} rows  pieces  optimizer  recompute  precision   predicted   measured  ratio")
    for job in JOBS:
        for precision in ("fp32", "bf16"):
            full = {**job, "precision": precision, "pages": given.pages, "device": given.device, "compile": given.compile}
            row, model = apart(full), job["model"]
            name = f"{model.get('architecture', 'qwen3')} {model['d_model']}x{model['n_layers']}"
            print(
                f"{name:>20} {job['rows']:>4} {job.get('pieces', 1):>7} {job['optimizer']:>10} {job.get('recompute', 'none'):>10} "
                f"{precision:>10} {row['predicted'] / 1e6:>8.0f} MB {row['measured'] / 1e6:>7.0f} MB "
                f"{row['predicted'] / row['measured']:>6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
