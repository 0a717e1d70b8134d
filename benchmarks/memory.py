"""Predicted against measured peak memory of training: each configuration in a process of its own, a few steps long.

    python benchmarks/memory.py                    # the runs that the heap's constants were fitted to: 5 minutes on two cores
    python benchmarks/memory.py --new              # runs that they were not fitted to: other widths, adapters, rankings
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nestling.core.machine import PeakMemory, held_memory
from nestling.core.registry import find
from nestling.core.runtime import Runtime, detect
from nestling.loading.batches import TokenBatch
from nestling.loading.preferences import RankingBatch
from nestling.model.adapters import Adaptation, AdapterSettings, adapt
from nestling.model.config import DecoderConfig
from nestling.model.decoder import build
from nestling.model.heads import ScalarHead, Scored
from nestling.model.hub import make_config
from nestling.objectives import reward
from nestling.objectives.next_token import NextToken, Settings
from nestling.planning.activations import Microbatch
from nestling.planning.memory import Learning, Weights, training_memory
from nestling.training import loop
from nestling.training.contract import Objective
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
DEPTH8 = {"depth": 8, "vocab_size": 4096, "context": 256}
LONG = {"architecture": "gpt2", "d_model": 256, "n_layers": 6, "n_heads": 4, "vocab_size": 2048, "context": 1024}
WIDE = {"architecture": "llama", "d_model": 768, "n_layers": 6, "n_heads": 12, "vocab_size": 16384, "context": 256}
LORA = {"rank": 16, "alpha": 32}
NEW_JOBS: list[dict[str, Any]] = [
    {"model": DEPTH8, "rows": 8, "optimizer": "muon", "precision": "bf16"},
    {"model": DEPTH8, "rows": 16, "optimizer": "muon", "recompute": "blocks", "precision": "bf16"},
    {"model": {"d_model": 128, "n_layers": 3, "n_heads": 4, "vocab_size": 1024, "context": 128}, "rows": 32,
     "optimizer": "muon", "precision": "fp32"},
    {"model": {"d_model": 224, "n_layers": 5, "n_heads": 4, "vocab_size": 2048, "context": 256}, "rows": 32,
     "optimizer": "muon", "precision": "bf16"},
    {"model": LONG, "rows": 2, "optimizer": "adamw", "precision": "fp32"},
    {"model": LONG, "rows": 4, "optimizer": "muon", "pieces": 2, "precision": "bf16"},
    {"model": WIDE, "rows": 4, "optimizer": "adamw", "precision": "bf16"},
    {"model": WIDE, "rows": 8, "optimizer": "muon", "pieces": 2, "recompute": "blocks", "precision": "fp32"},
    {"model": SMALL, "rows": 12, "optimizer": "muon", "precision": "bf16", "rankings": True},
    {"model": SMALL, "rows": 12, "optimizer": "adamw", "pieces": 3, "precision": "fp32", "rankings": True},
    {"model": SMALL, "rows": 16, "optimizer": "adamw", "precision": "bf16", "adapters": LORA},
    {"model": WIDE, "rows": 4, "optimizer": "adamw", "precision": "bf16", "adapters": LORA},
    {"model": WIDE, "rows": 4, "optimizer": "adamw", "precision": "fp32", "adapters": {**LORA, "targets": ["query", "value"]}},
    {"model": MIXED, "rows": 8, "optimizer": "adamw", "precision": "bf16", "adapters": LORA},
    {"model": {**MIXED, "d_model": 128, "n_layers": 6, "experts": {"count": 16, "per_token": 4, "d_ff": 128}}, "rows": 16,
     "optimizer": "muon", "precision": "bf16"},
    {"model": {**MIXED, "d_model": 384, "experts": {"count": 4, "per_token": 1, "d_ff": 512}}, "rows": 4,
     "optimizer": "adamw", "precision": "bf16"},
]  # fmt: skip
RESPONSES = 4
STEPS = 8  # a heap grows over the first ones, and with experts the kernels of their many sizes are compiled


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


class Rankings:
    """Batches of four random responses to each prompt, from half as long as the context to all of it."""

    def __init__(self, config: DecoderConfig, prompts: int) -> None:
        self.config, self.prompts = config, prompts

    def batch(self, step: int) -> RankingBatch:
        """The batch of a step."""
        stream, count, width = torch.Generator().manual_seed(step), RESPONSES * self.prompts, self.config.context
        ids = torch.randint(0, self.config.vocab_size, (count, width), generator=stream)
        lengths = torch.randint(width // 2, width + 1, (count,), generator=stream)
        places = torch.arange(count)
        better = places.view(self.prompts, RESPONSES)
        pairs = torch.stack([better[:, :-1].flatten(), better[:, 1:].flatten()], 1)
        weights, numbers = torch.full((len(pairs),), 1 / 3), torch.arange(self.prompts)
        groups = places // RESPONSES
        return RankingBatch(ids, lengths, -places.float(), groups, pairs, weights, numbers)


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
        steps=STEPS, optimizer=job["optimizer"], recompute=job.get("recompute", "none"), compile=job.get("compile", "off"),
        save_every=1e9,
    )  # fmt: skip
    watch, model, pieces = Watch(), build(config).to(runtime.device), job.get("pieces", 1)
    objective: Objective
    if job.get("adapters"):
        adapt(model.to(runtime.dtype), Adaptation(AdapterSettings(**job["adapters"]), Path()), torch.Generator())
    if job.get("rankings"):
        scored = Scored(model, ScalarHead(config))
        objective = reward.Reward(reward.Settings(microbatches=pieces), scored, Rankings(config, rows))  # type: ignore[arg-type]
    else:
        lengths = torch.ones(config.vocab_size).long()
        objective = NextToken(Settings(microbatches=pieces), model, Rows(config, rows), lengths, None)
    with tempfile.TemporaryDirectory() as folder:
        loop.train(objective, settings, folder=Path(folder), runtime=runtime, seed=1, hooks=[watch], quiet=True)
    return watch.peak


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes predicted before and measured after."""
    runtime = detect(job.get("device", "cpu"), job.get("precision", "bf16"))
    pieces, recompute = job.get("pieces", 1), job.get("recompute", "none")
    config, rows, ranked = make_config(job["model"]), job["rows"], job.get("rankings", False)
    adapters = AdapterSettings(**job["adapters"]) if job.get("adapters") else None
    sequences = rows * RESPONSES if ranked else rows
    width = _width(Rankings(config, rows)) if ranked else config.context
    batch = Microbatch(sequences // pieces, width, runtime.dtype, str(runtime.device), packed=not ranked)
    optimiser = find("training.optimizers", job["optimizer"]).MEMORY
    heap = not job.get("pages", False)
    if not heap:
        loop.keep_freed_memory = lambda: None
    how = Learning(batch, optimiser, pieces, recompute == "blocks", not ranked, heap, adapters)
    weights = replace(Weights.of(config, adapters), output=adapters is None)
    predicted = training_memory(config, how, weights)
    toy = make_config({"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "context": 16})
    trained(toy, pieces, job, runtime)
    before = held_memory(runtime.device)  # everything is loaded
    measured = trained(config, rows, job, runtime) - before
    return {"predicted": predicted.peak, "measured": measured, **asdict(predicted)}


def _width(rankings: Rankings) -> int:
    """Mean length of the longest of the batches that will be learnt from."""
    return max(int(rankings.batch(step).lengths.float().mean()) for step in range(STEPS))


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
    parser.add_argument("--new", action="store_true")
    given = parser.parse_args()
    if given.one:
        if given.one.get("pages") and os.environ.get("MALLOC_MMAP_THRESHOLD_") != PAGES:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = PAGES  # read when a process begins
            os.execv(sys.executable, [sys.executable, *sys.argv])
        print(json.dumps(measure(given.one)))
        return
    print(f"{'model':>22} rows  pieces  optimizer  recompute  precision   predicted   measured  ratio")
    for job in NEW_JOBS if given.new else JOBS:
        for precision in [job["precision"]] if given.new else ("fp32", "bf16"):
            full = {
                **job,
                "precision": precision,
                "pages": given.pages,
                "device": given.device,
                "compile": given.compile,
            }
            row, model = apart(full), job["model"]
            name = f"{model.get('architecture', 'qwen3')} {model.get('d_model', 512)}x{model.get('n_layers', 8)}"
            kind = " lora" if "adapters" in job else " rankings" if "rankings" in job else ""
            print(
                f"{name + kind:>22} {job['rows']:>4} {job.get('pieces', 1):>7} {job['optimizer']:>10} "
                f"{job.get('recompute', 'none'):>10} "
                f"{precision:>10} {row['predicted'] / 1e6:>8.0f} MB {row['measured'] / 1e6:>7.0f} MB "
                f"{row['predicted'] / row['measured']:>6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
