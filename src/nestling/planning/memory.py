"""How much memory training takes, and serving: weights, gradients, optimiser state, activations, loss, keys and values.

    dtype   weights     gradients                  AdamW's state      bytes per weight
    fp32    4           4                          4 + 4              16
    bf16    2 + 4       2 + 4 (2, then 4, where    4 + 4              20 (18)
                        a step is one microbatch)

Working weights and their gradients are in bf16, masters and the gradients summed over microbatches in fp32
(`training/precision.py`). Of frozen weights there is nothing but themselves. Activations are not at their highest when gradients
are: the peak is the larger moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from nestling.model.adapters import Adaptation, AdapterSettings, adapt
from nestling.model.config import DecoderConfig
from nestling.model.decoder import Decoder
from nestling.model.experts import FINENESS, active_share
from nestling.model.likelihood import CHUNK_LOGITS
from nestling.planning.activations import Microbatch, activations
from nestling.planning.parameters import count_parameters

ADAMW = {"hidden": 8, "other": 8, "scratch": 0}
"""Bytes that an optimiser keeps of each weight of a block's matrix and of each other one, and that a step takes for a
while of each of the former. An optimiser's file says its own as MEMORY; this is taken for one that doesn't."""
WASTE, FRESH = 1.45, 0.25
"""What a C library's heap that keeps freed memory (`keep_freed_memory`) takes for a byte of activations, and how much of the
gradients needs more than the holes that activations left; what the optimiser takes for a while needs all of its own.

Fitted to eleven small runs on a CPU, and tested on thirteen others: twelve are predicted within 20 %, one of 0.26 GB 31 % too
high (`python benchmarks/memory.py --new`, AMD EPYC (Zen 5), glibc 2.36, November 2026). Between runs the waste goes from
1.05 to 1.8 (2.3 once, recomputing in float32), and neither the sizes of tensors nor best-fit placing of a step's own
allocations tells it; a good part is that large tensors begin at huge pages (`THP_MEM_ALLOC_ENABLE`). Where each tensor has
pages of its own nothing is wasted, and the sum of tensors is what is taken."""
KERNEL, KERNELS = 600_000, 1024
"""Bytes of a matrix product's kernel that oneDNN compiles for a CPU, and how many it keeps: 0.45 MB, and what it spoils of
the hole that it lies in for good. Of five runs of eight steps with experts four are predicted within 20 %; one whose
router collapses, six layers of sixteen, takes 1.6 times as much."""


@dataclass(frozen=True)
class Learning:
    """How a model is trained, as far as memory asks; `optimiser` as in `ADAMW`, `pieces` microbatches in an update."""

    batch: Microbatch
    optimiser: Mapping[str, int]
    pieces: int = 1
    recompute: bool = False
    logits: bool = True
    heap: bool = True
    """Whether a CPU's memory comes from a C library's heap, and not page by page from the system."""
    adapters: AdapterSettings | None = None
    """That learn in the place of the weights."""


@dataclass(frozen=True)
class Weights:
    """How many weights a model has, how many of them learn, and how many of those lie in matrices of its blocks."""

    all: int
    learnt: int
    hidden: int
    output: bool = True
    """Whether the output layer learns, all of it or rows for new tokens."""
    used: int = 0
    """Of adapters, the weights that one token is multiplied with: not those of experts it isn't sent to."""

    @staticmethod
    def of(config: DecoderConfig, adapters: AdapterSettings | None = None) -> Weights:
        """A decoder all of which learns, or adapters of it and rows for new tokens."""
        counted = count_parameters(config)
        if adapters is None:
            return Weights(counted.total, counted.total, counted.hidden)
        with torch.device("meta"):
            model = Decoder(config)
            adapt(model, Adaptation(adapters, Path()))
        learnt = [p for p in model.parameters() if p.requires_grad]
        added, used = sum(p.numel() for p in learnt), sum(p.numel() * active_share(p, model) for p in learnt)
        matrices = sum(p.numel() for p in learnt if p.ndim == 2)
        return Weights(counted.total + added, added, matrices, used=round(used))


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose. `peak` is what is held at the worst moment; outside a heap that is less than the sum."""

    weights: int = 0
    states: int = 0
    summed: int = 0
    """Gradients of earlier microbatches, held while the next one is computed."""
    gradients: int = 0
    """All of them, at the end of a backward pass."""
    scratch: int = 0
    """What the optimiser takes for a while in a step."""
    activations: int = 0
    """What the forward pass keeps."""
    passing: int = 0
    """What a block's backward pass takes for a while, after the loss is done."""
    loss: int = 0
    cache: int = 0
    """Keys and values."""
    kernels: int = 0
    """Compiled for the many sizes that products of experts have."""
    heap: bool = False
    """Whether what one moment frees is of little use to the next."""

    @property
    def peak(self) -> int:
        """The worst of two moments: the backward pass begins, or the optimiser steps. In a heap, nearly both."""
        held = self.weights + self.states + self.cache + self.kernels
        if self.heap:
            fresh = WASTE * (self.activations + self.passing + self.loss) + FRESH * max(self.summed, self.gradients)
            return held + int(fresh) + self.scratch
        backward = self.activations + max(self.passing, self.loss)
        return held + max(self.summed + backward, self.gradients + self.scratch)

    def __add__(self, other: Memory) -> Memory:
        """Two models at work in one step."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Memory(**sums | {"heap": self.heap or other.heap})


def training_memory(config: DecoderConfig, how: Learning, weights: Weights | None = None) -> Memory:
    """What one decoder takes while it is trained, the runtime's own memory aside.

    Args:
        weights: where not all of the decoder learns, or more than the decoder does.
    """
    counts = weights or Weights.of(config, how.adapters)
    copied = how.batch.dtype == torch.bfloat16
    size = 2 if copied else 4
    several, heap = how.pieces > 1, how.heap and not how.batch.device.startswith("cuda")
    found = activations(config, how.batch, how.recompute, how.adapters)
    held = how.optimiser["hidden"] * counts.hidden + how.optimiser["other"] * (counts.learnt - counts.hidden)
    return Memory(
        weights=size * counts.all + (4 * counts.learnt if copied else 0),
        states=held,
        summed=4 * counts.learnt if several else 0,
        gradients=(4 + (size if several and copied else 0)) * counts.learnt,
        scratch=how.optimiser["scratch"] * counts.hidden,
        activations=found.kept,
        passing=found.passing,
        loss=loss_memory(config, how.batch, counts.output) if how.logits else 0,
        kernels=kernel_memory(config, how),
        heap=heap,
    )


def kernel_memory(config: DecoderConfig, how: Learning) -> int:
    """What experts' products on a CPU in bf16 compile: three for each shape of a matrix that learns, two of a frozen one,
    for each of the numbers of rows that occur, 48 or so as routers learn and fewer where they stay even."""
    if config.experts is None or how.batch.dtype != torch.bfloat16 or how.batch.device.startswith("cuda"):
        return 0
    shapes = 2 * 2 + 4 * 3 if how.adapters else 2 * 3  # in and out of an expert; an adapter's two halves for each
    return KERNEL * min(KERNELS, 3 * FINENESS * shapes)


def loss_memory(config: DecoderConfig, batch: Microbatch, learnt: bool = True) -> int:
    """What the output layer takes: gradients of hidden states (twice) and, if it learns, weight, and one chunk of logits."""
    size = 4 if batch.dtype == torch.float32 else 2
    chunk = CHUNK_LOGITS * (64 if batch.device.startswith("cuda") else 1)
    logits = min(max(chunk, 16 * config.vocab_size), batch.tokens * config.vocab_size)
    hidden = 2 * size * batch.tokens * config.d_model
    weight = (4 + 2 * size) * config.vocab_size * config.d_model if learnt else 0
    return hidden + weight + (8 + size) * logits


def cache_memory(config: DecoderConfig, rows: int, tokens: int | None = None, dtype: torch.dtype = torch.bfloat16) -> int:
    """Keys and values of `rows` texts of `tokens` each (the context when not given): 2 · 2 · b · s · l · h bytes for
    16 bits and as many key heads as query heads."""
    return 2 * dtype.itemsize * rows * (tokens or config.context) * config.n_layers * config.kv_heads * config.head


def reading_memory(config: DecoderConfig, dtype: torch.dtype) -> Memory:
    """A decoder that only reads or writes: its weights."""
    return Memory(weights=dtype.itemsize * count_parameters(config).total)
